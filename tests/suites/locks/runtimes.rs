//! How tests of an application use runtimes: one `Locks` for all tests, each test with a runtime of
//! its own that ends with it, and paused clocks.

use std::error::Error as _;
use std::thread;
use std::time::{Duration, Instant};

use lock_db::{Error, Locks, distributed_lock};
use lock_tests::{Backend, TestDatabase, TestServer, eventually, rounds};
use sqlx::pool::PoolOptions;
use sqlx::{Connection, Pool};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;

lock_tests::cases! {
    on every database:
    runtimes_one_after_the_other,
    runtimes_side_by_side,
    runtimes_that_share_the_pool_with_the_application,
    runtimes_that_end_with_open_transactions,
    leases_under_a_paused_clock (current_thread),
    guarded_transactions_under_a_paused_clock (current_thread),
    row_locks_under_a_paused_clock (current_thread),
    transactions_under_a_paused_clock (current_thread),
    functions_under_a_paused_clock (current_thread),
    waits_under_a_paused_clock_last (current_thread),
    waits_under_a_paused_clock_end_with_the_holder (current_thread),
    waits_for_the_pool_under_a_paused_clock (current_thread);

    on every server:
    dead_connections_of_the_pool_are_replaced,
    a_connection_that_dies_with_its_runtime,
}

const PATIENCE: Duration = Duration::from_mins(1);
const MOMENT: Duration = Duration::from_millis(300);
const TESTS: usize = 20;

#[derive(Clone, Copy)]
enum Kind {
    OneThread,
    ManyThreads,
    Paused,
}

impl Kind {
    fn runtime(self) -> Runtime {
        let mut builder = match self {
            Self::ManyThreads => Builder::new_multi_thread(),
            Self::OneThread | Self::Paused => Builder::new_current_thread(),
        };
        builder.worker_threads(2).start_paused(matches!(self, Self::Paused)).enable_all().build().unwrap()
    }
}

/// Runs it as a test would: on a thread and a runtime of its own, which end with it.
async fn as_test<T: Send + 'static>(kind: Kind, test: impl AsyncFnOnce() -> T + Send + 'static) -> T {
    let (done, is_done) = oneshot::channel();
    thread::spawn(move || {
        let output = kind.runtime().block_on(test());
        let _gone = done.send(output);
    });
    is_done.await.expect("does not panic")
}

/// The `Locks` that all tests share, on a pool such as a test has for itself.
async fn shared<T: TestDatabase>(database: &T) -> (Pool<T::Database>, Locks<T::Database>) {
    let pool =
        PoolOptions::new().max_connections(4).acquire_timeout(PATIENCE).connect_lazy(database.url()).unwrap();
    let locks = Locks::builder(pool.clone()).default_wait(PATIENCE).build();
    locks.migrate().await.unwrap();
    (pool, locks)
}

/// An error of lock-db or of sqlx.
type Failed = Box<dyn std::error::Error + Send + Sync>;

#[distributed_lock("function {number}", locks = locks)]
async fn function<DB: Backend>(locks: &Locks<DB>, number: usize) -> Result<(), Error> {
    tokio::task::yield_now().await;
    Ok(())
}

#[distributed_lock("row function {number}", mode = row, lease = guard, locks = locks)]
async fn row_function<DB: Backend>(locks: &Locks<DB>, number: usize) -> Result<(), Failed> {
    DB::find_number(guard, "SELECT 1").await?;
    Ok(())
}

/// Takes each kind of lock once, whatever runs at the same time.
async fn all_kinds<DB: Backend>(locks: &Locks<DB>, number: usize) -> Result<(), Failed> {
    let lease = locks.insert_lock(format!("lease {number}")).acquire().await?;
    let mut guarded = lease.begin().await?;
    DB::find_number(&mut guarded, "SELECT 1").await?;
    tokio::time::sleep(Duration::from_millis(5)).await;
    guarded.commit().await?;
    lease.release().await?;
    let mut row = locks.row_lock(format!("row {number}")).acquire().await?;
    tokio::time::sleep(Duration::from_millis(5)).await;
    DB::find_number(&mut row, "SELECT 1").await?;
    row.commit().await?;
    function(locks, number).await?;
    row_function(locks, number).await?;
    // These end after their test.
    let lease = locks.insert_lock(format!("dropped {number}")).acquire().await?;
    let dropped = lease.begin().await?;
    drop((dropped, lease));
    drop(locks.row_lock(format!("dropped row {number}")).acquire().await?);
    Ok(())
}

async fn runtimes_one_after_the_other<T: TestDatabase>(database: &T) {
    let (pool, locks) = shared(database).await;
    for round in 0..rounds(1) {
        for number in 0..TESTS {
            let kind = if number % 2 == 0 { Kind::OneThread } else { Kind::ManyThreads };
            let locks = locks.clone();
            let done = as_test(kind, async move || all_kinds(&locks, number).await).await;
            done.unwrap_or_else(|error| panic!("round {round}, test {number}: {error}"));
        }
    }
    nothing_is_left(database, &pool, &locks).await;
}

async fn runtimes_side_by_side<T: TestDatabase>(database: &T) {
    for round in 0..rounds(1) {
        // Created anew each time: the first tests find nothing of earlier ones.
        let (pool, locks) = shared(database).await;
        let mut tests = tokio::task::JoinSet::new();
        for thread in 0..6 {
            let locks = locks.clone();
            tests.spawn(async move {
                for number in (thread..TESTS).step_by(6) {
                    let kind = if round % 2 == 0 { Kind::OneThread } else { Kind::ManyThreads };
                    let locks = locks.clone();
                    let done = as_test(kind, async move || all_kinds(&locks, number).await).await;
                    done.unwrap_or_else(|error| panic!("round {round}, test {number}: {error}"));
                }
            });
        }
        while let Some(done) = tests.join_next().await {
            done.unwrap();
        }
        nothing_is_left(database, &pool, &locks).await;
        locks.close().await;
        pool.close().await;
    }
}

/// Whatever happened to the runtimes: no transaction and no lock is left, and later callers get the
/// whole pool.
async fn nothing_is_left<T: TestDatabase>(
    database: &T,
    pool: &Pool<T::Database>,
    locks: &Locks<T::Database>,
) {
    eventually(PATIENCE, async || database.activity().await.transactions == 0).await;
    for number in 0..TESTS {
        let lease = locks.insert_lock(format!("dropped {number}")).acquire().await.unwrap();
        lease.release().await.unwrap();
        locks.row_lock(format!("dropped row {number}")).acquire().await.unwrap().rollback().await.unwrap();
    }
    let mut all = Vec::new();
    for _ in 0..pool.options().get_max_connections() {
        let mut connection = pool.acquire().await.unwrap();
        assert_eq!(T::Database::find_number(&mut connection, "SELECT 1").await.unwrap(), Some(1));
        all.push(connection);
    }
}

/// The tests use the pool as well, and leave connections in it that are dead without looking like
/// it: a quick answer still arrives. Where one fails later than at BEGIN, its error says why, and
/// nothing is left of it.
async fn runtimes_that_share_the_pool_with_the_application<T: TestDatabase>(database: &T) {
    let (pool, locks) = shared(database).await;
    for number in 0..TESTS {
        let (pool, locks) = (pool.clone(), locks.clone());
        let test = async move || {
            let both = (pool.acquire().await.unwrap(), pool.acquire().await.unwrap());
            drop(both);
            tokio::task::yield_now().await;
            all_kinds(&locks, number).await
        };
        if let Err(error) = as_test(Kind::OneThread, test).await {
            let dead = format!("{error:?}").contains("is being shutdown");
            assert!(dead && T::NAME != "sqlite", "test {number}: {error:?}");
        }
    }
    pool.close().await;
    let (pool, locks) = shared(database).await;
    nothing_is_left(database, &pool, &locks).await;
}

/// A pool that does not test its connections before it returns them. All of them are dead, and a
/// try still gets a lock.
async fn dead_connections_of_the_pool_are_replaced<T: TestServer>(database: &T) {
    let connections = 4;
    let pool = PoolOptions::<T::Database>::new()
        .max_connections(connections)
        .acquire_timeout(PATIENCE)
        .test_before_acquire(false)
        .connect_lazy(database.url())
        .unwrap();
    let locks = Locks::new(pool.clone());
    locks.migrate().await.unwrap();
    let all_die = async || {
        let mut all = Vec::new();
        for _ in 0..connections {
            all.push(pool.acquire().await.unwrap());
        }
        drop(all);
        eventually(PATIENCE, async || pool.num_idle() == usize::try_from(connections).unwrap()).await;
        database.end_connections().await;
    };
    all_die().await;
    let guard = locks.row_lock("a").try_acquire().await.unwrap().expect("is free");
    guard.commit().await.unwrap();
    all_die().await;
    locks.row_lock("a").acquire().await.unwrap().commit().await.unwrap();
    let lease = locks.insert_lock("b").acquire().await.unwrap();
    all_die().await;
    lease.begin().await.unwrap().commit().await.unwrap();
}

async fn runtimes_that_end_with_open_transactions<T: TestDatabase>(database: &T) {
    for kind in [Kind::OneThread, Kind::ManyThreads] {
        let (pool, locks) = shared(database).await;
        let ours = locks.clone();
        let test = async move || {
            // On SQLite a transaction keeps all others out.
            let guard = ours.row_lock("dropped row 1").acquire().await.unwrap();
            tokio::spawn(async move {
                let _guard = guard;
                std::future::pending::<()>().await;
            });
            tokio::task::yield_now().await;
        };
        as_test(kind, test).await;
        let ours = locks.clone();
        let test = async move || {
            let lease = ours.insert_lock("dropped 1").acquire().await.unwrap();
            let guarded = lease.begin().await.unwrap();
            tokio::spawn(async move {
                let _open = (guarded, lease);
                std::future::pending::<()>().await;
            });
            tokio::task::yield_now().await;
        };
        as_test(kind, test).await;
        nothing_is_left(database, &pool, &locks).await;
    }
}

/// A connection that the application opened on a runtime that ends is dead for lock-db, too. The
/// error says why.
async fn a_connection_that_dies_with_its_runtime<T: TestServer>(database: &T) {
    let pool = PoolOptions::<T::Database>::new()
        .max_connections(1)
        .acquire_timeout(PATIENCE)
        .connect_lazy(database.url())
        .unwrap();
    let locks = Locks::new(pool.clone());
    locks.migrate().await.unwrap();
    let runtime = Kind::ManyThreads.runtime();
    let ours = pool.clone();
    let connected = runtime.spawn(async move { drop(ours.acquire().await.unwrap()) });
    connected.await.unwrap();
    eventually(PATIENCE, async || pool.num_idle() == 1).await;
    let mut guard = locks.row_lock("a").acquire().await.unwrap();
    runtime.shutdown_background();
    eventually(PATIENCE, async || T::Database::find_number(&mut guard, "SELECT 1").await.is_err()).await;
    let error = guard.commit().await.unwrap_err();
    assert!(matches!(&error, Error::CommitUnknown { .. } | Error::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains("runtime that made the connection has ended"), "{error}");
    let source = error.source().and_then(|source| source.downcast_ref()).expect("is of sqlx");
    assert!(
        matches!(source, sqlx::Error::Io(error) if tokio::runtime::is_rt_shutdown_err(error)),
        "{source:?}"
    );
    locks.row_lock("a").wait(PATIENCE).acquire().await.unwrap().commit().await.unwrap();
}

async fn leases_under_a_paused_clock<T: TestDatabase>(database: &T) {
    let (_pool, locks) = shared(database).await;
    let test = async move || {
        let lease = locks.insert_lock("a").acquire().await.unwrap();
        assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_none());
        assert!(lease.is_held());
        lease.release().await.unwrap();
        let run = locks.insert_lock("a").run(async |lease| {
            tokio::time::sleep(Duration::from_hours(1)).await;
            assert!(lease.is_held());
            Ok::<_, Error>(())
        });
        run.await.unwrap();
        let leases = locks.insert_locks(["a", "b", "c"]).acquire().await.unwrap();
        leases.release().await.unwrap();
        locks.check().await.unwrap();
        locks.info("a").await.unwrap();
        let _left = locks.insert_lock("a").acquire().await.unwrap();
        locks.close().await;
    };
    as_test(Kind::Paused, test).await;
    let free = database.locks().await.insert_lock("a").try_acquire().await.unwrap();
    assert!(free.is_some(), "`close` has waited for the release");
}

async fn guarded_transactions_under_a_paused_clock<T: TestDatabase>(database: &T) {
    let (_pool, locks) = shared(database).await;
    let test = async move || {
        let lease = locks.insert_lock("a").acquire().await.unwrap();
        for _ in 0..3 {
            let mut guarded = lease.begin().await.unwrap();
            T::Database::find_number(&mut guarded, "SELECT 1").await.unwrap();
            guarded.commit().await.unwrap();
            lease.begin().await.unwrap().rollback().await.unwrap();
        }
        let guarded = lease.begin().await.unwrap();
        lease.commit_and_release(guarded).await.unwrap();
    };
    as_test(Kind::Paused, test).await;
}

async fn row_locks_under_a_paused_clock<T: TestDatabase>(database: &T) {
    let (_pool, locks) = shared(database).await;
    let test = async move || {
        for _ in 0..3 {
            let mut guard = locks.row_lock("a").acquire().await.unwrap();
            assert!(locks.row_lock("a").try_acquire().await.unwrap().is_none());
            T::Database::find_number(&mut guard, "SELECT 1").await.unwrap();
            guard.commit().await.unwrap();
            locks.row_lock("a").try_acquire().await.unwrap().expect("is free").rollback().await.unwrap();
            drop(locks.row_lock("a").acquire().await.unwrap());
        }
    };
    as_test(Kind::Paused, test).await;
}

async fn transactions_under_a_paused_clock<T: TestDatabase>(database: &T) {
    // Not from the pool: the clock would jump over the pool's own limit.
    let (locks, url) = (shared(database).await.1, database.url().to_owned());
    let test = async move || {
        let mut connection = lock_tests::connection::<T::Database>(&url).await;
        let lease = locks.insert_lock("lease").acquire().await.unwrap();
        let mut transaction = connection.begin().await.unwrap();
        let held = locks.row_lock("a").acquire_in(&mut transaction).await.unwrap();
        assert_eq!(held.hold_count(), 1);
        locks.row_lock("a").try_acquire_in(&mut transaction).await.unwrap().expect("is ours");
        locks.insert_lock("b").acquire_in(&mut transaction).await.unwrap();
        locks.row_locks(["c", "d"]).acquire_in(&mut transaction).await.unwrap();
        locks.insert_locks(["e", "f"]).acquire_in(&mut transaction).await.unwrap();
        transaction.commit().await.unwrap();
        let mut transaction = connection.begin().await.unwrap();
        lease.verify_in(&mut transaction).await.unwrap();
        transaction.commit().await.unwrap();
        let mut transaction = connection.begin().await.unwrap();
        lease.release_in(&mut transaction).await.unwrap();
        transaction.commit().await.unwrap();
    };
    as_test(Kind::Paused, test).await;
}

async fn functions_under_a_paused_clock<T: TestDatabase>(database: &T) {
    let (_pool, locks) = shared(database).await;
    let test = async move || {
        all_kinds(&locks, 1).await.unwrap();
        let (first, second) = tokio::join!(row_function(&locks, 2), row_function(&locks, 2));
        first.unwrap();
        second.unwrap();
        let siblings = locks.insert_lock("a").run(async |_lease| {
            let sibling = async || {
                let slow = locks.insert_lock("a").run(async |_lease| {
                    tokio::time::sleep(MOMENT).await;
                    Ok::<_, Error>(())
                });
                slow.await
            };
            let (first, second) = tokio::join!(sibling(), sibling());
            first.and(second)
        });
        siblings.await.unwrap();
    };
    as_test(Kind::Paused, test).await;
}

/// By the real clock, as the database's: not less.
async fn waits_under_a_paused_clock_last<T: TestDatabase>(database: &T) {
    let (locks, url) = (shared(database).await.1, database.url().to_owned());
    let other = database.locks().await;
    let lease = other.insert_lock("lease").acquire().await.unwrap();
    let guard = other.row_lock("row").acquire().await.unwrap();
    let test = async move || {
        let mut connection = lock_tests::connection::<T::Database>(&url).await;
        let begun = Instant::now();
        assert!(locks.insert_lock("lease").wait(MOMENT).acquire().await.unwrap_err().is_retryable());
        assert!(begun.elapsed() >= MOMENT);
        let begun = Instant::now();
        assert!(locks.row_lock("row").wait(MOMENT).acquire().await.unwrap_err().is_retryable());
        assert!(begun.elapsed() >= MOMENT);
        let begun = Instant::now();
        let mut transaction = connection.begin().await.unwrap();
        let waited = locks.row_lock("row").wait(MOMENT).acquire_in(&mut transaction).await;
        assert!(waited.unwrap_err().is_retryable());
        assert!(begun.elapsed() >= MOMENT);
    };
    as_test(Kind::Paused, test).await;
    guard.rollback().await.unwrap();
    lease.release().await.unwrap();
}

/// A holder in the same test sleeps for an hour of a clock that jumps.
async fn waits_under_a_paused_clock_end_with_the_holder<T: TestDatabase>(database: &T) {
    let (_pool, locks) = shared(database).await;
    let test = async move || {
        let begun = Instant::now();
        let lease = locks.insert_lock("a").acquire().await.unwrap();
        let holds = async {
            tokio::time::sleep(Duration::from_hours(1)).await;
            lease.release().await.unwrap();
        };
        let (waited, ()) = tokio::join!(locks.insert_lock("a").acquire(), holds);
        waited.unwrap().release().await.unwrap();
        let guard = locks.row_lock("b").acquire().await.unwrap();
        let holds = async {
            tokio::time::sleep(Duration::from_hours(1)).await;
            guard.commit().await.unwrap();
        };
        let (waited, ()) = tokio::join!(locks.row_lock("b").acquire(), holds);
        waited.unwrap().commit().await.unwrap();
        assert!(begun.elapsed() < PATIENCE);
    };
    as_test(Kind::Paused, test).await;
}

/// As long as the caller has said, and no less.
async fn waits_for_the_pool_under_a_paused_clock<T: TestDatabase>(database: &T) {
    let pool = PoolOptions::<T::Database>::new()
        .max_connections(1)
        .acquire_timeout(PATIENCE)
        .connect_lazy(database.url())
        .unwrap();
    let locks = Locks::builder(pool.clone()).default_wait(PATIENCE).build();
    locks.migrate().await.unwrap();
    let lent = pool.acquire().await.unwrap();
    let (waits, is_waiting) = oneshot::channel();
    let test = async move || {
        let begun = Instant::now();
        let error = locks.row_lock("a").wait(MOMENT).acquire().await.unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
        assert!(begun.elapsed() >= MOMENT);
        let lease = locks.insert_lock("b").acquire().await.unwrap();
        waits.send(()).unwrap();
        lease.begin().await.unwrap().commit().await.unwrap();
        locks.row_lock("a").acquire().await.unwrap().commit().await.unwrap();
    };
    let gives_back = async move {
        is_waiting.await.unwrap();
        tokio::time::sleep(MOMENT).await;
        drop(lent);
    };
    tokio::join!(as_test(Kind::Paused, test), gives_back);
}
