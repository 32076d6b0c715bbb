//! The wait queue in a row, on private connections.
//!
//! A change of the queue does not wait for the disk, for the reason in `lease`.

use sqlx::postgres::PgConnection;

use crate::database::{QueueEntry, Server};
use crate::secret::Secret;

/// Whether the queue begins with the entry of this secret.
macro_rules! is_first {
    ($waiters:literal, $secret:literal) => {
        concat!("left(", $waiters, ", ", layout!(secret), ") = ", $secret)
    };
}

/// The queue without its first entry.
macro_rules! without_first {
    ($waiters:literal) => {
        concat!("substr(", $waiters, ", ", layout!(second_entry_at), ")")
    };
}

/// The queue after a grant: without its first entry, if that is the one of this secret.
macro_rules! without_own_first {
    ($waiters:literal, $secret:literal) => {
        concat!(
            "CASE WHEN ",
            is_first!($waiters, $secret),
            " THEN ",
            without_first!($waiters),
            " ELSE ",
            $waiters,
            " END"
        )
    };
}

/// Whether the queue has room, and no entry of this secret yet. An empty secret never has room,
/// because an empty text is found everywhere.
macro_rules! has_room {
    ($waiters:literal, $secret:literal) => {
        concat!(
            "length(",
            $waiters,
            ") < ",
            layout!(full),
            " AND position(",
            $secret,
            " IN ",
            $waiters,
            ") = 0"
        )
    };
}

/// The queue with an entry appended.
macro_rules! with_entry {
    ($waiters:literal, $secret:literal, $listener:literal) => {
        concat!(
            $waiters,
            " || ",
            $secret,
            " || lpad(((extract(epoch FROM clock_timestamp()) * 1000000)::bigint + ",
            layout!(lasts),
            ")::text, ",
            layout!(time),
            ", '0') || ",
            $listener
        )
    };
}

/// The queue after a release: with an entry appended, unless it is empty. If no other process
/// waits, the next caller of this process needs no entry.
macro_rules! behind_others {
    ($waiters:literal, $secret:literal, $listener:literal) => {
        concat!(
            "CASE WHEN ",
            $waiters,
            " <> '' AND ",
            has_room!($waiters, $secret),
            " THEN ",
            with_entry!($waiters, $secret, $listener),
            " ELSE ",
            $waiters,
            " END"
        )
    };
}

/// The queue without the entry of this secret, which it contains.
macro_rules! without {
    ($waiters:literal, $secret:literal) => {
        concat!(
            "overlay(",
            $waiters,
            " PLACING '' FROM position(",
            $secret,
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

const STAND: &str = concat!(
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

const REMOVE_WAITER: &str = concat!(
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
