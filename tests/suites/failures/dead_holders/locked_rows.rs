//! The holder lives, but another transaction, or its own, keeps it from renewing its lease for longer than the TTL. Whoever
//! could take the lock is kept out by the same transaction, so nothing is lost.

use std::time::{Duration, Instant};

use lock_db::{Error, Lease, Locks};
use lock_tests::{Backend, TestDatabase, eventually};
use sqlx::Connection;
use tokio::task::JoinHandle;

lock_tests::cases! {
    on every database:
    a_lease_outlives_a_clean_up_that_locks_its_row,
    a_lease_outlives_a_read_that_locks_its_row,
    a_lease_outlives_a_clean_up_that_waits_with_its_row_locked,
    a_lease_outlives_its_long_guarded_transaction,
    a_lease_outlives_a_long_transaction_in_run,
    a_lease_outlives_a_long_verified_transaction,
    a_lease_outlives_another_long_writer,
}

const PATIENCE: Duration = Duration::from_secs(30);
const TTL: Duration = Duration::from_secs(2);
/// For which renewals are kept off.
const MUCH_LONGER: Duration = Duration::from_secs(4);

async fn assert_stays_held<DB: lock_db::LockDatabase>(
    lease: &Lease<DB>,
    waiting: &JoinHandle<Result<Lease<DB>, Error>>,
    what: &str,
) {
    let watched = Instant::now();
    while watched.elapsed() < MUCH_LONGER {
        assert!(lease.is_held(), "{what}: lost after {:?}", watched.elapsed());
        assert!(!waiting.is_finished(), "{what}: taken by another one after {:?}", watched.elapsed());
        tokio::time::sleep(TTL / 20).await;
    }
}

fn wait_for<DB: lock_db::LockDatabase>(locks: &Locks<DB>) -> JoinHandle<Result<Lease<DB>, Error>> {
    tokio::spawn(locks.insert_lock("a").ttl(TTL).wait(PATIENCE).acquire())
}

/// It is renewed again, for several times.
async fn assert_is_renewed<T: TestDatabase>(database: &T, lease: &Lease<T::Database>, what: &str) {
    let deadline =
        "SELECT COUNT(DISTINCT expire_time) FROM distributed_lock WHERE lock_name = 'a' AND expire_time > ";
    for _ in 0..2 {
        let now = database.text("SELECT expire_time || '' FROM distributed_lock WHERE lock_name = 'a'");
        let now = if T::NAME == "mariadb" || T::NAME == "mysql" {
            database.text("SELECT CONCAT(expire_time, '') FROM distributed_lock WHERE lock_name = 'a'").await
        } else {
            now.await
        };
        eventually(PATIENCE, async || database.number(&format!("{deadline} '{now}'")).await == 1).await;
        assert!(lease.is_held(), "{what}");
    }
}

async fn hand_over<T: TestDatabase>(
    lease: Lease<T::Database>,
    waiting: JoinHandle<Result<Lease<T::Database>, Error>>,
) {
    lease.release().await.unwrap();
    waiting.await.unwrap().unwrap().release().await.unwrap();
}

/// As a clean-up does on InnoDB, which locks what it reads; and any write on SQLite.
async fn a_lease_outlives_a_clean_up_that_locks_its_row<T: TestDatabase>(database: &T) {
    let statements = match T::NAME {
        // There it locks nothing but what it deletes.
        "postgres" => vec![],
        "sqlite" => vec![
            "DELETE FROM distributed_lock WHERE expire_time < datetime('now', '-7 days') AND acquire_time < datetime('now', '-7 days')",
        ],
        _ => vec![
            "DELETE FROM distributed_lock WHERE expire_time < UTC_TIMESTAMP() - INTERVAL 7 DAY AND acquire_time < UTC_TIMESTAMP() - INTERVAL 7 DAY",
        ],
    };
    for statement in statements {
        by_a_statement(database, statement).await;
    }
}

/// As people do who look into the table by hand. On InnoDB a clean-up does the same.
async fn a_lease_outlives_a_read_that_locks_its_row<T: TestDatabase>(database: &T) {
    if T::NAME == "postgres" {
        by_a_statement(database, "SELECT id FROM distributed_lock FOR UPDATE").await;
    }
}

async fn by_a_statement<T: TestDatabase>(database: &T, statement: &str) {
    let (locks, other) = (database.locks().await, database.locks().await);
    let lease = locks.insert_lock("a").ttl(TTL).wait(PATIENCE).acquire().await.unwrap();
    let mut connection = database.connection().await;
    let mut cleaning = connection.begin().await.unwrap();
    T::Database::run(&mut cleaning, statement).await.unwrap();
    let waiting = wait_for(&other);
    assert_stays_held(&lease, &waiting, statement).await;
    cleaning.commit().await.unwrap();
    assert_is_renewed(database, &lease, statement).await;
    hand_over::<T>(lease, waiting).await;
}

/// One that deletes old rows, and waits in the middle for a row that a business transaction has locked.
async fn a_lease_outlives_a_clean_up_that_waits_with_its_row_locked<T: TestDatabase>(database: &T) {
    let old = "UPDATE distributed_lock SET acquire_time = '2001-01-01 00:00:00' WHERE lock_name = 'old'";
    let (locks, other, pool) = (database.locks().await, database.locks().await, database.pool(2).await);
    // Its row is the first one.
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    locks.insert_lock("old").acquire().await.unwrap().release().await.unwrap();
    database.run(old).await;
    let lease = locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
    let mut business = pool.begin().await.unwrap();
    locks.row_lock("business").acquire_in(&mut business).await.unwrap();
    let clean_up = match T::NAME {
        "postgres" => {
            "DELETE FROM distributed_lock WHERE expire_time < now() - interval '7 days' AND acquire_time < now() - interval '7 days'"
        }
        "sqlite" => {
            "DELETE FROM distributed_lock WHERE expire_time < datetime('now', '-7 days') AND acquire_time < datetime('now', '-7 days')"
        }
        _ => {
            "DELETE FROM distributed_lock WHERE expire_time < UTC_TIMESTAMP() - INTERVAL 7 DAY AND acquire_time < UTC_TIMESTAMP() - INTERVAL 7 DAY"
        }
    };
    let mut connection = database.connection().await;
    let cleaning = tokio::spawn(async move { T::Database::run(&mut connection, clean_up).await });
    let waiting = wait_for(&other);
    assert_stays_held(&lease, &waiting, clean_up).await;
    business.rollback().await.unwrap();
    // On SQLite it has waited for as long as it can.
    let _cleaned = cleaning.await.unwrap();
    assert_is_renewed(database, &lease, clean_up).await;
    hand_over::<T>(lease, waiting).await;
}

/// In which the holder does its work.
async fn a_lease_outlives_its_long_guarded_transaction<T: TestDatabase>(database: &T) {
    database.run("CREATE TABLE work (n INT)").await;
    let journals: &[&str] = if T::NAME == "sqlite" { &["DELETE", "WAL"] } else { &[""] };
    for journal in journals {
        if T::NAME == "sqlite" {
            database.run(&format!("PRAGMA journal_mode = {journal}; DELETE FROM work")).await;
        }
        let (locks, other) = (database.locks().await, database.locks().await);
        let lease = locks.insert_lock("a").ttl(TTL).wait(PATIENCE).acquire().await.unwrap();
        let mut transaction = lease.begin().await.unwrap();
        T::Database::run(&mut transaction, "INSERT INTO work VALUES (1)").await.unwrap();
        let waiting = wait_for(&other);
        assert_stays_held(&lease, &waiting, journal).await;
        transaction.commit().await.unwrap();
        assert_eq!(database.number("SELECT COUNT(*) FROM work").await, 1);
        assert_is_renewed(database, &lease, journal).await;
        hand_over::<T>(lease, waiting).await;
    }
}

/// The same for `run`, which would drop the work when the lease is lost.
async fn a_lease_outlives_a_long_transaction_in_run<T: TestDatabase>(database: &T) {
    database.run("CREATE TABLE work (n INT)").await;
    let locks = database.locks().await;
    let work = async |lease: &Lease<T::Database>| {
        let mut transaction = lease.begin().await?;
        T::Database::run(&mut transaction, "INSERT INTO work VALUES (1)").await.unwrap();
        tokio::time::sleep(2 * TTL).await;
        transaction.commit().await
    };
    locks.insert_lock("a").ttl(TTL).run(work).await.unwrap();
    assert_eq!(database.number("SELECT COUNT(*) FROM work").await, 1);
}

/// A commit in the caller's transaction, with the guard at its beginning.
async fn a_lease_outlives_a_long_verified_transaction<T: TestDatabase>(database: &T) {
    if T::NAME == "postgres" {
        return; // It is ended when it has been idle for as long: see `vanished`.
    }
    database.run("CREATE TABLE work (n INT)").await;
    let (locks, other, pool) = (database.locks().await, database.locks().await, database.pool(1).await);
    let lease = locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
    let mut transaction = pool.begin().await.unwrap();
    lease.verify_in(&mut transaction).await.unwrap();
    T::Database::run(&mut transaction, "INSERT INTO work VALUES (1)").await.unwrap();
    let waiting = wait_for(&other);
    assert_stays_held(&lease, &waiting, "verify_in").await;
    transaction.commit().await.unwrap();
    assert_is_renewed(database, &lease, "verify_in").await;
    hand_over::<T>(lease, waiting).await;
}

/// An import that goes on and on.
async fn a_lease_outlives_another_long_writer<T: TestDatabase>(database: &T) {
    if T::NAME != "sqlite" {
        return; // There it is in nobody's way.
    }
    database.run("CREATE TABLE work (n INT)").await;
    for journal in ["DELETE", "WAL"] {
        database.run(&format!("PRAGMA journal_mode = {journal}")).await;
        let (locks, other) = (database.locks().await, database.locks().await);
        let lease = locks.insert_lock("a").ttl(TTL).wait(PATIENCE).acquire().await.unwrap();
        let waiting = wait_for(&other);
        let mut connection = database.connection().await;
        T::Database::run(&mut connection, "BEGIN").await.unwrap();
        T::Database::run(&mut connection, "INSERT INTO work VALUES (1)").await.unwrap();
        assert_stays_held(&lease, &waiting, journal).await;
        T::Database::run(&mut connection, "COMMIT").await.unwrap();
        assert_is_renewed(database, &lease, journal).await;
        hand_over::<T>(lease, waiting).await;
    }
}
