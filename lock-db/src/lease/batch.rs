//! Several insert locks at once.

use std::sync::Arc;
use std::time::Duration;

use super::{GuardedTransaction, Lease, LeaseOptions, handles};
use crate::context::Context;
use crate::database::LockDatabase;
use crate::dropped_at_once::Watched;
use crate::error::Loss;
use crate::in_transaction::{HeldInTransaction, in_order, lock_all};
use crate::options::Wait;
use crate::session::LeaseHandle;
#[cfg(feature = "testing")]
use crate::test_support;
use crate::{Error, Kind};

/// A request for several insert locks, from [`Locks::insert_locks`](crate::Locks::insert_locks). It
/// takes all of them or none. It does nothing until one of its async methods is called.
///
/// A name that is given twice counts once.
///
/// Between processes there is no queue for such a request, so it has no `fair`: it takes the locks
/// when it finds all of them free at the same time, and may starve. A queue entry of it would block
/// a lock that is free while it waits for another one, and two such requests could block each
/// other. Callers of one process get each lock in order. It has no `run` either, because a nested
/// call enters one lock again, not several: use [`Leases::run_until_lost`].
#[derive(Debug)]
#[must_use = "this only describes locks; call `acquire` or `try_acquire`"]
pub struct InsertLocks<DB: LockDatabase> {
    context: Arc<Context<DB>>,
    names: Vec<String>,
    options: LeaseOptions,
    wait: Option<Duration>,
}

// A derived impl would require `DB: Clone`.
impl<DB: LockDatabase> Clone for InsertLocks<DB> {
    fn clone(&self) -> Self {
        Self { context: Arc::clone(&self.context), names: self.names.clone(), ..*self }
    }
}

impl<DB: LockDatabase> InsertLocks<DB> {
    pub(crate) fn new(context: Arc<Context<DB>>, names: Vec<String>) -> Self {
        Self::with(context, names, LeaseOptions::default(), None)
    }

    pub(crate) fn with(
        context: Arc<Context<DB>>,
        names: Vec<String>,
        options: LeaseOptions,
        wait: Option<Duration>,
    ) -> Self {
        // The request is in no queue: a queue entry for one lock would block that lock while the
        // others are not free.
        let options = LeaseOptions { fair: Some(false), ..options };
        Self { context, names, options, wait }
    }

    /// Sets the TTL of each lock, as [`InsertLock::ttl`](crate::InsertLock::ttl).
    pub const fn ttl(mut self, ttl: Duration) -> Self {
        self.options.ttl = Some(ttl);
        self
    }

    /// Sets the longest time for which each lock may be held, as
    /// [`InsertLock::at_most`](crate::InsertLock::at_most).
    pub const fn at_most(mut self, at_most: Duration) -> Self {
        self.options.at_most = Some(at_most);
        self
    }

    /// Sets for how long each lock stays taken at least, as
    /// [`InsertLock::at_least`](crate::InsertLock::at_least).
    pub const fn at_least(mut self, at_least: Duration) -> Self {
        self.options.at_least = at_least;
        self
    }

    /// Sets how long to wait for all of them together, as
    /// [`InsertLock::wait`](crate::InsertLock::wait).
    pub const fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Takes all of the locks together, and waits for them if necessary. While one of them is held
    /// elsewhere, none is taken.
    ///
    /// The number of round trips does not depend on the number of names.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let leases = locks.insert_locks(["account:1", "account:2"]).acquire().await?;
    /// assert!(leases.is_held());
    /// leases.release().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`InsertLock::acquire`](crate::InsertLock::acquire). [`Error::InvalidOption`] also
    /// without any name, and with more than 10 000 names.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. Locks that were granted in the meantime are released.
    pub async fn acquire(self) -> Result<Leases<DB>, Error> {
        let wait = self.context.settings().wait(self.wait)?;
        self.take(wait).await?.ok_or(Error::Closed)
    }

    /// Takes all of the locks together if all are free now. Returns `None` when one of them is
    /// held.
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire), without `Timeout`.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. Locks that were granted in the meantime are released.
    pub async fn try_acquire(self) -> Result<Option<Leases<DB>>, Error> {
        self.take(Wait::Try).await
    }

    /// Takes all of the locks in the caller's transaction, one after the other in a fixed order,
    /// with one statement for each.
    ///
    /// The transaction holds them as after
    /// [`InsertLock::acquire_in`](crate::InsertLock::acquire_in). The order is that of
    /// [`RowLocks`](crate::RowLocks). After an error, the locks that were already taken stay with
    /// the transaction until it ends.
    ///
    /// # Errors
    ///
    /// As [`RowLocks::acquire_in`](crate::RowLocks::acquire_in), but [`Error::WrongKind`] when a
    /// name is used for row locks. [`Error::InvalidOption`] also when [`at_least`](Self::at_least)
    /// or [`at_most`](Self::at_most) is set.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the transaction may or may not have the locks: roll it back.
    pub async fn acquire_in(self, transaction: &mut DB::Connection) -> Result<Vec<HeldInTransaction>, Error> {
        let wait = self.context.settings().wait(self.wait)?;
        // A request that waits gets all of them or an error.
        self.take_in(transaction, wait).await?.ok_or(Error::Closed)
    }

    /// Takes all of the locks in the caller's transaction if they are free now. Returns `None` when
    /// one of them is held. The locks before it in the order stay with the transaction until it
    /// ends. Otherwise as [`acquire_in`](Self::acquire_in).
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
        self.options.refuse_in_transaction()?;
        let held = lock_all(&self.context, &self.names, Kind::Insert, wait, transaction).await?;
        #[cfg(feature = "testing")]
        test_support::note_in_transaction(&self.context, Kind::Insert, held.iter().flatten());
        Ok(held)
    }

    async fn take(self, wait: Wait) -> Result<Option<Leases<DB>>, Error> {
        let names = in_order(&self.context, &self.names)?;
        let handles = self.context.take_leases(names, &self.options, wait).await?;
        Ok(handles.map(|handles| {
            let lease = |handle| Lease::of_caller(handle, Arc::clone(&self.context)).unwatched();
            let leases: Vec<_> = handles.into_iter().map(lease).collect();
            let leases = Watched::new(leases, |leases| leases.first().map_or("", Lease::name).into());
            Leases { leases }
        }))
    }
}

/// Several insert locks that were taken together. Each is a [`Lease`] of its own. Dropping this
/// releases all of them.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let locks = lock_db::testing::locks().await?;
/// let leases = locks.insert_locks(["b", "a"]).acquire().await?;
/// let names: Vec<_> = leases.iter().map(|lease| lease.name()).collect();
/// assert_eq!(names, ["a", "b"]);
/// let pages = leases.run_until_lost(async { 12 }).await?;
/// # let _ = pages;
/// leases.release().await?;
/// # Ok(())
/// # }
/// ```
#[must_use = "bind them to a name (`let _leases = …`); `let _ = …` releases them at once"]
#[clippy::has_significant_drop]
#[derive(Debug)]
pub struct Leases<DB: LockDatabase> {
    leases: Watched<Vec<Lease<DB>>>,
}

impl<DB: LockDatabase> Leases<DB> {
    /// The leases, in the byte order of their names.
    pub fn iter(&self) -> std::slice::Iter<'_, Lease<DB>> {
        self.leases.iter()
    }

    /// The lease of a name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Lease<DB>> {
        self.leases.iter().find(|lease| lease.name() == name)
    }

    /// Whether all of them are held.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.leases.iter().all(Lease::is_held)
    }

    /// Resolves when one of them is lost.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time: a loss is final.
    pub async fn lost(&self) {
        handles::lost(self.handles()).await;
    }

    /// How a lease was lost: the first in the order of the names that is lost. `None` while all are
    /// held.
    #[must_use]
    pub fn loss(&self) -> Option<Loss> {
        self.leases.iter().find_map(Lease::loss)
    }

    /// Runs `work` under all of the leases. When one of them is lost first, `work` is dropped at
    /// its next `.await`.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when a lease is lost before `work` has ended, or was lost while `work`
    /// blocked its thread.
    ///
    /// # Cancel safety
    ///
    /// `work` is dropped with the future. The leases are not released by that.
    pub async fn run_until_lost<F: Future>(&self, work: F) -> Result<F::Output, Error> {
        handles::run_until_lost(|| self.handles(), work).await
    }

    /// Begins a transaction that commits only while all of these leases are held, as
    /// [`Lease::begin`].
    ///
    /// [`commit`](GuardedTransaction::commit) checks each lease with a message of its own. Only the
    /// last check and the COMMIT are one message. A host that vanishes between them keeps the locks
    /// as after [`Lease::verify_in`]: on PostgreSQL for one TTL at most, on MySQL and MariaDB until
    /// the server notices that the connection is gone. Release the locks with
    /// [`release`](Self::release) after the commit.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let leases = locks.insert_locks(["account:1", "account:2"]).acquire().await?;
    /// let transaction = leases.begin().await?;
    /// // … statements on `&mut *transaction` …
    /// transaction.commit().await?;
    /// leases.release().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Lease::begin`], for the first lease that fails.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. A transaction that was begun in the meantime is
    /// rolled back.
    pub async fn begin(&self) -> Result<GuardedTransaction<DB>, Error> {
        begin_under(&self.leases.iter().collect::<Vec<_>>()).await
    }

    /// Checks, in a transaction of the caller, that all of the leases are held, and keeps other
    /// requests from taking the locks until the transaction ends. As [`Lease::verify_in`], for each
    /// of them.
    ///
    /// # Errors
    ///
    /// As [`Lease::verify_in`], for the first lease that fails.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, roll the transaction back: it is unknown whether the leases were
    /// held.
    pub async fn verify_in(&self, transaction: &mut DB::Connection) -> Result<(), Error> {
        for lease in self.leases.iter() {
            lease.verify_in(transaction).await?;
        }
        Ok(())
    }

    /// Releases all of the locks together with the commit of the caller's transaction. As
    /// [`Lease::release_in`], for each of them.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let leases = locks.insert_locks(["account:1", "account:2"]).acquire().await?;
    /// let mut transaction = locks.pool().begin().await?;
    /// // … statements on `&mut *transaction` …
    /// leases.release_in(&mut transaction).await?;
    /// transaction.commit().await?;    // the locks are free from here on
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`Lease::release_in`], for the first lease that fails. Roll the transaction back: no lock
    /// is released then.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, roll the transaction back.
    pub async fn release_in(&self, transaction: &mut DB::Connection) -> Result<(), Error> {
        for lease in self.leases.iter() {
            lease.release_in(transaction).await?;
        }
        Ok(())
    }

    /// Releases all of the locks, and waits until the database has confirmed it.
    ///
    /// The releases are sent together, so many take as long as a few.
    ///
    /// # Errors
    ///
    /// As [`Lease::release`], for the first lease that fails. The others are released in any case.
    ///
    /// # Cancel safety
    ///
    /// The releases continue when the future is dropped. Only their result is lost.
    pub async fn release(self) -> Result<(), Error> {
        handles::release(self.leases.into_inner().into_iter().map(Lease::into_handle)).await
    }

    fn handles(&self) -> impl Iterator<Item = &LeaseHandle> {
        self.leases.iter().map(Lease::handle)
    }
}

/// See [`Leases::begin`]. There is at least one lease.
pub(crate) async fn begin_under<DB: LockDatabase>(
    leases: &[&Lease<DB>],
) -> Result<GuardedTransaction<DB>, Error> {
    let handles: Vec<_> = leases.iter().map(|lease| lease.shared_handle()).collect();
    GuardedTransaction::begin(&leases[0].context, &handles).await
}

/// Turns this into its leases. Each is released when it is dropped.
impl<DB: LockDatabase> IntoIterator for Leases<DB> {
    type Item = Lease<DB>;
    type IntoIter = std::vec::IntoIter<Lease<DB>>;

    fn into_iter(self) -> Self::IntoIter {
        self.leases.into_inner().into_iter()
    }
}

impl<'a, DB: LockDatabase> IntoIterator for &'a Leases<DB> {
    type Item = &'a Lease<DB>;
    type IntoIter = std::slice::Iter<'a, Lease<DB>>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}
