//! The row lock, in a transaction of its own and in the caller's.

use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use lock_db::{Error, Locks};
use lock_tests::{Backend, PostgresServer, TestDatabase, TestServer, eventually, is_taken};
use sqlx::Connection;
use tokio::task::JoinSet;

lock_tests::cases! {
    on every database:
    one_holder_among_many_tasks,
    the_guard_is_a_transaction,
    dropping_the_guard_rolls_back,
    a_guard_whose_transaction_died_does_not_commit,
    the_callers_transaction_holds_the_lock,
    a_try_does_not_wait,
    a_wait_ends_in_time_and_the_transaction_goes_on,
    a_waiter_gets_the_lock_after_commit_and_after_rollback,
    the_same_transaction_can_take_it_again,
    the_guard_can_take_it_again,
    an_acquire_that_is_dropped_before_an_empty_pool_leaves_nothing,
    a_connection_outside_of_a_transaction_is_refused,
    a_pool_of_one_is_enough_for_the_callers_transaction,
    an_exhausted_pool_is_named_in_the_timeout,
    a_deleted_row_is_created_again,
    settings_of_the_callers_connection_stay;

    on every server:
    a_row_that_was_made_anew_is_locked_with_a_new_snapshot,
    requests_behind_one_for_several_end_in_time;

    in modules: on_postgres
}

const PATIENCE: Duration = Duration::from_secs(20);
const MOMENT: Duration = Duration::from_millis(300);

async fn counter<T: TestDatabase>(database: &T) {
    database.run("CREATE TABLE counter (id BIGINT PRIMARY KEY, n BIGINT)").await;
    database.run("INSERT INTO counter VALUES (1, 0)").await;
}

/// Read, add, write: loses updates without a lock.
async fn increment<DB: Backend>(connection: &mut DB::Connection) {
    let n = DB::find_number(connection, "SELECT n FROM counter WHERE id = 1").await.unwrap().unwrap();
    tokio::task::yield_now().await;
    DB::run(connection, &format!("UPDATE counter SET n = {} WHERE id = 1", n + 1)).await.unwrap();
}

/// It has the permits of this process for all of its names while it waits for one of them.
async fn requests_behind_one_for_several_end_in_time<T: TestServer>(database: &T) {
    let (locks, others) = (database.locks().await, database.locks().await);
    // In front of a holder of this process it has the permits of the earlier names alone.
    for (held, free, holders) in [("b", "a", [&locks, &others]), ("a", "b", [&others, &others])] {
        for holder in holders {
            let guard = holder.row_lock(held).wait(PATIENCE).acquire().await.unwrap();
            let several = tokio::spawn(locks.row_locks(["a", "b"]).wait(PATIENCE).acquire());
            let asked = Instant::now();
            // A try that comes before it gets the lock.
            eventually(PATIENCE, async || {
                locks.row_lock(free).try_acquire().await.unwrap().is_none() || several.is_finished()
            })
            .await;
            let refused = locks.row_lock(free).wait(MOMENT).acquire().await;
            assert!(matches!(refused, Err(Error::Timeout { .. })), "{held}: {refused:?}");
            assert!(asked.elapsed() < Duration::from_secs(8), "{held}: {:?}", asked.elapsed());
            guard.rollback().await.unwrap();
            several.await.unwrap().unwrap().rollback().await.unwrap();
        }
    }
}

async fn one_holder_among_many_tasks<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let pool = database.pool(8).await;
    let mut contending = JoinSet::new();
    for task in 0..16 {
        let (locks, pool) = (locks.clone(), pool.clone());
        contending.spawn(async move {
            for _ in 0..5 {
                if task % 2 == 0 {
                    let mut guard = locks.row_lock("counter").wait(PATIENCE * 6).acquire().await.unwrap();
                    increment::<T::Database>(&mut guard).await;
                    guard.commit().await.unwrap();
                } else {
                    let mut transaction = pool.begin().await.unwrap();
                    locks.row_lock("counter").wait(PATIENCE * 6).acquire_in(&mut transaction).await.unwrap();
                    increment::<T::Database>(&mut transaction).await;
                    transaction.commit().await.unwrap();
                }
            }
        });
    }
    while let Some(task) = contending.join_next().await {
        task.unwrap();
    }
    assert_eq!(database.number("SELECT n FROM counter").await, 80);
}

async fn the_guard_is_a_transaction<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let mut guard = locks.row_lock("a").acquire().await.unwrap();
    assert_eq!(guard.name(), "a");
    increment::<T::Database>(&mut guard).await;
    guard.commit().await.unwrap();
    assert_eq!(database.number("SELECT n FROM counter").await, 1);

    let mut guard = locks.row_lock("a").acquire().await.unwrap();
    increment::<T::Database>(&mut guard).await;
    guard.rollback().await.unwrap();
    assert_eq!(database.number("SELECT n FROM counter").await, 1);
}

async fn dropping_the_guard_rolls_back<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let mut guard = locks.row_lock("a").acquire().await.unwrap();
    increment::<T::Database>(&mut guard).await;
    // Outside of the runtime, too.
    std::thread::spawn(move || drop(guard)).join().unwrap();
    locks.row_lock("a").wait(PATIENCE).acquire().await.unwrap().rollback().await.unwrap();
    assert_eq!(database.number("SELECT n FROM counter").await, 0);
}

async fn a_guard_whose_transaction_died_does_not_commit<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let mut guard = locks.row_lock("a").acquire().await.unwrap();
    increment::<T::Database>(&mut guard).await;
    // The caller ignores an error. On PostgreSQL the transaction is doomed, and COMMIT would still
    // return Ok.
    let _ = T::Database::run(&mut guard, "INSERT INTO counter VALUES (1, 0)").await;
    T::Database::run(&mut guard, "ROLLBACK").await.unwrap();
    assert!(matches!(guard.commit().await, Err(Error::Lost { .. })));
    assert_eq!(database.number("SELECT n FROM counter").await, 0);
}

async fn the_callers_transaction_holds_the_lock<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let pool = database.pool(2).await;
    let mut transaction = pool.begin().await.unwrap();
    let held = locks.row_lock("a").acquire_in(&mut transaction).await.unwrap();
    assert_eq!(held.name(), "a");
    // The receipt does not hold the lock.
    drop(held);
    assert!(is_taken::<T, _>(locks.row_lock("a").try_acquire().await));
    transaction.commit().await.unwrap();
    let guard = locks.row_lock("a").try_acquire().await.unwrap().expect("it is free");
    guard.commit().await.unwrap();
}

async fn a_try_does_not_wait<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let pool = database.pool(2).await;
    let held = locks.row_lock("a").acquire().await.unwrap();
    let mut transaction = pool.begin().await.unwrap();
    let started = Instant::now();
    assert!(locks.row_lock("a").try_acquire().await.unwrap().is_none());
    assert!(locks.row_lock("a").try_acquire_in(&mut transaction).await.unwrap().is_none());
    assert!(started.elapsed() < PATIENCE);
    held.commit().await.unwrap();
    assert!(locks.row_lock("a").try_acquire_in(&mut transaction).await.unwrap().is_some());
    transaction.commit().await.unwrap();
}

async fn a_wait_ends_in_time_and_the_transaction_goes_on<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let pool = database.pool(2).await;
    let mut held = locks.row_lock("a").acquire().await.unwrap();
    let started = Instant::now();
    let error = locks.row_lock("a").wait(MOMENT).acquire().await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    assert!(started.elapsed() >= MOMENT);

    let mut transaction = pool.begin().await.unwrap();
    let started = Instant::now();
    let error = locks.row_lock("a").wait(MOMENT).acquire_in(&mut transaction).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    assert!(started.elapsed() >= MOMENT && started.elapsed() < PATIENCE);
    increment::<T::Database>(&mut held).await;
    held.commit().await.unwrap();
    // The timeout has not doomed the transaction: it takes the lock now, writes and commits.
    locks.row_lock("a").wait(PATIENCE).acquire_in(&mut transaction).await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    transaction.commit().await.unwrap();
    assert_eq!(database.number("SELECT n FROM counter").await, 2);
}

async fn a_waiter_gets_the_lock_after_commit_and_after_rollback<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let other = Locks::new(database.pool(2).await);
    for commit in [true, false] {
        let held = locks.row_lock("a").acquire().await.unwrap();
        let waiting = tokio::spawn(other.row_lock("a").wait(PATIENCE).acquire());
        // On a server the waiter of another process is in the server's queue before the holder
        // ends.
        if T::NAME != "sqlite" {
            eventually(PATIENCE, async || database.activity().await.waiting > 0).await;
        }
        assert!(!waiting.is_finished());
        if commit {
            held.commit().await.unwrap();
        } else {
            held.rollback().await.unwrap();
        }
        waiting.await.unwrap().unwrap().commit().await.unwrap();
    }
}

async fn the_same_transaction_can_take_it_again<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let pool = database.pool(2).await;
    let mut transaction = pool.begin().await.unwrap();
    locks.row_lock("a").acquire_in(&mut transaction).await.unwrap();
    locks.row_lock("a").acquire_in(&mut transaction).await.unwrap();
    assert!(locks.row_lock("a").try_acquire_in(&mut transaction).await.unwrap().is_some());
    transaction.commit().await.unwrap();
}

async fn a_connection_outside_of_a_transaction_is_refused<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let pool = database.pool(1).await;
    let mut connection = pool.acquire().await.unwrap();
    let error = locks.row_lock("a").acquire_in(&mut connection).await.unwrap_err();
    assert!(matches!(error, Error::NotInTransaction { .. }), "{error:?}");
    let error = locks.row_lock("a").try_acquire_in(&mut connection).await.unwrap_err();
    assert!(matches!(error, Error::NotInTransaction { .. }), "{error:?}");
    let mut transaction = connection.begin().await.unwrap();
    locks.row_lock("a").acquire_in(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
}

async fn a_pool_of_one_is_enough_for_the_callers_transaction<T: TestDatabase>(database: &T) {
    let pool = database.pool(1).await;
    let locks = Locks::new(pool.clone());
    locks.migrate().await.unwrap();
    for _ in 0..3 {
        let mut transaction = pool.begin().await.unwrap();
        locks.row_lock("a").wait(PATIENCE).acquire_in(&mut transaction).await.unwrap();
        transaction.commit().await.unwrap();
    }
}

async fn an_exhausted_pool_is_named_in_the_timeout<T: TestDatabase>(database: &T) {
    let pool = database.pool(1).await;
    let locks = Locks::new(pool.clone());
    locks.migrate().await.unwrap();
    let taken = pool.acquire().await.unwrap();
    let error = locks.row_lock("a").wait(2 * MOMENT).acquire().await.unwrap_err();
    assert!(
        matches!(error, Error::Timeout { waiting_for: lock_db::WaitingFor::Connection, .. }),
        "{error:?}"
    );
    drop(taken);
    locks.row_lock("a").acquire().await.unwrap().commit().await.unwrap();
}

async fn a_deleted_row_is_created_again<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let pool = database.pool(2).await;
    locks.row_lock("a").acquire().await.unwrap().commit().await.unwrap();
    for own in [true, false, true] {
        database.run("DELETE FROM distributed_lock").await;
        if own {
            locks.row_lock("a").acquire().await.unwrap().commit().await.unwrap();
            continue;
        }
        // In a transaction that was open before, InnoDB may answer that it has to be run again.
        let mut tries = 0;
        loop {
            let mut transaction = pool.begin().await.unwrap();
            match locks.row_lock("a").wait(PATIENCE).acquire_in(&mut transaction).await {
                Ok(_) => break transaction.commit().await.unwrap(),
                Err(error) => assert!(error.is_retryable(), "{error:?}"),
            }
            transaction.rollback().await.unwrap();
            tries += 1;
            assert!(tries < 3, "running it again helps");
        }
    }
}

/// The first statement of the waiter looks for the row that it remembers, and finds none. What it reads
/// later must be what the holder of the new row has committed.
async fn a_row_that_was_made_anew_is_locked_with_a_new_snapshot<T: TestServer>(database: &T) {
    let (locks, others) = (database.locks().await, database.locks().await);
    counter(database).await;
    locks.row_lock("a").acquire().await.unwrap().commit().await.unwrap();
    for round in 0..5 {
        database.run("DELETE FROM distributed_lock").await;
        let mut holder = others.row_lock("a").wait(PATIENCE).acquire().await.unwrap();
        increment::<T::Database>(&mut holder).await;
        let mut waiter = pin!(locks.row_lock("a").wait(PATIENCE).acquire());
        let waits = async { eventually(PATIENCE, async || database.activity().await.waiting > 0).await };
        tokio::select! {
            biased;
            taken = &mut waiter => panic!("{taken:?} while it is held"),
            () = waits => {}
        }
        holder.commit().await.unwrap();
        let mut next = waiter.await.unwrap();
        increment::<T::Database>(&mut next).await;
        next.commit().await.unwrap();
        assert_eq!(database.number("SELECT n FROM counter").await, 2 * (round + 1));
    }
}

async fn settings_of_the_callers_connection_stay<T: TestDatabase>(database: &T) {
    let setting = match T::NAME {
        "postgres" => "SELECT CAST(REPLACE(current_setting('lock_timeout'), 'ms', '') AS BIGINT)",
        "sqlite" => "PRAGMA busy_timeout",
        _ => "SELECT @@innodb_lock_wait_timeout",
    };
    let change = match T::NAME {
        "postgres" => "SET lock_timeout = '4321ms'",
        "sqlite" => "PRAGMA busy_timeout = 4321",
        _ => "SET SESSION innodb_lock_wait_timeout = 4321",
    };
    let locks = database.locks().await;
    let mut connection = database.connection().await;
    T::Database::run(&mut connection, change).await.unwrap();
    let held = locks.row_lock("a").acquire().await.unwrap();
    let mut transaction = connection.begin().await.unwrap();
    let error = locks.row_lock("a").wait(MOMENT).acquire_in(&mut transaction).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    assert_eq!(T::Database::find_number(&mut transaction, setting).await.unwrap(), Some(4321));
    let (taken, ended) = tokio::join!(
        locks.row_lock("a").wait(PATIENCE).acquire_in(&mut transaction),
        // When the waiter waits.
        async {
            if T::NAME != "sqlite" {
                eventually(PATIENCE, async || database.activity().await.waiting > 0).await;
            }
            held.commit().await
        }
    );
    taken.unwrap();
    ended.unwrap();
    assert_eq!(T::Database::find_number(&mut transaction, setting).await.unwrap(), Some(4321));
    transaction.commit().await.unwrap();
}

async fn the_guard_can_take_it_again<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let mut guard = locks.row_lock("a").acquire().await.unwrap();
    let again = locks.row_lock("a").acquire_in(&mut guard).await.unwrap();
    assert_eq!(again.hold_count(), 2);
    increment::<T::Database>(&mut guard).await;
    guard.commit().await.unwrap();
    assert_eq!(database.number("SELECT n FROM counter").await, 1);
}

async fn an_acquire_that_is_dropped_before_an_empty_pool_leaves_nothing<T: TestDatabase>(database: &T) {
    let pool = database.pool(1).await;
    let locks = lock_tests::migrated(Locks::new(pool.clone())).await;
    let other = Locks::new(database.pool(1).await);
    let the_only_one = pool.acquire().await.unwrap();
    {
        let mut acquiring = std::pin::pin!(locks.row_lock("a").wait(PATIENCE).acquire());
        for _ in 0..3 {
            let begun = std::future::poll_fn(|context| Poll::Ready(acquiring.as_mut().poll(context))).await;
            assert!(begun.is_pending());
            tokio::task::yield_now().await;
        }
    }
    drop(the_only_one);
    // Neither a permit for the name nor a place in the queue of the pool.
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        if let Some(guard) = locks.row_lock("a").try_acquire().await.unwrap() {
            guard.rollback().await.unwrap();
            break;
        }
    }
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    other.row_lock("a").try_acquire().await.unwrap().expect("it is free").rollback().await.unwrap();
}

mod on_postgres {
    use super::*;

    lock_tests::cases! {
        on postgres:
        a_lock_timeout_set_in_a_guard_stays,
    }

    /// This includes a limit that is changed in a transaction of lock-db's own.
    async fn a_lock_timeout_set_in_a_guard_stays(database: &PostgresServer) {
        let locks = database.locks().await;
        let mut guard = locks.row_lock("a").acquire().await.unwrap();
        sqlx::Postgres::run(&mut guard, "SET LOCAL lock_timeout = '777ms'").await.unwrap();
        locks.row_lock("b").acquire_in(&mut guard).await.unwrap();
        let setting = "SELECT CAST(REPLACE(current_setting('lock_timeout'), 'ms', '') AS BIGINT)";
        assert_eq!(sqlx::Postgres::find_number(&mut guard, setting).await.unwrap(), Some(777));
        guard.commit().await.unwrap();
    }
}
