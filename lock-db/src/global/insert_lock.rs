//! Requests for insert locks of a database that is known only at run time.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::{AnyLease, AnyLeases, ErasedLocks};
use crate::Error;
use crate::lease::{LeaseOptions, release_quietly};

/// A request for an insert lock, from [`AnyLocks::insert_lock`](crate::AnyLocks::insert_lock), as
/// [`InsertLock`](crate::InsertLock). It does nothing until one of its async methods is called.
#[derive(Clone)]
#[must_use = "this only describes a lock; call `acquire`, `try_acquire` or `run`"]
pub struct AnyInsertLock {
    locks: Arc<dyn ErasedLocks>,
    name: String,
    options: LeaseOptions,
    wait: Option<Duration>,
}

impl AnyInsertLock {
    pub(super) fn new(locks: Arc<dyn ErasedLocks>, name: &str) -> Self {
        Self { locks, name: name.to_owned(), options: LeaseOptions::default(), wait: None }
    }

    /// Sets how long the lock outlives a holder that is gone, as
    /// [`InsertLock::ttl`](crate::InsertLock::ttl).
    pub const fn ttl(mut self, ttl: Duration) -> Self {
        self.options.ttl = Some(ttl);
        self
    }

    /// Sets how long to wait, as [`InsertLock::wait`](crate::InsertLock::wait).
    pub const fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Sets for how long the lock stays taken at least, as
    /// [`InsertLock::at_least`](crate::InsertLock::at_least).
    pub const fn at_least(mut self, at_least: Duration) -> Self {
        self.options.at_least = at_least;
        self
    }

    /// Sets the longest time for which the lock may be held, as
    /// [`InsertLock::at_most`](crate::InsertLock::at_most).
    pub const fn at_most(mut self, at_most: Duration) -> Self {
        self.options.at_most = Some(at_most);
        self
    }

    /// Sets whether to keep to the order of the waiting processes, as
    /// [`InsertLock::fair`](crate::InsertLock::fair).
    pub const fn fair(mut self, fair: bool) -> Self {
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

    /// Takes the lock, runs `work` under it, and releases the lock, however `work` ends, as
    /// [`InsertLock::run`](crate::InsertLock::run). Nested calls enter the lock again as described
    /// there.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let of_test = lock_db::testing::locks().await?;
    /// # let locks = lock_db::AnyLocks::from((*of_test).clone());
    /// let work = async |lease: &lock_db::AnyLease| Ok::<_, lock_db::Error>(lease.fencing_token());
    /// let token = locks.insert_lock("report:daily").run(work).await?;
    /// assert!(token > 0);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`InsertLock::run`](crate::InsertLock::run).
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, `work` is dropped with it and the lock is released in the
    /// background.
    pub async fn run<T, E, F>(self, work: F) -> Result<T, E>
    where
        F: AsyncFnOnce(&AnyLease) -> Result<T, E>,
        E: From<Error>,
    {
        let Self { locks, name, options, wait } = self;
        let entered = locks.enter(name, options, wait).await?;
        // Dropped after the lease, however this ends.
        let inside = entered.inside;
        let lease = AnyLease { lease: locks.lease_of(entered.held) };
        let result = inside.scope(lease.run_until_lost(async { work(&lease).await })).await?;
        release_quietly(lease.release().await);
        result
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

/// A request for several insert locks, from
/// [`AnyLocks::insert_locks`](crate::AnyLocks::insert_locks), as
/// [`InsertLocks`](crate::InsertLocks). It takes all of them or none. It does nothing until one of
/// its async methods is called.
#[derive(Clone)]
#[must_use = "this only describes locks; call `acquire` or `try_acquire`"]
pub struct AnyInsertLocks {
    locks: Arc<dyn ErasedLocks>,
    names: Vec<String>,
    options: LeaseOptions,
    wait: Option<Duration>,
}

impl AnyInsertLocks {
    pub(super) fn new(locks: Arc<dyn ErasedLocks>, names: Vec<String>) -> Self {
        Self { locks, names, options: LeaseOptions::default(), wait: None }
    }

    /// Sets the TTL of each lock, as [`InsertLock::ttl`](crate::InsertLock::ttl).
    pub const fn ttl(mut self, ttl: Duration) -> Self {
        self.options.ttl = Some(ttl);
        self
    }

    /// Sets how long to wait for all of them together, as
    /// [`InsertLock::wait`](crate::InsertLock::wait).
    pub const fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Sets for how long each lock stays taken at least, as
    /// [`InsertLock::at_least`](crate::InsertLock::at_least).
    pub const fn at_least(mut self, at_least: Duration) -> Self {
        self.options.at_least = at_least;
        self
    }

    /// Sets the longest time for which each lock may be held, as
    /// [`InsertLock::at_most`](crate::InsertLock::at_most).
    pub const fn at_most(mut self, at_most: Duration) -> Self {
        self.options.at_most = Some(at_most);
        self
    }

    /// Takes all of the locks together, and waits for them if necessary, as
    /// [`InsertLocks::acquire`](crate::InsertLocks::acquire).
    ///
    /// # Errors
    ///
    /// As [`InsertLocks::acquire`](crate::InsertLocks::acquire).
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. Locks that were granted in the meantime are released.
    pub async fn acquire(self) -> Result<AnyLeases, Error> {
        let Self { locks, names, options, wait } = self;
        // A request that waits is answered with leases or an error.
        locks.take_all(names, options, wait, false).await?.ok_or(Error::Closed)
    }

    /// Takes all of the locks together if all are free now, as
    /// [`InsertLocks::try_acquire`](crate::InsertLocks::try_acquire). Returns `None` when one of
    /// them is held.
    ///
    /// # Errors
    ///
    /// As [`InsertLocks::acquire`](crate::InsertLocks::acquire), without `Timeout`.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. Locks that were granted in the meantime are released.
    pub async fn try_acquire(self) -> Result<Option<AnyLeases>, Error> {
        let Self { locks, names, options, wait } = self;
        locks.take_all(names, options, wait, true).await
    }
}

impl fmt::Debug for AnyInsertLocks {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { names, options, wait, .. } = self;
        formatter
            .debug_struct("AnyInsertLocks")
            .field("names", names)
            .field("options", options)
            .field("wait", wait)
            .finish_non_exhaustive()
    }
}
