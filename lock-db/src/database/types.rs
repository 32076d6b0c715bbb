//! Requests to a database and their results, the same for every database.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Server;
use super::wait_queue::QueueEntry;
use crate::Kind;
use crate::name::Name;
use crate::secret::Secret;

/// An attempt to take a lease.
#[derive(Debug, Clone)]
pub struct Claim {
    pub name: Name,
    pub secret: Secret,
    pub owner: Arc<str>,
    pub ttl: Duration,
    /// Secret of this process's entry in the queue of the row. A claim without it ignores the
    /// queue.
    pub entry: Option<Secret>,
    /// Whether the row is made if there is none. Looking for it costs the server time, so it is not
    /// asked for where this process has seen the row.
    pub makes_row: bool,
}

/// A lease to be released.
#[derive(Debug, Clone)]
pub struct ReleaseClaim {
    pub name: Name,
    pub secret: Secret,
    /// Entry to append to the queue if more callers of this process wait. It goes behind the
    /// entries of other processes.
    pub entry: Option<QueueEntry>,
}

/// A queue as it was read, and as it is to be.
#[derive(Debug, Clone)]
pub struct QueueChange {
    pub name: Name,
    pub before: String,
    pub after: String,
}

/// Results of a batch: those of the releases and those of the claims, each in the order of the
/// request.
#[derive(Debug)]
pub struct BatchOutcome {
    pub releases: Vec<LeaseStatus>,
    pub grants: Vec<Option<Grant>>,
    /// Which processes to notify, now that these rows are free.
    pub notifications: Vec<Notification>,
}

impl BatchOutcome {
    /// The results if one obstacle affected the whole batch and nothing was done.
    #[cfg(feature = "mysql")]
    pub(super) fn nothing(releases: &[ReleaseClaim], claims: &[Claim]) -> Self {
        Self {
            releases: vec![LeaseStatus::Busy; releases.len()],
            grants: vec![None; claims.len()],
            notifications: Vec::new(),
        }
    }
}

/// A process to be notified: it waits for a row that is free now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Notification {
    pub listener: u32,
    /// Id of the row.
    pub id: i64,
}

impl Notification {
    /// Parses the listener id of a queue entry: hexadecimal, zero for none.
    #[cfg(feature = "postgres")]
    pub(super) fn parse(listener: Option<&str>, id: i64) -> Option<Self> {
        let listener = u32::from_str_radix(listener?, 16).ok()?;
        (listener > 0).then_some(Self { listener, id })
    }
}

/// Result of a release.
#[derive(Debug, Clone, Copy)]
pub struct Released {
    pub status: LeaseStatus,
    pub notification: Option<Notification>,
}

impl From<LeaseStatus> for Released {
    fn from(status: LeaseStatus) -> Self {
        Self { status, notification: None }
    }
}

/// A lease that was granted.
#[derive(Debug, Clone, Copy)]
pub struct Grant {
    /// Id of the row.
    pub id: i64,
    /// The last token of this grant's range.
    pub fencing_token: i64,
    /// Length of the token range, at least one. The range begins after the token of the previous
    /// grant: it contains all values that the clock has since passed.
    pub tokens: i64,
    /// Whether other processes are in the queue.
    pub others_wait: bool,
}

/// A lease as statements in a transaction identify it.
#[derive(Debug, Clone)]
pub struct LeaseKey {
    pub row: RowKey,
    pub secret: Secret,
    /// Checked in addition to the secret. A delayed copy of the request for the lease could write
    /// the secret again long after other holders had the lease.
    pub fencing_token: i64,
    /// Lower bound for `previous_token` in the snapshot of a transaction that this lease guards. It
    /// is zero, or one less than the token of a holder that got the lease by direct handover within the
    /// process. Without it, the snapshot would show the same row before and after the handover.
    pub mark: i64,
    pub ttl: Duration,
    /// The server that granted it.
    pub server: Server,
}

/// Result of a guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guarded {
    /// The lock is ours, and stays ours until the transaction ends.
    Ours,
    /// The lock was ours when the transaction was committed. It is committed already, so the COMMIT
    /// of its handle finds nothing to do.
    Committed {
        /// Which process to notify, if the lock was released with the commit.
        notification: Option<Notification>,
    },
    /// The lock is not ours any more, or the transaction sees the row as it was before the grant.
    NotOurs,
    /// The lock is ours, but the transaction sees the row as it was before the grant.
    Stale,
    /// The marked transaction has already ended.
    Ended,
    /// The transaction uses another table of that name. The guard did nothing.
    Elsewhere,
}

#[cfg(any(feature = "postgres", feature = "_sqlite"))]
impl Guarded {
    pub(super) fn when(ours: bool) -> Self {
        if ours { Self::Ours } else { Self::NotOurs }
    }
}

/// A lease to be renewed.
#[derive(Debug, Clone)]
pub struct Renewal {
    /// Id of the row.
    pub id: i64,
    pub secret: Secret,
    pub fencing_token: i64,
    pub ttl: Duration,
}

/// Results of renewals.
#[derive(Debug)]
pub struct Renewed {
    /// In the order of the request.
    pub statuses: Vec<LeaseStatus>,
    /// Taken just before the leases that were not renewed were read. `None`: when the request
    /// began.
    pub read_at: Option<Instant>,
}

/// What the row says about one of our leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseStatus {
    /// It was ours, and the requested change was made.
    Ours,
    /// It is ours, with more of its TTL left than its holder relies on. Whether it was renewed just
    /// now is unknown.
    StillOurs,
    /// It is ours, but another transaction has the row locked. Nothing was done; ask again.
    Busy,
    /// Like `Busy`, and a takeover has given notice: see [`LockRow::notice_is_due`].
    Challenged,
    /// It is not ours any more.
    NotOurs,
}

/// A request for the lock of a row, in a transaction.
#[derive(Debug, Clone)]
pub struct RowClaim {
    pub row: RowKey,
    pub kind: Kind,
    pub owner: Arc<str>,
    pub secret: Secret,
    /// Creation time of the row. Where the row's id is used, it tells the row from one of another
    /// server.
    pub created: i64,
    /// Whether lock-db began the transaction, on the right database, and has done nothing in it yet.
    /// Then it may be begun anew.
    pub is_own: bool,
    /// Whether the caller does not wait for the lock.
    pub is_try: bool,
}

/// Which row to lock.
#[derive(Debug, Clone)]
pub struct RowKey {
    pub name: Name,
    /// The id as last read. Not used where the transaction creates the row.
    pub id: i64,
}

/// Result of an attempt to lock a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RowAttempt {
    /// The row is locked until the transaction ends.
    Locked {
        /// The token that this attempt wrote into the row.
        fencing_token: i64,
        /// The secret that was in the row before.
        before: String,
        /// The secret that it wrote, if the server generated it.
        secret: Option<Secret>,
    },
    /// Another transaction has the row locked.
    Busy,
    /// Another transaction has the whole table locked.
    TableLocked,
    /// This transaction sees no such row.
    Missing,
    /// The row exists and is locked, but the transaction's snapshot is older than what the last
    /// holder committed.
    Stale,
    /// The row was found and locked, but writing it had no effect.
    Unwritten,
    /// The name is used for another kind of lock.
    WrongKind,
    /// A lease holds the lock. `usable`: the row is unlocked again, and the transaction is as
    /// usable as before.
    Leased { usable: bool },
    /// No lease holds the lock any more, but its last holder has not been ruled out yet: see
    /// [`LockRow::is_settled`].
    Unsettled { usable: bool },
    /// The transaction is in another database than the table. Nothing was done in it.
    ForeignTransaction,
}

/// Which rows to list: those whose whole names match, in the order of the bytes of the names.
#[derive(Debug, Clone)]
pub struct ListPage {
    /// The parts of the name that stand between its stars: the first one at its beginning, the last one
    /// at its end. A single part is the whole name.
    pub parts: Vec<String>,
    /// Only names behind this one.
    pub after: String,
    /// Only names up to this one, where the part of the table ends that is read at once.
    pub end: Option<String>,
    /// Only locks that are held, as far as the server tells.
    pub held_only: bool,
    pub limit: i64,
}

impl ListPage {
    /// The beginning of all names, and the first text that no such name reaches. `None`: there is no end.
    pub(super) fn bounds(&self) -> (&str, Option<String>) {
        let first = self.parts.first().map_or("", String::as_str);
        let mut above = first.to_owned();
        while let Some(last) = above.pop() {
            // The order of UTF-8 is that of the characters.
            let next = (last..=char::MAX).nth(1);
            if let Some(next) = next {
                above.push(next);
                return (first, Some(above));
            }
        }
        (first, None)
    }

    /// The names as LIKE writes them, with `!` as its escape character.
    #[cfg(any(feature = "postgres", feature = "mysql"))]
    pub(super) fn like(&self) -> String {
        let escaped = |part: &String| part.replace('!', "!!").replace('%', "!%").replace('_', "!_");
        self.parts.iter().map(escaped).collect::<Vec<_>>().join("%")
    }

    /// The names as GLOB writes them.
    #[cfg(feature = "_sqlite")]
    pub(super) fn glob(&self) -> String {
        let escaped = |part: &String| part.replace('[', "[[]").replace('?', "[?]");
        self.parts.iter().map(escaped).collect::<Vec<_>>().join("*")
    }
}

/// Which rows may be removed: those whose names begin with `prefix` and that were not used for
/// `older_than`.
///
/// A row is used when it is created or acquired, until the deadline of its lease, and while a
/// process waits in its queue. A row with a fencing token that the server's clock has not passed by
/// `older_than` stays, so that a new row of the name gets a larger one. So does a row of a kind that
/// this version does not know.
#[derive(Debug, Clone)]
pub struct PruneScope {
    pub prefix: Arc<str>,
    pub older_than: Duration,
}

/// Consecutive rows of the table, and which of them may be removed.
#[derive(Debug, Default)]
pub struct TablePart {
    /// The largest id of these rows. `None`: there are no more.
    pub last: Option<i64>,
    /// The ids of rows that may be removed.
    pub unused: Vec<i64>,
    /// The queues to be emptied first.
    pub queues: Vec<ExpiredQueue>,
}

/// The queue of an unused row. All of its entries have expired: the processes died while they
/// waited.
#[derive(Debug)]
pub struct ExpiredQueue {
    pub id: i64,
    pub name: String,
    pub waiters: String,
}
