//! A temporary table of the same name on connections of the application, or on all of the pool.

use lock_db::{Error, Kind, Locks};
use lock_tests::{Backend, PostgresServer, TestDatabase};
use sqlx::Connection;
use sqlx::pool::PoolOptions;

use super::elsewhere::{ALL_ASKS, Ask, BOTH_KINDS, ask_in, is_free};

lock_tests::cases! {
    on postgres:
    a_temporary_table_does_not_matter,
    a_temporary_table_made_in_a_guarded_transaction_does_not_matter;

    on mariadb:
    temporary_tables_of_all_connections_are_refused;

    on mysql:
    temporary_tables_of_all_connections_are_refused,
}

const SHADOW_ON_MYSQL: &str = "CREATE TEMPORARY TABLE distributed_lock LIKE shape";
const SHADOW: &str = "CREATE TEMPORARY TABLE distributed_lock (LIKE distributed_lock INCLUDING ALL)";

async fn a_temporary_table_does_not_matter(database: &PostgresServer) {
    let (locks, other) = (database.locks().await, Locks::new(database.pool(2).await));
    let mut connection = database.connection().await;
    sqlx::raw_sql(SHADOW).execute(&mut connection).await.unwrap();
    for kind in BOTH_KINDS {
        for ask in ALL_ASKS {
            let name = format!("{kind:?} {ask:?}");
            let mut transaction = connection.begin().await.unwrap();
            assert!(ask_in(&locks, kind, &name, ask, &mut transaction).await.unwrap());
            assert!(!is_free(&other, kind, &name).await, "{name} is held");
            transaction.commit().await.unwrap();
        }
    }
    let lease = locks.insert_lock("lease").acquire().await.unwrap();
    let mut transaction = connection.begin().await.unwrap();
    lease.verify_in(&mut transaction).await.unwrap();
    lease.release_in(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
    assert!(is_free(&other, Kind::Insert, "lease").await);
    let rows = "SELECT COUNT(*) FROM pg_temp.distributed_lock";
    assert_eq!(sqlx::Postgres::find_number(&mut connection, rows).await.unwrap(), Some(0));
}

async fn a_temporary_table_made_in_a_guarded_transaction_does_not_matter(database: &PostgresServer) {
    let (locks, other) = (database.locks().await, Locks::new(database.pool(2).await));
    let lease = locks.insert_lock("lease").acquire().await.unwrap();
    let mut transaction = lease.begin().await.unwrap();
    sqlx::raw_sql(SHADOW).execute(&mut *transaction).await.unwrap();
    lease.commit_and_release(transaction).await.unwrap();
    assert!(is_free(&other, Kind::Insert, "lease").await);
}

/// By a hook, which the connections of the locks run as well.
async fn temporary_tables_of_all_connections_are_refused<T: TestDatabase>(database: &T) {
    let other = database.locks().await;
    database.run("CREATE TABLE shape LIKE distributed_lock").await;
    let options = PoolOptions::new().max_connections(4).after_connect(|connection, _| {
        Box::pin(async move { T::Database::run(connection, SHADOW_ON_MYSQL).await.map(drop) })
    });
    let pool = options.connect(database.url()).await.unwrap();
    let locks: Locks<T::Database> = Locks::new(pool.clone());
    let refused = |error: Error| matches!(&error, Error::UnsupportedTable { reason, .. } if reason.contains("temporary"));
    assert!(locks.check().await.is_err_and(refused));
    assert!(locks.insert_lock("lease").try_acquire().await.is_err_and(refused));
    assert!(is_free(&other, Kind::Insert, "lease").await);
    assert!(locks.row_lock("row").try_acquire().await.is_err_and(refused));
    assert!(is_free(&other, Kind::Row, "row").await);
    for kind in BOTH_KINDS {
        let name = format!("{kind:?} in a transaction");
        let mut transaction = pool.begin().await.unwrap();
        let asked = ask_in(&locks, kind, &name, Ask::Acquire, &mut transaction).await;
        assert!(asked.is_err_and(refused), "{kind:?}");
        assert!(is_free(&other, kind, &name).await, "{kind:?}");
    }
}
