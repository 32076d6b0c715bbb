//! The wait queue in a row, on private connections.

use sqlx::query::Query;
use sqlx::sqlite::{SqliteArguments, SqliteConnection};
use sqlx::{Connection, Sqlite};

use super::lease::clock_micros;
use crate::database::driver;
use crate::database::driver::SessionDriver;
use crate::database::wait_queue::key;
use crate::database::{QueueChange, QueueEntry, Server, ids_as_json};
use crate::name::Name;
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

/// Whether the entry of this key, which the queue contains, has not expired. `$now` is in
/// microseconds since 1970.
macro_rules! is_alive {
    ($waiters:literal, $key:literal, $now:literal) => {
        concat!(
            "substr(",
            $waiters,
            ", instr(",
            $waiters,
            ", ",
            $key,
            ") + ",
            layout!(until_after_key),
            ", ",
            layout!(time),
            ") > printf('%0",
            layout!(time),
            "d', ",
            $now,
            " / 1000)"
        )
    };
}

/// The queue with a new time and a new listener in the entry of this key, which it contains.
macro_rules! with_entry_extended {
    ($waiters:literal, $key:literal, $rest:literal, $now:literal) => {
        concat!(
            "substr(",
            $waiters,
            ", 1, instr(",
            $waiters,
            ", ",
            $key,
            ") + ",
            layout!(until_after_key),
            " - 1) || printf('%0",
            layout!(time),
            "d', ",
            $now,
            " / 1000 + ",
            layout!(lasts),
            ") || ",
            $rest,
            " || substr(",
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
UPDATE {table} SET waiters = CASE WHEN instr(waiters, ?2) = 0 THEN ",
    with_entry!("waiters", "?2", "?3", "?4"),
    "
    ELSE ",
    with_entry_extended!("waiters", "?2", "?3", "?4"),
    " END
WHERE lock_name = ?1 AND lock_kind = 'insert' AND CASE WHEN instr(waiters, ?2) = 0 THEN length(waiters) < ",
    layout!(full),
    "
    ELSE ",
    is_alive!("waiters", "?2", "?4"),
    " END"
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

const NEXT_IN_LINE: &str = concat!(
    "
SELECT id FROM {table}
WHERE id IN (SELECT value FROM json_each(?1))
    AND lock_kind = 'insert' AND expire_time <= strftime('%Y-%m-%d %H:%M:%f000', 'now')
    AND (ttl_micros <= 0 OR expire_time <= '1970-01-01 00:00:00.000000') AND ",
    is_first!("waiters", "?2")
);

pub(super) async fn next_in_line(
    connection: &mut SqliteConnection,
    server: &Server,
    ids: &[i64],
    secret: &Secret,
) -> driver::Result<Vec<i64>> {
    let query = sqlx::query_scalar(server.table.sql(NEXT_IN_LINE)).bind(ids_as_json(ids));
    Ok(query.bind(key(secret)).fetch_all(connection).await?)
}

pub(super) async fn enqueue(
    connection: &mut SqliteConnection,
    server: &Server,
    names: &[Name],
    entry: &QueueEntry,
) -> driver::Result<Vec<bool>> {
    let (key, rest) = QueueEntry::parts(Some(entry));
    let query = |name: &Name| {
        let query = sqlx::query(server.table.sql(ENQUEUE)).bind((**name).to_owned()).bind(key.clone());
        query.bind(rest.clone()).bind(clock_micros())
    };
    in_one_commit(connection, names.iter().map(query).collect()).await
}

pub(super) async fn set_waiters(
    connection: &mut SqliteConnection,
    server: &Server,
    changes: &[QueueChange],
) -> driver::Result<Vec<bool>> {
    let query = |QueueChange { name, before, after }: &QueueChange| {
        let query = sqlx::query(server.table.sql(SET_WAITERS)).bind((**name).to_owned());
        query.bind(before.clone()).bind(after.clone())
    };
    in_one_commit(connection, changes.iter().map(query).collect()).await
}

pub(super) async fn dequeue(
    connection: &mut SqliteConnection,
    server: &Server,
    names: &[Name],
    secret: &Secret,
) -> driver::Result<()> {
    let query =
        |name: &Name| sqlx::query(server.table.sql(DEQUEUE)).bind((**name).to_owned()).bind(key(secret));
    in_one_commit(connection, names.iter().map(query).collect()).await.map(drop)
}

/// Runs each statement. Returns which of them have written anything. Many of them use one
/// transaction, because only the commit takes time.
async fn in_one_commit(
    connection: &mut SqliteConnection,
    mut queries: Vec<Query<'_, Sqlite, SqliteArguments>>,
) -> driver::Result<Vec<bool>> {
    if queries.len() < 2 {
        let Some(query) = queries.pop() else { return Ok(Vec::new()) };
        return Ok(vec![query.execute(connection).await?.rows_affected() > 0]);
    }
    let mut transaction = connection.begin_with(Sqlite::BEGIN_SHORT).await?;
    let mut written = Vec::with_capacity(queries.len());
    for query in queries {
        written.push(query.execute(&mut *transaction).await?.rows_affected() > 0);
    }
    transaction.commit().await?;
    Ok(written)
}
