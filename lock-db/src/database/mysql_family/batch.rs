//! Statements for many leases at once, on private connections: what MySQL and MariaDB share.

use std::collections::HashMap;
use std::fmt::Write as _;

use std::time::Instant;

use sqlx::mysql::{MySqlConnection, MySqlRow};
use sqlx::{Connection, MySql, Row};

use super::lease::has_no_id;
use super::several::in_json;
use super::{literal, parts};
use crate::database::StepError;
use crate::database::driver;
use crate::database::wait_queue::key;
use crate::database::{
    BatchOutcome, Claim, Cluster, Fault, Grant, LeaseStatus, QueueEntry, ReleaseClaim, Renewal, Renewed,
    Server, hexadecimal,
};
use crate::options::micros;

/// Which leases are ours, whether they were renewed a moment ago (their deadline is later than what
/// the holder will rely on), and whether a takeover has given notice.
const STILL_OURS: &str = "
SELECT lease.secret_key,
    TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), lease.expire_time) >= asked.ttl DIV 12 * 11, lease.ttl_micros <= 0
FROM JSON_TABLE(?, '$[*]' COLUMNS (
        id BIGINT PATH '$[0]', secret_key VARCHAR(32) CHARACTER SET ascii PATH '$[1]', ttl BIGINT PATH '$[2]',
        fencing_token BIGINT PATH '$[3]')) AS asked
STRAIGHT_JOIN {table} AS lease FORCE INDEX (PRIMARY) ON lease.id = asked.id
WHERE lease.secret_key = asked.secret_key AND lease.fencing_token = asked.fencing_token
    AND lease.expire_time > '1970-01-01 00:00:00'";

/// In bytes, as `as_json` writes it.
const LONGEST_RENEWAL: usize = 128;

/// Uses as few messages as the server allows.
pub(super) async fn renew(
    connection: &mut MySqlConnection,
    server: &Server,
    leases: &[Renewal],
) -> driver::Result<Renewed> {
    let mut all = Renewed { statuses: Vec::with_capacity(leases.len()), read_at: None };
    for part in parts(leases, server, |_| LONGEST_RENEWAL) {
        let Renewed { statuses, read_at } = in_dialect!(server, renew(connection, server, part))?;
        all.statuses.extend(statuses);
        // The earliest time, which is valid for all parts.
        all.read_at = all.read_at.or(read_at);
    }
    Ok(all)
}

/// Runs in a transaction of its own. Otherwise a proxy that spreads reads over replicas could
/// answer it with an old row. Also returns when it read.
pub(in crate::database) async fn still_ours(
    connection: &mut MySqlConnection,
    server: &Server,
    json: &str,
) -> driver::Result<(Vec<(String, LeaseStatus)>, Instant)> {
    let mut transaction = connection.begin().await?;
    let read_at = Instant::now();
    let rows = sqlx::query(server.table.sql(STILL_OURS)).bind(json).fetch_all(&mut *transaction).await?;
    transaction.commit().await?;
    let status = |row: &MySqlRow| {
        let status = match (row.try_get(1)?, row.try_get(2)?) {
            (true, _) => LeaseStatus::StillOurs,
            (false, true) => LeaseStatus::Challenged,
            (false, false) => LeaseStatus::Busy,
        };
        Ok((row.try_get(0)?, status))
    };
    Ok((rows.iter().map(status).collect::<driver::Result<_>>()?, read_at))
}

/// Uses as few messages as the server allows.
pub(super) async fn batch(
    connection: &mut MySqlConnection,
    server: &Server,
    releases: &[ReleaseClaim],
    claims: &[Claim],
) -> driver::Result<BatchOutcome> {
    let released = |one: &ReleaseClaim| in_json(&one.name);
    // The server gets the name of a new row in three forms, and some text for each.
    let claimed = |claim: &Claim| in_json(&claim.name) * if claim.makes_row { 4 } else { 1 };
    let bytes = releases.iter().map(released).chain(claims.iter().map(claimed)).sum::<usize>();
    if bytes <= server.longest_message {
        return batch_part(connection, server, releases, claims).await;
    }
    let releases = parts(releases, server, released).into_iter().map(|part| (part, &[][..]));
    let claims = parts(claims, server, claimed).into_iter().map(|part| (&[][..], part));
    let mut all = BatchOutcome { releases: Vec::new(), grants: Vec::new(), notifications: Vec::new() };
    for (releases, claims) in releases.chain(claims) {
        let is_first = all.releases.is_empty() && all.grants.is_empty();
        let part = batch_part(connection, server, releases, claims).await;
        // The earlier parts are already committed.
        let part = if is_first { part? } else { part.map_err(StepError::outcome_unknown)? };
        all.releases.extend(part.releases);
        all.grants.extend(part.grants);
    }
    Ok(all)
}

/// `acquire`, for a name whose row may be new.
pub(super) async fn acquire(
    connection: &mut MySqlConnection,
    server: &Server,
    claim: &Claim,
) -> driver::Result<Option<Grant>> {
    let mut makes_row = claim.makes_row && makes_rows(server);
    loop {
        let taken = if makes_row {
            in_dialect!(server, acquire_or_make(connection, server, claim))
        } else {
            in_dialect!(server, acquire(connection, server, claim))
        };
        match taken {
            Err(error) if makes_row && is_for_a_new_row(&error) => makes_row = false,
            taken => return taken,
        }
    }
}

pub(in crate::database) async fn batch_part(
    connection: &mut MySqlConnection,
    server: &Server,
    releases: &[ReleaseClaim],
    claims: &[Claim],
) -> driver::Result<BatchOutcome> {
    let owner = claims.first().map_or("".into(), |claim| server.storable(&claim.owner));
    // All entries are of this process, so they differ only in their times.
    let rest = QueueEntry::parts(releases.iter().find_map(|one| one.entry.as_ref())).1;
    let mut makes_rows = makes_rows(server) && claims.iter().any(|claim| claim.makes_row);
    let rows = loop {
        match in_dialect!(server, batch(connection, server, releases, claims, &owner, &rest, makes_rows)) {
            Err(error) if makes_rows && is_for_a_new_row(&error) => makes_rows = false,
            rows => break rows,
        }
    };
    let rows = match rows {
        // Callers then ask one by one, and the error goes to those that cause it.
        Err(error) if error.fault::<MySql>() == Fault::Deadlock => {
            return Ok(BatchOutcome::nothing(releases, claims));
        }
        rows => rows?,
    };
    let mut found = HashMap::with_capacity(rows.len());
    for row in &rows {
        let (fencing_token, id) = (row.try_get(1)?, row.try_get(2)?);
        let grant = Grant { id, fencing_token, others_wait: row.try_get(4)?, tokens: row.try_get(5)? };
        let found = found.entry(row.try_get::<String, _>(0)?).or_insert((grant, false));
        // What was done counts, whatever has happened to the lease since.
        found.1 |= row.try_get::<bool, _>(3)?;
    }
    let status = |one: &ReleaseClaim| match found.get(one.secret.as_str()) {
        Some((_, true)) => LeaseStatus::Ours,
        Some((_, false)) => LeaseStatus::Busy,
        None => LeaseStatus::NotOurs,
    };
    let grant =
        |claim: &Claim| found.get(claim.secret.as_str()).and_then(|(grant, done)| done.then_some(*grant));
    Ok(BatchOutcome {
        releases: releases.iter().map(status).collect(),
        grants: claims.iter().map(grant).collect(),
        notifications: Vec::new(),
    })
}

/// Whether a request should be sent again without making rows. Another transaction may make one of
/// them at this moment, and the others don't wait for it. If the ids are used up, the next attempt
/// reports that.
fn is_for_a_new_row(error: &StepError) -> bool {
    has_no_id(error) || matches!(error.fault::<MySql>(), Fault::Deadlock | Fault::Busy)
}

/// Whether rows can be made together with the grants. On a cluster, the write of another node could
/// end the transaction between the two, and no answer would tell.
pub(super) fn makes_rows(server: &Server) -> bool {
    server.cluster == Cluster::SinglePrimary
}

/// Encodes a batch as `[["6e616d65", "secret", 30000000, "key of the queue entry", 1], …]`. A release
/// has a `ttl` of zero. The last value is 1 if the row is made when there is none. Sorted by name,
/// so that every process makes rows in the same order.
pub(in crate::database) fn batch_as_json<'a>(
    releases: &[ReleaseClaim],
    claims: impl Iterator<Item = &'a Claim>,
) -> String {
    let released = releases
        .iter()
        .map(|one| (&one.name, &one.secret, 0, one.entry.as_ref().map(|entry| &entry.secret), false));
    let claimed = claims
        .map(|claim| (&claim.name, &claim.secret, micros(claim.ttl), claim.entry.as_ref(), claim.makes_row));
    let mut all: Vec<_> = released.chain(claimed).collect();
    all.sort_unstable_by_key(|(name, ..)| *name);
    let mut json = String::from("[");
    for (position, (name, secret, ttl, entry, makes_row)) in all.into_iter().enumerate() {
        let (comma, key) = (if position > 0 { "," } else { "" }, entry.map(key).unwrap_or_default());
        let (name, secret, makes_row) = (hexadecimal(name.as_bytes()), secret.as_str(), u8::from(makes_row));
        let _infallible = write!(json, "{comma}[\"{name}\",\"{secret}\",{ttl},\"{key}\",{makes_row}]");
    }
    json.push(']');
    json
}

/// The rows of a batch that may be new, as text for a statement: a list of their names, and the values of
/// `lock_name, secret_key, owner, ttl_micros, expire_time, fencing_token` for an INSERT, which are partly in
/// variables. Sorted by name, so that every process makes rows in the same order. The secrets are
/// text: hexadecimal digits would be bytes to a column of another character set.
pub(in crate::database) struct NewRows {
    pub(in crate::database) names: String,
    pub(in crate::database) values: String,
}

impl NewRows {
    pub(in crate::database) fn of(claims: &[Claim]) -> Self {
        let mut new: Vec<&Claim> = claims.iter().filter(|claim| claim.makes_row).collect();
        new.sort_unstable_by(|one, other| one.name.cmp(&other.name));
        let (mut names, mut values) = (String::from("("), String::new());
        for (position, claim) in new.into_iter().enumerate() {
            let (name, secret, ttl) = (literal(&claim.name), claim.secret.as_str(), micros(claim.ttl));
            let comma = if position > 0 { "," } else { "" };
            let _infallible = write!(names, "{comma}{name}");
            let _infallible = write!(
                values,
                "{comma}({name},'{secret}',@lock_db_owner,{ttl},TIMESTAMPADD(MICROSECOND,{ttl},@lock_db_now),@lock_db_token)"
            );
        }
        names.push(')');
        Self { names, values }
    }
}
