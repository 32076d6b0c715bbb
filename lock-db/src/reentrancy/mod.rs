//! Reentrancy: `run` and annotated functions enter a lock again from within its holder, without
//! being given its guard.
//!
//! Async Rust has no identity for "this chain of calls". All `join!`ed siblings share a task id and
//! a task-local, and both end at `spawn`. If a task were the owner of a lock, all its siblings
//! would be inside at once. So a task-local here does not carry who calls but where: the **scopes**
//! of the holders that the calling code is inside of, innermost first.
//!
//! - A call on a name that has a scope passes the **gate** of the nearest such scope. The gate lets
//!   one call in at a time. The call then gets a scope of its own, inside that one. Siblings of any
//!   kind (`join!`, `select!`, `buffer_unordered`) find the same scope and queue at the same gate,
//!   in memory. A nested call finds the next gate open.
//! - Nothing has to be undone: what a call has is dropped with its future.
//! - A scope never keeps a lock. The calls do, each with its own handle, so the lock ends with the
//!   last of them. A scope has only a weak reference to the lock.
//! - A scope belongs to one [`Locks`](crate::Locks) and its clones. Another `Locks` is another
//!   owner, as another process is.
//!
//! This module knows neither leases nor rows, only that something is [`Held`].

mod context;
mod gate;
mod scope;

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

pub use self::context::ReentryContext;
pub(crate) use self::scope::{Entered, Inside, enter, refuse_nested};
use crate::error::Loss;
use crate::name::Name;
use crate::{Error, Kind};

/// What holds a lock as long as a handle to it exists.
pub(crate) trait Held: Any + Send + Sync {
    const KIND: Kind;

    /// Fails when the lock is lost.
    fn check(&self) -> Result<(), Error>;

    /// Where a loss is reported. `None`: a loss is not noticed while the lock is held.
    fn loss(&self) -> Option<watch::Receiver<Option<Loss>>>;
}

/// Identifies one `Locks`. Never used again, even when that `Locks` is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Instance(u64);

impl Instance {
    pub(crate) fn new() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(LAST.fetch_add(1, Ordering::Relaxed))
    }
}

/// The name of a lock within one `Locks`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReentryKey {
    pub(crate) locks: Instance,
    pub(crate) name: Name,
}

/// A scope as `testing` shows it.
#[cfg(feature = "testing")]
pub(crate) struct Enclosing {
    pub(crate) locks: Instance,
    pub(crate) name: Name,
    pub(crate) kind: Kind,
    /// Neither released nor lost.
    pub(crate) is_held: bool,
}

/// The scopes of the calling code, innermost first.
#[cfg(feature = "testing")]
pub(crate) fn enclosing() -> Vec<Enclosing> {
    scope::Scopes::current().map(|scopes| scopes.list()).unwrap_or_default()
}

#[cfg(all(test, lock_db_shuttle))]
mod interleavings;
#[cfg(test)]
mod tests;
