//! Removes rows that were not used for long, on MySQL and MariaDB.
//!
//! The walk through the table reads each part by the primary key, without locks. A part of what it
//! has found is then deleted by its ids. This locks no row that stays, and no gap between names.

use sqlx::mysql::MySqlConnection;

use super::check::is_denied;
use crate::database::driver;
use crate::database::row::table_part;
use crate::database::{PruneScope, Server, TablePart, can_not_prune, ids_as_json};
use crate::options::micros;

/// Whether a row may be removed. The parameters are how long it was not used, in microseconds and
/// negative, twice; and the prefix of the names, twice.
macro_rules! is_unused {
    () => {
        "lease.lock_kind IN ('insert', 'row')
        AND GREATEST(lease.create_time, lease.acquire_time, lease.expire_time)
            < TIMESTAMPADD(MICROSECOND, ?, UTC_TIMESTAMP(6))
        AND lease.fencing_token < TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)) + ?
        AND LEFT(lease.lock_name, LENGTH(?)) = ?"
    };
}

/// The row with the largest id stays. A transaction in REPEATABLE READ that looks for a row which
/// is gone locks the gap where its id was. Without a row behind it, that gap would be the place of
/// all new rows.
const READ_PART: &str = concat!(
    "
SELECT id, id < (SELECT MAX(id) FROM {table}) AND ",
    is_unused!(),
    ", IF(waiters <> '', CONVERT(lock_name USING utf8mb4), NULL), waiters,
    TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6))
FROM {table} AS lease FORCE INDEX (PRIMARY) WHERE id > ? ORDER BY id LIMIT 1000"
);

/// One statement, which the server completes without the client. LIMIT makes the server materialize
/// the inner SELECT, with its locks: on the rows, and on their entries in the index of the names,
/// which another transaction may have locked alone. `FOR UPDATE OF` is needed on MySQL because the
/// server must not lock the JSON table; MariaDB does not know it. (An UPDATE of this form could
/// crash MariaDB, a DELETE could not: docs/reports/mariadb-prepare-multi-update.md.)
macro_rules! remove {
    ($lock:literal) => {
        concat!(
            "
DELETE removed FROM (
    SELECT lease.id
    FROM JSON_TABLE(?, '$[*]' COLUMNS (id BIGINT PATH '$')) AS asked
    STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = asked.id
    STRAIGHT_JOIN {table} AS entry FORCE INDEX (distributed_lock_name) ON entry.lock_name = lease.lock_name
    WHERE lease.waiters = '' AND ",
            is_unused!(),
            "
    LIMIT 1000000 ",
            $lock,
            ") AS unused
STRAIGHT_JOIN {table} AS removed FORCE INDEX (PRIMARY) ON removed.id = unused.id"
        )
    };
}

const REMOVE_ON_MYSQL: &str = remove!("FOR UPDATE OF lease, entry SKIP LOCKED");
const REMOVE_ON_MARIADB: &str = remove!("FOR UPDATE SKIP LOCKED");

const MAY_DELETE: &str = "DELETE FROM {table} WHERE FALSE";

pub(super) async fn read_part(
    connection: &mut MySqlConnection,
    server: &Server,
    scope: &PruneScope,
    after: i64,
) -> driver::Result<TablePart> {
    let (age, prefix) = (-micros(scope.older_than), scope.prefix.as_bytes());
    let query = sqlx::query(server.table.sql(READ_PART)).bind(age).bind(age).bind(prefix).bind(prefix);
    table_part(&query.bind(after).fetch_all(connection).await?)
}

pub(super) async fn remove(
    connection: &mut MySqlConnection,
    server: &Server,
    scope: &PruneScope,
    ids: &[i64],
) -> driver::Result<u64> {
    let (age, prefix) = (-micros(scope.older_than), scope.prefix.as_bytes());
    let remove = if server.is_mariadb { REMOVE_ON_MARIADB } else { REMOVE_ON_MYSQL };
    let query = sqlx::query(server.table.sql(remove)).bind(ids_as_json(ids));
    let query = query.bind(age).bind(age).bind(prefix).bind(prefix);
    Ok(query.execute(connection).await?.rows_affected())
}

pub(super) async fn lacks_right(
    connection: &mut MySqlConnection,
    server: &Server,
) -> driver::Result<Option<String>> {
    match sqlx::raw_sql(server.table.sql(MAY_DELETE)).execute(connection).await {
        Err(error) if is_denied(&error) => {
            let grant = format!("GRANT DELETE ON {} TO …", server.table.name());
            Ok(Some(can_not_prune(&error.to_string(), &grant)))
        }
        other => Ok(other.map(|_| None)?),
    }
}
