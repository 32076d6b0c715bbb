//! Only a lock that was seen to be held is reported as held: by `Error::Timeout`, by `None` from a
//! try, and by a function that is skipped. All other results are errors with a cause. A temporary
//! obstacle is waited for, and a permanent one fails immediately.
//!
//! Each case makes every kind of request: leases and row locks, one or several, in a transaction of
//! their own or of the caller, by a call or by the attribute with `skip`, with short waits and as
//! tries.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

/// In the folder of this name.
mod seen_to_be_held {
    pub mod accounts;
    pub mod free;
    pub mod held;
    pub mod passing;
    pub mod refusals;
    pub mod requests;
}

use lock_tests::for_each_database;

use seen_to_be_held::free::{
    a_database_that_was_never_there, a_locked_table_is_waited_for_in_a_transaction,
    a_table_that_is_locked_as_a_whole, another_writer_is_waited_for, behind_another_caller,
    leases_while_another_transaction_writes, leases_while_the_database_is_away,
    locks_in_transactions_while_another_transaction_writes, locks_in_transactions_while_the_database_is_away,
    row_locks_while_another_transaction_writes, row_locks_while_the_database_is_away,
};
use seen_to_be_held::held::{
    a_lease_of_another_process, a_lease_of_this_process, a_lock_in_a_transaction, a_row_lock,
    a_row_lock_of_this_process, one_of_several_leases, those_who_came_before,
};
use seen_to_be_held::passing::{
    a_server_that_does_not_wait_is_not_asked_without_pause, statement_timeouts,
    statement_timeouts_for_row_locks, statements_that_are_cancelled, too_many_connections_of_an_account,
    too_many_connections_of_an_account_for_row_locks,
};
use seen_to_be_held::refusals::{
    a_file_that_can_not_be_written, a_file_that_can_not_be_written_for_several, a_role_that_may_not_log_in,
    a_role_that_may_not_log_in_for_several, missing_rights, missing_rights_for_several, what_does_not_pass,
    what_does_not_pass_for_several,
};

for_each_database! {
    a_lease_of_another_process,
    a_lease_of_this_process,
    one_of_several_leases,
    those_who_came_before,
    a_row_lock_of_this_process,
    ;
    on servers:
    a_row_lock,
    a_lock_in_a_transaction,
    leases_while_the_database_is_away,
    row_locks_while_the_database_is_away,
    locks_in_transactions_while_the_database_is_away,
    a_database_that_was_never_there,
    behind_another_caller,
    a_table_that_is_locked_as_a_whole,
    a_locked_table_is_waited_for_in_a_transaction,
    what_does_not_pass,
    what_does_not_pass_for_several,
    missing_rights,
    missing_rights_for_several,
    a_role_that_may_not_log_in,
    a_role_that_may_not_log_in_for_several,
    too_many_connections_of_an_account,
    too_many_connections_of_an_account_for_row_locks,
    statement_timeouts,
    statement_timeouts_for_row_locks,
    statements_that_are_cancelled,
    a_server_that_does_not_wait_is_not_asked_without_pause,
}

/// There any writer keeps all others from writing.
mod one_writer {
    use super::*;

    lock_tests::__tests_on! { sqlite SqliteFile
        leases_while_another_transaction_writes,
        row_locks_while_another_transaction_writes,
        locks_in_transactions_while_another_transaction_writes,
        another_writer_is_waited_for,
        a_file_that_can_not_be_written,
        a_file_that_can_not_be_written_for_several
    }
}
