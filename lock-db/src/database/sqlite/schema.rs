//! Finding the table, and making it.

use std::collections::HashMap;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{Connection, Row};

use crate::Error;
use crate::database::columns::{COLUMNS, Compared, Content, compare};
use crate::database::server::Table;
use crate::database::{Cluster, Found, Server};
use crate::schema;

/// How long a private connection waits for another writer before it answers "busy". And a schema is a file of its own here.
pub(super) const PREPARE: &str = "PRAGMA busy_timeout = 100";

const FIND: &str = "
SELECT (SELECT file FROM pragma_database_list WHERE name = 'main'),
    (SELECT locking_mode FROM pragma_locking_mode),
    (SELECT type FROM main.sqlite_schema WHERE name = 'distributed_lock' AND type IN ('table', 'view')),
    (SELECT group_concat(name || ' ' || type, char(10)) FROM pragma_table_info('distributed_lock', 'main')),
    EXISTS (
        SELECT 1 FROM pragma_index_list('distributed_lock', 'main') AS list
        WHERE list.\"unique\" AND NOT list.partial
            AND (SELECT group_concat(name || ' ' || coll) FROM pragma_index_xinfo(list.name, 'main') WHERE key)
                = 'lock_name BINARY')";

/// What locks do to the table, to no row.
const USE: &str = "
UPDATE {table} SET owner = owner WHERE 0;
INSERT INTO {table} (lock_name, lock_kind) SELECT lock_name, lock_kind FROM {table} WHERE 0";

const JOURNAL_MODE: &str = "SELECT journal_mode FROM pragma_journal_mode";

const WAIT_FOR_OTHER_MIGRATIONS: &str = "PRAGMA busy_timeout = 60000";
const LOCK_MIGRATIONS: &str = "BEGIN IMMEDIATE";
const HAS_TABLE: &str = "SELECT EXISTS (SELECT 1 FROM main.sqlite_schema WHERE name = ?1)";
const CREATE_LEDGER: &str = "
CREATE TABLE IF NOT EXISTS main._lock_db_migrations (
    version INTEGER PRIMARY KEY,
    applied_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')))";
const APPLIED: &str = "SELECT version FROM main._lock_db_migrations";
const NOTE_APPLIED: &str = "INSERT OR IGNORE INTO main._lock_db_migrations (version) VALUES (?1)";
const MIGRATIONS: [(i64, &str); 1] = [(1, schema::SQLITE)];

const FILE_PLEASE: &str = "locks need a database that all connections and processes share: a file (for tests, \
                           `lock_db::testing::locks()` makes one)";

pub(super) fn check_options(options: &SqliteConnectOptions, schema: Option<&str>) -> Result<(), Error> {
    if schema.is_some_and(|schema| schema != "main") {
        return Err(Error::InvalidOption {
            option: "schema",
            value: format!("`{}`", schema.unwrap_or_default()),
            reason: "on SQLite the table is in the file of the pool, `main`",
        });
    }
    let file = options.get_filename().to_string_lossy();
    let text = format!("{options:?}");
    let is_in_memory = file.is_empty()
        || [":memory:", "mode=memory", "vfs=memdb", "sqlx-in-memory-"].iter().any(|form| file.contains(form))
        || text.contains("in_memory: true");
    if is_in_memory {
        let value = "a SQLite database in memory".into();
        return Err(Error::InvalidOption { option: "pool", value, reason: FILE_PLEASE });
    }
    if locks_exclusively(&text) {
        return Err(Error::InvalidOption {
            option: "pool",
            value: "a SQLite database with `locking_mode = EXCLUSIVE`".into(),
            reason: "its first connection would keep the file from all others, also from those of lock-db: leave the mode \
                     out, which is NORMAL",
        });
    }
    Ok(())
}

/// sqlx has no way to ask for it but the text of its options. When this is not found there any more, `FIND` still tells, after a
/// wait.
fn locks_exclusively(options: &str) -> bool {
    let Some((_, mode)) = options.split_once("\"locking_mode\": ") else { return false };
    mode.get(..20).is_some_and(|mode| mode.to_ascii_uppercase().contains("EXCLUSIVE"))
}

pub(super) async fn find(connection: &mut SqliteConnection) -> sqlx::Result<Found> {
    let row = sqlx::query(FIND).fetch_one(connection).await?;
    let (file, mode): (String, String) = (row.try_get(0)?, row.try_get(1)?);
    if file.is_empty() {
        return Err(sqlx::Error::Configuration(format!("the database is in memory: {FILE_PLEASE}").into()));
    }
    if mode == "exclusive" {
        let message = "`locking_mode` is EXCLUSIVE: a connection would keep the file from all others";
        return Err(sqlx::Error::Configuration(message.into()));
    }
    match row.try_get::<Option<&str>, _>(2)? {
        None => return Ok(Found::Nothing),
        Some("table") => {}
        Some(_) => {
            return Ok(Found::Unusable(
                "`distributed_lock` is a view: lock-db needs the table itself".into(),
            ));
        }
    }
    match compare(COLUMNS.into_iter(), &declared(row.try_get(3)?), needed) {
        Compared::Fit => {}
        Compared::Missing => return Ok(Found::Differs),
        Compared::Unfit(reason) => return Ok(Found::Unusable(format!("`distributed_lock` {reason}"))),
    }
    if !row.try_get::<bool, _>(4)? {
        return Ok(Found::Unusable(
            "`distributed_lock` has no unique index on `lock_name` alone, compared byte by byte: two rows of one name would be two locks, or one row one \
             lock of several names".into(),
        ));
    }
    Ok(Found::Table(Server {
        table: Table::new("main", '"', file).into(),
        cluster: Cluster::SinglePrimary,
        is_mariadb: false,
        keeps_counter: false,
        is_ascii_only: false,
    }))
}

/// Columns and their types, a line of `name type` each. A name with a blank in it is none of ours.
fn declared(columns: &str) -> HashMap<String, String> {
    let parts = columns.lines().filter_map(|column| column.split_once(' '));
    parts.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect()
}

/// What a column needs if this type does not do. A type is a hint only, but one for numbers turns a
/// name or a secret of digits into a number, and one for text or floating point changes numbers.
fn needed(content: Content, kind: &str) -> Option<String> {
    let kind = kind.to_ascii_uppercase();
    let says = |parts: &[&str]| parts.iter().any(|part| kind.contains(part));
    let is_text = says(&["CHAR", "CLOB", "TEXT"]) && !says(&["INT"]);
    let (fits, needed) = match content {
        // Any other type is not filled in by itself.
        Content::Id => (kind == "INTEGER", "INTEGER PRIMARY KEY"),
        Content::Integer => (says(&["INT"]), "INTEGER"),
        Content::Name | Content::Ascii(_) | Content::Label(_) => (is_text, "TEXT"),
        Content::Time => (is_text || says(&["DATE", "TIME"]), "TEXT"),
    };
    (!fits).then(|| needed.to_owned())
}

pub(super) async fn check(connection: &mut SqliteConnection, server: &Server) -> sqlx::Result<Vec<String>> {
    sqlx::raw_sql(server.table.sql(USE)).execute(&mut *connection).await?;
    let mode: String = sqlx::query_scalar(JOURNAL_MODE).fetch_one(connection).await?;
    if mode == "wal" {
        return Ok(Vec::new());
    }
    Ok(vec![format!(
        "the journal mode is {mode}: with WAL (`SqliteConnectOptions::journal_mode(SqliteJournalMode::Wal)`) a transaction \
         that reads keeps none that writes from its commit, and leases can be looked at while others write"
    )])
}

pub(super) async fn migrate(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    sqlx::raw_sql(WAIT_FOR_OTHER_MIGRATIONS).execute(&mut *connection).await?;
    if !is_up_to_date(connection).await? {
        apply(connection).await?;
    }
    sqlx::raw_sql(PREPARE).execute(connection).await.map(drop)
}

async fn apply(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    let mut transaction = connection.begin_with(LOCK_MIGRATIONS).await?;
    sqlx::query(CREATE_LEDGER).execute(&mut *transaction).await?;
    let applied: Vec<i64> = sqlx::query_scalar(APPLIED).fetch_all(&mut *transaction).await?;
    // The ledger may have outlived the table.
    let is_gone = !has_table(&mut transaction, "distributed_lock").await?;
    for (version, sql) in MIGRATIONS {
        if is_gone || !applied.contains(&version) {
            sqlx::raw_sql(sql).execute(&mut *transaction).await?;
            sqlx::query(NOTE_APPLIED).bind(version).execute(&mut *transaction).await?;
        }
    }
    transaction.commit().await
}

/// Without writing anything, which a file that may only be read would not allow.
async fn is_up_to_date(connection: &mut SqliteConnection) -> sqlx::Result<bool> {
    if !has_table(connection, "distributed_lock").await?
        || !has_table(connection, "_lock_db_migrations").await?
    {
        return Ok(false);
    }
    let applied: Vec<i64> = sqlx::query_scalar(APPLIED).fetch_all(connection).await?;
    Ok(MIGRATIONS.iter().all(|(version, _)| applied.contains(version)))
}

async fn has_table(connection: &mut SqliteConnection, name: &str) -> sqlx::Result<bool> {
    sqlx::query_scalar(HAS_TABLE).bind(name).fetch_one(connection).await
}

#[cfg(test)]
mod tests {
    use sqlx::sqlite::SqliteLockingMode;

    use super::*;

    #[test]
    fn databases_in_memory_are_refused_in_all_spellings() {
        for url in [
            "sqlite::memory:",
            "sqlite://:memory:",
            "sqlite://file::memory:?cache=shared",
            "sqlite://x?mode=memory",
            "sqlite://x?mode=memory&cache=private",
            "sqlite:",
        ] {
            let options: SqliteConnectOptions = url.parse().unwrap();
            assert!(
                matches!(check_options(&options, None), Err(Error::InvalidOption { .. })),
                "{url}: {options:?}"
            );
        }
        assert!(check_options(&"sqlite://data.db".parse().unwrap(), None).is_ok());
        assert!(check_options(&"sqlite://data.db".parse().unwrap(), Some("main")).is_ok());
        assert!(check_options(&"sqlite://data.db".parse().unwrap(), Some("locks")).is_err());
    }

    #[test]
    fn types_that_keep_what_is_written_are_as_good() {
        let fits = |content, kind| needed(content, kind).is_none();
        for (content, good, bad) in [
            (Content::Id, &["INTEGER", "integer"][..], &["BIGINT", "INT", "TEXT"][..]),
            (Content::Integer, &["INTEGER", "BIGINT"], &["TEXT", "REAL", "DOUBLE PRECISION", ""]),
            (Content::Name, &["TEXT", "VARCHAR(255)"], &["NUMERIC", "INTEGER", "BLOB"]),
            (Content::Ascii(32), &["TEXT", "CHAR(8)"], &["NUMERIC", "POINT_TEXT"]),
            (Content::Time, &["TEXT", "DATETIME", "TIMESTAMP"], &["INTEGER", "REAL"]),
        ] {
            assert!(good.iter().all(|kind| fits(content, kind)), "{content:?}");
            assert!(!bad.iter().any(|kind| fits(content, kind)), "{content:?}");
        }
    }

    #[test]
    fn an_exclusive_locking_mode_is_found_in_the_options() {
        let options = SqliteConnectOptions::new().filename("data.db");
        assert!(check_options(&options, None).is_ok());
        let options = options.locking_mode(SqliteLockingMode::Exclusive);
        assert!(matches!(check_options(&options, None), Err(Error::InvalidOption { .. })), "{options:?}");
    }
}
