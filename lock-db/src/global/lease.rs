//! The lease of a database that is known only at run time.

use std::any::Any;
use std::sync::Arc;

use super::{BoxFuture, not_installed};
use crate::database::LockDatabase;
use crate::lease::commit_and_release;
use crate::session::LeaseHandle;
use crate::{Error, GuardedTransaction, Lease, LeaseWatch, Loss};

/// A [`Lease`] whose database is known only at run time. It comes from
/// [`AnyLocks`](crate::AnyLocks), or is converted from a `Lease` by `From`.
///
/// In an annotated function that uses the installed or scoped `Locks`, `lease = …` binds a
/// reference to it. With `locks = …` that is the `&Lease<DB>` itself.
///
/// ```no_run
/// use lock_db::{Error, distributed_lock};
/// use sqlx::Postgres;
///
/// #[distributed_lock("stock:{sku}", lease = lease)]
/// async fn sell(sku: i64) -> Result<i64, Error> {
///     let mut transaction = lease.begin::<Postgres>().await?;
///     // … statements on `&mut *transaction` …
/// #   let _ = &mut *transaction;
///     // Commits only if the lease is still held. The lock is released after that.
///     transaction.commit().await?;
///     Ok(lease.fencing_token())
/// }
/// ```
#[must_use = "bind it to a name (`let _lease = …`); `let _ = …` releases it at once"]
#[clippy::has_significant_drop]
pub struct AnyLease {
    pub(crate) lease: Box<dyn ErasedLease>,
}

impl AnyLease {
    /// The name of the lock.
    #[must_use]
    pub fn name(&self) -> &str {
        self.lease.name()
    }

    /// The fencing token, as [`Lease::fencing_token`].
    #[must_use]
    pub fn fencing_token(&self) -> i64 {
        self.lease.fencing_token()
    }

    /// The secret of this acquisition, as [`Lease::secret_key`]. Do not log it.
    #[must_use]
    pub fn secret_key(&self) -> &str {
        self.lease.secret_key()
    }

    /// Whether the lease is held, as [`Lease::is_held`].
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.lease.is_held()
    }

    /// The number of handles that hold this lock, as [`Lease::hold_count`].
    #[must_use]
    pub fn hold_count(&self) -> usize {
        self.lease.hold_count()
    }

    /// Resolves when the lease is lost, as [`Lease::lost`].
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time: a loss is final.
    pub async fn lost(&self) {
        self.lease.lost().await;
    }

    /// Resolves as soon as another request waits for this lock, as [`Lease::wanted`].
    ///
    /// # Cancel safety
    ///
    /// As [`Lease::wanted`].
    pub async fn wanted(&self) {
        self.lease.handle().wanted().await;
    }

    /// Returns the lease itself, as the lease of this database.
    ///
    /// # Errors
    ///
    /// [`Error::NotInstalled`] when the lease is of another database.
    pub fn of<DB: LockDatabase>(&self) -> Result<&Lease<DB>, Error> {
        self.lease.as_any().downcast_ref().ok_or_else(|| {
            let (wanted, installed) = (DB::NAME, self.lease.database());
            let reason = format!("a lease of {wanted} is wanted, the ambient `Locks` is of {installed}");
            not_installed(self.name(), reason)
        })
    }

    /// Begins a transaction that commits only while this lease is held, as [`Lease::begin`].
    ///
    /// # Errors
    ///
    /// As [`Lease::begin`]. [`Error::NotInstalled`] when the lease is of another database.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. A transaction that was begun in the meantime is
    /// rolled back.
    pub async fn begin<DB: LockDatabase>(&self) -> Result<GuardedTransaction<DB>, Error> {
        self.of()?.begin().await
    }

    /// How the lease was lost. `None` while it is held.
    #[must_use]
    pub fn loss(&self) -> Option<Loss> {
        self.lease.loss()
    }

    /// Returns a watch, for child tasks of the holder that have to end with the lease.
    #[must_use]
    pub fn watch(&self) -> LeaseWatch {
        self.lease.watch()
    }

    /// Returns another handle to the same lock, as [`Lease::reenter`].
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when the lease is no longer held.
    pub fn reenter(&self) -> Result<Self, Error> {
        self.lease.reenter()
    }

    /// Runs `work` under the lease. When the lease is lost first, `work` is dropped at its next
    /// `.await`.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when the lease is lost before `work` has ended, or was lost while `work`
    /// blocked its thread.
    ///
    /// # Cancel safety
    ///
    /// `work` is dropped with the future. The lease is not released by that.
    pub async fn run_until_lost<F: Future>(&self, work: F) -> Result<F::Output, Error> {
        self.handle().run_until_lost(work).await
    }

    /// Checks, in a transaction of the caller, that the lease is held, and keeps other requests
    /// from taking the lock until the transaction ends. As [`Lease::verify_in`]. `DB` is the
    /// database of the transaction.
    ///
    /// # Errors
    ///
    /// As [`Lease::verify_in`]. [`Error::NotInstalled`] when the lease is of another database.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, roll the transaction back: it is unknown whether the lease was
    /// held.
    pub async fn verify_in<DB: LockDatabase>(&self, transaction: &mut DB::Connection) -> Result<(), Error> {
        self.of::<DB>()?.verify_in(transaction).await
    }

    /// Releases the lock together with the commit of the caller's transaction, as
    /// [`Lease::release_in`]. `DB` is the database of the transaction.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let of_test = lock_db::testing::locks().await?;
    /// # let pool = of_test.pool().clone();
    /// # let locks = lock_db::AnyLocks::from((*of_test).clone());
    /// use sqlx::Sqlite;
    ///
    /// let lease = locks.insert_lock("stock").acquire().await?;
    /// let mut transaction = pool.begin().await?;
    /// // … statements on `&mut *transaction` …
    /// lease.release_in::<Sqlite>(&mut transaction).await?;
    /// transaction.commit().await?;    // the lock is free from here on
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Lease::release_in`]. [`Error::NotInstalled`] when the lease is of another database.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, roll the transaction back.
    pub async fn release_in<DB: LockDatabase>(&self, transaction: &mut DB::Connection) -> Result<(), Error> {
        self.of::<DB>()?.release_in(transaction).await
    }

    /// Commits a guarded transaction of this lease and releases the lock with it, as
    /// [`Lease::commit_and_release`].
    ///
    /// # Errors
    ///
    /// As [`Lease::commit_and_release`].
    ///
    /// # Cancel safety
    ///
    /// The commit continues when the future is dropped. Only its result is lost.
    pub async fn commit_and_release<DB: LockDatabase>(
        self,
        transaction: GuardedTransaction<DB>,
    ) -> Result<(), Error> {
        commit_and_release(self.into_handle(), transaction).await
    }

    /// Releases the lock and waits until the database has confirmed it, as [`Lease::release`].
    ///
    /// # Errors
    ///
    /// As [`Lease::release`].
    ///
    /// # Cancel safety
    ///
    /// The release continues when the future is dropped. Only its result is lost.
    pub async fn release(self) -> Result<(), Error> {
        self.into_handle().give_up().await
    }

    pub(super) fn handle(&self) -> &LeaseHandle {
        self.lease.handle()
    }

    pub(super) fn into_handle(self) -> Arc<LeaseHandle> {
        self.lease.into_handle()
    }
}

impl<DB: LockDatabase> From<Lease<DB>> for AnyLease {
    fn from(lease: Lease<DB>) -> Self {
        Self { lease: Box::new(lease) }
    }
}

impl std::fmt::Debug for AnyLease {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.lease.fmt(formatter)
    }
}

/// A lease of any database.
pub(crate) trait ErasedLease: std::fmt::Debug + Send + Sync {
    fn name(&self) -> &str;
    fn fencing_token(&self) -> i64;
    fn secret_key(&self) -> &str;
    fn is_held(&self) -> bool;
    fn hold_count(&self) -> usize;
    fn lost(&self) -> BoxFuture<'_, ()>;
    fn database(&self) -> &'static str;
    fn as_any(&self) -> &dyn Any;
    fn into_handle(self: Box<Self>) -> Arc<LeaseHandle>;
    fn handle(&self) -> &LeaseHandle;
    fn loss(&self) -> Option<Loss>;
    fn watch(&self) -> LeaseWatch;
    fn reenter(&self) -> Result<AnyLease, Error>;
}

impl<DB: LockDatabase> ErasedLease for Lease<DB> {
    fn name(&self) -> &str {
        self.name()
    }

    fn fencing_token(&self) -> i64 {
        self.fencing_token()
    }

    fn secret_key(&self) -> &str {
        self.secret_key()
    }

    fn is_held(&self) -> bool {
        self.is_held()
    }

    fn hold_count(&self) -> usize {
        self.hold_count()
    }

    fn lost(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.lost())
    }

    fn database(&self) -> &'static str {
        DB::NAME
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn into_handle(self: Box<Self>) -> Arc<LeaseHandle> {
        IntoLease::into_handle(*self)
    }

    fn handle(&self) -> &LeaseHandle {
        self.handle()
    }

    fn loss(&self) -> Option<Loss> {
        self.loss()
    }

    fn watch(&self) -> LeaseWatch {
        self.watch()
    }

    fn reenter(&self) -> Result<AnyLease, Error> {
        self.reenter().map(AnyLease::from)
    }
}

/// A lease of any database, as the body of an annotated function has bound it.
pub trait IntoLease: Send + 'static {
    #[allow(private_interfaces, missing_docs)]
    fn into_handle(self) -> Arc<LeaseHandle>;
}

impl<DB: LockDatabase> IntoLease for Lease<DB> {
    #[allow(private_interfaces)]
    fn into_handle(self) -> Arc<LeaseHandle> {
        Self::into_handle(self)
    }
}

impl IntoLease for AnyLease {
    #[allow(private_interfaces)]
    fn into_handle(self) -> Arc<LeaseHandle> {
        self.lease.into_handle()
    }
}
