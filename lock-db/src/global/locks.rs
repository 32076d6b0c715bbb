//! Locks of a database that is known only at run time.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::{AnyInsertLock, AnyInsertLocks, AnyListLocks, ErasedLocks, SCOPED, install};
use crate::database::LockDatabase;
use crate::{CheckReport, Error, Health, LockInfo, Locks};

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
/// A row lock belongs to a transaction of one database, and so does a lock in a transaction of the
/// caller. [`of`](Self::of) returns the `Locks` for them.
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
        AnyInsertLock::new(Arc::clone(&self.0), name.as_ref())
    }

    /// Returns a request for several insert locks, of which it takes all or none, as
    /// [`Locks::insert_locks`].
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let of_test = lock_db::testing::locks().await?;
    /// # let locks = lock_db::AnyLocks::from((*of_test).clone());
    /// let leases = locks.insert_locks(["account:1", "account:2"]).acquire().await?;
    /// assert!(leases.is_held());
    /// leases.release().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn insert_locks(&self, names: impl IntoIterator<Item = impl AsRef<str>>) -> AnyInsertLocks {
        let names = names.into_iter().map(|name| name.as_ref().to_owned());
        AnyInsertLocks::new(Arc::clone(&self.0), names.collect())
    }

    /// Returns the `Locks` itself, as the `Locks` of this database. `None` when it is of another
    /// one.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let of_test = lock_db::testing::locks().await?;
    /// # let locks = lock_db::AnyLocks::from((*of_test).clone());
    /// use sqlx::Sqlite;
    ///
    /// if let Some(locks) = locks.of::<Sqlite>() {
    ///     let guard = locks.row_lock("stock:7").acquire().await?;
    ///     guard.commit().await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn of<DB: LockDatabase>(&self) -> Option<&Locks<DB>> {
        self.0.as_any().downcast_ref()
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

    /// Returns a request for a list of locks, as [`Locks::list`]. It is sent by `.await`.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let of_test = lock_db::testing::locks().await?;
    /// # let locks = lock_db::AnyLocks::from((*of_test).clone());
    /// let lease = locks.insert_lock("order:41").acquire().await?;
    /// let held = locks.list("order:*").held_only().limit(100).await?;
    /// assert_eq!(held[0].name, "order:41");
    /// # drop(lease);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Locks::list`].
    ///
    /// # Cancel safety
    ///
    /// The request may be dropped at any time.
    pub fn list(&self, pattern: impl AsRef<str>) -> AnyListLocks {
        AnyListLocks::new(Arc::clone(&self.0), pattern.as_ref())
    }

    /// Ends a lease by force, as [`Locks::force_release`].
    ///
    /// # Errors
    ///
    /// As [`Locks::force_release`].
    ///
    /// # Cancel safety
    ///
    /// As [`Locks::force_release`].
    pub async fn force_release(&self, name: impl AsRef<str>, fencing_token: i64) -> Result<bool, Error> {
        self.0.force_release(name.as_ref(), fencing_token).await
    }

    /// How this is doing, as [`Locks::health`].
    #[must_use]
    pub fn health(&self) -> Health {
        self.0.health()
    }

    /// Removes the rows of names that were not used for this long, as [`Locks::prune`].
    ///
    /// # Errors
    ///
    /// As [`Locks::prune`].
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time.
    pub async fn prune(&self, older_than: Duration) -> Result<u64, Error> {
        self.0.prune(older_than).await
    }

    /// Host, process id and label, as [`Locks::owner`].
    #[must_use]
    pub fn owner(&self) -> &str {
        self.0.owner()
    }

    /// Installs this for the whole process, as [`Locks::install`].
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let of_test = lock_db::testing::locks().await?;
    /// # let locks = lock_db::AnyLocks::from((*of_test).clone());
    /// use lock_db::{Error, distributed_lock};
    ///
    /// #[distributed_lock("report:daily")]
    /// async fn report() -> Result<(), Error> {
    ///     Ok(())
    /// }
    ///
    /// locks.install()?;
    /// report().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyInstalled`] when a `Locks` that is not closed is installed. It stays
    /// installed.
    pub fn install(&self) -> Result<(), Error> {
        install(Arc::clone(&self.0))
    }

    /// Runs a future with this as its ambient `Locks`, as [`Locks::scope`].
    ///
    /// # Cancel safety
    ///
    /// As that of the future.
    pub fn scope<F: Future>(&self, future: F) -> impl Future<Output = F::Output> + use<F> {
        SCOPED.scope(Arc::clone(&self.0), future)
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
        formatter
            .debug_struct("AnyLocks")
            .field("database", &self.database())
            .field("owner", &self.owner())
            .finish_non_exhaustive()
    }
}
