//! Guarded transactions: what commits, what does not, and which request waits for which.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::task::Poll;
use std::time::Duration;

use lock_db::{Error, Lease, Locks, Loss};
use lock_tests::{
    Backend, Direction, PostgresServer, TestDatabase, TestServer, eventually, for_each_database,
};
use sqlx::Connection;
use tokio::time::timeout;

for_each_database! {
    it_commits_while_the_lease_is_ours,
    it_does_not_commit_after_a_takeover,
    it_does_not_commit_after_a_takeover_at_any_level,
    a_takeover_waits_for_a_verified_transaction,
    the_callers_transaction_is_refused_after_a_takeover,
    a_transaction_that_died_does_not_commit,
    a_refused_commit_tells_the_holder_at_once,
    a_refusal_in_the_callers_transaction_tells_the_holder_at_once,
    a_refusal_of_a_transaction_that_has_ended_does_not_end_the_lease,
    beginning_on_a_lost_lease_fails_at_once,
    the_lease_stays_until_the_transaction_has_ended,
    connections_come_back_as_they_were,
    a_release_counts_with_the_commit,
    what_a_transaction_released_guards_that_one,
    a_release_that_is_rolled_back_does_not_count,
    commit_and_release_do_both_or_nothing,
    what_a_commit_released_may_be_taken_at_once,
    a_transaction_of_another_lease_is_refused,
    run_may_release_in_a_transaction,
    a_release_that_is_dropped_midway_and_rolled_back_does_not_count,
    a_release_after_one_that_was_rolled_back_is_a_release,
    beginning_before_an_empty_pool_keeps_no_lease,
    a_late_copy_of_the_request_brings_no_lease_back,
    ;
    on servers:
    what_a_transaction_released_guards_no_other_one,
    a_refusal_that_an_old_snapshot_explains_does_not_end_the_lease,
    nobody_calls_a_lease_held_whose_release_may_have_been_committed,
    a_commit_does_not_wait_for_ever,
    under_a_commit_without_an_answer_no_other_transaction_begins,
}

const PATIENCE: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_mins(10);

async fn counter<T: TestDatabase>(database: &T) {
    database.run("CREATE TABLE counter (id BIGINT PRIMARY KEY, n BIGINT)").await;
    database.run("INSERT INTO counter VALUES (1, 0)").await;
}

async fn increment<DB: Backend>(connection: &mut DB::Connection) {
    DB::run(connection, "UPDATE counter SET n = n + 1").await.unwrap();
}

async fn count<T: TestDatabase>(database: &T) -> i64 {
    database.number("SELECT n FROM counter").await
}

/// A lease with a deadline so far away that the watchdog does nothing.
async fn lease<T: TestDatabase>(locks: &Locks<T::Database>) -> Lease<T::Database> {
    locks.insert_lock("a").ttl(LONG).wait(PATIENCE).acquire().await.unwrap()
}

/// Lets a lease expire, and another `Locks` take it over.
async fn take_over<T: TestDatabase>(database: &T) -> Lease<T::Database> {
    expire(database).await;
    lease::<T>(&Locks::new(database.pool(2).await)).await
}

async fn expire<T: TestDatabase>(database: &T) {
    let past = "UPDATE distributed_lock SET expire_time = '2001-01-01 00:00:00' WHERE lock_name = 'a'";
    assert_eq!(database.run(past).await, 1);
}

async fn it_commits_while_the_lease_is_ours<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let lease = lease::<T>(&locks).await;
    for n in 1..=3 {
        let mut transaction = lease.begin().await.unwrap();
        increment::<T::Database>(&mut transaction).await;
        transaction.commit().await.unwrap();
        assert_eq!(count(database).await, n);
    }
    let mut transaction = lease.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    transaction.rollback().await.unwrap();
    let mut transaction = lease.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    drop(transaction);
    // A lease that has expired but was not taken over is still ours.
    eventually(PATIENCE, async || database.activity().await.transactions == 0).await;
    expire(database).await;
    let mut transaction = lease.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    transaction.commit().await.unwrap();
    assert_eq!(count(database).await, 4);
    lease.release().await.unwrap();
}

async fn it_does_not_commit_after_a_takeover<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let lease = lease::<T>(&locks).await;
    // On SQLite an open transaction has the write lock, so the takeover can only come before it.
    if T::NAME == "sqlite" {
        let taken = take_over(database).await;
        let mut transaction = lease.begin().await.unwrap();
        increment::<T::Database>(&mut transaction).await;
        let error = transaction.commit().await.unwrap_err();
        assert!(matches!(error, Error::Lost { reason: Loss::TakenOver, .. }), "{error:?}");
        taken.release().await.unwrap();
    } else {
        let mut transaction = lease.begin().await.unwrap();
        increment::<T::Database>(&mut transaction).await;
        let taken = take_over(database).await;
        let error = transaction.commit().await.unwrap_err();
        assert!(matches!(error, Error::Lost { reason: Loss::TakenOver, .. }), "{error:?}");
        assert!(taken.is_held());
        taken.release().await.unwrap();
    }
    assert_eq!(count(database).await, 0);
}

async fn it_does_not_commit_after_a_takeover_at_any_level<T: TestDatabase>(database: &T) {
    if T::NAME == "sqlite" {
        return; // SQLite has one level, which the case above covers.
    }
    counter(database).await;
    let pool = database.pool(1).await;
    let locks = Locks::new(pool.clone());
    locks.migrate().await.unwrap();
    let expected = 0;
    for level in ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] {
        for reads_first in [true, false] {
            let lease = lease::<T>(&locks).await;
            let scope = if T::NAME == "postgres" { "CHARACTERISTICS AS TRANSACTION" } else { "TRANSACTION" };
            let set = format!("SET SESSION {scope} ISOLATION LEVEL {level}");
            T::Database::run(&mut pool.acquire().await.unwrap(), &set).await.unwrap();
            let mut transaction = lease.begin().await.unwrap();
            if reads_first {
                T::Database::find_number(&mut transaction, "SELECT n FROM counter").await.unwrap();
            } else {
                T::Database::run(&mut transaction, "INSERT INTO counter VALUES (2, 2)").await.unwrap();
            }
            let taken = take_over(database).await;
            let error = transaction.commit().await.unwrap_err();
            assert!(matches!(error, Error::Lost { .. } | Error::Serialization { .. }), "{level}: {error:?}");
            if level == "READ COMMITTED" {
                assert!(matches!(error, Error::Lost { .. }), "{error:?}");
            }
            assert_eq!(count(database).await, expected, "{level}");
            assert_eq!(database.number("SELECT COUNT(*) FROM counter").await, 1, "{level}");
            taken.release().await.unwrap();
            assert!(lease.release().await.is_err());

            // While the lease is ours, the same transaction commits at every level.
            let lease = locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap();
            let transaction = lease.begin().await.unwrap();
            transaction.commit().await.unwrap();
            lease.release().await.unwrap();
        }
    }
}

async fn a_takeover_waits_for_a_verified_transaction<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let pool = database.pool(1).await;
    let lease = lease::<T>(&locks).await;
    expire(database).await;
    let mut transaction = pool.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    lease.verify_in(&mut transaction).await.unwrap();

    let other = Locks::new(database.pool(1).await);
    let tried = other.insert_lock("a").try_acquire().await;
    let error = other.insert_lock("a").wait(Duration::from_millis(300)).acquire().await.unwrap_err();
    if T::NAME == "sqlite" {
        // The lock may be held by any writer.
        assert!(tried.unwrap_err().is_retryable());
        assert!(
            error.is_retryable()
                && matches!(
                    error,
                    Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. }
                ),
            "{error:?}"
        );
    } else {
        assert!(tried.unwrap().is_none());
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    }
    let waiting = tokio::spawn(other.insert_lock("a").wait(PATIENCE).acquire());
    transaction.commit().await.unwrap();
    let taken = waiting.await.unwrap().unwrap();
    assert_eq!(count(database).await, 1);
    assert!(taken.fencing_token() > lease.fencing_token());
}

async fn the_callers_transaction_is_refused_after_a_takeover<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let pool = database.pool(1).await;
    let mut connection = pool.acquire().await.unwrap();
    let lease = lease::<T>(&locks).await;
    let error = lease.verify_in(&mut connection).await.unwrap_err();
    assert!(matches!(error, Error::NotInTransaction { .. }), "{error:?}");
    let taken = take_over(database).await;
    let mut transaction = connection.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    let error = lease.verify_in(&mut transaction).await.unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error:?}");
    if T::NAME == "sqlite" {
        transaction.rollback().await.unwrap();
    } else {
        // A transaction that ignores the error is refused.
        T::Database::run(&mut transaction, "UPDATE counter SET n = 100").await.unwrap_err();
        let _ = transaction.commit().await;
    }
    assert_eq!(count(database).await, 0);
    taken.release().await.unwrap();
    // The connection is usable again.
    let mut transaction = connection.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    transaction.commit().await.unwrap();
    assert_eq!(count(database).await, 1);
}

/// The database has ended or doomed the transaction, and the caller has ignored the error.
async fn a_transaction_that_died_does_not_commit<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let lease = lease::<T>(&locks).await;
    let mut transaction = lease.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    if T::NAME == "postgres" {
        T::Database::run(&mut transaction, "INSERT INTO counter VALUES (1, 0)").await.unwrap_err();
    } else {
        // As InnoDB does by itself after a deadlock, and SQLite after some errors.
        T::Database::run(&mut transaction, "ROLLBACK").await.unwrap();
    }
    // A statement sent now would commit by itself. SQLite has no way to refuse it.
    if T::NAME != "sqlite" {
        T::Database::run(&mut transaction, "UPDATE counter SET n = 100").await.unwrap_err();
    }
    let error = transaction.commit().await.unwrap_err();
    assert!(matches!(error, Error::Lost { reason: Loss::TransactionEnded, .. }), "{error:?}");
    assert_eq!(count(database).await, 0);
    // The lease itself is not affected.
    let mut transaction = lease.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    transaction.commit().await.unwrap();
    assert_eq!(count(database).await, 1);
}

async fn assert_knows_its_loss<T: TestDatabase>(lease: &Lease<T::Database>) {
    assert!(!lease.is_held(), "is_held() after the database has said that it is lost");
    let lost = timeout(Duration::ZERO, lease.lost()).await;
    assert!(lost.is_ok(), "lost() waits after the database has said that it is lost");
}

/// And not only when the lease is due for renewal.
async fn a_refused_commit_tells_the_holder_at_once<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    for releases in [false, true] {
        let lease = lease::<T>(&locks).await;
        let other = lease.reenter().unwrap();
        let taken;
        let transaction;
        // On SQLite an open transaction has the write lock, so the takeover can only come before
        // it.
        if T::NAME == "sqlite" {
            taken = take_over(database).await;
            transaction = lease.begin().await.unwrap();
        } else {
            transaction = lease.begin().await.unwrap();
            taken = take_over(database).await;
        }
        let ended = if releases {
            lease.commit_and_release(transaction).await
        } else {
            let ended = transaction.commit().await;
            assert_knows_its_loss::<T>(&lease).await;
            ended
        };
        assert!(matches!(ended, Err(Error::Lost { reason: Loss::TakenOver, .. })), "{ended:?}");
        assert_knows_its_loss::<T>(&other).await;
        assert!(taken.is_held());
        taken.release().await.unwrap();
    }
}

async fn a_refusal_in_the_callers_transaction_tells_the_holder_at_once<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let pool = database.pool(1).await;
    for releases in [false, true] {
        let lease = lease::<T>(&locks).await;
        let other = lease.reenter().unwrap();
        let taken = take_over(database).await;
        let mut transaction = pool.begin().await.unwrap();
        let asked = if releases {
            other.release_in(&mut transaction).await
        } else {
            other.verify_in(&mut transaction).await
        };
        assert!(matches!(asked, Err(Error::Lost { reason: Loss::TakenOver, .. })), "{asked:?}");
        assert_knows_its_loss::<T>(&lease).await;
        assert_knows_its_loss::<T>(&other).await;
        let _rolled_back = transaction.rollback().await;
        assert!(taken.is_held());
        taken.release().await.unwrap();
    }
}

async fn a_refusal_of_a_transaction_that_has_ended_does_not_end_the_lease<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let lease = lease::<T>(&locks).await;
    let mut connection = database.connection().await;
    let mut transaction = connection.begin().await.unwrap();
    if T::NAME == "postgres" {
        T::Database::run(&mut transaction, "SELECT 1 / 0").await.unwrap_err();
    } else {
        // As InnoDB does by itself after a deadlock, and SQLite after some errors.
        T::Database::run(&mut transaction, "ROLLBACK").await.unwrap();
    }
    lease.verify_in(&mut transaction).await.unwrap_err();
    assert!(lease.is_held());
    assert!(timeout(Duration::ZERO, lease.lost()).await.is_err());
    let _rolled_back = transaction.rollback().await;
    lease.begin().await.unwrap().commit().await.unwrap();
    lease.release().await.unwrap();
}

/// A transaction may see the table as it was before the lease was taken. It is refused, but the
/// lease is not lost.
async fn a_refusal_that_an_old_snapshot_explains_does_not_end_the_lease<T: TestServer>(database: &T) {
    let locks = database.locks().await;
    let mut connection = database.connection().await;
    for name_is_new in [true, false] {
        let scope = if T::NAME == "postgres" { "CHARACTERISTICS AS TRANSACTION" } else { "TRANSACTION" };
        let set = format!("SET SESSION {scope} ISOLATION LEVEL REPEATABLE READ");
        T::Database::run(&mut connection, &set).await.unwrap();
        let mut transaction = connection.begin().await.unwrap();
        T::Database::find_number(&mut transaction, "SELECT COUNT(*) FROM distributed_lock").await.unwrap();
        let lease = lease::<T>(&locks).await;
        let asked = lease.verify_in(&mut transaction).await;
        assert!(matches!(asked, Err(Error::Serialization { .. })), "{asked:?}");
        assert!(lease.is_held(), "the name is new: {name_is_new}");
        assert!(timeout(Duration::ZERO, lease.lost()).await.is_err());
        let _rolled_back = transaction.rollback().await;
        lease.begin().await.unwrap().commit().await.unwrap();
        lease.release().await.unwrap();
    }
}

async fn beginning_on_a_lost_lease_fails_at_once<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let lease = locks.insert_lock("a").ttl(Duration::from_millis(300)).acquire().await.unwrap();
    let steal = "UPDATE distributed_lock SET secret_key = 'somebody else' WHERE lock_name = 'a'";
    assert_eq!(database.run(steal).await, 1);
    lease.lost().await;
    assert!(matches!(lease.begin().await, Err(Error::Lost { .. })));
}

async fn the_lease_stays_until_the_transaction_has_ended<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let other = Locks::new(database.pool(1).await);
    for ends in ["commit", "rollback", "drop"] {
        let lease = lease::<T>(&locks).await;
        let mut transaction = lease.begin().await.unwrap();
        assert_eq!(lease.hold_count(), 1);
        // Neither in this process nor in another.
        lease.release().await.unwrap();
        assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_none());
        assert!(other.insert_lock("a").try_acquire().await.unwrap().is_none());
        increment::<T::Database>(&mut transaction).await;
        match ends {
            "commit" => transaction.commit().await.unwrap(),
            "rollback" => transaction.rollback().await.unwrap(),
            _ => drop(transaction),
        }
        other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    }
    assert_eq!(count(database).await, 1);
}

async fn connections_come_back_as_they_were<T: TestDatabase>(database: &T) {
    counter(database).await;
    let pool = database.pool(1).await;
    let locks = Locks::new(pool.clone());
    locks.migrate().await.unwrap();
    let lease = lease::<T>(&locks).await;
    let mut expected = 0;
    for ends in ["commit", "rollback", "drop", "died", "lost future"] {
        let mut transaction = lease.begin().await.unwrap();
        match ends {
            "commit" => transaction.commit().await.unwrap(),
            "rollback" => transaction.rollback().await.unwrap(),
            "drop" => drop(transaction),
            "died" => {
                let _ = T::Database::run(&mut transaction, "ROLLBACK").await;
                transaction.commit().await.map_or_else(drop, drop);
            }
            _ => {
                let mut commit = Box::pin(transaction.commit());
                let polled = std::future::poll_fn(|context| {
                    std::task::Poll::Ready(commit.as_mut().poll(context).is_ready())
                });
                polled.await;
            }
        }
        // The only connection of the pool: not in a transaction, and not read-only.
        let mut connection = pool.acquire().await.unwrap();
        increment::<T::Database>(&mut connection).await;
        expected += 1;
        assert_eq!(count(database).await, expected, "{ends}");
    }
}

async fn a_release_counts_with_the_commit<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let other = Locks::new(database.pool(1).await);
    let lease = lease::<T>(&locks).await;
    let mut transaction = database.pool(1).await.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    lease.release_in(&mut transaction).await.unwrap();
    assert!(!lease.is_held(), "nobody knows before the transaction has ended");
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_none());
    transaction.commit().await.unwrap();
    other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    lease.lost().await;
    assert!(matches!(lease.begin().await, Err(Error::Lost { reason: Loss::Released, .. })));
    // The next caller of this process gets the lock, too.
    locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
}

/// On the same connection: the marks of the first transaction end with it. (On SQLite this works
/// only before another process has taken the lock: a transaction with an older snapshot than the
/// lock's row can't take it afterwards.)
async fn what_a_transaction_released_guards_no_other_one<T: TestServer>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let pool = database.pool(1).await;
    for _ in 0..20 {
        let lease = lease::<T>(&locks).await;
        let mut transaction = pool.begin().await.unwrap();
        lease.release_in(&mut transaction).await.unwrap();
        transaction.commit().await.unwrap();
        let mut transaction = pool.begin().await.unwrap();
        increment::<T::Database>(&mut transaction).await;
        // Possibly before the watchdog has noticed.
        let verified = lease.verify_in(&mut transaction).await;
        assert!(matches!(verified, Err(Error::Lost { .. } | Error::Serialization { .. })), "{verified:?}");
        drop(transaction);
    }
    assert_eq!(count(database).await, 0);
}

async fn what_a_transaction_released_guards_that_one<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let lease = lease::<T>(&locks).await;
    let mut transaction = database.pool(1).await.begin().await.unwrap();
    lease.release_in(&mut transaction).await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    lease.verify_in(&mut transaction).await.unwrap();
    lease.release_in(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(count(database).await, 1);
    locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
}

async fn a_release_that_is_rolled_back_does_not_count<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let other = Locks::new(database.pool(1).await);
    let lease = lease::<T>(&locks).await;
    let mut transaction = lease.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    lease.release_in(&mut transaction).await.unwrap();
    transaction.rollback().await.unwrap();
    eventually(PATIENCE, async || lease.is_held()).await;
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_none());
    let mut transaction = lease.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    transaction.commit().await.unwrap();
    assert_eq!(count(database).await, 1);
    lease.release().await.unwrap();
}

/// By a try, which waits neither for a holder nor for a local permit.
async fn what_a_commit_released_may_be_taken_at_once<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let mut lease = lease::<T>(&locks).await;
    for _ in 0..100 {
        let transaction = lease.begin().await.unwrap();
        lease.commit_and_release(transaction).await.unwrap();
        lease = locks.insert_lock("a").ttl(LONG).try_acquire().await.unwrap().unwrap();
    }
}

async fn commit_and_release_do_both_or_nothing<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let other = Locks::new(database.pool(1).await);
    for _ in 0..3 {
        let lease = lease::<T>(&locks).await;
        let mut transaction = lease.begin().await.unwrap();
        increment::<T::Database>(&mut transaction).await;
        lease.commit_and_release(transaction).await.unwrap();
        let next = other.insert_lock("a").try_acquire().await.unwrap().expect("it is free");
        next.release().await.unwrap();
    }
    assert_eq!(count(database).await, 3);

    let lost = lease::<T>(&locks).await;
    let taken = if T::NAME == "sqlite" {
        let taken = take_over(database).await;
        let mut transaction = lost.begin().await.unwrap();
        increment::<T::Database>(&mut transaction).await;
        assert!(matches!(lost.commit_and_release(transaction).await, Err(Error::Lost { .. })));
        taken
    } else {
        let mut transaction = lost.begin().await.unwrap();
        increment::<T::Database>(&mut transaction).await;
        let taken = take_over(database).await;
        assert!(matches!(lost.commit_and_release(transaction).await, Err(Error::Lost { .. })));
        taken
    };
    assert_eq!(count(database).await, 3);
    assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_none(), "the new holder has it still");
    taken.release().await.unwrap();
}

async fn a_transaction_of_another_lease_is_refused<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let (a, b) =
        (locks.insert_lock("a").acquire().await.unwrap(), locks.insert_lock("b").acquire().await.unwrap());
    let mut transaction = a.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    assert!(matches!(b.commit_and_release(transaction).await, Err(Error::InvalidOption { .. })));
    eventually(PATIENCE, async || database.activity().await.transactions == 0).await;
    assert_eq!(count(database).await, 0);
}

async fn run_may_release_in_a_transaction<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let other = Locks::new(database.pool(1).await);
    let done = locks
        .insert_lock("a")
        .run(async |lease| {
            let mut transaction = lease.begin().await?;
            increment::<T::Database>(&mut transaction).await;
            lease.release_in(&mut transaction).await?;
            transaction.commit().await?;
            let next = other.insert_lock("a").wait(PATIENCE).acquire().await?;
            // Work after the release is not cut off when the watchdog notices it.
            lease.lost().await;
            tokio::task::yield_now().await;
            next.release().await?;
            Ok::<_, Error>(7)
        })
        .await;
    assert_eq!(done.unwrap(), 7);
    assert_eq!(count(database).await, 1);
}

async fn a_release_that_is_dropped_midway_and_rolled_back_does_not_count<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let pool = database.pool(1).await;
    let lease = lease::<T>(&locks).await;
    let mut transaction = pool.begin().await.unwrap();
    {
        let mut releasing = std::pin::pin!(lease.release_in(&mut transaction));
        // Usually pending; a fast server may have answered already.
        let _sent = std::future::poll_fn(|context| Poll::Ready(releasing.as_mut().poll(context))).await;
    }
    assert!(!lease.is_held(), "nobody knows");
    transaction.rollback().await.unwrap();
    // Soon, and not only when it is due for renewal.
    eventually(PATIENCE, async || lease.is_held()).await;
    lease.release().await.unwrap();
}

/// The answer to the COMMIT is late, and then lost.
async fn nobody_calls_a_lease_held_whose_release_may_have_been_committed<T: TestServer>(database: &T) {
    counter(database).await;
    drop(database.locks().await);
    let proxy = database.proxy();
    let far = Locks::new(lock_tests::pool::<T::Database>(&database.url_by(proxy.address()), 2).await);
    let lease = lease::<T>(&far).await;
    let other = lease.reenter().unwrap();
    let mut transaction = lease.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    proxy.delay(Direction::ToClient, Duration::from_millis(300));
    let near = Locks::new(database.pool(1).await);
    let (ended, ()) = tokio::join!(lease.commit_and_release(transaction), async {
        let theirs = self::lease::<T>(&near).await;
        assert!(!other.is_held(), "two holders");
        proxy.pause(Direction::ToClient);
        proxy.cut();
        proxy.resume(Direction::ToClient);
        proxy.delay(Direction::ToClient, Duration::ZERO);
        assert!(theirs.is_held());
        // Permanently: the watchdog finds out.
        other.lost().await;
        assert!(!other.is_held());
        theirs.release().await.unwrap();
    });
    // Whether the answer arrived in time does not matter here.
    let _known_or_not = ended;
    assert_eq!(count(database).await, 1);
}

async fn a_release_after_one_that_was_rolled_back_is_a_release<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let pool = database.pool(1).await;
    for commits in [false, true] {
        let lease = lease::<T>(&locks).await;
        let mut transaction = pool.begin().await.unwrap();
        lease.release_in(&mut transaction).await.unwrap();
        if commits {
            transaction.commit().await.unwrap();
        } else {
            transaction.rollback().await.unwrap();
        }
        lease.release().await.unwrap();
        let other = Locks::new(database.pool(1).await);
        other.insert_lock("a").try_acquire().await.unwrap().expect("it is free").release().await.unwrap();
    }
}

async fn beginning_before_an_empty_pool_keeps_no_lease<T: TestDatabase>(database: &T) {
    let pool = database.pool(1).await;
    let locks = lock_tests::migrated(Locks::new(pool.clone())).await;
    let other = Locks::new(database.pool(1).await);
    let lease = lease::<T>(&locks).await;
    let the_only_one = pool.acquire().await.unwrap();
    {
        let mut beginning = std::pin::pin!(lease.begin());
        for _ in 0..3 {
            let begun = std::future::poll_fn(|context| Poll::Ready(beginning.as_mut().poll(context))).await;
            assert!(begun.is_pending());
            tokio::task::yield_now().await;
        }
    }
    lease.release().await.unwrap();
    other.insert_lock("a").try_acquire().await.unwrap().expect("it is free").release().await.unwrap();
    drop(the_only_one);
}

/// Another transaction has locked the lock's row, and keeps it.
async fn a_commit_does_not_wait_for_ever<T: TestServer>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let lease = lease::<T>(&locks).await;
    let mut in_the_way = database.connection().await;
    T::Database::run(&mut in_the_way, "BEGIN").await.unwrap();
    let lock = "SELECT id FROM distributed_lock WHERE lock_name = 'a' FOR UPDATE";
    T::Database::find_number(&mut in_the_way, lock).await.unwrap();
    let mut transaction = lease.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    let mut verified = database.pool(1).await.begin().await.unwrap();
    let (committed, asked) = tokio::join!(transaction.commit(), lease.verify_in(&mut verified));
    assert!(matches!(committed, Err(Error::Timeout { .. })), "{committed:?}");
    assert!(matches!(asked, Err(Error::Timeout { .. })), "{asked:?}");
    verified.rollback().await.unwrap();
    T::Database::run(&mut in_the_way, "ROLLBACK").await.unwrap();
    assert_eq!(count(database).await, 0);
    // The lease itself is not affected.
    let mut transaction = lease.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    lease.commit_and_release(transaction).await.unwrap();
    assert_eq!(count(database).await, 1);
}

/// The request for a lease was sent twice, because its connection was given up. The server carries
/// out the first copy only now, after others have had the lock. The row has the same secret again,
/// but another number.
async fn a_late_copy_of_the_request_brings_no_lease_back<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let others_had_it = "UPDATE distributed_lock SET fencing_token = fencing_token + 2 WHERE lock_name = 'a'";
    for release in [false, true] {
        let lease = lease::<T>(&locks).await;
        let other = lease.reenter().unwrap();
        let mut transaction = lease.begin().await.unwrap();
        increment::<T::Database>(&mut transaction).await;
        if T::NAME == "sqlite" {
            // There is one writer at a time.
            T::Database::run(&mut transaction, others_had_it).await.unwrap();
        } else {
            assert_eq!(database.run(others_had_it).await, 1);
        }
        let ended =
            if release { lease.commit_and_release(transaction).await } else { transaction.commit().await };
        assert!(matches!(ended, Err(Error::Lost { reason: Loss::TakenOver, .. })), "{ended:?}");
        assert_eq!(count(database).await, 0);
        if T::NAME == "sqlite" {
            assert_eq!(database.run(others_had_it).await, 1);
        }
        let mut transaction = database.pool(1).await.begin().await.unwrap();
        let asked = other.verify_in(&mut transaction).await;
        assert!(matches!(asked, Err(Error::Lost { reason: Loss::TakenOver, .. })), "{asked:?}");
        let _rolled_back = transaction.rollback().await;
        let _free_again = other.release().await;
        expire(database).await;
    }
    // And it is not renewed.
    let lease =
        locks.insert_lock("a").ttl(Duration::from_millis(900)).wait(PATIENCE).acquire().await.unwrap();
    assert_eq!(database.run(others_had_it).await, 1);
    lease.lost().await;
}

/// It may be carried out after the other transaction has read, whose guard would find the same
/// lease.
async fn under_a_commit_without_an_answer_no_other_transaction_begins<T: TestServer>(database: &T) {
    counter(database).await;
    drop(database.locks().await);
    let proxy = database.proxy();
    let locks = Locks::new(lock_tests::pool::<T::Database>(&database.url_by(proxy.address()), 2).await);
    let held = lease::<T>(&locks).await;
    let mut transaction = held.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    // For each answer that a commit needs.
    proxy.delay(Direction::ToClient, Duration::from_secs(2));
    let committing = tokio::spawn(transaction.commit());
    // The commit was carried out, and its answer is on its way.
    eventually(PATIENCE, async || count(database).await == 1).await;
    proxy.cut();
    let committed = committing.await.unwrap();
    assert!(
        matches!(
            committed,
            Err(Error::Database { .. }
                | Error::Unreachable { .. }
                | Error::Refused { .. }
                | Error::CommitUnknown { .. })
        ),
        "{committed:?}"
    );
    proxy.delay(Direction::ToClient, Duration::ZERO);
    assert!(held.is_held());
    let begun = held.begin().await;
    assert!(matches!(begun, Err(Error::Lost { reason: Loss::CommitUnknown, .. })), "{begun:?}");
    let mut own = database.connection().await;
    let mut own = own.begin().await.unwrap();
    let verified = held.verify_in(&mut own).await;
    assert!(matches!(verified, Err(Error::Lost { reason: Loss::CommitUnknown, .. })), "{verified:?}");
    own.rollback().await.unwrap();
    held.release().await.unwrap();
    // Under another lease, transactions work.
    let held = lease::<T>(&locks).await;
    held.begin().await.unwrap().commit().await.unwrap();
}

mod on_postgres {
    use super::*;

    lock_tests::__tests_on!(postgres PostgresServer a_failure_of_a_deferred_trigger_is_no_loss);

    /// Whatever code it fails with: the code is the owner's choice.
    async fn a_failure_of_a_deferred_trigger_is_no_loss(database: &PostgresServer) {
        counter(database).await;
        database
            .run(
                "CREATE FUNCTION fails() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN 1 / 0; END';
                CREATE CONSTRAINT TRIGGER fails AFTER UPDATE ON counter DEFERRABLE INITIALLY DEFERRED
                FOR EACH ROW EXECUTE FUNCTION fails()",
            )
            .await;
        let locks = database.locks().await;
        let lease = lease::<PostgresServer>(&locks).await;
        let mut transaction = lease.begin().await.unwrap();
        increment::<sqlx::Postgres>(&mut transaction).await;
        let committed = transaction.commit().await;
        assert!(
            matches!(
                committed,
                Err(Error::Database { .. }
                    | Error::Unreachable { .. }
                    | Error::Refused { .. }
                    | Error::CommitUnknown { .. })
            ),
            "{committed:?}"
        );
        assert!(lease.is_held());
        lease.begin().await.unwrap().commit().await.unwrap();
    }
}
