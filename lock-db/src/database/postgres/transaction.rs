//! Guards of leases in transactions: the check that a lease is ours, and the commit with it.

use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{AssertSqlSafe, Postgres, Row};

use super::errors::{LOGARITHM_OF_ZERO, code, says};
use super::row_lock::is_here;
use crate::database::driver;
use crate::database::driver::TransactionDriver;
use crate::database::{Guarded, LeaseKey, Notification, hexadecimal, secret_digest};

/// Conflicts with a takeover, but not with our own renewal. A takeover locks the row FOR UPDATE
/// before it writes, in the same statement, and PostgreSQL keeps the stronger of a transaction's
/// two locks.
///
/// A released lease guards nothing, except in the transaction that releases it. `lock_db.released`
/// lists what the transaction has released, by id and fencing token.
///
/// `bound` limits the wait for a transaction that has the row locked. The outermost SELECT restores
/// the caller's own limit once the row is locked. If the row is not locked, the transaction has
/// failed or is about to be doomed. From here on the server ends the transaction if it hears
/// nothing from the client for one TTL; until then the lock can't be taken.
const GUARD: &str = "
WITH bound AS MATERIALIZED (
    SELECT current_setting('lock_db.guard_before', true) AS before, set_config('lock_timeout', $3, true),
        (extract(epoch FROM current_setting('idle_in_transaction_session_timeout')::interval) * 1000)::bigint AS idle,
        ln(COALESCE(current_setting('lock_db.here', true) = '1', false)::integer))
SELECT set_config('lock_timeout', before, true),
    set_config('idle_in_transaction_session_timeout', LEAST(NULLIF(idle, 0), $5::bigint, 2147483647)::text, true)
FROM (
    SELECT bound.before, bound.idle FROM bound, LATERAL (
        SELECT 1 FROM {table} AS lease
        WHERE bound.idle IS NOT NULL AND lease.lock_name >= $1 AND lease.lock_name <= $1 AND lease.secret_key = $2
            AND lease.fencing_token = $4 AND lease.previous_token >= $6
            AND (lease.expire_time > '1970-01-01 00:00:00+00'
                OR strpos(current_setting('lock_db.released', true), ' ' || lease.id || ':' || lease.fencing_token || ' ') > 0)
        ORDER BY lease.lock_name DESC LIMIT 1
        FOR KEY SHARE) AS lease) AS guarded";

/// The row is settled only if no other transaction is guarded by this lease, because such a
/// transaction can still commit.
const GUARD_AND_RELEASE: &str = "
WITH bound AS MATERIALIZED (
    SELECT current_setting('lock_db.guard_before', true) AS before, set_config('lock_timeout', $3, true),
        (extract(epoch FROM current_setting('idle_in_transaction_session_timeout')::interval) * 1000)::bigint AS idle,
        ln(COALESCE(current_setting('lock_db.here', true) = '1', false)::integer)),
alone AS MATERIALIZED (
    SELECT lease.id FROM {table} AS lease
    WHERE lease.lock_name = $1 AND lease.secret_key = $2 AND lease.fencing_token = $4
    FOR UPDATE OF lease SKIP LOCKED),
released AS (
    UPDATE {table} AS lease
    SET expire_time = '1970-01-01 00:00:00+00',
        ttl_micros = CASE WHEN EXISTS (SELECT 1 FROM alone) THEN 0 ELSE lease.ttl_micros END
    FROM bound
    WHERE lease.lock_name = $1 AND lease.secret_key = $2 AND lease.fencing_token = $4
        AND (lease.expire_time > '1970-01-01 00:00:00+00'
            OR strpos(current_setting('lock_db.released', true), ' ' || lease.id || ':' || lease.fencing_token || ' ') > 0)
    RETURNING bound.before, bound.idle, lease.id, lease.fencing_token)
SELECT set_config('lock_timeout', before, true),
    set_config('lock_db.released',
        concat(current_setting('lock_db.released', true), ' ', id, ':', fencing_token, ' '), true),
    set_config('idle_in_transaction_session_timeout', LEAST(NULLIF(idle, 0), $5::bigint, 2147483647)::text, true)
FROM released";

/// Fails, and then every later statement of the transaction fails too.
const DOOM: &str =
    "SELECT CAST('lock-db: this transaction must not commit any more, roll it back' AS integer)";

/// Texts that are not numbers, so that casting them fails with an error that contains them.
const NOT_OURS: &str = "lock_db: not ours";
const ENDED: &str = "lock_db: ended";

/// Fails unless this is the marked transaction. The mark ends with its transaction.
const CHECK_MARK: &str = "
SELECT CAST(CASE current_setting('lock_db.mark', true) WHEN '1' THEN '1' ELSE 'lock_db: ended' END AS integer)";

/// Commits, and begins an empty transaction. That one is for the ROLLBACK of the transaction's
/// handle, which would otherwise cause a warning.
const COMMIT: &str = "COMMIT AND CHAIN";

pub(super) async fn commit_locked(connection: &mut PgConnection) -> driver::Result<Guarded> {
    commit_marked(connection, None).await
}

/// Sends guard and COMMIT in one message. If the host vanishes, it has sent both or neither, so no
/// guard is left behind that holds off a takeover.
pub(super) async fn commit_guarded(
    connection: &mut PgConnection,
    lease: &LeaseKey,
    release: bool,
) -> driver::Result<Guarded> {
    let (table, is_ours, first_listener) =
        (lease.server.table.name(), is_ours(lease), first_listener!("lease.waiters"));
    let guard = if release {
        format!(
            "WITH alone AS MATERIALIZED (
                SELECT lease.id FROM {table} AS lease WHERE {is_ours} ORDER BY lease.lock_name DESC LIMIT 1 FOR UPDATE SKIP LOCKED),
            released AS (
                UPDATE {table} AS lease SET expire_time = '1970-01-01 00:00:00+00',
                    ttl_micros = CASE WHEN EXISTS (SELECT 1 FROM alone) THEN 0 ELSE lease.ttl_micros END
                WHERE {is_ours} RETURNING lease.id, {first_listener} AS listener)
            SELECT CAST(CASE count(*) WHEN 1 THEN '1' ELSE '{NOT_OURS}' END AS integer), max(id), max(listener) FROM released"
        )
    } else {
        format!(
            "SELECT CAST(CASE count(*) WHEN 1 THEN '1' ELSE '{NOT_OURS}' END AS integer) FROM (
                SELECT 1 FROM {table} AS lease WHERE {is_ours} ORDER BY lease.lock_name DESC LIMIT 1 FOR KEY SHARE) AS guarded"
        )
    };
    commit_marked(connection, Some(guard)).await
}

/// Sends check, guard and COMMIT together. The server executes nothing after an error.
async fn commit_marked(connection: &mut PgConnection, guard: Option<String>) -> driver::Result<Guarded> {
    let limit = Postgres::GUARD_LIMIT.as_millis();
    let guard = guard.map_or(String::new(), |guard| format!("SET LOCAL lock_timeout = {limit}; {guard};"));
    let sql = format!("{CHECK_MARK}; {guard} {COMMIT}");
    match sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await {
        Ok(rows) => Ok(Guarded::Committed { notification: rows.last().and_then(notified) }),
        // Recognized by text: an error that the owner's trigger raises at the COMMIT may have any
        // code.
        Err(error) if says(&error, NOT_OURS) => Ok(Guarded::NotOurs),
        Err(error) if says(&error, ENDED) => Ok(Guarded::Ended),
        Err(error) => Err(error.into()),
    }
}

/// The notification in a row that a release returns.
fn notified(row: &PgRow) -> Option<Notification> {
    Notification::parse(row.try_get(2).ok()?, row.try_get(1).ok()?)
}

pub(super) async fn guard(
    connection: &mut PgConnection,
    lease: &LeaseKey,
    release: bool,
) -> driver::Result<Guarded> {
    if !is_here(connection, &lease.server).await? {
        return Ok(Guarded::Elsewhere);
    }
    let limit = format!("{}ms", Postgres::GUARD_LIMIT.as_millis());
    let query = sqlx::query(lease.server.table.sql(if release { GUARD_AND_RELEASE } else { GUARD }))
        .persistent(lease.server.keeps_statements)
        .bind(&*lease.row.name)
        .bind(lease.secret.as_str())
        .bind(limit)
        .bind(lease.fencing_token);
    let idle = i64::try_from(lease.ttl.as_millis()).unwrap_or(i64::MAX);
    // A release needs no mark: it writes the row, which fails with an old snapshot.
    let query = query.bind(idle);
    let query = if release { query } else { query.bind(lease.mark) };
    match query.fetch_optional(connection).await {
        Err(error) if code(&error) == Some(LOGARITHM_OF_ZERO) => Ok(Guarded::Ended),
        found => Ok(Guarded::when(found?.is_some())),
    }
}

pub(super) async fn doom(connection: &mut PgConnection) {
    let _doomed = sqlx::raw_sql(DOOM).execute(connection).await;
}

/// The condition that the lease is ours. Statements on the application's connection are sent as
/// text and may be logged, so this contains only a digest of the secret. Nothing in it needs
/// escaping.
fn is_ours(lease: &LeaseKey) -> String {
    let digits = secret_digest(lease.secret.as_str());
    let (name, id, token) = (hexadecimal(lease.row.name.as_bytes()), lease.row.id, lease.fencing_token);
    format!(
        "lease.lock_name >= convert_from(decode('{name}', 'hex'), 'UTF8')
        AND lease.lock_name <= convert_from(decode('{name}', 'hex'), 'UTF8') AND lease.fencing_token = {token}
        AND encode(sha256(convert_to(lease.secret_key, 'UTF8')), 'hex') = '{digits}'
        AND (lease.expire_time > '1970-01-01 00:00:00+00' OR strpos(current_setting('lock_db.released', true), ' {id}:{token} ') > 0)"
    )
}
