//! Statements for leases, on private connections.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sqlx::sqlite::{SqliteConnection, SqliteQueryResult, SqliteRow};
use sqlx::{Connection, Row, Sqlite};

use super::schema::PREPARE;
use super::transaction::busy_timeout;
use crate::Kind;
use crate::database::StepError;
use crate::database::driver;
use crate::database::driver::{SchemaDriver, SessionDriver};
use crate::database::row::{self, lock_row};
use crate::database::wait_queue::key;
use crate::database::{
    BatchOutcome, Claim, Fault, Grant, LeaseStatus, LockRow, QueueEntry, ReleaseClaim, Renewal, Renewed,
    Server, are_among, as_json, by_name, in_order, names_as_json, reliable_without_notice,
};
use crate::name::Name;
use crate::options::micros;
use crate::secret::Secret;

macro_rules! columns {
    () => {
        "id, lock_kind, secret_key, owner, fencing_token,
       CAST(unixepoch(create_time, 'subsec') * 1000000 AS INTEGER),
       CAST(unixepoch(acquire_time, 'subsec') * 1000000 AS INTEGER),
       CAST(unixepoch(expire_time, 'subsec') * 1000000 AS INTEGER),
       CAST((unixepoch(expire_time, 'subsec') - unixepoch('now', 'subsec')) * 1000000 AS INTEGER), ttl_micros, waiters,
       previous_token"
    };
}

const READ: &str = concat!("SELECT ", columns!(), " FROM {table} WHERE lock_name = ?1");

const READ_ALL: &str = concat!(
    "SELECT ",
    columns!(),
    ", lock_name FROM {table}
WHERE lock_name IN (SELECT CAST(unhex(value) AS TEXT) FROM json_each(?1))"
);

const CREATE: &str = "
INSERT INTO {table} (lock_name, lock_kind) VALUES (?1, ?2)
ON CONFLICT (lock_name) DO NOTHING";

const CREATE_ALL: &str = "
INSERT INTO {table} (lock_name, lock_kind)
SELECT CAST(unhex(value) AS TEXT), ?2 FROM json_each(?1) WHERE TRUE ORDER BY key
ON CONFLICT (lock_name) DO NOTHING";

/// The new token is never below the clock's microseconds, so no token is issued again after a row
/// was deleted. The microseconds are bound (`?5`): the clock of an embedded database is this
/// process's own, and SQLite's functions truncate it to milliseconds.
///
/// An expired lease is taken only after notice was given: see `LockRow::notice_is_due`.
const ACQUIRE: &str = concat!(
    "
UPDATE {table}
SET fencing_token = CASE WHEN secret_key = ?2 THEN fencing_token ELSE max(fencing_token + 1, ?5) END,
    previous_token = CASE WHEN secret_key = ?2 THEN previous_token ELSE fencing_token END,
    acquire_time = CASE WHEN secret_key = ?2 THEN acquire_time
        ELSE strftime('%Y-%m-%d %H:%M:%f000', 'now') END,
    expire_time = strftime('%Y-%m-%d %H:%M:%f000', 'now', ?4),
    ttl_micros = ?7,
    secret_key = ?2,
    owner = ?3,
    waiters = ",
    without_own_first!("waiters", "?6"),
    "
WHERE lock_name = ?1 AND lock_kind = 'insert'
  AND (secret_key = ?2 OR (expire_time <= strftime('%Y-%m-%d %H:%M:%f000', 'now')
      AND (ttl_micros <= 0 OR expire_time <= '1970-01-01 00:00:00.000000')
      AND (waiters = '' OR ?6 IS NULL OR ",
    is_first!("waiters", "?6"),
    ")))
RETURNING lock_name, secret_key, fencing_token, id, waiters <> '', fencing_token - previous_token"
);

/// Makes the row, granted, if there is none. The token of the grant before is zero, as in every new
/// row.
const MAKE: &str = "
INSERT INTO {table} (lock_name, secret_key, owner, fencing_token, acquire_time, expire_time, ttl_micros)
SELECT ?1, ?2, ?3, ?5, strftime('%Y-%m-%d %H:%M:%f000', 'now'), strftime('%Y-%m-%d %H:%M:%f000', 'now', ?4), ?6
WHERE NOT EXISTS (SELECT 1 FROM {table} WHERE lock_name = ?1)
RETURNING lock_name, secret_key, fencing_token, id, FALSE, fencing_token";

/// Never brings a released lease back (1970). A deadline moves backwards only if it is too far
/// ahead, by more than 2 s, because the clock was set back.
const RENEW: &str = "
UPDATE {table}
SET expire_time = min(
        max(expire_time, strftime('%Y-%m-%d %H:%M:%f000', 'now',
            printf('+%d.%03d seconds', asked.ttl / 1000000, asked.ttl / 1000 % 1000))),
        strftime('%Y-%m-%d %H:%M:%f000', 'now',
            printf('+%d.%03d seconds', asked.ttl / 1000000 + 2, asked.ttl / 1000 % 1000))),
    ttl_micros = asked.ttl
FROM (
    SELECT value ->> 0 AS id, value ->> 1 AS secret, value ->> 2 AS ttl, value ->> 3 AS token FROM json_each(?1)) AS asked
WHERE distributed_lock.id = asked.id AND secret_key = asked.secret AND fencing_token = asked.token
  AND expire_time > '1970-01-01 00:00:00.000000'
RETURNING secret_key";

/// Which leases are ours, and whether a takeover has given notice.
const STILL_OURS: &str = "
SELECT secret_key, ttl_micros <= 0
FROM (
    SELECT value ->> 0 AS id, value ->> 1 AS secret, value ->> 3 AS token FROM json_each(?1)) AS asked
JOIN {table} AS lease ON lease.id = asked.id AND secret_key = asked.secret AND fencing_token = asked.token
WHERE expire_time > '1970-01-01 00:00:00.000000'";

const RELEASE: &str = concat!(
    "
UPDATE {table}
SET expire_time = '1970-01-01 00:00:00.000000',
    ttl_micros = 0,
    waiters = ",
    behind_others!("waiters", "?3", "?4", "?5"),
    "
WHERE lock_name = ?1 AND secret_key = ?2"
);

const RELEASE_LATER: &str = "
UPDATE {table}
SET expire_time = CASE WHEN until.passed THEN '1970-01-01 00:00:00.000000' ELSE until.moment END,
    ttl_micros = CASE WHEN until.passed THEN 0 ELSE -max(until.left_over, 1) END,
    secret_key = CASE WHEN until.passed THEN secret_key ELSE '' END
FROM (
    SELECT id, moment, moment <= strftime('%Y-%m-%d %H:%M:%f000', 'now') AS passed,
        CAST(round((unixepoch(moment, 'subsec') - unixepoch('now', 'subsec')) * 1000) AS INTEGER) * 1000 AS left_over
    FROM (
        SELECT id, strftime('%Y-%m-%d %H:%M:%f000',
            min(acquire_time, strftime('%Y-%m-%d %H:%M:%f000', 'now')), ?3) AS moment
        FROM {table} WHERE lock_name = ?1 AND secret_key = ?2)) AS until
WHERE distributed_lock.id = until.id";

/// The notice is a fifth of the TTL, 1 s at most. A deadline more than the TTL and 2 s ahead is
/// moved to one TTL from now. `LockRow::notice_is_due` uses the same rules.
const GIVE_NOTICE: &str = "
UPDATE {table}
SET expire_time = CASE WHEN due.is_too_far THEN due.after_ttl ELSE max(expire_time, due.after_notice) END,
    ttl_micros = CASE WHEN due.is_too_far THEN ttl_micros ELSE 0 END
FROM (
    SELECT id AS due_id,
        strftime('%Y-%m-%d %H:%M:%f000', 'now',
            printf('+%d.%03d seconds', max(abs(ttl_micros), 1000000) / 1000000, max(abs(ttl_micros), 1000000) / 1000 % 1000))
            AS after_ttl,
        strftime('%Y-%m-%d %H:%M:%f000', 'now',
            printf('+%d.%03d seconds', min(ttl_micros / 5, 1000000) / 1000000, min(ttl_micros / 5, 1000000) / 1000 % 1000))
            AS after_notice,
        expire_time > strftime('%Y-%m-%d %H:%M:%f000', 'now',
            printf('+%d.%03d seconds', abs(ttl_micros) / 1000000 + 2, abs(ttl_micros) / 1000 % 1000)) AS is_too_far
    FROM {table}
    WHERE lock_name IN (SELECT CAST(unhex(value) AS TEXT) FROM json_each(?1))
        AND lock_kind = 'insert' AND expire_time > '1970-01-01 00:00:00.000000') AS due
WHERE id = due.due_id AND (due.is_too_far OR (ttl_micros > 0 AND expire_time <= due.after_notice))
RETURNING lock_name";

const SETTLE: &str = "
UPDATE {table}
SET expire_time = '1970-01-01 00:00:00.000000', ttl_micros = 0, secret_key = ''
WHERE lock_name IN (SELECT CAST(unhex(value) AS TEXT) FROM json_each(?1))
  AND lock_kind = 'insert' AND expire_time <= strftime('%Y-%m-%d %H:%M:%f000', 'now')
  AND (ttl_micros <= 0 OR expire_time <= '1970-01-01 00:00:00.000000')";

pub(super) async fn read(
    connection: &mut SqliteConnection,
    server: &Server,
    name: &str,
) -> driver::Result<Option<LockRow>> {
    let row = sqlx::query(server.table.sql(READ)).bind(name).fetch_optional(connection).await?;
    row.as_ref().map(lock_row).transpose()
}

pub(super) async fn read_all(
    connection: &mut SqliteConnection,
    server: &Server,
    names: &[Name],
) -> driver::Result<Vec<Option<LockRow>>> {
    let query = sqlx::query(server.table.sql(READ_ALL)).bind(names_as_json(names));
    let rows = query.fetch_all(connection).await?;
    let found = |row: &SqliteRow| Ok((row.try_get::<String, _>(row::COLUMNS)?.into_bytes(), lock_row(row)?));
    let found: Vec<_> = rows.iter().map(found).collect::<driver::Result<_>>()?;
    Ok(by_name(names, found))
}

pub(super) async fn create(
    connection: &mut SqliteConnection,
    server: &Server,
    name: &str,
    kind: Kind,
) -> driver::Result<bool> {
    let query = sqlx::query(server.table.sql(CREATE)).bind(name).bind(kind.as_str());
    query.execute(connection).await?;
    Ok(true)
}

pub(super) async fn create_all(
    connection: &mut SqliteConnection,
    server: &Server,
    names: &[Name],
    kind: Kind,
) -> driver::Result<bool> {
    let query = sqlx::query(server.table.sql(CREATE_ALL)).bind(names_as_json(names)).bind(kind.as_str());
    query.execute(connection).await?;
    Ok(true)
}

/// One claim at a time, because no network is involved.
pub(super) async fn acquire_all(
    connection: &mut SqliteConnection,
    server: &Server,
    claims: &[Claim],
) -> driver::Result<Vec<Option<Grant>>> {
    let mut transaction = connection.begin_with(Sqlite::BEGIN_SHORT).await?;
    let mut grants = Vec::with_capacity(claims.len());
    for claim in claims {
        let grant = acquire(&mut transaction, server, claim).await?;
        if grant.is_none() {
            transaction.rollback().await?;
            return Ok(vec![None; claims.len()]);
        }
        grants.push(grant);
    }
    transaction.commit().await?;
    Ok(grants)
}

pub(super) async fn acquire(
    connection: &mut SqliteConnection,
    server: &Server,
    claim: &Claim,
) -> driver::Result<Option<Grant>> {
    // Fetches all rows, though there is at most one. If only the first is fetched, sqlx 0.9 resets
    // the statement, which then commits, and drops the error of that commit.
    let query = |statement| {
        let query = sqlx::query(server.table.sql(statement)).bind(&*claim.name).bind(claim.secret.as_str());
        query.bind(&*claim.owner).bind(later_by(claim.ttl)).bind(clock_micros())
    };
    // A claim that may be the first one of its name usually is.
    let mut rows = Vec::new();
    if claim.makes_row {
        rows = query(MAKE).bind(micros(claim.ttl)).fetch_all(&mut *connection).await?;
    }
    if rows.is_empty() {
        let taken = query(ACQUIRE).bind(claim.entry.as_ref().map(key)).bind(micros(claim.ttl));
        rows = taken.fetch_all(connection).await?;
    }
    let Some(row) = rows.first() else { return Ok(None) };
    if row.try_get::<&str, _>(0)? != &*claim.name || row.try_get::<&str, _>(1)? != claim.secret.as_str() {
        return Err(StepError::disconnected("the database answered with the row of another statement"));
    }
    let (fencing_token, id) = (row.try_get(2)?, row.try_get(3)?);
    Ok(Some(Grant { id, fencing_token, others_wait: row.try_get(4)?, tokens: row.try_get(5)? }))
}

pub(super) async fn give_notice(
    connection: &mut SqliteConnection,
    server: &Server,
    names: &[Name],
) -> driver::Result<Vec<bool>> {
    let query = sqlx::query_scalar(server.table.sql(GIVE_NOTICE)).bind(names_as_json(names));
    let given: Vec<String> = query.fetch_all(connection).await?;
    Ok(are_among(names.iter(), &given))
}

pub(super) async fn settle(
    connection: &mut SqliteConnection,
    server: &Server,
    names: &[Name],
) -> driver::Result<()> {
    sqlx::query(server.table.sql(SETTLE)).bind(names_as_json(names)).execute(connection).await?;
    Ok(())
}

/// While another transaction writes, nothing can be renewed, but nothing can be taken either. The
/// leases can still be read.
pub(super) async fn renew(
    connection: &mut SqliteConnection,
    server: &Server,
    leases: &[Renewal],
) -> driver::Result<Renewed> {
    let json = as_json(leases);
    // With a short TTL, the result of a read is valid only for a short time.
    let worth = leases.iter().map(|lease| reliable_without_notice(lease.ttl)).min().unwrap_or_default();
    let wait = i64::try_from((worth / 4).as_millis()).unwrap_or(0);
    sqlx::raw_sql(busy_timeout(wait)).execute(&mut *connection).await?;
    let renewed = sqlx::query_scalar(server.table.sql(RENEW)).bind(&json).fetch_all(&mut *connection).await;
    sqlx::raw_sql(PREPARE).execute(&mut *connection).await?;
    let busy = match renewed {
        Ok(renewed) => {
            let renewed: Vec<String> = renewed;
            let renewed = renewed.into_iter().map(|secret| (secret, LeaseStatus::Ours));
            return Ok(in_order(leases, renewed, None));
        }
        Err(error) if Sqlite::classify(&error) == Fault::Busy => error,
        Err(error) => return Err(error.into()),
    };
    let read_at = Instant::now();
    let rows = sqlx::query(server.table.sql(STILL_OURS)).bind(json).fetch_all(connection).await;
    let status = |row: &SqliteRow| {
        let status = if row.try_get(1)? { LeaseStatus::Challenged } else { LeaseStatus::Busy };
        Ok((row.try_get(0)?, status))
    };
    let ours: driver::Result<Vec<_>> = rows.map_err(|_| busy)?.iter().map(status).collect();
    Ok(in_order(leases, ours?, Some(read_at)))
}

pub(super) async fn release(
    connection: &mut SqliteConnection,
    server: &Server,
    lease: &ReleaseClaim,
) -> driver::Result<LeaseStatus> {
    let ReleaseClaim { name, secret, entry } = lease;
    let (key, rest) = QueueEntry::parts(entry.as_ref());
    let query = sqlx::query(server.table.sql(RELEASE)).bind(&**name).bind(secret.as_str()).bind(key);
    Ok(released_or_not(&query.bind(rest).bind(clock_micros()).execute(connection).await?))
}

pub(super) async fn release_later(
    connection: &mut SqliteConnection,
    server: &Server,
    name: &str,
    secret: &Secret,
    at_least: Duration,
) -> driver::Result<LeaseStatus> {
    let query = sqlx::query(server.table.sql(RELEASE_LATER)).bind(name).bind(secret.as_str());
    let query = query.bind(later_by(at_least));
    Ok(released_or_not(&query.execute(connection).await?))
}

/// Uses one transaction, because only the commit takes time.
pub(super) async fn batch(
    connection: &mut SqliteConnection,
    server: &Server,
    releases: &[ReleaseClaim],
    claims: &[Claim],
) -> driver::Result<BatchOutcome> {
    let mut transaction = connection.begin_with(Sqlite::BEGIN_SHORT).await?;
    let mut outcome = BatchOutcome { releases: Vec::new(), grants: Vec::new(), notifications: Vec::new() };
    for one in releases {
        outcome.releases.push(release(&mut transaction, server, one).await?);
    }
    for claim in claims {
        outcome.grants.push(acquire(&mut transaction, server, claim).await?);
    }
    transaction.commit().await?;
    Ok(outcome)
}

/// A duration as a modifier of SQLite's time functions.
fn later_by(duration: Duration) -> String {
    format!("+{}.{:03} seconds", duration.as_secs(), duration.subsec_millis())
}

fn released_or_not(released: &SqliteQueryResult) -> LeaseStatus {
    if released.rows_affected() > 0 { LeaseStatus::Ours } else { LeaseStatus::NotOurs }
}

pub(super) fn clock_micros() -> i64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    micros(since_1970)
}
