//! Databases and columns with an encoding of their own, which can't store every label or name.

use lock_db::{Error, Kind, LockDatabase, Locks};
use lock_tests::{AtEnd, PostgresServer, TestDatabase, TestServer, migrated, pool};
use sqlx::{Pool, Postgres};

use super::requests::{all_are_granted, ask, nothing_is_called_held};

lock_tests::cases! {
    on postgres:
    labels_that_latin1_lacks,
    names_that_latin1_lacks,
    names_that_latin1_has,
    databases_without_an_encoding;

    on mariadb:
    databases_with_another_character_set,
    owners_in_another_character_set;

    on mysql:
    databases_with_another_character_set,
    owners_in_another_character_set,
}

/// A second database, with an encoding. Dropped with what is answered besides a pool.
async fn encoded(database: &PostgresServer, encoding: &str) -> (Pool<Postgres>, AtEnd<Postgres>) {
    let name = format!("{}_encoded", database.text("SELECT current_database()").await);
    let create = format!(
        "CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'"
    );
    database.run(&create).await;
    let at_end = AtEnd::new(database.url(), [format!("DROP DATABASE {name} WITH (FORCE)")]);
    let (base, _) = database.url().rsplit_once('/').unwrap();
    (pool(&format!("{base}/{name}"), 4).await, at_end)
}

async fn labels_that_latin1_lacks(database: &PostgresServer) {
    let (pool, _at_end) = encoded(database, "LATIN1").await;
    for label in ["payments", "Zahlungen in €", "größe", "支払い 🦀"] {
        let locks = migrated(Locks::builder(pool.clone()).label(label).build()).await;
        locks.check().await.unwrap();
        all_are_granted(label, &ask(&locks, &pool).await);
        let lease = locks.insert_lock("told").acquire().await.unwrap();
        let owner = locks.info("told").await.unwrap().unwrap().owner;
        let process = std::process::id().to_string();
        assert!(owner.contains(&process), "{label}: {owner}");
        assert!(!label.is_ascii() || owner.ends_with(label), "{label}: {owner}");
        lease.release().await.unwrap();
        locks.close().await;
    }
}

async fn names_that_latin1_lacks(database: &PostgresServer) {
    let (pool, _at_end) = encoded(database, "LATIN1").await;
    let locks = migrated(Locks::new(pool.clone())).await;
    // A batch of several names has one that can be stored.
    for error in [
        locks.insert_lock("€").try_acquire().await.map(drop).unwrap_err(),
        locks.insert_lock("€").acquire().await.map(drop).unwrap_err(),
        locks.insert_locks(["a", "€"]).acquire().await.map(drop).unwrap_err(),
        locks.row_lock("€").try_acquire().await.map(drop).unwrap_err(),
        locks.row_lock("€").acquire().await.map(drop).unwrap_err(),
        locks.info("€").await.map(drop).unwrap_err(),
    ] {
        assert!(matches!(&error, Error::InvalidName { .. }), "{error:?}");
        assert_eq!(error.name(), Some("€"));
        assert!(!error.is_retryable());
    }
    for kind in [Kind::Insert, Kind::Row] {
        let mut transaction = pool.begin().await.unwrap();
        let granted = if kind == Kind::Row {
            locks.row_lock("€").acquire_in(&mut transaction).await
        } else {
            locks.insert_lock("€").acquire_in(&mut transaction).await
        };
        let error = granted.unwrap_err();
        assert!(matches!(&error, Error::InvalidName { .. }), "{error:?}");
    }
    // Those who ask at the same time for other names are not refused with it.
    let (odd, even) = tokio::join!(locks.insert_lock("€").acquire(), locks.insert_lock("b").acquire());
    assert!(odd.is_err());
    even.unwrap().release().await.unwrap();
    nothing_is_called_held("names", &ask(&locks, &pool).await);
    locks.close().await;
}

async fn names_that_latin1_has(database: &PostgresServer) {
    let (pool, _at_end) = encoded(database, "LATIN1").await;
    excludes(&pool, "größe").await;
}

async fn databases_without_an_encoding(database: &PostgresServer) {
    let (pool, _at_end) = encoded(database, "SQL_ASCII").await;
    excludes(&pool, "größe in €").await;
}

async fn databases_with_another_character_set<T: TestServer>(database: &T) {
    let schema = database.url().rsplit('/').next().unwrap();
    for charset in ["latin1", "utf8mb3", "ucs2", "utf32"] {
        database.run(&format!("ALTER DATABASE {schema} CHARACTER SET {charset}")).await;
        let pool = database.pool(4).await;
        excludes(&pool, "größe in € 🦀").await;
        database.run("DROP TABLE distributed_lock, _lock_db_migrations").await;
    }
}

/// A table that somebody has converted.
async fn owners_in_another_character_set<T: TestServer>(database: &T) {
    let pool = database.pool(4).await;
    migrated(Locks::new(pool.clone())).await.close().await;
    for (charset, label) in [
        ("latin1", "gr??e in ? ?"),
        ("utf8mb3", "gr??e in ? ?"),
        ("ascii", "gr??e in ? ?"),
        ("ucs2", "gr??e in ? ?"),
        ("utf16", "größe in € 🦀"),
        ("utf8mb4", "größe in € 🦀"),
    ] {
        let column = format!("VARCHAR(255) CHARACTER SET {charset}");
        database
            .run(&format!("ALTER TABLE distributed_lock MODIFY owner {column} NOT NULL DEFAULT ''"))
            .await;
        excludes(&pool, &format!("größe in {charset}")).await;
        let locks = Locks::builder(pool.clone()).label("größe in € 🦀").build();
        let lease = locks.insert_lock("told").acquire().await.unwrap();
        let owner = locks.info("told").await.unwrap().unwrap().owner;
        assert!(owner.ends_with(&format!("/{label}")), "{charset}: {owner}");
        lease.release().await.unwrap();
        let mut transaction = pool.begin().await.unwrap();
        locks.row_lock("told: row").acquire_in(&mut transaction).await.unwrap();
        transaction.commit().await.unwrap();
        let owner = locks.info("told: row").await.unwrap().unwrap().owner;
        assert!(owner.ends_with(&format!("/{label}")), "{charset}: {owner}");
        locks.close().await;
    }
}

/// Locks of two processes, with a label and a name that are not ASCII.
async fn excludes<DB: LockDatabase + lock_tests::Backend>(pool: &Pool<DB>, name: &str) {
    let locks = migrated(Locks::builder(pool.clone()).label("größe in € 🦀").build()).await;
    let other = Locks::new(pool.clone());
    locks.check().await.unwrap();
    all_are_granted(name, &ask(&locks, pool).await);
    let lease = locks.insert_lock(name).acquire().await.unwrap();
    assert!(other.insert_lock(name).try_acquire().await.unwrap().is_none());
    assert_eq!(other.info(name).await.unwrap().unwrap().name, name);
    lease.begin().await.unwrap().commit().await.unwrap();
    lease.release().await.unwrap();
    other.insert_lock(name).try_acquire().await.unwrap().expect("it is free").release().await.unwrap();
    let row = format!("{name}, row");
    let guard = locks.row_lock(&row).acquire().await.unwrap();
    assert!(other.row_lock(&row).try_acquire().await.unwrap().is_none());
    guard.commit().await.unwrap();
    locks.close().await;
    other.close().await;
}
