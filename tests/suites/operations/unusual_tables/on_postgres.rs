//! What `distributed_lock` can be on PostgreSQL besides a table.

use lock_db::{Error, Locks};
use lock_tests::{Backend, PostgresServer, TestDatabase};
use sqlx::Postgres;
use url::Url;

use super::requests::{all_are_refused, ask, is_unsupported, locks_in_use};

lock_tests::cases! {
    on postgres:
    partitioned_tables,
    inherited_tables,
    foreign_tables,
    views,
    rewrite_rules,
    tables_that_a_crash_empties,
    names_that_are_found_twice,
    collations_that_make_one_name_of_two,
    tables_without_a_column,
}

const RENAME: &str = "ALTER TABLE distributed_lock RENAME TO old";

async fn partitioned_tables(database: &PostgresServer) {
    let make = format!(
        "{RENAME};
        CREATE TABLE distributed_lock (LIKE old INCLUDING DEFAULTS INCLUDING IDENTITY INCLUDING CONSTRAINTS,
            UNIQUE (lock_name)) PARTITION BY HASH (lock_name);
        CREATE TABLE part_0 PARTITION OF distributed_lock FOR VALUES WITH (MODULUS 2, REMAINDER 0);
        CREATE TABLE part_1 PARTITION OF distributed_lock FOR VALUES WITH (MODULUS 2, REMAINDER 1);
        INSERT INTO distributed_lock SELECT * FROM old"
    );
    is_unsupported(database, "partitioned", &make, "partitioned").await;
    database.run("DROP TABLE distributed_lock; ALTER TABLE old RENAME TO distributed_lock").await;
    let make = "CREATE TABLE whole (LIKE distributed_lock) PARTITION BY LIST (lock_kind);
        ALTER TABLE whole ATTACH PARTITION distributed_lock DEFAULT";
    is_unsupported(database, "a partition", make, "partitioning").await;
}

async fn inherited_tables(database: &PostgresServer) {
    let make = "CREATE TABLE archive (LIKE distributed_lock INCLUDING ALL) INHERITS (distributed_lock)";
    is_unsupported(database, "a parent", make, "inheritance").await;
    database.run("DROP TABLE archive").await;
    let make = "CREATE TABLE parent (lock_name TEXT COLLATE \"C\" NOT NULL); ALTER TABLE distributed_lock INHERIT parent";
    is_unsupported(database, "a child", make, "inheritance").await;
}

async fn foreign_tables(database: &PostgresServer) {
    let wrappers = "SELECT COUNT(*) FROM pg_available_extensions WHERE name IN ('postgres_fdw', 'file_fdw')";
    if database.number(wrappers).await < 2 {
        return;
    }
    let url = Url::parse(database.url()).unwrap();
    let (host, port) = (url.host_str().unwrap(), url.port().unwrap_or(5432));
    let columns = "id bigint, lock_name text, lock_kind text, secret_key text, fencing_token bigint, previous_token bigint,
        owner text, create_time timestamptz, acquire_time timestamptz, expire_time timestamptz, ttl_micros bigint,
        waiters text";
    let make = format!(
        "{RENAME};
        CREATE EXTENSION postgres_fdw;
        CREATE SERVER there FOREIGN DATA WRAPPER postgres_fdw
            OPTIONS (host '{host}', port '{port}', dbname '{}');
        CREATE USER MAPPING FOR CURRENT_USER SERVER there OPTIONS (user '{}', password '{}');
        CREATE FOREIGN TABLE distributed_lock ({columns}) SERVER there OPTIONS (table_name 'old')",
        database.text("SELECT current_database()").await,
        url.username(),
        url.password().unwrap_or_default(),
    );
    is_unsupported(database, "a table of another server", &make, "foreign table").await;
    database.run("DROP FOREIGN TABLE distributed_lock; ALTER TABLE old RENAME TO distributed_lock").await;
    let make = format!(
        "{RENAME};
        CREATE EXTENSION file_fdw;
        CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;
        CREATE FOREIGN TABLE distributed_lock ({columns}) SERVER files OPTIONS (program 'true')"
    );
    is_unsupported(database, "a file", &make, "foreign table").await;
}

async fn views(database: &PostgresServer) {
    // PostgreSQL writes to it as to the table.
    let make = format!("{RENAME}; CREATE VIEW distributed_lock AS SELECT * FROM old");
    is_unsupported(database, "a view", &make, "view").await;
    database.run("DROP VIEW distributed_lock; ALTER TABLE old RENAME TO distributed_lock").await;
    let make =
        format!("{RENAME}; CREATE VIEW distributed_lock AS SELECT * FROM old WHERE lock_name <> 'used'");
    is_unsupported(database, "a view of some rows", &make, "view").await;
    database.run("DROP VIEW distributed_lock; ALTER TABLE old RENAME TO distributed_lock").await;
    let make = format!("{RENAME}; CREATE MATERIALIZED VIEW distributed_lock AS SELECT * FROM old");
    is_unsupported(database, "a materialized view", &make, "view").await;
    database.run("DROP MATERIALIZED VIEW distributed_lock; ALTER TABLE old RENAME TO distributed_lock").await;
    let make = format!("{RENAME}; CREATE SEQUENCE distributed_lock");
    is_unsupported(database, "a sequence", &make, "no table").await;
}

async fn rewrite_rules(database: &PostgresServer) {
    for (name, rule) in [
        ("swallows updates", "ON UPDATE TO distributed_lock DO INSTEAD NOTHING"),
        ("swallows inserts", "ON INSERT TO distributed_lock DO INSTEAD NOTHING"),
        ("keeps a log", "ON UPDATE TO distributed_lock DO ALSO INSERT INTO log VALUES (OLD.lock_name)"),
    ] {
        database.run("CREATE TABLE IF NOT EXISTS log (lock_name TEXT)").await;
        let make = format!("CREATE RULE rule AS {rule}");
        is_unsupported(database, name, &make, "rewrite rules").await;
        database.run("DROP RULE rule ON distributed_lock").await;
    }
}

async fn tables_that_a_crash_empties(database: &PostgresServer) {
    let make = "ALTER TABLE distributed_lock SET UNLOGGED";
    is_unsupported(database, "unlogged", make, "unlogged").await;
}

/// Without an index two rows could have one name.
async fn names_that_are_found_twice(database: &PostgresServer) {
    let drop_index = "ALTER TABLE distributed_lock DROP CONSTRAINT distributed_lock_name";
    for (what, index) in [
        ("no index", ""),
        ("an index that is not unique", "CREATE INDEX found ON distributed_lock (lock_name)"),
        (
            "a partial index",
            "CREATE UNIQUE INDEX found ON distributed_lock (lock_name) WHERE lock_kind = 'insert'",
        ),
        ("an index on more", "CREATE UNIQUE INDEX found ON distributed_lock (lock_name, lock_kind)"),
        ("an index on something else", "CREATE UNIQUE INDEX found ON distributed_lock (md5(lock_name))"),
        (
            "a constraint that is looked at later",
            "ALTER TABLE distributed_lock ADD CONSTRAINT found UNIQUE (lock_name) DEFERRABLE",
        ),
    ] {
        is_unsupported(database, what, &format!("{drop_index}; {index}"), "unique index").await;
        database.run("DROP TABLE distributed_lock").await;
    }
}

async fn collations_that_make_one_name_of_two(database: &PostgresServer) {
    let mut connection = database.connection().await;
    let make = "CREATE COLLATION folds (provider = icu, locale = 'und-u-ks-level2', deterministic = false)";
    if Postgres::run(&mut connection, make).await.is_err() {
        // A server without ICU.
        return;
    }
    let make = "ALTER TABLE distributed_lock DROP CONSTRAINT distributed_lock_name,
            ALTER COLUMN lock_name TYPE TEXT COLLATE folds;
        ALTER TABLE distributed_lock ADD CONSTRAINT distributed_lock_name UNIQUE (lock_name)";
    is_unsupported(database, "a collation that folds", make, "collation").await;
}

async fn tables_without_a_column(database: &PostgresServer) {
    for column in ["waiters", "previous_token", "owner", "lock_kind"] {
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
