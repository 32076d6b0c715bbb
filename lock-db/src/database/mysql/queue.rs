//! The wait queue in a row, on private connections.

use sqlx::mysql::MySqlConnection;

use super::mariadb;
use crate::database::{QueueEntry, Server};
use crate::secret::Secret;

const STAND: &str = "
UPDATE (
    SELECT id FROM {table} FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND lock_kind = 'insert' AND LENGTH(waiters) < 3584 AND INSTR(waiters, ?) = 0
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.waiters = CONCAT(
    lease.waiters, ?, LPAD(TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)) + 2000000, 16, '0'), ?)";

/// Replaces the queue only if it is still what was read before.
const SET_WAITERS: &str = "
UPDATE (
    SELECT id FROM {table} FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND lock_kind = 'insert' AND waiters = ?
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.waiters = ?";

const REMOVE_WAITER: &str = "
UPDATE (
    SELECT id, waiters AS last_waiters, INSTR(waiters, ?) AS place
    FROM {table} FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND INSTR(waiters, ?) > 0
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.waiters = INSERT(unlocked.last_waiters, unlocked.place, 56, '')";

pub(super) async fn enqueue(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    place: &QueueEntry,
) -> sqlx::Result<bool> {
    if server.is_mariadb {
        return mariadb::enqueue(connection, server, name, place).await;
    }
    let (secret, listener) = QueueEntry::parts(Some(place));
    let query = sqlx::query(server.table.sql(STAND)).bind(name.as_bytes()).bind(secret);
    Ok(query.bind(secret).bind(listener).execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn set_waiters(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    before: &str,
    after: &str,
) -> sqlx::Result<bool> {
    if server.is_mariadb {
        return mariadb::set_waiters(connection, server, name, before, after).await;
    }
    let query = sqlx::query(server.table.sql(SET_WAITERS)).bind(name.as_bytes()).bind(before).bind(after);
    Ok(query.execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn dequeue(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    secret: &Secret,
) -> sqlx::Result<()> {
    if server.is_mariadb {
        return mariadb::dequeue(connection, server, name, secret).await;
    }
    let secret = secret.as_str();
    let query = sqlx::query(server.table.sql(REMOVE_WAITER)).bind(secret).bind(name.as_bytes()).bind(secret);
    query.execute(connection).await.map(drop)
}
