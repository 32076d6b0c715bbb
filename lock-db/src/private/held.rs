//! Locks that annotated functions hold: running the body under one, and ending it.

use std::sync::Arc;

use crate::ambient::{AmbientLease, OwnTransaction};
use crate::database::LockDatabase;
use crate::in_transaction::HeldInTransaction;
use crate::insert::{Hold, release_quietly};
use crate::reentry::Inside;
use crate::row::RowGuard;
use crate::{Error, Lease};

/// An insert lock: `L` is what the body sees of it.
pub struct HeldLease<L> {
    /// The lease in front: the next sibling gets in when this handle is gone. `None` inside of `testing::without_locks`.
    pub(crate) taken: Option<(L, Inside)>,
}

#[allow(private_bounds)]
impl<L: LeaseHandle> HeldLease<L> {
    /// For the body.
    pub fn lease(&self) -> &L {
        let Some((lease, _)) = &self.taken else {
            unreachable!("a function that binds its lease does not run without it")
        };
        lease
    }

    /// When the lease is lost first, the body is dropped where it stands.
    pub async fn run<F: Future>(&self, body: F) -> Result<F::Output, Error> {
        match &self.taken {
            Some((lease, inside)) => inside.scope(lease.hold().run_until_lost(body)).await,
            None => Ok(body.await),
        }
    }

    pub async fn end<T>(self, outcome: Result<T, Error>) -> Result<T, Error> {
        let output = outcome?;
        if let Some((lease, inside)) = self.taken {
            release_quietly(lease.into_hold().give_up().await);
            drop(inside);
        }
        Ok(output)
    }
}

/// The lease of whatever database.
pub(crate) trait LeaseHandle {
    fn hold(&self) -> &Hold;

    fn into_hold(self) -> Arc<Hold>;
}

impl<DB: LockDatabase> LeaseHandle for Lease<DB> {
    fn hold(&self) -> &Hold {
        &self.hold
    }

    fn into_hold(self) -> Arc<Hold> {
        self.hold
    }
}

impl LeaseHandle for AmbientLease {
    fn hold(&self) -> &Hold {
        self.lease.hold()
    }

    fn into_hold(self) -> Arc<Hold> {
        self.lease.into_hold()
    }
}

/// A row lock in a transaction that nobody but annotated functions knows of.
pub struct HeldRow {
    /// `None` inside of `testing::without_locks`.
    pub(crate) taken: Option<(Arc<OwnTransaction>, Inside)>,
}

impl HeldRow {
    pub async fn run<F: Future>(&self, body: F) -> F::Output {
        match &self.taken {
            Some((_, inside)) => inside.scope(body).await,
            None => body.await,
        }
    }

    /// That a row lock is gone is told as an error, also after the body: nobody can say since when.
    pub async fn end<T>(self, output: T, stands: bool) -> Result<T, Error> {
        if let Some((own, inside)) = self.taken {
            let ended = own.give_up(stands).await;
            drop(inside);
            ended?;
        }
        Ok(output)
    }
}

/// A row lock with whose transaction the body works.
pub struct HeldRowGuard<DB: LockDatabase> {
    bound: Bound<DB>,
    inside: InsideRow,
}

impl<DB: LockDatabase> HeldRowGuard<DB> {
    /// # Errors
    ///
    /// [`Error::Reentry`] when a call around this one works with the transaction.
    pub(crate) fn bind(held: HeldRow, name: &str) -> Result<Self, Error> {
        let Some((own, inside)) = held.taken else {
            unreachable!("a function that binds its guard does not run without it")
        };
        let guard = own.take::<DB>(name)?;
        Ok(Self { bound: Bound { guard: Some(guard), own }, inside: InsideRow(inside) })
    }

    pub fn parts(&mut self) -> (&mut RowGuard<DB>, &InsideRow) {
        let Some(guard) = &mut self.bound.guard else {
            unreachable!("the guard is taken by what consumes or drops this")
        };
        (guard, &self.inside)
    }

    pub async fn end<T>(self, output: T, stands: bool) -> Result<T, Error> {
        let Self { bound, inside: InsideRow(inside) } = self;
        let own = Arc::clone(&bound.own);
        drop(bound);
        HeldRow { taken: Some((own, inside)) }.end(output, stands).await
    }
}

pub struct InsideRow(Inside);

impl InsideRow {
    pub async fn run<F: Future>(&self, body: F) -> F::Output {
        self.0.scope(body).await
    }
}

/// A lock in the caller's transaction, which ends it.
pub struct HeldIn {
    /// `None` inside of `testing::without_locks`.
    pub(crate) held: Option<HeldInTransaction>,
}

impl HeldIn {
    pub async fn run<F: Future>(self, body: F) -> F::Output {
        #[cfg(feature = "testing")]
        let body = crate::testing::inside_of(self.held.as_ref(), body);
        let output = body.await;
        drop(self.held);
        output
    }
}

/// Gives the guard back, however the body ends: the calls around it still need it.
struct Bound<DB: LockDatabase> {
    guard: Option<RowGuard<DB>>,
    own: Arc<OwnTransaction>,
}

impl<DB: LockDatabase> Drop for Bound<DB> {
    fn drop(&mut self) {
        if let Some(guard) = self.guard.take() {
            self.own.put_back(guard);
        }
    }
}
