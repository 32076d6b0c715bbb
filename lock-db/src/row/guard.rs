//! The guard of a row lock that has a transaction of its own.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::Error;
#[cfg(feature = "testing")]
use crate::Locks;
use crate::database::LockDatabase;
use crate::dropped_at_once::Watched;
use crate::error::Failure;
use crate::in_transaction::Counted;
use crate::own_transaction::{Condition, OwnTransaction};
use crate::turns::Turn;

/// A row lock that is held by a transaction of its own, to which this derefs: `&mut *guard` runs statements in it.
///
/// [`commit`](Self::commit) or [`rollback`](Self::rollback) end the transaction and with it the lock. Dropping the guard
/// rolls back in the background.
#[must_use = "bind it to a name (`let mut guard = …`); `let _ = …` rolls back and releases the lock at once"]
#[clippy::has_significant_drop]
pub struct RowGuard<DB: LockDatabase> {
    /// With the turn, so that the next caller of this process comes when the lock is free.
    transaction: Watched<OwnTransaction<DB, Arc<Turn>>>,
    condition: Condition,
    counted: Counted,
    /// As long as it is the caller's.
    #[cfg(feature = "testing")]
    shown: Option<Arc<()>>,
}

impl<DB: LockDatabase> RowGuard<DB> {
    pub(super) fn new(
        transaction: OwnTransaction<DB, Arc<Turn>>,
        condition: Condition,
        counted: Counted,
    ) -> Self {
        let transaction = Watched::unwatched(transaction);
        Self {
            transaction,
            condition,
            counted,
            #[cfg(feature = "testing")]
            shown: None,
        }
    }

    pub(super) fn handed_out(mut self) -> Self {
        self.transaction.is_handed_out(self.condition.name().shown());
        self
    }

    #[cfg(feature = "testing")]
    pub(super) fn of_caller<L: LockDatabase>(mut self, locks: &Locks<L>) -> Self {
        self.shown = Some(locks.row_is_open(self.condition.name()));
        self
    }

    /// An annotated function has it, and shows what is held by itself.
    #[cfg(feature = "testing")]
    pub(crate) fn is_of_function(&mut self) {
        self.shown = None;
    }

    /// The name of the lock.
    #[must_use]
    pub fn name(&self) -> &str {
        self.condition.name().shown()
    }

    pub(crate) fn fencing_token(&self) -> i64 {
        self.condition.fencing_token()
    }

    /// Commits the transaction, which frees the lock.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when the transaction is not the one any more in which the lock was taken, or an earlier error has
    /// doomed it: then nothing of it is kept. [`Error::Database`] when the commit failed, or when the connection broke on
    /// the way: whether it was committed is then unknown.
    ///
    /// # Cancel safety
    ///
    /// The commit goes on when the future is dropped; only the answer is lost.
    pub async fn commit(self) -> Result<(), Error> {
        let Self { transaction, condition, counted, .. } = self;
        transaction.into_inner().commit(condition, |_ended| drop(counted)).await
    }

    /// Rolls the transaction back, which frees the lock.
    ///
    /// # Errors
    ///
    /// [`Error::Database`] when the connection broke, which rolls back too.
    ///
    /// # Cancel safety
    ///
    /// The rollback goes on when the future is dropped; only the answer is lost.
    pub async fn rollback(self) -> Result<(), Error> {
        let Self { transaction, condition, counted: _counted, .. } = self;
        transaction.into_inner().roll_back().await.map_err(|error| {
            Failure::new::<DB>(error).into_error("roll back the transaction", Some(condition.name()))
        })
    }
}

impl<DB: LockDatabase> Deref for RowGuard<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &Self::Target {
        &self.transaction
    }
}

impl<DB: LockDatabase> DerefMut for RowGuard<DB> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.transaction
    }
}

impl<DB: LockDatabase> std::fmt::Debug for RowGuard<DB> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("RowGuard").field("name", &self.name()).finish_non_exhaustive()
    }
}
