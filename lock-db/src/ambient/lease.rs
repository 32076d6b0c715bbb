//! The lease of the ambient `Locks`.

use std::any::Any;
use std::sync::Arc;

use super::{BoxFuture, not_installed};
use crate::__private::LeaseHandle;
use crate::database::LockDatabase;
use crate::insert::Hold;
use crate::{Error, GuardedTransaction, Lease};

/// What `lease = …` binds in a function that uses the ambient `Locks`: the [`Lease`] of a database that is known only when
/// the program runs. With `locks = …` it is the `&Lease<DB>` itself.
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
///     transaction.commit().await?;    // only if the lease is still ours; and the lock is released after it
///     Ok(lease.fencing_token())
/// }
/// ```
pub struct AmbientLease {
    pub(crate) lease: Box<dyn AnyLease>,
}

impl AmbientLease {
    /// As [`Lease::name`].
    #[must_use]
    pub fn name(&self) -> &str {
        self.lease.name()
    }

    /// As [`Lease::fencing_token`].
    #[must_use]
    pub fn fencing_token(&self) -> i64 {
        self.lease.fencing_token()
    }

    /// As [`Lease::secret_key`].
    #[must_use]
    pub fn secret_key(&self) -> &str {
        self.lease.secret_key()
    }

    /// As [`Lease::is_held`].
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.lease.is_held()
    }

    /// As [`Lease::hold_count`].
    #[must_use]
    pub fn hold_count(&self) -> usize {
        self.lease.hold_count()
    }

    /// As [`Lease::lost`].
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn lost(&self) {
        self.lease.lost().await;
    }

    /// The lease itself, of this database.
    ///
    /// # Errors
    ///
    /// [`Error::NotInstalled`] when the ambient `Locks` is that of another database.
    pub fn of<DB: LockDatabase>(&self) -> Result<&Lease<DB>, Error> {
        self.lease.as_any().downcast_ref().ok_or_else(|| {
            let (wanted, installed) = (DB::NAME, self.lease.database());
            let reason = format!("a lease of {wanted} is wanted, the ambient `Locks` is of {installed}");
            not_installed(self.name(), reason)
        })
    }

    /// As [`Lease::begin`]: a transaction that commits only while the lease is ours.
    ///
    /// # Errors
    ///
    /// As [`Lease::begin`], and as [`of`](Self::of).
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time: a transaction that was begun meanwhile is rolled back.
    pub async fn begin<DB: LockDatabase>(&self) -> Result<GuardedTransaction<DB>, Error> {
        self.of()?.begin().await
    }
}

impl std::fmt::Debug for AmbientLease {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.lease.fmt(formatter)
    }
}

/// The lease of whatever database.
pub(crate) trait AnyLease: std::fmt::Debug + Send + Sync {
    fn name(&self) -> &str;
    fn fencing_token(&self) -> i64;
    fn secret_key(&self) -> &str;
    fn is_held(&self) -> bool;
    fn hold_count(&self) -> usize;
    fn lost(&self) -> BoxFuture<'_, ()>;
    fn database(&self) -> &'static str;
    fn as_any(&self) -> &dyn Any;
    fn into_hold(self: Box<Self>) -> Arc<Hold>;
}

impl<DB: LockDatabase> AnyLease for Lease<DB> {
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

    fn into_hold(self: Box<Self>) -> Arc<Hold> {
        LeaseHandle::into_hold(*self)
    }
}
