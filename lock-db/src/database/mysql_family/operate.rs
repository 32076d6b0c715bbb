//! What operators ask: lists of locks, who holds them, and the end of a lease by force.

use std::collections::HashMap;

use sqlx::mysql::{MySqlArguments, MySqlConnection, MySqlRow};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, MySql, Row};

use super::errors::{ACCESS_DENIED, number};
use crate::database::driver;
use crate::database::lock_row::timestamp;
use crate::database::row::{self, lock_row};
use crate::database::{Cluster, ListPage, LockRow, Server};
use crate::{DatabaseSession, RowHolder};

/// Names from the first on, behind the second, and up to the third. A text that no name reaches stands
/// for no end: it is of bytes that are in no UTF-8.
macro_rules! in_part {
    () => {
        "lock_name >= ? AND lock_name > ? AND lock_name <= ?"
    };
}

const NO_END: &[u8] = &[0xFF];

const END_OF_PART: &str = concat!(
    "SELECT lock_name FROM {table} FORCE INDEX (distributed_lock_name) WHERE ",
    in_part!(),
    " ORDER BY lock_name LIMIT 1 OFFSET 4999"
);

/// The rows of row locks that transactions have locked. With MySQL's statement only those accounts see
/// any that have the rights; the others get an error, and ask without it.
macro_rules! list {
    ($($or_locked:expr),*) => {
        concat!(
            "SELECT ",
            columns!(),
            ", lock_name
FROM {table} AS lease FORCE INDEX (distributed_lock_name)
WHERE ",
            in_part!(),
            " AND lock_name LIKE ? ESCAPE '!'
    AND (NOT ? OR (lock_kind <> 'row' AND expire_time > UTC_TIMESTAMP(6))",
            $($or_locked,)*
            ")
ORDER BY lock_name LIMIT ?"
        )
    };
}

/// A lock on a row itself, not on the gap before it.
macro_rules! locks_on_rows {
    () => {
        "held.object_schema = '{schema}' AND held.object_name = 'distributed_lock'
    AND held.index_name = 'PRIMARY' AND held.lock_type = 'RECORD' AND held.lock_status = 'GRANTED'
    AND held.lock_mode IN ('X', 'X,REC_NOT_GAP')"
    };
}

const LIST: &str = list!();
const LIST_WITH_LOCKED: &str = list!(
    "
        OR (lock_kind = 'row' AND id IN (
            SELECT CAST(held.lock_data AS SIGNED) FROM performance_schema.data_locks AS held
            WHERE ",
    locks_on_rows!(),
    " AND held.lock_data RLIKE '^[0-9]+$'))"
);

/// Who has rows locked, by their ids. MySQL shows all locks on rows, at once. It shows when a
/// transaction has begun a little later. A transaction that was prepared has no session.
const ROW_HOLDERS: &str = concat!(
    "
SELECT CAST(held.lock_data AS SIGNED), CAST(session.processlist_id AS SIGNED),
    CONVERT(COALESCE(session.processlist_user, '') USING utf8mb4), CONVERT(session.processlist_host USING utf8mb4),
    TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', CONVERT_TZ(holder.trx_started, 'SYSTEM', '+00:00'))
FROM performance_schema.data_locks AS held
LEFT JOIN performance_schema.threads AS session ON session.thread_id = held.thread_id
LEFT JOIN information_schema.innodb_trx AS holder ON holder.trx_id = held.engine_transaction_id
WHERE ",
    locks_on_rows!(),
    " AND held.lock_data IN ({ids})"
);

/// Without it, the server shows no locks, which looks as if there were none.
const SHOWS_LOCKS: &str = "SELECT CAST(@@performance_schema AS SIGNED)";

/// MariaDB shows only locks that another transaction waits for: on a row, or on its entry in the index
/// of the names. Waiters wait for earlier waiters, too.
const ROW_HOLDERS_ON_MARIADB: &str = "
SELECT lease.id, CAST(holder.trx_mysql_thread_id AS SIGNED),
    CONVERT(COALESCE(session.user, '') USING utf8mb4), CONVERT(session.host USING utf8mb4),
    TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', CONVERT_TZ(holder.trx_started, 'SYSTEM', '+00:00'))
FROM information_schema.innodb_locks AS held
JOIN information_schema.innodb_lock_waits AS waits ON waits.blocking_lock_id = held.lock_id
JOIN information_schema.innodb_trx AS holder ON holder.trx_id = held.lock_trx_id
    AND (holder.trx_requested_lock_id IS NULL OR holder.trx_requested_lock_id <> held.lock_id)
JOIN {table} AS lease
    ON held.lock_data = CONCAT('0x', HEX(lease.lock_name)) OR held.lock_data = CAST(lease.id AS CHAR)
LEFT JOIN information_schema.processlist AS session ON session.id = holder.trx_mysql_thread_id
WHERE held.lock_table = '`{schema}`.`distributed_lock`' AND held.lock_mode = 'X' AND lease.id IN ({ids})";

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

/// The values of `in_part!`.
fn part(page: &ListPage) -> [Vec<u8>; 3] {
    let (from, above) = page.bounds();
    // No name is the text above all of them.
    let to = page.end.clone().or(above).map_or(NO_END.to_vec(), String::into_bytes);
    [from.as_bytes().to_vec(), page.after.as_bytes().to_vec(), to]
}

fn whole(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

pub(super) async fn end_of_part(
    connection: &mut MySqlConnection,
    server: &Server,
    page: &ListPage,
) -> driver::Result<Option<String>> {
    let [from, after, to] = part(page);
    let query = sqlx::query_scalar(server.table.sql(END_OF_PART)).bind(from).bind(after).bind(to);
    let end: Option<Vec<u8>> = query.fetch_optional(connection).await?;
    Ok(end.map(|name| whole(&name)))
}

pub(super) async fn list(
    connection: &mut MySqlConnection,
    server: &Server,
    page: &ListPage,
) -> driver::Result<Vec<(String, LockRow)>> {
    let all = |connection| fetch(connection, sqlx::query(server.table.sql(LIST)), page);
    let rows = if page.held_only && !server.is_mariadb {
        let statement = LIST_WITH_LOCKED.replace("{schema}", &quoted(&server.table.schema));
        let statement = statement.replace("{table}", server.table.name());
        match fetch(connection, sqlx::query(AssertSqlSafe(statement)).persistent(false), page).await {
            Err(error) if is_denied(&error) => all(connection).await,
            rows => rows,
        }
    } else {
        all(connection).await
    };
    rows?.iter().map(|row| Ok((whole(row.try_get(row::COLUMNS)?), lock_row(row)?))).collect()
}

async fn fetch(
    connection: &mut MySqlConnection,
    query: Query<'_, MySql, MySqlArguments>,
    page: &ListPage,
) -> Result<Vec<MySqlRow>, sqlx::Error> {
    let [from, after, to] = part(page);
    let query = query.bind(from).bind(after).bind(to).bind(page.like().into_bytes());
    query.bind(page.held_only).bind(page.limit).fetch_all(connection).await
}

pub(super) async fn row_holders(
    connection: &mut MySqlConnection,
    server: &Server,
    ids: &[i64],
) -> driver::Result<HashMap<i64, RowHolder>> {
    let unknown = |why: &str| ids.iter().map(|id| (*id, RowHolder::Unknown(why.to_owned()))).collect();
    let (statement, rights) = if server.is_mariadb {
        (ROW_HOLDERS_ON_MARIADB, "GRANT PROCESS ON *.* shows it while another transaction waits for it")
    } else {
        let shows_locks: i64 = sqlx::query_scalar(SHOWS_LOCKS).fetch_one(&mut *connection).await?;
        if shows_locks == 0 {
            return Ok(unknown("`performance_schema` is off, and with it the server's list of locks"));
        }
        let rights = "GRANT PROCESS ON *.*, and SELECT ON performance_schema.data_locks and \
                      performance_schema.threads, show it";
        (ROW_HOLDERS, rights)
    };
    let listed: Vec<String> = ids.iter().map(|id| format!("'{id}'")).collect();
    let statement = statement.replace("{schema}", &quoted(&server.table.schema));
    let statement = statement.replace("{ids}", &listed.join(",")).replace("{table}", server.table.name());
    let found = match sqlx::raw_sql(AssertSqlSafe(statement)).fetch_all(connection).await {
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
        let holder = match row.try_get::<Option<i64>, _>(1)? {
            Some(id) => RowHolder::Session(DatabaseSession {
                id,
                user: row.try_get(2)?,
                host: row.try_get(3)?,
                application_name: None,
                since: row.try_get::<Option<i64>, _>(4)?.map(timestamp),
            }),
            None => {
                RowHolder::Unknown("a transaction has it locked that has no session: see XA RECOVER".into())
            }
        };
        holders.insert(row.try_get(0)?, holder);
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
    in_dialect!(server, force_release(connection, server, name, row.fencing_token))
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
