//! Row locks where transactions conflict: deadlocks, snapshots, and what a transaction that the
//! database has ended may still do.

use std::time::Duration;

use lock_db::{Error, Locks};
use lock_tests::{Backend, TestDatabase, TestServer};
use sqlx::{Pool, Transaction};

lock_tests::cases! {
    on every server:
    a_deadlock_is_typed_and_its_victim_cannot_write,
    a_stale_snapshot_is_refused,
    a_lock_taken_first_is_fresh_or_refused,
    a_waiter_delays_no_other_name,
    a_lock_of_another_name_delays_no_renewal,
}

const PATIENCE: Duration = Duration::from_secs(20);

async fn counter<T: TestDatabase>(database: &T) {
    database.run("CREATE TABLE counter (id BIGINT PRIMARY KEY, n BIGINT)").await;
    database.run("INSERT INTO counter VALUES (1, 0)").await;
}

async fn begin<DB: Backend>(pool: &Pool<DB>, level: &str) -> Transaction<'static, DB> {
    // On MySQL the level is set before the transaction begins, on PostgreSQL after.
    if DB::NAME == "PostgreSQL" {
        let mut transaction = pool.begin().await.unwrap();
        DB::run(&mut transaction, &format!("SET TRANSACTION ISOLATION LEVEL {level}")).await.unwrap();
        transaction
    } else {
        let mut connection = pool.acquire().await.unwrap();
        DB::run(&mut connection, &format!("SET SESSION TRANSACTION ISOLATION LEVEL {level}")).await.unwrap();
        drop(connection);
        pool.begin().await.unwrap()
    }
}

/// Two transactions that take two locks in opposite order.
async fn a_deadlock_is_typed_and_its_victim_cannot_write<T: TestServer>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let pool = database.pool(2).await;
    for name in ["a", "b"] {
        locks.row_lock(name).acquire().await.unwrap().commit().await.unwrap();
    }
    let (mut one, mut two) = (pool.begin().await.unwrap(), pool.begin().await.unwrap());
    locks.row_lock("a").acquire_in(&mut one).await.unwrap();
    locks.row_lock("b").acquire_in(&mut two).await.unwrap();
    let (first, second) = tokio::join!(cross(&locks, "b", one), cross(&locks, "a", two));
    let victims = usize::from(first.is_err()) + usize::from(second.is_err());
    assert_eq!(victims, 1, "the database picks one: {first:?} {second:?}");
    let error = first.and(second).unwrap_err();
    assert!(matches!(error, Error::Deadlock { .. }), "{error:?}");
    assert!(error.is_retryable());
    // The victim's later statements wrote nothing; the winner wrote once.
    assert_eq!(database.number("SELECT n FROM counter").await, 1);
}

/// Takes the lock and adds one. If that fails, it writes nevertheless, as code does that ignores
/// the error.
async fn cross<DB: Backend>(
    locks: &Locks<DB>,
    name: &str,
    mut transaction: Transaction<'static, DB>,
) -> Result<(), Error> {
    let taken = locks.row_lock(name).wait(PATIENCE).acquire_in(&mut transaction).await;
    let written = DB::run(&mut transaction, "UPDATE counter SET n = n + 1").await;
    // The other transaction waits for the end of this one.
    if taken.is_ok() {
        written.unwrap();
        transaction.commit().await.unwrap();
    } else {
        written.unwrap_err();
        transaction.rollback().await.unwrap();
    }
    taken.map(drop)
}

/// The transaction has read the data before it takes the lock, and another transaction held the
/// lock in between.
async fn a_stale_snapshot_is_refused<T: TestServer>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let pool = database.pool(1).await;
    locks.row_lock("a").acquire().await.unwrap().commit().await.unwrap();
    for level in ["REPEATABLE READ", "SERIALIZABLE"] {
        let mut stale = begin(&pool, level).await;
        T::Database::run(&mut stale, "SELECT COUNT(*) FROM distributed_lock").await.unwrap();
        if level == "SERIALIZABLE" && T::NAME != "postgres" {
            // At this level every read locks what it reads, so no other transaction can get in
            // between.
            stale.rollback().await.unwrap();
            continue;
        }
        let mut guard = locks.row_lock("a").acquire().await.unwrap();
        T::Database::run(&mut guard, "UPDATE counter SET n = n + 1").await.unwrap();
        guard.commit().await.unwrap();

        let error = locks.row_lock("a").wait(PATIENCE).acquire_in(&mut stale).await.unwrap_err();
        assert!(matches!(error, Error::Serialization { .. }), "{level}: {error:?}");
        assert!(error.is_retryable());
        stale.rollback().await.unwrap();

        // Run again from its beginning, it gets the lock.
        let mut again = begin(&pool, level).await;
        locks.row_lock("a").wait(PATIENCE).acquire_in(&mut again).await.unwrap();
        again.commit().await.unwrap();
    }
}

/// Taking the lock is the first statement, but it waits for a holder that changes the data in the
/// meantime. The waiter either reads the new data or is refused, at every level.
async fn a_lock_taken_first_is_fresh_or_refused<T: TestServer>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let pool = database.pool(1).await;
    let mut expected = 0;
    for level in ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] {
        let mut holder = locks.row_lock("a").acquire().await.unwrap();
        let mut waiter = begin(&pool, level).await;
        let (taken, ended) =
            tokio::join!(locks.row_lock("a").wait(PATIENCE).acquire_in(&mut waiter), async {
                lock_tests::eventually(PATIENCE, async || database.activity().await.waiting > 0).await;
                T::Database::run(&mut holder, "UPDATE counter SET n = n + 1").await.unwrap();
                holder.commit().await
            });
        ended.unwrap();
        expected += 1;
        match taken {
            Ok(_) => {
                let seen = T::Database::find_number(&mut waiter, "SELECT n FROM counter").await.unwrap();
                assert_eq!(seen, Some(expected), "{level}: old data under the lock");
                waiter.commit().await.unwrap();
            }
            Err(error) => {
                assert_ne!(level, "READ COMMITTED", "{error:?}");
                assert!(matches!(error, Error::Serialization { .. }), "{level}: {error:?}");
                waiter.rollback().await.unwrap();
            }
        }
    }
}

/// On InnoDB a waiter could lock the gap where new rows go.
async fn a_waiter_delays_no_other_name<T: TestServer>(database: &T) {
    let locks = database.locks().await;
    let other = Locks::new(database.pool(2).await);
    let held = locks.row_lock("a").acquire().await.unwrap();
    let mut tried = database.pool(1).await.begin().await.unwrap();
    assert!(locks.row_lock("a").try_acquire_in(&mut tried).await.unwrap().is_none());
    // In the same process it would wait in memory.
    let waiter = Locks::new(database.pool(1).await);
    let waiting = tokio::spawn(waiter.row_lock("a").wait(PATIENCE).acquire());
    lock_tests::eventually(PATIENCE, async || database.activity().await.waiting > 0).await;
    let patience = Duration::from_secs(1);
    other.insert_lock("new").wait(patience).acquire().await.unwrap().release().await.unwrap();
    other.row_lock("newer").wait(patience).acquire().await.unwrap().rollback().await.unwrap();
    tried.rollback().await.unwrap();
    held.rollback().await.unwrap();
    waiting.await.unwrap().unwrap().rollback().await.unwrap();
}

/// In a small table the server might read more rows than requested, and wait for them.
async fn a_lock_of_another_name_delays_no_renewal<T: TestServer>(database: &T) {
    let locks = database.locks().await;
    let other = Locks::new(database.pool(2).await);
    let row = other.row_lock("b").acquire().await.unwrap();
    let guarded = other.insert_lock("c").acquire().await.unwrap();
    let mut verified = database.pool(1).await.begin().await.unwrap();
    guarded.verify_in(&mut verified).await.unwrap();
    let lease = locks.insert_lock("a").ttl(Duration::from_secs(2)).acquire().await.unwrap();
    let lost = tokio::time::timeout(Duration::from_secs(5), lease.lost()).await;
    assert!(lost.is_err(), "the lease was lost");
    verified.rollback().await.unwrap();
    row.rollback().await.unwrap();
}
