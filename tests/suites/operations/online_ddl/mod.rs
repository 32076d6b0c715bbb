//! DDL on `distributed_lock`, and locks on the whole table, while it is in use. A transaction that
//! an `ALTER TABLE` waits for does not wait for that `ALTER TABLE`. A table that is locked as a
//! whole is not reported as a held lock.

mod contention;
mod locked_tables;
mod second_locks;
mod wait_cycles;

lock_tests::cases! {
    in modules: wait_cycles, contention, locked_tables, second_locks
}
