//! Locks the row of a name in a transaction on a connection of the application.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Duration;

use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{Connection, Row, SqlSafeStr};

use super::errors::{LOCK_NOT_AVAILABLE, code, is_timeout};
use super::lease::REACH_TABLE;
use super::sequence;
use crate::Kind;
use crate::database::driver;
use crate::database::{RowAttempt, RowClaim, Server};

/// Begins a transaction whose first statement is `LOCK_ROW_AT_ONCE`, and limits how long that
/// statement waits for the table. The statement can't set a limit for itself, because the server
/// locks the table when it parses the statement.
pub(super) const BEGIN_AND_LIMIT: &str = "
BEGIN;
SELECT set_config('lock_db.mark', '1', true), set_config('lock_db.limit_before', current_setting('lock_timeout'), true),
    set_config('lock_timeout', '2s', true)";

/// Locks and writes a row in a transaction that lock-db began, or makes it if there is none. The row
/// is written, not only locked: a later transaction with an older snapshot then fails instead of
/// reading old data. A transaction that is making the row is not waited for here: see `CREATE`. The
/// timeout for that is undone by the result, or by `WAIT_AND_LOCK`. Returns
///
/// - the kind of the row as this statement sees it;
/// - what was there before, if the row was locked and written;
/// - whether the row was found and locked;
/// - whether the row was changed between the statement's snapshot and the lock. The current version
///   can't be found by its `ctid` in that snapshot.
///
/// Reads the index backwards because of old snapshots: see `newest!`.
macro_rules! lock_row_at_once {
    ($if_locked:literal) => {
        concat!(
            "
WITH found AS MATERIALIZED (
    SELECT ctid, secret_key, fencing_token FROM {table}
    WHERE lock_name >= $1 AND lock_name <= $1 AND lock_kind = 'row'
    ORDER BY lock_name DESC LIMIT 1
    FOR UPDATE ",
            $if_locked,
            "),
written AS (
    UPDATE {table} AS held
    SET fencing_token = GREATEST(found.fencing_token + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint),
        secret_key = $2, owner = $3, acquire_time = clock_timestamp()
    FROM found WHERE held.ctid = found.ctid
    RETURNING held.fencing_token, held.secret_key AS now, found.secret_key),
bound AS MATERIALIZED (SELECT set_config('lock_timeout', '5ms', true)),
made AS (
    INSERT INTO {table} AS held (lock_name, lock_kind, secret_key, owner, fencing_token, acquire_time)
    SELECT $1, 'row', $2, $3, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint, clock_timestamp()
    FROM bound WHERE ",
            newest!("$1"),
            " IS NULL
    ON CONFLICT (lock_name) DO NOTHING
    RETURNING held.fencing_token)
SELECT 'row', made.fencing_token, '', true, false,
    set_config('lock_timeout', current_setting('lock_db.limit_before'), true), set_config('lock_db.limit_before', '', true),
    set_config('lock_db.taken', concat(current_setting('lock_db.taken', true), $2::text), true)
FROM made
UNION ALL
SELECT seen.lock_kind::text, written.fencing_token, written.secret_key::text, EXISTS (SELECT 1 FROM found),
    EXISTS (SELECT 1 FROM found) AND NOT EXISTS (SELECT 1 FROM {table} AS seen WHERE seen.ctid = (SELECT ctid FROM found)),
    set_config('lock_timeout', current_setting('lock_db.limit_before'), true), set_config('lock_db.limit_before', '', true),
    CASE WHEN written.fencing_token IS NOT NULL
        THEN set_config('lock_db.taken', concat(current_setting('lock_db.taken', true), $2::text), true) END
FROM (
    SELECT lock_kind FROM {table} WHERE lock_name >= $1 AND lock_name <= $1 ORDER BY lock_name DESC LIMIT 1) AS seen
LEFT JOIN written ON written.now = $2"
        )
    };
}

/// For a caller that waits: the transaction stays usable if the row is locked.
const LOCK_ROW_AT_ONCE: &str = lock_row_at_once!("SKIP LOCKED");

/// For a try. It has to tell a locked row from one that this role may not lock, because of row
/// level security that was enabled later. A locked row ends the transaction.
const LOCK_ROW_OR_FAIL: &str = lock_row_at_once!("NOWAIT");

/// Whether the table of that name is the one whose identity was found: in this database, and on
/// this server if the identity names the server.
macro_rules! is_here {
    ($name:literal, $identity:literal, $server:literal) => {
        concat!(
            "COALESCE(concat(current_database(), '/', to_regclass(",
            $name,
            ")::oid, '/'",
            $server,
            ") = ",
            $identity,
            ", false)"
        )
    };
}

/// Does not name the table, because a statement that names a missing table ends the transaction.
///
/// The setting ends with the transaction: if it is gone at the next statement, no transaction was
/// open. The lock timeout is set here for the table, which is locked before a statement that names
/// it can set a timeout.
macro_rules! look_for_table {
    ($server:literal) => {
        concat!(
            "
SELECT is_here, CASE WHEN is_here THEN
    concat(
        set_config('lock_db.here', '1', true), set_config('lock_db.guard_before', current_setting('lock_timeout'), true),
        set_config('lock_timeout', '5s', true)) END
FROM (SELECT ",
            is_here!("$1", "$2", $server),
            " AS is_here) AS looked"
        )
    };
}

const IS_HERE: &str = look_for_table!("");
const IS_ON_SERVER: &str = look_for_table!(", (SELECT system_identifier FROM pg_control_system())");

/// Passes the arguments of the block below, which takes no parameters. They are settings that end
/// with the transaction.
macro_rules! tell {
    ($server:literal) => {
        concat!(
            "SELECT ",
            is_here!("$6", "$7", $server),
            ",
    set_config('lock_db.name', $1, true), set_config('lock_db.kind', $2, true),
    set_config('lock_db.secret', $3, true), set_config('lock_db.owner', $4, true),
    set_config('lock_db.limit', $5, true), set_config('lock_db.outcome', '', true)"
        )
    };
}

const TELL: &str = tell!("");
const TELL_ON_SERVER: &str = tell!(", (SELECT system_identifier FROM pg_control_system())");

/// Whether the identity of the table names the server. It does if every role may read the server's
/// number.
fn names_server(server: &Server) -> bool {
    !server.table.identity.ends_with('/')
}

/// Encloses the blocks that the server executes.
pub(super) const DOLLAR_QUOTE: &str = "$lock_db$";

/// Waits in the server's queue for the row, and writes it. A lock timeout would end the caller's
/// transaction, and a row that turns out to be leased would stay locked, so this happens inside a
/// savepoint. A deadlock and an old snapshot do end the transaction.
///
/// The savepoint is that of a block with an exception handler, so it begins and ends on the server,
/// in one message. A savepoint of sqlx 0.9 that is dropped midway rolls the caller's whole
/// transaction back, and what the caller sends next would commit by itself. The row is locked and
/// written under the same savepoint, because any other way creates a multixact.
///
/// The first use of a name creates its row here, in the transaction that needs it, so no other
/// connection is needed. Other requests for that name wait for the transaction, as for any holder.
///
/// A `statement_timeout` would also end the transaction, so the wait stays below it.
/// `statement_timeout` covers the wait in the row's queue and the wait for the holder together,
/// `lock_timeout` covers each separately.
macro_rules! wait_and_lock {
    () => {
        "
DO $lock_db$
DECLARE
    limit_before text :=
        COALESCE(NULLIF(current_setting('lock_db.limit_before', true), ''), current_setting('lock_timeout'));
    has_table boolean := false;
    third integer := extract(epoch FROM current_setting('statement_timeout')::interval) * 1000 / 3;
    slice integer := COALESCE(NULLIF(current_setting('lock_db.limit', true), ''), '-1');
    released CONSTANT timestamptz := '1970-01-01 00:00:00+00';
    wanted CONSTANT text := current_setting('lock_db.name');
    held record;
    is_written boolean;
BEGIN
    IF slice < 0 THEN
        RAISE SQLSTATE 'LDB01' USING MESSAGE = 'ended';
    END IF;
    PERFORM set_config('lock_timeout', LEAST(GREATEST(slice, 200), NULLIF(third, 0)) || 'ms', true);
    LOCK TABLE {table} IN ROW EXCLUSIVE MODE;
    has_table := true;
    PERFORM set_config('lock_timeout', LEAST(GREATEST(slice, 1), NULLIF(third, 0)) || 'ms', true);
    FOR attempt IN 1..2 LOOP
        IF slice = 0 THEN
            SELECT ctid, * INTO held FROM {table} WHERE lock_name >= wanted AND lock_name <= wanted
                ORDER BY lock_name DESC LIMIT 1 FOR UPDATE NOWAIT;
        ELSE
            SELECT ctid, * INTO held FROM {table} WHERE lock_name >= wanted AND lock_name <= wanted
                ORDER BY lock_name DESC LIMIT 1 FOR UPDATE;
        END IF;
        EXIT WHEN FOUND OR attempt = 2;
        INSERT INTO {table} (lock_name, lock_kind)
            VALUES (wanted, current_setting('lock_db.kind'))
            ON CONFLICT (lock_name) DO NOTHING;
    END LOOP;
    IF held.id IS NULL THEN
        RAISE SQLSTATE 'LDB01' USING MESSAGE = 'unwritten';
    ELSIF held.lock_kind <> current_setting('lock_db.kind') THEN
        RAISE SQLSTATE 'LDB01' USING MESSAGE = 'kind';
    ELSIF held.expire_time > clock_timestamp() THEN
        RAISE SQLSTATE 'LDB01' USING MESSAGE = 'leased';
    ELSIF held.expire_time <> released AND held.ttl_micros > 0 OR (
            current_setting('transaction_isolation') <> 'read committed'
            AND (held.expire_time <> released OR held.ttl_micros <> 0)) THEN
        RAISE SQLSTATE 'LDB01' USING MESSAGE = 'unsettled';
    END IF;
    UPDATE {table} AS lease
        SET fencing_token = GREATEST(held.fencing_token + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint),
            secret_key = current_setting('lock_db.secret'), owner = current_setting('lock_db.owner'),
            acquire_time = clock_timestamp(), expire_time = released, ttl_micros = 0
        WHERE lease.ctid = held.ctid
        RETURNING lease.fencing_token, lease.secret_key = current_setting('lock_db.secret')
        INTO held.previous_token, is_written;
    IF is_written IS NOT TRUE THEN
        RAISE SQLSTATE 'LDB01' USING MESSAGE = 'unwritten';
    END IF;
    PERFORM set_config('lock_timeout', limit_before, true), set_config('lock_db.limit_before', '', true),
        set_config('lock_db.outcome', 'locked', true),
        set_config('lock_db.taken',
            concat(current_setting('lock_db.taken', true), current_setting('lock_db.secret')), true),
        set_config('lock_db.token', held.previous_token::text, true),
        set_config('lock_db.last_secret', held.secret_key, true);
EXCEPTION
    WHEN lock_not_available THEN
        PERFORM set_config('lock_db.outcome', CASE WHEN has_table THEN 'busy' ELSE 'no table' END, true);
    WHEN SQLSTATE 'LDB01' THEN PERFORM set_config('lock_db.outcome', SQLERRM, true);
END $lock_db$"
    };
}

macro_rules! outcome {
    () => {
        "
SELECT current_setting('lock_db.outcome', true), current_setting('lock_db.token', true),
    current_setting('lock_db.last_secret', true), current_setting('lock_db.limit', true)"
    };
}

const WAIT_AND_LOCK: &str = wait_and_lock!();
const OUTCOME: &str = outcome!();
/// For a caller that does not wait: both in one message.
const LOCK_OR_NOT: &str = concat!(wait_and_lock!(), ";", outcome!());

const WAS_ITS_OWN: &str =
    "SELECT COALESCE(position($1 IN current_setting('lock_db.taken', true)) > 0, false)";

/// `lock_row` sets the first, and `guard` the second.
const HAS_USED_TABLE: &str = "
SELECT COALESCE(current_setting('lock_db.taken', true), '') <> '' OR COALESCE(current_setting('lock_db.here', true), '') <> ''";

/// A utility statement, which takes no snapshot.
const SHOW_LEVEL: &str = "SHOW transaction_isolation";

/// Whether statements stay prepared on this connection of the application. If it keeps any, some
/// are cached at this point: see [`Server::keeps_statements`].
fn keeps(connection: &PgConnection) -> bool {
    connection.cached_statements_size() > 0
}

/// Whether the transaction keeps the snapshot of its first statement.
pub(super) async fn has_snapshot(transaction: &mut PgConnection) -> driver::Result<bool> {
    let level: String =
        sqlx::query_scalar(SHOW_LEVEL).persistent(keeps(transaction)).fetch_one(transaction).await?;
    Ok(!matches!(&*level, "read committed" | "read uncommitted"))
}

pub(super) async fn lock_row(
    connection: &mut PgConnection,
    server: &Server,
    claim: &RowClaim,
    slice: Duration,
) -> driver::Result<RowAttempt> {
    if slice.is_zero() && claim.is_own {
        match lock_at_once(connection, server, claim).await {
            // Another transaction was faster in making the row.
            Ok(RowAttempt::Missing) => {}
            // Nothing has been done in the transaction, so it can be restarted.
            Err(error) if code(&error) == Some(LOCK_NOT_AVAILABLE) => {
                begin_anew(connection).await?;
                let is_row = !is_timeout(&error) || reaches_table(connection, server).await?;
                return Ok(if is_row { RowAttempt::Busy } else { RowAttempt::TableLocked });
            }
            Err(error) => return Err(sequence::explained(server, error)),
            attempt => return attempt,
        }
    }
    let attempt = wait_and_lock(connection, server, claim, slice).await;
    let attempt = attempt.map_err(|error| sequence::explained(server, error))?;
    if claim.is_own && attempt == RowAttempt::Busy {
        // The holder may wait for the end of all transactions, as CREATE INDEX CONCURRENTLY does.
        begin_anew(connection).await?;
    }
    Ok(attempt)
}

/// Whether a new transaction of lock-db can use the table: another one is then only making the row.
async fn reaches_table(connection: &mut PgConnection, server: &Server) -> driver::Result<bool> {
    let locked = sqlx::raw_sql(server.table.sql(REACH_TABLE)).execute(&mut *connection).await;
    match locked {
        Err(error) if code(&error) != Some(LOCK_NOT_AVAILABLE) => return Err(error.into()),
        Err(_) => begin_anew(connection).await?,
        Ok(_) => {}
    }
    Ok(locked.is_ok())
}

/// Restarts a transaction of lock-db in which nothing was done that has to stay.
async fn begin_anew(connection: &mut PgConnection) -> driver::Result<()> {
    sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await?;
    sqlx::raw_sql(BEGIN_AND_LIMIT).execute(connection).await?;
    Ok(())
}

pub(super) async fn is_here(connection: &mut PgConnection, server: &Server) -> driver::Result<bool> {
    let sql = if names_server(server) { IS_ON_SERVER } else { IS_HERE };
    let query = sqlx::query_scalar(sql).persistent(server.keeps_statements).bind(server.table.name());
    Ok(query.bind(&*server.table.identity).fetch_one(connection).await?)
}

async fn lock_at_once(
    connection: &mut PgConnection,
    server: &Server,
    claim: &RowClaim,
) -> driver::Result<RowAttempt> {
    let row = sqlx::query(server.table.sql(if claim.is_try { LOCK_ROW_OR_FAIL } else { LOCK_ROW_AT_ONCE }))
        .persistent(server.keeps_statements)
        .bind(&*claim.row.name)
        .bind(claim.secret.as_str())
        .bind(server.storable(&claim.owner))
        .fetch_optional(&mut *connection)
        .await?;
    let Some(row) = row else { return Ok(RowAttempt::Missing) };
    if Kind::parse(row.try_get(0)?) != claim.kind {
        return Ok(RowAttempt::WrongKind);
    }
    let Some(fencing_token) = row.try_get(1)? else {
        if row.try_get(4)? {
            begin_anew(connection).await?;
            return Ok(RowAttempt::Busy);
        }
        let could_be_locked = claim.is_try || row.try_get(3)?;
        return Ok(if could_be_locked { RowAttempt::Unwritten } else { RowAttempt::Busy });
    };
    Ok(RowAttempt::Locked { fencing_token, before: row.try_get(2)?, secret: None })
}

async fn wait_and_lock(
    connection: &mut PgConnection,
    server: &Server,
    claim: &RowClaim,
    slice: Duration,
) -> driver::Result<RowAttempt> {
    let is_here: bool = sqlx::query_scalar(if names_server(server) { TELL_ON_SERVER } else { TELL })
        .persistent(server.keeps_statements)
        .bind(&*claim.row.name)
        .bind(claim.kind.as_str())
        .bind(claim.secret.as_str())
        .bind(server.storable(&claim.owner))
        .bind(slice.as_millis().to_string())
        .bind(server.table.name())
        .bind(&*server.table.identity)
        .fetch_one(&mut *connection)
        .await?;
    if !is_here {
        return Ok(RowAttempt::ForeignTransaction);
    }
    let outcome = if slice.is_zero() {
        let rows = sqlx::raw_sql(server.table.sql(LOCK_OR_NOT)).fetch_all(&mut *connection).await?;
        rows.into_iter().next_back().ok_or(sqlx::Error::RowNotFound)?
    } else {
        wait_for(connection, server.table.sql(WAIT_AND_LOCK)).await?;
        sqlx::query(OUTCOME).fetch_one(&mut *connection).await?
    };
    let outcome = &outcome;
    // The settings end with the transaction.
    if outcome.try_get::<Option<&str>, _>(3)?.is_none_or(str::is_empty) {
        return Err(sqlx::Error::BeginFailed.into());
    }
    Ok(match outcome.try_get::<&str, _>(0)? {
        "locked" => {
            RowAttempt::Locked { fencing_token: number(outcome)?, before: outcome.try_get(2)?, secret: None }
        }
        // Empty: the block was not even started.
        "busy" | "" => RowAttempt::Busy,
        "no table" => RowAttempt::TableLocked,
        "kind" => RowAttempt::WrongKind,
        "unwritten" => RowAttempt::Unwritten,
        // The settings of the first message are gone.
        "ended" => return Err(sqlx::Error::BeginFailed.into()),
        "leased" => RowAttempt::Leased { usable: !has_snapshot(connection).await? },
        _ => RowAttempt::Unsettled { usable: !has_snapshot(connection).await? },
    })
}

/// Sends statements in one call and waits for their end in another. sqlx logs every call that takes
/// longer than a second, with its whole text, but a wait for a lock is not a slow statement. If the
/// wait is dropped, the connection is in the same state as after any dropped call.
async fn wait_for(connection: &mut PgConnection, sql: impl SqlSafeStr) -> driver::Result<()> {
    let sent = {
        let mut call = pin!(sqlx::raw_sql(sql).execute(&mut *connection));
        // One poll sends the statements, because the connection has nothing else to send.
        poll_fn(|context| Poll::Ready(call.as_mut().poll(context))).await
    };
    match sent {
        Poll::Ready(done) => {
            done?;
        }
        // The server answers the ping after the statements, with their error if there is one.
        Poll::Pending => connection.ping().await?,
    }
    Ok(())
}

fn number(row: &PgRow) -> driver::Result<i64> {
    Ok(row.try_get::<&str, _>(1)?.parse().map_err(|error| sqlx::Error::Decode(Box::new(error)))?)
}

pub(super) async fn has_used_table(connection: &mut PgConnection) -> driver::Result<bool> {
    Ok(sqlx::query_scalar(HAS_USED_TABLE).persistent(keeps(connection)).fetch_one(connection).await?)
}

pub(super) async fn was_its_own(connection: &mut PgConnection, secret: &str) -> driver::Result<bool> {
    Ok(sqlx::query_scalar(WAS_ITS_OWN)
        .bind(secret)
        .persistent(keeps(connection))
        .fetch_one(connection)
        .await?)
}
