//! Locks of a database that is known only at run time.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::ErasedLocks;
use super::lease::AnyLease;
use crate::database::LockDatabase;
use crate::lease::LeaseOptions;
use crate::{CheckReport, Error, LockInfo, Locks};

/// A [`Locks`] whose database is known only at run time. Cloning is cheap.
///
/// Use it in applications that choose their driver by an address, and in code that should not be
/// generic over the database.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let of_test = lock_db::testing::locks().await?;
/// # let locks = (*of_test).clone();
/// use lock_db::AnyLocks;
///
/// // From a `Locks<Postgres>`, a `Locks<MySql>` or a `Locks<Sqlite>`.
/// let locks = AnyLocks::from(locks);
/// let lease = locks.insert_lock("report:daily").acquire().await?;
/// assert_eq!((lease.name(), locks.database()), ("report:daily", "SQLite"));
/// lease.release().await?;
/// # Ok(())
/// # }
/// ```
///
/// A row lock belongs to a transaction of one database. Use a `Locks` for row locks.
#[derive(Clone)]
pub struct AnyLocks(Arc<dyn ErasedLocks>);

impl<DB: LockDatabase> From<Locks<DB>> for AnyLocks {
    fn from(locks: Locks<DB>) -> Self {
        Self(Arc::new(locks))
    }
}

impl AnyLocks {
    /// Returns a request for an insert lock, as [`Locks::insert_lock`].
    pub fn insert_lock(&self, name: impl AsRef<str>) -> AnyInsertLock {
        AnyInsertLock {
            locks: Arc::clone(&self.0),
            name: name.as_ref().to_owned(),
            options: LeaseOptions::default(),
            wait: None,
        }
    }

    /// The name of the database: `PostgreSQL`, `MySQL` (also for MariaDB) or `SQLite`.
    #[must_use]
    pub fn database(&self) -> &'static str {
        self.0.database()
    }

    /// Creates the table `distributed_lock` if it is missing, and brings it up to date, as
    /// [`Locks::migrate`].
    ///
    /// # Errors
    ///
    /// As [`Locks::migrate`].
    ///
    /// # Cancel safety
    ///
    /// The migration continues when the future is dropped. Only its result is lost.
    pub async fn migrate(&self) -> Result<(), Error> {
        self.0.migrate().await
    }

    /// Checks the table, as [`Locks::check`].
    ///
    /// # Errors
    ///
    /// As [`Locks::check`].
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time.
    pub async fn check(&self) -> Result<CheckReport, Error> {
        self.0.check().await
    }

    /// Reads the row of a name, as [`Locks::info`]. Returns `None` if the name was never used.
    ///
    /// # Errors
    ///
    /// As [`Locks::info`].
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time.
    pub async fn info(&self, name: impl AsRef<str>) -> Result<Option<LockInfo>, Error> {
        self.0.info(name.as_ref()).await
    }

    /// Whether [`close`](Self::close) was called, on this or on the `Locks` that it was converted
    /// from.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Releases every insert lock that is held, and refuses all further use, as [`Locks::close`].
    ///
    /// # Cancel safety
    ///
    /// The releases continue when the future is dropped.
    pub async fn close(&self) {
        self.0.close().await;
    }
}

impl fmt::Debug for AnyLocks {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_tuple("AnyLocks").field(&self.database()).finish()
    }
}

/// A request for an insert lock, from [`AnyLocks::insert_lock`], as
/// [`InsertLock`](crate::InsertLock). It does nothing until one of its async methods is called.
#[derive(Clone)]
#[must_use = "this only describes a lock; call `acquire` or `try_acquire`"]
pub struct AnyInsertLock {
    locks: Arc<dyn ErasedLocks>,
    name: String,
    options: LeaseOptions,
    wait: Option<Duration>,
}

impl AnyInsertLock {
    /// Sets how long the lock outlives a holder that is gone, as
    /// [`InsertLock::ttl`](crate::InsertLock::ttl).
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.options.ttl = Some(ttl);
        self
    }

    /// Sets how long to wait, as [`InsertLock::wait`](crate::InsertLock::wait).
    pub fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Sets for how long the lock stays taken at least, as
    /// [`InsertLock::at_least`](crate::InsertLock::at_least).
    pub fn at_least(mut self, at_least: Duration) -> Self {
        self.options.at_least = at_least;
        self
    }

    /// Sets the longest time for which the lock may be held, as
    /// [`InsertLock::at_most`](crate::InsertLock::at_most).
    pub fn at_most(mut self, at_most: Duration) -> Self {
        self.options.at_most = Some(at_most);
        self
    }

    /// Sets whether to keep to the order of the waiting processes, as
    /// [`InsertLock::fair`](crate::InsertLock::fair).
    pub fn fair(mut self, fair: bool) -> Self {
        self.options.fair = Some(fair);
        self
    }

    /// Takes the lock, and waits for it if necessary, as
    /// [`InsertLock::acquire`](crate::InsertLock::acquire).
    ///
    /// # Errors
    ///
    /// As [`InsertLock::acquire`](crate::InsertLock::acquire).
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. A lock that was granted in the meantime is released.
    pub async fn acquire(self) -> Result<AnyLease, Error> {
        let Self { locks, name, options, wait } = self;
        // A request that waits is answered with a lease or an error.
        locks.take(name, options, wait, false).await?.ok_or(Error::Closed)
    }

    /// Takes the lock if it is free now, as
    /// [`InsertLock::try_acquire`](crate::InsertLock::try_acquire). Returns `None` when it is held.
    ///
    /// # Errors
    ///
    /// As [`InsertLock::acquire`](crate::InsertLock::acquire), without `Timeout`.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. A lock that was granted in the meantime is released.
    pub async fn try_acquire(self) -> Result<Option<AnyLease>, Error> {
        let Self { locks, name, options, wait } = self;
        locks.take(name, options, wait, true).await
    }
}

impl fmt::Debug for AnyInsertLock {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, options, wait, .. } = self;
        formatter
            .debug_struct("AnyInsertLock")
            .field("name", name)
            .field("options", options)
            .field("wait", wait)
            .finish_non_exhaustive()
    }
}
