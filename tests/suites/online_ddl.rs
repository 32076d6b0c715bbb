//! DDL on `distributed_lock`, and locks on the whole table, while it is in use. A transaction that
//! an `ALTER TABLE` waits for does not wait for that `ALTER TABLE`. A table that is locked as a
//! whole is not reported as a held lock.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

/// In the folder of this name.
mod online_ddl {
    mod circles;
    mod crowds;
    mod locked_tables;
    mod second_locks;
}
