//! Many leases at a time, on private connections: what MySQL and MariaDB have in common, and MySQL's statements.

use std::collections::HashMap;
use std::fmt::Write as _;

use std::time::Instant;

use sqlx::mysql::{MySqlConnection, MySqlRow};
use sqlx::{AssertSqlSafe, Connection, MySql, Row};

use super::errors::{UNKNOWN_STATEMENT, number};
use super::several::in_json;
use super::{literal, mariadb, parts};
use crate::database::{
    Claim, Exchanged, Fault, Grant, LockDatabase, Place, Renewal, Renewed, Return, Server, Standing, as_json,
    hexadecimal, in_order, outcome_unknown,
};
use crate::limits::micros;
use crate::secret::Secret;

/// One statement, after which the server needs nothing more of us: a client that is stopped or cut off in the middle of a
/// transaction would keep the rows locked. Rows that somebody has locked are passed over, so one of them can't hold up
/// the rest, and never does it find a lease that was released (1970). A deadline moves backwards only when it lies further ahead than can
/// be, because the clock was set back: by more than 2 s.
///
/// LIMIT makes the server materialize the inner SELECT, with its locks; `STRAIGHT_JOIN` and `FORCE INDEX` keep it from reading,
/// and so locking, other rows of a small table. The server wants to be told that JSON is not to be locked.
const RENEW: &str = "
UPDATE (
    SELECT lease.id, asked.ttl
    FROM JSON_TABLE(?, '$[*]' COLUMNS (
            id BIGINT PATH '$[0]', secret_key VARCHAR(32) CHARACTER SET ascii PATH '$[1]', ttl BIGINT PATH '$[2]',
            fencing_token BIGINT PATH '$[3]')) AS asked
    STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = asked.id
    WHERE lease.secret_key = asked.secret_key AND lease.fencing_token = asked.fencing_token
        AND lease.expire_time > '1970-01-01 00:00:00'
    LIMIT 1000000
    FOR UPDATE OF lease SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.expire_time = LEAST(
        GREATEST(lease.expire_time, TIMESTAMPADD(MICROSECOND, unlocked.ttl, UTC_TIMESTAMP(6))),
        TIMESTAMPADD(MICROSECOND, unlocked.ttl + 2000000, UTC_TIMESTAMP(6))),
    lease.ttl_micros = unlocked.ttl";

/// Which leases are ours, whether they were renewed a moment ago (later than what the holder will rely on), and whether notice was
/// given of a takeover.
const STILL_OURS: &str = "
SELECT lease.secret_key,
    TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), lease.expire_time) >= asked.ttl DIV 12 * 11, lease.ttl_micros <= 0
FROM JSON_TABLE(?, '$[*]' COLUMNS (
        id BIGINT PATH '$[0]', secret_key VARCHAR(32) CHARACTER SET ascii PATH '$[1]', ttl BIGINT PATH '$[2]',
        fencing_token BIGINT PATH '$[3]')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = asked.id
WHERE lease.secret_key = asked.secret_key AND lease.fencing_token = asked.fencing_token
    AND lease.expire_time > '1970-01-01 00:00:00'";

/// `RELEASE` (those without a `ttl`) and `ACQUIRE` for many at once, in one commit.
const EXCHANGE: &str = "
UPDATE (
    SELECT lease.id, lease.fencing_token AS last_token, lease.acquire_time AS last_time, lease.owner AS last_owner,
        lease.secret_key = asked.secret_key AS is_again, lease.previous_token AS last_previous,
        lease.waiters <> '' AND LEFT(lease.waiters, 32) = asked.place AS was_first,
        lease.waiters <> '' AND LENGTH(lease.waiters) < 3584 AND INSTR(lease.waiters, asked.place) = 0 AS may_stand,
        asked.secret_key, asked.ttl, asked.place
    FROM JSON_TABLE(@lock_db_asked, '$[*]' COLUMNS (
            lock_name VARCHAR(510) PATH '$[0]', secret_key VARCHAR(32) CHARACTER SET ascii PATH '$[1]', ttl BIGINT PATH '$[2]',
            place VARCHAR(32) CHARACTER SET ascii PATH '$[3]')) AS asked
    STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name)
        ON lease.lock_name = UNHEX(asked.lock_name)
    WHERE lease.lock_kind = 'insert'
        AND (lease.secret_key = asked.secret_key
            OR (asked.ttl > 0 AND lease.expire_time <= UTC_TIMESTAMP(6)
                AND (lease.ttl_micros <= 0 OR lease.expire_time = '1970-01-01 00:00:00')
                AND (lease.waiters = '' OR asked.place = '' OR LEFT(lease.waiters, 32) = asked.place)))
    LIMIT 1000000
    FOR UPDATE OF lease SKIP LOCKED) AS unlocked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.fencing_token = IF(unlocked.is_again, unlocked.last_token, GREATEST(
        unlocked.last_token + 1, TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)))),
    lease.previous_token = IF(unlocked.is_again, unlocked.last_previous, unlocked.last_token),
    lease.acquire_time = IF(unlocked.is_again, unlocked.last_time, UTC_TIMESTAMP(6)),
    lease.secret_key = unlocked.secret_key,
    lease.owner = IF(unlocked.ttl > 0, @lock_db_owner, unlocked.last_owner),
    lease.expire_time = IF(
        unlocked.ttl > 0, TIMESTAMPADD(MICROSECOND, unlocked.ttl, UTC_TIMESTAMP(6)), '1970-01-01 00:00:00'),
    lease.ttl_micros = unlocked.ttl,
    lease.waiters = CASE WHEN unlocked.ttl > 0 AND unlocked.was_first THEN SUBSTR(lease.waiters, 57)
        WHEN unlocked.ttl = 0 AND unlocked.place <> '' AND unlocked.may_stand THEN CONCAT(
            lease.waiters, unlocked.place, LPAD(TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)) + 2000000, 16, '0'), CONVERT(@lock_db_listener USING ascii))
        ELSE lease.waiters END";

/// Which of them are ours, and whether what was asked for has been done: given back, or taken so lately that more is left
/// than the holder will rely on. In the transaction of `EXCHANGE`, whose locks it needs: right after its commit somebody
/// else may take what was given back.
const EXCHANGED: &str = "
SELECT lease.secret_key, lease.fencing_token, lease.id,
    IF(asked.ttl > 0,
        TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), lease.expire_time) >= asked.ttl DIV 12 * 11,
        lease.expire_time = '1970-01-01 00:00:00'),
    lease.waiters <> '', lease.fencing_token - lease.previous_token
FROM JSON_TABLE(@lock_db_asked, '$[*]' COLUMNS (
        lock_name VARCHAR(510) PATH '$[0]', secret_key VARCHAR(32) CHARACTER SET ascii PATH '$[1]', ttl BIGINT PATH '$[2]')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (distributed_lock_name)
    ON lease.lock_name = UNHEX(asked.lock_name)
WHERE lease.secret_key = asked.secret_key";

/// In bytes, as `as_json` writes it.
const LONGEST_RENEWAL: usize = 128;

/// In as few messages as the server takes.
pub(super) async fn renew(
    connection: &mut MySqlConnection,
    server: &Server,
    leases: &[Renewal],
) -> sqlx::Result<Renewed> {
    let mut all = Renewed { standings: Vec::with_capacity(leases.len()), looked: None };
    for part in parts(leases, server, |_| LONGEST_RENEWAL) {
        let Renewed { standings, looked } = renew_part(connection, server, part).await?;
        all.standings.extend(standings);
        // The earliest, which holds for all.
        all.looked = all.looked.or(looked);
    }
    Ok(all)
}

async fn renew_part(
    connection: &mut MySqlConnection,
    server: &Server,
    leases: &[Renewal],
) -> sqlx::Result<Renewed> {
    if server.is_mariadb {
        return mariadb::renew(connection, server, leases).await;
    }
    let json = as_json(leases);
    let renewed = sqlx::query(server.table.sql(RENEW)).bind(&json).execute(&mut *connection).await?;
    if usize::try_from(renewed.rows_affected()) == Ok(leases.len()) {
        return Ok(Renewed { standings: vec![Standing::Ours; leases.len()], looked: None });
    }
    let (found, looked) = still_ours(connection, server, &json).await?;
    // One that was asked for alone was not renewed, or it would have been counted.
    let is_alone = leases.len() == 1;
    let found = found.into_iter().map(|(secret, standing)| {
        (secret, if is_alone && standing == Standing::StillOurs { Standing::Busy } else { standing })
    });
    Ok(in_order(leases, found, Some(looked)))
}

/// In a transaction of its own, because what spreads reads over replicas must not answer it by an old one. Answers when it was read,
/// too.
pub(super) async fn still_ours(
    connection: &mut MySqlConnection,
    server: &Server,
    json: &str,
) -> sqlx::Result<(Vec<(String, Standing)>, Instant)> {
    let mut transaction = connection.begin().await?;
    let looked = Instant::now();
    let rows = sqlx::query(server.table.sql(STILL_OURS)).bind(json).fetch_all(&mut *transaction).await?;
    transaction.commit().await?;
    let standing = |row: &MySqlRow| {
        let standing = match (row.try_get(1)?, row.try_get(2)?) {
            (true, _) => Standing::StillOurs,
            (false, true) => Standing::Challenged,
            (false, false) => Standing::Busy,
        };
        Ok((row.try_get(0)?, standing))
    };
    Ok((rows.iter().map(standing).collect::<sqlx::Result<_>>()?, looked))
}

/// In as few messages as the server takes.
pub(super) async fn exchange(
    connection: &mut MySqlConnection,
    server: &Server,
    returns: &[Return],
    claims: &[Claim],
) -> sqlx::Result<Exchanged> {
    let names = returns.iter().map(|one| &one.name).chain(claims.iter().map(|claim| &claim.name));
    if names.map(in_json).sum::<usize>() <= server.longest_message {
        return exchange_part(connection, server, returns, claims).await;
    }
    let returns = parts(returns, server, |one| in_json(&one.name)).into_iter().map(|part| (part, &[][..]));
    let claims = parts(claims, server, |claim| in_json(&claim.name)).into_iter().map(|part| (&[][..], part));
    let mut all = Exchanged { returns: Vec::new(), grants: Vec::new(), calls: Vec::new() };
    for (returns, claims) in returns.chain(claims) {
        let is_first = all.returns.is_empty() && all.grants.is_empty();
        let part = exchange_part(connection, server, returns, claims).await;
        // What was done before stands.
        let part = if is_first { part? } else { part.map_err(outcome_unknown)? };
        all.returns.extend(part.returns);
        all.grants.extend(part.grants);
    }
    Ok(all)
}

async fn exchange_part(
    connection: &mut MySqlConnection,
    server: &Server,
    returns: &[Return],
    claims: &[Claim],
) -> sqlx::Result<Exchanged> {
    let asked = exchange_as_json(returns, claims);
    let owner = claims.first().map_or("".into(), |claim| server.storable(&claim.owner));
    // They are all of this process.
    let listener = Place::parts(returns.iter().find_map(|one| one.place.as_ref())).1;
    let rows = if server.is_mariadb {
        mariadb::exchange(connection, server, &asked, &owner, &listener, returns).await
    } else {
        in_transaction(connection, server, &asked, &owner, &listener).await
    };
    let rows = match rows {
        // One by one, the error is told to those whose it is.
        Err(error) if MySql::classify(&error) == Fault::Deadlock => {
            return Ok(Exchanged::nothing(returns, claims));
        }
        rows => rows?,
    };
    let mut found = HashMap::with_capacity(rows.len());
    for row in &rows {
        let (fencing_token, id) = (row.try_get(1)?, row.try_get(2)?);
        let grant = Grant { id, fencing_token, others_wait: row.try_get(4)?, numbers: row.try_get(5)? };
        let found = found.entry(row.try_get::<String, _>(0)?).or_insert((grant, false));
        // What was done was done, whatever became of it since.
        found.1 |= row.try_get::<bool, _>(3)?;
    }
    let standing = |one: &Return| match found.get(one.secret.as_str()) {
        Some((_, true)) => Standing::Ours,
        Some((_, false)) => Standing::Busy,
        None => Standing::NotOurs,
    };
    let grant =
        |claim: &Claim| found.get(claim.secret.as_str()).and_then(|(grant, done)| done.then_some(*grant));
    Ok(Exchanged {
        returns: returns.iter().map(standing).collect(),
        grants: claims.iter().map(grant).collect(),
        calls: Vec::new(),
    })
}

async fn in_transaction(
    connection: &mut MySqlConnection,
    server: &Server,
    asked: &str,
    owner: &str,
    listener: &str,
) -> sqlx::Result<Vec<MySqlRow>> {
    let owner = literal(owner);
    // As text, so that all of it goes in one message, and the server comes to the COMMIT whatever becomes of us. Nothing in
    // it needs to be escaped.
    let sql = format!(
        "SET @lock_db_asked = '{asked}', @lock_db_owner = CONVERT({owner} USING utf8mb4),
            @lock_db_listener = '{listener}';
        START TRANSACTION; EXECUTE lock_db_exchange; EXECUTE lock_db_exchanged; COMMIT"
    );
    match all_or_nothing(connection, &sql).await {
        Err(error) if number(&error) == Some(UNKNOWN_STATEMENT) => {
            // The first time on this connection: to be parsed once, which takes as long as to carry it out.
            let quoted = |sql: &'static str| server.table.sql(sql).0.replace('\'', "''");
            let (exchange, exchanged) = (quoted(EXCHANGE), quoted(EXCHANGED));
            let prepare = format!(
                "PREPARE lock_db_exchange FROM '{exchange}'; PREPARE lock_db_exchanged FROM '{exchanged}'"
            );
            sqlx::raw_sql(AssertSqlSafe(prepare)).execute(&mut *connection).await?;
            all_or_nothing(connection, &sql).await
        }
        rows => rows,
    }
}

async fn all_or_nothing(connection: &mut MySqlConnection, sql: &str) -> sqlx::Result<Vec<MySqlRow>> {
    let rows = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).fetch_all(&mut *connection).await;
    if rows.is_err() {
        sqlx::raw_sql("ROLLBACK").execute(connection).await?;
    }
    rows
}

/// `[["6e616d65", "secret", 30000000, "place"], …]`, with a `ttl` of zero for what is given back.
pub(super) fn exchange_as_json(returns: &[Return], claims: &[Claim]) -> String {
    let returns =
        returns.iter().map(|one| (&one.name, &one.secret, 0, one.place.as_ref().map(|place| &place.secret)));
    let claims =
        claims.iter().map(|claim| (&claim.name, &claim.secret, micros(claim.ttl), claim.place.as_ref()));
    let mut json = String::from("[");
    for (position, (name, secret, ttl, place)) in returns.chain(claims).enumerate() {
        let (comma, place) = (if position > 0 { "," } else { "" }, place.map_or("", Secret::as_str));
        let (name, secret) = (hexadecimal(name), secret.as_str());
        let _infallible = write!(json, "{comma}[\"{name}\",\"{secret}\",{ttl},\"{place}\"]");
    }
    json.push(']');
    json
}
