//! The guard of a row lock that has a transaction of its own.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::Error;
#[cfg(feature = "testing")]
use crate::context::Context;
use crate::context::Counted;
use crate::database::Failure;
use crate::database::LockDatabase;
use crate::dropped_at_once::Watched;
use crate::error::Action;
use crate::keyed_queue::RowPermit;
use crate::managed_tx::{Condition, ManagedTransaction};
#[cfg(feature = "testing")]
use crate::test_support;

/// A row lock that is held by a transaction of its own. It derefs to the connection: `&mut *guard`
/// runs statements in the transaction.
///
/// [`commit`](Self::commit) and [`rollback`](Self::rollback) end the transaction, and the lock with
/// it. Dropping the guard rolls back in the background.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let locks = lock_db::testing::locks().await?;
/// # sqlx::query("CREATE TABLE stock (left_over INTEGER)").execute(locks.pool()).await?;
/// let mut guard = locks.row_lock("stock:7").acquire().await?;
/// sqlx::query("UPDATE stock SET left_over = left_over - 1").execute(&mut *guard).await?;
/// guard.commit().await?;
/// # Ok(())
/// # }
/// ```
#[must_use = "bind it to a name (`let mut guard = …`); `let _ = …` rolls back and releases the lock at once"]
#[clippy::has_significant_drop]
pub struct RowGuard<DB: LockDatabase> {
    /// Keeps the local permit, so that the next caller of this process comes when the lock is free.
    transaction: Watched<ManagedTransaction<DB, Arc<RowPermit>>>,
    condition: Condition,
    counted: Counted,
    /// Present while the caller holds the guard.
    #[cfg(feature = "testing")]
    shown: Option<Arc<()>>,
}

impl<DB: LockDatabase> RowGuard<DB> {
    pub(super) fn new(
        transaction: ManagedTransaction<DB, Arc<RowPermit>>,
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
    pub(super) fn of_caller<L: LockDatabase>(mut self, context: &Context<L>) -> Self {
        self.shown = Some(test_support::row_is_open(context, self.condition.name()));
        self
    }

    /// The guard belongs to an annotated function, which shows the held lock itself.
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
    /// After these nothing was committed:
    ///
    /// - [`Error::Lost`] when the transaction in which the lock was taken has ended, or an earlier
    ///   error has made it unusable.
    /// - [`Error::Deadlock`] and [`Error::Serialization`] when the database rejects the transaction
    ///   with such an error.
    /// - [`Error::Timeout`], [`Error::Refused`] and [`Error::Database`] when the server rejects the
    ///   commit for another reason.
    ///
    /// [`Error::CommitUnknown`] when the connection was lost during the commit. It is unknown
    /// whether the transaction was committed.
    ///
    /// # Cancel safety
    ///
    /// The commit continues when the future is dropped. Only its result is lost.
    pub async fn commit(self) -> Result<(), Error> {
        let Self { transaction, condition, counted, .. } = self;
        transaction.into_inner().commit(condition, |_ended| drop(counted)).await
    }

    /// Rolls the transaction back, which frees the lock.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`] when the connection broke, and [`Error::Database`] when the rollback
    /// failed for another reason. The transaction is not committed in either case.
    ///
    /// # Cancel safety
    ///
    /// The rollback continues when the future is dropped. Only its result is lost.
    pub async fn rollback(self) -> Result<(), Error> {
        let Self { transaction, condition, counted: _counted, .. } = self;
        transaction
            .into_inner()
            .roll_back()
            .await
            .map_err(|error| Failure::new::<DB>(error).into_error(Action::RollBack, Some(condition.name())))
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
