//! Finds the table.

use std::collections::HashMap;

use sqlx::Row;
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};

use super::migrate;
use crate::Error;
use crate::database::StepError;
use crate::database::columns::{COLUMNS, Compared, Content, Declared, UnlessNamed, compare};
use crate::database::driver;
use crate::database::server::{Table, by_newer};
use crate::database::{Cluster, Found, Server};

/// How long a private connection waits for another writer before it reports "busy". A schema is a
/// separate file on SQLite, so none is set.
pub(super) const PREPARE: &str = "PRAGMA busy_timeout = 100";

const FIND: &str = "
SELECT (SELECT file FROM pragma_database_list WHERE name = 'main'),
    (SELECT locking_mode FROM pragma_locking_mode),
    (SELECT type FROM main.sqlite_schema WHERE name = 'distributed_lock' AND type IN ('table', 'view')),
    (SELECT group_concat(
            CASE WHEN dflt_value IS NOT NULL OR (pk AND upper(type) = 'INTEGER') THEN 'value'
                WHEN \"notnull\" THEN 'nothing' ELSE 'null' END || ' ' || name || ' ' || type, char(10))
        FROM pragma_table_info('distributed_lock', 'main')),
    EXISTS (
        SELECT 1 FROM pragma_index_list('distributed_lock', 'main') AS list
        WHERE list.\"unique\" AND NOT list.partial
            AND (SELECT group_concat(name || ' ' || coll) FROM pragma_index_xinfo(list.name, 'main') WHERE key)
                = 'lock_name BINARY'),
    (SELECT journal_mode FROM pragma_journal_mode)";

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

/// sqlx offers no other way to read the setting than the text of its options. If that text changes,
/// `FIND` still detects it, after a wait.
fn locks_exclusively(options: &str) -> bool {
    let Some((_, mode)) = options.split_once("\"locking_mode\": ") else { return false };
    mode.get(..20).is_some_and(|mode| mode.to_ascii_uppercase().contains("EXCLUSIVE"))
}

pub(super) async fn find(connection: &mut SqliteConnection) -> driver::Result<Found> {
    let row = sqlx::query(FIND).fetch_one(&mut *connection).await?;
    let (file, mode): (String, String) = (row.try_get(0)?, row.try_get(1)?);
    if file.is_empty() {
        return Err(StepError::refused(format!("the database is in memory: {FILE_PLEASE}")));
    }
    if mode == "exclusive" {
        let message = "`locking_mode` is EXCLUSIVE: a connection would keep the file from all others";
        return Err(StepError::refused(message));
    }
    if row.try_get::<&str, _>(5)? == "off" {
        let message = "`journal_mode` is OFF: no transaction could be rolled back";
        return Err(StepError::refused(message));
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
    match compare(&COLUMNS, &declared(row.try_get(3)?), needed) {
        Compared::Fit => {}
        Compared::Missing(column) => {
            return Ok(match migrate::newer(connection).await? {
                Some(version) => Found::Unusable(by_newer("distributed_lock", column, version)),
                None => Found::Differs(column),
            });
        }
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
        longest_message: usize::MAX,
        is_ascii_only: false,
        keeps_statements: true,
    }))
}

/// Parses columns, one `value name type` per line. A name with a blank is not one of ours.
fn declared(columns: &str) -> HashMap<String, Declared> {
    let parts = columns.lines().filter_map(|column| {
        let (unless_named, column) = column.split_once(' ')?;
        let (name, kind) = column.split_once(' ')?;
        let unless_named = UnlessNamed::parse(unless_named);
        Some((name.to_owned(), Declared { kind: kind.to_owned(), unless_named }))
    });
    parts.collect()
}

/// What a column needs if this type does not fit. A type is only a hint, but a numeric type turns a
/// name or a secret of digits into a number, and a text or floating point type changes numbers.
fn needed(content: Content, kind: &str) -> Option<String> {
    let kind = kind.to_ascii_uppercase();
    let says = |parts: &[&str]| parts.iter().any(|part| kind.contains(part));
    let is_text = says(&["CHAR", "CLOB", "TEXT"]) && !says(&["INT"]);
    let (fits, needed) = match content {
        // Any other type is not filled in automatically.
        Content::Id => (kind == "INTEGER", "INTEGER PRIMARY KEY"),
        Content::Integer => (says(&["INT"]), "INTEGER"),
        Content::Name | Content::Ascii(_) | Content::Label(_) => (is_text, "TEXT"),
        Content::Time => (is_text || says(&["DATE", "TIME"]), "TEXT"),
    };
    (!fits).then(|| needed.to_owned())
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
