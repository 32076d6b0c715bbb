//! Statements for leases on MySQL.
//!
//! A statement that skips locked rows and writes the others is an UPDATE of a join with a SELECT.

mod new_rows;
mod queue;

use std::time::Duration;

use sqlx::mysql::{MySqlArguments, MySqlConnection, MySqlRow};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, MySql};

pub(super) use self::new_rows::acquire as acquire_or_make;
use self::queue::all_or_none;
pub(super) use self::queue::{dequeue, enqueue, set_waiters};
use super::mysql_family::batch::{batch_as_json, still_ours};
use super::mysql_family::errors::{UNKNOWN_STATEMENT, number};
use super::mysql_family::lease::granted;
use super::mysql_family::literal;
use super::mysql_family::queue::which;
use super::mysql_family::transaction::STILL_IN_TRANSACTION;
use crate::database::StepError;
use crate::database::driver;
use crate::database::lock_row::FORCED;
use crate::database::wait_queue::key;
use crate::database::{
    Claim, Cluster, Grant, LeaseStatus, QueueEntry, ReleaseClaim, Renewal, Renewed, Server, as_json,
    in_order, names_as_json,
};
use crate::name::Name;
use crate::options::micros;
use crate::secret::Secret;

/// The old values are read in the inner SELECT, because the order of assignments in an UPDATE of a
/// join is undefined. The new token is never below the clock's microseconds. So no token is issued
/// again after a row was deleted, or after a failover that lost the last grants.
///
/// A locked row is skipped, so that other callers do not wait for it on this connection. Inside a
/// transaction this would leave a lock on the gap behind the row; outside it does not.
const ACQUIRE: &str = concat!(
    "
UPDATE (
    SELECT id, fencing_token AS last_token, acquire_time AS last_time, secret_key = ? AS is_again,
        previous_token AS last_previous, ",
    is_first!("waiters", "?"),
    " AS was_first
    FROM {table} FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND lock_kind = 'insert' AND (secret_key = ?
        OR (expire_time <= UTC_TIMESTAMP(6) AND (ttl_micros <= 0 OR expire_time = '1970-01-01 00:00:00')
            AND (waiters = '' OR ? OR ",
    is_first!("waiters", "?"),
    ")))
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
    lease.waiters = IF(unlocked.was_first, ",
    without_first!("lease.waiters"),
    ", lease.waiters)"
);

const GRANTED: &str = "
SELECT fencing_token, id, waiters <> '', fencing_token - previous_token
FROM {table} WHERE lock_name = ? AND secret_key = ?";

const RELEASE: &str = concat!(
    "
UPDATE (
    SELECT id FROM {table} FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND secret_key = ?
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.expire_time = '1970-01-01 00:00:00',
    lease.ttl_micros = 0,
    lease.waiters = ",
    behind_others!("lease.waiters", "?", "?")
);

/// See `OperateDriver::force_release`.
const FORCE_RELEASE: &str = "
UPDATE (
    SELECT id FROM {table} FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND fencing_token = ? AND lock_kind = 'insert' AND expire_time > '1970-01-01 00:00:00'
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.expire_time = '1970-01-01 00:00:00', lease.ttl_micros = 0, lease.secret_key = ?,
    lease.fencing_token = lease.fencing_token + 1";

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
    STRAIGHT_JOIN {table} AS held FORCE INDEX (distributed_lock_name) ON held.lock_name = UNHEX(CONVERT(asked.asked_name USING ascii))
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

/// Which names have no notice due. Read after `GIVE_NOTICE`, which only counts.
const NO_NOTICE_DUE: &str = "
SELECT lease.lock_name
FROM JSON_TABLE(?, '$[*]' COLUMNS (asked_name VARCHAR(510) PATH '$')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name) ON lease.lock_name = UNHEX(CONVERT(asked.asked_name USING ascii))
WHERE expire_time <= TIMESTAMPADD(MICROSECOND, ABS(ttl_micros) + 2000000, SYSDATE(6))
    AND (ttl_micros <= 0 OR expire_time > TIMESTAMPADD(MICROSECOND, LEAST(ttl_micros DIV 5, 1000000), SYSDATE(6)))";

const SETTLE: &str = "
UPDATE (
    SELECT id
    FROM JSON_TABLE(?, '$[*]' COLUMNS (asked_name VARCHAR(510) PATH '$')) AS asked
    STRAIGHT_JOIN {table} AS last FORCE INDEX (distributed_lock_name) ON last.lock_name = UNHEX(CONVERT(asked.asked_name USING ascii))
    WHERE lock_kind = 'insert' AND expire_time <= UTC_TIMESTAMP(6)
        AND (ttl_micros <= 0 OR expire_time = '1970-01-01 00:00:00')
    LIMIT 1000000
    FOR UPDATE OF last SKIP LOCKED) AS free
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = free.id
SET lease.expire_time = '1970-01-01 00:00:00', lease.ttl_micros = 0, lease.secret_key = ''";

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

/// `RELEASE` (entries without a `ttl`) and `ACQUIRE` for many leases at once, in one commit.
const BATCH: &str = concat!("
UPDATE (
    SELECT lease.id, lease.fencing_token AS last_token, lease.acquire_time AS last_time, lease.owner AS last_owner,
        lease.secret_key = asked.secret_key AS is_again, lease.previous_token AS last_previous,
        ", is_first!("lease.waiters", "asked.queue_key"), " AS was_first,
        lease.waiters <> '' AND ", has_room!("lease.waiters", "asked.queue_key"), " AS may_enqueue,
        asked.secret_key, asked.ttl, asked.queue_key
    FROM JSON_TABLE(@lock_db_asked, '$[*]' COLUMNS (
            lock_name VARCHAR(510) PATH '$[0]', secret_key VARCHAR(32) CHARACTER SET ascii PATH '$[1]', ttl BIGINT PATH '$[2]',
            queue_key VARCHAR(", layout!(key), ") CHARACTER SET ascii PATH '$[3]')) AS asked
    STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name)
        ON lease.lock_name = UNHEX(asked.lock_name)
    WHERE lease.lock_kind = 'insert'
        AND (lease.secret_key = asked.secret_key
            OR (asked.ttl > 0 AND lease.expire_time <= UTC_TIMESTAMP(6)
                AND (lease.ttl_micros <= 0 OR lease.expire_time = '1970-01-01 00:00:00')
                AND (lease.waiters = '' OR asked.queue_key = '' OR ", is_first!("lease.waiters", "asked.queue_key"), ")))
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
    lease.waiters = CASE WHEN unlocked.ttl > 0 AND unlocked.was_first THEN ", without_first!("lease.waiters"), "
        WHEN unlocked.ttl = 0 AND unlocked.may_enqueue THEN ", with_entry!("lease.waiters", "unlocked.queue_key", "CONVERT(@lock_db_rest USING ascii)"), "
        ELSE lease.waiters END");

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

/// `ACQUIRE` for all or none of several names, which have no queue entries. The rows are locked and
/// counted, and written only if all of them were locked.
const ACQUIRE_ALL: &str = "
UPDATE (
    SELECT found.*, COUNT(*) OVER () AS how_many
    FROM (
        SELECT lease.id, lease.fencing_token AS last_token, lease.acquire_time AS last_time,
            lease.secret_key = asked.secret_key AS is_again, lease.previous_token AS last_previous, asked.secret_key
        FROM JSON_TABLE(?, '$[*]' COLUMNS (
                lock_name VARCHAR(510) PATH '$[0]', secret_key VARCHAR(32) CHARACTER SET ascii PATH '$[1]')) AS asked
        STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name)
            ON lease.lock_name = UNHEX(asked.lock_name)
        WHERE lease.lock_kind = 'insert'
            AND (lease.secret_key = asked.secret_key
                OR (lease.expire_time <= UTC_TIMESTAMP(6)
                    AND (lease.ttl_micros <= 0 OR lease.expire_time = '1970-01-01 00:00:00')))
        LIMIT 1000000
        FOR UPDATE OF lease SKIP LOCKED) AS found) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.fencing_token = IF(unlocked.is_again, unlocked.last_token, GREATEST(
        unlocked.last_token + 1, TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)))),
    lease.previous_token = IF(unlocked.is_again, unlocked.last_previous, unlocked.last_token),
    lease.acquire_time = IF(unlocked.is_again, unlocked.last_time, UTC_TIMESTAMP(6)),
    lease.secret_key = unlocked.secret_key,
    lease.owner = ?,
    lease.expire_time = TIMESTAMPADD(MICROSECOND, ?, UTC_TIMESTAMP(6)),
    lease.ttl_micros = ?
WHERE unlocked.how_many = ?";

const GRANTED_ALL: &str = "
SELECT lease.secret_key, lease.fencing_token, lease.id, lease.waiters <> '', lease.fencing_token - lease.previous_token
FROM JSON_TABLE(?, '$[*]' COLUMNS (
        lock_name VARCHAR(510) PATH '$[0]', secret_key VARCHAR(32) CHARACTER SET ascii PATH '$[1]')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name)
    ON lease.lock_name = UNHEX(asked.lock_name)
WHERE lease.secret_key = asked.secret_key";

const UNLOCKED: &str = "
SELECT lease.lock_name
FROM JSON_TABLE(?, '$[*]' COLUMNS (asked_name VARCHAR(510) PATH '$')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name) ON lease.lock_name = UNHEX(CONVERT(asked.asked_name USING ascii))
FOR UPDATE OF lease SKIP LOCKED";

async fn wrote(
    connection: &mut MySqlConnection,
    query: Query<'_, MySql, MySqlArguments>,
) -> driver::Result<bool> {
    Ok(query.execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn acquire(
    connection: &mut MySqlConnection,
    server: &Server,
    claim: &Claim,
) -> driver::Result<Option<Grant>> {
    let secret = claim.secret.as_str();
    let key = claim.entry.as_ref().map(key).unwrap_or_default();
    let name = claim.name.as_bytes();
    let acquired = sqlx::query(server.table.sql(ACQUIRE))
        .bind(secret)
        .bind(&key)
        .bind(name)
        .bind(secret)
        .bind(key.is_empty())
        .bind(&key)
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

/// If not all of them were given notice, those count that have none due now: another process may
/// have given it.
pub(super) async fn give_notice(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &[Name],
) -> driver::Result<Vec<bool>> {
    let json = names_as_json(names);
    let query = sqlx::query(server.table.sql(GIVE_NOTICE)).bind(&json);
    let given = query.execute(&mut *connection).await?.rows_affected();
    if let Some(all) = all_or_none(given, names.len()) {
        return Ok(all);
    }
    let query = sqlx::query(server.table.sql(NO_NOTICE_DUE)).bind(json);
    which(names.iter(), &query.fetch_all(connection).await?)
}

/// Settles names as `names_as_json` writes them.
pub(super) async fn settle(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &str,
) -> driver::Result<()> {
    wrote(connection, sqlx::query(server.table.sql(SETTLE)).bind(names)).await.map(drop)
}

pub(super) async fn release(
    connection: &mut MySqlConnection,
    server: &Server,
    lease: &ReleaseClaim,
) -> driver::Result<bool> {
    let ReleaseClaim { name, secret, entry } = lease;
    let (key, rest) = QueueEntry::parts(entry.as_ref());
    let query = sqlx::query(server.table.sql(RELEASE)).bind(name.as_bytes()).bind(secret.as_str());
    wrote(connection, query.bind(&key).bind(&key).bind(rest)).await
}

pub(super) async fn force_release(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    fencing_token: i64,
) -> driver::Result<bool> {
    let query = sqlx::query(server.table.sql(FORCE_RELEASE)).bind(name.as_bytes()).bind(fencing_token);
    wrote(connection, query.bind(FORCED)).await
}

pub(super) async fn release_later(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    secret: &Secret,
    at_least: Duration,
) -> driver::Result<bool> {
    let query = sqlx::query(server.table.sql(RELEASE_LATER)).bind(micros(at_least));
    wrote(connection, query.bind(name.as_bytes()).bind(secret.as_str())).await
}

pub(super) async fn renew(
    connection: &mut MySqlConnection,
    server: &Server,
    leases: &[Renewal],
) -> driver::Result<Renewed> {
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

/// Returns all rows that are ours now.
pub(super) async fn batch(
    connection: &mut MySqlConnection,
    server: &Server,
    releases: &[ReleaseClaim],
    claims: &[Claim],
    owner: &str,
    rest: &str,
    makes_rows: bool,
) -> driver::Result<Vec<MySqlRow>> {
    let (all, owner, rest) = (batch_as_json(releases, claims.iter()), literal(owner), literal(rest));
    let ([begin, end], commit) = match server.cluster {
        Cluster::SinglePrimary => (["", "; COMMIT"], None),
        Cluster::MultiPrimary => (STILL_IN_TRANSACTION, Some("COMMIT")),
    };
    let set = format!(
        "SET @lock_db_asked = '{all}', @lock_db_owner = CONVERT({owner} USING utf8mb4), @lock_db_rest = {rest}"
    );
    // Sent as text, so that all of it is in one message and the server reaches the COMMIT whatever
    // happens to this process. Nothing in it needs escaping, except the quotes of a text in a text.
    let sql = if makes_rows {
        new_rows::message(server, releases, claims, &set, begin, end)
    } else {
        format!("{set}; START TRANSACTION{begin}; EXECUTE lock_db_batch; EXECUTE lock_db_outcome{end}")
    };
    match all_or_nothing(connection, &sql, commit).await {
        Err(error) if number(&error) == Some(UNKNOWN_STATEMENT) => {
            // The first time on this connection. Parsing takes as long as executing, so it is done
            // only once.
            let prepare = |(name, sql): (&str, &'static str)| {
                format!("PREPARE {name} FROM '{}'", server.table.sql(sql).0.replace('\'', "''"))
            };
            let statements = [
                ("lock_db_new", new_rows::NEW),
                ("lock_db_make", new_rows::MAKE),
                ("lock_db_batch", BATCH),
                ("lock_db_outcome", OUTCOME),
            ];
            let prepare = statements.map(prepare).join("; ");
            sqlx::raw_sql(AssertSqlSafe(prepare)).execute(&mut *connection).await?;
            all_or_nothing(connection, &sql, commit).await
        }
        rows => rows,
    }
}

async fn all_or_nothing(
    connection: &mut MySqlConnection,
    sql: &str,
    commit: Option<&'static str>,
) -> driver::Result<Vec<MySqlRow>> {
    let mut rows = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).fetch_all(&mut *connection).await;
    if let (Ok(_), Some(commit)) = (&rows, commit)
        && let Err(error) = sqlx::raw_sql(commit).execute(&mut *connection).await
    {
        rows = Err(error);
    }
    if rows.is_err() {
        sqlx::raw_sql("ROLLBACK").execute(connection).await?;
    }
    Ok(rows?)
}

/// Takes several leases, which have no queue entries, all or none. `None`: not all of them are free.
/// `_is_whole` is for MariaDB.
pub(super) async fn acquire_all(
    connection: &mut MySqlConnection,
    server: &Server,
    claims: &[Claim],
    _is_whole: bool,
) -> driver::Result<Option<Vec<MySqlRow>>> {
    let (asked, all) = (batch_as_json(&[], claims.iter()), i64::try_from(claims.len()).unwrap_or(i64::MAX));
    let owner = claims.first().map_or("".into(), |claim| server.storable(&claim.owner));
    let ttl = claims.first().map_or(0, |claim| micros(claim.ttl));
    let query = sqlx::query(server.table.sql(ACQUIRE_ALL)).bind(&asked).bind(owner.as_ref());
    if !wrote(connection, query.bind(ttl).bind(ttl).bind(all)).await? {
        return Ok(None);
    }
    // The leases are already ours, so an error must not look like an answer.
    let rows = sqlx::query(server.table.sql(GRANTED_ALL)).bind(asked).fetch_all(connection).await;
    rows.map(Some).map_err(StepError::outcome_unknown)
}

/// Which of the names, as `names_as_json` writes them, have rows that are not locked.
pub(super) async fn unlocked(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &str,
) -> driver::Result<Vec<MySqlRow>> {
    Ok(sqlx::query(server.table.sql(UNLOCKED)).bind(names).fetch_all(connection).await?)
}
