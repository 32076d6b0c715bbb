//! Reasons that errors carry, for programs to match on.

use std::fmt;

/// What a request was waiting for when its time was over.
///
/// ```
/// use lock_db::{Error, WaitingFor};
///
/// fn is_in_use(error: &Error) -> bool {
///     matches!(error, Error::Timeout { waiting_for: WaitingFor::Lock, .. })
/// }
/// # let _ = is_in_use;
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WaitingFor {
    /// The lock: it is held, or an earlier request of this process has it next.
    Lock,
    /// A connection, of which the pool had none free.
    Connection,
    /// Another nested call under the same holder. Nested calls enter one at a time.
    Sibling,
}

impl fmt::Display for WaitingFor {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Lock => "the lock",
            Self::Connection => "a connection of the pool",
            Self::Sibling => "another call within the same holder",
        })
    }
}

/// Why a lock can't be entered again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum NoReentry {
    /// The holder under which the call would enter has ended.
    HoldEnded,
    /// The calling code is inside the lock, and one of the two functions has `reentrant = false`.
    /// The call would wait for itself.
    NotReentrant,
    /// An outer function has bound the guard of the row lock (`lease = …`) and uses its
    /// transaction.
    GuardInUse,
}

impl fmt::Display for NoReentry {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::HoldEnded => "the hold that this would go on with has ended; take the lock anew",
            Self::NotReentrant => {
                "the calling code holds it already, and one of the two functions is `reentrant = false`: call this one \
                 outside of the lock, or leave `reentrant = false` out"
            }
            Self::GuardInUse => {
                "a function enclosing this one has bound its guard by `lease = …`: hand the guard on as an argument (`guard: &mut RowGuard<_>`), \
                 and take it there by `tx = guard` instead"
            }
        })
    }
}

/// How the loss of a lock was noticed.
///
/// ```
/// assert_eq!(lock_db::Loss::TakenOver.as_str(), "taken_over");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Loss {
    /// The lease could not be renewed in time, so the database may have granted it to another
    /// process.
    NotRenewed,
    /// The row has another secret key: the lock was granted again.
    TakenOver,
    /// The row says that the lock was released, and this process did not release it.
    ReleasedByHand,
    /// The lease was ended by force: see [`Locks::force_release`](crate::Locks::force_release).
    ForceReleased,
    /// The row was deleted from `distributed_lock`.
    RowDeleted,
    /// The transaction or connection that held it has ended.
    TransactionEnded,
    /// The `Locks` was closed, which releases all locks that are held.
    Closed,
    /// The holder has had the lock for as long as [`at_most`](crate::InsertLock::at_most) allows,
    /// so it was released.
    HeldTooLong,
    /// It was released.
    Released,
    /// It is unknown whether an earlier transaction of the lease was committed, or will be. No
    /// other transaction may begin under the same lease. Release it, and take the lock again.
    CommitUnknown,
}

impl Loss {
    /// One word, for a label of a metric: `not_renewed`, `taken_over`, ….
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::NotRenewed => "not_renewed",
            Self::TakenOver => "taken_over",
            Self::ReleasedByHand => "released_by_hand",
            Self::ForceReleased => "force_released",
            Self::RowDeleted => "row_deleted",
            Self::TransactionEnded => "transaction_ended",
            Self::Closed => "closed",
            Self::HeldTooLong => "held_too_long",
            Self::Released => "released",
            Self::CommitUnknown => "commit_unknown",
        }
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::NotRenewed => "its lease could not be renewed in time",
            Self::TakenOver => "the table names another owner, or it was released by hand",
            Self::ReleasedByHand => "released by hand",
            Self::ForceReleased => "it was released by force",
            Self::RowDeleted => "its row was deleted from `distributed_lock`",
            Self::TransactionEnded => "the transaction that held it is gone",
            Self::Closed => "its `Locks` was closed",
            Self::HeldTooLong => "it was held for as long as `at_most` allows",
            Self::Released => "a transaction has released it",
            Self::CommitUnknown => {
                "an earlier transaction of the lease may still be committed; take the lock again"
            }
        })
    }
}
