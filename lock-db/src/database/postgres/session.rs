//! The session of a private connection: how it is identified, and how another connection ends it.
//!
//! A client that gives up a connection closes its socket, which the session notices only at its
//! next read or write. A session that waits for a synchronous standby, for a lock, or for a network
//! that is gone remains, and may execute its last statement much later.

use sqlx::postgres::PgConnection;

use crate::database::driver;

/// Marks the session by an advisory lock. The lock ends with the session, and also when a pooler
/// gives the connection to another client. So the number never identifies a session of another
/// client, as a process id could.
///
/// Takes no lock if a pooler shares the connection among clients. A prepared statement sees itself
/// under the name that sqlx gave it, unless such a pooler has renamed it. An unnamed statement is
/// not listed; then the answer is unknown and no lock is taken.
const MARK: &str = "
SELECT CASE WHEN COALESCE(bool_or(name LIKE 'sqlx\\_s\\_%'), false) THEN pg_try_advisory_lock($1) ELSE false END
FROM pg_prepared_statements WHERE statement LIKE '%lock\\_db probe%' /* lock_db probe */";

/// `$1` is the session in question, `$2` the one that asks, which only has to be visible. A session
/// that is gone is in neither view.
const IS_IDLE: &str = "
SELECT COALESCE(bool_and(activity.state LIKE 'idle%') FILTER (WHERE number = $1), true) AND bool_or(number = $2)
FROM (
    SELECT (classid::bigint << 32) | objid::bigint AS number, pid FROM pg_locks
    WHERE locktype = 'advisory' AND objsubid = 1 AND granted
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())) AS marks
JOIN pg_stat_activity AS activity USING (pid)
WHERE number IN ($1, $2)";

const HAS: &str = "
SELECT pg_backend_pid()::bigint FROM pg_locks
WHERE locktype = 'advisory' AND objsubid = 1 AND granted
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND ((classid::bigint << 32) | objid::bigint) = $1";

/// Needs no privilege: both sessions have the same role.
const END: &str = "
SELECT pg_terminate_backend(pid) FROM pg_locks
WHERE locktype = 'advisory' AND objsubid = 1 AND granted
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND ((classid::bigint << 32) | objid::bigint) = $1";

/// `false`: the connection is a pooler's, and its session has no number.
pub(super) async fn mark(connection: &mut PgConnection, session: i64) -> driver::Result<bool> {
    Ok(sqlx::query_scalar(MARK).bind(session).fetch_one(connection).await?)
}

/// `false` behind a pooler that shares its sessions, because nothing is known of them.
pub(super) async fn is_idle(connection: &mut PgConnection, session: i64, own: i64) -> driver::Result<bool> {
    let is_idle: Option<bool> =
        sqlx::query_scalar(IS_IDLE).bind(session).bind(own).fetch_one(connection).await?;
    Ok(is_idle == Some(true))
}

/// The lock that marks a session ends with the session, and at a crash of the server.
pub(super) async fn has(connection: &mut PgConnection, session: i64) -> driver::Result<Option<i64>> {
    Ok(sqlx::query_scalar(HAS).bind(session).fetch_optional(connection).await?)
}

/// Writes nothing but a commit record, which the server flushes, and replicates, after all that is
/// before it in the log.
const FLUSH: &str = "SELECT pg_backend_pid()::bigint, pg_logical_emit_message(true, 'lock_db', '')::text";

pub(super) async fn flush(connection: &mut PgConnection) -> driver::Result<i64> {
    Ok(sqlx::query_scalar(FLUSH).fetch_one(connection).await?)
}

/// `true`: it has ended.
pub(super) async fn end(connection: &mut PgConnection, session: i64) -> driver::Result<bool> {
    Ok(sqlx::query(END).bind(session).fetch_all(connection).await?.is_empty())
}
