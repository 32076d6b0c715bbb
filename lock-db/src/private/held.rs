//! Locks that annotated functions hold: running the body under one, and ending it.

use std::sync::Arc;

use crate::ambient::{AmbientLease, RowCall};
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

/// A row lock in a transaction that annotated functions share.
pub struct HeldRow {
    /// `None` inside of `testing::without_locks`.
    pub(crate) taken: Option<RowCall>,
}

impl HeldRow {
    pub async fn run<F: Future>(&self, body: F) -> F::Output {
        match &self.taken {
            Some(call) => call.run(body).await,
            None => body.await,
        }
    }

    /// An error of the function is returned as it is. Its `Ok` is replaced by an error when the transaction was not
    /// committed, as far as that is known when the call ends.
    pub async fn end<T>(self, output: T, stands: bool) -> Result<T, Error> {
        if let Some(call) = self.taken {
            let ended = call.end(stands).await;
            if stands {
                ended?;
            }
        }
        Ok(output)
    }
}

/// A row lock with whose transaction the body works.
pub struct HeldRowGuard<DB: LockDatabase> {
    guard: Option<RowGuard<DB>>,
    held: HeldRow,
}

impl<DB: LockDatabase> HeldRowGuard<DB> {
    /// # Errors
    ///
    /// [`Error::Reentry`] when another body works with the transaction.
    pub(crate) fn bind(held: HeldRow, name: &str) -> Result<Self, Error> {
        let Some(call) = &held.taken else {
            unreachable!("a function that binds its guard does not run without it")
        };
        match call.take_guard(name) {
            Ok(guard) => Ok(Self { guard: Some(guard), held }),
            Err(error) => {
                held.taken.into_iter().for_each(RowCall::withdraw);
                Err(error)
            }
        }
    }

    pub fn parts(&mut self) -> (&mut RowGuard<DB>, &HeldRow) {
        let Some(guard) = &mut self.guard else {
            unreachable!("the guard is taken by what consumes or drops this")
        };
        (guard, &self.held)
    }

    pub async fn end<T>(mut self, output: T, stands: bool) -> Result<T, Error> {
        self.put_guard_back();
        let held = HeldRow { taken: self.held.taken.take() };
        held.end(output, stands).await
    }

    fn put_guard_back(&mut self) {
        if let (Some(guard), Some(call)) = (self.guard.take(), &self.held.taken) {
            call.put_guard_back(guard);
        }
    }
}

/// The calls around this one need the guard, however its body ends.
impl<DB: LockDatabase> Drop for HeldRowGuard<DB> {
    fn drop(&mut self) {
        self.put_guard_back();
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
