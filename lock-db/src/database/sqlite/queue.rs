//! The wait queue in a row, on private connections.

use sqlx::sqlite::SqliteConnection;

use super::lease::clock_micros;
use crate::database::{QueueEntry, Server};
use crate::secret::Secret;

const STAND: &str = "
UPDATE {table} SET waiters = waiters || ?2 || printf('%016d', ?4 + 2000000) || ?3
WHERE lock_name = ?1 AND lock_kind = 'insert' AND length(waiters) < 3584 AND instr(waiters, ?2) = 0";

/// Replaces the queue only if it is still what was read before.
const SET_WAITERS: &str = "
UPDATE {table} SET waiters = ?3 WHERE lock_name = ?1 AND lock_kind = 'insert' AND waiters = ?2";

const REMOVE_WAITER: &str = "
UPDATE {table}
SET waiters = substr(waiters, 1, instr(waiters, ?2) - 1) || substr(waiters, instr(waiters, ?2) + 56)
WHERE lock_name = ?1 AND instr(waiters, ?2) > 0";

pub(super) async fn enqueue(
    connection: &mut SqliteConnection,
    server: &Server,
    name: &str,
    place: &QueueEntry,
) -> sqlx::Result<bool> {
    let (secret, listener) = QueueEntry::parts(Some(place));
    let query = sqlx::query(server.table.sql(STAND)).bind(name).bind(secret).bind(listener);
    Ok(query.bind(clock_micros()).execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn set_waiters(
    connection: &mut SqliteConnection,
    server: &Server,
    name: &str,
    before: &str,
    after: &str,
) -> sqlx::Result<bool> {
    let query = sqlx::query(server.table.sql(SET_WAITERS)).bind(name).bind(before).bind(after);
    Ok(query.execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn dequeue(
    connection: &mut SqliteConnection,
    server: &Server,
    name: &str,
    secret: &Secret,
) -> sqlx::Result<()> {
    let query = sqlx::query(server.table.sql(REMOVE_WAITER)).bind(name).bind(secret.as_str());
    query.execute(connection).await.map(drop)
}
