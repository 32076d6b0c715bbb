//! The specifics of SQLite. Databases that connections can't share are refused with a reason. Both
//! kinds of journal work. A transaction that can't write any more is refused immediately. Long
//! writes cost no lease.

mod journals;
mod long_writes;
mod refused;
mod statements;

use self::statements::waiter_that_counts;

lock_tests::cases! {
    in modules: journals, long_writes, refused
}

lock_tests::child_roles! { waiter_that_counts }
