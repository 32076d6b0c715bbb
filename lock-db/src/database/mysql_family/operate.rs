//! What operators ask: lists of locks, who holds them, and the end of a lease by force.

use std::collections::HashMap;

use sqlx::mysql::MySqlConnection;
use sqlx::{AssertSqlSafe, Row};

use super::errors::{ACCESS_DENIED, LOCK_WAIT_TIMEOUT, ROW_IS_LOCKED, number};
use crate::database::driver;
use crate::database::lock_row::{FORCED, timestamp};
use crate::database::row::{self, lock_row};
use crate::database::{Cluster, ListPage, LockRow, Server};
use crate::{DatabaseSession, RowHolder};

/// The rows of row locks that transactions have locked. With MySQL's statement only those accounts see
/// any that have the rights; the others get an error, and ask without it.
macro_rules! list {
    ($or_locked:literal) => {
        concat!(
            "SELECT ",
            columns!(),
            ", lock_name
FROM {table} AS lease FORCE INDEX (distributed_lock_name)
WHERE lock_name >= ? AND lock_name <= ? AND lock_name > ? AND lock_name LIKE ? ESCAPE '!'
    AND (NOT ? OR (lock_kind <> 'row' AND expire_time > UTC_TIMESTAMP(6))",
            $or_locked,
            ")
ORDER BY lock_name LIMIT ?"
        )
    };
}

const LIST: &str = list!("");
const LIST_WITH_LOCKED: &str = list!(
    "
        OR (lock_kind = 'row' AND id IN (
            SELECT CAST(held.lock_data AS SIGNED) FROM performance_schema.data_locks AS held
            WHERE held.object_schema = '{schema}' AND held.object_name = 'distributed_lock'
                AND held.index_name = 'PRIMARY' AND held.lock_type = 'RECORD' AND held.lock_status = 'GRANTED'
                AND held.lock_mode LIKE 'X%' AND held.lock_data RLIKE '^[0-9]+$'))"
);

/// Who has rows locked, by their ids. MySQL shows all locks on rows, at once. It shows when a
/// transaction has begun a little later.
const ROW_HOLDERS: &str = "
SELECT CAST(held.lock_data AS SIGNED), CAST(session.processlist_id AS SIGNED),
    CONVERT(COALESCE(session.processlist_user, '') USING utf8mb4), CONVERT(session.processlist_host USING utf8mb4),
    TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', CONVERT_TZ(holder.trx_started, 'SYSTEM', '+00:00'))
FROM performance_schema.data_locks AS held
JOIN performance_schema.threads AS session ON session.thread_id = held.thread_id
LEFT JOIN information_schema.innodb_trx AS holder ON holder.trx_id = held.engine_transaction_id
WHERE held.object_schema = '{schema}' AND held.object_name = 'distributed_lock'
    AND held.index_name = 'PRIMARY' AND held.lock_type = 'RECORD' AND held.lock_status = 'GRANTED'
    AND held.lock_mode LIKE 'X%' AND held.lock_data IN ({ids})";

/// MariaDB shows only locks that another transaction waits for: on a row, or on its entry in the index
/// of the names.
const ROW_HOLDERS_ON_MARIADB: &str = "
SELECT lease.id, CAST(holder.trx_mysql_thread_id AS SIGNED),
    CONVERT(COALESCE(session.user, '') USING utf8mb4), CONVERT(session.host USING utf8mb4),
    TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', CONVERT_TZ(holder.trx_started, 'SYSTEM', '+00:00'))
FROM information_schema.innodb_locks AS held
JOIN information_schema.innodb_lock_waits AS waits ON waits.blocking_lock_id = held.lock_id
JOIN information_schema.innodb_trx AS holder ON holder.trx_id = held.lock_trx_id
JOIN {table} AS lease
    ON held.lock_data = CONCAT('0x', HEX(lease.lock_name)) OR held.lock_data = CAST(lease.id AS CHAR)
LEFT JOIN information_schema.processlist AS session ON session.id = holder.trx_mysql_thread_id
WHERE held.lock_table = '`{schema}`.`distributed_lock`' AND lease.id IN ({ids})";

/// Waits for the row no longer than any other statement here. By the primary key, so that no other row
/// is locked.
const FORCE_RELEASE: &str = "
UPDATE {table}
SET expire_time = '1970-01-01 00:00:00', ttl_micros = 0, secret_key = ?, fencing_token = fencing_token + 1
WHERE id = ? AND lock_name = ? AND fencing_token = ? AND lock_kind = 'insert' AND expire_time > '1970-01-01 00:00:00'";

const VERSION: &str = "SELECT VERSION()";
const GALERA_NODES: &str = "SHOW GLOBAL STATUS LIKE 'wsrep_cluster_size'";
const GROUP_MEMBERS: &str = "
SELECT CAST(COUNT(*) AS CHAR) FROM performance_schema.replication_group_members WHERE member_state = 'ONLINE'";

const TIME: &str = "SELECT TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6))";

/// No right for a table, a column, or what a statement does.
const DENIED: [u16; 3] = [1142, 1143, ACCESS_DENIED];

fn is_denied(error: &sqlx::Error) -> bool {
    number(error).is_some_and(|number| DENIED.contains(&number))
}

pub(super) async fn list(
    connection: &mut MySqlConnection,
    server: &Server,
    page: &ListPage,
) -> driver::Result<Vec<(String, LockRow)>> {
    let with_locked = page.held_only && !server.is_mariadb;
    let rows = if with_locked {
        let statement = LIST_WITH_LOCKED.replace("{schema}", &quoted(&server.table.schema));
        let statement = statement.replace("{table}", server.table.name());
        match fetch(connection, sqlx::query(AssertSqlSafe(statement)).persistent(false), page).await {
            Err(error) if is_denied(&error) => {
                fetch(connection, sqlx::query(server.table.sql(LIST)), page).await
            }
            rows => rows,
        }
    } else {
        fetch(connection, sqlx::query(server.table.sql(LIST)), page).await
    };
    let whole = |name: Vec<u8>| String::from_utf8_lossy(&name).into_owned();
    rows?.iter().map(|row| Ok((whole(row.try_get(row::COLUMNS)?), lock_row(row)?))).collect()
}

async fn fetch(
    connection: &mut MySqlConnection,
    query: sqlx::query::Query<'_, sqlx::MySql, sqlx::mysql::MySqlArguments>,
    page: &ListPage,
) -> Result<Vec<sqlx::mysql::MySqlRow>, sqlx::Error> {
    let (from, to) = page.bounds();
    let query =
        query.bind(from.as_bytes().to_vec()).bind(to.into_bytes()).bind(page.after.as_bytes().to_vec());
    let query = query.bind(page.like().into_bytes()).bind(page.held_only).bind(page.limit);
    query.fetch_all(connection).await
}

pub(super) async fn row_holders(
    connection: &mut MySqlConnection,
    server: &Server,
    ids: &[i64],
) -> driver::Result<HashMap<i64, RowHolder>> {
    let (statement, rights) = if server.is_mariadb {
        (ROW_HOLDERS_ON_MARIADB, "GRANT PROCESS ON *.* shows it while another transaction waits for it")
    } else {
        (
            ROW_HOLDERS,
            "GRANT PROCESS ON *.*, and SELECT ON performance_schema.data_locks and performance_schema.threads, show it",
        )
    };
    let listed: Vec<String> = ids.iter().map(|id| format!("'{id}'")).collect();
    let statement = statement.replace("{schema}", &quoted(&server.table.schema));
    let statement = statement.replace("{ids}", &listed.join(",")).replace("{table}", server.table.name());
    let found = sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(connection).await;
    let unknown = |why: &str| ids.iter().map(|id| (*id, RowHolder::Unknown(why.to_owned()))).collect();
    let found = match found {
        Ok(found) => found,
        Err(error) if is_denied(&error) => return Ok(unknown(rights)),
        Err(sqlx::Error::Database(error)) => return Ok(unknown(error.message())),
        Err(error) => return Err(error.into()),
    };
    let mut holders = if server.is_mariadb {
        unknown("MariaDB shows it only while another transaction waits for it")
    } else {
        HashMap::new()
    };
    for row in found {
        let session = DatabaseSession {
            id: row.try_get(1)?,
            user: row.try_get(2)?,
            host: row.try_get(3)?,
            application_name: None,
            since: row.try_get::<Option<i64>, _>(4)?.map(timestamp),
        };
        holders.insert(row.try_get(0)?, RowHolder::Session(session));
    }
    Ok(holders)
}

/// Text inside of single quotes.
fn quoted(text: &str) -> String {
    text.replace('\\', "\\\\").replace('\'', "''")
}

pub(super) async fn force_release(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
    row: &LockRow,
) -> driver::Result<bool> {
    let query = sqlx::query(server.table.sql(FORCE_RELEASE)).bind(FORCED).bind(row.id);
    match query.bind(name.as_bytes()).bind(row.fencing_token).execute(connection).await {
        Ok(written) => Ok(written.rows_affected() > 0),
        Err(error) if matches!(number(&error), Some(ROW_IS_LOCKED | LOCK_WAIT_TIMEOUT)) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

pub(super) async fn describe(connection: &mut MySqlConnection, server: &Server) -> driver::Result<String> {
    let version: String = sqlx::query_scalar(VERSION).fetch_one(&mut *connection).await?;
    let number: String =
        version.chars().take_while(|character| character.is_ascii_digit() || *character == '.').collect();
    let product = if server.is_mariadb { "MariaDB" } else { "MySQL" };
    let cluster = match (server.cluster, server.is_mariadb) {
        (Cluster::SinglePrimary, _) => None,
        (Cluster::MultiPrimary, true) => Some(("Galera", "nodes", GALERA_NODES, 1)),
        (Cluster::MultiPrimary, false) => Some(("group replication", "members", GROUP_MEMBERS, 0)),
    };
    let Some((cluster, members, statement, column)) = cluster else {
        return Ok(format!("{product} {number}"));
    };
    let count = sqlx::raw_sql(statement).fetch_optional(connection).await;
    let count = count.ok().flatten().and_then(|row| row.try_get::<String, _>(column).ok());
    Ok(match count {
        Some(count) => format!("{product} {number} ({cluster}, {count} {members})"),
        None => format!("{product} {number} ({cluster})"),
    })
}

pub(super) async fn time(connection: &mut MySqlConnection) -> driver::Result<i64> {
    Ok(sqlx::query_scalar(TIME).fetch_one(connection).await?)
}
