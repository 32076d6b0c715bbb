//! The wait queue in a row, on private connections.

use sqlx::sqlite::SqliteConnection;

use super::lease::clock_micros;
use crate::database::driver;
use crate::database::wait_queue::key;
use crate::database::{QueueEntry, Server};
use crate::secret::Secret;

/// Whether the queue begins with the entry of this key.
macro_rules! is_first {
    ($waiters:literal, $key:literal) => {
        concat!("substr(", $waiters, ", 1, ", layout!(key), ") = ", $key)
    };
}

/// The queue without its first entry.
macro_rules! without_first {
    ($waiters:literal) => {
        concat!("substr(", $waiters, ", ", layout!(second_entry_at), ")")
    };
}

/// The queue after a grant: without its first entry, if that is the one of this key.
macro_rules! without_own_first {
    ($waiters:literal, $key:literal) => {
        concat!(
            "CASE WHEN ",
            is_first!($waiters, $key),
            " THEN ",
            without_first!($waiters),
            " ELSE ",
            $waiters,
            " END"
        )
    };
}

/// Whether the queue has room, and no entry of this key yet. An empty key never has room,
/// because an empty text is found everywhere.
macro_rules! has_room {
    ($waiters:literal, $key:literal) => {
        concat!("length(", $waiters, ") < ", layout!(full), " AND instr(", $waiters, ", ", $key, ") = 0")
    };
}

/// The queue with an entry appended. `$now` is in microseconds since 1970.
macro_rules! with_entry {
    ($waiters:literal, $key:literal, $rest:literal, $now:literal) => {
        concat!(
            $waiters,
            " || ",
            $key,
            " || printf('%0",
            layout!(time),
            "d%0",
            layout!(time),
            "d', ",
            $now,
            " / 1000, ",
            $now,
            " / 1000 + ",
            layout!(lasts),
            ") || ",
            $rest
        )
    };
}

/// The queue after a release: with an entry appended, unless it is empty. If no other process
/// waits, the next caller of this process needs no entry.
macro_rules! behind_others {
    ($waiters:literal, $key:literal, $rest:literal, $now:literal) => {
        concat!(
            "CASE WHEN ",
            $waiters,
            " <> '' AND ",
            has_room!($waiters, $key),
            " THEN ",
            with_entry!($waiters, $key, $rest, $now),
            " ELSE ",
            $waiters,
            " END"
        )
    };
}

/// The queue without the entry of this key, which it contains.
macro_rules! without {
    ($waiters:literal, $key:literal) => {
        concat!(
            "substr(",
            $waiters,
            ", 1, instr(",
            $waiters,
            ", ",
            $key,
            ") - 1) || substr(",
            $waiters,
            ", instr(",
            $waiters,
            ", ",
            $key,
            ") + ",
            layout!(entry),
            ")"
        )
    };
}

const ENQUEUE: &str = concat!(
    "
UPDATE {table} SET waiters = ",
    with_entry!("waiters", "?2", "?3", "?4"),
    "
WHERE lock_name = ?1 AND lock_kind = 'insert' AND ",
    has_room!("waiters", "?2"),
    ""
);

/// Replaces the queue only if it is still what was read before.
const SET_WAITERS: &str = "
UPDATE {table} SET waiters = ?3 WHERE lock_name = ?1 AND lock_kind = 'insert' AND waiters = ?2";

const DEQUEUE: &str = concat!(
    "
UPDATE {table}
SET waiters = ",
    without!("waiters", "?2"),
    "
WHERE lock_name = ?1 AND instr(waiters, ?2) > 0"
);

pub(super) async fn enqueue(
    connection: &mut SqliteConnection,
    server: &Server,
    name: &str,
    entry: &QueueEntry,
) -> driver::Result<bool> {
    let (key, rest) = QueueEntry::parts(Some(entry));
    let query = sqlx::query(server.table.sql(ENQUEUE)).bind(name).bind(key).bind(rest);
    Ok(query.bind(clock_micros()).execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn set_waiters(
    connection: &mut SqliteConnection,
    server: &Server,
    name: &str,
    before: &str,
    after: &str,
) -> driver::Result<bool> {
    let query = sqlx::query(server.table.sql(SET_WAITERS)).bind(name).bind(before).bind(after);
    Ok(query.execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn dequeue(
    connection: &mut SqliteConnection,
    server: &Server,
    name: &str,
    secret: &Secret,
) -> driver::Result<()> {
    let query = sqlx::query(server.table.sql(DEQUEUE)).bind(name).bind(key(secret));
    query.execute(connection).await?;
    Ok(())
}
