//! Settings of sessions: what administrators set for a server, a database or a role, and the hooks of a pool for its
//! connections. Private connections do not mind them; on connections of the application they are borne with.

use std::time::{Duration, Instant};

use lock_db::{Error, Locks};
use lock_tests::{
    Backend, Direction, MariaDbServer, MySqlServer, PostgresServer, SqliteFile, TestDatabase, TestServer,
    is_taken,
};
use sqlx::Pool;
use sqlx::pool::PoolOptions;

use super::requests::{all_are_granted, ask, locks_in_use};

lock_tests::cases! {
    on postgres:
    settings_of_a_database,
    levels_of_a_database,
    waits_poll_with_pauses;

    on mariadb:
    settings_of_both_servers,
    settings_of_mariadb,
    waits_poll_with_pauses;

    on mysql:
    settings_of_both_servers,
    settings_of_mysql,
    waits_poll_with_pauses;

    on sqlite:
    pragmas,
    pragmas_under_which_nothing_is_locked,
}

const PATIENCE: Duration = Duration::from_secs(20);

async fn settings_of_a_database(database: &PostgresServer) {
    for setting in [
        "lock_timeout = '1ms'",
        "statement_timeout = '5s'",
        "idle_in_transaction_session_timeout = '10s'",
        "idle_session_timeout = '3s'",
        "default_transaction_deferrable = on",
        "synchronous_commit = off",
        "row_security = off",
        "standard_conforming_strings = off",
        "backslash_quote = off",
        "quote_all_identifiers = on",
        "bytea_output = 'escape'",
        "DateStyle = 'German, DMY'",
        "IntervalStyle = 'sql_standard'",
        "TimeZone = 'Asia/Kolkata'",
        "extra_float_digits = 0",
        "transform_null_equals = on",
        "array_nulls = off",
        "jit_above_cost = 0",
        "plan_cache_mode = 'force_generic_plan'",
        "plan_cache_mode = 'force_custom_plan'",
        "enable_seqscan = off",
        "enable_indexscan = off",
        "enable_tidscan = off",
        "client_min_messages = 'error'",
    ] {
        works_for_a_database(database, setting).await;
    }
}

async fn levels_of_a_database(database: &PostgresServer) {
    for level in ["serializable", "repeatable read"] {
        works_for_a_database(database, &format!("default_transaction_isolation = '{level}'")).await;
    }
}

async fn works_for_a_database(database: &PostgresServer, setting: &str) {
    let name = database.text("SELECT current_database()").await;
    let (variable, _) = setting.split_once(' ').unwrap();
    let is_known = format!("SELECT COUNT(*) FROM pg_settings WHERE name = '{variable}'");
    if database.number(&is_known).await == 0 {
        return;
    }
    database.run(&format!(r#"ALTER DATABASE "{name}" SET {setting}"#)).await;
    works(database, setting, database.pool(4).await).await;
    database.run(&format!(r#"ALTER DATABASE "{name}" RESET {variable}"#)).await;
}

async fn settings_of_both_servers<T: TestServer>(database: &T) {
    for setting in [
        "SESSION innodb_lock_wait_timeout = 1",
        "SESSION lock_wait_timeout = 1",
        "SESSION autocommit = 0",
        "SESSION completion_type = 'CHAIN'",
        "SESSION sql_safe_updates = 1",
        "SESSION sql_select_limit = 1",
        "SESSION sql_big_selects = 0, SESSION max_join_size = 1",
        "SESSION sql_auto_is_null = 1",
        "SESSION foreign_key_checks = 0",
        "SESSION unique_checks = 0",
        "SESSION big_tables = 1",
        "SESSION default_storage_engine = MyISAM",
        "SESSION time_zone = '+05:30'",
        "SESSION wait_timeout = 3",
        "SESSION TRANSACTION ISOLATION LEVEL READ UNCOMMITTED",
        "SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
        "SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE",
    ] {
        works_in_sessions(database, format!("SET {setting}")).await;
    }
}

async fn settings_of_mariadb(database: &MariaDbServer) {
    for setting in ["innodb_lock_wait_timeout = 0", "max_statement_time = 2", "sql_if_exists = 1"] {
        works_in_sessions(database, format!("SET SESSION {setting}")).await;
    }
}

async fn settings_of_mysql(database: &MySqlServer) {
    for setting in
        ["max_execution_time = 2000", "sql_require_primary_key = 1", "explicit_defaults_for_timestamp = 1"]
    {
        works_in_sessions(database, format!("SET SESSION {setting}")).await;
    }
}

async fn pragmas(database: &SqliteFile) {
    for pragma in [
        "busy_timeout = 0",
        "foreign_keys = OFF",
        "recursive_triggers = ON",
        "case_sensitive_like = ON",
        "defer_foreign_keys = ON",
        "read_uncommitted = ON",
        "synchronous = OFF",
        "journal_mode = TRUNCATE",
        "journal_mode = PERSIST",
        "journal_mode = MEMORY",
        "journal_mode = WAL",
        "temp_store = MEMORY",
        "cache_size = 1",
        "automatic_index = OFF",
        "reverse_unordered_selects = ON",
        "trusted_schema = OFF",
    ] {
        works_in_sessions(database, format!("PRAGMA {pragma}")).await;
    }
}

/// On all connections, those of the locks included.
async fn works_in_sessions<T: TestDatabase>(database: &T, setting: String) {
    works(database, &setting, pool_with::<T>(database.url(), setting.clone()).await).await;
}

async fn pool_with<T: TestDatabase>(url: &str, setting: String) -> Pool<T::Database> {
    let options = PoolOptions::new().max_connections(4).after_connect(move |connection, _| {
        let setting = setting.clone();
        Box::pin(async move { T::Database::run(connection, &setting).await.map(drop) })
    });
    options.connect(url).await.unwrap()
}

async fn works<T: TestDatabase>(database: &T, setting: &str, pool: Pool<T::Database>) {
    drop(locks_in_use(database).await);
    let (locks, other) = (Locks::new(pool.clone()), database.locks().await);
    locks.migrate().await.unwrap_or_else(|error| panic!("{setting}: {error:?}"));
    locks.check().await.unwrap_or_else(|error| panic!("{setting}: {error:?}"));
    all_are_granted(setting, &ask(&locks, &pool).await);
    // What it holds is held, and what others hold is waited for.
    let lease = locks.insert_lock("lease").acquire().await.unwrap();
    assert!(is_taken::<T, _>(other.insert_lock("lease").try_acquire().await), "{setting}");
    let waiting = locks.insert_lock("lease").wait(Duration::from_millis(50)).acquire().await;
    assert!(matches!(waiting, Err(Error::Timeout { .. })), "{setting}: {waiting:?}");
    lease.begin().await.unwrap().commit().await.unwrap_or_else(|error| panic!("{setting}: {error:?}"));
    lease.release().await.unwrap();
    let row = other.row_lock("row").acquire().await.unwrap();
    assert!(is_taken::<T, _>(locks.row_lock("row").try_acquire().await), "{setting}");
    let waiting = tokio::spawn(locks.row_lock("row").wait(PATIENCE).acquire());
    row.commit().await.unwrap();
    waiting.await.unwrap().unwrap_or_else(|error| panic!("{setting}: {error:?}")).commit().await.unwrap();
    locks.close().await;
    other.close().await;
    pool.close().await;
}

async fn pragmas_under_which_nothing_is_locked(database: &SqliteFile) {
    drop(locks_in_use(database).await);
    for (pragma, says) in [("journal_mode = OFF", "journal_mode"), ("query_only = ON", "query_only")] {
        let pool = pool_with::<SqliteFile>(database.url(), format!("PRAGMA {pragma}")).await;
        let locks = Locks::new(pool.clone());
        let error = locks.check().await.unwrap_err();
        assert!(
            matches!(error, Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. })
                && !error.is_retryable(),
            "{pragma}: {error:?}"
        );
        assert!(error.to_string().contains(says), "{pragma}: {error}");
        for error in [
            locks.insert_lock("used").acquire().await.map(drop).unwrap_err(),
            locks.row_lock("used row").acquire().await.map(drop).unwrap_err(),
        ] {
            assert!(
                matches!(error, Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. })
                    && !error.is_retryable(),
                "{pragma}: {error:?}"
            );
        }
        locks.close().await;
        pool.close().await;
    }
}

/// Whatever limits there are: no wait asks the server again and again without a pause.
///
/// Counted are the statements that one caller sends who waits for another process, in every way to wait.
async fn waits_poll_with_pauses<T: TestServer>(database: &T) {
    const WAIT: Duration = Duration::from_secs(3);
    const MOST_A_SECOND: usize = 150;
    let owner = locks_in_use(database).await;
    let settings: &[&str] = match T::NAME {
        "postgres" => &["SET lock_timeout = '1ms'", "SET statement_timeout = '300ms'"],
        "mariadb" => &["SET SESSION innodb_lock_wait_timeout = 0", "SET SESSION max_statement_time = 0.3"],
        _ => &["SET SESSION innodb_lock_wait_timeout = 1", "SET SESSION max_execution_time = 300"],
    };
    let holder = database.pool(2).await;
    for setting in settings {
        let proxy = database.proxy();
        let pool = pool_with::<T>(&database.url_by(proxy.address()), (*setting).to_owned()).await;
        let locks = Locks::new(pool.clone());
        let (mut row, mut lease) = (holder.begin().await.unwrap(), holder.begin().await.unwrap());
        owner.row_lock("a row").acquire_in(&mut row).await.unwrap();
        owner.insert_lock("a name").acquire_in(&mut lease).await.unwrap();
        let held = owner.insert_lock("held").acquire().await.unwrap();
        for way in [
            "row lock",
            "row lock in a transaction",
            "lease",
            "lease in a transaction",
            "held lease",
            "held lease in a transaction",
        ] {
            let name = if way.starts_with("held") {
                "held"
            } else if way.starts_with("row") {
                "a row"
            } else {
                "a name"
            };
            let mut transaction = pool.begin().await.unwrap();
            let (before, asked) = (proxy.reads(Direction::ToServer), Instant::now());
            let waited = match way {
                "row lock" => locks.row_lock(name).wait(WAIT).acquire().await.map(drop),
                "row lock in a transaction" => {
                    locks.row_lock(name).wait(WAIT).acquire_in(&mut transaction).await.map(drop)
                }
                "lease" | "held lease" => locks.insert_lock(name).wait(WAIT).acquire().await.map(drop),
                _ => locks.insert_lock(name).wait(WAIT).acquire_in(&mut transaction).await.map(drop),
            };
            let messages = proxy.reads(Direction::ToServer) - before;
            let most = MOST_A_SECOND * (usize::try_from(asked.elapsed().as_secs()).unwrap() + 1);
            assert!(
                messages < most,
                "{setting}: {way}: {messages} messages in {:?}: {waited:?}",
                asked.elapsed()
            );
            assert!(waited.is_err(), "{setting}: {way}");
            drop(transaction.rollback().await);
        }
        row.rollback().await.unwrap();
        lease.rollback().await.unwrap();
        held.release().await.unwrap();
        locks.close().await;
        pool.close().await;
    }
}
