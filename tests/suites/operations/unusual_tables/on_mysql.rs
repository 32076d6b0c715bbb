//! What `distributed_lock` can be on MySQL and MariaDB besides a table of InnoDB.

use lock_db::{Error, Locks};
use lock_tests::{MariaDbServer, TestDatabase, TestServer};

use super::requests::{all_are_refused, ask, is_unsupported, locks_in_use};

lock_tests::cases! {
    on mariadb:
    another_storage_engine,
    other_engines_of_mariadb,
    partitioned_tables,
    views,
    names_with_a_collation,
    names_that_are_found_twice,
    tables_without_a_column;

    on mysql:
    another_storage_engine,
    partitioned_tables,
    views,
    names_with_a_collation,
    names_that_are_found_twice,
    tables_without_a_column,
}

async fn another_storage_engine<T: TestServer>(database: &T) {
    let make = "ALTER TABLE distributed_lock ROW_FORMAT = DEFAULT, ENGINE = MyISAM";
    is_unsupported(database, "MyISAM", make, "storage engine").await;
}

/// MySQL does not have them, or not with the defaults of the columns.
async fn other_engines_of_mariadb(database: &MariaDbServer) {
    for engine in ["Aria", "MEMORY"] {
        let make = format!("ALTER TABLE distributed_lock ROW_FORMAT = DEFAULT, ENGINE = {engine}");
        is_unsupported(database, engine, &make, "storage engine").await;
        database.run("DROP TABLE distributed_lock").await;
    }
    let make = "RENAME TABLE distributed_lock TO old; CREATE SEQUENCE distributed_lock";
    is_unsupported(database, "a sequence", make, "").await;
}

async fn partitioned_tables<T: TestServer>(database: &T) {
    let make = "ALTER TABLE distributed_lock DROP PRIMARY KEY, ADD PRIMARY KEY (lock_name), ADD KEY (id)
        PARTITION BY KEY (lock_name) PARTITIONS 4";
    is_unsupported(database, "partitioned", make, "partitioned").await;
}

async fn views<T: TestServer>(database: &T) {
    let make = "RENAME TABLE distributed_lock TO old; CREATE VIEW distributed_lock AS SELECT * FROM old";
    is_unsupported(database, "a view", make, "view").await;
}

async fn names_with_a_collation<T: TestServer>(database: &T) {
    for column in [
        "VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci",
        "VARCHAR(255) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin",
        "VARCHAR(255) CHARACTER SET latin1",
        // Is filled up with zeros.
        "BINARY(255)",
    ] {
        let make = format!("ALTER TABLE distributed_lock MODIFY lock_name {column} NOT NULL");
        is_unsupported(database, column, &make, "VARBINARY").await;
        database.run("DROP TABLE distributed_lock").await;
    }
}

/// Without an index two rows could have one name.
async fn names_that_are_found_twice<T: TestServer>(database: &T) {
    for (what, index) in [
        ("no index", ""),
        ("an index that is not unique", ", ADD INDEX distributed_lock_name (lock_name)"),
        ("an index on the beginning", ", ADD UNIQUE distributed_lock_name (lock_name(20))"),
        ("an index on more", ", ADD UNIQUE distributed_lock_name (lock_name, lock_kind)"),
        ("an index on something else", ", ADD UNIQUE distributed_lock_name (id)"),
    ] {
        let make = format!("ALTER TABLE distributed_lock DROP INDEX distributed_lock_name{index}");
        is_unsupported(database, what, &make, "unique index").await;
        database.run("DROP TABLE distributed_lock").await;
    }
}

async fn tables_without_a_column<T: TestServer>(database: &T) {
    for column in ["waiters", "previous_token", "owner", "guard_count", "lock_kind"] {
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
