//! Making the table, checking it, and what is said when it is missing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use lock_db::{Error, Locks};
use lock_tests::{TestDatabase, for_each_database};
use tokio::task::JoinSet;

for_each_database! {
    first_use_without_the_table_says_what_to_run,
    sixteen_migrate_at_once,
    a_failed_migration_leaves_nothing_behind,
    the_application_keeps_its_own_ledger,
    applied_by_hand_it_is_the_same_table,
    a_table_of_another_version_is_told_apart,
}

async fn first_use_without_the_table_says_what_to_run<T: TestDatabase>(database: &T) {
    let pool = database.pool(4).await;
    let locks = Locks::new(pool.clone());
    let says_what_to_run = |error: Error| {
        let Error::SchemaMissing { .. } = &error else { panic!("not SchemaMissing: {error:?}") };
        assert!(error.to_string().contains("locks.migrate()"), "{error}");
        assert!(!error.is_retryable());
    };
    says_what_to_run(locks.check().await.unwrap_err());
    says_what_to_run(locks.insert_lock("a").acquire().await.unwrap_err());
    says_what_to_run(locks.insert_lock("a").try_acquire().await.unwrap_err());
    says_what_to_run(locks.row_lock("a").acquire().await.unwrap_err());
    let mut transaction = pool.begin().await.unwrap();
    says_what_to_run(locks.row_lock("a").acquire_in(&mut transaction).await.unwrap_err());
    says_what_to_run(locks.info("a").await.unwrap_err());
    drop(transaction);

    locks.migrate().await.unwrap();
    locks.check().await.unwrap();
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
}

async fn sixteen_migrate_at_once<T: TestDatabase>(database: &T) {
    let mut migrating = JoinSet::new();
    for _ in 0..16 {
        let locks = Locks::new(database.pool(1).await);
        migrating.spawn(async move {
            locks.migrate().await?;
            locks.check().await?;
            locks.close().await;
            Ok::<_, Error>(())
        });
    }
    while let Some(migrated) = migrating.join_next().await {
        migrated.unwrap().unwrap();
    }
    assert_eq!(database.number("SELECT COUNT(*) FROM _lock_db_migrations").await, 1);
    assert_eq!(database.number("SELECT COUNT(*) FROM distributed_lock").await, 0);
}

async fn a_failed_migration_leaves_nothing_behind<T: TestDatabase>(database: &T) {
    // A ledger that does not fit: the migration fails in the middle, with its lock taken.
    database.run("CREATE TABLE _lock_db_migrations (nonsense INT)").await;
    let locks = Locks::new(database.pool(1).await);
    let error = locks.migrate().await.unwrap_err();
    assert!(matches!(error, Error::Database { .. } | Error::SchemaMissing { .. }), "{error:?}");

    // Another process is not held up by what the first one left.
    database.run("DROP TABLE _lock_db_migrations").await;
    let other = Locks::new(database.pool(1).await);
    other.migrate().await.unwrap();
    locks.migrate().await.unwrap();
    locks.close().await;
    other.close().await;
    lock_tests::eventually(std::time::Duration::from_secs(10), async || {
        database.activity().await.transactions == 0
    })
    .await;
}

async fn the_application_keeps_its_own_ledger<T: TestDatabase>(database: &T) {
    database.run("CREATE TABLE _sqlx_migrations (version BIGINT PRIMARY KEY)").await;
    database.run("INSERT INTO _sqlx_migrations VALUES (42)").await;
    Locks::new(database.pool(1).await).migrate().await.unwrap();
    assert_eq!(database.number("SELECT COUNT(*) FROM _sqlx_migrations").await, 1);
}

async fn applied_by_hand_it_is_the_same_table<T: TestDatabase>(database: &T) {
    let schema = match T::NAME {
        "postgres" => lock_db::schema::POSTGRES,
        "sqlite" => lock_db::schema::SQLITE,
        _ => lock_db::schema::MYSQL,
    };
    database.run(schema).await;
    let locks = Locks::new(database.pool(1).await);
    locks.check().await.unwrap();
    let lease = locks.insert_lock("a").acquire().await.unwrap();
    // And migrating afterwards changes nothing.
    locks.migrate().await.unwrap();
    assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_none());
    lease.release().await.unwrap();
}

async fn a_table_of_another_version_is_told_apart<T: TestDatabase>(database: &T) {
    database.run("CREATE TABLE distributed_lock (lock_name VARCHAR(255) PRIMARY KEY)").await;
    let locks = Locks::new(database.pool(1).await);
    let error = locks.check().await.unwrap_err();
    assert!(matches!(error, Error::SchemaMissing { .. }), "{error:?}");
    let error = locks.insert_lock("a").acquire().await.unwrap_err();
    assert!(matches!(error, Error::SchemaMissing { .. }), "{error:?}");
}
