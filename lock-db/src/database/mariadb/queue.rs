//! The wait queue in a row, on MariaDB.

use sqlx::mysql::MySqlConnection;

use super::{insert, wrote};
use crate::database::driver;
use crate::database::mysql_family::queue::{changes_as_json, which};
use crate::database::{QueueChange, Server, names_as_json};
use crate::name::Name;

const ENQUEUE: &str = concat!(
    "
INSERT INTO {table} (id, lock_name, waiters)
SELECT queue.id, queue.lock_name, ",
    with_entry_or_extended!("queue.waiters", "?", "?"),
    "
FROM JSON_TABLE(?, '$[*]' COLUMNS (asked_name VARCHAR(510) PATH '$')) AS asked
STRAIGHT_JOIN {table} AS queue FORCE INDEX (distributed_lock_name) ON queue.lock_name = UNHEX(CONVERT(asked.asked_name USING ascii))
WHERE queue.lock_kind = 'insert' AND ",
    may_have_entry!("queue.waiters", "?"),
    "
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE waiters = VALUES(waiters)
RETURNING lock_name"
);

/// Replaces a queue only if it is still what was read before.
const SET_WAITERS: &str = "
INSERT INTO {table} (id, lock_name, waiters)
SELECT queue.id, queue.lock_name, CONVERT(UNHEX(CONVERT(asked.after_it USING ascii)) USING utf8mb4)
FROM JSON_TABLE(?, '$[*]' COLUMNS (
        lock_name VARCHAR(510) PATH '$[0]', before_it MEDIUMTEXT PATH '$[1]', after_it MEDIUMTEXT PATH '$[2]')) AS asked
STRAIGHT_JOIN {table} AS queue FORCE INDEX (distributed_lock_name) ON queue.lock_name = UNHEX(CONVERT(asked.lock_name USING ascii))
WHERE queue.lock_kind = 'insert' AND CAST(queue.waiters AS BINARY) = UNHEX(CONVERT(asked.before_it USING ascii))
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE waiters = VALUES(waiters)
RETURNING lock_name";

const DEQUEUE: &str = concat!(
    "
INSERT INTO {table} (id, lock_name, waiters)
SELECT queue.id, queue.lock_name, ",
    without!("queue.waiters", "INSTR(queue.waiters, ?)"),
    "
FROM JSON_TABLE(?, '$[*]' COLUMNS (asked_name VARCHAR(510) PATH '$')) AS asked
STRAIGHT_JOIN {table} AS queue FORCE INDEX (distributed_lock_name) ON queue.lock_name = UNHEX(CONVERT(asked.asked_name USING ascii))
WHERE INSTR(queue.waiters, ?) > 0
FOR UPDATE SKIP LOCKED
ON DUPLICATE KEY UPDATE waiters = VALUES(waiters)
RETURNING id"
);

pub(in crate::database) async fn enqueue(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &[Name],
    key: &str,
    rest: &str,
) -> driver::Result<Vec<bool>> {
    let query = insert(server, ENQUEUE).bind(key).bind(key).bind(rest).bind(key).bind(rest);
    let query = query.bind(names_as_json(names)).bind(key).bind(key);
    which(names.iter(), &query.fetch_all(connection).await?)
}

pub(in crate::database) async fn set_waiters(
    connection: &mut MySqlConnection,
    server: &Server,
    changes: &[QueueChange],
) -> driver::Result<Vec<bool>> {
    let query = insert(server, SET_WAITERS).bind(changes_as_json(changes));
    which(changes.iter().map(|change| &change.name), &query.fetch_all(connection).await?)
}

/// Removes the entry of this key from the queues of names as `names_as_json` writes them.
pub(in crate::database) async fn dequeue(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &str,
    key: &str,
) -> driver::Result<()> {
    wrote(connection, insert(server, DEQUEUE).bind(key).bind(names).bind(key)).await.map(drop)
}
