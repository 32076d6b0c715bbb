//! Databases in memory, and files that one connection keeps for itself.

use std::time::Duration;

use lock_db::{Error, Locks};
use lock_tests::{SqliteFile, TestDatabase};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteLockingMode, SqlitePoolOptions};
use sqlx::{Executor, Sqlite, SqlitePool};

lock_tests::cases! {
    on sqlite:
    urls_of_databases_in_memory_are_refused,
    options_of_databases_in_memory_are_refused,
    uris_that_hide_a_database_in_memory_are_refused,
    files_that_look_like_memory_are_accepted,
    exclusive_locking_set_by_an_option_is_refused,
    exclusive_locking_set_by_a_hook_is_refused,
}

const WAIT: Duration = Duration::from_secs(1);

async fn urls_of_databases_in_memory_are_refused(_: &SqliteFile) {
    for url in [
        "sqlite::memory:",
        "sqlite://:memory:",
        "sqlite::memory:?cache=shared",
        "sqlite:file::memory:",
        "sqlite:file::memory:?cache=shared",
        "sqlite://file::memory:?cache=shared",
        "sqlite:x?mode=memory",
        "sqlite://x?mode=memory",
        "sqlite:x?mode=memory&cache=shared",
        "sqlite://x?mode=memory&cache=private",
        "sqlite:",
        "sqlite://",
    ] {
        is_refused(url, url.parse().unwrap()).await;
    }
}

async fn options_of_databases_in_memory_are_refused(_: &SqliteFile) {
    let options = SqliteConnectOptions::new;
    for (what, options) in [
        ("the default", options()),
        ("in_memory", options().in_memory(true)),
        ("in_memory, shared", options().in_memory(true).shared_cache(true)),
        ("in_memory with a name", options().filename("x").in_memory(true)),
        ("no name", options().filename("")),
        ("a name", options().filename(":memory:")),
        ("a URI", options().filename("file::memory:")),
        ("a URI, shared", options().filename("file::memory:?cache=shared")),
        ("a URI with a mode", options().filename("file:x?mode=memory&cache=shared")),
        ("a file system in memory, by a URI", options().filename("file:/x?vfs=memdb")),
    ] {
        is_refused(what, options).await;
    }
}

/// These are seen only when there is a connection.
async fn uris_that_hide_a_database_in_memory_are_refused(_: &SqliteFile) {
    for filename in
        ["file:%3Amemory%3A", "file:x?mode=%6Demory&cache=shared", "file:x?%6Dode=memory", "file:"]
    {
        says_why(filename, SqliteConnectOptions::new().filename(filename)).await;
    }
    let options = SqliteConnectOptions::new().filename("/x").vfs("memdb").create_if_missing(true);
    says_why("a file system in memory", options).await;
}

async fn says_why(what: &str, options: SqliteConnectOptions) {
    for error in ask(options).await {
        let says_why = error.to_string().contains("memory");
        assert!(says_why && !error.is_retryable(), "{what}: {error:?}");
    }
}

/// Each way to use locks, with what it is refused with.
async fn ask(options: SqliteConnectOptions) -> Vec<Error> {
    // As such databases are used: the first connection is kept, as the data would go with it.
    let pool = SqlitePoolOptions::new().max_connections(3).min_connections(1).connect_with(options);
    let pool = pool.await.unwrap();
    let locks = Locks::new(pool.clone());
    let mut refused = vec![
        locks.migrate().await.unwrap_err(),
        locks.check().await.map(drop).unwrap_err(),
        locks.info("a").await.map(drop).unwrap_err(),
        locks.insert_lock("a").try_acquire().await.map(drop).unwrap_err(),
        locks.insert_lock("a").wait(WAIT).acquire().await.map(drop).unwrap_err(),
        locks.insert_locks(["a", "b"]).wait(WAIT).acquire().await.map(drop).unwrap_err(),
        locks.row_lock("r").try_acquire().await.map(drop).unwrap_err(),
        locks.row_lock("r").wait(WAIT).acquire().await.map(drop).unwrap_err(),
    ];
    let mut transaction = pool.begin().await.unwrap();
    refused.push(locks.row_lock("r").wait(WAIT).acquire_in(&mut transaction).await.map(drop).unwrap_err());
    refused.push(locks.insert_lock("a").wait(WAIT).acquire_in(&mut transaction).await.map(drop).unwrap_err());
    transaction.execute("CREATE TABLE IF NOT EXISTS business (n)").await.unwrap();
    transaction.commit().await.unwrap();
    locks.close().await;
    refused
}

async fn is_refused(what: &str, options: SqliteConnectOptions) {
    for error in ask(options).await {
        let Error::InvalidOption { option: "pool", reason, .. } = &error else { panic!("{what}: {error:?}") };
        // What is wrong, and what to do.
        assert!(error.to_string().contains("in memory") && reason.contains("file"), "{what}: {error}");
        assert!(!error.is_retryable());
    }
}

async fn files_that_look_like_memory_are_accepted(database: &SqliteFile) {
    let path = database.text("SELECT file FROM pragma_database_list WHERE name = 'main'").await;
    let folder = std::path::Path::new(&path).parent().unwrap();
    for name in ["memory", "mode=rwc", "my:memories.db", "größe 100%.db"] {
        let options = SqliteConnectOptions::new().filename(folder.join(name)).create_if_missing(true);
        let pool = SqlitePool::connect_with(options).await.unwrap();
        let locks = lock_tests::migrated(Locks::new(pool)).await;
        locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
        locks.close().await;
    }
}

fn file(database: &SqliteFile, journal: SqliteJournalMode) -> SqliteConnectOptions {
    let options: SqliteConnectOptions = database.url().parse().unwrap();
    options.journal_mode(journal)
}

async fn exclusive_locking_set_by_an_option_is_refused(database: &SqliteFile) {
    for journal in [SqliteJournalMode::Delete, SqliteJournalMode::Wal] {
        let exclusive = [
            file(database, journal).locking_mode(SqliteLockingMode::Exclusive),
            file(database, journal).pragma("locking_mode", "exclusive"),
        ];
        for options in exclusive {
            let pool: SqlitePool = SqlitePoolOptions::new().max_connections(1).connect_lazy_with(options);
            // The pool's connection keeps the file from now on.
            sqlx::raw_sql("CREATE TABLE IF NOT EXISTS business (n); INSERT INTO business VALUES (1)")
                .execute(&pool)
                .await
                .unwrap();
            for error in refusals(&pool).await {
                assert!(
                    matches!(&error, Error::InvalidOption { option: "pool", .. }),
                    "{journal:?}: {error:?}"
                );
                assert!(error.to_string().contains("locking_mode"), "{journal:?}: {error}");
                assert!(!error.is_retryable());
            }
            pool.close().await;
        }
    }
}

/// Which only the connection shows: no lock is called held, and nothing is granted.
async fn exclusive_locking_set_by_a_hook_is_refused(database: &SqliteFile) {
    for journal in [SqliteJournalMode::Delete, SqliteJournalMode::Wal] {
        let options = SqlitePoolOptions::new().max_connections(1).after_connect(|connection, _| {
            Box::pin(async move { connection.execute("PRAGMA locking_mode = EXCLUSIVE").await.map(drop) })
        });
        let pool = options.connect_lazy_with(file(database, journal));
        for error in refusals(&pool).await {
            assert!(error.to_string().contains("locking_mode"), "{journal:?}: {error}");
            assert!(!error.is_retryable());
        }
        pool.close().await;
    }
}

async fn refusals(pool: &SqlitePool) -> [Error; 5] {
    let locks: Locks<Sqlite> = Locks::new(pool.clone());
    let refused = [
        locks.migrate().await.unwrap_err(),
        locks.check().await.map(drop).unwrap_err(),
        locks.insert_lock("a").try_acquire().await.map(drop).unwrap_err(),
        locks.insert_lock("a").wait(WAIT).acquire().await.map(drop).unwrap_err(),
        locks.row_lock("r").try_acquire().await.map(drop).unwrap_err(),
    ];
    locks.close().await;
    refused
}
