//! How many statements a transaction sends while it waits: sqlx logs each of them. In a process of its own, as there is one
//! log for a process.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lock_db::Locks;
use lock_tests::{Backend, Parent, Process, SqliteFile, TestDatabase};
use tracing::{Event, Metadata, Subscriber, span};

use super::journals::{BOTH, PATIENCE, pool, write};

/// For how long at least the lock is held that is waited for.
const A_WHILE: Duration = Duration::from_secs(1);
/// It looks every 50 ms, with a few statements each time.
const STATEMENTS_A_SECOND: f64 = 200.0;

static STATEMENTS: AtomicUsize = AtomicUsize::new(0);

/// Reports how a request of a transaction ended that has read something, how many statements it sent, and within how many
/// milliseconds.
pub async fn waiter_that_counts<DB: Backend>(mut parent: Parent) {
    tracing::subscriber::set_global_default(Counter).unwrap();
    let pool = lock_tests::pool::<DB>(parent.url(), 1).await;
    let locks = Locks::new(pool.clone());
    locks.check().await.unwrap();
    let mut transaction = pool.begin().await.unwrap();
    if parent.argument(0) == "reads" {
        DB::find_number(&mut transaction, "SELECT COUNT(*) FROM business").await.unwrap();
    }
    parent.say("has begun");
    parent.hear().await.unwrap();
    let (started, before) = (Instant::now(), STATEMENTS.load(Ordering::SeqCst));
    let taken = locks.row_lock("a").wait(PATIENCE).acquire_in(&mut transaction).await;
    let statements = STATEMENTS.load(Ordering::SeqCst) - before;
    drop(transaction.rollback().await);
    let outcome = if taken.is_ok() { "granted" } else { "refused" };
    parent.say(format!("{outcome} {statements} {}", started.elapsed().as_millis()));
}

pub async fn count_statements(database: &SqliteFile) {
    for journal in BOTH {
        for reads in ["reads", "reads nothing"] {
            let pool = pool(database, journal).await;
            let locks = lock_tests::migrated(Locks::new(pool.clone())).await;
            let mut waiter = Process::spawn("waiter_that_counts", database.url(), [reads]);
            waiter.expect("has begun").await;
            let mut held = locks.row_lock("a").acquire().await.unwrap();
            write(&mut held).await;
            waiter.say("ask");
            tokio::time::sleep(A_WHILE).await;
            held.commit().await.unwrap();
            let report = waiter.hear().await;
            let words: Vec<&str> = report.split(' ').collect();
            let [outcome, statements, millis] = words[..] else { panic!("{report}") };
            assert_eq!(outcome, if reads == "reads" { "refused" } else { "granted" }, "{journal:?}");
            let (statements, millis): (f64, f64) = (statements.parse().unwrap(), millis.parse().unwrap());
            let allowed = STATEMENTS_A_SECOND * (1.0 + millis / 1000.0);
            assert!(statements <= allowed, "a spin: {journal:?}: {statements} statements within {millis} ms");
            locks.close().await;
            pool.close().await;
        }
    }
}

/// Counts the statements that sqlx logs.
struct Counter;

impl Subscriber for Counter {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "sqlx::query"
    }

    fn event(&self, _: &Event<'_>) {
        STATEMENTS.fetch_add(1, Ordering::SeqCst);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}
