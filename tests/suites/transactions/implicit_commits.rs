//! Statements that end the transaction in which they are sent: DDL, LOCK TABLES and START
//! TRANSACTION on MySQL and MariaDB, and COMMIT and ROLLBACK as text on every database. After that
//! the lock is not reported as held, no commit returns Ok, and the pool's connection is usable
//! again. On PostgreSQL and SQLite DDL is part of the transaction.

use std::time::Duration;

use lock_db::{Error, LockDatabase, Locks, Loss, RowGuard, distributed_lock};
use lock_tests::{Backend, TestDatabase, eventually};
use sqlx::Pool;

lock_tests::cases! {
    on every database:
    ending_a_guarded_transaction_by_a_statement,
    ending_a_guarded_transaction_that_releases_by_a_statement,
    ending_the_transaction_of_a_row_lock_by_a_statement,
    ending_the_transaction_of_a_function_by_a_statement,
    ending_a_transaction_that_holds_a_lock_by_a_statement,
    ending_a_transaction_that_verified_a_lease_by_a_statement,
    verifying_a_lease_after_a_statement_ended_the_transaction,
    ending_a_transaction_that_released_a_lease_by_a_statement,
    transactional_ddl_ends_nothing,
}

const PATIENCE: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_mins(10);

/// The statements that end a transaction there. Most of them fail, because what follows is
/// read-only.
fn statements<T: TestDatabase>() -> &'static [&'static str] {
    match T::NAME {
        "mysql" | "mariadb" => &[
            "CREATE TABLE made (n INT)",
            "ALTER TABLE other ADD COLUMN extra INT",
            "TRUNCATE other",
            "DROP TABLE IF EXISTS no_such_table",
            "RENAME TABLE other TO another, another TO other",
            "CREATE INDEX other_n ON other (n)",
            "LOCK TABLES other WRITE",
            "START TRANSACTION",
            "COMMIT",
            "ROLLBACK",
        ],
        _ => &["COMMIT", "ROLLBACK"],
    }
}

/// Whether what was written before the statement is kept.
fn keeps(statement: &str) -> i64 {
    i64::from(statement != "ROLLBACK")
}

struct Stage<T: TestDatabase> {
    locks: Locks<T::Database>,
    other: Locks<T::Database>,
    /// Of one connection.
    pool: Pool<T::Database>,
}

impl<T: TestDatabase> Stage<T> {
    async fn new(database: &T) -> Self {
        let pool = database.pool(1).await;
        let locks = lock_tests::migrated(Locks::new(pool.clone())).await;
        Self { locks, other: Locks::new(database.pool(2).await), pool }
    }

    async fn set(database: &T) {
        database
            .run("DROP TABLE IF EXISTS work; DROP TABLE IF EXISTS other; DROP TABLE IF EXISTS made")
            .await;
        database.run("CREATE TABLE work (n INT); CREATE TABLE other (n INT)").await;
    }

    /// The pool's only connection commits by itself again, and no table is locked.
    async fn is_as_before(&self, database: &T, what: &str) {
        let mut connection = self.pool.acquire().await.unwrap();
        T::Database::run(&mut connection, "INSERT INTO work VALUES (5)").await.unwrap();
        drop(connection);
        assert_eq!(rows(database, 5).await, 1, "{what}");
        database.run("INSERT INTO other (n) VALUES (1)").await;
    }
}

async fn write<DB: Backend>(connection: &mut DB::Connection, n: i64) -> sqlx::Result<u64> {
    DB::run(connection, &format!("INSERT INTO work VALUES ({n})")).await
}

async fn rows<T: TestDatabase>(database: &T, n: i64) -> i64 {
    database.number(&format!("SELECT COUNT(*) FROM work WHERE n = {n}")).await
}

fn is_ended<V>(ended: &Result<V, Error>) -> bool {
    matches!(ended, Err(Error::Lost { reason: Loss::TransactionEnded, .. }))
}

/// Whether what follows is refused, by the database itself or by the mark of the transaction.
fn refuses_what_follows<T: TestDatabase>() -> bool {
    matches!(T::NAME, "mysql" | "mariadb")
}

async fn ending_a_guarded_transaction_by_a_statement<T: TestDatabase>(database: &T) {
    let stage = Stage::new(database).await;
    let lease = stage.locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    for statement in statements::<T>() {
        for end in ["commit", "rollback", "drop"] {
            Stage::<T>::set(database).await;
            let what = format!("{statement}, {end}");
            let mut transaction = lease.begin().await.unwrap();
            write::<T::Database>(&mut transaction, 1).await.unwrap();
            let _refused = T::Database::run(&mut transaction, statement).await;
            let _refused = write::<T::Database>(&mut transaction, 2).await;
            match end {
                "commit" => {
                    let ended = transaction.commit().await;
                    assert!(is_ended(&ended), "{what}: {ended:?}");
                }
                "rollback" => drop(transaction.rollback().await),
                _ => drop(transaction),
            }
            stage.is_as_before(database, &what).await;
            assert_eq!(rows(database, 1).await, keeps(statement), "{what}");
            if refuses_what_follows::<T>() {
                assert_eq!(rows(database, 2).await, 0, "{what}");
            }
            // The transaction has ended, not the lease.
            assert!(lease.is_held(), "{what}");
        }
    }
    let mut transaction = lease.begin().await.unwrap();
    write::<T::Database>(&mut transaction, 3).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(rows(database, 3).await, 1);
    lease.release().await.unwrap();
}

async fn ending_a_guarded_transaction_that_releases_by_a_statement<T: TestDatabase>(database: &T) {
    let stage = Stage::new(database).await;
    for statement in statements::<T>() {
        Stage::<T>::set(database).await;
        let lease = stage.locks.insert_lock("a").ttl(LONG).wait(PATIENCE).acquire().await.unwrap();
        let mut transaction = lease.begin().await.unwrap();
        write::<T::Database>(&mut transaction, 1).await.unwrap();
        let _refused = T::Database::run(&mut transaction, statement).await;
        let _refused = write::<T::Database>(&mut transaction, 2).await;
        let ended = lease.commit_and_release(transaction).await;
        assert!(is_ended(&ended), "{statement}: {ended:?}");
        if refuses_what_follows::<T>() {
            assert_eq!(rows(database, 2).await, 0, "{statement}");
        }
        stage.is_as_before(database, statement).await;
        // The lease is dropped with the call.
        stage.other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    }
}

async fn ending_the_transaction_of_a_row_lock_by_a_statement<T: TestDatabase>(database: &T) {
    let stage = Stage::new(database).await;
    for statement in statements::<T>() {
        for end in ["commit", "rollback", "drop"] {
            Stage::<T>::set(database).await;
            let what = format!("{statement}, {end}");
            let mut guard = stage.locks.row_lock("row").wait(PATIENCE).acquire().await.unwrap();
            write::<T::Database>(&mut guard, 1).await.unwrap();
            let _refused = T::Database::run(&mut guard, statement).await;
            // The lock is free from here on.
            let taken = stage.other.row_lock("row").wait(PATIENCE).acquire().await;
            taken.unwrap_or_else(|error| panic!("{what}: {error}")).rollback().await.unwrap();
            let _refused = write::<T::Database>(&mut guard, 2).await;
            match end {
                "commit" => {
                    let ended = guard.commit().await;
                    assert!(is_ended(&ended), "{what}: {ended:?}");
                }
                "rollback" => drop(guard.rollback().await),
                _ => drop(guard),
            }
            stage.is_as_before(database, &what).await;
            assert_eq!(rows(database, 1).await, keeps(statement), "{what}");
            if refuses_what_follows::<T>() {
                assert_eq!(rows(database, 2).await, 0, "{what}");
            }
        }
    }
}

#[distributed_lock("row", mode = row, lease = guard, locks = locks)]
async fn under_a_row_lock<DB: LockDatabase + Backend>(
    locks: &Locks<DB>,
    statement: &str,
) -> Result<(), Error> {
    write::<DB>(guard_connection(guard), 1).await.unwrap();
    let _refused = DB::run(guard_connection(guard), statement).await;
    let _refused = write::<DB>(guard_connection(guard), 2).await;
    Ok(())
}

fn guard_connection<DB: LockDatabase>(guard: &mut RowGuard<DB>) -> &mut DB::Connection {
    guard
}

/// Its Ok would mean that the transaction was committed under the lock.
async fn ending_the_transaction_of_a_function_by_a_statement<T: TestDatabase>(database: &T) {
    let stage = Stage::new(database).await;
    for statement in statements::<T>() {
        Stage::<T>::set(database).await;
        let ended = under_a_row_lock(&stage.locks, statement).await;
        assert!(is_ended(&ended), "{statement}: {ended:?}");
        if refuses_what_follows::<T>() {
            assert_eq!(rows(database, 2).await, 0, "{statement}");
        }
        stage.is_as_before(database, statement).await;
    }
}

// ------------------------------------------------------------------------ the caller's transaction

/// Its locks are gone, and it gets no others.
async fn ending_a_transaction_that_holds_a_lock_by_a_statement<T: TestDatabase>(database: &T) {
    let stage = Stage::new(database).await;
    for statement in statements::<T>() {
        for is_row in [false, true] {
            Stage::<T>::set(database).await;
            let what = format!("{statement}, row lock: {is_row}");
            let mut transaction = stage.pool.begin().await.unwrap();
            if is_row {
                stage.locks.row_lock("row").acquire_in(&mut transaction).await.unwrap();
            } else {
                stage.locks.insert_lock("lease").acquire_in(&mut transaction).await.unwrap();
            }
            write::<T::Database>(&mut transaction, 1).await.unwrap();
            let _done = T::Database::run(&mut transaction, statement).await;
            if is_row {
                let taken = stage.other.row_lock("row").wait(PATIENCE).acquire().await;
                taken.unwrap_or_else(|error| panic!("{what}: {error}")).rollback().await.unwrap();
            } else {
                let taken = stage.other.insert_lock("lease").wait(PATIENCE).acquire().await;
                taken.unwrap_or_else(|error| panic!("{what}: {error}")).release().await.unwrap();
            }
            // After START TRANSACTION it is in another transaction, which can't be told from the
            // first.
            if *statement != "START TRANSACTION" {
                let again = stage.locks.row_lock("another").wait(PATIENCE).acquire_in(&mut transaction).await;
                assert!(is_ended(&again), "{what}: {again:?}");
            }
            let _ended = transaction.rollback().await;
            if *statement == "LOCK TABLES other WRITE" {
                // The application's own connection, and its own statement.
                T::Database::run(&mut stage.pool.acquire().await.unwrap(), "UNLOCK TABLES").await.unwrap();
            }
            stage.is_as_before(database, &what).await;
            assert_eq!(rows(database, 1).await, keeps(statement), "{what}");
        }
    }
}

/// What was verified is committed, and the lock is free for others when the lease is released.
async fn ending_a_transaction_that_verified_a_lease_by_a_statement<T: TestDatabase>(database: &T) {
    let stage = Stage::new(database).await;
    let lease = stage.locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    for statement in statements::<T>() {
        Stage::<T>::set(database).await;
        let mut transaction = stage.pool.begin().await.unwrap();
        write::<T::Database>(&mut transaction, 1).await.unwrap();
        lease.verify_in(&mut transaction).await.unwrap();
        let _done = T::Database::run(&mut transaction, statement).await;
        let _ended = transaction.rollback().await;
        if *statement == "LOCK TABLES other WRITE" {
            T::Database::run(&mut stage.pool.acquire().await.unwrap(), "UNLOCK TABLES").await.unwrap();
        }
        stage.is_as_before(database, statement).await;
        assert_eq!(rows(database, 1).await, keeps(statement), "{statement}");
        assert!(lease.is_held(), "{statement}");
        assert!(stage.other.insert_lock("a").try_acquire().await.unwrap().is_none(), "{statement}");
    }
    lease.release().await.unwrap();
    stage.other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
}

async fn verifying_a_lease_after_a_statement_ended_the_transaction<T: TestDatabase>(database: &T) {
    let stage = Stage::new(database).await;
    let lease = stage.locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    for statement in statements::<T>() {
        // See above.
        if matches!(*statement, "START TRANSACTION") {
            continue;
        }
        for releases in [false, true] {
            Stage::<T>::set(database).await;
            let what = format!("{statement}, releases: {releases}");
            let mut transaction = stage.pool.begin().await.unwrap();
            write::<T::Database>(&mut transaction, 1).await.unwrap();
            let _done = T::Database::run(&mut transaction, statement).await;
            let asked = match releases {
                true => lease.release_in(&mut transaction).await,
                false => lease.verify_in(&mut transaction).await,
            };
            assert!(is_ended(&asked), "{what}: {asked:?}");
            let _ended = transaction.rollback().await;
            if *statement == "LOCK TABLES other WRITE" {
                T::Database::run(&mut stage.pool.acquire().await.unwrap(), "UNLOCK TABLES").await.unwrap();
            }
            stage.is_as_before(database, &what).await;
            // Neither has affected the lease.
            eventually(PATIENCE, async || lease.is_held()).await;
            assert!(stage.other.insert_lock("a").try_acquire().await.unwrap().is_none(), "{what}");
        }
    }
    lease.release().await.unwrap();
}

/// The release takes effect with the commit, no matter who sent the commit.
async fn ending_a_transaction_that_released_a_lease_by_a_statement<T: TestDatabase>(database: &T) {
    let stage = Stage::new(database).await;
    for statement in statements::<T>() {
        Stage::<T>::set(database).await;
        let lease = stage.locks.insert_lock("a").ttl(LONG).wait(PATIENCE).acquire().await.unwrap();
        let mut transaction = stage.pool.begin().await.unwrap();
        write::<T::Database>(&mut transaction, 1).await.unwrap();
        lease.release_in(&mut transaction).await.unwrap();
        let _done = T::Database::run(&mut transaction, statement).await;
        if keeps(statement) == 1 {
            let taken = stage.other.insert_lock("a").wait(PATIENCE).acquire().await;
            let taken = taken.unwrap_or_else(|error| panic!("{statement}: {error}"));
            assert!(!lease.is_held(), "{statement}");
            tokio::time::timeout(PATIENCE, lease.lost()).await.expect(statement);
            taken.release().await.unwrap();
        } else {
            eventually(PATIENCE, async || lease.is_held()).await;
            lease.release().await.unwrap();
        }
        let _ended = transaction.rollback().await;
        if *statement == "LOCK TABLES other WRITE" {
            T::Database::run(&mut stage.pool.acquire().await.unwrap(), "UNLOCK TABLES").await.unwrap();
        }
        stage.is_as_before(database, statement).await;
        assert_eq!(rows(database, 1).await, keeps(statement), "{statement}");
    }
}

/// On MySQL and MariaDB, also statements that create a temporary table.
async fn transactional_ddl_ends_nothing<T: TestDatabase>(database: &T) {
    let stage = Stage::new(database).await;
    Stage::<T>::set(database).await;
    let lease = stage.locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let is_innodb = matches!(T::NAME, "mysql" | "mariadb");
    let ddl: &[&str] = match T::NAME {
        "mysql" | "mariadb" => &["CREATE TEMPORARY TABLE made (n INT)", "DROP TEMPORARY TABLE made"],
        "postgres" => &["CREATE TABLE made (n INT)", "ALTER TABLE made ADD COLUMN m INT", "TRUNCATE made"],
        _ => &["CREATE TABLE made (n INT)", "ALTER TABLE made ADD COLUMN m INT"],
    };
    let mut transaction = lease.begin().await.unwrap();
    for statement in ddl {
        T::Database::run(&mut transaction, statement).await.unwrap();
    }
    write::<T::Database>(&mut transaction, 1).await.unwrap();
    transaction.rollback().await.unwrap();
    assert_eq!(rows(database, 1).await, 0);
    let mut transaction = lease.begin().await.unwrap();
    for statement in ddl {
        T::Database::run(&mut transaction, statement).await.unwrap();
    }
    write::<T::Database>(&mut transaction, 1).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(rows(database, 1).await, 1);
    if !is_innodb {
        assert_eq!(database.number("SELECT COUNT(*) FROM made").await, 0);
    }
    let mut guard = stage.locks.row_lock("row").acquire().await.unwrap();
    if is_innodb {
        T::Database::run(&mut guard, "CREATE TEMPORARY TABLE made (n INT)").await.unwrap();
    } else {
        T::Database::run(&mut guard, "CREATE TABLE more (n INT)").await.unwrap();
    }
    write::<T::Database>(&mut guard, 2).await.unwrap();
    guard.commit().await.unwrap();
    assert_eq!(rows(database, 2).await, 1);
    assert!(lease.is_held());
    lease.release().await.unwrap();
}
