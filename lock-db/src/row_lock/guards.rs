//! The guard of several row locks that have a transaction of their own.

use std::ops::{Deref, DerefMut};

use super::locked_rows::LockedRows;
use crate::Error;
use crate::database::LockDatabase;
use crate::dropped_at_once::Watched;

/// Several row locks that are held by one transaction of their own, from
/// [`RowLocks::acquire`](crate::RowLocks::acquire). It derefs to the connection: `&mut *guards`
/// runs statements in the transaction.
///
/// [`commit`](Self::commit) and [`rollback`](Self::rollback) end the transaction, and all of the
/// locks with it. Dropping this rolls back in the background.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let locks = lock_db::testing::locks().await?;
/// let guards = locks.row_locks(["account:2", "account:1"]).acquire().await?;
/// let names: Vec<_> = guards.names().collect();
/// assert_eq!(names, ["account:1", "account:2"]);
/// // … statements on `&mut *guards` …
/// # drop(names);
/// guards.commit().await?;
/// # Ok(())
/// # }
/// ```
#[must_use = "bind them to a name (`let mut guards = …`); `let _ = …` rolls back and releases the locks at once"]
#[clippy::has_significant_drop]
pub struct RowGuards<DB: LockDatabase> {
    rows: Watched<LockedRows<DB>>,
}

impl<DB: LockDatabase> RowGuards<DB> {
    pub(super) fn new(rows: LockedRows<DB>) -> Self {
        Self { rows: Watched::new(rows, |rows| rows.name().into()) }
    }

    /// The names of the locks, in byte order.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.rows.names()
    }

    /// Commits the transaction, which frees all of the locks.
    ///
    /// # Errors
    ///
    /// As [`RowGuard::commit`](crate::RowGuard::commit), with the first of the names.
    ///
    /// # Cancel safety
    ///
    /// The commit continues when the future is dropped. Only its result is lost.
    pub async fn commit(self) -> Result<(), Error> {
        self.rows.into_inner().commit().await
    }

    /// Rolls the transaction back, which frees all of the locks.
    ///
    /// # Errors
    ///
    /// As [`RowGuard::rollback`](crate::RowGuard::rollback), with the first of the names.
    ///
    /// # Cancel safety
    ///
    /// The rollback continues when the future is dropped. Only its result is lost.
    pub async fn rollback(self) -> Result<(), Error> {
        self.rows.into_inner().roll_back().await
    }
}

impl<DB: LockDatabase> Deref for RowGuards<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &Self::Target {
        &self.rows
    }
}

impl<DB: LockDatabase> DerefMut for RowGuards<DB> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.rows
    }
}

impl<DB: LockDatabase> std::fmt::Debug for RowGuards<DB> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.names().collect();
        formatter.debug_struct("RowGuards").field("names", &names).finish_non_exhaustive()
    }
}
