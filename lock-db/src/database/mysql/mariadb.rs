//! Leases on MariaDB: everything that passes over locked rows and writes the others is an INSERT of rows that are there.
//!
//! It is the one statement of MariaDB that does all three: skip what another transaction has locked, write, and answer what it has
//! written. Nothing is ever inserted. (An UPDATE of a join over what a SELECT … SKIP LOCKED found would do without the answer, as on
//! MySQL. But MariaDB 10.11 dies when such a statement is prepared while the table is changed online:
//! docs/reports/mariadb-prepare-multi-update.md.)
//!
//! `VALUES` are those that are asked for; as the queue, a place in it. No assignment reads what one before it has written, so it is
//! the same whether they are made in turn or, by `SIMULTANEOUS_ASSIGNMENT`, at once.
//!
//! With `innodb_autoinc_lock_mode = 1`, the default, such an insert locks the counter of the table (AUTO-INC), although it counts
//! nothing: to the end of the statement in a transaction; by itself until it is committed, which with a binary log takes until
//! that is on disk. There it goes in a transaction, in the same message: see `IN_TRANSACTION`.

use std::collections::HashSet;
use std::time::Duration;

use sqlx::mysql::{MySqlArguments, MySqlConnection, MySqlRow};
use sqlx::query::Query;
use sqlx::{MySql, Row};

use super::lease::granted;
use super::together::still_ours;
use crate::database::{
    Claim, Grant, Place, Renewal, Renewed, Return, Server, Standing, as_json, in_order, outcome_unknown,
};
use crate::limits::micros;
use crate::secret::Secret;

/// One message, of which the server carries out all or nothing.
const IN_TRANSACTION: &str = "
BEGIN NOT ATOMIC
    DECLARE EXIT HANDLER FOR SQLEXCEPTION BEGIN ROLLBACK; RESIGNAL; END;
    START TRANSACTION;
    {statement};
    COMMIT;
END";

const ACQUIRE: &str = "
INSERT INTO {table} (id, lock_name, secret_key, owner, expire_time, ttl_micros, waiters)
SELECT id, lock_name, ?, ?, TIMESTAMPADD(MICROSECOND, ?, UTC_TIMESTAMP(6)), ?, ?
FROM {table} AS free FORCE INDEX (distributed_lock_name)
WHERE lock_name = ? AND lock_kind = 'insert' AND (secret_key = ?
    OR (expire_time <= UTC_TIMESTAMP(6) AND (ttl_micros <= 0 OR expire_time = '1970-01-01 00:00:00')
        AND (waiters = '' OR ? OR LEFT(waiters, 32) = ?)))
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
    ttl_micros = VALUES(ttl_micros),
    owner = VALUES(owner),
    secret_key = VALUES(secret_key)
RETURNING fencing_token, id, waiters <> '', fencing_token - previous_token, secret_key";

const RELEASE: &str = "
INSERT INTO {table} (id, lock_name, waiters)
SELECT id, lock_name, ? FROM {table} AS held FORCE INDEX (distributed_lock_name)
WHERE lock_name = ? AND secret_key = ?
LIMIT 1
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE
    waiters = IF(
        VALUES(waiters) <> '' AND distributed_lock.waiters <> '' AND LENGTH(distributed_lock.waiters) < 3584
            AND INSTR(distributed_lock.waiters, VALUES(waiters)) = 0,
        CONCAT(distributed_lock.waiters, VALUES(waiters), LPAD(TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)) + 2000000, 16, '0'), ?),
        distributed_lock.waiters),
    expire_time = '1970-01-01 00:00:00',
    ttl_micros = 0
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

/// See `lease::GIVE_NOTICE`.
const GIVE_NOTICE: &str = "
INSERT INTO {table} (id, lock_name, expire_time, ttl_micros)
SELECT id, lock_name,
    IF(expire_time > TIMESTAMPADD(MICROSECOND, ABS(ttl_micros) + 2000000, SYSDATE(6)),
        TIMESTAMPADD(MICROSECOND, GREATEST(ABS(ttl_micros), 1000000), SYSDATE(6)),
        GREATEST(expire_time, TIMESTAMPADD(MICROSECOND, LEAST(ttl_micros DIV 5, 1000000), SYSDATE(6)))),
    IF(expire_time > TIMESTAMPADD(MICROSECOND, ABS(ttl_micros) + 2000000, SYSDATE(6)), ttl_micros, 0)
FROM JSON_TABLE(?, '$[*]' COLUMNS (asked_name VARCHAR(510) PATH '$')) AS asked
STRAIGHT_JOIN {table} AS due FORCE INDEX (distributed_lock_name) ON due.lock_name = UNHEX(asked.asked_name)
WHERE lock_kind = 'insert' AND expire_time > '1970-01-01 00:00:00'
    AND ((ttl_micros > 0
            AND expire_time <= TIMESTAMPADD(MICROSECOND, LEAST(ttl_micros DIV 5, 1000000), SYSDATE(6)))
        OR expire_time > TIMESTAMPADD(MICROSECOND, ABS(ttl_micros) + 2000000, SYSDATE(6)))
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE expire_time = VALUES(expire_time), ttl_micros = VALUES(ttl_micros)
RETURNING id";

const SETTLE: &str = "
INSERT INTO {table} (id, lock_name)
SELECT id, lock_name FROM {table} AS free FORCE INDEX (distributed_lock_name)
WHERE lock_name = ? AND lock_kind = 'insert' AND expire_time <= UTC_TIMESTAMP(6)
    AND (ttl_micros <= 0 OR expire_time = '1970-01-01 00:00:00')
LIMIT 1
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE expire_time = '1970-01-01 00:00:00', ttl_micros = 0, secret_key = ''
RETURNING id";

const STAND: &str = "
INSERT INTO {table} (id, lock_name, waiters)
SELECT id, lock_name, ? FROM {table} AS queue FORCE INDEX (distributed_lock_name)
WHERE lock_name = ? AND lock_kind = 'insert' AND LENGTH(waiters) < 3584 AND INSTR(waiters, ?) = 0
LIMIT 1
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE waiters = CONCAT(distributed_lock.waiters, VALUES(waiters),
    LPAD(TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)) + 2000000, 16, '0'), ?)
RETURNING id";

/// Only on top of what was read before.
const SET_WAITERS: &str = "
INSERT INTO {table} (id, lock_name, waiters)
SELECT id, lock_name, ? FROM {table} AS queue FORCE INDEX (distributed_lock_name)
WHERE lock_name = ? AND lock_kind = 'insert' AND waiters = ?
LIMIT 1
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE waiters = VALUES(waiters)
RETURNING id";

const REMOVE_WAITER: &str = "
INSERT INTO {table} (id, lock_name, waiters)
SELECT id, lock_name, INSERT(waiters, INSTR(waiters, ?), 56, '')
FROM {table} AS queue FORCE INDEX (distributed_lock_name)
WHERE lock_name = ? AND INSTR(waiters, ?) > 0
LIMIT 1
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE waiters = VALUES(waiters)
RETURNING id";

/// See `together::RENEW`.
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

/// `RELEASE` (those without a `ttl`, which get the time of a lock that is free) and `ACQUIRE` for many at once. The comments save
/// conversions where it is known that MariaDB reads a character set there.
const EXCHANGE: &str = "
INSERT INTO {table} (id, lock_name, secret_key, expire_time, ttl_micros, waiters)
SELECT lease.id, lease.lock_name, asked.secret_key,
    IF(asked.ttl > 0, TIMESTAMPADD(MICROSECOND, asked.ttl, UTC_TIMESTAMP(6)), '1970-01-01 00:00:00'),
    asked.ttl, asked.place
FROM JSON_TABLE(?, '$[*]' COLUMNS (
        lock_name VARCHAR(510) /*M!101100 CHARACTER SET ascii */ PATH '$[0]',
        secret_key VARCHAR(32) /*M!101100 CHARACTER SET ascii */ PATH '$[1]', ttl BIGINT PATH '$[2]',
        place VARCHAR(32) /*M!101100 CHARACTER SET ascii */ PATH '$[3]')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name)
    ON lease.lock_name = UNHEX(asked.lock_name)
WHERE lease.lock_kind = 'insert'
    AND (lease.secret_key = asked.secret_key
        OR (asked.ttl > 0 AND lease.expire_time <= UTC_TIMESTAMP(6)
            AND (lease.ttl_micros <= 0 OR lease.expire_time = '1970-01-01 00:00:00')
            AND (lease.waiters = '' OR asked.place = '' OR LEFT(lease.waiters, 32) = asked.place)))
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE
    previous_token = IF(distributed_lock.secret_key = VALUES(secret_key),
        distributed_lock.previous_token, distributed_lock.fencing_token),
    fencing_token = IF(distributed_lock.secret_key = VALUES(secret_key), distributed_lock.fencing_token, GREATEST(
        distributed_lock.fencing_token + 1, TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)))),
    acquire_time = IF(distributed_lock.secret_key = VALUES(secret_key),
        distributed_lock.acquire_time, UTC_TIMESTAMP(6)),
    owner = IF(VALUES(expire_time) = '1970-01-01 00:00:00', distributed_lock.owner, ?),
    waiters = CASE WHEN distributed_lock.waiters = '' THEN ''
        WHEN VALUES(expire_time) > '1970-01-01 00:00:00' AND LEFT(distributed_lock.waiters, 32) = VALUES(waiters)
            THEN SUBSTR(distributed_lock.waiters, 57)
        WHEN VALUES(expire_time) = '1970-01-01 00:00:00' AND VALUES(waiters) <> ''
                AND LENGTH(distributed_lock.waiters) < 3584 AND INSTR(distributed_lock.waiters, VALUES(waiters)) = 0
            THEN CONCAT(distributed_lock.waiters, VALUES(waiters), LPAD(TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)) + 2000000, 16, '0'), ?)
        ELSE distributed_lock.waiters END,
    expire_time = VALUES(expire_time),
    ttl_micros = VALUES(ttl_micros),
    secret_key = VALUES(secret_key)
RETURNING secret_key, fencing_token, id, TRUE, waiters <> '', fencing_token - previous_token";

/// `ACQUIRE` for several names, which have no places in queues: those that are free.
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
/// In `ALL_OR_NONE`.
const ACQUIRE_ASKED: &str = acquire_all!("asked");

/// `ACQUIRE_ALL` for all or none, in one message: the rows are locked and counted first, and written when all of them are there.
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
STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name) ON lease.lock_name = UNHEX(asked.asked_name)
FOR UPDATE SKIP LOCKED";

/// After `EXCHANGE`, which of those that it passed over are ours.
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

/// Whether it wrote anything. To the end of the answer: a commit that fails is told behind the rows.
async fn wrote(
    connection: &mut MySqlConnection,
    query: Query<'_, MySql, MySqlArguments>,
) -> sqlx::Result<bool> {
    Ok(!query.fetch_all(connection).await?.is_empty())
}

pub(super) async fn acquire(
    connection: &mut MySqlConnection,
    server: &Server,
    claim: &Claim,
) -> sqlx::Result<Option<Grant>> {
    let (secret, place) = (claim.secret.as_str(), claim.place.as_ref().map_or("", Secret::as_str));
    let (name, ttl) = (claim.name.as_bytes(), micros(claim.ttl));
    let query = insert(server, ACQUIRE).bind(secret).bind(server.storable(&claim.owner)).bind(ttl).bind(ttl);
    let query = query.bind(place).bind(name).bind(secret).bind(place.is_empty()).bind(place);
    // To the end of the answer, as in `wrote`.
    let rows = query.fetch_all(connection).await?;
    // A trigger may have its own idea of the row.
    let is_ours = |row: &&MySqlRow| matches!(row.try_get::<&str, _>(4), Ok(found) if found == secret);
    rows.first().filter(is_ours).map(granted).transpose()
}

pub(super) async fn release(
    connection: &mut MySqlConnection,
    server: &Server,
    lease: &Return,
) -> sqlx::Result<bool> {
    let (place, listener) = Place::parts(lease.place.as_ref());
    let query = insert(server, RELEASE).bind(place).bind(lease.name.as_bytes());
    wrote(connection, query.bind(lease.secret.as_str()).bind(listener)).await
}

pub(super) async fn release_later(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    secret: &Secret,
    at_least: Duration,
) -> sqlx::Result<bool> {
    let query = insert(server, RELEASE_LATER).bind(micros(at_least));
    wrote(connection, query.bind(name.as_bytes()).bind(secret.as_str())).await
}

/// To names as `names_as_json` writes them.
pub(super) async fn give_notice(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &str,
) -> sqlx::Result<u64> {
    let given = insert(server, GIVE_NOTICE).bind(names).fetch_all(connection).await?;
    Ok(u64::try_from(given.len()).unwrap_or(u64::MAX))
}

pub(super) async fn settle(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
) -> sqlx::Result<bool> {
    wrote(connection, insert(server, SETTLE).bind(name.as_bytes())).await
}

pub(super) async fn stand(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    place: &Place,
) -> sqlx::Result<bool> {
    let (secret, listener) = Place::parts(Some(place));
    let query = insert(server, STAND).bind(secret).bind(name.as_bytes());
    wrote(connection, query.bind(secret).bind(listener)).await
}

pub(super) async fn set_waiters(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    before: &str,
    after: &str,
) -> sqlx::Result<bool> {
    let query = insert(server, SET_WAITERS).bind(after).bind(name.as_bytes()).bind(before);
    wrote(connection, query).await
}

pub(super) async fn remove_waiter(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    secret: &Secret,
) -> sqlx::Result<()> {
    let secret = secret.as_str();
    let query = insert(server, REMOVE_WAITER).bind(secret).bind(name.as_bytes()).bind(secret);
    wrote(connection, query).await.map(drop)
}

pub(super) async fn renew(
    connection: &mut MySqlConnection,
    server: &Server,
    leases: &[Renewal],
) -> sqlx::Result<Renewed> {
    let json = as_json(leases);
    let renewed = insert(server, RENEW).bind(&json).fetch_all(&mut *connection).await?;
    let renewed: Vec<String> = renewed.iter().map(|row| row.try_get(0)).collect::<Result<_, _>>()?;
    let (mut found, mut looked) = (Vec::with_capacity(leases.len()), None);
    if renewed.len() < leases.len() {
        let (still_ours, since) = still_ours(connection, server, &json).await?;
        looked = Some(since);
        // Whether one was renewed was told above.
        for (secret, standing) in still_ours {
            let standing = if standing == Standing::StillOurs { Standing::Busy } else { standing };
            found.push((secret, standing));
        }
    }
    // Those that were renewed last: they count.
    found.extend(renewed.into_iter().map(|secret| (secret, Standing::Ours)));
    Ok(in_order(leases, found, looked))
}

/// The rows that were written, and those of ours that were passed over.
pub(super) async fn exchange(
    connection: &mut MySqlConnection,
    server: &Server,
    asked: &str,
    owner: &str,
    listener: &str,
    returns: &[Return],
) -> sqlx::Result<Vec<MySqlRow>> {
    let query = insert(server, EXCHANGE).bind(asked).bind(owner).bind(listener);
    let mut rows = query.fetch_all(&mut *connection).await?;
    let mut done = HashSet::with_capacity(rows.len());
    for row in &rows {
        done.insert(row.try_get::<String, _>(0)?);
    }
    if returns.iter().any(|one| !done.contains(one.secret.as_str())) {
        // What is there already stands.
        let ours = sqlx::query(server.table.sql(WHICH_ARE_OURS)).bind(asked).fetch_all(connection).await;
        rows.extend(ours.map_err(outcome_unknown)?);
    }
    Ok(rows)
}

/// Those of several claims that could be taken: all or none with `all`, which is how many they are. The secret comes first.
pub(super) async fn acquire_all(
    connection: &mut MySqlConnection,
    server: &Server,
    asked: &str,
    owner: &str,
    all: Option<i64>,
) -> sqlx::Result<Vec<MySqlRow>> {
    let query = match all {
        Some(all) => {
            // `asked` is a variable in it.
            sqlx::query(server.table.sql_in(ALL_OR_NONE, ACQUIRE_ASKED)).bind(asked).bind(all)
        }
        None => sqlx::query(server.table.sql(ACQUIRE_ALL)).bind(asked),
    };
    query.bind(owner).fetch_all(connection).await
}

pub(super) async fn unlocked(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &str,
) -> sqlx::Result<Vec<MySqlRow>> {
    sqlx::query(server.table.sql(UNLOCKED)).bind(names).fetch_all(connection).await
}
