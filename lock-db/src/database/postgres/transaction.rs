//! Locks and guards in transactions.

use std::time::Duration;

use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Postgres, Row};

use crate::Kind;
use crate::database::{Guarded, LeaseKey, LockDatabase, RowAttempt, RowClaim, hexadecimal};

/// Conflicts with a takeover, but not with our own renewal: a takeover has the row locked FOR UPDATE before it writes, in the
/// same statement, and PostgreSQL keeps the stronger of the two locks of one transaction.
///
/// `bound` limits the wait for a transaction that has the row, and the outermost SELECT puts the caller's own limit back
/// once the row is locked. When it is not, the transaction has failed or is about to be doomed.
const GUARD: &str = "
WITH bound AS MATERIALIZED (
    SELECT current_setting('lock_timeout') AS before, set_config('lock_timeout', $3, true))
SELECT set_config('lock_timeout', before, true)
FROM (
    SELECT bound.before FROM bound, distributed_lock AS lease
    WHERE lease.lock_name = $1 AND lease.secret_key = $2 AND lease.fencing_token = $4
    FOR KEY SHARE OF lease) AS guarded";

const GUARD_AND_RELEASE: &str = "
WITH bound AS MATERIALIZED (
    SELECT current_setting('lock_timeout') AS before, set_config('lock_timeout', $3, true)),
released AS (
    UPDATE distributed_lock AS lease SET expire_time = '1970-01-01 00:00:00+00'
    FROM bound WHERE lease.lock_name = $1 AND lease.secret_key = $2 AND lease.fencing_token = $4
    RETURNING bound.before, CASE WHEN substr(lease.waiters, 49, 8) > '00000000'
        THEN pg_notify('lock_db_' || substr(lease.waiters, 49, 8), lease.id::text)::text END AS called)
SELECT set_config('lock_timeout', before, true), called FROM released";

/// Written, not only locked: a later transaction with an older snapshot then fails instead of reading old data.
const LOCK_ROW_AT_ONCE: &str = "
UPDATE distributed_lock AS held
SET fencing_token = GREATEST(before.fencing_token + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint),
    secret_key = $3, owner = $4, acquire_time = clock_timestamp()
FROM (
    SELECT id, secret_key, fencing_token FROM distributed_lock
    WHERE lock_name = $1 AND lock_kind = $2 AND expire_time <= clock_timestamp()
    FOR UPDATE SKIP LOCKED) AS before
WHERE held.id = before.id
RETURNING held.fencing_token, before.secret_key";

const SEEN: &str = "SELECT 1 FROM distributed_lock WHERE id = $1 AND lock_name = $2";

/// Fails, and with it every later statement of the transaction.
const DOOM: &str =
    "SELECT CAST('lock-db: this transaction must not commit any more, roll it back' AS integer)";

/// Whether the block below has written the row, and what it found there.
const AFTER_WAITING: &str = "
SELECT secret_key, fencing_token, COALESCE(current_setting('lock_db.secret_before', true), '')
FROM distributed_lock WHERE id = $1 AND lock_name = $2";

/// A transaction that has failed refuses this, and one that has locked a row has a number. Not by a look at the row, which a
/// serializable transaction would be blamed for.
const STILL_LOCKED: &str = "SELECT txid_current_if_assigned() IS NOT NULL";

pub(super) async fn lock_row(
    connection: &mut PgConnection,
    claim: &RowClaim,
    slice: Duration,
) -> sqlx::Result<RowAttempt> {
    // Whether a row that might be leased was free shows only once it is locked: not without a savepoint.
    if !slice.is_zero() || claim.kind == Kind::Insert {
        return lock_in_savepoint(connection, claim, slice).await;
    }
    let locked = sqlx::query(LOCK_ROW_AT_ONCE)
        .bind(&*claim.row.name)
        .bind(claim.kind.as_str())
        .bind(claim.secret.as_str())
        .bind(&*claim.owner)
        .fetch_optional(&mut *connection)
        .await?;
    if let Some(row) = locked {
        return Ok(RowAttempt::Locked { fencing_token: row.try_get(0)?, before: row.try_get(1)? });
    }
    // A snapshot from before the row was made doesn't see it, however free it is.
    let seen = sqlx::query(SEEN).bind(claim.row.id).bind(&*claim.row.name).fetch_optional(connection).await?;
    Ok(if seen.is_some() { RowAttempt::Busy } else { RowAttempt::Missing })
}

pub(super) async fn commit_locked(
    connection: &mut PgConnection,
    _name: &str,
    _fencing_token: i64,
) -> sqlx::Result<Guarded> {
    let locked: bool = sqlx::query_scalar(STILL_LOCKED).fetch_one(connection).await?;
    Ok(if locked { Guarded::Ours } else { Guarded::Ended })
}

pub(super) async fn guard(
    connection: &mut PgConnection,
    lease: &LeaseKey,
    release: bool,
) -> sqlx::Result<Guarded> {
    let sql = if release { GUARD_AND_RELEASE } else { GUARD };
    let limit = format!("{}ms", Postgres::GUARD_LIMIT.as_millis());
    let query = sqlx::query(sql).bind(&*lease.row.name).bind(lease.secret.as_str()).bind(limit);
    let query = query.bind(lease.fencing_token);
    Ok(Guarded::when(query.fetch_optional(connection).await?.is_some()))
}

pub(super) async fn doom(connection: &mut PgConnection) {
    let _doomed = sqlx::raw_sql(DOOM).execute(connection).await;
}

/// Waits in the server's queue for the row, and writes it. A lock timeout would end the caller's transaction, and a row
/// that turns out to be leased would stay locked, so it happens inside a savepoint; a deadlock and an old snapshot do end
/// the transaction.
///
/// The savepoint is that of a block with an exception handler, so that it begins and ends on the server, in one message:
/// one of sqlx 0.9 that is dropped midway rolls the caller's whole transaction back, and what the caller sends next
/// would commit by itself. The row is locked and written under the same savepoint: anything else takes a multixact.
///
/// A `statement_timeout` would end the transaction as well, so the wait stays below it. It counts the turn in the queue
/// and the wait for the holder together, the lock timeout each.
async fn lock_in_savepoint(
    connection: &mut PgConnection,
    claim: &RowClaim,
    slice: Duration,
) -> sqlx::Result<RowAttempt> {
    // A block takes no parameters: numbers, a constant and hexadecimal digits need no quoting. A limit of zero would mean
    // no limit at all.
    let (id, kind, secret) = (claim.row.id, claim.kind.as_str(), claim.secret.as_str());
    let owner = hexadecimal(&claim.owner);
    let limit = slice.as_millis().max(1);
    let no_wait = if slice.is_zero() { "NOWAIT" } else { "" };
    let sql = format!(
        "DO $lock_db$
        DECLARE
            limit_before text := current_setting('lock_timeout');
            third integer := extract(epoch FROM current_setting('statement_timeout')::interval) * 1000 / 3;
            secret_before text;
        BEGIN
            PERFORM set_config('lock_timeout', LEAST({limit}, NULLIF(third, 0)) || 'ms', true);
            SELECT secret_key INTO secret_before FROM distributed_lock
                WHERE id = {id} AND lock_kind = '{kind}' AND expire_time <= clock_timestamp() FOR UPDATE {no_wait};
            IF secret_before IS NULL THEN
                RAISE lock_not_available;
            END IF;
            UPDATE distributed_lock
                SET fencing_token = GREATEST(fencing_token + 1,
                        (extract(epoch FROM clock_timestamp()) * 1000000)::bigint),
                    secret_key = '{secret}', owner = convert_from('\\x{owner}'::bytea, 'UTF8'),
                    acquire_time = clock_timestamp()
                WHERE id = {id};
            PERFORM set_config('lock_db.secret_before', secret_before, true);
            PERFORM set_config('lock_timeout', limit_before, true);
        EXCEPTION WHEN lock_not_available THEN
            NULL;
        END $lock_db$"
    );
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *connection).await?;
    let row = sqlx::query(AFTER_WAITING).bind(id).bind(&*claim.row.name).fetch_optional(connection).await?;
    let Some(row) = row else { return Ok(RowAttempt::Missing) };
    if row.try_get::<&str, _>(0)? != secret {
        return Ok(RowAttempt::Busy);
    }
    Ok(RowAttempt::Locked { fencing_token: row.try_get(1)?, before: row.try_get(2)? })
}
