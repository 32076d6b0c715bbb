//! The wait queue in a row, on private connections.
//!
//! A change of the queue does not wait for the disk, for the reason in `lease`.

use sqlx::postgres::PgConnection;

use crate::database::{QueueEntry, Server};
use crate::secret::Secret;

const STAND: &str = concat!(
    "
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE {table} AS lease
SET waiters = lease.waiters || $2 || lpad(((extract(epoch FROM clock_timestamp()) * 1000000)::bigint + 2000000)::text, 16, '0') || $3
FROM unsynced
WHERE lease.ctid = (
    SELECT ctid FROM {table}
    WHERE ctid = ",
    newest!("$1"),
    " AND lock_name = $1 AND lock_kind = 'insert' AND length(waiters) < 3584 AND position($2 IN waiters) = 0
    FOR NO KEY UPDATE SKIP LOCKED)"
);

/// Replaces the queue only if it is still what was read before.
const SET_WAITERS: &str = concat!(
    "
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE {table} AS lease SET waiters = $3
FROM unsynced
WHERE lease.ctid = (
    SELECT ctid FROM {table} WHERE ctid = ",
    newest!("$1"),
    " AND lock_name = $1 AND lock_kind = 'insert' AND waiters = $2
    FOR NO KEY UPDATE SKIP LOCKED)"
);

const REMOVE_WAITER: &str = concat!(
    "
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE {table} AS lease
SET waiters = overlay(waiters PLACING '' FROM position($2 IN waiters) FOR 56)
FROM unsynced
WHERE lease.ctid = (
    SELECT ctid FROM {table} WHERE ctid = ",
    newest!("$1"),
    " AND lock_name = $1 AND position($2 IN waiters) > 0
    FOR NO KEY UPDATE SKIP LOCKED)"
);

pub(super) async fn enqueue(
    connection: &mut PgConnection,
    server: &Server,
    name: &str,
    place: &QueueEntry,
) -> sqlx::Result<bool> {
    let (secret, listener) = QueueEntry::parts(Some(place));
    let query = sqlx::query(server.table.sql(STAND)).bind(name).bind(secret).bind(listener);
    Ok(query.execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn set_waiters(
    connection: &mut PgConnection,
    server: &Server,
    name: &str,
    before: &str,
    after: &str,
) -> sqlx::Result<bool> {
    let query = sqlx::query(server.table.sql(SET_WAITERS)).bind(name).bind(before).bind(after);
    Ok(query.execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn dequeue(
    connection: &mut PgConnection,
    server: &Server,
    name: &str,
    secret: &Secret,
) -> sqlx::Result<()> {
    let query = sqlx::query(server.table.sql(REMOVE_WAITER)).bind(name).bind(secret.as_str());
    query.execute(connection).await.map(drop)
}
