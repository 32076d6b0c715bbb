//! Transactions that do not reach the table are refused, and stay as usable as before.

use lock_db::{Error, Kind, Locks};
use lock_tests::{Backend, SqliteFile, TestDatabase, eventually};
use sqlx::Connection;

use super::elsewhere::{ALL_ASKS, BOTH_KINDS, PATIENCE, ask_in, is_free};

lock_tests::cases! {
    on postgres:
    transactions_in_another_database_are_refused,
    transactions_in_a_database_without_the_table_are_refused;

    on mariadb:
    transactions_beside_a_temporary_table_are_refused;

    on mysql:
    transactions_beside_a_temporary_table_are_refused;

    on sqlite:
    transactions_in_another_database_are_refused,
    transactions_in_a_database_without_the_table_are_refused,
    guards_in_a_database_without_the_table_are_refused,
    one_file_by_two_paths_is_one_database,
}

async fn transactions_in_another_database_are_refused<T: TestDatabase>(database: &T) {
    let other = T::create().await;
    drop(other.locks().await);
    let mut connection = other.connection().await;
    refuses_locks(database, &mut connection).await;
    refuses_guards(database, &mut connection).await;
    assert_eq!(other.number("SELECT COUNT(*) FROM distributed_lock").await, 0);
}

async fn transactions_in_a_database_without_the_table_are_refused<T: TestDatabase>(database: &T) {
    let other = T::create().await;
    let mut connection = other.connection().await;
    refuses_locks(database, &mut connection).await;
}

pub async fn guards_in_a_database_without_the_table_are_refused<T: TestDatabase>(database: &T) {
    let other = T::create().await;
    let mut connection = other.connection().await;
    refuses_guards(database, &mut connection).await;
}

async fn transactions_beside_a_temporary_table_are_refused<T: TestDatabase>(database: &T) {
    drop(database.locks().await);
    let mut connection = database.connection().await;
    let shadow =
        "CREATE TABLE shape LIKE distributed_lock; CREATE TEMPORARY TABLE distributed_lock LIKE shape";
    T::Database::run(&mut connection, shadow).await.unwrap();
    refuses_locks(database, &mut connection).await;
    refuses_guards(database, &mut connection).await;
    // The table behind it is reached again.
    T::Database::run(&mut connection, "DROP TEMPORARY TABLE distributed_lock").await.unwrap();
    let mut transaction = connection.begin().await.unwrap();
    let locks = Locks::new(database.pool(2).await);
    assert!(
        ask_in(&locks, Kind::Row, "row", super::elsewhere::Ask::Acquire, &mut transaction).await.unwrap()
    );
    transaction.commit().await.unwrap();
}

const WRITE: &str = "INSERT INTO business VALUES (1)";

fn is_refused(error: &Error, name: &str) {
    assert!(matches!(error, Error::ForeignTransaction { .. }), "{name}: {error:?}");
    assert!(!error.is_retryable());
    assert_eq!(error.name(), Some(name));
}

/// `connection` does not reach the table of the database.
async fn refuses_locks<T: TestDatabase>(
    database: &T,
    connection: &mut <T::Database as sqlx::Database>::Connection,
) {
    let locks = database.locks().await;
    T::Database::run(connection, "CREATE TABLE business (n INTEGER)").await.unwrap();
    let mut written = 0;
    for kind in BOTH_KINDS {
        for ask in ALL_ASKS {
            // Before any other statement of the transaction, and after one.
            for is_first in [true, false] {
                let name = format!("{kind:?} {ask:?} {is_first}");
                let mut transaction = connection.begin().await.unwrap();
                if !is_first {
                    T::Database::run(&mut transaction, WRITE).await.unwrap();
                    written += 1;
                }
                is_refused(&ask_in(&locks, kind, &name, ask, &mut transaction).await.unwrap_err(), &name);
                T::Database::run(&mut transaction, WRITE).await.unwrap();
                transaction.commit().await.unwrap();
                written += 1;
                assert!(is_free(&locks, kind, &name).await, "{name} was given to nobody");
            }
        }
    }
    let count = T::Database::find_number(connection, "SELECT COUNT(*) FROM business").await;
    assert_eq!(count.unwrap(), Some(written), "what was written in the transactions");
    T::Database::run(connection, "DROP TABLE business").await.unwrap();
}

/// The same of a lease that is to be verified or released there.
async fn refuses_guards<T: TestDatabase>(
    database: &T,
    connection: &mut <T::Database as sqlx::Database>::Connection,
) {
    let locks = database.locks().await;
    T::Database::run(connection, "CREATE TABLE business (n INTEGER)").await.unwrap();
    let lease = locks.insert_lock("lease").acquire().await.unwrap();
    for is_release in [false, true] {
        let mut transaction = connection.begin().await.unwrap();
        T::Database::run(&mut transaction, WRITE).await.unwrap();
        let refused = match is_release {
            false => lease.verify_in(&mut transaction).await,
            true => lease.release_in(&mut transaction).await,
        };
        is_refused(&refused.unwrap_err(), "lease");
        T::Database::run(&mut transaction, WRITE).await.unwrap();
        transaction.commit().await.unwrap();
    }
    let count = T::Database::find_number(connection, "SELECT COUNT(*) FROM business").await;
    assert_eq!(count.unwrap(), Some(4), "what was written in the transactions");

    // The lease goes on.
    eventually(PATIENCE, async || lease.is_held()).await;
    lease.begin().await.unwrap().commit().await.unwrap();
    lease.release().await.unwrap();
    assert!(is_free(&Locks::new(database.pool(2).await), Kind::Insert, "lease").await);
    T::Database::run(connection, "DROP TABLE business").await.unwrap();
}

async fn one_file_by_two_paths_is_one_database(database: &SqliteFile) {
    let path = database.text("SELECT file FROM pragma_database_list WHERE name = 'main'").await;
    let path = std::path::Path::new(&path);
    let (folder, file) = (path.parent().unwrap(), path.file_name().unwrap().to_str().unwrap());
    std::fs::create_dir(folder.join("folder")).unwrap();
    std::os::unix::fs::symlink(path, folder.join("link.db")).unwrap();
    let locks = database.locks().await;
    let lease = locks.insert_lock("lease").acquire().await.unwrap();
    for way in [format!("folder/../{file}"), "link.db".to_owned()] {
        let url = format!("sqlite://{}", folder.join(&way).display());
        let pool = lock_tests::pool::<sqlx::Sqlite>(&url, 2).await;
        let mut transaction = pool.begin().await.unwrap();
        lease.verify_in(&mut transaction).await.unwrap_or_else(|error| panic!("{way}: {error:?}"));
        let granted = locks.row_lock("row").acquire_in(&mut transaction).await;
        granted.unwrap_or_else(|error| panic!("{way}: {error:?}"));
        transaction.commit().await.unwrap();
        assert!(!is_free(&Locks::new(pool), Kind::Insert, "lease").await);
    }
    lease.release().await.unwrap();
}
