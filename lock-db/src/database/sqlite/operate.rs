//! What operators ask: lists of locks, and the end of a lease by force.

use std::collections::HashMap;

use sqlx::sqlite::SqliteConnection;

use crate::RowHolder;
use crate::database::driver;
use crate::database::lock_row::FORCED;
use crate::database::row::named_rows;
use crate::database::{ListPage, LockRow, Server};

/// Names up to `?3`, or below `?4`; NULL is no limit.
macro_rules! in_part {
    () => {
        "lock_name >= ?1 AND lock_name > ?2 AND (?3 IS NULL OR lock_name <= ?3) AND (?4 IS NULL OR lock_name < ?4)"
    };
}

const END_OF_PART: &str =
    concat!("SELECT lock_name FROM {table} WHERE ", in_part!(), " ORDER BY lock_name LIMIT 1 OFFSET 4999");

const LIST: &str = concat!(
    "SELECT ",
    columns!(),
    ", lock_name FROM {table}
WHERE ",
    in_part!(),
    " AND lock_name GLOB ?5
    AND (NOT ?6 OR (lock_kind <> 'row' AND expire_time > strftime('%Y-%m-%d %H:%M:%f000', 'now')))
ORDER BY lock_name LIMIT ?7"
);

const FORCE_RELEASE: &str = "
UPDATE {table}
SET expire_time = '1970-01-01 00:00:00.000000', ttl_micros = 0, secret_key = ?3, fencing_token = fencing_token + 1
WHERE lock_name = ?1 AND fencing_token = ?2 AND lock_kind = 'insert' AND expire_time > '1970-01-01 00:00:00.000000'";

const VERSION: &str = "SELECT sqlite_version()";

const TIME: &str = "SELECT CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER)";

pub(super) async fn end_of_part(
    connection: &mut SqliteConnection,
    server: &Server,
    page: &ListPage,
) -> driver::Result<Option<String>> {
    let (from, above) = page.bounds();
    let query = sqlx::query_scalar(server.table.sql(END_OF_PART)).bind(from).bind(&page.after);
    Ok(query.bind(None::<String>).bind(above).fetch_optional(connection).await?)
}

pub(super) async fn list(
    connection: &mut SqliteConnection,
    server: &Server,
    page: &ListPage,
) -> driver::Result<Vec<(String, LockRow)>> {
    let (from, above) = page.bounds();
    let query = sqlx::query(server.table.sql(LIST)).bind(from).bind(&page.after).bind(&page.end).bind(above);
    let query = query.bind(page.glob()).bind(page.held_only).bind(page.limit);
    let rows = query.fetch_all(connection).await?;
    named_rows(&rows)
}

/// SQLite does not tell which connection writes.
pub(super) fn row_holders(ids: &[i64]) -> HashMap<i64, RowHolder> {
    let why = "SQLite does not tell which process writes, and so holds every row lock";
    ids.iter().map(|id| (*id, RowHolder::Unknown(why.to_owned()))).collect()
}

pub(super) async fn force_release(
    connection: &mut SqliteConnection,
    server: &Server,
    name: &str,
    row: &LockRow,
) -> driver::Result<bool> {
    let query = sqlx::query(server.table.sql(FORCE_RELEASE)).bind(name).bind(row.fencing_token).bind(FORCED);
    Ok(query.execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn describe(connection: &mut SqliteConnection) -> driver::Result<String> {
    let version: String = sqlx::query_scalar(VERSION).fetch_one(connection).await?;
    Ok(format!("SQLite {version}"))
}

pub(super) async fn time(connection: &mut SqliteConnection) -> driver::Result<i64> {
    Ok(sqlx::query_scalar(TIME).fetch_one(connection).await?)
}
