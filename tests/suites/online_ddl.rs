//! DDL on `distributed_lock`, and locks on the whole table, while it is in use. What waits for the table to be altered is not
//! waited for by what it waits for; and a table that is locked as a whole is no lock that is held.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

/// In the folder of this name.
mod online_ddl {
    mod circles;
    mod crowds;
    mod locked_tables;
    mod second_locks;
}
