//! Removes rows that were not used for long.
//!
//! A statement has the write lock of the whole database as long as it runs, so it removes few rows.

use std::time::Duration;

use sqlx::sqlite::SqliteConnection;

use super::lease::clock_micros;
use crate::database::driver;
use crate::database::row::table_part;
use crate::database::{PruneScope, Server, TablePart, ids_as_json};
use crate::options::micros;

/// Whether a row may be removed. `?1` is how long it was not used, as a modifier of the time
/// functions; `?2` is the fencing token of that time; `?3` is the prefix of the names.
macro_rules! is_unused {
    () => {
        "lock_kind IN ('insert', 'row')
        AND max(create_time, acquire_time, expire_time) < strftime('%Y-%m-%d %H:%M:%f000', 'now', ?1)
        AND fencing_token < ?2
        AND substr(lock_name, 1, length(?3)) = ?3"
    };
}

const READ_PART: &str = concat!(
    "
SELECT id, ",
    is_unused!(),
    ", CASE WHEN waiters <> '' THEN lock_name END, waiters, CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER)
FROM {table} WHERE id > ?4 ORDER BY id LIMIT 1000"
);

const REMOVE: &str = concat!(
    "
DELETE FROM {table}
WHERE id IN (SELECT value FROM json_each(?4)) AND waiters = '' AND ",
    is_unused!()
);

pub(super) async fn read_part(
    connection: &mut SqliteConnection,
    server: &Server,
    scope: &PruneScope,
    after: i64,
) -> driver::Result<TablePart> {
    let query = sqlx::query(server.table.sql(READ_PART)).bind(earlier_by(scope.older_than));
    let query = query.bind(clock_micros() - micros(scope.older_than)).bind(&*scope.prefix);
    table_part(&query.bind(after).fetch_all(connection).await?)
}

pub(super) async fn remove(
    connection: &mut SqliteConnection,
    server: &Server,
    scope: &PruneScope,
    ids: &[i64],
) -> driver::Result<u64> {
    let query = sqlx::query(server.table.sql(REMOVE)).bind(earlier_by(scope.older_than));
    let query = query.bind(clock_micros() - micros(scope.older_than)).bind(&*scope.prefix);
    Ok(query.bind(ids_as_json(ids)).execute(connection).await?.rows_affected())
}

/// A duration as a modifier of SQLite's time functions.
fn earlier_by(duration: Duration) -> String {
    format!("-{}.{:03} seconds", duration.as_secs(), duration.subsec_millis())
}
