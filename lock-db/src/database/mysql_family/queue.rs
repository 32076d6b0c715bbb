//! The wait queue in a row: what MySQL and MariaDB share.

use std::fmt::Write as _;

use sqlx::mysql::{MySqlConnection, MySqlRow};
use sqlx::{AssertSqlSafe, Row};

use super::parts;
use super::several::in_json;
use crate::database::driver;
use crate::database::wait_queue::key;
use crate::database::{QueueChange, QueueEntry, Server, are_among, hexadecimal, names_as_json};
use crate::name::Name;
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

/// Whether the entry of this key, which the queue contains, lasts for more than `$millis`.
macro_rules! lasts_for {
    ($waiters:literal, $key:literal, $millis:expr) => {
        concat!(
            "SUBSTR(",
            $waiters,
            ", INSTR(",
            $waiters,
            ", ",
            $key,
            ") + ",
            layout!(until_after_key),
            ", ",
            layout!(time),
            ") > LPAD(",
            now_millis!(),
            " + ",
            $millis,
            ", ",
            layout!(time),
            ", '0')"
        )
    };
}

/// The queue with the entry of this key, which has a new time and a new listener if it was there
/// already.
macro_rules! with_entry_or_extended {
    ($waiters:literal, $key:literal, $rest:literal) => {
        concat!(
            "IF(INSTR(",
            $waiters,
            ", ",
            $key,
            ") = 0, ",
            with_entry!($waiters, $key, $rest),
            ", INSERT(",
            $waiters,
            ", INSTR(",
            $waiters,
            ", ",
            $key,
            ") + ",
            layout!(until_after_key),
            ", ",
            layout!(from_until),
            ", CONCAT(LPAD(",
            now_millis!(),
            " + ",
            layout!(lasts),
            ", ",
            layout!(time),
            ", '0'), ",
            $rest,
            ")))"
        )
    };
}

/// Whether the queue has room for the entry of this key, or contains it and it has not expired.
macro_rules! may_have_entry {
    ($waiters:literal, $key:literal) => {
        concat!(
            "IF(INSTR(",
            $waiters,
            ", ",
            $key,
            ") = 0, LENGTH(",
            $waiters,
            ") < ",
            layout!(full),
            ", ",
            lasts_for!($waiters, $key, 0),
            ")"
        )
    };
}

/// Free rows, and the first keys of their queues. The rows are a list, because reading JSON would take
/// most of the time. The keys are compared here: a text that is sent so often need not contain them.
const FREE: &str = concat!(
    "
SELECT id, LEFT(waiters, ",
    layout!(key),
    ")
FROM {table}
WHERE lock_kind = 'insert' AND expire_time <= UTC_TIMESTAMP(6)
    AND (ttl_micros <= 0 OR expire_time = '1970-01-01 00:00:00') AND id IN ("
);
/// In bytes, with a comma.
const LONGEST_ID: usize = 20;

pub(super) async fn next_in_line(
    connection: &mut MySqlConnection,
    server: &Server,
    ids: &[i64],
    secret: &Secret,
) -> driver::Result<Vec<i64>> {
    let (mut next, key) = (Vec::new(), key(secret));
    for part in parts(ids, server, |_| LONGEST_ID) {
        let mut sql = FREE.replace("{table}", server.table.name());
        for (position, id) in part.iter().enumerate() {
            let comma = if position > 0 { "," } else { "" };
            let _infallible = write!(sql, "{comma}{id}");
        }
        sql.push(')');
        for row in sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut *connection).await? {
            if row.try_get::<&str, _>(1)? == key {
                next.push(row.try_get(0)?);
            }
        }
    }
    Ok(next)
}

pub(super) async fn enqueue(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &[Name],
    entry: &QueueEntry,
) -> driver::Result<Vec<bool>> {
    let (key, rest) = QueueEntry::parts(Some(entry));
    let mut written = Vec::with_capacity(names.len());
    for part in parts(names, server, in_json) {
        written.extend(in_dialect!(server, enqueue(connection, server, part, &key, &rest))?);
    }
    Ok(written)
}

pub(super) async fn set_waiters(
    connection: &mut MySqlConnection,
    server: &Server,
    changes: &[QueueChange],
) -> driver::Result<Vec<bool>> {
    let bytes = |QueueChange { name, before, after }: &QueueChange| {
        in_json(name) + 2 * before.len() + 2 * after.len()
    };
    let mut written = Vec::with_capacity(changes.len());
    for part in parts(changes, server, bytes) {
        written.extend(in_dialect!(server, set_waiters(connection, server, part))?);
    }
    Ok(written)
}

pub(super) async fn dequeue(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &[Name],
    secret: &Secret,
) -> driver::Result<()> {
    let key = key(secret);
    for part in parts(names, server, in_json) {
        in_dialect!(server, dequeue(connection, server, &names_as_json(part), &key))?;
    }
    Ok(())
}

/// Encodes changes as `[["6e616d65", "31…", "31…"], …]`: the name, the queue before, the queue
/// after.
pub(in crate::database) fn changes_as_json(changes: &[QueueChange]) -> String {
    let change = |QueueChange { name, before, after }: &QueueChange| {
        let [name, before, after] = [&**name, before, after].map(hexadecimal);
        format!("[\"{name}\",\"{before}\",\"{after}\"]")
    };
    format!("[{}]", changes.iter().map(change).collect::<Vec<_>>().join(","))
}

/// Which of the names were written, by rows that begin with the names of those that were.
pub(in crate::database) fn which<'a>(
    names: impl Iterator<Item = &'a Name>,
    rows: &[MySqlRow],
) -> driver::Result<Vec<bool>> {
    let written: Result<Vec<Vec<u8>>, _> = rows.iter().map(|row| row.try_get(0)).collect();
    Ok(are_among(names, &written?))
}
