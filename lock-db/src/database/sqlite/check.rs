//! Finds problems before the first lock does: rows that can't be created, and settings.

use sqlx::sqlite::SqliteConnection;
use sqlx::{Connection, Row, Sqlite};

use super::errors::{READ_ONLY, code};
use super::migrate::has_no_more_ids;
use crate::database::StepError;
use crate::database::driver;
use crate::database::driver::SchemaDriver;
use crate::database::{Fault, Server, foreign_write, name_for_check};
use crate::{Finding, FindingKind};

/// What locks do, on a row that is rolled back.
const BEGIN: &str = "BEGIN IMMEDIATE";
const MAKE: &str = "INSERT INTO {table} (lock_name, lock_kind) VALUES (?1, 'insert')";
const WRITE: &str = "UPDATE {table} SET owner = owner WHERE lock_name = ?1";

const SETTINGS: &str = "
SELECT (SELECT journal_mode FROM pragma_journal_mode), (SELECT synchronous FROM pragma_synchronous),
    (SELECT query_only FROM pragma_query_only)";

pub(super) async fn check(
    connection: &mut SqliteConnection,
    server: &Server,
) -> driver::Result<Vec<Finding>> {
    let row = sqlx::query(SETTINGS).fetch_one(&mut *connection).await?;
    let (mode, synchronous, only_reads): (String, i64, bool) =
        (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
    if has_no_more_ids(connection).await? {
        let message = "no row can be made for a new name: the numbers of `distributed_lock` in `sqlite_sequence` are used up; mend it \
                       by `locks.migrate()`";
        return Err(StepError::refused(message));
    }
    try_out(connection, server).await.map_err(|error| explained(error, server, only_reads))?;
    let mut findings = Vec::new();
    if mode != "wal" {
        findings.push(Finding::of_setting(
            FindingKind::JournalMode,
            "journal_mode",
            format!(
                "the journal mode (`journal_mode`) is {mode}: with WAL \
                 (`SqliteConnectOptions::journal_mode(SqliteJournalMode::Wal)`) a transaction that reads keeps none that \
                 writes from its commit, and leases can be looked at while others write"
            ),
        ));
    }
    if mode == "memory" {
        findings.push(Finding::of_setting(
            FindingKind::NotDurable,
            "journal_mode",
            "the journal is kept in memory (`journal_mode`): a process that dies in the middle of a commit may damage the \
             database, with the locks in it",
        ));
    }
    if synchronous == 0 {
        findings.push(Finding::of_setting(
            FindingKind::NotDurable,
            "synchronous",
            "`synchronous` is OFF: a crash of the host may damage the database, with the locks in it, or forget the newest \
             grants",
        ));
    }
    Ok(findings)
}

/// Creates a row, writes it, and rolls back. Any obstacle to one of these steps shows as an error.
async fn try_out(connection: &mut SqliteConnection, server: &Server) -> driver::Result<()> {
    let name = name_for_check()?;
    let mut transaction = connection.begin_with(BEGIN).await?;
    let made = sqlx::query(server.table.sql(MAKE)).bind(&name).execute(&mut *transaction).await?;
    let written = sqlx::query(server.table.sql(WRITE)).bind(&name).execute(&mut *transaction).await?;
    transaction.rollback().await?;
    if made.rows_affected() == 1 && written.rows_affected() == 1 { Ok(()) } else { Err(foreign_write()) }
}

fn explained(error: StepError, server: &Server, only_reads: bool) -> StepError {
    let StepError::Sqlx(error) = error else { return error };
    let why = match code(&error).as_deref() {
        Some(READ_ONLY) if only_reads => {
            "readonly database: `query_only` is on for the connections of the pool".to_owned()
        }
        Some(READ_ONLY) => format!(
            "readonly database: the pool opens it with `read_only`, `mode=ro` or `immutable`, or this process may not write to \
             the file {} and its folder",
            server.table.identity
        ),
        _ if Sqlite::classify(&error) == Fault::Refused => {
            format!("this process must be able to write to the file {} and its folder", server.table.identity)
        }
        _ => return error.into(),
    };
    StepError::Explained(Fault::Refused, why, error)
}
