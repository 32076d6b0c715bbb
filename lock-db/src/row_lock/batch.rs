//! The request for several row locks.

use std::sync::Arc;
use std::time::Duration;

use super::RowGuards;
use super::own_transaction::TransactionRequest;
use crate::context::Context;
use crate::database::LockDatabase;
use crate::in_transaction::{HeldInTransaction, in_order, lock_all};
use crate::options::Wait;
#[cfg(feature = "testing")]
use crate::test_support;
use crate::{Error, Kind};

/// A request for several row locks in one transaction, from
/// [`Locks::row_locks`](crate::Locks::row_locks). It does nothing until one of its async methods is
/// called.
///
/// The locks are taken in the byte order of their names, whatever the order in which the names are
/// given. Two requests for the same names therefore never wait for each other in a circle.
/// Deadlocks remain possible with locks of the application's own statements, and with locks that
/// are taken one by one: the database then ends one of the transactions with [`Error::Deadlock`].
#[derive(Debug)]
#[must_use = "this only describes locks; call `acquire` or `acquire_in`"]
pub struct RowLocks<DB: LockDatabase> {
    context: Arc<Context<DB>>,
    names: Vec<String>,
    wait: Option<Duration>,
}

// A derived impl would require `DB: Clone`.
impl<DB: LockDatabase> Clone for RowLocks<DB> {
    fn clone(&self) -> Self {
        Self { context: Arc::clone(&self.context), names: self.names.clone(), wait: self.wait }
    }
}

impl<DB: LockDatabase> RowLocks<DB> {
    pub(crate) fn new(context: Arc<Context<DB>>, names: Vec<String>) -> Self {
        Self { context, names, wait: None }
    }

    /// Sets how long to wait for all of them together, as [`RowLock::wait`](crate::RowLock::wait).
    pub const fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Takes all of the locks in one transaction of their own, on a connection of the application's
    /// pool, with one statement for each.
    ///
    /// While the request waits for one of them, its transaction holds the ones before it in the
    /// order of the names. Requests of this process that wait for the same name take no connection
    /// meanwhile.
    ///
    /// On MySQL and MariaDB, locking the first row fixes the snapshot of the transaction. If the
    /// request then waits for another row and its holder commits, the transaction would read data
    /// from before that commit. So it is rolled back and begun again, without the locks that it had.
    /// If a later name is always contended, the wait may end first.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let guards = locks.row_locks(["account:1", "account:2"]).acquire().await?;
    /// // … statements on `&mut *guards` …
    /// guards.commit().await?;     // all of them are free from here on
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`RowLock::acquire`](crate::RowLock::acquire), with the name that was waited for.
    /// [`Error::InvalidOption`] also without any name, and with more than 10 000 names. After any
    /// error none of the locks is held.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. The transaction is rolled back and its connection
    /// returned within two seconds, the longest that one statement waits on the server.
    pub async fn acquire(self) -> Result<RowGuards<DB>, Error> {
        let wait = self.context.settings().wait(self.wait)?;
        // A request that waits gets all of them or an error.
        self.take(wait).await?.ok_or(Error::Closed)
    }

    /// Takes all of the locks in one transaction of their own if they are free now. Returns `None`
    /// when one of them is held; none of the others is kept then. Otherwise as
    /// [`acquire`](Self::acquire).
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire), but `Timeout` only when the pool had no connection within ten
    /// seconds.
    ///
    /// # Cancel safety
    ///
    /// As [`acquire`](Self::acquire).
    pub async fn try_acquire(self) -> Result<Option<RowGuards<DB>>, Error> {
        self.take(Wait::Try).await
    }

    async fn take(self, wait: Wait) -> Result<Option<RowGuards<DB>>, Error> {
        let names = in_order(&self.context, &self.names)?;
        Ok(TransactionRequest::new(self.context, names, wait).take().await?.map(RowGuards::new))
    }

    /// Takes all of the locks in the caller's transaction, with one statement for each.
    ///
    /// The transaction holds them as after [`RowLock::acquire_in`](crate::RowLock::acquire_in).
    /// After an error, the locks that were already taken stay with the transaction until it ends.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let mut transaction = locks.pool().begin().await?;
    /// locks.row_locks(["account:2", "account:1"]).acquire_in(&mut transaction).await?;
    /// // … statements on `&mut *transaction` …
    /// transaction.commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`RowLock::acquire_in`](crate::RowLock::acquire_in). [`Error::InvalidOption`] also
    /// without any name, and with more than 10 000 names.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the transaction may or may not have the locks: roll it back.
    /// More on that at [`RowLock::acquire_in`](crate::RowLock::acquire_in).
    pub async fn acquire_in(self, transaction: &mut DB::Connection) -> Result<Vec<HeldInTransaction>, Error> {
        let wait = self.context.settings().wait(self.wait)?;
        // A request that waits gets all of them or an error.
        self.take_in(transaction, wait).await?.ok_or(Error::Closed)
    }

    /// Takes all of the locks in the caller's transaction if they are free now. Returns `None` when
    /// one of them is held elsewhere. The locks before it in the order stay with the transaction.
    /// Otherwise as [`acquire_in`](Self::acquire_in).
    ///
    /// # Errors
    ///
    /// As [`acquire_in`](Self::acquire_in), without `Timeout`.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the transaction may or may not have the locks: roll it back.
    pub async fn try_acquire_in(
        self,
        transaction: &mut DB::Connection,
    ) -> Result<Option<Vec<HeldInTransaction>>, Error> {
        self.take_in(transaction, Wait::Try).await
    }

    async fn take_in(
        self,
        transaction: &mut DB::Connection,
        wait: Wait,
    ) -> Result<Option<Vec<HeldInTransaction>>, Error> {
        let held = lock_all(&self.context, &self.names, Kind::Row, wait, transaction).await?;
        #[cfg(feature = "testing")]
        test_support::note_in_transaction(&self.context, Kind::Row, held.iter().flatten());
        Ok(held)
    }
}
