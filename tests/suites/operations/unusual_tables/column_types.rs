//! Columns of other types than those of the migrations: those that hold as much work, the others are
//! refused.

use std::time::Duration;

use lock_db::{Locks, schema};
use lock_tests::{LONGEST_QUEUE, SqliteFile, TestDatabase, TestServer, eventually, migrated};

use super::requests::{all_are_granted, ask, is_unsupported};

lock_tests::cases! {
    on postgres:
    columns_that_hold_less_are_refused,
    columns_that_hold_as_much_work;

    on mariadb:
    columns_that_hold_less_are_refused,
    columns_that_hold_as_much_work;

    on mysql:
    columns_that_hold_less_are_refused,
    columns_that_hold_as_much_work;

    on sqlite:
    columns_that_change_what_is_written_are_refused,
    columns_that_keep_what_is_written_work,
}

/// The statement that gives a column of an empty table another type.
fn change<T: TestDatabase>(column: &str, kind: &str) -> String {
    let default = match column {
        "lock_kind" => "'insert'",
        "create_time" | "acquire_time" | "expire_time" => "'1970-01-01 00:00:00'",
        "secret_key" | "owner" | "waiters" => "''",
        _ => "0",
    };
    if T::NAME != "postgres" {
        let more = match column {
            "id" => "AUTO_INCREMENT".to_owned(),
            "lock_name" => String::new(),
            // As an expression: a TEXT of MySQL has no other default.
            _ => format!("DEFAULT ({default})"),
        };
        return format!("ALTER TABLE distributed_lock MODIFY {column} {kind} NOT NULL {more}");
    }
    let (before, default) = match column {
        "id" => ("ALTER TABLE distributed_lock ALTER id DROP IDENTITY;", "nextval('ids')"),
        _ => ("", default),
    };
    let set_default = match column {
        "lock_name" => String::new(),
        _ => format!("; ALTER TABLE distributed_lock ALTER {column} SET DEFAULT {default}"),
    };
    format!(
        "CREATE SEQUENCE IF NOT EXISTS ids; {before}
        ALTER TABLE distributed_lock ALTER {column} DROP DEFAULT, ALTER {column} TYPE {kind} USING NULL
        {set_default}"
    )
}

async fn columns_that_hold_less_are_refused<T: TestServer>(database: &T) {
    let columns: &[(&str, &str)] = match T::NAME {
        "postgres" => &[
            ("fencing_token", "INTEGER"),
            ("fencing_token", "NUMERIC"),
            ("fencing_token", "TEXT"),
            ("previous_token", "INTEGER"),
            ("id", "INTEGER"),
            ("id", "NUMERIC"),
            ("ttl_micros", "INTEGER"),
            ("secret_key", "VARCHAR(8)"),
            ("secret_key", "CHAR(40)"),
            ("owner", "VARCHAR(5)"),
            ("waiters", "VARCHAR(10)"),
            ("lock_kind", "CHAR(16)"),
            ("expire_time", "TIMESTAMPTZ(0)"),
            ("expire_time", "TIMESTAMP"),
            ("expire_time", "DATE"),
            ("lock_name", "VARCHAR(255)"),
            ("lock_name", "VARCHAR(2)"),
        ],
        _ => &[
            ("fencing_token", "INT"),
            ("fencing_token", "DECIMAL(30)"),
            ("fencing_token", "BIGINT UNSIGNED"),
            ("previous_token", "INT"),
            ("guard_count", "INT"),
            ("id", "INT"),
            ("id", "BIGINT UNSIGNED"),
            ("ttl_micros", "INT"),
            ("secret_key", "VARCHAR(8)"),
            ("secret_key", "CHAR(40)"),
            // The digest in a guard would be another one.
            ("secret_key", "VARCHAR(32) CHARACTER SET utf16"),
            ("owner", "VARCHAR(5)"),
            ("owner", "TINYTEXT"),
            ("waiters", "VARCHAR(10)"),
            ("lock_kind", "CHAR(16)"),
            ("expire_time", "DATETIME"),
            ("expire_time", "DATE"),
            ("lock_name", "VARBINARY(10)"),
        ],
    };
    for (column, kind) in columns {
        let change = format!("DELETE FROM distributed_lock; {}", change::<T>(column, kind));
        is_unsupported(database, kind, &change, &format!("a column `{column}` of the type `")).await;
        database.run("DROP TABLE distributed_lock").await;
    }
}

async fn columns_that_hold_as_much_work<T: TestServer>(database: &T) {
    let longest_queue = format!("VARCHAR({LONGEST_QUEUE})");
    let columns: &[(&str, &str)] = match T::NAME {
        "postgres" => &[
            ("secret_key", "VARCHAR(32)"),
            ("owner", "VARCHAR(255)"),
            ("waiters", &longest_queue),
            ("lock_kind", "VARCHAR"),
            ("create_time", "TIMESTAMPTZ"),
            ("acquire_time", "TIMESTAMPTZ"),
            ("expire_time", "TIMESTAMPTZ"),
        ],
        _ => &[
            ("fencing_token", "BIGINT(20)"),
            ("ttl_micros", "BIGINT(5)"),
            ("id", "BIGINT(20)"),
            ("lock_name", "VARBINARY(300)"),
            ("lock_kind", "VARCHAR(6) CHARACTER SET latin1"),
            ("secret_key", "VARCHAR(40) CHARACTER SET utf8mb4"),
            ("secret_key", "TEXT CHARACTER SET ascii"),
            ("owner", "TEXT CHARACTER SET utf8mb4"),
            ("waiters", "MEDIUMTEXT CHARACTER SET utf8mb4"),
        ],
    };
    // All at once.
    migrated(Locks::new(database.pool(1).await)).await.close().await;
    for (column, kind) in columns {
        database.run(&change::<T>(column, kind)).await;
    }
    works(database).await;
}

async fn columns_that_change_what_is_written_are_refused(database: &SqliteFile) {
    for (column, from, to) in [
        ("id", "INTEGER PRIMARY KEY AUTOINCREMENT", "BIGINT PRIMARY KEY"),
        ("lock_name", "TEXT", "NUMERIC"),
        ("secret_key", "TEXT", "NUMERIC"),
        ("fencing_token", "INTEGER", "TEXT"),
        ("ttl_micros", "INTEGER", "REAL"),
        ("waiters", "TEXT", "INTEGER"),
    ] {
        let change = format!("DROP TABLE distributed_lock; {}", with_type(column, from, to));
        is_unsupported(database, to, &change, &format!("a column `{column}` of the type `")).await;
        database.run("DROP TABLE distributed_lock").await;
    }
}

async fn columns_that_keep_what_is_written_work(database: &SqliteFile) {
    for (column, from, to) in [
        ("fencing_token", "INTEGER", "BIGINT"),
        ("lock_name", "TEXT", "VARCHAR(255)"),
        ("owner", "TEXT", "VARCHAR(5)"),
        ("expire_time", "TEXT", "DATETIME"),
    ] {
        database.run(&with_type(column, from, to)).await;
        works(database).await;
        database.run("DROP TABLE distributed_lock").await;
    }
}

/// The table of the migrations, with another type for a column.
fn with_type(column: &str, from: &str, to: &str) -> String {
    let lines: Vec<_> = schema::SQLITE.lines().collect();
    let is_it = |line: &&str| line.trim_start().starts_with(&format!("{column} "));
    let position = lines.iter().position(is_it).unwrap();
    let changed = lines[position].replace(from, to);
    assert_ne!(changed, lines[position]);
    [&lines[..position], &[&changed], &lines[position + 1..]].concat().join("\n")
}

async fn works<T: TestDatabase>(database: &T) {
    let pool = database.pool(4).await;
    let locks = Locks::new(pool.clone());
    locks.check().await.unwrap();
    all_are_granted("other types", &ask(&locks, &pool).await);
    let lease = locks.insert_lock("123").acquire().await.unwrap();
    assert!(locks.info("123").await.unwrap().unwrap().owner.contains(&std::process::id().to_string()));
    let other = Locks::new(pool.clone());
    assert!(other.insert_lock("123").try_acquire().await.unwrap().is_none());
    lease.begin().await.unwrap().commit().await.unwrap();
    let transaction = lease.begin().await.unwrap();
    lease.commit_and_release(transaction).await.unwrap();
    // Waiters have an entry in the queue.
    let lease = locks.insert_lock("123").acquire().await.unwrap();
    let waits = async { other.insert_lock("123").acquire().await.unwrap().release().await.unwrap() };
    let releases = async {
        let queued = "SELECT COUNT(*) FROM distributed_lock WHERE LENGTH(waiters) > 0";
        eventually(Duration::from_mins(1), async || database.number(queued).await == 1).await;
        lease.release().await.unwrap();
    };
    tokio::join!(waits, releases);
    locks.close().await;
    other.close().await;
}
