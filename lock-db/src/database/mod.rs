//! The database side of lock-db: the trait [`LockDatabase`], implemented once per database. All SQL
//! and all error codes are in this module; waiting, renewing and guards are not.

#[cfg(any(feature = "postgres", feature = "mysql", feature = "_sqlite"))]
use std::time::Instant;

pub(crate) use self::driver::StepError;
pub(crate) use self::failure::{Failure, Fault, HookFailure};
pub(crate) use self::lock_row::{LockRow, reliable_without_notice};
pub(crate) use self::server::{Cluster, Location, Server};
pub(crate) use self::types::{
    BatchOutcome, Claim, ExpiredQueue, Grant, Guarded, LeaseKey, LeaseStatus, ListPage, Notification,
    PruneScope, QueueChange, ReleaseClaim, Released, Renewal, Renewed, RowAttempt, RowClaim, RowKey,
    TablePart,
};
pub(crate) use self::wait_queue::{QueueEntry, WaitQueue, begins_with};
#[cfg(any(feature = "postgres", feature = "mysql", feature = "_sqlite"))]
use crate::name::Name;

// Defines `layout!`, which the modules of the databases use.
#[macro_use]
mod wait_queue;

#[cfg(any(feature = "postgres", feature = "mysql", feature = "_sqlite"))]
mod columns;
pub(crate) mod driver;
mod failure;
mod lock_row;
#[cfg(any(feature = "postgres", feature = "mysql", feature = "_sqlite"))]
mod migration;
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(any(feature = "postgres", feature = "mysql", feature = "_sqlite"))]
mod row;
mod server;
#[cfg(feature = "_sqlite")]
mod sqlite;
mod types;

// Defines the macros for the SQL of both servers.
#[cfg(feature = "mysql")]
#[macro_use]
mod mysql_family;
#[cfg(feature = "mysql")]
mod mariadb;
#[cfg(feature = "mysql")]
mod mysql;

/// How many prepared statements a private connection caches. This is more than there are.
pub(crate) const PRIVATE_STATEMENTS: usize = 100;

/// A database that can keep locks: `sqlx::Postgres`, `sqlx::MySql` (MySQL 8.0 and MariaDB 10.6 or
/// later) and `sqlx::Sqlite`, each with the cargo feature of its name. The trait is sealed: its
/// methods are not part of the public interface.
///
/// Each method is one step on one connection. On a private connection, one that lock-db opens for
/// itself, the statements skip a row that another transaction has locked. A statement that can't
/// skip the row waits for a limited time, at most one second. `lock_row` waits at most its `slice`.
#[diagnostic::on_unimplemented(
    message = "`{Self}` can't keep locks",
    label = "not a database of lock-db",
    note = "`sqlx::Postgres`, `sqlx::MySql` and `sqlx::Sqlite` can, each with the cargo feature of lock-db of that name: \
            `postgres`, `mysql` (also MariaDB), `sqlite`"
)]
pub trait LockDatabase: driver::Driver {}

#[cfg(feature = "postgres")]
impl LockDatabase for sqlx::Postgres {}
#[cfg(feature = "mysql")]
impl LockDatabase for sqlx::MySql {}
#[cfg(feature = "_sqlite")]
impl LockDatabase for sqlx::Sqlite {}

/// What a private connection found in place of the table.
#[derive(Debug)]
#[doc(hidden)]
pub enum Found {
    Table(Server),
    /// No table of this name exists.
    Nothing,
    /// A table that lacks this column.
    Differs(&'static str),
    /// A table that can't keep locks, with the reason.
    Unusable(String),
}

/// What keeps old row versions, as text for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[doc(hidden)]
pub struct OldSnapshots {
    pub(crate) found: Option<String>,
    /// What this account can't see.
    pub(crate) unseen: Option<String>,
}

#[cfg(any(feature = "postgres", feature = "mysql"))]
impl OldSnapshots {
    fn unseen(error: &dyn sqlx::error::DatabaseError) -> Self {
        let text = format!("whether an old transaction makes hot locks slow can't be seen: {error}");
        Self { found: None, unseen: Some(text) }
    }
}

/// Result of trying to lock a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Probe {
    /// Another transaction has it locked.
    Locked,
    /// It could be locked.
    Free,
    /// There is no such row, or this role may not lock it.
    Nothing,
}

/// A name that no lock has, for a row that is rolled back.
#[cfg(any(feature = "postgres", feature = "mysql", feature = "_sqlite"))]
fn name_for_check() -> driver::Result<String> {
    match crate::secret::Secret::generate() {
        Ok(secret) => Ok(format!("lock_db: check {}", secret.as_str())),
        Err(error) => Err(StepError::Found(Fault::Other, error.to_string().into())),
    }
}

/// The error for a row that was created and locked without obstacle, but could not be written.
#[cfg(any(feature = "postgres", feature = "mysql", feature = "_sqlite"))]
fn foreign_write() -> StepError {
    StepError::refused(
        "a row of `distributed_lock` can be made, but writing it has no effect: is there a trigger on the table, or does a \
         policy hide its rows?",
    )
}

/// The text of a warning for an account that may not delete rows.
#[cfg(any(feature = "postgres", feature = "mysql"))]
fn can_not_prune(lacks: &str, grant: &str) -> String {
    format!(
        "{lacks}: the rows of names that are not used any more stay in the table; `{grant}`, or turn pruning off by \
         `LocksBuilder::prune_after(None)`"
    )
}

/// Encodes the leases of a batch as JSON, for databases without arrays:
/// `[[7, "secret", 30000000, 1], …]`.
#[cfg(any(feature = "mysql", feature = "_sqlite"))]
fn as_json(leases: &[Renewal]) -> String {
    use std::fmt::Write as _;

    let mut json = String::with_capacity(2 + leases.len() * 64);
    json.push('[');
    for (position, Renewal { id, secret, fencing_token, ttl }) in leases.iter().enumerate() {
        let comma = if position > 0 { "," } else { "" };
        let ttl = crate::options::micros(*ttl);
        let _infallible = write!(json, "{comma}[{id},\"{}\",{ttl},{fencing_token}]", secret.as_str());
    }
    json.push(']');
    json
}

/// Encodes names as JSON, for databases without arrays: `["6e616d65", …]`.
#[cfg(any(feature = "mysql", feature = "_sqlite"))]
fn names_as_json(names: &[Name]) -> String {
    let names: Vec<String> =
        names.iter().map(|name| format!("\"{}\"", hexadecimal(name.as_bytes()))).collect();
    format!("[{}]", names.join(","))
}

/// Encodes ids as JSON, for databases without arrays: `[7,8]`.
#[cfg(any(feature = "mysql", feature = "_sqlite"))]
fn ids_as_json(ids: &[i64]) -> String {
    let ids: Vec<String> = ids.iter().map(i64::to_string).collect();
    format!("[{}]", ids.join(","))
}

/// Sorts rows, found in any order, into the order of the names.
#[cfg(any(feature = "postgres", feature = "mysql", feature = "_sqlite"))]
fn by_name(names: &[Name], found: impl IntoIterator<Item = (Vec<u8>, LockRow)>) -> Vec<Option<LockRow>> {
    let mut found: std::collections::HashMap<_, _> = found.into_iter().collect();
    names.iter().map(|name| found.remove(name.as_bytes())).collect()
}

/// Which of the names are among those that were found. Returns one result per name, in order.
#[cfg(any(feature = "postgres", feature = "mysql", feature = "_sqlite"))]
fn are_among<'a, N: AsRef<[u8]>>(names: impl Iterator<Item = &'a Name>, found: &[N]) -> Vec<bool> {
    let found: std::collections::HashSet<&[u8]> = found.iter().map(AsRef::as_ref).collect();
    names.map(|name| found.contains(name.as_bytes())).collect()
}

/// Encodes bytes for use inside a statement, where they then need no escaping.
#[cfg(any(feature = "mysql", feature = "postgres", feature = "_sqlite"))]
fn hexadecimal(bytes: impl AsRef<[u8]>) -> String {
    use std::fmt::Write as _;

    let bytes = bytes.as_ref();
    let mut digits = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        let _infallible = write!(digits, "{byte:02x}");
    }
    digits
}

/// The digest of a secret, as the servers compute it too. Statements on connections of the
/// application are sent as text, which logs show, so they contain no secret.
#[cfg(any(feature = "mysql", feature = "postgres"))]
fn secret_digest(secret: &str) -> String {
    use sha2::Digest as _;

    hexadecimal(sha2::Sha256::digest(secret))
}

/// Sorts what a batch statement found, in any order, into the order of the request. A lease that it
/// did not find is no longer ours.
#[cfg(any(feature = "postgres", feature = "mysql", feature = "_sqlite"))]
fn in_order(
    leases: &[Renewal],
    found: impl IntoIterator<Item = (String, LeaseStatus)>,
    read_at: Option<Instant>,
) -> Renewed {
    let found: std::collections::HashMap<String, LeaseStatus> = found.into_iter().collect();
    let status = |lease: &Renewal| found.get(lease.secret.as_str()).copied();
    let statuses = leases.iter().map(|lease| status(lease).unwrap_or(LeaseStatus::NotOurs)).collect();
    Renewed { statuses, read_at }
}
