//! A holder that has died or vanished keeps a lock from others no longer than its TTL, the notice
//! and a little more. Neither does a clock that was wrong. A holder that lives keeps its lease
//! while another transaction keeps it from renewing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

/// In the folder of this name.
mod dead_holders {
    pub mod clocks;
    pub mod locked_rows;
    pub mod vanished;
}

use lock_tests::{child_roles, for_each_database};

use dead_holders::clocks::{
    a_holder_that_is_killed, a_holder_that_lives, a_kept_lock_and_transactions,
    a_killed_holder_and_several_names, a_killed_holder_and_transactions, a_killed_holder_and_tries,
    a_killed_holder_that_was_given_notice, a_lock_that_is_kept_for_a_while, hold_a_lease,
};
use dead_holders::locked_rows::{
    by_a_clean_up, by_a_clean_up_that_waits, by_a_guarded_transaction, by_a_look_that_locks,
    by_a_verified_transaction, by_another_writer, by_the_transaction_of_run,
};
use dead_holders::vanished::{
    a_transaction_that_was_idle_for_too_long, after_a_guarded_commit, after_release_in, after_verify_in,
    before_a_guarded_commit, the_limit_of_an_idle_transaction_is_given_back, with_others_waiting,
};

child_roles! { hold_a_lease }

for_each_database! {
    a_holder_that_is_killed,
    a_killed_holder_and_tries,
    a_killed_holder_that_was_given_notice,
    a_killed_holder_and_transactions,
    a_killed_holder_and_several_names,
    a_holder_that_lives,
    a_lock_that_is_kept_for_a_while,
    a_kept_lock_and_transactions,
    by_a_clean_up,
    by_a_look_that_locks,
    by_a_clean_up_that_waits,
    by_a_guarded_transaction,
    by_the_transaction_of_run,
    by_a_verified_transaction,
    by_another_writer,
    ;
    on servers:
    before_a_guarded_commit,
    after_a_guarded_commit,
    with_others_waiting,
}

/// PostgreSQL ends idle transactions, for as long as one transaction requests it.
mod idle_transactions {
    use super::*;

    lock_tests::__tests_on! { postgres PostgresServer
        after_verify_in,
        after_release_in,
        the_limit_of_an_idle_transaction_is_given_back,
        a_transaction_that_was_idle_for_too_long
    }
}
