//! Creates the table.

use sqlx::mysql::MySqlConnection;
use sqlx::{AssertSqlSafe, MySql};

use super::errors::{DEADLOCK, DUPLICATE_KEY, READ_ONLY, number};
use super::schema::{digest, find};
use crate::database::StepError;
use crate::database::driver;
use crate::database::driver::SchemaDriver;
use crate::database::{Fault, Found};
use crate::schema;

/// Waits for a positive time, and the answer is checked. For the negative time that sqlx's migrator
/// sends, MariaDB returns NULL, and no lock is held. The lock's name is valid on the whole server,
/// so it contains a digest of the database's name.
const LOCK_MIGRATIONS: &str = "SELECT COALESCE(GET_LOCK(?, 60), 0)";
const UNLOCK_MIGRATIONS: &str = "DO RELEASE_LOCK(?)";
const CURRENT: &str = "SELECT DATABASE()";
const HAS_DATABASE: &str = "
SELECT COUNT(*) FROM information_schema.schemata
WHERE schema_name = ? AND (@@lower_case_table_names <> 0 OR CAST(schema_name AS BINARY) = CAST(? AS BINARY))";
const HAS_TABLE: &str = "
SELECT COUNT(*) FROM information_schema.tables
WHERE table_schema = ? AND table_name = ?
    AND (@@lower_case_table_names <> 0 OR CAST(table_schema AS BINARY) = CAST(? AS BINARY))";
const CREATE_LEDGER: &str = "
CREATE TABLE IF NOT EXISTS {ledger} (
    version BIGINT NOT NULL PRIMARY KEY,
    applied_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6))
) ENGINE = InnoDB";
const APPLIED: &str = "SELECT version FROM {ledger}";
const NOTE_APPLIED: &str = "INSERT INTO {ledger} (version) VALUES (?)";
const MIGRATIONS: [(i64, &str); 1] = [(1, schema::MYSQL)];

/// If everything is applied this only reads, so an account without the privilege to create anything
/// may call it. If the table is as this version needs it, the account may also lack access to the
/// ledger, or the ledger may be missing.
pub(super) async fn migrate(connection: &mut MySqlConnection, schema: Option<&str>) -> driver::Result<()> {
    let schema = if let Some(schema) = schema {
        schema.to_owned()
    } else {
        let current: Option<String> = sqlx::query_scalar(CURRENT).fetch_one(&mut *connection).await?;
        current.ok_or_else(|| {
            StepError::refused("the pool's URL names no database, and the builder no `schema`")
        })?
    };
    let lock = format!("lock_db:{}", digest(&schema));
    let locked: i64 = sqlx::query_scalar(LOCK_MIGRATIONS).bind(&lock).fetch_one(&mut *connection).await?;
    if locked != 1 {
        let text = "another process has been migrating for a minute";
        return Err(StepError::Found(Fault::Passing, text.into()));
    }
    match apply(connection, &schema).await {
        Err(error) if error.fault::<MySql>() == Fault::Refused || number(&error) == Some(READ_ONLY) => {
            match find(connection, Some(&schema)).await? {
                Found::Table(_) => {}
                _ => return Err(may_not(error)),
            }
        }
        applied => applied?,
    }
    sqlx::query(UNLOCK_MIGRATIONS).bind(lock).execute(connection).await?;
    Ok(())
}

/// A read-only server is reported with its own error, because another server may have become the
/// primary.
fn may_not(error: StepError) -> StepError {
    match error {
        StepError::Sqlx(error) if MySql::classify(&error) == Fault::Refused => {
            let text = "`migrate()` has to be called once by an account that may create tables there; accounts that only use \
                        the table need SELECT, INSERT and UPDATE on it";
            StepError::Explained(Fault::Refused, text.to_owned(), error)
        }
        error => error,
    }
}

/// The newest applied migration, if this version does not know it.
pub(super) async fn newer(connection: &mut MySqlConnection, schema: &str) -> driver::Result<Option<i64>> {
    let sql = format!("SELECT MAX(version) FROM `{}`._lock_db_migrations", schema.replace('`', "``"));
    // The ledger may be missing, or this account may not read it.
    let newest = sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(connection).await;
    let newest: Option<i64> = newest.ok().flatten();
    Ok(newest.filter(|newest| MIGRATIONS.iter().all(|(known, _)| known < newest)))
}

async fn apply(connection: &mut MySqlConnection, schema: &str) -> driver::Result<()> {
    let quoted = format!("`{}`", schema.replace('`', "``"));
    let ledger = format!("{quoted}._lock_db_migrations");
    let in_ledger = |sql: &str| AssertSqlSafe(sql.replace("{ledger}", &ledger));
    let has_database: i64 =
        sqlx::query_scalar(HAS_DATABASE).bind(schema).bind(schema).fetch_one(&mut *connection).await?;
    if has_database == 0 {
        let sql = AssertSqlSafe(format!("CREATE DATABASE IF NOT EXISTS {quoted}"));
        sqlx::raw_sql(sql).execute(&mut *connection).await?;
    }
    let applied: Vec<i64> = if has_table(connection, schema, "_lock_db_migrations").await? {
        sqlx::query_scalar(in_ledger(APPLIED)).fetch_all(&mut *connection).await?
    } else {
        sqlx::raw_sql(in_ledger(CREATE_LEDGER)).execute(&mut *connection).await?;
        Vec::new()
    };
    // The table may have been dropped without the ledger.
    let is_gone = !has_table(connection, schema, "distributed_lock").await?;
    for (version, sql) in MIGRATIONS {
        if !is_gone && applied.contains(&version) {
            continue;
        }
        let sql = sql.replace("EXISTS distributed_lock (", &format!("EXISTS {quoted}.distributed_lock ("));
        sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *connection).await?;
        let noted = sqlx::query(in_ledger(NOTE_APPLIED)).bind(version).execute(&mut *connection).await;
        // The version was already recorded. Or another node recorded it at the same time, because
        // the lock above covers only one node.
        if let Err(error) = noted
            && !matches!(number(&error), Some(DUPLICATE_KEY | DEADLOCK))
        {
            return Err(error.into());
        }
    }
    Ok(())
}

async fn has_table(connection: &mut MySqlConnection, schema: &str, table: &str) -> driver::Result<bool> {
    let tables: i64 =
        sqlx::query_scalar(HAS_TABLE).bind(schema).bind(table).bind(schema).fetch_one(connection).await?;
    Ok(tables > 0)
}
