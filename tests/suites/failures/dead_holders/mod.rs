//! A holder that has died or vanished keeps a lock from others no longer than its TTL, the notice
//! and a little more. Neither does a clock that was wrong. A holder that lives keeps its lease
//! while another transaction keeps it from renewing.

mod clocks;
mod locked_rows;
mod vanished;

use self::clocks::hold_a_lease_until_killed;

lock_tests::cases! {
    in modules: clocks, locked_rows, vanished
}

lock_tests::child_roles! { hold_a_lease_until_killed }
