//! The specifics of SQLite. Databases that connections can't share are refused with a reason. Both
//! kinds of journal work. A transaction that can't write any more is refused immediately. Long
//! writes cost no lease.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

/// In the folder of this name.
mod sqlite {
    pub mod journals;
    mod long_writes;
    mod refused;
    pub mod statements;
}

use lock_tests::child_roles;
use sqlite::statements::waiter_that_counts;

child_roles! { waiter_that_counts }
