//! One lease at a time, and its queue, on private connections.
//!
//! What gives something up does not wait for the disk (`synchronous_commit` off, for that statement alone). Others see it
//! at once, and whatever they commit on top of it comes behind it in the log, so the order of grants is that of the disk. When
//! the server crashes within the next second, the release may be forgotten: then the lease ends with its TTL, like that of
//! a holder that died. A grant always waits: forgotten, it would be given twice.

use std::time::Duration;

use sqlx::Row;
use sqlx::postgres::PgConnection;

use crate::Kind;
use crate::database::{Claim, Grant, LockRow, Place, Return, Standing};
use crate::limits::micros;
use crate::secret::Secret;

/// `clock_timestamp()` everywhere: `now()` stands still inside a transaction.
const LOOK: &str = "
SELECT id, lock_kind, secret_key, owner, fencing_token,
       (extract(epoch FROM create_time) * 1000000)::bigint,
       (extract(epoch FROM acquire_time) * 1000000)::bigint,
       (extract(epoch FROM expire_time) * 1000000)::bigint,
       (extract(epoch FROM expire_time - clock_timestamp()) * 1000000)::bigint, waiters
FROM distributed_lock WHERE lock_name = $1";

/// DO NOTHING waits all the same: when somebody made the row a moment ago and a transaction has locked and written it by
/// now, for the end of that transaction. The lane must not stand still for that, least of all because that transaction may
/// wait for the lane. So it looks first, which sees what this process has made, and has a limit, which is that of the
/// statement alone, for what another one is making.
const CREATE: &str = "
WITH bound AS MATERIALIZED (
    SELECT set_config('lock_timeout', '50ms', true), set_config('synchronous_commit', 'off', true))
INSERT INTO distributed_lock (lock_name, lock_kind) SELECT $1, $2 FROM bound
WHERE NOT EXISTS (SELECT 1 FROM distributed_lock WHERE lock_name = $1)
ON CONFLICT DO NOTHING";

/// The new number is never below the clock's microseconds, so that neither a row that was cleaned away nor a failover
/// that lost the last grants brings a number back.
const ACQUIRE: &str = "
UPDATE distributed_lock AS lease
SET fencing_token = CASE WHEN lease.secret_key = $2 THEN lease.fencing_token
        ELSE GREATEST(lease.fencing_token + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint) END,
    previous_token = CASE WHEN lease.secret_key = $2 THEN lease.previous_token ELSE lease.fencing_token END,
    acquire_time = CASE WHEN lease.secret_key = $2 THEN lease.acquire_time ELSE clock_timestamp() END,
    expire_time = clock_timestamp() + $4::bigint * interval '1 microsecond',
    secret_key = $2,
    owner = $3,
    waiters = CASE WHEN left(lease.waiters, 32) = $5 THEN substr(lease.waiters, 57) ELSE lease.waiters END
WHERE lease.id = (
    SELECT id FROM distributed_lock
    WHERE lock_name = $1 AND lock_kind = 'insert' AND (secret_key = $2
        OR (expire_time <= clock_timestamp() AND (waiters = '' OR $5::text IS NULL OR left(waiters, 32) = $5)))
    FOR UPDATE SKIP LOCKED)
RETURNING lease.lock_name, lease.secret_key, lease.fencing_token, lease.id, lease.waiters <> '',
    lease.fencing_token - lease.previous_token";

/// Calls the first in the queue, if there is one that can be called. Only then: notifications are serialised at commit.
const RELEASE: &str = "
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE distributed_lock AS lease
SET expire_time = '1970-01-01 00:00:00+00',
    waiters = CASE WHEN $3 <> '' AND lease.waiters <> '' AND length(lease.waiters) < 3584
            AND position($3 IN lease.waiters) = 0
        THEN lease.waiters || $3 || lpad(((extract(epoch FROM clock_timestamp()) * 1000000)::bigint + 2000000)::text, 16, '0') || $4
        ELSE lease.waiters END
FROM unsynced
WHERE lease.id = (
    SELECT id FROM distributed_lock WHERE lock_name = $1 AND secret_key = $2
    FOR NO KEY UPDATE SKIP LOCKED)
RETURNING CASE WHEN substr(lease.waiters, 49, 8) > '00000000'
    THEN pg_notify('lock_db_' || substr(lease.waiters, 49, 8), lease.id::text)::text END";

/// On disk like a grant: until then nobody else is to have it, whatever crashes.
const RELEASE_LATER: &str = "
UPDATE distributed_lock AS lease
SET expire_time = CASE WHEN until.passed THEN '1970-01-01 00:00:00+00' ELSE until.moment END,
    secret_key = CASE WHEN until.passed THEN lease.secret_key ELSE '' END
FROM (
    SELECT id, moment, moment <= clock_timestamp() AS passed
    FROM (
        SELECT id, acquire_time + $3::bigint * interval '1 microsecond' AS moment
        FROM distributed_lock WHERE lock_name = $1 AND secret_key = $2
        FOR NO KEY UPDATE SKIP LOCKED) AS unlocked) AS until
WHERE lease.id = until.id";

const STAND: &str = "
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE distributed_lock AS lease
SET waiters = lease.waiters || $2 || lpad(((extract(epoch FROM clock_timestamp()) * 1000000)::bigint + 2000000)::text, 16, '0') || $3
FROM unsynced
WHERE lease.id = (
    SELECT id FROM distributed_lock
    WHERE lock_name = $1 AND lock_kind = 'insert' AND length(waiters) < 3584 AND position($2 IN waiters) = 0
    FOR NO KEY UPDATE SKIP LOCKED)";

/// Only on top of what was read before.
const SET_WAITERS: &str = "
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE distributed_lock AS lease SET waiters = $3
FROM unsynced
WHERE lease.id = (
    SELECT id FROM distributed_lock WHERE lock_name = $1 AND lock_kind = 'insert' AND waiters = $2
    FOR NO KEY UPDATE SKIP LOCKED)";

const REMOVE_WAITER: &str = "
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE distributed_lock AS lease
SET waiters = overlay(waiters PLACING '' FROM position($2 IN waiters) FOR 56)
FROM unsynced
WHERE lease.id = (
    SELECT id FROM distributed_lock WHERE lock_name = $1 AND position($2 IN waiters) > 0
    FOR NO KEY UPDATE SKIP LOCKED)";

const IS_OURS: &str = "SELECT 1 FROM distributed_lock WHERE lock_name = $1 AND secret_key = $2";

pub(super) async fn look(connection: &mut PgConnection, name: &str) -> sqlx::Result<Option<LockRow>> {
    let row = sqlx::query(LOOK).bind(name).fetch_optional(connection).await?;
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

pub(super) async fn create(connection: &mut PgConnection, name: &str, kind: Kind) -> sqlx::Result<()> {
    sqlx::query(CREATE).bind(name).bind(kind.as_str()).execute(connection).await.map(drop)
}

pub(super) async fn acquire(connection: &mut PgConnection, claim: &Claim) -> sqlx::Result<Option<Grant>> {
    let row = sqlx::query(ACQUIRE)
        .bind(&*claim.name)
        .bind(claim.secret.as_str())
        .bind(&*claim.owner)
        .bind(micros(claim.ttl))
        .bind(claim.place.as_ref().map(Secret::as_str))
        .fetch_optional(connection)
        .await?;
    let Some(row) = row else { return Ok(None) };
    // A pooler that mixes up statements answers with somebody else's row: that is no grant.
    if row.try_get::<&str, _>(0)? != &*claim.name || row.try_get::<&str, _>(1)? != claim.secret.as_str() {
        return Err(foreign_answer());
    }
    let (fencing_token, id) = (row.try_get(2)?, row.try_get(3)?);
    Ok(Some(Grant { id, fencing_token, others_wait: row.try_get(4)?, numbers: row.try_get(5)? }))
}

pub(super) async fn release(connection: &mut PgConnection, lease: &Return) -> sqlx::Result<Standing> {
    let Return { name, secret, place } = lease;
    let (place, listener) = Place::parts(place.as_ref());
    let query = sqlx::query(RELEASE).bind(&**name).bind(secret.as_str()).bind(place).bind(listener);
    let released = query.execute(&mut *connection).await?;
    released_or_not(connection, name, secret, released.rows_affected()).await
}

pub(super) async fn release_later(
    connection: &mut PgConnection,
    name: &str,
    secret: &Secret,
    at_least: Duration,
) -> sqlx::Result<Standing> {
    let query = sqlx::query(RELEASE_LATER).bind(name).bind(secret.as_str()).bind(micros(at_least));
    let released = query.execute(&mut *connection).await?;
    released_or_not(connection, name, secret, released.rows_affected()).await
}

pub(super) async fn stand(connection: &mut PgConnection, name: &str, place: &Place) -> sqlx::Result<bool> {
    let (secret, listener) = Place::parts(Some(place));
    let query = sqlx::query(STAND).bind(name).bind(secret).bind(listener);
    Ok(query.execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn set_waiters(
    connection: &mut PgConnection,
    name: &str,
    before: &str,
    after: &str,
) -> sqlx::Result<bool> {
    let query = sqlx::query(SET_WAITERS).bind(name).bind(before).bind(after);
    Ok(query.execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn remove_waiter(
    connection: &mut PgConnection,
    name: &str,
    secret: &Secret,
) -> sqlx::Result<()> {
    sqlx::query(REMOVE_WAITER).bind(name).bind(secret.as_str()).execute(connection).await.map(drop)
}

async fn released_or_not(
    connection: &mut PgConnection,
    name: &str,
    secret: &Secret,
    released: u64,
) -> sqlx::Result<Standing> {
    if released > 0 {
        return Ok(Standing::Ours);
    }
    let ours = sqlx::query(IS_OURS).bind(name).bind(secret.as_str()).fetch_optional(connection).await?;
    Ok(if ours.is_some() { Standing::Busy } else { Standing::NotOurs })
}

fn foreign_answer() -> sqlx::Error {
    sqlx::Error::Protocol(
        "the server answered with the row of another statement: a pooler in transaction mode needs support for prepared \
         statements (PgBouncer 1.21 or later with max_prepared_statements above 0)"
            .into(),
    )
}
