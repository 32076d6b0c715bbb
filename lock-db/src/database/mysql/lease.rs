//! One lease at a time, on private connections.

use std::time::Duration;

use sqlx::mysql::{MySqlConnection, MySqlQueryResult, MySqlRow};
use sqlx::{MySql, Row};

use super::errors::{DUPLICATE_KEY, number};
use crate::Kind;
use crate::database::{
    Claim, Fault, Grant, LockDatabase, LockRow, Place, Return, Server, Standing, outcome_unknown,
};
use crate::limits::micros;
use crate::secret::Secret;

const LOOK: &str = "
SELECT id, lock_kind, secret_key, owner, fencing_token,
       TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', create_time),
       TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', acquire_time),
       TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', expire_time),
       TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), expire_time), waiters
FROM distributed_lock WHERE lock_name = ?";

/// Not INSERT IGNORE, which also ignores a name that was cut, nor ON DUPLICATE KEY UPDATE, whose count of rows can't
/// tell the two cases apart on a connection of sqlx.
const CREATE: &str = "INSERT INTO distributed_lock (lock_name, lock_kind) VALUES (?, ?)";

/// What was there before is read in the inner SELECT: in an UPDATE of a join the order of assignments is not defined. The
/// new number is never below the clock's microseconds, so that neither a row that was cleaned away nor a failover that lost the
/// last grants brings a number back.
///
/// A row that somebody has locked is passed over, so that nobody else's turn on this connection waits for it. In a
/// transaction that would leave a lock on the gap behind it; by itself it does not.
const ACQUIRE: &str = "
UPDATE (
    SELECT id, fencing_token AS last_token, acquire_time AS last_time, secret_key = ? AS is_again,
        previous_token AS last_previous, waiters <> '' AND LEFT(waiters, 32) = ? AS was_first
    FROM distributed_lock FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND lock_kind = 'insert' AND (secret_key = ?
        OR (expire_time <= UTC_TIMESTAMP(6) AND (waiters = '' OR ? OR LEFT(waiters, 32) = ?)))
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN distributed_lock AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.fencing_token = IF(unlocked.is_again, unlocked.last_token, GREATEST(
        unlocked.last_token + 1, TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)))),
    lease.previous_token = IF(unlocked.is_again, unlocked.last_previous, unlocked.last_token),
    lease.acquire_time = IF(unlocked.is_again, unlocked.last_time, UTC_TIMESTAMP(6)),
    lease.secret_key = ?,
    lease.owner = ?,
    lease.expire_time = TIMESTAMPADD(MICROSECOND, ?, UTC_TIMESTAMP(6)),
    lease.waiters = IF(unlocked.was_first, SUBSTR(lease.waiters, 57), lease.waiters)";

/// `ACQUIRE` where the server answers what it has written, in one message. The row is there, so nothing is ever inserted:
/// that is the one statement which reads past locked rows, writes and answers.
///
/// `VALUES` are those of the claim; as the queue, its place in it. No assignment reads what one before it has written, so it is
/// the same whether they are made in turn or, by `SIMULTANEOUS_ASSIGNMENT`, at once.
const ACQUIRE_WITH_ANSWER: &str = "
INSERT INTO distributed_lock (id, lock_name, secret_key, owner, expire_time, waiters)
SELECT id, lock_name, ?, ?, TIMESTAMPADD(MICROSECOND, ?, UTC_TIMESTAMP(6)), ?
FROM distributed_lock AS free FORCE INDEX (distributed_lock_name)
WHERE lock_name = ? AND lock_kind = 'insert' AND (secret_key = ?
    OR (expire_time <= UTC_TIMESTAMP(6) AND (waiters = '' OR ? OR LEFT(waiters, 32) = ?)))
LIMIT 1
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE
    previous_token = IF(distributed_lock.secret_key = VALUES(secret_key),
        distributed_lock.previous_token, distributed_lock.fencing_token),
    fencing_token = IF(distributed_lock.secret_key = VALUES(secret_key), distributed_lock.fencing_token, GREATEST(
        distributed_lock.fencing_token + 1, TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)))),
    acquire_time = IF(distributed_lock.secret_key = VALUES(secret_key),
        distributed_lock.acquire_time, UTC_TIMESTAMP(6)),
    waiters = IF(distributed_lock.waiters <> '' AND LEFT(distributed_lock.waiters, 32) = VALUES(waiters),
        SUBSTR(distributed_lock.waiters, 57), distributed_lock.waiters),
    expire_time = VALUES(expire_time),
    owner = VALUES(owner),
    secret_key = VALUES(secret_key)
RETURNING fencing_token, id, waiters <> '', fencing_token - previous_token";

const GRANTED: &str = "
SELECT fencing_token, id, waiters <> '', fencing_token - previous_token
FROM distributed_lock WHERE lock_name = ? AND secret_key = ?";

const RELEASE: &str = "
UPDATE (
    SELECT id FROM distributed_lock FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND secret_key = ?
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN distributed_lock AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.expire_time = '1970-01-01 00:00:00',
    lease.waiters = IF(
        ? <> '' AND lease.waiters <> '' AND LENGTH(lease.waiters) < 3584 AND INSTR(lease.waiters, ?) = 0,
        CONCAT(lease.waiters, ?, LPAD(TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)) + 2000000, 16, '0'), ?),
        lease.waiters)";

/// `RELEASE` as MariaDB does it faster: see `ACQUIRE_WITH_ANSWER`.
const RELEASE_BY_INSERT: &str = "
INSERT INTO distributed_lock (id, lock_name, waiters)
SELECT id, lock_name, ? FROM distributed_lock AS held FORCE INDEX (distributed_lock_name)
WHERE lock_name = ? AND secret_key = ?
LIMIT 1
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE
    waiters = IF(
        VALUES(waiters) <> '' AND distributed_lock.waiters <> '' AND LENGTH(distributed_lock.waiters) < 3584
            AND INSTR(distributed_lock.waiters, VALUES(waiters)) = 0,
        CONCAT(distributed_lock.waiters, VALUES(waiters), LPAD(TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)) + 2000000, 16, '0'), ?),
        distributed_lock.waiters),
    expire_time = '1970-01-01 00:00:00'";

const RELEASE_LATER: &str = "
UPDATE (
    SELECT id, secret_key AS last_secret, TIMESTAMPADD(MICROSECOND, ?, acquire_time) AS moment
    FROM distributed_lock FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND secret_key = ?
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN distributed_lock AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.expire_time = IF(unlocked.moment > UTC_TIMESTAMP(6), unlocked.moment, '1970-01-01 00:00:00'),
    lease.secret_key = IF(unlocked.moment > UTC_TIMESTAMP(6), '', unlocked.last_secret)";

const STAND: &str = "
UPDATE (
    SELECT id FROM distributed_lock FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND lock_kind = 'insert' AND LENGTH(waiters) < 3584 AND INSTR(waiters, ?) = 0
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN distributed_lock AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.waiters = CONCAT(
    lease.waiters, ?, LPAD(TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)) + 2000000, 16, '0'), ?)";

/// Only on top of what was read before.
const SET_WAITERS: &str = "
UPDATE (
    SELECT id FROM distributed_lock FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND lock_kind = 'insert' AND waiters = ?
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN distributed_lock AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.waiters = ?";

const REMOVE_WAITER: &str = "
UPDATE (
    SELECT id, waiters AS last_waiters, INSTR(waiters, ?) AS place
    FROM distributed_lock FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND INSTR(waiters, ?) > 0
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN distributed_lock AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.waiters = INSERT(unlocked.last_waiters, unlocked.place, 56, '')";

const IS_OURS: &str = "SELECT 1 FROM distributed_lock WHERE lock_name = ? AND secret_key = ?";

pub(super) async fn look(connection: &mut MySqlConnection, name: &str) -> sqlx::Result<Option<LockRow>> {
    let row = sqlx::query(LOOK).bind(name.as_bytes()).fetch_optional(connection).await?;
    row.map(|row| {
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
            waiters: row.try_get(9)?,
        })
    })
    .transpose()
}

/// Looks first: a transaction may have locked the row already that somebody else of this process has just made, and the
/// lane must not wait for that.
pub(super) async fn create(connection: &mut MySqlConnection, name: &str, kind: Kind) -> sqlx::Result<()> {
    if MySql::look(connection, name).await?.is_some() {
        return Ok(());
    }
    match sqlx::query(CREATE).bind(name.as_bytes()).bind(kind.as_str()).execute(connection).await {
        Err(error) if number(&error) != Some(DUPLICATE_KEY) => Err(error),
        _ => Ok(()),
    }
}

pub(super) async fn acquire(
    connection: &mut MySqlConnection,
    server: Server,
    claim: &Claim,
) -> sqlx::Result<Option<Grant>> {
    let secret = claim.secret.as_str();
    let place = claim.place.as_ref().map_or("", Secret::as_str);
    let name = claim.name.as_bytes();
    if server.answers_writes {
        let query = sqlx::query(ACQUIRE_WITH_ANSWER).bind(secret).bind(&*claim.owner).bind(micros(claim.ttl));
        let query = query.bind(place).bind(name).bind(secret).bind(place.is_empty()).bind(place);
        // To the end of the answer: a commit that fails is told behind the row that would have been granted.
        return query.fetch_all(connection).await?.first().map(granted).transpose();
    }
    let acquired = sqlx::query(ACQUIRE)
        .bind(secret)
        .bind(place)
        .bind(name)
        .bind(secret)
        .bind(place.is_empty())
        .bind(place)
        .bind(secret)
        .bind(&*claim.owner)
        .bind(micros(claim.ttl))
        .execute(&mut *connection)
        .await?;
    if acquired.rows_affected() == 0 {
        return Ok(None);
    }
    // It is ours already: an error is no answer to the question whether it is.
    let row = sqlx::query(GRANTED).bind(name).bind(secret).fetch_optional(connection).await;
    let row = row.map_err(outcome_unknown)?;
    row.as_ref().map(granted).transpose()
}

fn granted(row: &MySqlRow) -> sqlx::Result<Grant> {
    let (fencing_token, id) = (row.try_get(0)?, row.try_get(1)?);
    Ok(Grant { id, fencing_token, others_wait: row.try_get(2)?, numbers: row.try_get(3)? })
}

pub(super) async fn release(
    connection: &mut MySqlConnection,
    server: Server,
    lease: &Return,
) -> sqlx::Result<Standing> {
    let Return { name, secret, place } = lease;
    let (place, listener) = Place::parts(place.as_ref());
    let query = if server.answers_writes {
        sqlx::query(RELEASE_BY_INSERT).bind(place).bind(name.as_bytes()).bind(secret.as_str()).bind(listener)
    } else {
        let query = sqlx::query(RELEASE).bind(name.as_bytes()).bind(secret.as_str());
        query.bind(place).bind(place).bind(place).bind(listener)
    };
    let released = query.execute(&mut *connection).await;
    released_or_not(connection, name, secret, released).await
}

pub(super) async fn release_later(
    connection: &mut MySqlConnection,
    name: &str,
    secret: &Secret,
    at_least: Duration,
) -> sqlx::Result<Standing> {
    let query = sqlx::query(RELEASE_LATER).bind(micros(at_least)).bind(name.as_bytes());
    let released = query.bind(secret.as_str()).execute(&mut *connection).await;
    released_or_not(connection, name, secret, released).await
}

async fn released_or_not(
    connection: &mut MySqlConnection,
    name: &str,
    secret: &Secret,
    released: sqlx::Result<MySqlQueryResult>,
) -> sqlx::Result<Standing> {
    match released {
        Ok(released) if released.rows_affected() > 0 => return Ok(Standing::Ours),
        Err(error) if !matches!(MySql::classify(&error), Fault::Busy | Fault::Deadlock) => return Err(error),
        _ => {}
    }
    let ours =
        sqlx::query(IS_OURS).bind(name.as_bytes()).bind(secret.as_str()).fetch_optional(connection).await?;
    Ok(if ours.is_some() { Standing::Busy } else { Standing::NotOurs })
}

pub(super) async fn stand(connection: &mut MySqlConnection, name: &str, place: &Place) -> sqlx::Result<bool> {
    let (secret, listener) = Place::parts(Some(place));
    let query = sqlx::query(STAND).bind(name.as_bytes()).bind(secret).bind(secret).bind(listener);
    Ok(query.execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn set_waiters(
    connection: &mut MySqlConnection,
    name: &str,
    before: &str,
    after: &str,
) -> sqlx::Result<bool> {
    let query = sqlx::query(SET_WAITERS).bind(name.as_bytes()).bind(before).bind(after);
    Ok(query.execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn remove_waiter(
    connection: &mut MySqlConnection,
    name: &str,
    secret: &Secret,
) -> sqlx::Result<()> {
    let secret = secret.as_str();
    let query = sqlx::query(REMOVE_WAITER).bind(secret).bind(name.as_bytes()).bind(secret);
    query.execute(connection).await.map(drop)
}
