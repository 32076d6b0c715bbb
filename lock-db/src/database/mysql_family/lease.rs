//! Statements for one lease, on private connections: what MySQL and MariaDB share.

use std::time::Duration;

use sqlx::Row;
use sqlx::mysql::{MySqlConnection, MySqlRow};

use super::errors::{DUPLICATE_KEY, LOCK_WAIT_TIMEOUT, ROW_IS_LOCKED, TOO_LARGE, number, says};
use super::several;
use crate::Kind;
use crate::database::StepError;
use crate::database::driver;
use crate::database::row::lock_row;
use crate::database::{Fault, Grant, LeaseKey, LeaseStatus, LockRow, Probe, ReleaseClaim, Server};
use crate::secret::Secret;

macro_rules! columns {
    () => {
        "id, lock_kind, secret_key, owner, fencing_token,
       TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', create_time),
       TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', acquire_time),
       TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', expire_time),
       TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), expire_time), ttl_micros, waiters,
       previous_token"
    };
}

/// The columns from which `lock_row` builds a row.
pub(super) const COLUMNS: &str = columns!();

const READ: &str = concat!("SELECT ", columns!(), " FROM {table} WHERE lock_name = ?");

pub(super) const READ_ALL: &str = concat!(
    "SELECT ",
    columns!(),
    ", lock_name
FROM JSON_TABLE(?, '$[*]' COLUMNS (asked_name VARCHAR(510) PATH '$')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name) ON lease.lock_name = UNHEX(CONVERT(asked.asked_name USING ascii))"
);

/// Not `INSERT IGNORE`, which also ignores that a name was truncated. Not
/// `ON DUPLICATE KEY UPDATE`, because on a connection of sqlx its row count is the same in both
/// cases.
const CREATE: &str = "INSERT INTO {table} (lock_name, lock_kind) VALUES (?, ?)";

/// An unchanged row also counts as written, because sqlx asks for the number of rows found.
const MARK: &str = "
UPDATE {table} SET previous_token = GREATEST(previous_token, ?)
WHERE id = ? AND lock_name = ? AND secret_key = ? AND fencing_token = ?";

/// Uses the index, and does not wait.
const PROBE: &str =
    "SELECT 1 FROM {table} FORCE INDEX (distributed_lock_name) WHERE lock_name = ? FOR UPDATE NOWAIT";

const IS_OURS: &str = "SELECT 1 FROM {table} WHERE lock_name = ? AND secret_key = ?";

pub(super) async fn read(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
) -> driver::Result<Option<LockRow>> {
    let row = sqlx::query(server.table.sql(READ)).bind(name.as_bytes()).fetch_optional(connection).await?;
    row.as_ref().map(lock_row).transpose()
}

/// Reads first, uncommitted rows included. The connection worker must not wait for a transaction that
/// is making the row, or has locked one that another caller of this process has just made.
pub(super) async fn create(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    kind: Kind,
) -> driver::Result<bool> {
    if !several::find_dirty(connection, server, &[name]).await?.is_empty() {
        if read(connection, server, name).await?.is_none() {
            // Not of lock-db, whose transactions make no rows here.
            let text = "another transaction is making the row and has not ended";
            return Err(StepError::Found(Fault::Busy, text.into()));
        }
        return Ok(true);
    }
    insert(connection, server, name, kind).await?;
    Ok(true)
}

/// Another transaction may create the row at the same time.
pub(super) async fn insert(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    kind: Kind,
) -> driver::Result<()> {
    let query = sqlx::query(server.table.sql(CREATE)).bind(name.as_bytes()).bind(kind.as_str());
    match query.execute(connection).await {
        Err(error) if has_no_id(&error) => {
            let text = format!(
                "a row has the largest id that there is, so no row can be made for a new name; give it another one, and \
                 `ALTER TABLE {} AUTO_INCREMENT = 1`",
                server.table.name()
            );
            Err(StepError::Explained(Fault::Refused, text, error))
        }
        Err(error) if number(&error) != Some(DUPLICATE_KEY) => Err(error.into()),
        _ => Ok(()),
    }
}

/// Whether the ids are used up. If the row already exists, the duplicate key is its name.
pub(super) fn has_no_id<'e>(error: impl Into<Option<&'e sqlx::Error>>) -> bool {
    let error = error.into();
    match number(error) {
        Some(DUPLICATE_KEY) => says(error, "PRIMARY'"),
        Some(TOO_LARGE) => says(error, "'id'"),
        _ => false,
    }
}

pub(in crate::database) fn granted(row: &MySqlRow) -> driver::Result<Grant> {
    let (fencing_token, id) = (row.try_get(0)?, row.try_get(1)?);
    Ok(Grant { id, fencing_token, others_wait: row.try_get(2)?, tokens: row.try_get(3)? })
}

/// Waits for the row no longer than any other statement here.
pub(super) async fn mark(connection: &mut MySqlConnection, lease: &LeaseKey) -> driver::Result<bool> {
    let marked = sqlx::query(lease.server.table.sql(MARK))
        .bind(lease.mark)
        .bind(lease.row.id)
        .bind(lease.row.name.as_bytes())
        .bind(lease.secret.as_str())
        .bind(lease.fencing_token)
        .execute(connection)
        .await?;
    Ok(marked.rows_affected() > 0)
}

/// Probes only the row. If the whole table were locked, the earlier statement that did not get the
/// row would have reported that.
pub(super) async fn probe(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
) -> driver::Result<Probe> {
    match sqlx::query(server.table.sql(PROBE)).bind(name.as_bytes()).fetch_optional(connection).await {
        Ok(Some(_)) => Ok(Probe::Free),
        Ok(None) => Ok(Probe::Nothing),
        Err(error) if matches!(number(&error), Some(ROW_IS_LOCKED | LOCK_WAIT_TIMEOUT)) => Ok(Probe::Locked),
        Err(error) => Err(error.into()),
    }
}

pub(super) async fn release(
    connection: &mut MySqlConnection,
    server: &Server,
    lease: &ReleaseClaim,
) -> driver::Result<LeaseStatus> {
    let released = in_dialect!(server, release(connection, server, lease))?;
    released_or_not(connection, server, &lease.name, &lease.secret, released).await
}

pub(super) async fn release_later(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    secret: &Secret,
    at_least: Duration,
) -> driver::Result<LeaseStatus> {
    let released = in_dialect!(server, release_later(connection, server, name, secret, at_least))?;
    released_or_not(connection, server, name, secret, released).await
}

async fn released_or_not(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    secret: &Secret,
    released: bool,
) -> driver::Result<LeaseStatus> {
    if released {
        return Ok(LeaseStatus::Ours);
    }
    let query = sqlx::query(server.table.sql(IS_OURS)).bind(name.as_bytes()).bind(secret.as_str());
    let ours = query.fetch_optional(connection).await?;
    Ok(if ours.is_some() { LeaseStatus::Busy } else { LeaseStatus::NotOurs })
}
