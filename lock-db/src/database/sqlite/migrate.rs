//! Creates the table, and repairs its sequence.

use sqlx::sqlite::SqliteConnection;
use sqlx::{Connection, Sqlite};

use super::schema::{PREPARE, find};
use crate::database::driver;
use crate::database::migration::{LEDGER, Migration, apply_missing, if_newer};
use crate::database::{Fault, Found};
use crate::schema;

const WAIT_FOR_OTHER_MIGRATIONS: &str = "PRAGMA busy_timeout = 60000";
const LOCK_MIGRATIONS: &str = "BEGIN IMMEDIATE";
const HAS_TABLE: &str = "SELECT EXISTS (SELECT 1 FROM main.sqlite_schema WHERE name = ?1)";
const CREATE_LEDGER: &str = "
CREATE TABLE IF NOT EXISTS main._lock_db_migrations (
    version INTEGER PRIMARY KEY,
    applied_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')))";
const APPLIED: &str = "SELECT version FROM main._lock_db_migrations";
const NEWEST: &str = "SELECT MAX(version) FROM main._lock_db_migrations";
const NOTE_APPLIED: &str = "INSERT OR IGNORE INTO main._lock_db_migrations (version) VALUES (?1)";
const MIGRATIONS: [(i64, &str); 1] = [(1, schema::SQLITE)];

/// When the sequence has reached its end, no row can be created: SQLite reports a full disk.
const MEND_SEQUENCE: &str = "
UPDATE main.sqlite_sequence SET seq = (SELECT COALESCE(MAX(id), 0) FROM main.distributed_lock)
WHERE name = 'distributed_lock'";
const SEQUENCE_HAS_ENDED: &str = "
SELECT EXISTS (SELECT 1 FROM main.sqlite_sequence WHERE name = 'distributed_lock' AND seq = 9223372036854775807)";

pub(super) async fn migrate(connection: &mut SqliteConnection) -> driver::Result<()> {
    sqlx::raw_sql(WAIT_FOR_OTHER_MIGRATIONS).execute(&mut *connection).await?;
    if !is_up_to_date(connection).await? {
        match apply(connection).await {
            Err(error) if error.fault::<Sqlite>() == Fault::Refused => match find(connection).await? {
                Found::Table(_) => {}
                _ => return Err(error),
            },
            applied => applied?,
        }
    }
    sqlx::raw_sql(PREPARE).execute(connection).await?;
    Ok(())
}

async fn apply(connection: &mut SqliteConnection) -> driver::Result<()> {
    let mut transaction = connection.begin_with(LOCK_MIGRATIONS).await?;
    apply_missing(&mut InTransaction(&mut transaction)).await?;
    if has_no_more_ids(&mut transaction).await? {
        sqlx::query(MEND_SEQUENCE).execute(&mut *transaction).await?;
    }
    Ok(transaction.commit().await?)
}

/// Whether the ids are used up. `sqlite_sequence` exists only if a table has AUTOINCREMENT.
pub(super) async fn has_no_more_ids(connection: &mut SqliteConnection) -> driver::Result<bool> {
    if !has_table(connection, "sqlite_sequence").await? {
        return Ok(false);
    }
    Ok(sqlx::query_scalar(SEQUENCE_HAS_ENDED).fetch_one(connection).await?)
}

/// The newest applied migration, if this version does not know it.
pub(super) async fn newer(connection: &mut SqliteConnection) -> driver::Result<Option<i64>> {
    if !has_table(connection, LEDGER).await? {
        return Ok(None);
    }
    let newest: Option<i64> = sqlx::query_scalar(NEWEST).fetch_one(connection).await?;
    Ok(if_newer(newest, &MIGRATIONS))
}

/// Does not write, because the file may be read-only.
async fn is_up_to_date(connection: &mut SqliteConnection) -> driver::Result<bool> {
    if !has_table(connection, "distributed_lock").await? || !has_table(connection, LEDGER).await? {
        return Ok(false);
    }
    let applied: Vec<i64> = sqlx::query_scalar(APPLIED).fetch_all(&mut *connection).await?;
    Ok(MIGRATIONS.iter().all(|(version, _)| applied.contains(version))
        && !has_no_more_ids(connection).await?)
}

async fn has_table(connection: &mut SqliteConnection, name: &str) -> driver::Result<bool> {
    Ok(sqlx::query_scalar(HAS_TABLE).bind(name).fetch_one(connection).await?)
}

/// All of it in one transaction, which has the write lock.
struct InTransaction<'c>(&'c mut SqliteConnection);

impl Migration for InTransaction<'_> {
    const ALL: &'static [(i64, &'static str)] = &MIGRATIONS;

    async fn has_table(&mut self, table: &str) -> driver::Result<bool> {
        has_table(self.0, table).await
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
