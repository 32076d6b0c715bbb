//! What was tried when an error of the database occurred.

use std::fmt;

/// What lock-db tried when the database, or the connection to it, failed.
///
/// `Display` completes "could not …".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Action {
    /// Take an insert lock.
    Acquire,
    /// Take a row lock in a transaction of its own.
    TakeRowLock,
    /// Lock a row in an open transaction.
    LockRow,
    /// Begin the transaction of a row lock.
    BeginTransaction,
    /// Begin a transaction that is guarded by a lease.
    BeginGuarded,
    /// Commit a transaction.
    Commit,
    /// Roll back a transaction.
    RollBack,
    /// Check whether a lease is still held.
    Verify,
    /// Release a lock.
    Release,
    /// Make sure that the last holder of a lease has ended.
    TakeOver,
    /// Find the table `distributed_lock`.
    FindTable,
    /// Read a row of the table.
    ReadRow,
    /// Read a list of locks.
    List,
    /// Release a lock by force.
    ForceRelease,
    /// Insert the row of a name.
    MakeRow,
    /// Apply the migrations.
    Migrate,
    /// Check the table.
    Check,
    /// Remove rows that were not used for long.
    Prune,
    /// Start the thread of a `Locks`.
    StartSession,
    /// Get an answer from the thread of a `Locks`.
    AskSession,
    /// Generate a secret key.
    DrawSecret,
    /// Prepare the database of a test.
    PrepareTest,
}

impl Action {
    /// Whether the action is part of a request for a lock.
    pub(super) const fn asks_for_lock(self) -> bool {
        matches!(
            self,
            Self::Acquire
                | Self::TakeRowLock
                | Self::LockRow
                | Self::BeginTransaction
                | Self::FindTable
                | Self::MakeRow
        )
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::Acquire => "acquire",
            Self::TakeRowLock => "take the row lock",
            Self::LockRow => "lock the row",
            Self::BeginTransaction => "begin a transaction",
            Self::BeginGuarded => "begin a guarded transaction",
            Self::Commit => "commit the transaction",
            Self::RollBack => "roll back the transaction",
            Self::Verify => "verify the lock",
            Self::Release => "release",
            Self::TakeOver => "take over",
            Self::FindTable => "find the table `distributed_lock`",
            Self::ReadRow => "read the row",
            Self::List => "list the locks",
            Self::ForceRelease => "release by force",
            Self::MakeRow => "make the row",
            Self::Migrate => "create `distributed_lock`",
            Self::Check => "check the table `distributed_lock`",
            Self::Prune => "remove unused rows",
            Self::StartSession => "start the thread that keeps the locks",
            Self::AskSession => "get an answer",
            Self::DrawSecret => "draw a secret key from the operating system",
            Self::PrepareTest => "prepare the database of a test",
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.as_str())
    }
}
