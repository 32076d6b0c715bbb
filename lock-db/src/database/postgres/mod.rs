//! PostgreSQL 12 and later.
//!
//! No statement on a private connection waits for a locked row: what somebody has locked is skipped and asked for
//! again later. So a batch can't be held up by one row, two batches can't deadlock, and nothing has to be SET, which
//! a pooler in transaction mode would hand on to other clients.

mod listener;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use sqlx::postgres::{PgConnection, PgDatabaseError, PgListener, PgSeverity};
use sqlx::{AssertSqlSafe, Connection, Pool, Postgres, Row};

use super::{
    Claim, Cluster, Exchanged, Fault, Grant, Guarded, LeaseKey, LockDatabase, LockRow, Renewal, Return,
    RowAttempt, RowClaim, Standing, hexadecimal, in_order,
};
use crate::limits::micros;
use crate::secret::Secret;
use crate::{Kind, schema};

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
WITH bound AS MATERIALIZED (SELECT set_config('lock_timeout', '50ms', true))
INSERT INTO distributed_lock (lock_name, lock_kind) SELECT $1, $2 FROM bound
WHERE NOT EXISTS (SELECT 1 FROM distributed_lock WHERE lock_name = $1)
ON CONFLICT DO NOTHING";

/// The new number is never below the clock's microseconds, so that neither a row that was cleaned away nor a failover
/// that lost the last grants brings a number back.
const ACQUIRE: &str = "
UPDATE distributed_lock AS lease
SET fencing_token = CASE WHEN lease.secret_key = $2 THEN lease.fencing_token
        ELSE GREATEST(lease.fencing_token + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint) + $5 - 1 END,
    acquire_time = CASE WHEN lease.secret_key = $2 THEN lease.acquire_time ELSE clock_timestamp() END,
    expire_time = clock_timestamp() + $4::bigint * interval '1 microsecond',
    secret_key = $2,
    owner = $3,
    waiters = CASE WHEN left(lease.waiters, 32) = $2 THEN substr(lease.waiters, 57) ELSE lease.waiters END
WHERE lease.id = (
    SELECT id FROM distributed_lock
    WHERE lock_name = $1 AND lock_kind = 'insert' AND (secret_key = $2
        OR (expire_time <= clock_timestamp() AND (waiters = '' OR $6 OR left(waiters, 32) = $2)))
    FOR UPDATE SKIP LOCKED)
RETURNING lease.lock_name, lease.secret_key, lease.fencing_token, lease.id";

/// Never brings a released lease back (1970), and never moves a deadline backwards when the clock was set back.
const RENEW: &str = "
WITH unlocked AS MATERIALIZED (
    SELECT lease.id, asked.ttl
    FROM unnest($1::bigint[], $2::text[], $3::bigint[], $4::bigint[]) AS asked (id, secret_key, fencing_token, ttl)
    JOIN distributed_lock AS lease ON lease.id = asked.id
        AND lease.secret_key = asked.secret_key AND lease.fencing_token = asked.fencing_token
    WHERE lease.expire_time > '1970-01-01 00:00:00+00'
    FOR NO KEY UPDATE OF lease SKIP LOCKED)
UPDATE distributed_lock AS lease
SET expire_time = GREATEST(lease.expire_time, clock_timestamp() + unlocked.ttl * interval '1 microsecond')
FROM unlocked WHERE lease.id = unlocked.id
RETURNING lease.secret_key";

const STILL_OURS: &str = "
SELECT lease.secret_key
FROM unnest($1::bigint[], $2::text[], $3::bigint[]) AS asked (id, secret_key, fencing_token)
JOIN distributed_lock AS lease ON lease.id = asked.id
    AND lease.secret_key = asked.secret_key AND lease.fencing_token = asked.fencing_token
WHERE lease.expire_time > '1970-01-01 00:00:00+00'";

/// Calls the first in the queue, if there is one that can be called. Only then: notifications are serialised at commit.
const RELEASE: &str = "
UPDATE distributed_lock AS lease SET expire_time = '1970-01-01 00:00:00+00'
WHERE id = (
    SELECT id FROM distributed_lock WHERE lock_name = $1 AND secret_key = $2
    FOR NO KEY UPDATE SKIP LOCKED)
RETURNING CASE WHEN substr(lease.waiters, 49, 8) > '00000000'
    THEN pg_notify('lock_db_' || substr(lease.waiters, 49, 8), lease.id::text)::text END";

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

/// `RELEASE` and `ACQUIRE` for many at once, in one statement and one commit.
const EXCHANGE: &str = r#"
WITH returned AS (
    UPDATE distributed_lock AS lease
    SET expire_time = '1970-01-01 00:00:00+00'
    FROM (
        SELECT lease.id
        FROM unnest($1::text[], $2::text[]) AS asked (lock_name, secret_key)
        JOIN distributed_lock AS lease
            ON lease.lock_name = asked.lock_name COLLATE "C" AND lease.secret_key = asked.secret_key
        FOR NO KEY UPDATE OF lease SKIP LOCKED) AS unlocked
    WHERE lease.id = unlocked.id
    RETURNING lease.secret_key, lease.fencing_token, lease.id,
        CASE WHEN substr(lease.waiters, 49, 8) > '00000000'
            THEN pg_notify('lock_db_' || substr(lease.waiters, 49, 8), lease.id::text)::text END AS called),
granted AS (
    UPDATE distributed_lock AS lease
    SET fencing_token = CASE WHEN lease.secret_key = unlocked.secret_key THEN lease.fencing_token
            ELSE GREATEST(lease.fencing_token + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint)
                + unlocked.numbers - 1 END,
        acquire_time = CASE WHEN lease.secret_key = unlocked.secret_key THEN lease.acquire_time
            ELSE clock_timestamp() END,
        expire_time = clock_timestamp() + unlocked.ttl * interval '1 microsecond',
        secret_key = unlocked.secret_key,
        owner = $6,
        waiters = CASE WHEN left(lease.waiters, 32) = unlocked.secret_key THEN substr(lease.waiters, 57)
            ELSE lease.waiters END
    FROM (
        SELECT lease.id, asked.secret_key, asked.ttl, asked.numbers
        FROM unnest($3::text[], $4::text[], $5::bigint[], $7::bigint[], $8::bool[])
            AS asked (lock_name, secret_key, ttl, numbers, barges)
        JOIN distributed_lock AS lease ON lease.lock_name = asked.lock_name COLLATE "C"
        WHERE lease.lock_kind = 'insert'
            AND (lease.secret_key = asked.secret_key OR (lease.expire_time <= clock_timestamp()
                AND (lease.waiters = '' OR asked.barges OR left(lease.waiters, 32) = asked.secret_key)))
        FOR UPDATE OF lease SKIP LOCKED) AS unlocked
    WHERE lease.id = unlocked.id
    RETURNING lease.secret_key, lease.fencing_token, lease.id)
SELECT secret_key, fencing_token, id, called FROM returned
UNION ALL SELECT secret_key, fencing_token, id, NULL FROM granted"#;

/// Only on top of what was read before.
const SET_WAITERS: &str = "
UPDATE distributed_lock SET waiters = $3
WHERE id = (
    SELECT id FROM distributed_lock WHERE lock_name = $1 AND lock_kind = 'insert' AND waiters = $2
    FOR NO KEY UPDATE SKIP LOCKED)";

const REMOVE_WAITER: &str = "
UPDATE distributed_lock
SET waiters = overlay(waiters PLACING '' FROM position($2 IN waiters) FOR 56)
WHERE id = (
    SELECT id FROM distributed_lock WHERE lock_name = $1 AND position($2 IN waiters) > 0
    FOR NO KEY UPDATE SKIP LOCKED)";

const WHICH_ARE_OURS: &str = r#"
SELECT lease.secret_key
FROM unnest($1::text[], $2::text[]) AS asked (lock_name, secret_key)
JOIN distributed_lock AS lease
    ON lease.lock_name = asked.lock_name COLLATE "C" AND lease.secret_key = asked.secret_key"#;

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

const IS_OURS: &str = "SELECT 1 FROM distributed_lock WHERE lock_name = $1 AND secret_key = $2";

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

const CHECK_SCHEMA: &str = "
SELECT id, lock_name, lock_kind, secret_key, fencing_token, owner, create_time, acquire_time, expire_time, waiters
FROM distributed_lock LIMIT 0";

/// Held to the end of the migrating transaction. The number is `lock-db` in ASCII.
const LOCK_MIGRATIONS: &str = "SELECT pg_advisory_xact_lock(30521770275333218)";
/// Whatever the default of the database: what others have applied while this one waited has to be seen.
const BEGIN_MIGRATION: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";
const LIMIT_MIGRATION_WAIT: &str = "SET LOCAL lock_timeout = '60s'";
const CREATE_LEDGER: &str = "
CREATE TABLE IF NOT EXISTS _lock_db_migrations (
    version BIGINT PRIMARY KEY,
    applied_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp())";
const APPLIED: &str = "SELECT version FROM _lock_db_migrations";
const NOTE_APPLIED: &str = "INSERT INTO _lock_db_migrations (version) VALUES ($1)";
const MIGRATIONS: [(i64, &str); 1] = [(1, schema::POSTGRES)];

impl LockDatabase for Postgres {
    const FOLDER: &'static str = "postgres";
    /// Nothing more to do: after an error the server itself refuses all but a rollback.
    const BEGIN_MARKED: &'static str = "BEGIN";
    const BEGIN_SHORT: &'static str = "BEGIN; SET LOCAL idle_in_transaction_session_timeout = 5000";
    const ROW_IS_MADE_IN_TRANSACTION: bool = false;

    async fn prepare(_connection: &mut PgConnection) -> sqlx::Result<Cluster> {
        Ok(Cluster::SinglePrimary)
    }

    type Listening = PgListener;

    const CALLS: bool = true;

    async fn listen(pool: &Pool<Postgres>, listener: u32) -> sqlx::Result<PgListener> {
        listener::listen(pool, listener).await
    }

    async fn listening_connection(listening: &mut PgListener) -> sqlx::Result<&mut PgConnection> {
        listener::connection(listening).await
    }

    async fn called(listening: &mut PgListener) -> sqlx::Result<i64> {
        listener::called(listening).await
    }

    async fn migrate(connection: &mut PgConnection) -> sqlx::Result<()> {
        let mut transaction = connection.begin_with(BEGIN_MIGRATION).await?;
        sqlx::query(LIMIT_MIGRATION_WAIT).execute(&mut *transaction).await?;
        sqlx::query(LOCK_MIGRATIONS).execute(&mut *transaction).await?;
        sqlx::query(CREATE_LEDGER).execute(&mut *transaction).await?;
        let applied: Vec<i64> = sqlx::query_scalar(APPLIED).fetch_all(&mut *transaction).await?;
        for (version, sql) in MIGRATIONS {
            if !applied.contains(&version) {
                sqlx::raw_sql(sql).execute(&mut *transaction).await?;
                sqlx::query(NOTE_APPLIED).bind(version).execute(&mut *transaction).await?;
            }
        }
        transaction.commit().await
    }

    async fn check_schema(connection: &mut PgConnection) -> sqlx::Result<Option<&'static str>> {
        sqlx::query(CHECK_SCHEMA).execute(connection).await?;
        Ok(None)
    }

    async fn look(connection: &mut PgConnection, name: &str) -> sqlx::Result<Option<LockRow>> {
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

    async fn create(connection: &mut PgConnection, name: &str, kind: Kind) -> sqlx::Result<()> {
        sqlx::query(CREATE).bind(name).bind(kind.as_str()).execute(connection).await.map(drop)
    }

    async fn acquire(connection: &mut PgConnection, claim: &Claim) -> sqlx::Result<Option<Grant>> {
        let row = sqlx::query(ACQUIRE)
            .bind(&*claim.name)
            .bind(claim.secret.as_str())
            .bind(&*claim.owner)
            .bind(micros(claim.ttl))
            .bind(i64::from(claim.numbers))
            .bind(!claim.fair)
            .fetch_optional(connection)
            .await?;
        let Some(row) = row else { return Ok(None) };
        // A pooler that mixes up statements answers with somebody else's row: that is no grant.
        if row.try_get::<&str, _>(0)? != &*claim.name || row.try_get::<&str, _>(1)? != claim.secret.as_str() {
            return Err(foreign_answer());
        }
        Ok(Some(Grant { fencing_token: row.try_get(2)?, id: row.try_get(3)? }))
    }

    async fn renew(connection: &mut PgConnection, leases: &[Renewal]) -> sqlx::Result<Vec<Standing>> {
        let ids: Vec<i64> = leases.iter().map(|lease| lease.id).collect();
        let secrets: Vec<&str> = leases.iter().map(|lease| lease.secret.as_str()).collect();
        let tokens: Vec<i64> = leases.iter().map(|lease| lease.fencing_token).collect();
        let ttls: Vec<i64> = leases.iter().map(|lease| micros(lease.ttl)).collect();
        let renewed: Vec<String> = sqlx::query_scalar(RENEW)
            .bind(&ids)
            .bind(&secrets)
            .bind(&tokens)
            .bind(ttls)
            .fetch_all(&mut *connection)
            .await?;
        let ours: Vec<String> = if renewed.len() < leases.len() {
            sqlx::query_scalar(STILL_OURS)
                .bind(&ids)
                .bind(&secrets)
                .bind(&tokens)
                .fetch_all(connection)
                .await?
        } else {
            Vec::new()
        };
        // Those that were renewed last: they count.
        let found = ours.into_iter().map(|secret| (secret, Standing::Busy));
        Ok(in_order(leases, found.chain(renewed.into_iter().map(|secret| (secret, Standing::Ours)))))
    }

    async fn release(connection: &mut PgConnection, name: &str, secret: &Secret) -> sqlx::Result<Standing> {
        let query = sqlx::query(RELEASE).bind(name).bind(secret.as_str());
        let released = query.execute(&mut *connection).await?;
        released_or_not(connection, name, secret, released.rows_affected()).await
    }

    async fn release_later(
        connection: &mut PgConnection,
        name: &str,
        secret: &Secret,
        at_least: Duration,
    ) -> sqlx::Result<Standing> {
        let query = sqlx::query(RELEASE_LATER).bind(name).bind(secret.as_str()).bind(micros(at_least));
        let released = query.execute(&mut *connection).await?;
        released_or_not(connection, name, secret, released.rows_affected()).await
    }

    async fn exchange(
        connection: &mut PgConnection,
        returns: &[Return],
        claims: &[Claim],
    ) -> sqlx::Result<Exchanged> {
        let names: Vec<&str> = returns.iter().map(|one| &*one.name).collect();
        let secrets: Vec<&str> = returns.iter().map(|one| one.secret.as_str()).collect();
        let rows = sqlx::query(EXCHANGE)
            .bind(&names)
            .bind(&secrets)
            .bind(claims.iter().map(|claim| &*claim.name).collect::<Vec<_>>())
            .bind(claims.iter().map(|claim| claim.secret.as_str()).collect::<Vec<_>>())
            .bind(claims.iter().map(|claim| micros(claim.ttl)).collect::<Vec<_>>())
            .bind(claims.first().map_or("", |claim| &*claim.owner))
            .bind(claims.iter().map(|claim| i64::from(claim.numbers)).collect::<Vec<_>>())
            .bind(claims.iter().map(|claim| !claim.fair).collect::<Vec<_>>())
            .fetch_all(&mut *connection)
            .await?;
        let mut done = HashMap::with_capacity(rows.len());
        for row in &rows {
            let grant = Grant { fencing_token: row.try_get(1)?, id: row.try_get(2)? };
            done.insert(row.try_get::<&str, _>(0)?, grant);
        }
        let ours: HashSet<String> = if secrets.iter().all(|secret| done.contains_key(secret)) {
            HashSet::new()
        } else {
            let ours = sqlx::query_scalar(WHICH_ARE_OURS).bind(&names).bind(&secrets);
            ours.fetch_all(connection).await?.into_iter().collect()
        };
        let standing = |secret: &&str| match secret {
            secret if done.contains_key(*secret) => Standing::Ours,
            secret if ours.contains(*secret) => Standing::Busy,
            _ => Standing::NotOurs,
        };
        Ok(Exchanged {
            returns: secrets.iter().map(standing).collect(),
            grants: claims.iter().map(|claim| done.get(claim.secret.as_str()).copied()).collect(),
        })
    }

    async fn set_waiters(
        connection: &mut PgConnection,
        name: &str,
        before: &str,
        after: &str,
    ) -> sqlx::Result<bool> {
        let query = sqlx::query(SET_WAITERS).bind(name).bind(before).bind(after);
        Ok(query.execute(connection).await?.rows_affected() > 0)
    }

    async fn remove_waiter(connection: &mut PgConnection, name: &str, secret: &Secret) -> sqlx::Result<()> {
        sqlx::query(REMOVE_WAITER).bind(name).bind(secret.as_str()).execute(connection).await.map(drop)
    }

    async fn lock_row(
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
        let seen =
            sqlx::query(SEEN).bind(claim.row.id).bind(&*claim.row.name).fetch_optional(connection).await?;
        Ok(if seen.is_some() { RowAttempt::Busy } else { RowAttempt::Missing })
    }

    async fn commit_locked(
        connection: &mut PgConnection,
        _name: &str,
        _fencing_token: i64,
    ) -> sqlx::Result<Guarded> {
        let locked: bool = sqlx::query_scalar(STILL_LOCKED).fetch_one(connection).await?;
        Ok(if locked { Guarded::Ours } else { Guarded::Ended })
    }

    async fn commit_guarded(
        connection: &mut PgConnection,
        lease: &LeaseKey,
        release: bool,
    ) -> sqlx::Result<Guarded> {
        Self::guard(connection, lease, release).await
    }

    async fn guard(connection: &mut PgConnection, lease: &LeaseKey, release: bool) -> sqlx::Result<Guarded> {
        let sql = if release { GUARD_AND_RELEASE } else { GUARD };
        let limit = format!("{}ms", Self::GUARD_LIMIT.as_millis());
        let query = sqlx::query(sql).bind(&*lease.row.name).bind(lease.secret.as_str()).bind(limit);
        let query = query.bind(lease.fencing_token);
        Ok(Guarded::when(query.fetch_optional(connection).await?.is_some()))
    }

    async fn doom(connection: &mut PgConnection) {
        let _doomed = sqlx::raw_sql(DOOM).execute(connection).await;
    }

    fn classify(error: &sqlx::Error) -> Fault {
        if crate::error::is_connection_failure(error) {
            return Fault::Disconnected;
        }
        let Some(error) =
            error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>())
        else {
            return Fault::Other;
        };
        match error.code() {
            // lock_not_available: NOWAIT or lock_timeout
            "55P03" => Fault::Busy,
            // in_failed_sql_transaction, no_active_sql_transaction
            "25P02" | "25P01" => Fault::TransactionEnded,
            "40P01" => Fault::Deadlock,
            "40001" => Fault::Serialization,
            "42P01" => Fault::TableMissing,
            "42703" => Fault::TableDiffers,
            // read_only_sql_transaction: the server is no primary any more; a new connection may find the one that is.
            "25006" => Fault::Disconnected,
            code if code.starts_with("08") => Fault::Disconnected,
            // Whatever the code, the server has closed the connection: shutdown, idle for too long, too many of them.
            _ if matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic) => Fault::Disconnected,
            _ => Fault::Other,
        }
    }
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

fn foreign_answer() -> sqlx::Error {
    sqlx::Error::Protocol(
        "the server answered with the row of another statement: a pooler in transaction mode needs support for prepared \
         statements (PgBouncer 1.21 or later with max_prepared_statements above 0)"
            .into(),
    )
}
