//! Locks in transactions that may have read something before the last holder's commit. At an isolation level with one
//! snapshot for the whole transaction they are refused with `Error::Serialization`, at once, and can't commit any more.
//! At the levels below they get the lock.
//!
//! The fixed cases consist of cells. A cell says how the holder works and ends, and when and how the transaction asks. Each
//! runs at every isolation level, and a failure lists the cells that failed.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

/// In the folder of this name.
mod snapshots {
    pub mod fixed {
        pub mod cells;
        pub mod crash;
        pub mod data;
        pub mod holder;
        pub mod reader;
        pub mod statements;
    }
    pub mod level;
}

use lock_db::Kind;
use lock_tests::{CaseRuntime, SqliteFile, child_roles, for_each_database, run_case};

use snapshots::fixed::cells::{Cell, Moment, run_cells};
use snapshots::fixed::crash::{holder_that_is_killed, run_crashes};
use snapshots::fixed::holder::{End, Way};
use snapshots::fixed::reader::{Ask, CountedWay};
use snapshots::fixed::statements::{count_statements, waiter_that_counts};

for_each_database! {
    after_guarded_commits,
    after_verified_commits,
    after_plain_commits_under_a_lease,
    after_row_locks,
    after_insert_locks_in_transactions,
    a_lock_taken_first,
    a_name_that_was_never_used,
    after_a_crash,
    after_a_takeover,
    after_a_commit_that_was_late,
}

child_roles! { holder_that_is_killed, waiter_that_counts }

async fn after_guarded_commits<T: CountedWay>(database: &T) {
    let ends =
        [End::Drop, End::CommitAndRelease, End::ReleaseIn, End::AtLeast, End::HandOff, End::AfterHandOff];
    let mut cells = Cell::all(Way::GuardedTransaction, End::Release);
    cells.extend(Cell::some(Way::GuardedTransaction, &ends));
    run_cells(database, &cells).await;
}

async fn after_verified_commits<T: CountedWay>(database: &T) {
    let ends = [End::Release, End::Drop, End::ReleaseIn, End::AtLeast, End::HandOff];
    run_cells(database, &Cell::some(Way::VerifiedTransaction, &ends)).await;
}

async fn after_plain_commits_under_a_lease<T: CountedWay>(database: &T) {
    let ends = [End::Release, End::Drop, End::AtLeast, End::HandOff];
    run_cells(database, &Cell::some(Way::PlainTransaction, &ends)).await;
}

async fn after_row_locks<T: CountedWay>(database: &T) {
    let mut cells = Cell::all(Way::RowGuard, End::Commit);
    cells.extend(Cell::all(Way::RowLockIn, End::Commit));
    cells.extend(Cell::some(Way::RowLockIn, &[End::Rollback]));
    run_cells(database, &cells).await;
}

async fn after_insert_locks_in_transactions<T: CountedWay>(database: &T) {
    let mut cells = Cell::all(Way::InsertLockIn, End::Commit);
    cells.extend(Cell::some(Way::InsertLockIn, &[End::Rollback]));
    run_cells(database, &cells).await;
}

/// Without a read before it, the lock comes with a new snapshot.
async fn a_lock_taken_first<T: CountedWay>(database: &T) {
    let cells = [
        Cell::all(Way::GuardedTransaction, End::Release),
        Cell::some(Way::GuardedTransaction, &[End::CommitAndRelease, End::HandOff]),
        Cell::all(Way::InsertLockIn, End::Commit),
        Cell::all(Way::RowGuard, End::Commit),
        Cell::some(Way::RowLockIn, &[End::Commit]),
    ];
    let cells = cells.concat().into_iter().map(|cell| Cell { reads_first: false, ..cell });
    run_cells(database, &cells.collect::<Vec<_>>()).await;
}

/// The row of the lock may be newer than the snapshot.
async fn a_name_that_was_never_used<T: CountedWay>(database: &T) {
    let ways = [
        Way::Nothing(Kind::Insert),
        Way::Nothing(Kind::Row),
        Way::GuardedTransaction,
        Way::InsertLockIn,
        Way::RowGuard,
        Way::RowLockIn,
    ];
    let mut cells = Vec::new();
    for way in ways {
        for moment in [Moment::Held, Moment::Later] {
            for ask in [Ask::Acquire, Ask::Try, Ask::Several] {
                let end = if way == Way::GuardedTransaction { End::Release } else { End::Commit };
                cells.push(Cell { is_new_name: true, ..Cell::new(way, end, moment, ask) });
            }
        }
    }
    run_cells(database, &cells).await;
}

/// A transaction waits for the lease of a dead process to expire.
async fn after_a_crash<T: CountedWay>(database: &T) {
    run_crashes(database, End::Crash).await;
}

/// Another process takes the lease over, commits as well, and releases it.
async fn after_a_takeover<T: CountedWay>(database: &T) {
    run_crashes(database, End::Takeover).await;
}

/// In the snapshot the lease has expired, but its holder commits after that. The commit leaves no trace in the lock's row.
async fn after_a_commit_that_was_late<T: CountedWay>(database: &T) {
    run_crashes(database, End::LateCommit).await;
}

/// The other cases count messages, where there is a network.
#[test]
fn waiting_on_sqlite_is_no_spin() {
    run_case(CaseRuntime::TwoWorkers, async |database: &SqliteFile| count_statements(database).await);
}
