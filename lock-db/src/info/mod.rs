//! The contents of a row of the table, for people.

use chrono::{DateTime, Utc};

/// The kind of lock that a name is used for. A name is used with one kind only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
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

/// The result of [`Locks::check`](crate::Locks::check).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct CheckReport {
    pub(crate) warnings: Vec<String>,
}

impl CheckReport {
    /// What works and could be better, in sentences for people.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// The row of a lock at the moment it was read. For dashboards, messages and logs.
///
/// Do not use it to decide whether work may continue. That is what
/// [`Lease::is_held`](crate::Lease::is_held) is for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
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
    /// When the last holder released it, if the lock stays taken after that
    /// ([`at_least`](crate::InsertLock::at_least)).
    pub finished_at: Option<DateTime<Utc>>,
    /// Whether this process is known to hold it, through the same [`Locks`](crate::Locks).
    pub is_here: bool,
}
