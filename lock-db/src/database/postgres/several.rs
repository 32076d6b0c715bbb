//! Several leases for one caller: each step is one statement, whatever the number of names.

use std::collections::{HashMap, HashSet};

use sqlx::Row;
use sqlx::postgres::{PgConnection, PgRow};

use super::lease::{CREATE_ALL, READ_ALL, created_or_not};
use crate::Kind;
use crate::database::driver;
use crate::database::row;
use crate::database::{Claim, Grant, LockRow, Server, by_name};
use crate::name::Name;
use crate::options::micros;

/// `ACQUIRE` for all or none of several names, which have no queue entries. The rows are locked and
/// counted first, and written only if all of them were locked.
///
/// A row that was changed between the statement's snapshot and the lock is written in its current
/// version: it is found by its id, not by its `ctid`.
const ACQUIRE_ALL: &str = r#"
WITH unlocked AS MATERIALIZED (
    SELECT lease.id, asked.secret_key
    FROM unnest((SELECT $1::text[]), (SELECT $2::text[])) AS asked (lock_name, secret_key)
    JOIN {table} AS lease ON lease.lock_name = asked.lock_name COLLATE "C"
    WHERE lease.lock_kind = 'insert' AND (lease.secret_key = asked.secret_key
        OR (lease.expire_time <= clock_timestamp()
            AND (lease.ttl_micros <= 0 OR lease.expire_time = '1970-01-01 00:00:00+00')))
    FOR UPDATE OF lease SKIP LOCKED)
UPDATE {table} AS lease
SET fencing_token = CASE WHEN lease.secret_key = unlocked.secret_key THEN lease.fencing_token
        ELSE GREATEST(lease.fencing_token + 1, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint) END,
    previous_token = CASE WHEN lease.secret_key = unlocked.secret_key THEN lease.previous_token
        ELSE lease.fencing_token END,
    acquire_time = CASE WHEN lease.secret_key = unlocked.secret_key THEN lease.acquire_time
        ELSE clock_timestamp() END,
    expire_time = clock_timestamp() + $4::bigint * interval '1 microsecond',
    ttl_micros = $4,
    secret_key = unlocked.secret_key,
    owner = $3
FROM unlocked
WHERE lease.id = unlocked.id AND (SELECT count(*) FROM unlocked) = $5
RETURNING lease.secret_key::text, lease.id, lease.fencing_token, lease.waiters <> '',
    lease.fencing_token - lease.previous_token"#;

const UNLOCKED: &str = "SELECT lock_name::text FROM {table} WHERE lock_name = ANY($1) FOR UPDATE SKIP LOCKED";

pub(super) async fn read(
    connection: &mut PgConnection,
    server: &Server,
    names: &[Name],
) -> driver::Result<Vec<Option<LockRow>>> {
    let rows = sqlx::query(server.table.sql(READ_ALL)).bind(texts(names)).fetch_all(connection).await?;
    let found = |row: &PgRow| Ok((row.try_get::<String, _>(row::COLUMNS)?.into_bytes(), row::lock_row(row)?));
    let found: Vec<_> = rows.iter().map(found).collect::<driver::Result<_>>()?;
    Ok(by_name(names, found))
}

pub(super) async fn create(
    connection: &mut PgConnection,
    server: &Server,
    names: &[Name],
    kind: Kind,
) -> driver::Result<bool> {
    let query = sqlx::query(server.table.sql(CREATE_ALL)).bind(texts(names)).bind(kind.as_str());
    let created = query.execute(&mut *connection).await;
    created_or_not(connection, server, created).await
}

pub(super) async fn acquire(
    connection: &mut PgConnection,
    server: &Server,
    claims: &[Claim],
) -> driver::Result<Vec<Option<Grant>>> {
    let Some(first) = claims.first() else { return Ok(Vec::new()) };
    let names: Vec<&str> = claims.iter().map(|claim| &*claim.name).collect();
    let secrets: Vec<&str> = claims.iter().map(|claim| claim.secret.as_str()).collect();
    let rows = sqlx::query(server.table.sql(ACQUIRE_ALL))
        .bind(names)
        .bind(&secrets)
        .bind(server.storable(&first.owner))
        .bind(micros(first.ttl))
        .bind(i64::try_from(claims.len()).unwrap_or(i64::MAX))
        .fetch_all(connection)
        .await?;
    let mut grants = HashMap::with_capacity(rows.len());
    for row in &rows {
        let grant = Grant {
            id: row.try_get(1)?,
            fencing_token: row.try_get(2)?,
            others_wait: row.try_get(3)?,
            tokens: row.try_get(4)?,
        };
        grants.insert(row.try_get::<&str, _>(0)?, grant);
    }
    Ok(secrets.iter().map(|secret| grants.get(secret).copied()).collect())
}

pub(super) async fn unlocked(
    connection: &mut PgConnection,
    server: &Server,
    names: &[Name],
) -> driver::Result<HashSet<String>> {
    let names: Vec<String> =
        sqlx::query_scalar(server.table.sql(UNLOCKED)).bind(texts(names)).fetch_all(connection).await?;
    Ok(names.into_iter().collect())
}

pub(super) fn texts(names: &[Name]) -> Vec<&str> {
    names.iter().map(|name| &**name).collect()
}
