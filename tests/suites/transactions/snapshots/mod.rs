//! Locks in transactions that may have read something before the last holder's commit. At an
//! isolation level with one snapshot for the whole transaction they are refused immediately with
//! `Error::Serialization`, and can't commit any more. At the levels below they get the lock.
//!
//! The fixed cases consist of cells. A cell says how the holder works and ends, and when and how
//! the transaction requests the lock. Each runs at every isolation level, and a failure lists the
//! cells that failed. In the random cases two transactions and two holders take locks and work
//! under them, one step at a time, in the order of a seeded schedule.
//!
//! ```text
//! LOCK_DB_TEST_ROUNDS=1000 tests/run -p lock-tests --test snapshots random_orders_lose_nothing
//! LOCK_DB_TEST_SEED=… LOCK_DB_TEST_ROUNDS=1 tests/run -p lock-tests --test snapshots mysql::random_orders_lose_nothing
//! ```

mod fixed;
mod level;
mod random;

use lock_db::Kind;
use lock_tests::{Random, SqliteFile, TestDatabase, TestServer, note, rounds, seed};

use self::fixed::cells::{Cell, Moment, run_cells};
use self::fixed::crash::{holder_that_is_killed, run_crashes};
use self::fixed::holder::{End, Way};
use self::fixed::reader::{Ask, CountedWay};
use self::fixed::statements::{count_statements, waiter_that_counts};
use self::random::ledger::{Tally, Violation};
use self::random::world::{Crew, Lock, Stage, World};

lock_tests::cases! {
    on every database:
    locks_after_guarded_commits,
    locks_after_verified_commits,
    locks_after_plain_commits_under_a_lease,
    locks_after_row_locks,
    locks_after_insert_locks_in_transactions,
    locks_before_any_read_get_a_new_snapshot,
    locks_of_a_name_that_was_never_used,
    locks_after_a_crash,
    locks_after_a_takeover,
    locks_after_a_late_commit,
    random_orders_lose_nothing;

    on every server:
    random_orders_of_a_handwritten_lock_lose_updates;

    on sqlite:
    waiting_does_not_spin,
}

/// How many random worlds there are, unless `LOCK_DB_TEST_ROUNDS` is set.
const WORLDS: usize = 30;
/// Within how many worlds a handwritten lock must have failed. Usually it fails in the first one.
const WORLDS_BY_HAND: i64 = 400;

lock_tests::child_roles! { holder_that_is_killed, waiter_that_counts }

async fn locks_after_guarded_commits<T: CountedWay>(database: &T) {
    let ends =
        [End::Drop, End::CommitAndRelease, End::ReleaseIn, End::AtLeast, End::HandOff, End::AfterHandOff];
    let mut cells = Cell::all(Way::GuardedTransaction, End::Release);
    cells.extend(Cell::some(Way::GuardedTransaction, &ends));
    run_cells(database, &cells).await;
}

async fn locks_after_verified_commits<T: CountedWay>(database: &T) {
    let ends = [End::Release, End::Drop, End::ReleaseIn, End::AtLeast, End::HandOff];
    run_cells(database, &Cell::some(Way::VerifiedTransaction, &ends)).await;
}

async fn locks_after_plain_commits_under_a_lease<T: CountedWay>(database: &T) {
    let ends = [End::Release, End::Drop, End::AtLeast, End::HandOff];
    run_cells(database, &Cell::some(Way::PlainTransaction, &ends)).await;
}

async fn locks_after_row_locks<T: CountedWay>(database: &T) {
    let mut cells = Cell::all(Way::RowGuard, End::Commit);
    cells.extend(Cell::all(Way::RowLockIn, End::Commit));
    cells.extend(Cell::some(Way::RowLockIn, &[End::Rollback]));
    run_cells(database, &cells).await;
}

async fn locks_after_insert_locks_in_transactions<T: CountedWay>(database: &T) {
    let mut cells = Cell::all(Way::InsertLockIn, End::Commit);
    cells.extend(Cell::some(Way::InsertLockIn, &[End::Rollback]));
    run_cells(database, &cells).await;
}

/// Without an earlier read, the lock comes with a new snapshot.
async fn locks_before_any_read_get_a_new_snapshot<T: CountedWay>(database: &T) {
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
async fn locks_of_a_name_that_was_never_used<T: CountedWay>(database: &T) {
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
async fn locks_after_a_crash<T: CountedWay>(database: &T) {
    run_crashes(database, End::Crash).await;
}

/// Another process takes the lease over, commits as well, and releases it.
async fn locks_after_a_takeover<T: CountedWay>(database: &T) {
    run_crashes(database, End::Takeover).await;
}

/// In the snapshot the lease has expired, but its holder commits after that. The commit leaves no
/// trace in the lock's row.
async fn locks_after_a_late_commit<T: CountedWay>(database: &T) {
    run_crashes(database, End::LateCommit).await;
}

/// The other cases count messages, if there is a network.
async fn waiting_does_not_spin(database: &SqliteFile) {
    count_statements(database).await;
}

async fn random_orders_lose_nothing<T: TestDatabase>(database: &T) {
    let crew = Crew::new(database).await;
    let mut seeds = Random(seed());
    // The first world has the given seed, so that a single one can be repeated.
    let mut seed = seeds.0;
    let mut total = Tally::default();
    let worlds = rounds(WORLDS);
    for number in 0..worlds {
        let world = World::random::<T>(seed, i64::try_from(number).unwrap(), Lock::LockDb);
        let (tally, _none) = Stage::play(database, &crew, &world, true).await;
        total.add(&tally);
        seed = seeds.next();
    }
    note(format_args!("{}: {total}", T::NAME));
    if worlds >= WORLDS {
        assert!(total.committed_in_transactions > 0, "no transaction had a lock: {total}");
        assert!(total.refused_in_transactions > 0, "no transaction was refused: {total}");
        assert!(total.committed_by_holders > 0, "no holder has committed: {total}");
    }
}

/// Shows that the random orders find what they look for.
async fn random_orders_of_a_handwritten_lock_lose_updates<T: TestServer>(database: &T) {
    let crew = Crew::new(database).await;
    let mut seeds = Random(seed());
    for number in 0..WORLDS_BY_HAND {
        let world = World::random::<T>(seeds.next(), number, Lock::ByHand);
        let (_tally, violations) = Stage::play(database, &crew, &world, false).await;
        let is_found = |violation: &Violation| match violation {
            // PostgreSQL refuses to change a row that is newer than the snapshot, but not to insert
            // another one.
            Violation::LostUpdate(_) => T::NAME != "postgres",
            Violation::SecondOrder(_) => T::NAME == "postgres",
            _ => false,
        };
        if violations.iter().any(is_found) {
            note(format_args!("{}: found in world {number}: {violations:?}", T::NAME));
            return;
        }
    }
    panic!("{WORLDS_BY_HAND} worlds of a lock without a check of the snapshot have lost nothing");
}
