//! Statements for one lease, on private connections: what MySQL and MariaDB share, and MySQL's own.

use std::time::Duration;

use sqlx::Row;
use sqlx::mysql::{MySqlConnection, MySqlRow};

use super::errors::{DUPLICATE_KEY, LOCK_WAIT_TIMEOUT, ROW_IS_LOCKED, TOO_LARGE, number, says};
use super::mariadb;
use crate::Kind;
use crate::database::StepError;
use crate::database::driver;
use crate::database::{
    Claim, Fault, Grant, LeaseKey, LeaseStatus, LockRow, Probe, QueueEntry, ReleaseClaim, Server,
    names_as_json,
};
use crate::name::Name;
use crate::options::micros;
use crate::secret::Secret;

macro_rules! columns {
    () => {
        "id, lock_kind, secret_key, owner, fencing_token,
       TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', create_time),
       TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', acquire_time),
       TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', expire_time),
       TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), expire_time), ttl_micros, waiters"
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
STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name) ON lease.lock_name = UNHEX(asked.asked_name)"
);

/// Not `INSERT IGNORE`, which also ignores that a name was truncated. Not
/// `ON DUPLICATE KEY UPDATE`, because on a connection of sqlx its row count is the same in both
/// cases.
const CREATE: &str = "INSERT INTO {table} (lock_name, lock_kind) VALUES (?, ?)";

/// The old values are read in the inner SELECT, because the order of assignments in an UPDATE of a
/// join is undefined. The new token is never below the clock's microseconds. So no token is issued
/// again after a row was deleted, or after a failover that lost the last grants.
///
/// A locked row is skipped, so that other callers do not wait for it on this connection. Inside a
/// transaction this would leave a lock on the gap behind the row; outside it does not.
const ACQUIRE: &str = "
UPDATE (
    SELECT id, fencing_token AS last_token, acquire_time AS last_time, secret_key = ? AS is_again,
        previous_token AS last_previous, waiters <> '' AND LEFT(waiters, 32) = ? AS was_first
    FROM {table} FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND lock_kind = 'insert' AND (secret_key = ?
        OR (expire_time <= UTC_TIMESTAMP(6) AND (ttl_micros <= 0 OR expire_time = '1970-01-01 00:00:00')
            AND (waiters = '' OR ? OR LEFT(waiters, 32) = ?)))
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.fencing_token = IF(unlocked.is_again, unlocked.last_token, GREATEST(
        unlocked.last_token + 1, TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)))),
    lease.previous_token = IF(unlocked.is_again, unlocked.last_previous, unlocked.last_token),
    lease.acquire_time = IF(unlocked.is_again, unlocked.last_time, UTC_TIMESTAMP(6)),
    lease.secret_key = ?,
    lease.owner = ?,
    lease.expire_time = TIMESTAMPADD(MICROSECOND, ?, UTC_TIMESTAMP(6)),
    lease.ttl_micros = ?,
    lease.waiters = IF(unlocked.was_first, SUBSTR(lease.waiters, 57), lease.waiters)";

const GRANTED: &str = "
SELECT fencing_token, id, waiters <> '', fencing_token - previous_token
FROM {table} WHERE lock_name = ? AND secret_key = ?";

const RELEASE: &str = "
UPDATE (
    SELECT id FROM {table} FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND secret_key = ?
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.expire_time = '1970-01-01 00:00:00',
    lease.ttl_micros = 0,
    lease.waiters = IF(
        ? <> '' AND lease.waiters <> '' AND LENGTH(lease.waiters) < 3584 AND INSTR(lease.waiters, ?) = 0,
        CONCAT(lease.waiters, ?, LPAD(TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)) + 2000000, 16, '0'), ?),
        lease.waiters)";

const RELEASE_LATER: &str = "
UPDATE (
    SELECT id, secret_key AS last_secret,
        TIMESTAMPADD(MICROSECOND, ?, LEAST(acquire_time, UTC_TIMESTAMP(6))) AS moment
    FROM {table} FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND secret_key = ?
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.expire_time = IF(unlocked.moment > UTC_TIMESTAMP(6), unlocked.moment, '1970-01-01 00:00:00'),
    lease.ttl_micros = IF(unlocked.moment > UTC_TIMESTAMP(6),
        -TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), unlocked.moment), 0),
    lease.secret_key = IF(unlocked.moment > UTC_TIMESTAMP(6), '', unlocked.last_secret)";

/// The notice is a fifth of the TTL, 1 s at most. A deadline more than the TTL and 2 s ahead is
/// moved to one TTL from now. `LockRow::notice_is_due` uses the same rules. Uses the clock at the
/// moment when the row is locked, because the statement may have waited for the table.
const GIVE_NOTICE: &str = "
UPDATE (
    SELECT id, ttl_micros AS last_ttl, TIMESTAMPADD(MICROSECOND, LEAST(ttl_micros DIV 5, 1000000), SYSDATE(6)) AS notice,
        expire_time > TIMESTAMPADD(MICROSECOND, ABS(ttl_micros) + 2000000, SYSDATE(6)) AS is_too_far
    FROM JSON_TABLE(?, '$[*]' COLUMNS (asked_name VARCHAR(510) PATH '$')) AS asked
    STRAIGHT_JOIN {table} AS held FORCE INDEX (distributed_lock_name) ON held.lock_name = UNHEX(asked.asked_name)
    WHERE lock_kind = 'insert' AND expire_time > '1970-01-01 00:00:00'
        AND ((ttl_micros > 0
                AND expire_time <= TIMESTAMPADD(MICROSECOND, LEAST(ttl_micros DIV 5, 1000000), SYSDATE(6)))
            OR expire_time > TIMESTAMPADD(MICROSECOND, ABS(ttl_micros) + 2000000, SYSDATE(6)))
    LIMIT 1000000
    FOR UPDATE OF held SKIP LOCKED) AS due
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = due.id
SET lease.expire_time = IF(due.is_too_far,
        TIMESTAMPADD(MICROSECOND, GREATEST(ABS(due.last_ttl), 1000000), SYSDATE(6)), GREATEST(lease.expire_time, due.notice)),
    lease.ttl_micros = IF(due.is_too_far, due.last_ttl, 0)";

const SETTLE: &str = "
UPDATE (
    SELECT id FROM {table} FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND lock_kind = 'insert' AND expire_time <= UTC_TIMESTAMP(6)
        AND (ttl_micros <= 0 OR expire_time = '1970-01-01 00:00:00')
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS free
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = free.id
SET lease.expire_time = '1970-01-01 00:00:00', lease.ttl_micros = 0, lease.secret_key = ''";

/// An unchanged row also counts as written, because sqlx asks for the number of rows found.
const MARK: &str = "
UPDATE {table} SET previous_token = GREATEST(previous_token, ?)
WHERE id = ? AND lock_name = ? AND secret_key = ? AND fencing_token = ?";

/// Uses the index, and does not wait.
const PROBE: &str =
    "SELECT 1 FROM {table} FORCE INDEX (distributed_lock_name) WHERE lock_name = ? FOR UPDATE NOWAIT";

const STAND: &str = "
UPDATE (
    SELECT id FROM {table} FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND lock_kind = 'insert' AND LENGTH(waiters) < 3584 AND INSTR(waiters, ?) = 0
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.waiters = CONCAT(
    lease.waiters, ?, LPAD(TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)) + 2000000, 16, '0'), ?)";

/// Replaces the queue only if it is still what was read before.
const SET_WAITERS: &str = "
UPDATE (
    SELECT id FROM {table} FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND lock_kind = 'insert' AND waiters = ?
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.waiters = ?";

const REMOVE_WAITER: &str = "
UPDATE (
    SELECT id, waiters AS last_waiters, INSTR(waiters, ?) AS place
    FROM {table} FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND INSTR(waiters, ?) > 0
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.waiters = INSERT(unlocked.last_waiters, unlocked.place, 56, '')";

const IS_OURS: &str = "SELECT 1 FROM {table} WHERE lock_name = ? AND secret_key = ?";

pub(super) async fn read(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
) -> driver::Result<Option<LockRow>> {
    let row = sqlx::query(server.table.sql(READ)).bind(name.as_bytes()).fetch_optional(connection).await?;
    row.as_ref().map(lock_row).transpose()
}

pub(super) fn lock_row(row: &MySqlRow) -> driver::Result<LockRow> {
    Ok(LockRow {
        id: row.try_get(0)?,
        kind: Kind::parse(row.try_get(1)?),
        secret_key: row.try_get(2)?,
        owner: row.try_get(3)?,
        fencing_token: row.try_get(4)?,
        created: row.try_get(5)?,
        acquired: row.try_get(6)?,
        expires: row.try_get(7)?,
        remaining: row.try_get(8)?,
        ttl: row.try_get(9)?,
        waiters: row.try_get(10)?,
    })
}

/// Reads first. A transaction may already have locked the row that another caller of this process
/// has just created, and the connection worker must not wait for that transaction.
pub(super) async fn create(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    kind: Kind,
) -> driver::Result<bool> {
    if read(connection, server, name).await?.is_some() {
        return Ok(true);
    }
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
        _ => Ok(true),
    }
}

/// Whether the ids are used up. If the row already exists, the duplicate key is its name.
fn has_no_id(error: &sqlx::Error) -> bool {
    match number(error) {
        Some(DUPLICATE_KEY) => says(error, "PRIMARY'"),
        Some(TOO_LARGE) => says(error, "'id'"),
        _ => false,
    }
}

pub(super) async fn acquire(
    connection: &mut MySqlConnection,
    server: &Server,
    claim: &Claim,
) -> driver::Result<Option<Grant>> {
    let secret = claim.secret.as_str();
    let place = claim.place.as_ref().map_or("", Secret::as_str);
    let name = claim.name.as_bytes();
    let acquired = sqlx::query(server.table.sql(ACQUIRE))
        .bind(secret)
        .bind(place)
        .bind(name)
        .bind(secret)
        .bind(place.is_empty())
        .bind(place)
        .bind(secret)
        .bind(server.storable(&claim.owner))
        .bind(micros(claim.ttl))
        .bind(micros(claim.ttl))
        .execute(&mut *connection)
        .await?;
    if acquired.rows_affected() == 0 {
        return Ok(None);
    }
    // The lease is already ours, so an error must not look like an answer.
    let query = sqlx::query(server.table.sql(GRANTED)).bind(name).bind(secret);
    let row = query.fetch_optional(connection).await.map_err(StepError::outcome_unknown)?;
    row.as_ref().map(granted).transpose()
}

pub(super) fn granted(row: &MySqlRow) -> driver::Result<Grant> {
    let (fencing_token, id) = (row.try_get(0)?, row.try_get(1)?);
    Ok(Grant { id, fencing_token, others_wait: row.try_get(2)?, tokens: row.try_get(3)? })
}

pub(super) async fn give_notice(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &[Name],
) -> driver::Result<u64> {
    let names = names_as_json(names);
    if server.is_mariadb {
        return mariadb::give_notice(connection, server, &names).await;
    }
    let given = sqlx::query(server.table.sql(GIVE_NOTICE)).bind(names).execute(connection).await?;
    Ok(given.rows_affected())
}

pub(super) async fn settle(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
) -> driver::Result<bool> {
    if server.is_mariadb {
        return mariadb::settle(connection, server, name).await;
    }
    let settled = sqlx::query(server.table.sql(SETTLE)).bind(name.as_bytes()).execute(connection).await?;
    Ok(settled.rows_affected() > 0)
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
    let ReleaseClaim { name, secret, place } = lease;
    let released = if server.is_mariadb {
        mariadb::release(connection, server, lease).await?
    } else {
        let (place, listener) = QueueEntry::parts(place.as_ref());
        let query = sqlx::query(server.table.sql(RELEASE)).bind(name.as_bytes()).bind(secret.as_str());
        let query = query.bind(place).bind(place).bind(place).bind(listener);
        query.execute(&mut *connection).await?.rows_affected() > 0
    };
    released_or_not(connection, server, name, secret, released).await
}

pub(super) async fn release_later(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    secret: &Secret,
    at_least: Duration,
) -> driver::Result<LeaseStatus> {
    let released = if server.is_mariadb {
        mariadb::release_later(connection, server, name, secret, at_least).await?
    } else {
        let query = sqlx::query(server.table.sql(RELEASE_LATER)).bind(micros(at_least)).bind(name.as_bytes());
        let query = query.bind(secret.as_str());
        query.execute(&mut *connection).await?.rows_affected() > 0
    };
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

pub(super) async fn enqueue(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    place: &QueueEntry,
) -> driver::Result<bool> {
    if server.is_mariadb {
        return mariadb::enqueue(connection, server, name, place).await;
    }
    let (secret, listener) = QueueEntry::parts(Some(place));
    let query = sqlx::query(server.table.sql(STAND)).bind(name.as_bytes()).bind(secret);
    Ok(query.bind(secret).bind(listener).execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn set_waiters(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    before: &str,
    after: &str,
) -> driver::Result<bool> {
    if server.is_mariadb {
        return mariadb::set_waiters(connection, server, name, before, after).await;
    }
    let query = sqlx::query(server.table.sql(SET_WAITERS)).bind(name.as_bytes()).bind(before).bind(after);
    Ok(query.execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn dequeue(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    secret: &Secret,
) -> driver::Result<()> {
    if server.is_mariadb {
        return mariadb::dequeue(connection, server, name, secret).await;
    }
    let secret = secret.as_str();
    let query = sqlx::query(server.table.sql(REMOVE_WAITER)).bind(secret).bind(name.as_bytes()).bind(secret);
    query.execute(connection).await?;
    Ok(())
}
