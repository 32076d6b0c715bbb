//! What the table says about a lock, for people.

use chrono::{DateTime, Utc};

/// Which kind of lock a name is used for. A name is used with one kind only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// A lease, held by the row itself: [`Locks::insert_lock`](crate::Locks::insert_lock).
    Insert,
    /// A row lock, held by a transaction: [`Locks::row_lock`](crate::Locks::row_lock).
    Row,
}

impl Kind {
    /// As it stands in the column `lock_kind`.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Insert => "insert",
            Self::Row => "row",
        }
    }

    pub(crate) fn parse(column: &str) -> Self {
        if column == "row" { Self::Row } else { Self::Insert }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Insert => "an insert lock",
            Self::Row => "a row lock",
        })
    }
}

/// What [`Locks::check`](crate::Locks::check) found.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    pub(crate) warnings: Vec<String>,
}

impl CheckReport {
    /// What works and could be better, for people.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

/// The row of a lock as it was read: true at that moment, for a dashboard, a message or a log line.
///
/// Never decide by it whether work may go on; that is what [`Lease::is_held`](crate::Lease::is_held) is for.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LockInfo {
    /// The name of the lock.
    pub name: String,
    /// What the name is used for.
    pub kind: Kind,
    /// Host, process id and label of the present or last holder. Empty before the first one.
    pub owner: String,
    /// The number of the present or last grant. When leases go from hand to hand within a process
    /// ([`hand_off`](crate::LocksBuilder::hand_off)), the last of the numbers that belong to the grant.
    pub fencing_token: i64,
    /// When the name was first used, by the database's clock.
    pub created_at: DateTime<Utc>,
    /// When the present or last holder got the lock, by the database's clock.
    pub acquired_at: DateTime<Utc>,
    /// Until when the lease is valid, by the database's clock. `None` when it is free: released or run out. Always
    /// `None` for a row lock, which the table can't show: it lives in the transaction that holds it.
    pub held_until: Option<DateTime<Utc>>,
    /// When the last holder gave it back, if it is held beyond that ([`at_least`](crate::InsertLock::at_least)).
    pub finished_at: Option<DateTime<Utc>>,
    /// Whether it is known that this process has it, by way of the same [`Locks`](crate::Locks).
    pub is_here: bool,
}
