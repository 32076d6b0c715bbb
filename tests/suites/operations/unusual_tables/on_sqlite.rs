//! What `distributed_lock` can be in a SQLite file besides the table.

use lock_db::{Error, Locks, schema};
use lock_tests::{SqliteFile, TestDatabase};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};

use super::requests::{all_are_refused, ask, is_unsupported, locks_in_use};

lock_tests::cases! {
    on sqlite:
    views,
    names_that_are_found_twice,
    names_with_a_collation,
    tables_without_a_column,
    files_that_may_only_be_read,
}

const RENAME: &str = "ALTER TABLE distributed_lock RENAME TO old";

async fn views(database: &SqliteFile) {
    let make = format!("{RENAME}; CREATE VIEW distributed_lock AS SELECT * FROM old");
    is_unsupported(database, "a view", &make, "view").await;
}

async fn names_that_are_found_twice(database: &SqliteFile) {
    let without = schema::SQLITE.replace(",\n    CONSTRAINT distributed_lock_name UNIQUE (lock_name)", "");
    assert!(!without.contains("UNIQUE"));
    for (what, index) in [
        ("no index", ""),
        ("an index that is not unique", "CREATE INDEX found ON distributed_lock (lock_name)"),
        (
            "a partial index",
            "CREATE UNIQUE INDEX found ON distributed_lock (lock_name) WHERE lock_kind = 'insert'",
        ),
        ("an index on more", "CREATE UNIQUE INDEX found ON distributed_lock (lock_name, lock_kind)"),
        ("an index on something else", "CREATE UNIQUE INDEX found ON distributed_lock (hex(lock_name))"),
    ] {
        let make = format!("DROP TABLE distributed_lock; {without}; {index}");
        is_unsupported(database, what, &make, "unique index").await;
        database.run("DROP TABLE distributed_lock").await;
    }
}

async fn names_with_a_collation(database: &SqliteFile) {
    for collation in ["NOCASE", "RTRIM"] {
        let with = schema::SQLITE.replace("COLLATE BINARY", &format!("COLLATE {collation}"));
        let make = format!("DROP TABLE distributed_lock; {with}");
        is_unsupported(database, collation, &make, "byte by byte").await;
        database.run("DROP TABLE distributed_lock").await;
    }
}

async fn tables_without_a_column(database: &SqliteFile) {
    for column in ["waiters", "previous_token", "owner"] {
        let used = locks_in_use(database).await;
        database.run(&format!("ALTER TABLE distributed_lock DROP COLUMN {column}")).await;
        let pool = database.pool(4).await;
        let locks = Locks::new(pool.clone());
        let is_right = |error: &Error| matches!(error, Error::SchemaMissing { .. });
        let checked = locks.check().await;
        assert!(checked.as_ref().is_err_and(is_right), "{column}: {checked:?}");
        all_are_refused(column, &ask(&locks, &pool).await, is_right);
        drop(used);
        database.run("DROP TABLE distributed_lock").await;
    }
}

async fn files_that_may_only_be_read(database: &SqliteFile) {
    locks_in_use(database).await.close().await;
    let options: SqliteConnectOptions = database.url().parse().unwrap();
    let pool = SqlitePoolOptions::new().connect_with(options.read_only(true)).await.unwrap();
    let locks = Locks::new(pool.clone());
    let is_right = |error: &Error| {
        matches!(error, Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. })
            && error.report().to_string().contains("readonly database")
    };
    let checked = locks.check().await;
    assert!(checked.as_ref().is_err_and(is_right), "{checked:?}");
    all_are_refused("read only", &ask(&locks, &pool).await, is_right);
    assert!(locks.info("used").await.unwrap().is_some(), "it may be read");
}
