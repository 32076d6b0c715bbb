//! Statements for leases on MariaDB. A statement that skips locked rows and writes the others is an
//! INSERT of existing rows.
//!
//! It is MariaDB's only statement that does all three: skip rows that another transaction has
//! locked, write, and return what it has written. It never inserts a row. (An UPDATE of a join with
//! the result of a SELECT … SKIP LOCKED would work without the returned rows, as on MySQL. But
//! MariaDB 10.11 crashes when such a statement is prepared while the table is altered online:
//! docs/reports/mariadb-prepare-multi-update.md.)
//!
//! `VALUES` are the requested values; for `waiters`, the key of a queue entry or the whole
//! queue. No assignment reads a column that an earlier one has written. So the result is the same
//! whether assignments are made in turn or, with `SIMULTANEOUS_ASSIGNMENT`, at once.
//!
//! With `innodb_autoinc_lock_mode = 1`, the default, such an insert locks the counter of the table
//! (AUTO-INC), although it uses no number. Inside a transaction it holds the lock until the
//! statement ends. Outside, it holds the lock until the commit, which with a binary log waits for
//! the disk. Such a server gets the insert inside a transaction, in the same message: see
//! `IN_TRANSACTION`.

mod new_rows;
mod queue;

use std::collections::HashSet;
use std::time::Duration;

use sqlx::mysql::{MySqlArguments, MySqlConnection, MySqlRow};
use sqlx::query::Query;
use sqlx::{MySql, Row};

pub(super) use self::new_rows::acquire as acquire_or_make;
pub(super) use self::queue::{dequeue, enqueue, set_waiters};
use super::mysql_family::batch::{batch_as_json, still_ours};
use super::mysql_family::lease::granted;
use super::mysql_family::queue::which;
use crate::database::StepError;
use crate::database::driver;
use crate::database::lock_row::FORCED;
use crate::database::wait_queue::key;
use crate::database::{
    Claim, Grant, LeaseStatus, QueueEntry, ReleaseClaim, Renewal, Renewed, Server, as_json, in_order,
    names_as_json,
};
use crate::name::Name;
use crate::options::micros;
use crate::secret::Secret;

/// Wraps a statement in a transaction, in one message. The server executes all of it or nothing.
const IN_TRANSACTION: &str = "
BEGIN NOT ATOMIC
    DECLARE EXIT HANDLER FOR SQLEXCEPTION BEGIN ROLLBACK; RESIGNAL; END;
    START TRANSACTION;
    {statement};
    COMMIT;
END";

const ACQUIRE: &str = concat!("
INSERT INTO {table} (id, lock_name, secret_key, owner, expire_time, ttl_micros, waiters)
SELECT id, lock_name, ?, ?, TIMESTAMPADD(MICROSECOND, ?, UTC_TIMESTAMP(6)), ?, ?
FROM {table} AS free FORCE INDEX (distributed_lock_name)
WHERE lock_name = ? AND lock_kind = 'insert' AND (secret_key = ?
    OR (expire_time <= UTC_TIMESTAMP(6) AND (ttl_micros <= 0 OR expire_time = '1970-01-01 00:00:00')
        AND (waiters = '' OR ? OR ", is_first!("waiters", "?"), ")))
LIMIT 1
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE
    previous_token = IF(distributed_lock.secret_key = VALUES(secret_key),
        distributed_lock.previous_token, distributed_lock.fencing_token),
    fencing_token = IF(distributed_lock.secret_key = VALUES(secret_key), distributed_lock.fencing_token, GREATEST(
        distributed_lock.fencing_token + 1, TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)))),
    acquire_time = IF(distributed_lock.secret_key = VALUES(secret_key),
        distributed_lock.acquire_time, UTC_TIMESTAMP(6)),
    waiters = ", without_own_first!("distributed_lock.waiters", "VALUES(waiters)"), ",
    expire_time = VALUES(expire_time),
    ttl_micros = VALUES(ttl_micros),
    owner = VALUES(owner),
    secret_key = VALUES(secret_key)
RETURNING fencing_token, id, waiters <> '', fencing_token - previous_token, secret_key");

const RELEASE: &str = concat!(
    "
INSERT INTO {table} (id, lock_name, waiters)
SELECT id, lock_name, ? FROM {table} AS held FORCE INDEX (distributed_lock_name)
WHERE lock_name = ? AND secret_key = ?
LIMIT 1
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE
    waiters = ",
    behind_others!("distributed_lock.waiters", "VALUES(waiters)", "?"),
    ",
    expire_time = '1970-01-01 00:00:00',
    ttl_micros = 0
RETURNING id"
);

/// See `OperateDriver::force_release`.
const FORCE_RELEASE: &str = "
INSERT INTO {table} (id, lock_name, secret_key)
SELECT id, lock_name, ? FROM {table} AS held FORCE INDEX (distributed_lock_name)
WHERE lock_name = ? AND fencing_token = ? AND lock_kind = 'insert' AND expire_time > '1970-01-01 00:00:00'
LIMIT 1
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE
    expire_time = '1970-01-01 00:00:00',
    ttl_micros = 0,
    secret_key = VALUES(secret_key),
    fencing_token = distributed_lock.fencing_token + 1
RETURNING id";

const RELEASE_LATER: &str = "
INSERT INTO {table} (id, lock_name, expire_time, ttl_micros)
SELECT id, lock_name, TIMESTAMPADD(MICROSECOND, ?, LEAST(acquire_time, UTC_TIMESTAMP(6))), 0
FROM {table} AS held FORCE INDEX (distributed_lock_name)
WHERE lock_name = ? AND secret_key = ?
LIMIT 1
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE
    secret_key = IF(VALUES(expire_time) > UTC_TIMESTAMP(6), '', distributed_lock.secret_key),
    ttl_micros = IF(VALUES(expire_time) > UTC_TIMESTAMP(6),
        -TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), VALUES(expire_time)), 0),
    expire_time = IF(VALUES(expire_time) > UTC_TIMESTAMP(6), VALUES(expire_time), '1970-01-01 00:00:00')
RETURNING id";

/// See `mysql::GIVE_NOTICE`.
const GIVE_NOTICE: &str = "
INSERT INTO {table} (id, lock_name, expire_time, ttl_micros)
SELECT id, lock_name,
    IF(expire_time > TIMESTAMPADD(MICROSECOND, ABS(ttl_micros) + 2000000, SYSDATE(6)),
        TIMESTAMPADD(MICROSECOND, GREATEST(ABS(ttl_micros), 1000000), SYSDATE(6)),
        GREATEST(expire_time, TIMESTAMPADD(MICROSECOND, LEAST(ttl_micros DIV 5, 1000000), SYSDATE(6)))),
    IF(expire_time > TIMESTAMPADD(MICROSECOND, ABS(ttl_micros) + 2000000, SYSDATE(6)), ttl_micros, 0)
FROM JSON_TABLE(?, '$[*]' COLUMNS (asked_name VARCHAR(510) PATH '$')) AS asked
STRAIGHT_JOIN {table} AS due FORCE INDEX (distributed_lock_name) ON due.lock_name = UNHEX(CONVERT(asked.asked_name USING ascii))
WHERE lock_kind = 'insert' AND expire_time > '1970-01-01 00:00:00'
    AND ((ttl_micros > 0
            AND expire_time <= TIMESTAMPADD(MICROSECOND, LEAST(ttl_micros DIV 5, 1000000), SYSDATE(6)))
        OR expire_time > TIMESTAMPADD(MICROSECOND, ABS(ttl_micros) + 2000000, SYSDATE(6)))
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE expire_time = VALUES(expire_time), ttl_micros = VALUES(ttl_micros)
RETURNING lock_name";

const SETTLE: &str = "
INSERT INTO {table} (id, lock_name)
SELECT id, lock_name
FROM JSON_TABLE(?, '$[*]' COLUMNS (asked_name VARCHAR(510) PATH '$')) AS asked
STRAIGHT_JOIN {table} AS free FORCE INDEX (distributed_lock_name) ON free.lock_name = UNHEX(CONVERT(asked.asked_name USING ascii))
WHERE lock_kind = 'insert' AND expire_time <= UTC_TIMESTAMP(6)
    AND (ttl_micros <= 0 OR expire_time = '1970-01-01 00:00:00')
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE expire_time = '1970-01-01 00:00:00', ttl_micros = 0, secret_key = ''
RETURNING id";

/// See `mysql::RENEW`.
const RENEW: &str = "
INSERT INTO {table} (id, lock_name, expire_time, ttl_micros)
SELECT lease.id, lease.lock_name, TIMESTAMPADD(MICROSECOND, asked.ttl, UTC_TIMESTAMP(6)), asked.ttl
FROM JSON_TABLE(?, '$[*]' COLUMNS (
        id BIGINT PATH '$[0]', secret_key VARCHAR(32) /*M!101100 CHARACTER SET ascii */ PATH '$[1]', ttl BIGINT PATH '$[2]',
        fencing_token BIGINT PATH '$[3]')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = asked.id
WHERE lease.secret_key = asked.secret_key AND lease.fencing_token = asked.fencing_token
    AND lease.expire_time > '1970-01-01 00:00:00'
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE
    expire_time = LEAST(GREATEST(distributed_lock.expire_time, VALUES(expire_time)),
        TIMESTAMPADD(MICROSECOND, 2000000, VALUES(expire_time))),
    ttl_micros = VALUES(ttl_micros)
RETURNING secret_key";

/// `RELEASE` (entries without a `ttl`, which get the deadline of a free lock) and `ACQUIRE` for
/// many leases at once. The comments save conversions on versions of MariaDB that are known to read
/// a character set there.
macro_rules! batch {
    ($asked:literal) => {
        concat!("
INSERT INTO {table} (id, lock_name, secret_key, expire_time, ttl_micros, waiters)
SELECT lease.id, lease.lock_name, asked.secret_key,
    IF(asked.ttl > 0, TIMESTAMPADD(MICROSECOND, asked.ttl, UTC_TIMESTAMP(6)), '1970-01-01 00:00:00'),
    asked.ttl, asked.queue_key
FROM JSON_TABLE(", $asked, ", '$[*]' COLUMNS (
        lock_name VARCHAR(510) /*M!101100 CHARACTER SET ascii */ PATH '$[0]',
        secret_key VARCHAR(32) /*M!101100 CHARACTER SET ascii */ PATH '$[1]', ttl BIGINT PATH '$[2]',
        queue_key VARCHAR(", layout!(key), ") /*M!101100 CHARACTER SET ascii */ PATH '$[3]')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name)
    ON lease.lock_name = UNHEX(asked.lock_name)
WHERE lease.lock_kind = 'insert'
    AND (lease.secret_key = asked.secret_key
        OR (asked.ttl > 0 AND lease.expire_time <= UTC_TIMESTAMP(6)
            AND (lease.ttl_micros <= 0 OR lease.expire_time = '1970-01-01 00:00:00')
            AND (lease.waiters = '' OR asked.queue_key = '' OR ", is_first!("lease.waiters", "asked.queue_key"), ")))
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE
    previous_token = IF(distributed_lock.secret_key = VALUES(secret_key),
        distributed_lock.previous_token, distributed_lock.fencing_token),
    fencing_token = IF(distributed_lock.secret_key = VALUES(secret_key), distributed_lock.fencing_token, GREATEST(
        distributed_lock.fencing_token + 1, TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)))),
    acquire_time = IF(distributed_lock.secret_key = VALUES(secret_key),
        distributed_lock.acquire_time, UTC_TIMESTAMP(6)),
    owner = IF(VALUES(expire_time) = '1970-01-01 00:00:00', distributed_lock.owner, ?),
    waiters = IF(VALUES(expire_time) = '1970-01-01 00:00:00',
        ", behind_others!("distributed_lock.waiters", "VALUES(waiters)", "?"), ",
        ", without_own_first!("distributed_lock.waiters", "VALUES(waiters)"), "),
    expire_time = VALUES(expire_time),
    ttl_micros = VALUES(ttl_micros),
    secret_key = VALUES(secret_key)
RETURNING secret_key, fencing_token, id, TRUE, waiters <> '', fencing_token - previous_token")
    };
}
const BATCH: &str = batch!("?");
/// For `new_rows`.
const BATCH_OF_ASKED: &str = batch!("asked");

/// `ACQUIRE` for several names, which have no queue entries: takes those that are free.
macro_rules! acquire_all {
    ($asked:literal) => {
        concat!("
INSERT INTO {table} (id, lock_name, secret_key, expire_time, ttl_micros)
SELECT lease.id, lease.lock_name, asked.secret_key, TIMESTAMPADD(MICROSECOND, asked.ttl, UTC_TIMESTAMP(6)), asked.ttl
FROM JSON_TABLE(", $asked, ", '$[*]' COLUMNS (
        lock_name VARCHAR(510) /*M!101100 CHARACTER SET ascii */ PATH '$[0]',
        secret_key VARCHAR(32) /*M!101100 CHARACTER SET ascii */ PATH '$[1]', ttl BIGINT PATH '$[2]')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name)
    ON lease.lock_name = UNHEX(asked.lock_name)
WHERE lease.lock_kind = 'insert'
    AND (lease.secret_key = asked.secret_key
        OR (lease.expire_time <= UTC_TIMESTAMP(6)
            AND (lease.ttl_micros <= 0 OR lease.expire_time = '1970-01-01 00:00:00')))
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE
    previous_token = IF(distributed_lock.secret_key = VALUES(secret_key),
        distributed_lock.previous_token, distributed_lock.fencing_token),
    fencing_token = IF(distributed_lock.secret_key = VALUES(secret_key), distributed_lock.fencing_token, GREATEST(
        distributed_lock.fencing_token + 1, TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)))),
    acquire_time = IF(distributed_lock.secret_key = VALUES(secret_key),
        distributed_lock.acquire_time, UTC_TIMESTAMP(6)),
    expire_time = VALUES(expire_time),
    ttl_micros = VALUES(ttl_micros),
    owner = ?,
    secret_key = VALUES(secret_key)
RETURNING secret_key, fencing_token, id, waiters <> '', fencing_token - previous_token")
    };
}

const ACQUIRE_ALL: &str = acquire_all!("?");
/// For `ALL_OR_NONE`.
const ACQUIRE_ASKED: &str = acquire_all!("asked");

/// `ACQUIRE_ALL` for all or none, in one message: the rows are locked and counted first, and
/// written only if all of them were locked.
const ALL_OR_NONE: &str = "
BEGIN NOT ATOMIC
    DECLARE asked LONGTEXT CHARACTER SET ascii DEFAULT ?;
    DECLARE free BIGINT;
    DECLARE EXIT HANDLER FOR SQLEXCEPTION BEGIN ROLLBACK; RESIGNAL; END;
    START TRANSACTION;
    SELECT COUNT(*) INTO free
    FROM JSON_TABLE(asked, '$[*]' COLUMNS (
            lock_name VARCHAR(510) /*M!101100 CHARACTER SET ascii */ PATH '$[0]',
            secret_key VARCHAR(32) /*M!101100 CHARACTER SET ascii */ PATH '$[1]')) AS asked
    STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name)
        ON lease.lock_name = UNHEX(asked.lock_name)
    WHERE lease.lock_kind = 'insert'
        AND (lease.secret_key = asked.secret_key
            OR (lease.expire_time <= UTC_TIMESTAMP(6)
                AND (lease.ttl_micros <= 0 OR lease.expire_time = '1970-01-01 00:00:00')))
    FOR UPDATE SKIP LOCKED;
    IF free = ? THEN
        {statement};
    END IF;
    COMMIT;
END";

const UNLOCKED: &str = "
SELECT lease.lock_name
FROM JSON_TABLE(?, '$[*]' COLUMNS (asked_name VARCHAR(510) PATH '$')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name) ON lease.lock_name = UNHEX(CONVERT(asked.asked_name USING ascii))
FOR UPDATE SKIP LOCKED";

/// Which of the leases that `BATCH` skipped are ours.
const WHICH_ARE_OURS: &str = "
SELECT lease.secret_key, lease.fencing_token, lease.id, FALSE, FALSE, 1
FROM JSON_TABLE(?, '$[*]' COLUMNS (
        lock_name VARCHAR(510) PATH '$[0]', secret_key VARCHAR(32) /*M!101100 CHARACTER SET ascii */ PATH '$[1]', ttl BIGINT PATH '$[2]')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name)
    ON lease.lock_name = UNHEX(asked.lock_name)
WHERE lease.secret_key = asked.secret_key";

fn insert(server: &Server, statement: &'static str) -> Query<'static, MySql, MySqlArguments> {
    let table = &server.table;
    let frame = server.keeps_counter.then_some(IN_TRANSACTION);
    sqlx::query(frame.map_or_else(|| table.sql(statement), |frame| table.sql_in(frame, statement)))
}

/// Whether the statement wrote anything. Reads the result to its end, because a failed commit is
/// reported after the rows.
async fn wrote(
    connection: &mut MySqlConnection,
    query: Query<'_, MySql, MySqlArguments>,
) -> driver::Result<bool> {
    Ok(!query.fetch_all(connection).await?.is_empty())
}

pub(super) async fn acquire(
    connection: &mut MySqlConnection,
    server: &Server,
    claim: &Claim,
) -> driver::Result<Option<Grant>> {
    taken(connection, bind_claim(insert(server, ACQUIRE), server, claim), claim).await
}

/// Binds the values of `ACQUIRE`.
fn bind_claim<'q>(
    query: Query<'q, MySql, MySqlArguments>,
    server: &Server,
    claim: &Claim,
) -> Query<'q, MySql, MySqlArguments> {
    let (secret, key) = (claim.secret.as_str().to_owned(), claim.entry.as_ref().map(key).unwrap_or_default());
    let (name, ttl, may_overtake) = (claim.name.as_bytes().to_vec(), micros(claim.ttl), key.is_empty());
    let owner = server.storable(&claim.owner).into_owned();
    let query = query.bind(secret.clone()).bind(owner).bind(ttl).bind(ttl).bind(key.clone());
    query.bind(name).bind(secret).bind(may_overtake).bind(key)
}

/// The grant of a claim, if its statement has written the row.
async fn taken(
    connection: &mut MySqlConnection,
    query: Query<'_, MySql, MySqlArguments>,
    claim: &Claim,
) -> driver::Result<Option<Grant>> {
    // Reads the result to its end, as `wrote` does.
    let rows = query.fetch_all(connection).await?;
    // A trigger may have changed the row.
    let is_ours =
        |row: &&MySqlRow| matches!(row.try_get::<&str, _>(4), Ok(found) if found == claim.secret.as_str());
    rows.first().filter(is_ours).map(granted).transpose()
}

pub(super) async fn release(
    connection: &mut MySqlConnection,
    server: &Server,
    lease: &ReleaseClaim,
) -> driver::Result<bool> {
    let (key, rest) = QueueEntry::parts(lease.entry.as_ref());
    let query = insert(server, RELEASE).bind(key).bind(lease.name.as_bytes());
    wrote(connection, query.bind(lease.secret.as_str()).bind(rest)).await
}

pub(super) async fn force_release(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    fencing_token: i64,
) -> driver::Result<bool> {
    let query = insert(server, FORCE_RELEASE).bind(FORCED).bind(name.as_bytes());
    wrote(connection, query.bind(fencing_token)).await
}

pub(super) async fn release_later(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    secret: &Secret,
    at_least: Duration,
) -> driver::Result<bool> {
    let query = insert(server, RELEASE_LATER).bind(micros(at_least));
    wrote(connection, query.bind(name.as_bytes()).bind(secret.as_str())).await
}

pub(super) async fn give_notice(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &[Name],
) -> driver::Result<Vec<bool>> {
    let query = insert(server, GIVE_NOTICE).bind(names_as_json(names));
    which(names.iter(), &query.fetch_all(connection).await?)
}

/// Settles names as `names_as_json` writes them.
pub(super) async fn settle(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &str,
) -> driver::Result<()> {
    wrote(connection, insert(server, SETTLE).bind(names)).await.map(drop)
}

pub(super) async fn renew(
    connection: &mut MySqlConnection,
    server: &Server,
    leases: &[Renewal],
) -> driver::Result<Renewed> {
    let json = as_json(leases);
    let renewed = insert(server, RENEW).bind(&json).fetch_all(&mut *connection).await?;
    let renewed: Vec<String> = renewed.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    let (mut found, mut read_at) = (Vec::with_capacity(leases.len()), None);
    if renewed.len() < leases.len() {
        let (still_ours, since) = still_ours(connection, server, &json).await?;
        read_at = Some(since);
        // The statement above has reported which leases were renewed.
        for (secret, status) in still_ours {
            let status = if status == LeaseStatus::StillOurs { LeaseStatus::Busy } else { status };
            found.push((secret, status));
        }
    }
    // Renewed leases come last, so that their result counts.
    found.extend(renewed.into_iter().map(|secret| (secret, LeaseStatus::Ours)));
    Ok(in_order(leases, found, read_at))
}

/// Returns the rows that were written, and the skipped rows that are ours.
pub(super) async fn batch(
    connection: &mut MySqlConnection,
    server: &Server,
    releases: &[ReleaseClaim],
    claims: &[Claim],
    owner: &str,
    rest: &str,
    makes_rows: bool,
) -> driver::Result<Vec<MySqlRow>> {
    let known = batch_as_json(releases, claims.iter().filter(|claim| !(makes_rows && claim.makes_row)));
    let mut rows = if makes_rows {
        new_rows::batch(connection, server, &known, claims, owner, rest).await?
    } else {
        let query = insert(server, BATCH).bind(&known).bind(owner).bind(rest);
        query.fetch_all(&mut *connection).await?
    };
    let mut done = HashSet::with_capacity(rows.len());
    for row in &rows {
        done.insert(row.try_get::<String, _>(0)?);
    }
    if releases.iter().any(|one| !done.contains(one.secret.as_str())) {
        // The statement above is already committed.
        let ours = sqlx::query(server.table.sql(WHICH_ARE_OURS)).bind(known).fetch_all(connection).await;
        rows.extend(ours.map_err(StepError::outcome_unknown)?);
    }
    Ok(rows)
}

/// Takes several leases, which have no queue entries, all or none. `None`: not all of them are free.
/// Unless they are the whole request, those that are free are taken all the same, and the caller
/// rolls back.
pub(super) async fn acquire_all(
    connection: &mut MySqlConnection,
    server: &Server,
    claims: &[Claim],
    is_whole: bool,
) -> driver::Result<Option<Vec<MySqlRow>>> {
    let (asked, all) = (batch_as_json(&[], claims.iter()), i64::try_from(claims.len()).unwrap_or(i64::MAX));
    let owner = claims.first().map_or("".into(), |claim| server.storable(&claim.owner));
    let query = if is_whole {
        // Inside it, `asked` is a variable.
        sqlx::query(server.table.sql_in(ALL_OR_NONE, ACQUIRE_ASKED)).bind(asked).bind(all)
    } else {
        sqlx::query(server.table.sql(ACQUIRE_ALL)).bind(asked)
    };
    let rows = query.bind(owner.as_ref()).fetch_all(connection).await?;
    let is_some = if is_whole { !rows.is_empty() } else { rows.len() == claims.len() };
    Ok(is_some.then_some(rows))
}

/// Which of the names, as `names_as_json` writes them, have rows that are not locked.
pub(super) async fn unlocked(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &str,
) -> driver::Result<Vec<MySqlRow>> {
    Ok(sqlx::query(server.table.sql(UNLOCKED)).bind(names).fetch_all(connection).await?)
}
