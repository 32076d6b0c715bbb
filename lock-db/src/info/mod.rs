//! What people see of the locks: who holds them, who waits, and whether the database is fit.

mod health;
mod report;
mod row_holder;

use std::time::Duration;

use chrono::{DateTime, Utc};

pub use self::health::Health;
pub use self::report::{CheckReport, CommitGuard, Finding, FindingKind};
pub use self::row_holder::{DatabaseSession, RowHolder};

/// The kind of lock that a name is used for. A name is used with one kind only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Kind {
    /// A lease, held by the row itself: [`Locks::insert_lock`](crate::Locks::insert_lock).
    Insert,
    /// A row lock, held by a transaction: [`Locks::row_lock`](crate::Locks::row_lock).
    Row,
    /// A kind that a later version of lock-db uses for this name. This version does not know it,
    /// and never grants it.
    Unknown,
}

impl Kind {
    /// One word: `insert`, `row` or `unknown`. The first two are the values of the column
    /// `lock_kind`.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Insert => "insert",
            Self::Row => "row",
            Self::Unknown => "unknown",
        }
    }

    pub(crate) fn parse(column: &str) -> Self {
        match column {
            "insert" => Self::Insert,
            "row" => Self::Row,
            _ => Self::Unknown,
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Insert => "an insert lock",
            Self::Row => "a row lock",
            Self::Unknown => "a kind of lock that this version does not know",
        })
    }
}

/// The row of a lock at the moment it was read. For dashboards, messages and logs.
///
/// Do not use it to decide whether work may continue. That is what
/// [`Lease::is_held`](crate::Lease::is_held) is for.
///
/// With the feature `serde` it can be serialized: durations as seconds, times as in RFC 3339.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct LockInfo {
    /// The name of the lock.
    pub name: String,
    /// What the name is used for.
    pub kind: Kind,
    /// Host, process id and label of the current or last holder. Empty before the first one.
    pub owner: String,
    /// The number of the current or last grant. Leases that are handed on within a process
    /// ([`hand_off`](crate::LocksBuilder::hand_off)) share a grant with a range of numbers; this is
    /// the last of them.
    pub fencing_token: i64,
    /// When the name was first used, by the database's clock.
    pub created_at: DateTime<Utc>,
    /// When the current or last holder got the lock, by the database's clock.
    pub acquired_at: DateTime<Utc>,
    /// Until when the lease is valid, by the database's clock. `None` when the lock is free:
    /// released or expired. Always `None` for a row lock, because the table does not show the
    /// transaction that holds it.
    pub held_until: Option<DateTime<Utc>>,
    /// How long the lease is valid unless it is renewed: the time to [`held_until`](Self::held_until)
    /// when the row was read. `None` when the lock is free, and for a row lock.
    #[cfg_attr(feature = "serde", serde(serialize_with = "in_seconds"))]
    pub expires_in: Option<Duration>,
    /// How long the holder has had it. `None` when the lock is free. For a row lock that is the age of
    /// the transaction that holds it, where the server tells: see [`row_holder`](Self::row_holder).
    #[cfg_attr(feature = "serde", serde(serialize_with = "in_seconds"))]
    pub held_for: Option<Duration>,
    /// When the last holder released it, if the lock stays taken after that
    /// ([`at_least`](crate::InsertLock::at_least)).
    pub finished_at: Option<DateTime<Utc>>,
    /// Who holds it. One for a lease, none when the lock is free. Always empty for a row lock, whose
    /// holder is in [`row_holder`](Self::row_holder).
    pub holders: Vec<Holder>,
    /// The processes that wait for a lease, the first one first.
    ///
    /// Waiters behind others of the same process are not in the table, and neither are requests for
    /// several locks, requests that are not [`fair`](crate::InsertLock::fair), those for row locks and for
    /// locks in a transaction. On clusters with several primaries there are none.
    pub waiting: Vec<Waiter>,
    /// Which transaction has the row of a row lock locked, as far as the server tells. `None` for a
    /// lease, except one that [`info`](crate::Locks::info) sees kept by a transaction
    /// ([`acquire_in`](crate::InsertLock::acquire_in)).
    pub row_holder: Option<RowHolder>,
    /// Whether this process is known to hold it, through the same [`Locks`](crate::Locks).
    pub is_here: bool,
}

/// A holder of a lock: see [`LockInfo::holders`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Holder {
    /// Host, process id and label.
    pub owner: String,
    /// The number of its grant.
    pub fencing_token: i64,
    /// Since when it has the lock, by the database's clock.
    pub since: DateTime<Utc>,
    /// How long its lease is valid unless it is renewed.
    #[cfg_attr(feature = "serde", serde(serialize_with = "in_seconds"))]
    pub expires_in: Option<Duration>,
}

/// A process that waits for a lock: see [`LockInfo::waiting`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Waiter {
    /// Host, process id and label, shortened to 29 characters.
    pub owner: String,
    /// Since when it waits, by the database's clock.
    pub since: DateTime<Utc>,
}

#[cfg(feature = "serde")]
#[expect(clippy::ref_option, reason = "the signature that serde calls")]
fn in_seconds<S: serde::Serializer>(time: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    serde::Serialize::serialize(&time.as_ref().map(Duration::as_secs_f64), serializer)
}
