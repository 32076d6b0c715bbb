//! SQL modes of sessions that read the same statement in another way.

use lock_db::Locks;
use lock_tests::{Backend, MariaDbServer, TestDatabase, TestServer};
use sqlx::Pool;
use sqlx::pool::PoolOptions;

use super::requests::{all_are_granted, ask, locks_in_use};

lock_tests::cases! {
    on mariadb:
    modes_that_both_servers_have,
    an_empty_string_that_is_null,
    modes_that_only_mariadb_has;

    on mysql:
    modes_that_both_servers_have,
}

async fn modes_that_both_servers_have<T: TestServer>(database: &T) {
    for mode in [
        "",
        "ANSI",
        "ANSI_QUOTES",
        "TRADITIONAL",
        "NO_BACKSLASH_ESCAPES",
        "NO_AUTO_VALUE_ON_ZERO",
        "PAD_CHAR_TO_FULL_LENGTH",
        "HIGH_NOT_PRECEDENCE",
        "IGNORE_SPACE",
        "ONLY_FULL_GROUP_BY",
        "NO_UNSIGNED_SUBTRACTION",
        "REAL_AS_FLOAT",
    ] {
        works_under(database, mode).await;
    }
}

async fn an_empty_string_that_is_null(database: &MariaDbServer) {
    works_under(database, "EMPTY_STRING_IS_NULL").await;
    works_under(database, "STRICT_TRANS_TABLES,EMPTY_STRING_IS_NULL").await;
}

async fn modes_that_only_mariadb_has(database: &MariaDbServer) {
    for mode in ["SIMULTANEOUS_ASSIGNMENT", "TIME_ROUND_FRACTIONAL", "NO_ZERO_DATE", "MSSQL", "POSTGRESQL"] {
        works_under(database, mode).await;
    }
}

/// On all connections, those of the locks included.
async fn works_under<T: TestDatabase>(database: &T, mode: &'static str) {
    drop(locks_in_use(database).await);
    let options = PoolOptions::new().max_connections(4).after_connect(move |connection, _| {
        Box::pin(async move {
            let set = format!("SET SESSION sql_mode = '{mode}'");
            T::Database::run(connection, &set).await.map(drop)
        })
    });
    let pool: Pool<T::Database> = options.connect(database.url()).await.unwrap();
    let (locks, other) = (Locks::new(pool.clone()), Locks::new(pool.clone()));
    locks.migrate().await.unwrap();
    locks.check().await.unwrap();
    all_are_granted(mode, &ask(&locks, &pool).await);
    // What the modes read in another way.
    let name = "a\\'b\"c`d";
    let lease = locks.insert_lock(name).acquire().await.unwrap();
    assert!(other.insert_lock(name).try_acquire().await.unwrap().is_none(), "{mode}");
    lease.begin().await.unwrap().commit().await.unwrap();
    let mut transaction = pool.begin().await.unwrap();
    lease.verify_in(&mut transaction).await.unwrap();
    lease.release_in(&mut transaction).await.unwrap();
    let held = locks.row_lock("row").acquire_in(&mut transaction).await.unwrap();
    assert_eq!(held.hold_count(), 1);
    assert_eq!(locks.row_lock("row").acquire_in(&mut transaction).await.unwrap().hold_count(), 2, "{mode}");
    assert!(other.row_lock("row").try_acquire().await.unwrap().is_none(), "{mode}");
    transaction.commit().await.unwrap();
    lease.lost().await;
    let lease = other.insert_lock(name).try_acquire().await.unwrap().expect(mode);
    let transaction = lease.begin().await.unwrap();
    lease.commit_and_release(transaction).await.unwrap();
    assert!(locks.insert_lock(name).try_acquire().await.unwrap().is_some(), "{mode}");
    locks.close().await;
    other.close().await;
}
