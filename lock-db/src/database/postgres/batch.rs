//! Statements for many leases at once, on private connections.
//!
//! Arrays are in a SELECT of their own, where the planner does not see their length. Otherwise the
//! planner replans short arrays on every execution, which costs more than running the statement.

use std::collections::{HashMap, HashSet};

use std::time::Instant;

use sqlx::postgres::{PgConnection, PgRow};
use sqlx::{Connection, Postgres, Row};

use super::is_plain;
use super::lease::made_or_not;
use crate::database::StepError;
use crate::database::driver;
use crate::database::driver::SessionDriver;
use crate::database::wait_queue::key;
use crate::database::{
    BatchOutcome, Claim, Grant, LeaseStatus, Notification, QueueEntry, ReleaseClaim, Renewal, Renewed,
    Server, in_order,
};
use crate::options::micros;

/// Never brings a released lease back (1970). A deadline moves backwards only if it is too far
/// ahead, by more than 2 s, because the clock was set back.
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

/// Which leases are ours, and whether a takeover has given notice. Runs in a transaction of its own
/// (see `renew`). Otherwise a proxy that spreads reads over replicas could answer it with an old
/// row.
const STILL_OURS: &str = "
SELECT lease.secret_key::text, lease.ttl_micros <= 0
FROM unnest($1::bigint[], $2::text[], $3::bigint[]) AS asked (id, secret_key, fencing_token)
JOIN {table} AS lease ON lease.id = asked.id
    AND lease.secret_key = asked.secret_key AND lease.fencing_token = asked.fencing_token
WHERE lease.expire_time > '1970-01-01 00:00:00+00'";

/// `RELEASE` for many leases at once. Like `RELEASE`, it does not wait for the disk.
macro_rules! releases {
    ($found:ident) => {
        concat!(
            r#"
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE {table} AS lease
SET expire_time = '1970-01-01 00:00:00+00',
    ttl_micros = 0,
    waiters = "#, behind_others!("lease.waiters", "unlocked.queue_key", "$4"), r#"
FROM unsynced, (
    SELECT lease.ctid, asked.queue_key
    FROM unnest((SELECT $1::text[]), (SELECT $2::text[]), (SELECT $3::text[])) AS asked (lock_name, secret_key, queue_key)
    "#,
            the_row!($found),
            r#" AND lease.secret_key = asked.secret_key
    FOR UPDATE OF lease SKIP LOCKED) AS unlocked
WHERE lease.ctid = unlocked.ctid
RETURNING lease.secret_key::text, lease.id, "#, first_listener!("lease.waiters")
        )
    };
}
const RELEASES: &str = releases!(from_behind);
const MANY_RELEASES: &str = releases!(plainly);

/// `RELEASE_UNDER_GUARD` for many leases at once: those that `RELEASES` skipped.
const RELEASES_UNDER_GUARD: &str = concat!(
    r#"
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
UPDATE {table} AS lease
SET expire_time = '1970-01-01 00:00:00+00',
    waiters = "#,
    behind_others!("lease.waiters", "unlocked.queue_key", "$4"),
    r#"
FROM unsynced, (
    SELECT lease.id, asked.queue_key
    FROM unnest((SELECT $1::text[]), (SELECT $2::text[]), (SELECT $3::text[])) AS asked (lock_name, secret_key, queue_key)
    JOIN {table} AS lease
        ON lease.lock_name = asked.lock_name COLLATE "C" AND lease.secret_key = asked.secret_key
    FOR NO KEY UPDATE OF lease SKIP LOCKED) AS unlocked
WHERE lease.id = unlocked.id
RETURNING lease.secret_key::text, lease.id, "#,
    first_listener!("lease.waiters")
);

/// `RELEASE` (entries without a `ttl`) and `ACQUIRE` for many leases at once, in one statement and
/// one commit.
///
/// With `from_behind`, the names are not compared again. Otherwise the planner may join by name,
/// and read all versions.
///
/// The UPDATE finds the rows by table and `ctid`: no other transaction can move a row that is
/// locked here. A row that was changed between the statement's snapshot and the lock is not found,
/// and is skipped like a locked row.
///
/// With `$7` the commit does not wait for the disk.
///
/// The clock is read once, after the snapshot. Every grant that the snapshot shows is older, so the
/// new token is still larger.
macro_rules! batch_many {
    ($found:ident) => {
        concat!(
            r#"
WITH deferred AS MATERIALIZED (SELECT CASE WHEN $7 THEN set_config('synchronous_commit', 'off', true) END)
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
    waiters = CASE WHEN unlocked.ttl IS NULL THEN "#, behind_others!("lease.waiters", "unlocked.queue_key", "$6"), r#"
        ELSE "#, without_own_first!("lease.waiters", "unlocked.queue_key"), r#" END
FROM deferred, (
    SELECT lease.tableoid, lease.ctid, asked.secret_key, asked.ttl, asked.queue_key,
        asked.ttl IS NOT NULL AND lease.secret_key <> asked.secret_key AS is_taken
    FROM unnest((SELECT $1::text[]), (SELECT $2::text[]), (SELECT $3::bigint[]), (SELECT $4::text[]))
        AS asked (lock_name, secret_key, ttl, queue_key)
    "#,
            the_row!($found),
            r#"
    WHERE lease.secret_key = asked.secret_key
        OR (asked.ttl IS NOT NULL AND lease.expire_time <= (SELECT clock_timestamp())
            AND (lease.ttl_micros <= 0 OR lease.expire_time = '1970-01-01 00:00:00+00')
            AND (lease.waiters = '' OR asked.queue_key IS NULL OR "#, is_first!("lease.waiters", "asked.queue_key"), r#")
            AND lease.lock_kind = 'insert')
    FOR UPDATE OF lease SKIP LOCKED) AS unlocked
WHERE lease.ctid = unlocked.ctid AND lease.tableoid = unlocked.tableoid
RETURNING lease.secret_key::text, lease.id, CASE WHEN unlocked.ttl IS NULL THEN "#, first_listener!("lease.waiters"), r#" END,
    lease.fencing_token, lease.waiters <> '', lease.fencing_token - lease.previous_token"#
        )
    };
}
const BATCH: &str = batch_many!(from_behind);
const BATCH_MANY: &str = batch_many!(plainly);

/// `BATCH`, which also makes the rows, granted, of those new names that ask for it (`$8`): see
/// `ACQUIRE_OR_MAKE`. They are made in the order in which every process makes them, so that two
/// processes don't wait for each other.
macro_rules! batch_or_make {
    ($found:ident) => {
        concat!(
            r#"
WITH bound AS MATERIALIZED (
    SELECT set_config('lock_timeout', '5ms', true),
        CASE WHEN $7 THEN set_config('synchronous_commit', 'off', true) END),
taken (secret_key, id, listener, fencing_token, others_wait, tokens) AS ("#,
            batch_many!($found),
            r#"),
made AS (
    INSERT INTO {table} AS lease
        (lock_name, secret_key, owner, fencing_token, acquire_time, expire_time, ttl_micros)
    SELECT asked.lock_name, asked.secret_key, $5,
        (SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint), (SELECT clock_timestamp()),
        (SELECT clock_timestamp()) + asked.ttl * interval '1 microsecond', asked.ttl
    FROM bound,
        unnest((SELECT $1::text[]), (SELECT $2::text[]), (SELECT $3::bigint[]), (SELECT $8::bool[]))
            AS asked (lock_name, secret_key, ttl, makes_row)
    WHERE asked.makes_row AND "#,
            newest!("asked.lock_name COLLATE \"C\""),
            r#" IS NULL
    ORDER BY asked.lock_name COLLATE "C"
    ON CONFLICT (lock_name) DO NOTHING
    RETURNING lease.secret_key::text, lease.id, NULL::text, lease.fencing_token, FALSE, lease.fencing_token)
SELECT * FROM taken UNION ALL SELECT * FROM made"#
        )
    };
}
const BATCH_OR_MAKE: &str = batch_or_make!(from_behind);
const BATCH_MANY_OR_MAKE: &str = batch_or_make!(plainly);

const WHICH_ARE_OURS: &str = r#"
SELECT lease.secret_key::text
FROM unnest($1::text[], $2::text[]) AS asked (lock_name, secret_key)
JOIN {table} AS lease
    ON lease.lock_name = asked.lock_name COLLATE "C" AND lease.secret_key = asked.secret_key"#;

pub(super) async fn renew(
    connection: &mut PgConnection,
    server: &Server,
    leases: &[Renewal],
) -> driver::Result<Renewed> {
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
    let (mut found, mut read_at) = (Vec::with_capacity(leases.len()), None);
    if renewed.len() < leases.len() {
        let mut transaction = connection.begin_with(Postgres::BEGIN_SHORT).await?;
        read_at = Some(Instant::now());
        let query = sqlx::query(server.table.sql(STILL_OURS)).bind(&ids).bind(&secrets).bind(&tokens);
        for row in query.fetch_all(&mut *transaction).await? {
            let status = if row.try_get(1)? { LeaseStatus::Challenged } else { LeaseStatus::Busy };
            found.push((row.try_get(0)?, status));
        }
        transaction.commit().await?;
    }
    // Renewed leases come last, so that their result counts.
    found.extend(renewed.into_iter().map(|secret| (secret, LeaseStatus::Ours)));
    Ok(in_order(leases, found, read_at))
}

pub(super) async fn batch(
    connection: &mut PgConnection,
    server: &Server,
    releases: &[ReleaseClaim],
    claims: &[Claim],
    is_deferred: bool,
) -> driver::Result<BatchOutcome> {
    let mut done = Done::default();
    // All entries are of this process, so they differ only in their times.
    let rest = QueueEntry::parts(releases.iter().find_map(|one| one.entry.as_ref())).1;
    let all: Vec<&ReleaseClaim> = releases.iter().collect();
    let plainly = is_plain(server, releases.len() + claims.len());
    if claims.is_empty() {
        let statement = if plainly { MANY_RELEASES } else { RELEASES };
        done.note(&release_in_background(connection, server, statement, &all, &rest).await?)?;
    } else {
        let released = releases
            .iter()
            .map(|one| (&one.name, &one.secret, None, one.entry.as_ref().map(|entry| &entry.secret)));
        let claimed = claims
            .iter()
            .map(|claim| (&claim.name, &claim.secret, Some(micros(claim.ttl)), claim.entry.as_ref()));
        let (mut names, mut secrets, mut ttls, mut keys) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (name, secret, ttl, entry) in released.chain(claimed) {
            names.push(&**name);
            secrets.push(secret.as_str());
            ttls.push(ttl);
            keys.push(entry.map(key));
        }
        let owner = claims.first().map_or("".into(), |claim| server.storable(&claim.owner));
        let query = |statement| {
            let query = sqlx::query(server.table.sql(statement)).bind(&names).bind(&secrets);
            query.bind(&ttls).bind(&keys).bind(&owner).bind(&rest).bind(is_deferred)
        };
        let without_making = || query(if plainly { BATCH_MANY } else { BATCH });
        let makes: Vec<bool> =
            releases.iter().map(|_| false).chain(claims.iter().map(|claim| claim.makes_row)).collect();
        let rows = if makes.contains(&true) {
            let making = query(if plainly { BATCH_MANY_OR_MAKE } else { BATCH_OR_MAKE }).bind(makes);
            match making.fetch_all(&mut *connection).await {
                Ok(rows) => rows,
                // An open transaction has made one of the rows. The others don't wait for it.
                Err(error) => {
                    made_or_not(connection, server, error).await?;
                    without_making().fetch_all(&mut *connection).await?
                }
            }
        } else {
            without_making().fetch_all(&mut *connection).await?
        };
        done.note(&rows)?;
        for row in &rows {
            done.grants.insert(row.try_get(0)?, granted(row)?);
        }
    }
    let mut skipped = done.rest(all);
    let mut ours = HashSet::new();
    if !skipped.is_empty() {
        // The statement above is already committed.
        let rows = release_in_background(connection, server, RELEASES_UNDER_GUARD, &skipped, &rest).await;
        done.note(&rows.map_err(StepError::outcome_unknown)?)?;
        skipped = done.rest(skipped);
    }
    if !skipped.is_empty() {
        let (names, secrets) = names_and_secrets(&skipped);
        let query = sqlx::query_scalar(server.table.sql(WHICH_ARE_OURS)).bind(names).bind(secrets);
        let found: Vec<String> = query.fetch_all(connection).await.map_err(StepError::outcome_unknown)?;
        ours = found.into_iter().collect();
    }
    let status = |one: &ReleaseClaim| match one.secret.as_str() {
        secret if done.secrets.contains(secret) => LeaseStatus::Ours,
        secret if ours.contains(secret) => LeaseStatus::Busy,
        _ => LeaseStatus::NotOurs,
    };
    Ok(BatchOutcome {
        releases: releases.iter().map(status).collect(),
        grants: claims.iter().map(|claim| done.grants.get(claim.secret.as_str()).copied()).collect(),
        notifications: done.notifications,
    })
}

/// What `batch` has done so far.
#[derive(Default)]
struct Done {
    secrets: HashSet<String>,
    grants: HashMap<String, Grant>,
    notifications: Vec<Notification>,
}

impl Done {
    fn note(&mut self, rows: &[PgRow]) -> driver::Result<()> {
        for row in rows {
            self.secrets.insert(row.try_get(0)?);
            self.notifications.extend(Notification::parse(row.try_get(2)?, row.try_get(1)?));
        }
        Ok(())
    }

    fn rest<'a>(&self, mut releases: Vec<&'a ReleaseClaim>) -> Vec<&'a ReleaseClaim> {
        releases.retain(|one| !self.secrets.contains(one.secret.as_str()));
        releases
    }
}

async fn release_in_background(
    connection: &mut PgConnection,
    server: &Server,
    statement: &'static str,
    releases: &[&ReleaseClaim],
    rest: &str,
) -> driver::Result<Vec<PgRow>> {
    let (names, secrets) = names_and_secrets(releases);
    let keys = releases.iter().map(|one| one.entry.as_ref().map(|entry| key(&entry.secret)));
    let query = sqlx::query(server.table.sql(statement)).bind(names).bind(secrets);
    Ok(query.bind(keys.collect::<Vec<_>>()).bind(rest).fetch_all(connection).await?)
}

fn names_and_secrets<'a>(releases: &[&'a ReleaseClaim]) -> (Vec<&'a str>, Vec<&'a str>) {
    releases.iter().map(|one| (&*one.name, one.secret.as_str())).unzip()
}

fn granted(row: &PgRow) -> driver::Result<Grant> {
    let (fencing_token, id) = (row.try_get(3)?, row.try_get(1)?);
    Ok(Grant { id, fencing_token, others_wait: row.try_get(4)?, tokens: row.try_get(5)? })
}
