//! What the code that `#[distributed_lock]` writes calls. Not part of the public interface: it changes together with
//! the macro, which is released in the same version.
//!
//! Each annotated function is compiled with its own copy of what is generic over its body, and each nested call has the
//! frames of all that polls on its stack. So as little as possible is generic here, and little of it is polled around a body:
//! [`run`] and [`Call`] only hand on, and `call.rs` does the work, once for all functions.

#[path = "private/ask.rs"]
mod ask;
#[path = "private/bound.rs"]
mod bound;
#[path = "private/call.rs"]
mod call;
#[path = "private/name.rs"]
mod name;
#[path = "private/output.rs"]
mod output;
#[path = "private/transaction.rs"]
mod transaction;

use std::sync::Arc;

pub use self::ask::{Ask, ask};
pub use self::bound::{Binding, Bound, LeaseHandle};
use self::bound::{BindsGuard, BindsLease};
pub use self::call::{Call, Lock, run, run_or_skip, run_row, run_row_or_skip};
pub(crate) use self::call::{Taken, TakingLock};
pub use self::name::{NamesLock, name};
pub use self::output::{LockedOutput, SkippableOutput};
pub use self::transaction::{HeldIn, IsTransaction, row_in, run_in, transaction};
use crate::ambient::{self, AmbientLease, AnyLocks};
use crate::database::LockDatabase;
use crate::insert::Hold;
use crate::{Error, Lease, Locks, RowGuard};

/// Where an annotated function finds its locks when it names none: in its task, else in its process.
#[derive(Clone)]
pub struct Source(Option<Arc<dyn AnyLocks>>);

impl Source {
    fn locks(&self, name: &str) -> Result<Arc<dyn AnyLocks>, Error> {
        self.0.clone().ok_or_else(|| ambient::not_installed(name, "no `Locks` is installed".into()))
    }
}

/// The `Locks` of the task, else of the process. That there is none is said when it is used.
#[must_use]
pub fn ambient() -> Source {
    Source(ambient::current())
}

/// A `Locks` that was named: `locks = …`.
#[must_use]
pub fn explicit<DB: LockDatabase>(locks: &Locks<DB>) -> Locks<DB> {
    locks.clone()
}

/// What `locks = …` and its absence have in common.
pub trait TakesLocks: Clone + Send + 'static {
    /// What the body sees of an insert lock.
    type Lease: LeaseHandle;

    /// The same, whatever the database: what follows is compiled once, and not for each function.
    fn source(self) -> Source;

    #[allow(private_interfaces)]
    fn lease_of(&self, hold: Arc<Hold>) -> Result<Self::Lease, Error>;
}

impl TakesLocks for Source {
    type Lease = AmbientLease;

    fn source(self) -> Source {
        self
    }

    #[allow(private_interfaces)]
    fn lease_of(&self, hold: Arc<Hold>) -> Result<AmbientLease, Error> {
        let lease = self.locks(hold.name().shown())?.lease_of(hold);
        Ok(AmbientLease { lease })
    }
}

impl<DB: LockDatabase> TakesLocks for Locks<DB> {
    type Lease = Lease<DB>;

    fn source(self) -> Source {
        Source(Some(Arc::new(self)))
    }

    #[allow(private_interfaces)]
    fn lease_of(&self, hold: Arc<Hold>) -> Result<Lease<DB>, Error> {
        Ok(Lease::new(hold, self.clone()))
    }
}

/// Takes an insert lock, or enters it again.
#[must_use]
pub fn insert(locks: impl TakesLocks, ask: Box<Ask>) -> Lock {
    take(&locks.source(), ask, AnyLocks::lease)
}

/// Takes a row lock in a transaction of its own, or enters it again.
#[must_use]
pub fn row(locks: impl TakesLocks, ask: Box<Ask>) -> Lock {
    take(&locks.source(), ask, AnyLocks::row)
}

/// Takes an insert lock as [`insert`], whose lease the body binds.
#[must_use]
pub fn insert_bound<L: TakesLocks>(locks: L, mut ask: Box<Ask>) -> (Lock, Binding<L::Lease>) {
    ask.binds();
    let (binding, slot) = Binding::new();
    (insert(locks.clone(), ask).binding(BindsLease { locks, slot }), binding)
}

/// Takes a row lock as [`row`], whose guard the body binds.
#[must_use]
pub fn row_bound<DB: LockDatabase>(locks: Locks<DB>, mut ask: Box<Ask>) -> (Lock, Binding<RowGuard<DB>>) {
    ask.binds();
    let (binding, slot) = Binding::new();
    (row(locks, ask).binding(BindsGuard(slot)), binding)
}

fn take(source: &Source, ask: Box<Ask>, from: fn(Arc<dyn AnyLocks>, Box<Ask>) -> TakingLock) -> Lock {
    #[cfg(feature = "testing")]
    match ask.is_switched_off() {
        Ok(false) => {}
        Ok(true) => return Lock::switched_off(),
        Err(error) => return Lock::refused(error),
    }
    match source.locks(&ask.name) {
        Ok(locks) => Lock::taking(from(locks, ask)),
        Err(error) => Lock::refused(error),
    }
}

/// For an answer that is never given.
#[must_use]
pub fn closed() -> Error {
    Error::Closed
}
