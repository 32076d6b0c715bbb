//! Creates the table, and repairs its id sequence.

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection};

use super::errors::{INSUFFICIENT_PRIVILEGE, READ_ONLY, code};
use super::schema::{find, quoted};
use super::sequence;
use crate::database::StepError;
use crate::database::driver;
use crate::database::migration::{Migration, apply_missing, if_newer};
use crate::database::{Fault, Found};
use crate::schema;

/// Held until the migrating transaction ends. The number is `lock-db` in ASCII.
const LOCK_MIGRATIONS: &str = "SELECT pg_advisory_xact_lock(30521770275333218)";
/// Whatever the database's default level: the migrations that other processes applied while this
/// one waited must be visible.
const BEGIN_MIGRATION: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";
const LIMIT_MIGRATION: &str = "
SELECT set_config('lock_timeout', '60s', true), set_config('statement_timeout', '0', true)";
const HAS_SCHEMA: &str = "SELECT EXISTS (SELECT 1 FROM pg_namespace WHERE nspname = $1)";
const WORK_IN_SCHEMA: &str = "SELECT set_config('search_path', $1, true)";
const HAS_TABLE: &str = "SELECT to_regclass($1) IS NOT NULL";
const CREATE_LEDGER: &str = "
CREATE TABLE IF NOT EXISTS _lock_db_migrations (
    version BIGINT PRIMARY KEY,
    applied_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp())";
const APPLIED: &str = "SELECT version FROM _lock_db_migrations";
const NOTE_APPLIED: &str = "INSERT INTO _lock_db_migrations (version) VALUES ($1) ON CONFLICT DO NOTHING";
const MIGRATIONS: [(i64, &str); 1] = [(1, schema::POSTGRES)];

/// If the table is as this version needs it, the role may lack access to the ledger, or the ledger
/// may be missing.
pub(super) async fn migrate(connection: &mut PgConnection, schema: Option<&str>) -> driver::Result<()> {
    let error = match apply(connection, schema).await {
        Err(StepError::Sqlx(error)) if may_not(&error) => error,
        applied => return applied,
    };
    if let Found::Table(_) = find(connection, schema).await? {
        return Ok(());
    }
    let text = "permission denied: `migrate()` has to be called once by a role that may create tables there; roles \
                that only use the table need SELECT, INSERT and UPDATE on it";
    Err(StepError::Explained(Fault::Refused, text.to_owned(), error))
}

/// Whether a privilege is missing, or the session is read-only.
fn may_not(error: &sqlx::Error) -> bool {
    matches!(code(error), Some(INSUFFICIENT_PRIVILEGE | READ_ONLY))
}

async fn apply(connection: &mut PgConnection, schema: Option<&str>) -> driver::Result<()> {
    let mut transaction = connection.begin_with(BEGIN_MIGRATION).await?;
    sqlx::query(LIMIT_MIGRATION).execute(&mut *transaction).await?;
    sqlx::query(LOCK_MIGRATIONS).execute(&mut *transaction).await?;
    if let Some(schema) = schema {
        let quoted = quoted(&mut transaction, schema).await?;
        let is_there: bool = sqlx::query_scalar(HAS_SCHEMA).bind(schema).fetch_one(&mut *transaction).await?;
        if !is_there {
            let sql = AssertSqlSafe(format!("CREATE SCHEMA IF NOT EXISTS {quoted}"));
            sqlx::raw_sql(sql).execute(&mut *transaction).await?;
        }
        sqlx::query(WORK_IN_SCHEMA).bind(quoted).execute(&mut *transaction).await?;
    }
    apply_missing(&mut InTransaction(&mut transaction)).await?;
    sequence::mend(&mut transaction).await?;
    Ok(transaction.commit().await?)
}

/// The newest applied migration, if this version does not know it.
pub(super) async fn newer(connection: &mut PgConnection, schema: &str) -> driver::Result<Option<i64>> {
    let schema = quoted(connection, schema).await?;
    let sql = AssertSqlSafe(format!("SELECT max(version) FROM {schema}._lock_db_migrations"));
    // The ledger may be missing, or this role may not read it.
    let newest: Option<i64> = sqlx::query_scalar(sql).fetch_one(connection).await.ok().flatten();
    Ok(if_newer(newest, &MIGRATIONS))
}

/// All of it in one transaction, which has the lock.
struct InTransaction<'c>(&'c mut PgConnection);

impl Migration for InTransaction<'_> {
    const ALL: &'static [(i64, &'static str)] = &MIGRATIONS;

    async fn has_table(&mut self, table: &str) -> driver::Result<bool> {
        Ok(sqlx::query_scalar(HAS_TABLE).bind(table).fetch_one(&mut *self.0).await?)
    }

    async fn create_ledger(&mut self) -> driver::Result<()> {
        sqlx::query(CREATE_LEDGER).execute(&mut *self.0).await?;
        Ok(())
    }

    async fn applied(&mut self) -> driver::Result<Vec<i64>> {
        Ok(sqlx::query_scalar(APPLIED).fetch_all(&mut *self.0).await?)
    }

    async fn apply(&mut self, sql: &'static str) -> driver::Result<()> {
        sqlx::raw_sql(sql).execute(&mut *self.0).await?;
        Ok(())
    }

    async fn note_applied(&mut self, version: i64) -> driver::Result<()> {
        sqlx::query(NOTE_APPLIED).bind(version).execute(&mut *self.0).await?;
        Ok(())
    }
}
