//! Settings that administrators make on servers.

use std::time::{Duration, Instant};

use lock_db::{Error, Locks};
use lock_tests::{Backend, PostgresServer, TestDatabase, TestServer, eventually};

lock_tests::cases! {
    on every server:
    a_row_outside_the_snapshot_is_not_reported_as_held,
    closed_private_connections_are_replaced,
    closed_connections_of_the_pool_are_replaced,
    session_settings_do_not_matter;

    in modules: database_settings
}

const PATIENCE: Duration = Duration::from_secs(20);

/// Ends all sessions as `idle_session_timeout`, `wait_timeout` and restarts do. Those that connect
/// again by themselves, such as that of a held lease, are not waited for.
async fn end_sessions<T: TestServer>(database: &T) {
    let (all, left) = if T::NAME == "postgres" {
        (
            "SELECT string_agg(pid::text, ',') FROM pg_stat_activity
                WHERE datname = current_database() AND pid <> pg_backend_pid()",
            "SELECT COUNT(*) FROM pg_stat_activity WHERE pid",
        )
    } else {
        (
            "SELECT GROUP_CONCAT(id) FROM information_schema.processlist
                WHERE db = DATABASE() AND id <> CONNECTION_ID()",
            "SELECT COUNT(*) FROM information_schema.processlist WHERE id",
        )
    };
    let sessions = database.find_text(all).await.expect("there are sessions");
    database.end_connections().await;
    eventually(PATIENCE, async || database.number(&format!("{left} IN ({sessions})")).await == 0).await;
}

async fn closed_private_connections_are_replaced<T: TestServer>(database: &T) {
    let locks = database.locks().await;
    let lease = locks.insert_lock("a").acquire().await.unwrap();
    end_sessions(database).await;
    lease.release().await.unwrap();
    end_sessions(database).await;
    let lease = locks.insert_lock("a").try_acquire().await.unwrap().expect("it is free");
    end_sessions(database).await;
    assert!(locks.info("a").await.unwrap().unwrap().held_until.is_some());
    lease.release().await.unwrap();
}

/// The pool's hooks also run on private connections, and server-wide settings apply to them as
/// well.
async fn session_settings_do_not_matter<T: TestServer>(database: &T) {
    const TTL: Duration = Duration::from_secs(2);
    drop(database.locks().await);
    let options = sqlx::pool::PoolOptions::new().max_connections(3).after_connect(|connection, _| {
        Box::pin(async move {
            let settings = if T::NAME == "postgres" {
                "SET lock_timeout = '5ms'; SET default_transaction_isolation = 'serializable'"
            } else {
                "SET SESSION completion_type = 'CHAIN', SESSION sql_safe_updates = 1, SESSION sql_select_limit = 1"
            };
            T::Database::run(connection, settings).await.map(drop)
        })
    });
    let locks: Locks<T::Database> = Locks::new(options.connect(database.url()).await.unwrap());
    let other = Locks::new(database.pool(2).await);
    let several = locks.insert_locks(["b", "c"]).wait(PATIENCE).acquire().await.unwrap();
    several.release().await.unwrap();
    let lease = locks.insert_lock("a").ttl(TTL).wait(PATIENCE).acquire().await.unwrap();
    // Released locks are free for other processes, and held ones are taken for them.
    other.insert_locks(["b", "c"]).wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_none());
    let lost = tokio::time::timeout(3 * TTL, lease.lost()).await;
    assert!(lost.is_err(), "it is not renewed: {lost:?}");
    lease.begin().await.unwrap().commit().await.unwrap();
    lease.release().await.unwrap();
    other.insert_lock("a").try_acquire().await.unwrap().expect("it is free").release().await.unwrap();
}

/// Connections that are not tested before use, as with `test_before_acquire(false)`.
async fn closed_connections_of_the_pool_are_replaced<T: TestServer>(database: &T) {
    drop(database.locks().await);
    let options = sqlx::pool::PoolOptions::new().max_connections(1).test_before_acquire(false);
    let pool = options.connect(database.url()).await.unwrap();
    let locks: Locks<T::Database> = Locks::new(pool.clone());
    let lease = locks.insert_lock("lease").acquire().await.unwrap();
    for _ in 0..3 {
        drop(pool.acquire().await.unwrap());
        end_sessions(database).await;
        locks.row_lock("row").wait(PATIENCE).acquire().await.unwrap().commit().await.unwrap();
        drop(pool.acquire().await.unwrap());
        end_sessions(database).await;
        lease.begin().await.unwrap().commit().await.unwrap();
    }
    lease.release().await.unwrap();
}

async fn a_row_outside_the_snapshot_is_not_reported_as_held<T: TestServer>(database: &T) {
    let locks = database.locks().await;
    let mut transaction = database.pool(1).await.begin().await.unwrap();
    if T::NAME == "postgres" {
        T::Database::run(&mut transaction, "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ").await.unwrap();
    }
    T::Database::find_number(&mut transaction, "SELECT COUNT(*) FROM distributed_lock").await.unwrap();
    match locks.row_lock("new").try_acquire_in(&mut transaction).await {
        // InnoDB locks the current row, and the lock was never held before.
        Ok(taken) => assert!(taken.is_some(), "it is free"),
        Err(error) => assert!(matches!(error, Error::Serialization { .. }), "{error:?}"),
    }
}

/// Settings for a single database. MySQL has them only for whole servers, which other tests use at
/// the same time.
mod database_settings {
    use super::*;

    lock_tests::cases! {
        on postgres:
        a_read_only_session_is_refused_immediately,
        migrating_works_at_any_default_level,
        a_statement_timeout_does_not_shorten_a_wait,
    }

    /// For all connections to this database that are opened from now on.
    async fn set_on_database(database: &PostgresServer, setting: &str) {
        let name = database.text("SELECT current_database()").await;
        database.run(&format!(r#"ALTER DATABASE "{name}" SET {setting}"#)).await;
    }

    /// By a setting that does not change by itself. (What a standby refuses is waited for: see
    /// `standby`.)
    async fn a_read_only_session_is_refused_immediately(database: &PostgresServer) {
        drop(database.locks().await);
        set_on_database(database, "default_transaction_read_only = on").await;
        let locks = Locks::new(database.pool(2).await);
        let started = Instant::now();
        let error = locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap_err();
        assert!(started.elapsed() < PATIENCE / 2);
        assert!(
            matches!(error, Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. })
                && !error.is_retryable(),
            "{error:?}"
        );
        assert!(error.to_string().contains("default_transaction_read_only"), "{error}");
    }

    async fn migrating_works_at_any_default_level(database: &PostgresServer) {
        for level in ["repeatable read", "serializable"] {
            set_on_database(database, &format!("default_transaction_isolation = '{level}'")).await;
            database.run("DROP TABLE IF EXISTS distributed_lock, _lock_db_migrations").await;
            let mut migrating = tokio::task::JoinSet::new();
            for _ in 0..8 {
                let locks = Locks::new(database.pool(1).await);
                migrating.spawn(async move { locks.migrate().await });
            }
            for migrated in migrating.join_all().await {
                migrated.unwrap();
            }
        }
    }

    async fn a_statement_timeout_does_not_shorten_a_wait(database: &PostgresServer) {
        const WAIT: Duration = Duration::from_secs(2);
        let holder = database.locks().await;
        let held = holder.row_lock("a").acquire().await.unwrap();
        set_on_database(database, "statement_timeout = '500ms'").await;
        let pool = database.pool(2).await;
        let locks = Locks::new(pool.clone());
        let started = Instant::now();
        let error = locks.row_lock("a").wait(WAIT).acquire().await.unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
        assert!(started.elapsed() >= WAIT);
        let mut transaction = pool.begin().await.unwrap();
        let error = locks.row_lock("a").wait(WAIT).acquire_in(&mut transaction).await.unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
        // The transaction is as usable as before.
        locks.row_lock("b").acquire_in(&mut transaction).await.unwrap();
        held.rollback().await.unwrap();
        locks.row_lock("a").wait(PATIENCE).acquire_in(&mut transaction).await.unwrap();
        transaction.commit().await.unwrap();
    }
}
