//! Several insert locks at once.

use std::time::Duration;

use super::{Lease, LeaseOptions};
use crate::database::LockDatabase;
use crate::dropped_at_once::Watched;
use crate::in_transaction::{HeldInTransaction, in_order, lock_all};
use crate::{Error, Kind, Locks, limits};

/// A request for several insert locks, from [`Locks::insert_locks`]: all or none. Nothing happens before one of its async
/// methods is called.
///
/// A name that is given twice counts once.
#[derive(Debug)]
#[must_use = "this only describes locks; call `acquire` or `try_acquire`"]
pub struct InsertLocks<DB: LockDatabase> {
    locks: Locks<DB>,
    names: Vec<String>,
    options: LeaseOptions,
    wait: Option<Duration>,
}

// Derived, it would ask for a database type that can be cloned.
impl<DB: LockDatabase> Clone for InsertLocks<DB> {
    fn clone(&self) -> Self {
        Self { locks: self.locks.clone(), names: self.names.clone(), ..*self }
    }
}

impl<DB: LockDatabase> InsertLocks<DB> {
    pub(crate) fn new(locks: Locks<DB>, names: Vec<String>) -> Self {
        // They stand in no queue: a place in one of them would keep that lock from everybody while the others are not free.
        let options = LeaseOptions { fair: Some(false), ..LeaseOptions::default() };
        Self { locks, names, options, wait: None }
    }

    /// As [`InsertLock::ttl`](crate::InsertLock::ttl), for each of them.
    pub const fn ttl(mut self, ttl: Duration) -> Self {
        self.options.ttl = Some(ttl);
        self
    }

    /// As [`InsertLock::at_most`](crate::InsertLock::at_most), for each of them.
    pub const fn at_most(mut self, at_most: Duration) -> Self {
        self.options.at_most = Some(at_most);
        self
    }

    /// As [`InsertLock::wait`](crate::InsertLock::wait), for all of them together.
    pub const fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Takes all of them together: as long as one of them is held by somebody else, none is taken. Between processes that is no
    /// place in a queue: they are taken when they happen to be free at the same time. The number of round trips does not depend on
    /// the number of names.
    ///
    /// # Errors
    ///
    /// As [`InsertLock::acquire`](crate::InsertLock::acquire); [`Error::InvalidOption`] without any name, and with more than
    /// 10 000 of them.
    ///
    /// # Cancel safety
    ///
    /// As [`InsertLock::acquire`](crate::InsertLock::acquire).
    pub async fn acquire(self) -> Result<Leases<DB>, Error> {
        let wait = limits::check_wait(self.wait.unwrap_or(self.locks.default_wait()))?;
        self.take(Some(wait)).await?.ok_or(Error::Closed)
    }

    /// Takes all of them together if all are free now.
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire), without `Timeout`.
    ///
    /// # Cancel safety
    ///
    /// As [`acquire`](Self::acquire).
    pub async fn try_acquire(self) -> Result<Option<Leases<DB>>, Error> {
        self.take(None).await
    }

    /// Takes all of them in the caller's transaction, one after the other in one order, with a statement for each. As
    /// [`InsertLock::acquire_in`](crate::InsertLock::acquire_in) and
    /// [`RowLocks::acquire_in`](crate::RowLocks::acquire_in).
    ///
    /// # Errors
    ///
    /// As [`RowLocks::acquire_in`](crate::RowLocks::acquire_in).
    ///
    /// # Cancel safety
    ///
    /// As [`RowLock::acquire_in`](crate::RowLock::acquire_in).
    pub async fn acquire_in(self, transaction: &mut DB::Connection) -> Result<Vec<HeldInTransaction>, Error> {
        let wait = limits::check_wait(self.wait.unwrap_or(self.locks.default_wait()))?;
        self.options.refuse_in_transaction()?;
        let held = lock_all(&self.locks, &self.names, Kind::Insert, Some(wait), transaction).await?;
        #[cfg(feature = "testing")]
        self.locks.are_in_transaction(Kind::Insert, held.iter().flatten());
        // Whoever waits gets them all or an error.
        held.ok_or(Error::Closed)
    }

    async fn take(self, wait: Option<Duration>) -> Result<Option<Leases<DB>>, Error> {
        let names = in_order(&self.locks, &self.names)?;
        let holds = self.locks.hold_all(names, &self.options, wait).await?;
        Ok(holds.map(|holds| {
            let lease = |hold| Lease::of_caller(hold, self.locks.clone()).unwatched();
            let leases: Vec<_> = holds.into_iter().map(lease).collect();
            Leases { leases: Watched::new(leases, |leases| leases.first().map_or("", Lease::name).into()) }
        }))
    }
}

/// Several insert locks that were taken together. Each is a [`Lease`] of its own; dropping this releases them all.
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
    /// May be dropped at any time: a loss is final.
    pub async fn lost(&self) {
        let mut waiting: Vec<_> = self.leases.iter().map(|lease| Box::pin(lease.lost())).collect();
        std::future::poll_fn(|context| {
            let lost = waiting.iter_mut().any(|lost| lost.as_mut().poll(context).is_ready());
            if lost { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
    }

    /// Makes sure, in a transaction of the caller's own, that all of them are ours to its end. As [`Lease::verify_in`].
    ///
    /// # Errors
    ///
    /// As [`Lease::verify_in`].
    ///
    /// # Cancel safety
    ///
    /// As [`Lease::verify_in`].
    pub async fn verify_in(&self, transaction: &mut DB::Connection) -> Result<(), Error> {
        for lease in self.leases.iter() {
            lease.verify_in(transaction).await?;
        }
        Ok(())
    }

    /// Releases all of them, and waits for it.
    ///
    /// # Errors
    ///
    /// The first one of [`Lease::release`]; the others are released all the same. They travel together: it takes as long for many
    /// as for a few.
    ///
    /// # Cancel safety
    ///
    /// The releases go on when the future is dropped; only the answer is lost.
    pub async fn release(self) -> Result<(), Error> {
        // All of them are on their way before the first is waited for, so that they travel together.
        let released: Vec<_> = self.leases.into_inner().into_iter().map(Lease::begin_to_release).collect();
        let mut result = Ok(());
        for released in released {
            let released = match released {
                Ok(under_way) => under_way.end().await,
                Err(error) => Err(error),
            };
            result = result.and(released);
        }
        result
    }
}

impl<'a, DB: LockDatabase> IntoIterator for &'a Leases<DB> {
    type Item = &'a Lease<DB>;
    type IntoIter = std::slice::Iter<'a, Lease<DB>>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}
