//! Statements for one lease and its queue, on private connections.
//!
//! A release and a change of the queue do not wait for the disk: `synchronous_commit` is off for
//! that statement alone. Other transactions see the change at once, and what they commit on top of
//! it follows it in the log, so grants reach the disk in order. If the server crashes within the
//! next second, the release may be lost. Then the lease ends with its TTL, like the lease of a
//! holder that died. A grant always waits for the disk, because a lost grant would be given twice.
//!
//! A statement finds the row by `newest!` and from then on by its `ctid` alone. If another
//! transaction changes the row between the statement's snapshot and the lock, the statement does
//! not find it, and skips it like a locked row.

use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::{PgConnection, PgQueryResult};

use super::errors::{LOCK_NOT_AVAILABLE, code};
use super::sequence;
use super::several::texts;
use crate::Kind;
use crate::database::StepError;
use crate::database::driver;
use crate::database::row::lock_row;
use crate::database::wait_queue::key;
use crate::database::{
    Claim, Grant, LeaseKey, LeaseStatus, LockRow, Notification, Probe, QueueEntry, ReleaseClaim, Released,
    Server, are_among,
};
use crate::name::Name;
use crate::options::micros;
use crate::secret::Secret;

/// `clock_timestamp()` everywhere, because `now()` does not advance inside a transaction.
///
/// Here, as in every statement that returns such a column, text columns are cast to TEXT. If a
/// column is given another type, the type of the result then stays the same. Otherwise every
/// prepared statement would fail from then on ("cached plan must not change result type").
macro_rules! columns {
    () => {
        "id, lock_kind::text, secret_key::text, owner::text, fencing_token,
       (extract(epoch FROM create_time) * 1000000)::bigint,
       (extract(epoch FROM acquire_time) * 1000000)::bigint,
       (extract(epoch FROM expire_time) * 1000000)::bigint,
       (extract(epoch FROM expire_time - clock_timestamp()) * 1000000)::bigint, ttl_micros, waiters::text,
       previous_token"
    };
}

const READ: &str =
    concat!("SELECT ", columns!(), " FROM {table} WHERE ctid = ", newest!("$1"), " AND lock_name = $1");

pub(super) const READ_ALL: &str = concat!(
    "SELECT ",
    columns!(),
    ", lock_name::text
FROM unnest((SELECT $1::text[])) AS asked (name)
CROSS JOIN LATERAL ",
    newest!("asked.name COLLATE \"C\""),
    " AS newest
JOIN {table} AS lease ON lease.ctid = newest.ctid"
);

/// `DO NOTHING` still waits for the end of a transaction that has created the row, or has locked
/// and written it since. The connection worker must not block on that, especially because that
/// transaction may wait for the connection worker. So the statement reads first, which finds a row
/// created earlier. For a row that another transaction is just creating, it has a lock timeout of
/// its own: long enough for a transaction that does nothing else.
const CREATE: &str = "
WITH bound AS MATERIALIZED (
    SELECT set_config('lock_timeout', '5ms', true), set_config('synchronous_commit', 'off', true))
INSERT INTO {table} (lock_name, lock_kind) SELECT $1, $2 FROM bound
WHERE NOT EXISTS (SELECT 1 FROM {table} WHERE lock_name = $1)
ON CONFLICT (lock_name) DO NOTHING";

/// `CREATE` for several names, in the order in which every process creates them.
pub(super) const CREATE_ALL: &str = r#"
WITH bound AS MATERIALIZED (
    SELECT set_config('lock_timeout', '5ms', true), set_config('synchronous_commit', 'off', true))
INSERT INTO {table} (lock_name, lock_kind)
SELECT asked.lock_name, $2 FROM bound, unnest($1::text[]) AS asked (lock_name)
WHERE NOT EXISTS (SELECT 1 FROM {table} AS lease WHERE lease.lock_name = asked.lock_name COLLATE "C")
ORDER BY asked.lock_name COLLATE "C"
ON CONFLICT (lock_name) DO NOTHING"#;

pub(super) const REACH_TABLE: &str =
    "DO $lock_db$ BEGIN LOCK TABLE {table} IN ROW EXCLUSIVE MODE NOWAIT; END $lock_db$";

/// The new token is never below the clock's microseconds. So no token is issued again after a row
/// was deleted, or after a failover that lost the last grants.
///
/// An expired lease is taken only after notice was given: see `LockRow::notice_is_due`.
macro_rules! acquire {
    () => {
        concat!(
            "
UPDATE {table} AS lease
SET fencing_token = CASE WHEN lease.secret_key = $2 THEN lease.fencing_token
                ELSE GREATEST(lease.fencing_token + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint) END,
            previous_token = CASE WHEN lease.secret_key = $2 THEN lease.previous_token ELSE lease.fencing_token END,
            acquire_time = CASE WHEN lease.secret_key = $2 THEN lease.acquire_time ELSE clock_timestamp() END,
            expire_time = clock_timestamp() + $4::bigint * interval '1 microsecond',
            ttl_micros = $4,
            secret_key = $2,
            owner = $3,
            waiters = ",
            without_own_first!("lease.waiters", "$5"),
            "
WHERE lease.ctid = (
            SELECT ctid FROM {table}
            WHERE ctid = ",
            newest!("$1"),
            " AND lock_name = $1 AND lock_kind = 'insert' AND (secret_key = $2
                OR (expire_time <= clock_timestamp() AND (ttl_micros <= 0 OR expire_time = '1970-01-01 00:00:00+00')
                    AND (waiters = '' OR $5::text IS NULL OR ",
            is_first!("waiters", "$5"),
            ")))
            FOR UPDATE SKIP LOCKED)
RETURNING lease.lock_name, lease.secret_key::text, lease.fencing_token, lease.id, lease.waiters <> '',
            lease.fencing_token - lease.previous_token"
        )
    };
}
const ACQUIRE: &str = acquire!();

/// `ACQUIRE`, which also makes the row, granted, if there is none.
///
/// The INSERT reads first and has a lock timeout, like `CREATE` and for the same reasons. The token
/// of the grant before is zero, as in every new row.
const ACQUIRE_OR_MAKE: &str = concat!(
    "
WITH bound AS MATERIALIZED (SELECT set_config('lock_timeout', '5ms', true)),
taken (lock_name, secret_key, fencing_token, id, others_wait, tokens) AS (",
    acquire!(),
    "),
made AS (
    INSERT INTO {table} AS lease
        (lock_name, secret_key, owner, fencing_token, acquire_time, expire_time, ttl_micros)
    SELECT $1, $2, $3, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, clock_timestamp(),
        clock_timestamp() + $4::bigint * interval '1 microsecond', $4
    FROM bound WHERE ",
    newest!("$1"),
    " IS NULL
    ON CONFLICT (lock_name) DO NOTHING
    RETURNING lease.lock_name, lease.secret_key::text, lease.fencing_token, lease.id, FALSE, lease.fencing_token)
SELECT * FROM taken UNION ALL SELECT * FROM made"
);

/// Returns the listener of the first queue entry, to be notified.
///
/// FOR UPDATE does not wait for the guard of an open transaction: it skips the row then. If it
/// locks the row, no transaction of this lease can commit any more, so the row is settled.
const RELEASE: &str = concat!(
    "
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE {table} AS lease
SET expire_time = '1970-01-01 00:00:00+00',
    ttl_micros = 0,
    waiters = ",
    behind_others!("lease.waiters", "$3", "$4"),
    "
FROM unsynced
WHERE lease.ctid = (
    SELECT ctid FROM {table} WHERE ctid = ",
    newest!("$1"),
    " AND lock_name = $1 AND secret_key = $2
    FOR UPDATE SKIP LOCKED)
RETURNING lease.id, ",
    first_listener!("lease.waiters")
);

/// `RELEASE` while a transaction is open that the lease guards. That transaction can still commit,
/// so the row is not settled.
const RELEASE_UNDER_GUARD: &str = concat!(
    "
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE {table} AS lease
SET expire_time = '1970-01-01 00:00:00+00',
    waiters = ",
    behind_others!("lease.waiters", "$3", "$4"),
    "
FROM unsynced
WHERE lease.ctid = (
    SELECT ctid FROM {table} WHERE ctid = ",
    newest!("$1"),
    " AND lock_name = $1 AND secret_key = $2
    FOR NO KEY UPDATE SKIP LOCKED)
RETURNING lease.id, ",
    first_listener!("lease.waiters")
);

/// Waits for the disk like a grant: no other process may take the lock before that time, whatever
/// crashes.
const RELEASE_LATER: &str = concat!(
    "
UPDATE {table} AS lease
SET expire_time = CASE WHEN until.passed THEN '1970-01-01 00:00:00+00' ELSE until.moment END,
    ttl_micros = CASE WHEN until.passed THEN 0 ELSE -GREATEST(until.left_over, 1) END,
    secret_key = CASE WHEN until.passed THEN lease.secret_key ELSE '' END
FROM (
    SELECT ctid, moment, moment <= clock_timestamp() AS passed,
        (extract(epoch FROM moment - clock_timestamp()) * 1000000)::bigint AS left_over
    FROM (
        SELECT ctid, LEAST(acquire_time, clock_timestamp()) + $3::bigint * interval '1 microsecond' AS moment
        FROM {table} WHERE ctid = ",
    newest!("$1"),
    " AND lock_name = $1 AND secret_key = $2
        FOR UPDATE SKIP LOCKED) AS unlocked) AS until
WHERE lease.ctid = until.ctid"
);

/// The notice is a fifth of the TTL, 1 s at most. A deadline more than the TTL and 2 s ahead is
/// moved to one TTL from now. `LockRow::notice_is_due` uses the same rules.
const GIVE_NOTICE: &str = concat!(
    "
UPDATE {table} AS lease
SET expire_time = CASE WHEN due.is_too_far
        THEN clock_timestamp() + GREATEST(abs(lease.ttl_micros), 1000000) * interval '1 microsecond'
        ELSE GREATEST(lease.expire_time, clock_timestamp() + due.notice) END,
    ttl_micros = CASE WHEN due.is_too_far THEN lease.ttl_micros ELSE 0 END
FROM (
    SELECT lease.ctid, LEAST(ttl_micros / 5, 1000000) * interval '1 microsecond' AS notice,
        expire_time > clock_timestamp() + (abs(ttl_micros) + 2000000) * interval '1 microsecond' AS is_too_far
    FROM unnest((SELECT $1::text[])) AS asked (name)
    CROSS JOIN LATERAL ",
    newest!("asked.name COLLATE \"C\""),
    " AS newest
    JOIN {table} AS lease ON lease.ctid = newest.ctid
    WHERE lock_kind = 'insert' AND expire_time > '1970-01-01 00:00:00+00'
    FOR NO KEY UPDATE OF lease SKIP LOCKED) AS due
WHERE lease.ctid = due.ctid
    AND (due.is_too_far OR (lease.ttl_micros > 0 AND lease.expire_time <= clock_timestamp() + due.notice))
RETURNING lease.lock_name::text"
);

/// FOR UPDATE, which conflicts with an open transaction that the last lease guards.
const SETTLE: &str = concat!(
    "
UPDATE {table} AS lease
SET expire_time = '1970-01-01 00:00:00+00', ttl_micros = 0, secret_key = ''
FROM (
    SELECT lease.ctid
    FROM unnest((SELECT $1::text[])) AS asked (lock_name)
    ",
    the_row!(from_behind),
    "
    WHERE lock_kind = 'insert' AND expire_time <= clock_timestamp()
        AND (ttl_micros <= 0 OR expire_time = '1970-01-01 00:00:00+00')
    FOR UPDATE OF lease SKIP LOCKED) AS free
WHERE lease.ctid = free.ctid"
);

const MARK: &str = concat!(
    "
UPDATE {table} AS lease
SET previous_token = GREATEST(lease.previous_token, $4)
WHERE lease.ctid = (
    SELECT ctid FROM {table}
    WHERE ctid = ",
    newest!("$1"),
    " AND lock_name = $1 AND secret_key = $2 AND fencing_token = $3
    FOR NO KEY UPDATE SKIP LOCKED)"
);

/// Tries to lock the row, because reading it would not show the difference: row level security and
/// missing privileges hide the row from a read, but make the lock fail.
const PROBE: &str = "
SELECT 1 FROM {table} WHERE lock_name >= $1 AND lock_name <= $1 ORDER BY lock_name DESC LIMIT 1
FOR UPDATE NOWAIT";

const IS_OURS: &str =
    concat!("SELECT 1 FROM {table} WHERE ctid = ", newest!("$1"), " AND lock_name = $1 AND secret_key = $2");

pub(super) async fn read(
    connection: &mut PgConnection,
    server: &Server,
    name: &str,
) -> driver::Result<Option<LockRow>> {
    let row = sqlx::query(server.table.sql(READ)).bind(name).fetch_optional(connection).await?;
    row.as_ref().map(lock_row).transpose()
}

pub(super) async fn create(
    connection: &mut PgConnection,
    server: &Server,
    name: &str,
    kind: Kind,
) -> driver::Result<bool> {
    let query = sqlx::query(server.table.sql(CREATE)).bind(name).bind(kind.as_str());
    let created = query.execute(&mut *connection).await;
    created_or_not(connection, server, created).await
}

pub(super) async fn created_or_not(
    connection: &mut PgConnection,
    server: &Server,
    created: sqlx::Result<PgQueryResult>,
) -> driver::Result<bool> {
    match created {
        Ok(_) => Ok(true),
        Err(error) => made_or_not(connection, server, error).await.map(|()| false),
    }
}

/// Why a statement that makes rows failed. `Ok`: an open transaction has made one of them.
pub(super) async fn made_or_not(
    connection: &mut PgConnection,
    server: &Server,
    error: sqlx::Error,
) -> driver::Result<()> {
    if code(&error) != Some(LOCK_NOT_AVAILABLE) {
        return Err(sequence::explained(server, error.into()));
    }
    // If the table as a whole can be locked, a transaction holds the name.
    let is_open = sqlx::raw_sql(server.table.sql(REACH_TABLE)).execute(connection).await.is_ok();
    if is_open { Ok(()) } else { Err(error.into()) }
}

pub(super) async fn acquire(
    connection: &mut PgConnection,
    server: &Server,
    claim: &Claim,
) -> driver::Result<Option<Grant>> {
    let row = sqlx::query(server.table.sql(if claim.makes_row { ACQUIRE_OR_MAKE } else { ACQUIRE }))
        .bind(&*claim.name)
        .bind(claim.secret.as_str())
        .bind(server.storable(&claim.owner))
        .bind(micros(claim.ttl))
        .bind(claim.entry.as_ref().map(key))
        .fetch_optional(&mut *connection)
        .await;
    let row = match row {
        Err(error) if claim.makes_row => {
            made_or_not(connection, server, error).await?;
            None
        }
        row => row?,
    };
    let Some(row) = row else { return Ok(None) };
    // A pooler that mixes up statements returns the row of another client. That is not a grant.
    if row.try_get::<&str, _>(0)? != &*claim.name || row.try_get::<&str, _>(1)? != claim.secret.as_str() {
        return Err(foreign_answer());
    }
    let (fencing_token, id) = (row.try_get(2)?, row.try_get(3)?);
    Ok(Some(Grant { id, fencing_token, others_wait: row.try_get(4)?, tokens: row.try_get(5)? }))
}

pub(super) async fn give_notice(
    connection: &mut PgConnection,
    server: &Server,
    names: &[Name],
) -> driver::Result<Vec<bool>> {
    let query = sqlx::query_scalar(server.table.sql(GIVE_NOTICE)).bind(texts(names));
    let given: Vec<String> = query.fetch_all(connection).await?;
    Ok(are_among(names.iter(), &given))
}

pub(super) async fn settle(
    connection: &mut PgConnection,
    server: &Server,
    names: &[Name],
) -> driver::Result<()> {
    sqlx::query(server.table.sql(SETTLE)).bind(texts(names)).execute(connection).await?;
    Ok(())
}

pub(super) async fn mark(connection: &mut PgConnection, lease: &LeaseKey) -> driver::Result<bool> {
    let query = sqlx::query(lease.server.table.sql(MARK)).bind(&*lease.row.name).bind(lease.secret.as_str());
    let marked = query.bind(lease.fencing_token).bind(lease.mark).execute(connection).await?;
    Ok(marked.rows_affected() > 0)
}

pub(super) async fn probe(
    connection: &mut PgConnection,
    server: &Server,
    name: &str,
) -> driver::Result<Probe> {
    match sqlx::query(server.table.sql(PROBE)).bind(name).fetch_optional(connection).await {
        Ok(Some(_)) => Ok(Probe::Free),
        Ok(None) => Ok(Probe::Nothing),
        Err(error) if code(&error) == Some(LOCK_NOT_AVAILABLE) => Ok(Probe::Locked),
        Err(error) => Err(error.into()),
    }
}

pub(super) async fn release(
    connection: &mut PgConnection,
    server: &Server,
    lease: &ReleaseClaim,
) -> driver::Result<Released> {
    let ReleaseClaim { name, secret, entry } = lease;
    let (key, rest) = QueueEntry::parts(entry.as_ref());
    for statement in [RELEASE, RELEASE_UNDER_GUARD] {
        let query = sqlx::query(server.table.sql(statement)).bind(&**name).bind(secret.as_str());
        let row = query.bind(&key).bind(&rest).fetch_optional(&mut *connection).await?;
        if let Some(row) = row {
            let notification = Notification::parse(Some(row.try_get(1)?), row.try_get(0)?);
            return Ok(Released { status: LeaseStatus::Ours, notification });
        }
    }
    released_or_not(connection, server, name, secret, 0).await.map(Released::from)
}

pub(super) async fn release_later(
    connection: &mut PgConnection,
    server: &Server,
    name: &str,
    secret: &Secret,
    at_least: Duration,
) -> driver::Result<LeaseStatus> {
    let query = sqlx::query(server.table.sql(RELEASE_LATER)).bind(name).bind(secret.as_str());
    let released = query.bind(micros(at_least)).execute(&mut *connection).await?;
    released_or_not(connection, server, name, secret, released.rows_affected()).await
}

async fn released_or_not(
    connection: &mut PgConnection,
    server: &Server,
    name: &str,
    secret: &Secret,
    released: u64,
) -> driver::Result<LeaseStatus> {
    if released > 0 {
        return Ok(LeaseStatus::Ours);
    }
    let query = sqlx::query(server.table.sql(IS_OURS)).bind(name).bind(secret.as_str());
    let ours = query.fetch_optional(connection).await?;
    Ok(if ours.is_some() { LeaseStatus::Busy } else { LeaseStatus::NotOurs })
}

fn foreign_answer() -> StepError {
    StepError::disconnected(
        "the server answered with the row of another statement: a pooler in transaction mode needs support for prepared \
         statements (PgBouncer 1.21 or later with max_prepared_statements above 0)",
    )
}
