//! Statements for many leases at once, on private connections: what MySQL and MariaDB share, and
//! MySQL's own.

use std::collections::HashMap;
use std::fmt::Write as _;

use std::time::Instant;

use sqlx::mysql::{MySqlConnection, MySqlRow};
use sqlx::{AssertSqlSafe, Connection, MySql, Row};

use super::errors::{UNKNOWN_STATEMENT, number};
use super::several::in_json;
use super::{literal, mariadb, parts};
use crate::database::StepError;
use crate::database::driver;
use crate::database::{
    BatchOutcome, Claim, Fault, Grant, LeaseStatus, QueueEntry, ReleaseClaim, Renewal, Renewed, Server,
    as_json, hexadecimal, in_order,
};
use crate::options::micros;
use crate::secret::Secret;

/// One statement, which the server completes without the client. A client that is stopped or
/// disconnected in the middle of a transaction would keep the rows locked. Locked rows are skipped,
/// so one of them can't hold up the rest. The statement never finds a released lease (1970). A
/// deadline moves backwards only if it is more than 2 s further ahead than it can be, because the
/// clock was set back.
///
/// LIMIT makes the server materialize the inner SELECT, with its locks. `STRAIGHT_JOIN` and
/// `FORCE INDEX` keep it from reading, and so locking, other rows of a small table. `FOR UPDATE OF`
/// is needed because the server must not lock the JSON table.
const RENEW: &str = "
UPDATE (
    SELECT lease.id, asked.ttl
    FROM JSON_TABLE(?, '$[*]' COLUMNS (
            id BIGINT PATH '$[0]', secret_key VARCHAR(32) CHARACTER SET ascii PATH '$[1]', ttl BIGINT PATH '$[2]',
            fencing_token BIGINT PATH '$[3]')) AS asked
    STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = asked.id
    WHERE lease.secret_key = asked.secret_key AND lease.fencing_token = asked.fencing_token
        AND lease.expire_time > '1970-01-01 00:00:00'
    LIMIT 1000000
    FOR UPDATE OF lease SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.expire_time = LEAST(
        GREATEST(lease.expire_time, TIMESTAMPADD(MICROSECOND, unlocked.ttl, UTC_TIMESTAMP(6))),
        TIMESTAMPADD(MICROSECOND, unlocked.ttl + 2000000, UTC_TIMESTAMP(6))),
    lease.ttl_micros = unlocked.ttl";

/// Which leases are ours, whether they were renewed a moment ago (their deadline is later than what
/// the holder will rely on), and whether a takeover has given notice.
const STILL_OURS: &str = "
SELECT lease.secret_key,
    TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), lease.expire_time) >= asked.ttl DIV 12 * 11, lease.ttl_micros <= 0
FROM JSON_TABLE(?, '$[*]' COLUMNS (
        id BIGINT PATH '$[0]', secret_key VARCHAR(32) CHARACTER SET ascii PATH '$[1]', ttl BIGINT PATH '$[2]',
        fencing_token BIGINT PATH '$[3]')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = asked.id
WHERE lease.secret_key = asked.secret_key AND lease.fencing_token = asked.fencing_token
    AND lease.expire_time > '1970-01-01 00:00:00'";

/// `RELEASE` (entries without a `ttl`) and `ACQUIRE` for many leases at once, in one commit.
const BATCH: &str = "
UPDATE (
    SELECT lease.id, lease.fencing_token AS last_token, lease.acquire_time AS last_time, lease.owner AS last_owner,
        lease.secret_key = asked.secret_key AS is_again, lease.previous_token AS last_previous,
        lease.waiters <> '' AND LEFT(lease.waiters, 32) = asked.place AS was_first,
        lease.waiters <> '' AND LENGTH(lease.waiters) < 3584 AND INSTR(lease.waiters, asked.place) = 0 AS may_stand,
        asked.secret_key, asked.ttl, asked.place
    FROM JSON_TABLE(@lock_db_asked, '$[*]' COLUMNS (
            lock_name VARCHAR(510) PATH '$[0]', secret_key VARCHAR(32) CHARACTER SET ascii PATH '$[1]', ttl BIGINT PATH '$[2]',
            place VARCHAR(32) CHARACTER SET ascii PATH '$[3]')) AS asked
    STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name)
        ON lease.lock_name = UNHEX(asked.lock_name)
    WHERE lease.lock_kind = 'insert'
        AND (lease.secret_key = asked.secret_key
            OR (asked.ttl > 0 AND lease.expire_time <= UTC_TIMESTAMP(6)
                AND (lease.ttl_micros <= 0 OR lease.expire_time = '1970-01-01 00:00:00')
                AND (lease.waiters = '' OR asked.place = '' OR LEFT(lease.waiters, 32) = asked.place)))
    LIMIT 1000000
    FOR UPDATE OF lease SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.fencing_token = IF(unlocked.is_again, unlocked.last_token, GREATEST(
        unlocked.last_token + 1, TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)))),
    lease.previous_token = IF(unlocked.is_again, unlocked.last_previous, unlocked.last_token),
    lease.acquire_time = IF(unlocked.is_again, unlocked.last_time, UTC_TIMESTAMP(6)),
    lease.secret_key = unlocked.secret_key,
    lease.owner = IF(unlocked.ttl > 0, @lock_db_owner, unlocked.last_owner),
    lease.expire_time = IF(
        unlocked.ttl > 0, TIMESTAMPADD(MICROSECOND, unlocked.ttl, UTC_TIMESTAMP(6)), '1970-01-01 00:00:00'),
    lease.ttl_micros = unlocked.ttl,
    lease.waiters = CASE WHEN unlocked.ttl > 0 AND unlocked.was_first THEN SUBSTR(lease.waiters, 57)
        WHEN unlocked.ttl = 0 AND unlocked.place <> '' AND unlocked.may_stand THEN CONCAT(
            lease.waiters, unlocked.place, LPAD(TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)) + 2000000, 16, '0'), CONVERT(@lock_db_listener USING ascii))
        ELSE lease.waiters END";

/// Which of the leases are ours, and whether the request was carried out: released, or taken so
/// recently that more time is left than the holder will rely on. Runs in the transaction of
/// `BATCH`, whose locks it needs: right after the commit, another process may take a released
/// lease.
const OUTCOME: &str = "
SELECT lease.secret_key, lease.fencing_token, lease.id,
    IF(asked.ttl > 0,
        TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), lease.expire_time) >= asked.ttl DIV 12 * 11,
        lease.expire_time = '1970-01-01 00:00:00'),
    lease.waiters <> '', lease.fencing_token - lease.previous_token
FROM JSON_TABLE(@lock_db_asked, '$[*]' COLUMNS (
        lock_name VARCHAR(510) PATH '$[0]', secret_key VARCHAR(32) CHARACTER SET ascii PATH '$[1]', ttl BIGINT PATH '$[2]')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name)
    ON lease.lock_name = UNHEX(asked.lock_name)
WHERE lease.secret_key = asked.secret_key";

/// In bytes, as `as_json` writes it.
const LONGEST_RENEWAL: usize = 128;

/// Uses as few messages as the server allows.
pub(super) async fn renew(
    connection: &mut MySqlConnection,
    server: &Server,
    leases: &[Renewal],
) -> driver::Result<Renewed> {
    let mut all = Renewed { statuses: Vec::with_capacity(leases.len()), read_at: None };
    for part in parts(leases, server, |_| LONGEST_RENEWAL) {
        let Renewed { statuses, read_at } = renew_part(connection, server, part).await?;
        all.statuses.extend(statuses);
        // The earliest time, which is valid for all parts.
        all.read_at = all.read_at.or(read_at);
    }
    Ok(all)
}

async fn renew_part(
    connection: &mut MySqlConnection,
    server: &Server,
    leases: &[Renewal],
) -> driver::Result<Renewed> {
    if server.is_mariadb {
        return mariadb::renew(connection, server, leases).await;
    }
    let json = as_json(leases);
    let renewed = sqlx::query(server.table.sql(RENEW)).bind(&json).execute(&mut *connection).await?;
    if usize::try_from(renewed.rows_affected()) == Ok(leases.len()) {
        return Ok(Renewed { statuses: vec![LeaseStatus::Ours; leases.len()], read_at: None });
    }
    let (found, read_at) = still_ours(connection, server, &json).await?;
    // A single lease was not renewed, or it would have been counted.
    let is_alone = leases.len() == 1;
    let found = found.into_iter().map(|(secret, status)| {
        (secret, if is_alone && status == LeaseStatus::StillOurs { LeaseStatus::Busy } else { status })
    });
    Ok(in_order(leases, found, Some(read_at)))
}

/// Runs in a transaction of its own. Otherwise a proxy that spreads reads over replicas could
/// answer it with an old row. Also returns when it read.
pub(super) async fn still_ours(
    connection: &mut MySqlConnection,
    server: &Server,
    json: &str,
) -> driver::Result<(Vec<(String, LeaseStatus)>, Instant)> {
    let mut transaction = connection.begin().await?;
    let read_at = Instant::now();
    let rows = sqlx::query(server.table.sql(STILL_OURS)).bind(json).fetch_all(&mut *transaction).await?;
    transaction.commit().await?;
    let status = |row: &MySqlRow| {
        let status = match (row.try_get(1)?, row.try_get(2)?) {
            (true, _) => LeaseStatus::StillOurs,
            (false, true) => LeaseStatus::Challenged,
            (false, false) => LeaseStatus::Busy,
        };
        Ok((row.try_get(0)?, status))
    };
    Ok((rows.iter().map(status).collect::<driver::Result<_>>()?, read_at))
}

/// Uses as few messages as the server allows.
pub(super) async fn batch(
    connection: &mut MySqlConnection,
    server: &Server,
    releases: &[ReleaseClaim],
    claims: &[Claim],
) -> driver::Result<BatchOutcome> {
    let names = releases.iter().map(|one| &one.name).chain(claims.iter().map(|claim| &claim.name));
    if names.map(in_json).sum::<usize>() <= server.longest_message {
        return batch_part(connection, server, releases, claims).await;
    }
    let releases = parts(releases, server, |one| in_json(&one.name)).into_iter().map(|part| (part, &[][..]));
    let claims = parts(claims, server, |claim| in_json(&claim.name)).into_iter().map(|part| (&[][..], part));
    let mut all = BatchOutcome { releases: Vec::new(), grants: Vec::new(), notifications: Vec::new() };
    for (releases, claims) in releases.chain(claims) {
        let is_first = all.releases.is_empty() && all.grants.is_empty();
        let part = batch_part(connection, server, releases, claims).await;
        // The earlier parts are already committed.
        let part = if is_first { part? } else { part.map_err(StepError::outcome_unknown)? };
        all.releases.extend(part.releases);
        all.grants.extend(part.grants);
    }
    Ok(all)
}

async fn batch_part(
    connection: &mut MySqlConnection,
    server: &Server,
    releases: &[ReleaseClaim],
    claims: &[Claim],
) -> driver::Result<BatchOutcome> {
    let asked = batch_as_json(releases, claims);
    let owner = claims.first().map_or("".into(), |claim| server.storable(&claim.owner));
    // All entries are of this process, so they have the same listener.
    let listener = QueueEntry::parts(releases.iter().find_map(|one| one.place.as_ref())).1;
    let rows = if server.is_mariadb {
        mariadb::batch(connection, server, &asked, &owner, &listener, releases).await
    } else {
        in_transaction(connection, server, &asked, &owner, &listener).await
    };
    let rows = match rows {
        // Callers then ask one by one, and the error goes to those that cause it.
        Err(error) if error.fault::<MySql>() == Fault::Deadlock => {
            return Ok(BatchOutcome::nothing(releases, claims));
        }
        rows => rows?,
    };
    let mut found = HashMap::with_capacity(rows.len());
    for row in &rows {
        let (fencing_token, id) = (row.try_get(1)?, row.try_get(2)?);
        let grant = Grant { id, fencing_token, others_wait: row.try_get(4)?, tokens: row.try_get(5)? };
        let found = found.entry(row.try_get::<String, _>(0)?).or_insert((grant, false));
        // What was done counts, whatever has happened to the lease since.
        found.1 |= row.try_get::<bool, _>(3)?;
    }
    let status = |one: &ReleaseClaim| match found.get(one.secret.as_str()) {
        Some((_, true)) => LeaseStatus::Ours,
        Some((_, false)) => LeaseStatus::Busy,
        None => LeaseStatus::NotOurs,
    };
    let grant =
        |claim: &Claim| found.get(claim.secret.as_str()).and_then(|(grant, done)| done.then_some(*grant));
    Ok(BatchOutcome {
        releases: releases.iter().map(status).collect(),
        grants: claims.iter().map(grant).collect(),
        notifications: Vec::new(),
    })
}

async fn in_transaction(
    connection: &mut MySqlConnection,
    server: &Server,
    asked: &str,
    owner: &str,
    listener: &str,
) -> driver::Result<Vec<MySqlRow>> {
    let owner = literal(owner);
    // Sent as text, so that all of it is in one message and the server reaches the COMMIT whatever
    // happens to this process. Nothing in it needs escaping.
    let sql = format!(
        "SET @lock_db_asked = '{asked}', @lock_db_owner = CONVERT({owner} USING utf8mb4),
            @lock_db_listener = '{listener}';
        START TRANSACTION; EXECUTE lock_db_batch; EXECUTE lock_db_outcome; COMMIT"
    );
    match all_or_nothing(connection, &sql).await {
        Err(error) if number(&error) == Some(UNKNOWN_STATEMENT) => {
            // The first time on this connection. Parsing takes as long as executing, so it is done
            // only once.
            let quoted = |sql: &'static str| server.table.sql(sql).0.replace('\'', "''");
            let (batch, outcome) = (quoted(BATCH), quoted(OUTCOME));
            let prepare =
                format!("PREPARE lock_db_batch FROM '{batch}'; PREPARE lock_db_outcome FROM '{outcome}'");
            sqlx::raw_sql(AssertSqlSafe(prepare)).execute(&mut *connection).await?;
            all_or_nothing(connection, &sql).await
        }
        rows => rows,
    }
}

async fn all_or_nothing(connection: &mut MySqlConnection, sql: &str) -> driver::Result<Vec<MySqlRow>> {
    let rows = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).fetch_all(&mut *connection).await;
    if rows.is_err() {
        sqlx::raw_sql("ROLLBACK").execute(connection).await?;
    }
    Ok(rows?)
}

/// Encodes a batch as `[["6e616d65", "secret", 30000000, "place"], …]`. A release has a `ttl` of
/// zero.
pub(super) fn batch_as_json(releases: &[ReleaseClaim], claims: &[Claim]) -> String {
    let releases =
        releases.iter().map(|one| (&one.name, &one.secret, 0, one.place.as_ref().map(|place| &place.secret)));
    let claims =
        claims.iter().map(|claim| (&claim.name, &claim.secret, micros(claim.ttl), claim.place.as_ref()));
    let mut json = String::from("[");
    for (position, (name, secret, ttl, place)) in releases.chain(claims).enumerate() {
        let (comma, place) = (if position > 0 { "," } else { "" }, place.map_or("", Secret::as_str));
        let (name, secret) = (hexadecimal(name), secret.as_str());
        let _infallible = write!(json, "{comma}[\"{name}\",\"{secret}\",{ttl},\"{place}\"]");
    }
    json.push(']');
    json
}
