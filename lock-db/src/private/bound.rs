//! Guards that the body of an annotated function binds: `lease = …`.
//!
//! The body is made before the lock is taken, and the lock is ended after it. So the guard comes to it and goes back by way
//! of a slot.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::TakesLocks;
use super::call::Taken;
use crate::ambient::AmbientLease;
use crate::database::LockDatabase;
use crate::insert::Hold;
use crate::{Error, Lease, RowGuard};

/// Never waited for: it makes a guard shareable that is not.
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

/// The guard in the body. It goes back when the body has ended.
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
    /// The lock is held.
    fn bind(&self, taken: &mut Taken) -> Result<(), Error>;

    /// The body is gone.
    fn unbind(&self, taken: &mut Taken);
}

/// `L`: where the lease comes from.
pub(super) struct BindsLease<L: TakesLocks> {
    pub(super) locks: L,
    pub(super) slot: Slot<L::Lease>,
}

impl<L: TakesLocks + Send> Binds for BindsLease<L> {
    fn bind(&self, taken: &mut Taken) -> Result<(), Error> {
        if let Taken::Lease(call) = taken
            && let Some(hold) = call.hold.take()
        {
            *slot(&self.slot) = Some(self.locks.lease_of(hold)?);
        }
        Ok(())
    }

    fn unbind(&self, taken: &mut Taken) {
        let lease = slot(&self.slot).take();
        if let (Taken::Lease(call), Some(lease)) = (taken, lease) {
            call.hold = Some(lease.into_hold());
        }
    }
}

pub(super) struct BindsGuard<DB: LockDatabase>(pub(super) Slot<RowGuard<DB>>);

impl<DB: LockDatabase> Binds for BindsGuard<DB> {
    /// # Errors
    ///
    /// [`Error::Reentry`] when another body works with the transaction.
    fn bind(&self, taken: &mut Taken) -> Result<(), Error> {
        if let Taken::Row(call) = taken {
            *slot(&self.0) = Some(call.take_guard()?);
        }
        Ok(())
    }

    fn unbind(&self, taken: &mut Taken) {
        let guard = slot(&self.0).take();
        if let (Taken::Row(call), Some(guard)) = (taken, guard) {
            call.put_guard_back(guard);
        }
    }
}

/// The lease of whatever database.
pub trait LeaseHandle: Send + 'static {
    #[allow(private_interfaces)]
    fn into_hold(self) -> Arc<Hold>;
}

impl<DB: LockDatabase> LeaseHandle for Lease<DB> {
    #[allow(private_interfaces)]
    fn into_hold(self) -> Arc<Hold> {
        Self::into_hold(self)
    }
}

impl LeaseHandle for AmbientLease {
    #[allow(private_interfaces)]
    fn into_hold(self) -> Arc<Hold> {
        self.lease.into_hold()
    }
}
