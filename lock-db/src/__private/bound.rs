//! Guards that the body of an annotated function binds: `lease = …`.
//!
//! The body is created before the lock is taken, and the lock is ended after the body. So the guard
//! passes to the body and back through a slot.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::TakesLocks;

use crate::database::LockDatabase;
use crate::global::{HeldLock, IntoLease as _};
use crate::{Error, RowGuard};

/// The mutex is never waited for. It makes a guard shareable that is not `Sync`.
pub(super) type Slot<G> = Arc<Mutex<Option<G>>>;

fn slot<G>(slot: &Slot<G>) -> MutexGuard<'_, Option<G>> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the body finds the guard.
pub struct Binding<G>(Slot<G>);

impl<G> Binding<G> {
    pub(super) fn new() -> (Self, Slot<G>) {
        let slot = Slot::default();
        (Self(Arc::clone(&slot)), slot)
    }

    /// For the body, when the lock is held.
    #[must_use]
    pub fn bound(self) -> Bound<G> {
        let guard = slot(&self.0).take();
        Bound { guard, slot: self.0 }
    }
}

/// The guard in the body. It goes back into the slot when the body has ended.
pub struct Bound<G> {
    guard: Option<G>,
    slot: Slot<G>,
}

impl<G> Deref for Bound<G> {
    type Target = G;

    fn deref(&self) -> &G {
        let Some(guard) = &self.guard else {
            unreachable!("a function that binds its guard does not run without it")
        };
        guard
    }
}

impl<G> DerefMut for Bound<G> {
    fn deref_mut(&mut self) -> &mut G {
        let Some(guard) = &mut self.guard else {
            unreachable!("a function that binds its guard does not run without it")
        };
        guard
    }
}

impl<G> Drop for Bound<G> {
    fn drop(&mut self) {
        *slot(&self.slot) = self.guard.take();
    }
}

/// The other end of a [`Binding`].
pub(super) trait Binds: Send {
    /// Called when the lock is held.
    fn bind(&self, taken: &mut HeldLock) -> Result<(), Error>;

    /// Called when the body has ended or was dropped.
    fn unbind(&self, taken: &mut HeldLock);
}

/// `L`: where the lease comes from.
pub(super) struct BindsLease<L: TakesLocks> {
    pub(super) locks: L,
    pub(super) slot: Slot<L::Lease>,
}

impl<L: TakesLocks + Send> Binds for BindsLease<L> {
    fn bind(&self, taken: &mut HeldLock) -> Result<(), Error> {
        if let HeldLock::Lease(call) = taken
            && let Some(handle) = call.handle.take()
        {
            *slot(&self.slot) = Some(self.locks.lease_of(handle)?);
        }
        Ok(())
    }

    fn unbind(&self, taken: &mut HeldLock) {
        let lease = slot(&self.slot).take();
        if let (HeldLock::Lease(call), Some(lease)) = (taken, lease) {
            call.handle = Some(lease.into_handle());
        }
    }
}

pub(super) struct BindsGuard<DB: LockDatabase>(pub(super) Slot<RowGuard<DB>>);

impl<DB: LockDatabase> Binds for BindsGuard<DB> {
    /// # Errors
    ///
    /// [`Error::Reentry`] when another body works with the transaction.
    fn bind(&self, taken: &mut HeldLock) -> Result<(), Error> {
        if let HeldLock::Row(call) = taken {
            *slot(&self.0) = Some(call.take_guard()?);
        }
        Ok(())
    }

    fn unbind(&self, taken: &mut HeldLock) {
        let guard = slot(&self.0).take();
        if let (HeldLock::Row(call), Some(guard)) = (taken, guard) {
            call.put_guard_back(guard);
        }
    }
}
