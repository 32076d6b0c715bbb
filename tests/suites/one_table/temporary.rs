//! A temporary table of the same name on connections of the application.

use lock_db::{Kind, Locks};
use lock_tests::{Backend, PostgresServer, TestDatabase};
use sqlx::Connection;

use super::place::{ALL_ASKS, BOTH_KINDS, ask_in, is_free};

lock_tests::__tests_on!(postgres PostgresServer
    a_temporary_table_does_not_matter,
    a_temporary_table_made_in_a_guarded_transaction_does_not_matter
);

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
