//! Guarded transactions: what commits, what does not, and which request waits for which.

mod releases;

use std::task::Poll;
use std::time::Duration;

use lock_db::{Error, Lease, Locks, Loss};
use lock_tests::{Backend, Direction, PostgresServer, TestDatabase, TestServer, eventually};
use sqlx::Connection;
use tokio::time::timeout;

lock_tests::cases! {
    on every database:
    a_transaction_commits_while_the_lease_is_held,
    a_transaction_does_not_commit_after_a_takeover,
    a_transaction_does_not_commit_after_a_takeover_at_any_level,
    a_takeover_waits_for_a_verified_transaction,
    the_callers_transaction_is_refused_after_a_takeover,
    a_transaction_that_died_does_not_commit,
    a_refused_commit_is_reported_immediately,
    a_refusal_in_the_callers_transaction_is_reported_immediately,
    a_refusal_of_a_transaction_that_has_ended_does_not_end_the_lease,
    begin_on_a_lost_lease_fails_immediately,
    the_lease_stays_until_the_transaction_has_ended,
    connections_return_to_the_pool_unchanged,
    begin_on_an_exhausted_pool_keeps_no_lease,
    a_late_copy_of_the_request_revives_no_lease;

    on every server:
    a_refusal_that_an_old_snapshot_explains_does_not_end_the_lease,
    a_commit_does_not_wait_forever,
    no_transaction_begins_after_a_commit_without_an_answer;

    on mysql:
    a_commit_that_was_answered_is_reported_although_the_connection_breaks;

    on mariadb:
    a_commit_that_was_answered_is_reported_although_the_connection_breaks;

    in modules: on_postgres, releases
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

async fn a_transaction_commits_while_the_lease_is_held<T: TestDatabase>(database: &T) {
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

async fn a_transaction_does_not_commit_after_a_takeover<T: TestDatabase>(database: &T) {
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

async fn a_transaction_does_not_commit_after_a_takeover_at_any_level<T: TestDatabase>(database: &T) {
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
async fn a_refused_commit_is_reported_immediately<T: TestDatabase>(database: &T) {
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

async fn a_refusal_in_the_callers_transaction_is_reported_immediately<T: TestDatabase>(database: &T) {
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

async fn begin_on_a_lost_lease_fails_immediately<T: TestDatabase>(database: &T) {
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

async fn connections_return_to_the_pool_unchanged<T: TestDatabase>(database: &T) {
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

async fn begin_on_an_exhausted_pool_keeps_no_lease<T: TestDatabase>(database: &T) {
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
async fn a_commit_does_not_wait_forever<T: TestServer>(database: &T) {
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
async fn a_late_copy_of_the_request_revives_no_lease<T: TestDatabase>(database: &T) {
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

/// Statements that restore the connection follow the COMMIT in the same message.
async fn a_commit_that_was_answered_is_reported_although_the_connection_breaks<T: TestServer>(database: &T) {
    counter(database).await;
    drop(database.locks().await);
    let proxy = database.proxy();
    let locks = Locks::new(lock_tests::pool::<T::Database>(&database.url_by(proxy.address()), 2).await);
    let lease = lease::<T>(&locks).await;
    for commits in 1..=2 {
        let mut transaction = lease.begin().await.unwrap();
        increment::<T::Database>(&mut transaction).await;
        // The name of the column, and the row with the text "1".
        proxy.end_after(Direction::ToClient, &[b"lock_db_committed", b"\x011"]);
        timeout(PATIENCE, transaction.commit()).await.unwrap().unwrap();
        assert_eq!(count(database).await, commits);
    }
    let mut guard = locks.row_lock("b").wait(PATIENCE).acquire().await.unwrap();
    increment::<T::Database>(&mut guard).await;
    proxy.end_after(Direction::ToClient, &[b"lock_db_committed", b"\x011"]);
    timeout(PATIENCE, guard.commit()).await.unwrap().unwrap();
    assert_eq!(count(database).await, 3);
    lease.release().await.unwrap();
}

/// It may be carried out after the other transaction has read, whose guard would find the same
/// lease.
async fn no_transaction_begins_after_a_commit_without_an_answer<T: TestServer>(database: &T) {
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

    lock_tests::cases! {
        on postgres:
        a_failure_of_a_deferred_trigger_is_no_loss,
    }

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
