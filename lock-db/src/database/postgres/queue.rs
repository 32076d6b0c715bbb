//! The wait queue in a row, on private connections.
//!
//! A change of the queue does not wait for the disk, for the reason in `lease`.

use sqlx::postgres::PgConnection;

use crate::database::driver;
use crate::database::wait_queue::key;
use crate::database::{QueueEntry, Server};
use crate::secret::Secret;

/// Whether the queue begins with the entry of this key.
macro_rules! is_first {
    ($waiters:literal, $key:literal) => {
        concat!("left(", $waiters, ", ", layout!(key), ") = ", $key)
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
        concat!("length(", $waiters, ") < ", layout!(full), " AND position(", $key, " IN ", $waiters, ") = 0")
    };
}

/// Milliseconds since 1970.
macro_rules! now_millis {
    () => {
        "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"
    };
}

/// The queue with an entry appended.
macro_rules! with_entry {
    ($waiters:literal, $key:literal, $rest:literal) => {
        concat!(
            $waiters,
            " || ",
            $key,
            " || lpad((",
            now_millis!(),
            ")::text, ",
            layout!(time),
            ", '0') || lpad((",
            now_millis!(),
            " + ",
            layout!(lasts),
            ")::text, ",
            layout!(time),
            ", '0') || ",
            $rest
        )
    };
}

/// The queue after a release: with an entry appended, unless it is empty. If no other process
/// waits, the next caller of this process needs no entry.
macro_rules! behind_others {
    ($waiters:literal, $key:literal, $rest:literal) => {
        concat!(
            "CASE WHEN ",
            $waiters,
            " <> '' AND ",
            has_room!($waiters, $key),
            " THEN ",
            with_entry!($waiters, $key, $rest),
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
            "overlay(",
            $waiters,
            " PLACING '' FROM position(",
            $key,
            " IN ",
            $waiters,
            ") FOR ",
            layout!(entry),
            ")"
        )
    };
}

/// The listener of the first entry. Empty for an empty queue.
macro_rules! first_listener {
    ($waiters:literal) => {
        concat!("substr(", $waiters, ", ", layout!(listener_at), ", ", layout!(listener), ")")
    };
}

const ENQUEUE: &str = concat!(
    "
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE {table} AS lease
SET waiters = ",
    with_entry!("lease.waiters", "$2", "$3"),
    "
FROM unsynced
WHERE lease.ctid = (
    SELECT ctid FROM {table}
    WHERE ctid = ",
    newest!("$1"),
    " AND lock_name = $1 AND lock_kind = 'insert' AND ",
    has_room!("waiters", "$2"),
    "
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

const DEQUEUE: &str = concat!(
    "
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE {table} AS lease
SET waiters = ",
    without!("waiters", "$2"),
    "
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
    entry: &QueueEntry,
) -> driver::Result<bool> {
    let (key, rest) = QueueEntry::parts(Some(entry));
    let query = sqlx::query(server.table.sql(ENQUEUE)).bind(name).bind(key).bind(rest);
    Ok(query.execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn set_waiters(
    connection: &mut PgConnection,
    server: &Server,
    name: &str,
    before: &str,
    after: &str,
) -> driver::Result<bool> {
    let query = sqlx::query(server.table.sql(SET_WAITERS)).bind(name).bind(before).bind(after);
    Ok(query.execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn dequeue(
    connection: &mut PgConnection,
    server: &Server,
    name: &str,
    secret: &Secret,
) -> driver::Result<()> {
    let query = sqlx::query(server.table.sql(DEQUEUE)).bind(name).bind(key(secret));
    query.execute(connection).await?;
    Ok(())
}
