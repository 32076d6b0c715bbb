//! The wait queue in a row, on private connections.
//!
//! A change of the queue does not wait for the disk, for the reason in `lease`.

use sqlx::postgres::PgConnection;

use super::is_plain;
use super::several::texts;
use crate::database::driver;
use crate::database::wait_queue::key;
use crate::database::{QueueChange, QueueEntry, Server, are_among};
use crate::name::Name;
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

/// Whether the entry of this key, which the queue contains, has not expired.
macro_rules! is_alive {
    ($waiters:literal, $key:literal) => {
        concat!(
            "substr(",
            $waiters,
            ", position(",
            $key,
            " IN ",
            $waiters,
            ") + ",
            layout!(until_after_key),
            ", ",
            layout!(time),
            ") > lpad((",
            now_millis!(),
            ")::text, ",
            layout!(time),
            ", '0')"
        )
    };
}

/// The queue with a new time and a new listener in the entry of this key, which it contains.
macro_rules! with_entry_extended {
    ($waiters:literal, $key:literal, $rest:literal) => {
        concat!(
            "overlay(",
            $waiters,
            " PLACING lpad((",
            now_millis!(),
            " + ",
            layout!(lasts),
            ")::text, ",
            layout!(time),
            ", '0') || ",
            $rest,
            " FROM position(",
            $key,
            " IN ",
            $waiters,
            ") + ",
            layout!(until_after_key),
            " FOR ",
            layout!(from_until),
            ")"
        )
    };
}

macro_rules! enqueue {
    ($found:ident) => {
        concat!(
            "
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE {table} AS lease
SET waiters = CASE WHEN position($2 IN lease.waiters) = 0 THEN ",
            with_entry!("lease.waiters", "$2", "$3"),
            "
    ELSE ",
            with_entry_extended!("lease.waiters", "$2", "$3"),
            " END
FROM unsynced, (
    SELECT lease.ctid
    FROM unnest((SELECT $1::text[])) AS asked (lock_name)
    ",
            the_row!($found),
            "
    WHERE lease.lock_kind = 'insert' AND CASE WHEN position($2 IN lease.waiters) = 0
        THEN length(lease.waiters) < ",
            layout!(full),
            " ELSE ",
            is_alive!("lease.waiters", "$2"),
            " END
    FOR NO KEY UPDATE OF lease SKIP LOCKED) AS unlocked
WHERE lease.ctid = unlocked.ctid
RETURNING lease.lock_name::text"
        )
    };
}
const ENQUEUE: &str = enqueue!(from_behind);
const ENQUEUE_MANY: &str = enqueue!(plainly);

/// Replaces a queue only if it is still what was read before.
macro_rules! set_waiters {
    ($found:ident) => {
        concat!(
            "
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE {table} AS lease SET waiters = unlocked.after_it
FROM unsynced, (
    SELECT lease.ctid, asked.after_it
    FROM unnest((SELECT $1::text[]), (SELECT $2::text[]), (SELECT $3::text[])) AS asked (lock_name, before_it, after_it)
    ",
            the_row!($found),
            "
    WHERE lease.lock_kind = 'insert' AND lease.waiters = asked.before_it
    FOR NO KEY UPDATE OF lease SKIP LOCKED) AS unlocked
WHERE lease.ctid = unlocked.ctid
RETURNING lease.lock_name::text"
        )
    };
}
const SET_WAITERS: &str = set_waiters!(from_behind);
const SET_WAITERS_MANY: &str = set_waiters!(plainly);

macro_rules! dequeue {
    ($found:ident) => {
        concat!(
            "
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE {table} AS lease
SET waiters = ",
            without!("lease.waiters", "$2"),
            "
FROM unsynced, (
    SELECT lease.ctid
    FROM unnest((SELECT $1::text[])) AS asked (lock_name)
    ",
            the_row!($found),
            "
    WHERE position($2 IN lease.waiters) > 0
    FOR NO KEY UPDATE OF lease SKIP LOCKED) AS unlocked
WHERE lease.ctid = unlocked.ctid"
        )
    };
}
const DEQUEUE: &str = dequeue!(from_behind);
const DEQUEUE_MANY: &str = dequeue!(plainly);

/// Searched by name: this is for many names.
const NEXT_IN_LINE: &str = concat!(
    "
SELECT lease.id
FROM unnest((SELECT $1::bigint[])) AS asked (id) JOIN {table} AS lease ON lease.id = asked.id
WHERE lease.lock_kind = 'insert' AND lease.expire_time <= clock_timestamp()
    AND (lease.ttl_micros <= 0 OR lease.expire_time = '1970-01-01 00:00:00+00') AND ",
    is_first!("lease.waiters", "$2")
);

pub(super) async fn next_in_line(
    connection: &mut PgConnection,
    server: &Server,
    ids: &[i64],
    secret: &Secret,
) -> driver::Result<Vec<i64>> {
    let query = sqlx::query_scalar(server.table.sql(NEXT_IN_LINE)).bind(ids).bind(key(secret));
    Ok(query.fetch_all(connection).await?)
}

pub(super) async fn enqueue(
    connection: &mut PgConnection,
    server: &Server,
    names: &[Name],
    entry: &QueueEntry,
) -> driver::Result<Vec<bool>> {
    let (key, rest) = QueueEntry::parts(Some(entry));
    let statement = if is_plain(server, names.len()) { ENQUEUE_MANY } else { ENQUEUE };
    let query = sqlx::query_scalar(server.table.sql(statement)).bind(texts(names)).bind(key).bind(rest);
    let written: Vec<String> = query.fetch_all(connection).await?;
    Ok(are_among(names.iter(), &written))
}

pub(super) async fn set_waiters(
    connection: &mut PgConnection,
    server: &Server,
    changes: &[QueueChange],
) -> driver::Result<Vec<bool>> {
    let names: Vec<&str> = changes.iter().map(|change| &*change.name).collect();
    let before: Vec<&str> = changes.iter().map(|change| &*change.before).collect();
    let after: Vec<&str> = changes.iter().map(|change| &*change.after).collect();
    let statement = if is_plain(server, changes.len()) { SET_WAITERS_MANY } else { SET_WAITERS };
    let query = sqlx::query_scalar(server.table.sql(statement)).bind(names).bind(before).bind(after);
    let written: Vec<String> = query.fetch_all(connection).await?;
    Ok(are_among(changes.iter().map(|change| &change.name), &written))
}

pub(super) async fn dequeue(
    connection: &mut PgConnection,
    server: &Server,
    names: &[Name],
    secret: &Secret,
) -> driver::Result<()> {
    let statement = if is_plain(server, names.len()) { DEQUEUE_MANY } else { DEQUEUE };
    let query = sqlx::query(server.table.sql(statement)).bind(texts(names)).bind(key(secret));
    query.execute(connection).await?;
    Ok(())
}
