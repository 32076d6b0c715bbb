//! The wait queue in a row, on MySQL.
//!
//! An UPDATE returns only how many rows it has written. If some are missing, a read tells which. It
//! reads what is wanted, not who has written it, so it needs no transaction.

use sqlx::mysql::MySqlConnection;

use crate::database::driver;
use crate::database::mysql_family::queue::{changes_as_json, which};
use crate::database::{QueueChange, Server, names_as_json};
use crate::name::Name;

const ENQUEUE: &str = concat!(
    "
UPDATE (
    SELECT queue.id
    FROM JSON_TABLE(?, '$[*]' COLUMNS (asked_name VARCHAR(510) PATH '$')) AS asked
    STRAIGHT_JOIN {table} AS queue FORCE INDEX (distributed_lock_name) ON queue.lock_name = UNHEX(CONVERT(asked.asked_name USING ascii))
    WHERE queue.lock_kind = 'insert' AND ",
    may_have_entry!("queue.waiters", "?"),
    "
    LIMIT 1000000
    FOR UPDATE OF queue SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.waiters = ",
    with_entry_or_extended!("lease.waiters", "?", "?")
);

/// Which queues have an entry of this key that was written in the last half second.
const ARE_QUEUED: &str = concat!(
    "
SELECT queue.lock_name
FROM JSON_TABLE(?, '$[*]' COLUMNS (asked_name VARCHAR(510) PATH '$')) AS asked
STRAIGHT_JOIN {table} AS queue FORCE INDEX (distributed_lock_name) ON queue.lock_name = UNHEX(CONVERT(asked.asked_name USING ascii))
WHERE INSTR(queue.waiters, ?) > 0 AND ",
    lasts_for!("queue.waiters", "?", concat!(layout!(lasts), " - 500"))
);

/// Replaces a queue only if it is still what was read before.
const SET_WAITERS: &str = "
UPDATE (
    SELECT queue.id, asked.after_it
    FROM JSON_TABLE(?, '$[*]' COLUMNS (
            lock_name VARCHAR(510) PATH '$[0]', before_it MEDIUMTEXT PATH '$[1]', after_it MEDIUMTEXT PATH '$[2]')) AS asked
    STRAIGHT_JOIN {table} AS queue FORCE INDEX (distributed_lock_name) ON queue.lock_name = UNHEX(asked.lock_name)
    WHERE queue.lock_kind = 'insert' AND CAST(queue.waiters AS BINARY) = UNHEX(asked.before_it)
    LIMIT 1000000
    FOR UPDATE OF queue SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.waiters = CONVERT(UNHEX(unlocked.after_it) USING utf8mb4)";

const ARE_SET: &str = "
SELECT queue.lock_name
FROM JSON_TABLE(?, '$[*]' COLUMNS (lock_name VARCHAR(510) PATH '$[0]', after_it MEDIUMTEXT PATH '$[2]')) AS asked
STRAIGHT_JOIN {table} AS queue FORCE INDEX (distributed_lock_name) ON queue.lock_name = UNHEX(asked.lock_name)
WHERE CAST(queue.waiters AS BINARY) = UNHEX(asked.after_it)";

const DEQUEUE: &str = concat!(
    "
UPDATE (
    SELECT queue.id, queue.waiters AS last_waiters, INSTR(queue.waiters, ?) AS position
    FROM JSON_TABLE(?, '$[*]' COLUMNS (asked_name VARCHAR(510) PATH '$')) AS asked
    STRAIGHT_JOIN {table} AS queue FORCE INDEX (distributed_lock_name) ON queue.lock_name = UNHEX(CONVERT(asked.asked_name USING ascii))
    WHERE INSTR(queue.waiters, ?) > 0
    LIMIT 1000000
    FOR UPDATE OF queue SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.waiters = ",
    without!("unlocked.last_waiters", "unlocked.position")
);

pub(in crate::database) async fn enqueue(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &[Name],
    key: &str,
    rest: &str,
) -> driver::Result<Vec<bool>> {
    let json = names_as_json(names);
    let query = sqlx::query(server.table.sql(ENQUEUE)).bind(&json).bind(key).bind(key);
    let query = query.bind(key).bind(key).bind(rest).bind(key).bind(rest);
    let written = query.execute(&mut *connection).await?.rows_affected();
    if let Some(all) = all_or_none(written, names.len()) {
        return Ok(all);
    }
    let query = sqlx::query(server.table.sql(ARE_QUEUED)).bind(json).bind(key).bind(key);
    which(names.iter(), &query.fetch_all(connection).await?)
}

pub(in crate::database) async fn set_waiters(
    connection: &mut MySqlConnection,
    server: &Server,
    changes: &[QueueChange],
) -> driver::Result<Vec<bool>> {
    let json = changes_as_json(changes);
    let query = sqlx::query(server.table.sql(SET_WAITERS)).bind(&json);
    let written = query.execute(&mut *connection).await?.rows_affected();
    if let Some(all) = all_or_none(written, changes.len()) {
        return Ok(all);
    }
    let query = sqlx::query(server.table.sql(ARE_SET)).bind(json);
    which(changes.iter().map(|change| &change.name), &query.fetch_all(connection).await?)
}

/// Removes the entry of this key from the queues of names as `names_as_json` writes them.
pub(in crate::database) async fn dequeue(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &str,
    key: &str,
) -> driver::Result<()> {
    let query = sqlx::query(server.table.sql(DEQUEUE)).bind(key).bind(names).bind(key);
    query.execute(connection).await?;
    Ok(())
}

/// The result for each of the names, if all were written or none.
pub(super) fn all_or_none(written: u64, names: usize) -> Option<Vec<bool>> {
    match usize::try_from(written).ok()? {
        0 => Some(vec![false; names]),
        written if written == names => Some(vec![true; names]),
        _ => None,
    }
}
