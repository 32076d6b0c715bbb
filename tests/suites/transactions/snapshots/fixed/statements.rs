//! How many statements a transaction sends while it waits, where there is no network to count messages on: sqlx logs each
//! of them. In a process of its own, as there is one log for a process.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lock_db::{Error, Locks};
use lock_tests::{Backend, Parent, Process, TestDatabase, pool};
use tokio::time::sleep;
use tracing::{Event, Metadata, Subscriber, span};

use super::data::{increment, make_counter, make_tables, read};

/// For how long the lock is held that is waited for.
const A_WHILE: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(20);
/// SQLite has no queue: a request for its write lock looks every 50 ms, with a few statements each time.
const STATEMENTS_A_SECOND: f64 = 200.0;

static STATEMENTS: AtomicUsize = AtomicUsize::new(0);

/// A transaction that has read something waits for a row lock. It reports how that ended, how many statements it sent, and
/// within how many milliseconds.
pub async fn waiter_that_counts<DB: Backend>(mut parent: Parent) {
    tracing::subscriber::set_global_default(Counter).unwrap();
    let pool = pool::<DB>(parent.url(), 1).await;
    let locks = Locks::new(pool.clone());
    let mut transaction = pool.begin().await.unwrap();
    read::<DB>(&mut transaction, 1).await.unwrap();
    parent.say("has read");
    parent.hear().await.unwrap();
    let (started, before) = (Instant::now(), STATEMENTS.load(Ordering::SeqCst));
    let taken = locks.row_lock("a").wait(PATIENCE).acquire_in(&mut transaction).await;
    let statements = STATEMENTS.load(Ordering::SeqCst) - before;
    let outcome = match taken {
        Ok(_) => "granted".to_owned(),
        Err(Error::Serialization { .. }) => "refused".to_owned(),
        Err(error) => format!("{error:?}").replace(' ', "_"),
    };
    parent.say(format!("{outcome} {statements} {}", started.elapsed().as_millis()));
    drop(transaction.rollback().await);
}

pub async fn count_statements<T: TestDatabase>(database: &T) {
    make_tables(database).await;
    make_counter(database, 1).await;
    let locks = database.locks().await;
    let mut waiter = Process::spawn("waiter_that_counts", database.url(), [""]);
    waiter.expect("has read").await;
    let mut held = locks.row_lock("a").acquire().await.unwrap();
    increment::<T::Database>(&mut held, 1).await.unwrap();
    waiter.say("ask");
    sleep(A_WHILE).await;
    held.commit().await.unwrap();
    let report = waiter.hear().await;
    let words: Vec<&str> = report.split(' ').collect();
    let [outcome, statements, millis] = words[..] else { panic!("{report}") };
    assert_eq!(outcome, "refused");
    let (statements, millis): (f64, f64) = (statements.parse().unwrap(), millis.parse().unwrap());
    let allowed = STATEMENTS_A_SECOND * (1.0 + millis / 1000.0);
    assert!(statements <= allowed, "a spin: {statements} statements within {millis} ms");
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
