//! Creates the table.

use sqlx::mysql::MySqlConnection;
use sqlx::{AssertSqlSafe, MySql};

use super::errors::{DEADLOCK, DUPLICATE_KEY, READ_ONLY, number};
use super::schema::{digest, find};
use crate::database::StepError;
use crate::database::driver;
use crate::database::driver::SchemaDriver;
use crate::database::migration::{LEDGER, Migration, apply_missing, if_newer};
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

/// If the table is as this version needs it, the account may lack access to the ledger, or the
/// ledger may be missing.
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
            let text = "permission denied: `migrate()` has to be called once by an account that may create tables there; \
                        accounts that only use the table need SELECT, INSERT and UPDATE on it";
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
    Ok(if_newer(newest, &MIGRATIONS))
}

async fn apply(connection: &mut MySqlConnection, schema: &str) -> driver::Result<()> {
    let quoted = format!("`{}`", schema.replace('`', "``"));
    let has_database: i64 =
        sqlx::query_scalar(HAS_DATABASE).bind(schema).bind(schema).fetch_one(&mut *connection).await?;
    if has_database == 0 {
        let sql = AssertSqlSafe(format!("CREATE DATABASE IF NOT EXISTS {quoted}"));
        sqlx::raw_sql(sql).execute(&mut *connection).await?;
    }
    apply_missing(&mut UnderUserLock { connection, schema, quoted }).await
}

/// The connection has the user lock. InnoDB commits each `CREATE TABLE` by itself.
struct UnderUserLock<'c> {
    connection: &'c mut MySqlConnection,
    schema: &'c str,
    quoted: String,
}

impl UnderUserLock<'_> {
    fn in_ledger(&self, sql: &str) -> AssertSqlSafe<String> {
        AssertSqlSafe(sql.replace("{ledger}", &format!("{}.{LEDGER}", self.quoted)))
    }
}

impl Migration for UnderUserLock<'_> {
    const ALL: &'static [(i64, &'static str)] = &MIGRATIONS;

    async fn has_table(&mut self, table: &str) -> driver::Result<bool> {
        let query = sqlx::query_scalar(HAS_TABLE).bind(self.schema).bind(table).bind(self.schema);
        let tables: i64 = query.fetch_one(&mut *self.connection).await?;
        Ok(tables > 0)
    }

    async fn create_ledger(&mut self) -> driver::Result<()> {
        sqlx::raw_sql(self.in_ledger(CREATE_LEDGER)).execute(&mut *self.connection).await?;
        Ok(())
    }

    async fn applied(&mut self) -> driver::Result<Vec<i64>> {
        Ok(sqlx::query_scalar(self.in_ledger(APPLIED)).fetch_all(&mut *self.connection).await?)
    }

    async fn apply(&mut self, sql: &'static str) -> driver::Result<()> {
        let in_schema = format!("EXISTS {}.distributed_lock (", self.quoted);
        let sql = AssertSqlSafe(sql.replace("EXISTS distributed_lock (", &in_schema));
        sqlx::raw_sql(sql).execute(&mut *self.connection).await?;
        Ok(())
    }

    /// The version was recorded already if the table was dropped without the ledger. Or another
    /// node records it at the same time, because the user lock covers only one node.
    async fn note_applied(&mut self, version: i64) -> driver::Result<()> {
        let query = sqlx::query(self.in_ledger(NOTE_APPLIED)).bind(version);
        match query.execute(&mut *self.connection).await {
            Err(error) if matches!(number(&error), Some(DUPLICATE_KEY | DEADLOCK)) => Ok(()),
            Err(error) => Err(error.into()),
            Ok(_) => Ok(()),
        }
    }
}
