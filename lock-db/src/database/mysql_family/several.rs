//! Several leases for one caller. Each step is one message, whatever the number of names, if the
//! server accepts its length.

use std::collections::{HashMap, HashSet};

use sqlx::mysql::{MySqlConnection, MySqlRow};
use sqlx::{AssertSqlSafe, Connection, MySql, Row};

use super::lease::READ_ALL;
use super::{literal, parts};
use crate::Kind;
use crate::database::StepError;
use crate::database::driver;
use crate::database::driver::SessionDriver;
use crate::database::row;
use crate::database::{Claim, Grant, LockRow, Server, by_name, names_as_json};
use crate::name::Name;

/// Undoes the setting of `BEGIN_SHORT` that outlasts its transaction.
const AFTER_SHORT: &str = "SET SESSION wait_timeout = DEFAULT";

pub(super) async fn read(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &[Name],
) -> driver::Result<Vec<Option<LockRow>>> {
    let mut found = Vec::with_capacity(names.len());
    for part in parts(names, server, in_json) {
        let query = sqlx::query(server.table.sql(READ_ALL)).bind(names_as_json(part));
        for row in query.fetch_all(&mut *connection).await? {
            found.push((row.try_get(row::COLUMNS)?, row::lock_row(&row)?));
        }
    }
    Ok(by_name(names, found))
}

/// Reads first, as `lease::create` does, and for the same reason. IGNORE skips rows that others
/// create at the same time. It can't hide a truncated name, because the column was checked to hold
/// the longest name.
///
/// Inserts a list of values. An insert with a SELECT would lock the counter of the table until it
/// ends, and use up numbers.
pub(super) async fn create(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &[Name],
    kind: Kind,
) -> driver::Result<bool> {
    let texts: Vec<&str> = names.iter().map(|name| &**name).collect();
    let found = find_dirty(connection, server, &texts).await?;
    let (found, missing): (Vec<&Name>, Vec<&Name>) =
        names.iter().partition(|name| found.contains(name.as_bytes()));
    let found: Vec<Name> = found.into_iter().cloned().collect();
    if read(connection, server, &found).await?.iter().any(Option::is_none) {
        return Ok(false);
    }
    for part in parts(&missing, server, |name| in_json(name)) {
        let values: Vec<String> =
            part.iter().map(|name| format!("({},'{}')", literal(name), kind.as_str())).collect();
        let (table, values) = (server.table.name(), values.join(","));
        let insert = format!("INSERT IGNORE INTO {table} (lock_name, lock_kind) VALUES {values}");
        sqlx::raw_sql(AssertSqlSafe(insert)).execute(&mut *connection).await?;
    }
    Ok(true)
}

/// `create` and `read` in one message. The names are converted because the database may have a
/// character set in which JSON is not ASCII. A name whose row is only seen by the dirty read is left out of
/// the result.
pub(super) async fn ensure(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &[Name],
    kind: Kind,
) -> driver::Result<Vec<Option<LockRow>>> {
    let mut found = Vec::with_capacity(names.len());
    // The names are in it twice.
    for part in parts(names, server, |name| in_json(name) * 2) {
        let (asked, kind, table) = (names_as_json(part), kind.as_str(), server.table.name());
        let sql = format!(
            "SET TRANSACTION ISOLATION LEVEL READ UNCOMMITTED;
            SELECT JSON_ARRAYAGG(CONVERT(asked.asked_name USING utf8mb4)) INTO @lock_db_new
            FROM JSON_TABLE('{asked}', '$[*]' COLUMNS (asked_name VARCHAR(510) PATH '$')) AS asked
            LEFT JOIN {table} AS lease FORCE INDEX (distributed_lock_name)
                ON lease.lock_name = UNHEX(CONVERT(asked.asked_name USING ascii))
            WHERE lease.id IS NULL;
            INSERT IGNORE INTO {table} (lock_name, lock_kind)
            SELECT UNHEX(CONVERT(new_name USING utf8mb4)), '{kind}'
            FROM JSON_TABLE(CONVERT(COALESCE(@lock_db_new, '[]') USING utf8mb4), '$[*]' COLUMNS (
                new_name VARCHAR(510) PATH '$')) AS made;
            {read}",
            read =
                READ_ALL.replace("JSON_TABLE(?", &format!("JSON_TABLE('{asked}'")).replace("{table}", table),
        );
        for row in fetch_dirty(connection, sql).await? {
            found.push((row.try_get(row::COLUMNS)?, row::lock_row(&row)?));
        }
    }
    Ok(by_name(names, found))
}

/// For a message that begins with `SET TRANSACTION`. A statement that fails does not use that
/// setting up, and the next one would read uncommitted data.
async fn fetch_dirty(connection: &mut MySqlConnection, sql: String) -> driver::Result<Vec<MySqlRow>> {
    let rows = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut *connection).await;
    if rows.is_err() {
        sqlx::raw_sql("ROLLBACK").execute(connection).await?;
    }
    Ok(rows?)
}

/// Which of the names have rows, including those of open transactions. Waits for none of them.
pub(super) async fn find_dirty(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &[&str],
) -> driver::Result<HashSet<Vec<u8>>> {
    let mut found = HashSet::new();
    for part in parts(names, server, |name| name.len() * 2 + 8) {
        let list: Vec<String> = part.iter().map(|name| literal(name)).collect();
        let sql = format!(
            "SET TRANSACTION ISOLATION LEVEL READ UNCOMMITTED;
            SELECT lock_name FROM {} FORCE INDEX (distributed_lock_name) WHERE lock_name IN ({})",
            server.table.name(),
            list.join(",")
        );
        for row in fetch_dirty(connection, sql).await? {
            found.insert(row.try_get(0)?);
        }
    }
    Ok(found)
}

pub(super) async fn acquire(
    connection: &mut MySqlConnection,
    server: &Server,
    claims: &[Claim],
) -> driver::Result<Vec<Option<Grant>>> {
    let nothing = || vec![None; claims.len()];
    let parts = parts(claims, server, |claim| in_json(&claim.name));
    let rows = if let [all] = &*parts {
        in_dialect!(server, acquire_all(connection, server, all, true))?
    } else {
        let rows = acquire_parts(connection, server, &parts).await?;
        sqlx::raw_sql(AFTER_SHORT).execute(connection).await.map_err(StepError::outcome_unknown)?;
        rows
    };
    let Some(rows) = rows else { return Ok(nothing()) };
    let mut grants = HashMap::with_capacity(rows.len());
    for row in &rows {
        let (fencing_token, id) = (row.try_get(1)?, row.try_get(2)?);
        let grant = Grant { id, fencing_token, others_wait: row.try_get(3)?, tokens: row.try_get(4)? };
        grants.insert(row.try_get::<String, _>(0)?, grant);
    }
    Ok(claims.iter().map(|claim| grants.get(claim.secret.as_str()).copied()).collect())
}

/// Sends what does not fit into one message, in one transaction.
async fn acquire_parts(
    connection: &mut MySqlConnection,
    server: &Server,
    parts: &[&[Claim]],
) -> driver::Result<Option<Vec<MySqlRow>>> {
    let mut transaction = connection.begin_with(MySql::BEGIN_SHORT).await?;
    let mut rows = Vec::new();
    for part in parts {
        let Some(found) = in_dialect!(server, acquire_all(&mut transaction, server, part, false))? else {
            transaction.rollback().await?;
            return Ok(None);
        };
        rows.extend(found);
    }
    transaction.commit().await?;
    Ok(Some(rows))
}

pub(super) async fn unlocked(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &[Name],
) -> driver::Result<HashSet<String>> {
    let mut found = HashSet::with_capacity(names.len());
    for part in parts(names, server, in_json) {
        let names = names_as_json(part);
        let rows = in_dialect!(server, unlocked(connection, server, &names))?;
        for row in &rows {
            found.insert(String::from_utf8_lossy(row.try_get::<&[u8], _>(0)?).into_owned());
        }
    }
    Ok(found)
}

/// How many bytes a name takes in JSON, with the other values of its entry.
pub(super) fn in_json(name: &Name) -> usize {
    const BESIDE_IT: usize = 128;
    name.len() * 2 + BESIDE_IT
}
