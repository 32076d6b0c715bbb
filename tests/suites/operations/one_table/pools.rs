//! The connections of the pool, and those of the locks themselves, have another `search_path` or current database.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use lock_db::{Kind, Locks};
use lock_tests::{PostgresServer, TestDatabase, TestServer, eventually};
use sqlx::pool::PoolOptions;
use sqlx::{Connection, Pool};
use tokio::task::JoinSet;

use super::elsewhere::{Ask, BOTH_KINDS, Elsewhere, PATIENCE, ask_in, is_free};

lock_tests::cases! {
    on every database:
    tenants_change_the_path_of_pooled_connections,
    the_builder_names_the_table_whatever_the_pool_sees;

    on every server:
    without_a_schema_the_first_connection_decides_for_all,
    connections_that_see_different_tables_have_one_holder,
    new_connections_keep_to_the_table;

    in modules: options_of_the_url
}

/// Of the test's own database.
fn own_schema<T: TestDatabase>(database: &T) -> String {
    match T::NAME {
        "postgres" => "public".to_owned(),
        "sqlite" => "main".to_owned(),
        _ => database.url().rsplit('/').next().unwrap().to_owned(),
    }
}

/// The locks of a pool, in a transaction and without one, exclude another process that looks at the right table.
async fn excludes<T: TestDatabase>(
    locks: &Locks<T::Database>,
    pool: &Pool<T::Database>,
    other: &Locks<T::Database>,
) {
    let lease = locks.insert_lock("lease").acquire().await.unwrap();
    assert!(!is_free(other, Kind::Insert, "lease").await);
    lease.begin().await.unwrap().commit().await.unwrap();
    let transaction = lease.begin().await.unwrap();
    lease.commit_and_release(transaction).await.unwrap();
    assert!(is_free(other, Kind::Insert, "lease").await);
    let several = locks.insert_locks(["several", "leases"]).acquire().await.unwrap();
    assert!(!is_free(other, Kind::Insert, "leases").await);
    several.release().await.unwrap();
    for name in ["row", "new row"] {
        let guard = locks.row_lock(name).acquire().await.unwrap();
        assert!(!is_free(other, Kind::Row, name).await);
        guard.commit().await.unwrap();
        assert!(is_free(other, Kind::Row, name).await);
    }
    for kind in BOTH_KINDS {
        let name = format!("{kind:?} in a transaction");
        let mut transaction = pool.begin().await.unwrap();
        assert!(ask_in(locks, kind, &name, Ask::Acquire, &mut transaction).await.unwrap());
        assert!(!is_free(other, kind, &name).await);
        transaction.commit().await.unwrap();
    }
}

async fn tenants_change_the_path_of_pooled_connections<T: TestDatabase>(database: &T) {
    let other = database.locks().await;
    let elsewhere = Elsewhere::new(database).await;
    let pool = elsewhere.pool_of_used_connections(database.url()).await;
    // Used before, the pool is elsewhere, but not the connections of the locks.
    let locks = Locks::new(pool.clone());
    excludes::<T>(&locks, &pool, &other).await;
    assert!(Elsewhere::<T>::is_untouched(&mut pool.acquire().await.unwrap()).await);
}

async fn the_builder_names_the_table_whatever_the_pool_sees<T: TestDatabase>(database: &T) {
    let other = database.locks().await;
    let elsewhere = Elsewhere::new(database).await;
    let pool = elsewhere.pool(database.url()).await;
    let locks = Locks::builder(pool.clone()).schema(own_schema(database)).build();
    locks.check().await.unwrap();
    excludes::<T>(&locks, &pool, &other).await;
    assert!(Elsewhere::<T>::is_untouched(&mut pool.acquire().await.unwrap()).await);
}

async fn without_a_schema_the_first_connection_decides_for_all<T: TestServer>(database: &T) {
    let here = database.locks().await;
    let elsewhere = Elsewhere::new(database).await;
    let pool = elsewhere.pool(database.url()).await;
    let (locks, other) = (Locks::new(pool.clone()), Locks::new(elsewhere.pool(database.url()).await));
    // A pool that is here: the transactions of such a one mean the table elsewhere, too.
    excludes::<T>(&locks, &database.pool(4).await, &other).await;
    assert_eq!(database.number("SELECT COUNT(*) FROM distributed_lock").await, 0);
    // The two tables have nothing to do with each other.
    let lease = locks.insert_lock("lease").acquire().await.unwrap();
    assert!(is_free(&here, Kind::Insert, "lease").await);
    lease.release().await.unwrap();
}

/// Each second connection looks at another table.
async fn connections_that_see_different_tables_have_one_holder<T: TestServer>(database: &T) {
    drop(database.locks().await);
    let elsewhere = Arc::new(Elsewhere::new(database).await);
    let connections = Arc::new(AtomicUsize::new(0));
    let entering = Arc::clone(&elsewhere);
    let options = PoolOptions::new().max_connections(8).acquire_timeout(Duration::from_mins(1));
    let options = options.after_connect(move |connection, _| {
        let (elsewhere, number) = (Arc::clone(&entering), connections.fetch_add(1, Ordering::SeqCst));
        Box::pin(async move {
            if number % 2 == 1 {
                elsewhere.enter(connection).await;
            }
            Ok(())
        })
    });
    let pool: Pool<T::Database> = options.connect(database.url()).await.unwrap();
    let inside = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
    let mut contending = JoinSet::new();
    for task in 0..8 {
        // Several processes, each of which may have found another table first; told which, they must agree.
        let schema = own_schema(database);
        let locks = Locks::builder(pool.clone()).schema(schema).build();
        let (pool, inside) = (pool.clone(), Arc::clone(&inside));
        contending.spawn(async move {
            for _ in 0..5 {
                let mut transaction = pool.begin().await.unwrap();
                let (kind, inside) = (BOTH_KINDS[task % 2], &inside[task % 2]);
                ask_in(&locks, kind, &format!("{kind:?}"), Ask::Acquire, &mut transaction).await.unwrap();
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two holders of {kind:?}");
                tokio::task::yield_now().await;
                inside.fetch_sub(1, Ordering::SeqCst);
                transaction.commit().await.unwrap();
            }
        });
    }
    while let Some(task) = contending.join_next().await {
        task.unwrap();
    }
}

/// The first connections look at one table, and those that are made after the server has closed them at another one.
async fn new_connections_keep_to_the_table<T: TestServer>(database: &T) {
    let other = database.locks().await;
    let elsewhere = Arc::new(Elsewhere::new(database).await);
    let is_elsewhere = Arc::new(AtomicBool::new(false));
    let (entering, asked) = (Arc::clone(&elsewhere), Arc::clone(&is_elsewhere));
    let options = PoolOptions::new().max_connections(4).acquire_timeout(Duration::from_mins(1));
    let options = options.after_connect(move |connection, _| {
        let (elsewhere, is_elsewhere) = (Arc::clone(&entering), asked.load(Ordering::SeqCst));
        Box::pin(async move {
            if is_elsewhere {
                elsewhere.enter(connection).await;
            }
            Ok(())
        })
    });
    let pool: Pool<T::Database> = options.connect(database.url()).await.unwrap();
    let locks = Locks::new(pool.clone());
    let lease = locks.insert_lock("kept").ttl(Duration::from_secs(3)).acquire().await.unwrap();
    is_elsewhere.store(true, Ordering::SeqCst);
    database.end_connections().await;
    other.close().await;
    let other = Locks::new(database.pool(2).await);

    // The lease is renewed in the table where it was granted.
    let expires = async || {
        database
            .text("SELECT CAST(expire_time AS CHAR(26)) FROM distributed_lock WHERE lock_name = 'kept'")
            .await
    };
    let (first, renewals) = (expires().await, AtomicUsize::new(0));
    let last = std::sync::Mutex::new(first);
    eventually(PATIENCE, async || {
        let now = expires().await;
        let mut last = last.lock().unwrap();
        if *last != now {
            renewals.fetch_add(1, Ordering::SeqCst);
        }
        *last = now;
        renewals.load(Ordering::SeqCst) >= 3
    })
    .await;
    assert!(lease.is_held());
    lease.begin().await.unwrap().commit().await.unwrap();
    lease.release().await.unwrap();
    excludes::<T>(&locks, &pool, &other).await;
    let mut connection = database.connection().await;
    elsewhere.enter(&mut connection).await;
    assert!(Elsewhere::<T>::is_untouched(&mut connection).await);
    connection.close().await.unwrap();
}

/// What a URL can say there.
mod options_of_the_url {
    use super::*;

    lock_tests::cases! {
        on postgres:
        a_path_in_the_url_is_one_table_for_all,
    }

    async fn a_path_in_the_url_is_one_table_for_all(database: &PostgresServer) {
        let _here = database.locks().await;
        let _elsewhere = Elsewhere::new(database).await;
        let url = format!("{}?options=-c%20search_path%3Delsewhere", database.url());
        let (pool, other) = (lock_tests::pool(&url, 4).await, lock_tests::pool(&url, 2).await);
        let (locks, other) = (Locks::new(pool), Locks::new(other));
        // The application's own transactions are on another pool.
        excludes::<PostgresServer>(&locks, &database.pool(4).await, &other).await;
        assert_eq!(database.number("SELECT COUNT(*) FROM public.distributed_lock").await, 0);
    }
}
