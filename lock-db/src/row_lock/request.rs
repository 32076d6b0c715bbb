//! The request for a row lock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::RowGuard;
use super::own_transaction::TransactionRequest;
use crate::context::Context;
use crate::database::LockDatabase;
use crate::in_transaction::{Attempt, HeldInTransaction};
use crate::options::Wait;
#[cfg(feature = "testing")]
use crate::test_support;
use crate::{Error, Kind};

/// A request for a row lock, from [`Locks::row_lock`](crate::Locks::row_lock). It does nothing
/// until one of its async methods is called.
///
/// The lock is the row of the name in `distributed_lock`. A transaction locks and writes the row,
/// and holds the lock until it ends. Waiting requests queue in the database, which wakes them in
/// order.
///
/// SQLite has no row locks. There the request takes the write lock of the whole database, as `BEGIN
/// IMMEDIATE` does, so a row lock excludes all other row locks and every other writer. While
/// another connection writes, it is unknown whether that connection holds the lock, unless this
/// `Locks` holds it itself. The result is then a retryable [`Error::Database`].
#[derive(Debug)]
#[must_use = "this only describes a lock; call `acquire` or `acquire_in`"]
pub struct RowLock<DB: LockDatabase> {
    context: Arc<Context<DB>>,
    name: String,
    wait: Option<Duration>,
}

// A derived impl would require `DB: Clone`.
impl<DB: LockDatabase> Clone for RowLock<DB> {
    fn clone(&self) -> Self {
        Self { context: Arc::clone(&self.context), name: self.name.clone(), wait: self.wait }
    }
}

impl<DB: LockDatabase> RowLock<DB> {
    pub(crate) fn new(context: Arc<Context<DB>>, name: &str) -> Self {
        Self { context, name: name.to_owned(), wait: None }
    }

    /// Sets how long to wait in total, for the lock and, where one is needed, for a connection of
    /// the pool. At most 365 days. Zero asks once.
    ///
    /// A database that has not answered at all by then gets up to a second in total, because
    /// without an answer it is unknown whether the lock is held.
    ///
    /// Default: that of the [`LocksBuilder`](crate::LocksBuilder), which is 30 seconds unless set.
    pub const fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Takes the lock in a transaction of its own, on a connection of the application's pool.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let guard = locks.row_lock("stock:7").acquire().await?;
    /// // … statements on `&mut *guard` …
    /// guard.commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::Timeout`] when the wait was over first. `waiting_for` says whether the lock was
    ///   held, or the pool had no connection.
    /// - [`Error::Unreachable`] when the database could not be reached or did not answer until the
    ///   end of the wait. Retryable.
    /// - [`Error::Refused`] at once, when the server refuses until a person changes something: the
    ///   role, the password, a right.
    /// - [`Error::Database`] when the database reports another error: at once if it is permanent,
    ///   otherwise at the end of the wait (with `retryable`).
    /// - [`Error::Deadlock`] and [`Error::Serialization`] when the database ended the transaction
    ///   for such a reason, at the end of the wait. Until then the request begins anew.
    /// - [`Error::WrongKind`] when the name is used for insert locks, or by a later version of
    ///   lock-db for another kind.
    /// - [`Error::SchemaMissing`], [`Error::UnsupportedTable`] and [`Error::ForeignTransaction`]
    ///   when the table can't be used on connections of the pool.
    /// - [`Error::InvalidName`] and [`Error::InvalidOption`] when the request is not valid. The
    ///   latter also outside of a tokio runtime, and for a setting of the
    ///   [`LocksBuilder`](crate::LocksBuilder) that can't work.
    /// - [`Error::Closed`] when the `Locks` was closed.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. The transaction is rolled back and its connection
    /// returned within two seconds, the longest that one statement waits on the server.
    pub async fn acquire(self) -> Result<RowGuard<DB>, Error> {
        let wait = self.context.settings().wait(self.wait)?;
        // A caller that waits gets it or an error.
        self.take(wait).await?.ok_or(Error::Closed)
    }

    /// Takes the lock in a transaction of its own if it is free now. Returns `None` when it is
    /// held. Otherwise as [`acquire`](Self::acquire).
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire), but `Timeout` only when the pool had no connection within ten
    /// seconds.
    ///
    /// # Cancel safety
    ///
    /// As [`acquire`](Self::acquire).
    pub async fn try_acquire(self) -> Result<Option<RowGuard<DB>>, Error> {
        self.take(Wait::Try).await
    }

    async fn take(self, wait: Wait) -> Result<Option<RowGuard<DB>>, Error> {
        let names = vec![self.context.checked_name(&self.name)?];
        Ok(TransactionRequest::new(self.context, names, wait).take().await?.map(RowGuard::new))
    }

    /// Takes the lock in the caller's transaction. No other connection holds it, and the end of the
    /// transaction frees it.
    ///
    /// This should be the first statement of the transaction. In REPEATABLE READ and above, a
    /// snapshot that is older than the lock is refused.
    ///
    /// After [`Error::Timeout`] the transaction is as usable as before. After [`Error::Deadlock`]
    /// and [`Error::Serialization`] it must be rolled back and run again from its beginning.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let mut transaction = locks.pool().begin().await?;
    /// locks.row_lock("stock:7").acquire_in(&mut transaction).await?;
    /// // … statements on `&mut *transaction` …
    /// transaction.commit().await?;    // the lock is free from here on
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::NotInTransaction`] when the connection is not in a transaction that sqlx began.
    /// - [`Error::ForeignTransaction`] when the transaction does not reach the table of this
    ///   `Locks`.
    /// - [`Error::Deadlock`] and [`Error::Serialization`] when the transaction can't continue.
    /// - [`Error::Lost`] when the transaction was ended already, or can only be rolled back.
    /// - Otherwise as [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the transaction may or may not have the lock: roll it back. Its
    /// connection answers the next statement when the running one has ended, within two seconds. On
    /// MySQL and MariaDB the next statement may return the error of the running one.
    pub async fn acquire_in(self, transaction: &mut DB::Connection) -> Result<HeldInTransaction, Error> {
        let wait = self.context.settings().wait(self.wait)?;
        // A request that waits gets it or an error.
        self.take_in(transaction, wait).await?.ok_or(Error::Closed)
    }

    /// Takes the lock in the caller's transaction if it is free now. Returns `None` when it is
    /// held. Otherwise as [`acquire_in`](Self::acquire_in).
    ///
    /// # Errors
    ///
    /// As [`acquire_in`](Self::acquire_in), without `Timeout`.
    ///
    /// # Cancel safety
    ///
    /// As [`acquire_in`](Self::acquire_in).
    pub async fn try_acquire_in(
        self,
        transaction: &mut DB::Connection,
    ) -> Result<Option<HeldInTransaction>, Error> {
        self.take_in(transaction, Wait::Try).await
    }

    async fn take_in(
        self,
        transaction: &mut DB::Connection,
        wait: Wait,
    ) -> Result<Option<HeldInTransaction>, Error> {
        let held = self.lock_in(transaction, wait).await?;
        #[cfg(feature = "testing")]
        test_support::note_in_transaction(&self.context, Kind::Row, &held);
        Ok(held)
    }

    /// Takes the lock without showing it to a test. An annotated function shows its lock itself.
    pub(crate) async fn lock_in(
        &self,
        transaction: &mut DB::Connection,
        wait: Wait,
    ) -> Result<Option<HeldInTransaction>, Error> {
        let started = Instant::now();
        let name = self.context.checked_name(&self.name)?;
        let attempt = Attempt { context: &self.context, name: &name, kind: Kind::Row, wait, started };
        attempt.lock_in(transaction).await
    }
}
