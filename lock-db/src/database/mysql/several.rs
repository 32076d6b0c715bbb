//! Several leases for one caller. Each step is one message, whatever the number of names, if the
//! server accepts its length.

use std::collections::{HashMap, HashSet};

use sqlx::mysql::{MySqlConnection, MySqlRow};
use sqlx::{AssertSqlSafe, Connection, MySql, Row};

use super::batch::batch_as_json;
use super::lease::{self, READ_ALL};
use super::{literal, mariadb, parts};
use crate::Kind;
use crate::database::StepError;
use crate::database::driver;
use crate::database::driver::SessionDriver;
use crate::database::{Claim, Grant, LockRow, Server, by_name, names_as_json};
use crate::name::Name;
use crate::options::micros;

/// `ACQUIRE` for all or none of several names, which have no queue entries. The rows are locked and
/// counted, and written only if all of them were locked.
const ACQUIRE_ALL: &str = "
UPDATE (
    SELECT found.*, COUNT(*) OVER () AS how_many
    FROM (
        SELECT lease.id, lease.fencing_token AS last_token, lease.acquire_time AS last_time,
            lease.secret_key = asked.secret_key AS is_again, lease.previous_token AS last_previous, asked.secret_key
        FROM JSON_TABLE(?, '$[*]' COLUMNS (
                lock_name VARCHAR(510) PATH '$[0]', secret_key VARCHAR(32) CHARACTER SET ascii PATH '$[1]')) AS asked
        STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name)
            ON lease.lock_name = UNHEX(asked.lock_name)
        WHERE lease.lock_kind = 'insert'
            AND (lease.secret_key = asked.secret_key
                OR (lease.expire_time <= UTC_TIMESTAMP(6)
                    AND (lease.ttl_micros <= 0 OR lease.expire_time = '1970-01-01 00:00:00')))
        LIMIT 1000000
        FOR UPDATE OF lease SKIP LOCKED) AS found) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.fencing_token = IF(unlocked.is_again, unlocked.last_token, GREATEST(
        unlocked.last_token + 1, TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)))),
    lease.previous_token = IF(unlocked.is_again, unlocked.last_previous, unlocked.last_token),
    lease.acquire_time = IF(unlocked.is_again, unlocked.last_time, UTC_TIMESTAMP(6)),
    lease.secret_key = unlocked.secret_key,
    lease.owner = ?,
    lease.expire_time = TIMESTAMPADD(MICROSECOND, ?, UTC_TIMESTAMP(6)),
    lease.ttl_micros = ?
WHERE unlocked.how_many = ?";

const GRANTED_ALL: &str = "
SELECT lease.secret_key, lease.fencing_token, lease.id, lease.waiters <> '', lease.fencing_token - lease.previous_token
FROM JSON_TABLE(?, '$[*]' COLUMNS (
        lock_name VARCHAR(510) PATH '$[0]', secret_key VARCHAR(32) CHARACTER SET ascii PATH '$[1]')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name)
    ON lease.lock_name = UNHEX(asked.lock_name)
WHERE lease.secret_key = asked.secret_key";

const UNLOCKED: &str = "
SELECT lease.lock_name
FROM JSON_TABLE(?, '$[*]' COLUMNS (asked_name VARCHAR(510) PATH '$')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name) ON lease.lock_name = UNHEX(asked.asked_name)
FOR UPDATE OF lease SKIP LOCKED";

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
            found.push((row.try_get(11)?, lease::lock_row(&row)?));
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
    let rows = read(connection, server, names).await?;
    let missing: Vec<&Name> =
        names.iter().zip(rows).filter_map(|(name, row)| row.is_none().then_some(name)).collect();
    for part in parts(&missing, server, |name| in_json(name)) {
        let values: Vec<String> =
            part.iter().map(|name| format!("({},'{}')", literal(name), kind.as_str())).collect();
        let (table, values) = (server.table.name(), values.join(","));
        let insert = format!("INSERT IGNORE INTO {table} (lock_name, lock_kind) VALUES {values}");
        sqlx::raw_sql(AssertSqlSafe(insert)).execute(&mut *connection).await?;
    }
    Ok(true)
}

pub(super) async fn acquire(
    connection: &mut MySqlConnection,
    server: &Server,
    claims: &[Claim],
) -> driver::Result<Vec<Option<Grant>>> {
    let nothing = || vec![None; claims.len()];
    let parts = parts(claims, server, |claim| in_json(&claim.name));
    let rows = if let [all] = &*parts {
        acquire_part(connection, server, all, true).await?
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
        let Some(found) = acquire_part(&mut transaction, server, part, false).await? else {
            transaction.rollback().await?;
            return Ok(None);
        };
        rows.extend(found);
    }
    transaction.commit().await?;
    Ok(Some(rows))
}

/// `None`: not all of them are free.
async fn acquire_part(
    connection: &mut MySqlConnection,
    server: &Server,
    claims: &[Claim],
    is_whole: bool,
) -> driver::Result<Option<Vec<MySqlRow>>> {
    let (asked, all) = (batch_as_json(&[], claims), i64::try_from(claims.len()).unwrap_or(i64::MAX));
    let owner = claims.first().map_or("".into(), |claim| server.storable(&claim.owner));
    let ttl = claims.first().map_or(0, |claim| micros(claim.ttl));
    if server.is_mariadb {
        let rows = mariadb::acquire_all(connection, server, &asked, &owner, is_whole.then_some(all)).await?;
        let is_some = if is_whole { !rows.is_empty() } else { rows.len() == claims.len() };
        return Ok(is_some.then_some(rows));
    }
    let query = sqlx::query(server.table.sql(ACQUIRE_ALL)).bind(&asked).bind(owner.as_ref());
    let acquired = query.bind(ttl).bind(ttl).bind(all).execute(&mut *connection).await?;
    if acquired.rows_affected() == 0 {
        return Ok(None);
    }
    // The leases are already ours, so an error must not look like an answer.
    let rows = sqlx::query(server.table.sql(GRANTED_ALL)).bind(asked).fetch_all(connection).await;
    rows.map(Some).map_err(StepError::outcome_unknown)
}

pub(super) async fn unlocked(
    connection: &mut MySqlConnection,
    server: &Server,
    names: &[Name],
) -> driver::Result<HashSet<String>> {
    let mut found = HashSet::with_capacity(names.len());
    for part in parts(names, server, in_json) {
        let names = names_as_json(part);
        let rows = if server.is_mariadb {
            mariadb::unlocked(connection, server, &names).await?
        } else {
            sqlx::query(server.table.sql(UNLOCKED)).bind(names).fetch_all(&mut *connection).await?
        };
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
