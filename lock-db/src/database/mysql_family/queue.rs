//! The wait queue in a row, on private connections.

use sqlx::mysql::MySqlConnection;

use crate::database::wait_queue::key;
use crate::database::{QueueEntry, Server, mariadb};
use crate::secret::Secret;

/// Whether the queue begins with the entry of this key.
macro_rules! is_first {
    ($waiters:literal, $key:literal) => {
        concat!("LEFT(", $waiters, ", ", layout!(key), ") = ", $key)
    };
}

/// The queue without its first entry.
macro_rules! without_first {
    ($waiters:literal) => {
        concat!("SUBSTR(", $waiters, ", ", layout!(second_entry_at), ")")
    };
}

/// The queue after a grant: without its first entry, if that is the one of this key.
macro_rules! without_own_first {
    ($waiters:literal, $key:literal) => {
        concat!("IF(", is_first!($waiters, $key), ", ", without_first!($waiters), ", ", $waiters, ")")
    };
}

/// Whether the queue has room, and no entry of this key yet. An empty key never has room,
/// because an empty text is found everywhere.
macro_rules! has_room {
    ($waiters:literal, $key:literal) => {
        concat!("LENGTH(", $waiters, ") < ", layout!(full), " AND INSTR(", $waiters, ", ", $key, ") = 0")
    };
}

/// Milliseconds since 1970.
macro_rules! now_millis {
    () => {
        "TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)) DIV 1000"
    };
}

/// The queue with an entry appended.
macro_rules! with_entry {
    ($waiters:literal, $key:literal, $rest:literal) => {
        concat!(
            "CONCAT(",
            $waiters,
            ", ",
            $key,
            ", LPAD(",
            now_millis!(),
            ", ",
            layout!(time),
            ", '0'), LPAD(",
            now_millis!(),
            " + ",
            layout!(lasts),
            ", ",
            layout!(time),
            ", '0'), ",
            $rest,
            ")"
        )
    };
}

/// The queue after a release: with an entry appended, unless it is empty. If no other process
/// waits, the next caller of this process needs no entry.
macro_rules! behind_others {
    ($waiters:literal, $key:literal, $rest:literal) => {
        concat!(
            "IF(",
            $waiters,
            " <> '' AND ",
            has_room!($waiters, $key),
            ", ",
            with_entry!($waiters, $key, $rest),
            ", ",
            $waiters,
            ")"
        )
    };
}

/// The queue without the entry at this position.
macro_rules! without {
    ($waiters:literal, $position:literal) => {
        concat!("INSERT(", $waiters, ", ", $position, ", ", layout!(entry), ", '')")
    };
}

const STAND: &str = concat!(
    "
UPDATE (
    SELECT id FROM {table} FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND lock_kind = 'insert' AND ",
    has_room!("waiters", "?"),
    "
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.waiters = ",
    with_entry!("lease.waiters", "?", "?")
);

/// Replaces the queue only if it is still what was read before.
const SET_WAITERS: &str = "
UPDATE (
    SELECT id FROM {table} FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND lock_kind = 'insert' AND waiters = ?
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.waiters = ?";

const REMOVE_WAITER: &str = concat!(
    "
UPDATE (
    SELECT id, waiters AS last_waiters, INSTR(waiters, ?) AS place
    FROM {table} FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND INSTR(waiters, ?) > 0
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.waiters = ",
    without!("unlocked.last_waiters", "unlocked.place")
);

pub(super) async fn enqueue(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    place: &QueueEntry,
) -> sqlx::Result<bool> {
    if server.is_mariadb {
        return mariadb::enqueue(connection, server, name, place).await;
    }
    let (key, rest) = QueueEntry::parts(Some(place));
    let query = sqlx::query(server.table.sql(STAND)).bind(name.as_bytes()).bind(&key);
    Ok(query.bind(&key).bind(rest).execute(connection).await?.rows_affected() > 0)
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
    let key = key(secret);
    let query = sqlx::query(server.table.sql(REMOVE_WAITER)).bind(&key).bind(name.as_bytes()).bind(&key);
    query.execute(connection).await.map(drop)
}
