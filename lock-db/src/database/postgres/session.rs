//! The session of a private connection: which one it is, and how another connection ends it.
//!
//! A client that gives a connection up closes its socket, which a session notices only when it reads or writes next. One that
//! waits for a synchronous standby, for a lock, or for a network that is gone stays, and may carry out its last statement much later.

use sqlx::postgres::PgConnection;

/// An advisory lock, which goes with its session, and also when a pooler gives the connection to another client. So a number
/// never names a session that is somebody else's, as a process id could.
///
/// Not where a pooler shares the connection among clients. A prepared statement sees itself under the name that sqlx gave it,
/// unless such a pooler gave it another one. A statement without a name is not listed: then nothing is known.
const MARK: &str = "
SELECT CASE WHEN COALESCE(bool_or(name LIKE 'sqlx\\_s\\_%'), false) THEN pg_try_advisory_lock($1) ELSE false END
FROM pg_prepared_statements WHERE statement LIKE '%lock\\_db probe%' /* lock_db probe */";

/// Of the second only whether it is known. A session that is gone is in none of the views.
const IS_IDLE: &str = "
SELECT COALESCE(bool_and(activity.state LIKE 'idle%') FILTER (WHERE number = $1), true) AND bool_or(number = $2)
FROM (
    SELECT (classid::bigint << 32) | objid::bigint AS number, pid FROM pg_locks
    WHERE locktype = 'advisory' AND objsubid = 1 AND granted
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())) AS marks
JOIN pg_stat_activity AS activity USING (pid)
WHERE number IN ($1, $2)";

/// The right to do it comes with the role, which is that of both sessions.
const END: &str = "
SELECT pg_terminate_backend(pid) FROM pg_locks
WHERE locktype = 'advisory' AND objsubid = 1 AND granted
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND ((classid::bigint << 32) | objid::bigint) = $1";

/// `false`: the connection is a pooler's, and its session has no number.
pub(super) async fn mark(connection: &mut PgConnection, session: i64) -> sqlx::Result<bool> {
    sqlx::query_scalar(MARK).bind(session).fetch_one(connection).await
}

/// Behind a pooler that shares its sessions nothing is known of them.
pub(super) async fn is_idle(connection: &mut PgConnection, session: i64, own: i64) -> sqlx::Result<bool> {
    let is_idle: Option<bool> =
        sqlx::query_scalar(IS_IDLE).bind(session).bind(own).fetch_one(connection).await?;
    Ok(is_idle == Some(true))
}

/// `true`: it has ended.
pub(super) async fn end(connection: &mut PgConnection, session: i64) -> sqlx::Result<bool> {
    Ok(sqlx::query(END).bind(session).fetch_all(connection).await?.is_empty())
}
