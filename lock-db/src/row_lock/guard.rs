//! The guard of a row lock that has a transaction of its own.

use std::ops::{Deref, DerefMut};

use super::locked_rows::LockedRows;
use crate::Error;
use crate::database::LockDatabase;
use crate::dropped_at_once::Watched;

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
    rows: Watched<LockedRows<DB>>,
}

impl<DB: LockDatabase> RowGuard<DB> {
    pub(super) fn new(rows: LockedRows<DB>) -> Self {
        Self { rows: Watched::new(rows, |rows| rows.name().into()) }
    }

    /// The guard belongs to an annotated function, which shows the held lock itself.
    #[cfg(feature = "testing")]
    pub(crate) fn hide(&mut self) {
        self.rows.hide();
    }

    /// The name of the lock.
    #[must_use]
    pub fn name(&self) -> &str {
        self.rows.name()
    }

    pub(crate) fn fencing_token(&self) -> i64 {
        self.rows.fencing_token()
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
        self.rows.into_inner().commit().await
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
        self.rows.into_inner().roll_back().await
    }
}

impl<DB: LockDatabase> Deref for RowGuard<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &Self::Target {
        &self.rows
    }
}

impl<DB: LockDatabase> DerefMut for RowGuard<DB> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.rows
    }
}

impl<DB: LockDatabase> std::fmt::Debug for RowGuard<DB> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("RowGuard").field("name", &self.name()).finish_non_exhaustive()
    }
}
