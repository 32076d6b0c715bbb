//! Many leases at a time, on private connections.
//!
//! Arrays stand in a SELECT of their own, where the planner does not see how long they are. Else it finds that a plan for
//! a short one is worth to be made each time, which takes longer than the statement.

use std::collections::{HashMap, HashSet};

use std::time::Instant;

use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{Connection, Postgres, Row};

use crate::database::{
    Call, Claim, Exchanged, Grant, LockDatabase, Place, Renewal, Renewed, Return, Server, Standing, in_order,
    outcome_unknown,
};
use crate::limits::micros;
use crate::secret::Secret;

/// Never brings a released lease back (1970). A deadline moves backwards only when it lies further ahead than can be, because the
/// clock was set back: by more than 2 s.
const RENEW: &str = "
WITH unlocked AS MATERIALIZED (
    SELECT lease.id, asked.ttl
    FROM unnest((SELECT $1::bigint[]), (SELECT $2::text[]), (SELECT $3::bigint[]), (SELECT $4::bigint[]))
        AS asked (id, secret_key, fencing_token, ttl)
    JOIN {table} AS lease ON lease.id = asked.id
        AND lease.secret_key = asked.secret_key AND lease.fencing_token = asked.fencing_token
    WHERE lease.expire_time > '1970-01-01 00:00:00+00'
    FOR NO KEY UPDATE OF lease SKIP LOCKED)
UPDATE {table} AS lease
SET expire_time = LEAST(
        GREATEST(lease.expire_time, clock_timestamp() + unlocked.ttl * interval '1 microsecond'),
        clock_timestamp() + (unlocked.ttl + 2000000) * interval '1 microsecond'),
    ttl_micros = unlocked.ttl
FROM unlocked WHERE lease.id = unlocked.id
RETURNING lease.secret_key::text";

/// Which leases are ours, and whether notice was given of a takeover. In a transaction of its own (see `renew`), because what
/// spreads reads over replicas must not answer it by an old one.
const STILL_OURS: &str = "
SELECT lease.secret_key::text, lease.ttl_micros <= 0
FROM unnest($1::bigint[], $2::text[], $3::bigint[]) AS asked (id, secret_key, fencing_token)
JOIN {table} AS lease ON lease.id = asked.id
    AND lease.secret_key = asked.secret_key AND lease.fencing_token = asked.fencing_token
WHERE lease.expire_time > '1970-01-01 00:00:00+00'";

/// How the rows of the names are found. By `newest!`; or plainly, which takes two thirds of the time for one row, and for a hot one
/// many times of it while an old snapshot keeps its versions.
macro_rules! the_row {
    (from_behind) => {
        concat!(
            "CROSS JOIN LATERAL ",
            newest!("asked.lock_name COLLATE \"C\""),
            " AS newest JOIN {table} AS lease ON lease.ctid = newest.ctid"
        )
    };
    (plainly) => {
        "JOIN {table} AS lease ON lease.lock_name = asked.lock_name COLLATE \"C\""
    };
}

/// From so many names on, the rows are found plainly: with fewer of them, one that is hot would be felt.
const MANY: usize = 16;

/// `RELEASE` for many at once, and like it not waiting for the disk.
macro_rules! return_many {
    ($found:ident) => {
        concat!(
            r#"
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE {table} AS lease
SET expire_time = '1970-01-01 00:00:00+00',
    ttl_micros = 0,
    waiters = CASE WHEN lease.waiters <> '' AND length(lease.waiters) < 3584
            AND position(unlocked.place IN lease.waiters) = 0
        THEN lease.waiters || unlocked.place || lpad(((extract(epoch FROM clock_timestamp()) * 1000000)::bigint + 2000000)::text, 16, '0') || $4
        ELSE lease.waiters END
FROM unsynced, (
    SELECT lease.ctid, asked.place
    FROM unnest((SELECT $1::text[]), (SELECT $2::text[]), (SELECT $3::text[])) AS asked (lock_name, secret_key, place)
    "#,
            the_row!($found),
            r#" AND lease.secret_key = asked.secret_key
    FOR UPDATE OF lease SKIP LOCKED) AS unlocked
WHERE lease.ctid = unlocked.ctid
RETURNING lease.secret_key::text, lease.id, substr(lease.waiters, 49, 8)"#
        )
    };
}
const RETURN: &str = return_many!(from_behind);
const RETURN_MANY: &str = return_many!(plainly);

/// `RELEASE_UNDER_GUARD` for many at once: those that `RETURN` passed over.
const RETURN_UNDER_GUARD: &str = r#"
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE {table} AS lease
SET expire_time = '1970-01-01 00:00:00+00',
    waiters = CASE WHEN lease.waiters <> '' AND length(lease.waiters) < 3584
            AND position(unlocked.place IN lease.waiters) = 0
        THEN lease.waiters || unlocked.place || lpad(((extract(epoch FROM clock_timestamp()) * 1000000)::bigint + 2000000)::text, 16, '0') || $4
        ELSE lease.waiters END
FROM unsynced, (
    SELECT lease.id, asked.place
    FROM unnest((SELECT $1::text[]), (SELECT $2::text[]), (SELECT $3::text[])) AS asked (lock_name, secret_key, place)
    JOIN {table} AS lease
        ON lease.lock_name = asked.lock_name COLLATE "C" AND lease.secret_key = asked.secret_key
    FOR NO KEY UPDATE OF lease SKIP LOCKED) AS unlocked
WHERE lease.id = unlocked.id
RETURNING lease.secret_key::text, lease.id, substr(lease.waiters, 49, 8)"#;

/// `RELEASE` (those without a `ttl`) and `ACQUIRE` for many at once, in one statement and one commit.
///
/// Where rows are found from behind, the names are not compared again: else the planner may join by them, and read all versions.
///
/// Rows are found again by their `ctid` in their table: nothing else can move a row that is locked here. One that was changed between
/// the statement's snapshot and the lock is not found, and so passed over like one that is locked.
///
/// The clock is read once, after the snapshot: what is seen there was granted before, so a new number is larger all the same.
macro_rules! exchange_many {
    ($found:ident) => {
        concat!(
            r#"
UPDATE {table} AS lease
SET fencing_token = CASE WHEN unlocked.is_taken
        THEN GREATEST(lease.fencing_token + 1, (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint))
        ELSE lease.fencing_token END,
    previous_token = CASE WHEN unlocked.is_taken THEN lease.fencing_token ELSE lease.previous_token END,
    acquire_time = CASE WHEN unlocked.is_taken THEN (SELECT clock_timestamp()) ELSE lease.acquire_time END,
    expire_time = CASE WHEN unlocked.ttl IS NULL THEN '1970-01-01 00:00:00+00'
        ELSE (SELECT clock_timestamp()) + unlocked.ttl * interval '1 microsecond' END,
    ttl_micros = COALESCE(unlocked.ttl, 0),
    secret_key = unlocked.secret_key,
    owner = CASE WHEN unlocked.ttl IS NULL THEN lease.owner ELSE $5 END,
    waiters = CASE WHEN lease.waiters = '' THEN ''
        WHEN unlocked.ttl IS NOT NULL AND left(lease.waiters, 32) = unlocked.place THEN substr(lease.waiters, 57)
        WHEN unlocked.ttl IS NULL AND length(lease.waiters) < 3584 AND position(unlocked.place IN lease.waiters) = 0
        THEN lease.waiters || unlocked.place || lpad(((extract(epoch FROM clock_timestamp()) * 1000000)::bigint + 2000000)::text, 16, '0') || $6
        ELSE lease.waiters END
FROM (
    SELECT lease.tableoid, lease.ctid, asked.secret_key, asked.ttl, asked.place,
        asked.ttl IS NOT NULL AND lease.secret_key <> asked.secret_key AS is_taken
    FROM unnest((SELECT $1::text[]), (SELECT $2::text[]), (SELECT $3::bigint[]), (SELECT $4::text[]))
        AS asked (lock_name, secret_key, ttl, place)
    "#,
            the_row!($found),
            r#"
    WHERE lease.secret_key = asked.secret_key
        OR (asked.ttl IS NOT NULL AND lease.expire_time <= (SELECT clock_timestamp())
            AND (lease.ttl_micros <= 0 OR lease.expire_time = '1970-01-01 00:00:00+00')
            AND (lease.waiters = '' OR asked.place IS NULL OR left(lease.waiters, 32) = asked.place)
            AND lease.lock_kind = 'insert')
    FOR UPDATE OF lease SKIP LOCKED) AS unlocked
WHERE lease.ctid = unlocked.ctid AND lease.tableoid = unlocked.tableoid
RETURNING lease.secret_key::text, lease.id, CASE WHEN unlocked.ttl IS NULL THEN substr(lease.waiters, 49, 8) END,
    lease.fencing_token, lease.waiters <> '', lease.fencing_token - lease.previous_token"#
        )
    };
}
const EXCHANGE: &str = exchange_many!(from_behind);
const EXCHANGE_MANY: &str = exchange_many!(plainly);

const WHICH_ARE_OURS: &str = r#"
SELECT lease.secret_key::text
FROM unnest($1::text[], $2::text[]) AS asked (lock_name, secret_key)
JOIN {table} AS lease
    ON lease.lock_name = asked.lock_name COLLATE "C" AND lease.secret_key = asked.secret_key"#;

pub(super) async fn renew(
    connection: &mut PgConnection,
    server: &Server,
    leases: &[Renewal],
) -> sqlx::Result<Renewed> {
    let ids: Vec<i64> = leases.iter().map(|lease| lease.id).collect();
    let secrets: Vec<&str> = leases.iter().map(|lease| lease.secret.as_str()).collect();
    let tokens: Vec<i64> = leases.iter().map(|lease| lease.fencing_token).collect();
    let ttls: Vec<i64> = leases.iter().map(|lease| micros(lease.ttl)).collect();
    let renewed: Vec<String> = sqlx::query_scalar(server.table.sql(RENEW))
        .bind(&ids)
        .bind(&secrets)
        .bind(&tokens)
        .bind(ttls)
        .fetch_all(&mut *connection)
        .await?;
    let (mut found, mut looked) = (Vec::with_capacity(leases.len()), None);
    if renewed.len() < leases.len() {
        let mut transaction = connection.begin_with(Postgres::BEGIN_SHORT).await?;
        looked = Some(Instant::now());
        let query = sqlx::query(server.table.sql(STILL_OURS)).bind(&ids).bind(&secrets).bind(&tokens);
        for row in query.fetch_all(&mut *transaction).await? {
            let standing = if row.try_get(1)? { Standing::Challenged } else { Standing::Busy };
            found.push((row.try_get(0)?, standing));
        }
        transaction.commit().await?;
    }
    // Those that were renewed last: they count.
    found.extend(renewed.into_iter().map(|secret| (secret, Standing::Ours)));
    Ok(in_order(leases, found, looked))
}

pub(super) async fn exchange(
    connection: &mut PgConnection,
    server: &Server,
    returns: &[Return],
    claims: &[Claim],
) -> sqlx::Result<Exchanged> {
    let mut done = Done::default();
    // They are all of this process.
    let listener = Place::parts(returns.iter().find_map(|one| one.place.as_ref())).1;
    let all: Vec<&Return> = returns.iter().collect();
    let plainly = returns.len() + claims.len() >= MANY && !server.table.has_old_versions();
    if claims.is_empty() {
        let statement = if plainly { RETURN_MANY } else { RETURN };
        done.note(&give_back(connection, server, statement, &all, &listener).await?)?;
    } else {
        let returned = returns
            .iter()
            .map(|one| (&one.name, &one.secret, None, one.place.as_ref().map(|place| &place.secret)));
        let claimed = claims
            .iter()
            .map(|claim| (&claim.name, &claim.secret, Some(micros(claim.ttl)), claim.place.as_ref()));
        let (mut names, mut secrets, mut ttls, mut places) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (name, secret, ttl, place) in returned.chain(claimed) {
            names.push(&**name);
            secrets.push(secret.as_str());
            ttls.push(ttl);
            places.push(place.map(Secret::as_str));
        }
        let rows = sqlx::query(server.table.sql(if plainly { EXCHANGE_MANY } else { EXCHANGE }))
            .bind(names)
            .bind(secrets)
            .bind(ttls)
            .bind(places)
            .bind(claims.first().map_or("".into(), |claim| server.storable(&claim.owner)))
            .bind(&listener)
            .fetch_all(&mut *connection)
            .await?;
        done.note(&rows)?;
        for row in &rows {
            done.grants.insert(row.try_get(0)?, granted(row)?);
        }
    }
    let mut passed_over = done.rest(all);
    let mut ours = HashSet::new();
    if !passed_over.is_empty() {
        // What was found above stands already.
        let rows = give_back(connection, server, RETURN_UNDER_GUARD, &passed_over, &listener).await;
        done.note(&rows.map_err(outcome_unknown)?)?;
        passed_over = done.rest(passed_over);
    }
    if !passed_over.is_empty() {
        let (names, secrets) = names_and_secrets(&passed_over);
        let query = sqlx::query_scalar(server.table.sql(WHICH_ARE_OURS)).bind(names).bind(secrets);
        let found: Vec<String> = query.fetch_all(connection).await.map_err(outcome_unknown)?;
        ours = found.into_iter().collect();
    }
    let standing = |one: &Return| match one.secret.as_str() {
        secret if done.secrets.contains(secret) => Standing::Ours,
        secret if ours.contains(secret) => Standing::Busy,
        _ => Standing::NotOurs,
    };
    Ok(Exchanged {
        returns: returns.iter().map(standing).collect(),
        grants: claims.iter().map(|claim| done.grants.get(claim.secret.as_str()).copied()).collect(),
        calls: done.calls,
    })
}

/// What `exchange` has done so far.
#[derive(Default)]
struct Done {
    secrets: HashSet<String>,
    grants: HashMap<String, Grant>,
    calls: Vec<Call>,
}

impl Done {
    fn note(&mut self, rows: &[PgRow]) -> sqlx::Result<()> {
        for row in rows {
            self.secrets.insert(row.try_get(0)?);
            self.calls.extend(Call::parse(row.try_get(2)?, row.try_get(1)?));
        }
        Ok(())
    }

    fn rest<'a>(&self, mut returns: Vec<&'a Return>) -> Vec<&'a Return> {
        returns.retain(|one| !self.secrets.contains(one.secret.as_str()));
        returns
    }
}

async fn give_back(
    connection: &mut PgConnection,
    server: &Server,
    statement: &'static str,
    returns: &[&Return],
    listener: &str,
) -> sqlx::Result<Vec<PgRow>> {
    let (names, secrets) = names_and_secrets(returns);
    let places = returns.iter().map(|one| one.place.as_ref().map(|place| place.secret.as_str()));
    let query = sqlx::query(server.table.sql(statement)).bind(names).bind(secrets);
    query.bind(places.collect::<Vec<_>>()).bind(listener).fetch_all(connection).await
}

fn names_and_secrets<'a>(returns: &[&'a Return]) -> (Vec<&'a str>, Vec<&'a str>) {
    returns.iter().map(|one| (&*one.name, one.secret.as_str())).unzip()
}

fn granted(row: &PgRow) -> sqlx::Result<Grant> {
    let (fencing_token, id) = (row.try_get(3)?, row.try_get(1)?);
    Ok(Grant { id, fencing_token, others_wait: row.try_get(4)?, numbers: row.try_get(5)? })
}
