//! Locks and transactions: what commits, what does not, and what the database ends by itself.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod dead_transactions;
mod guarded;
mod implicit_commits;
mod isolation;
mod old_snapshot;
mod savepoints;
mod shared_transactions;
mod snapshots;

use std::process::ExitCode;

fn main() -> ExitCode {
    lock_tests::run(
        [
            dead_transactions::cases(),
            guarded::cases(),
            implicit_commits::cases(),
            isolation::cases(),
            old_snapshot::cases(),
            savepoints::cases(),
            shared_transactions::cases(),
            snapshots::cases(),
        ],
        [snapshots::roles()],
    )
}
