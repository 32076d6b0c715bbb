//! Entering a lock again from within its own holder, without being handed its guard: `run` and annotated functions.
//!
//! Async Rust has no identity that means "this chain of calls". A task's id is the same for all `join!`ed siblings, and so
//! is a task-local; both end at `spawn`. Taken for the owner of a lock, a task would have all its siblings inside at once.
//! So what a task-local carries here is not who is calling but where: the **frames** of the holders that the calling code
//! is inside of, innermost first.
//!
//! - A call on a name for which there is a frame passes the **gate** of the nearest one, which lets one call in at a time,
//!   and becomes a frame of its own within it. Siblings of whatever kind (`join!`, `select!`, `buffer_unordered`) find the
//!   same frame and queue at the same gate, in memory; nesting deeper finds the next gate open.
//! - Nothing has to be undone: what a call has is dropped with its future.
//! - A frame never keeps a lock. Its calls do, each with a handle of its own, so the lock ends with the last of them; a
//!   frame only knows the way to it, which leads nowhere afterwards.
//! - A frame belongs to one [`Locks`](crate::Locks) and its clones. Another one is another owner, as another process is.
//!
//! This room knows neither leases nor rows, only that something is [`Held`].

mod frame;
mod gate;
mod owner;

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::watch;

pub(crate) use self::frame::{Entered, Inside, enter, refuse_nested};
pub use self::owner::Owner;
use crate::error::Loss;
use crate::name::Name;
use crate::{Error, Kind};

/// What keeps a lock as long as somebody has a handle to it.
pub(crate) trait Held: Any + Send + Sync {
    const KIND: Kind;

    /// Fails when the lock is lost.
    fn check(&self) -> Result<(), Error>;

    /// Where a loss is told. `None`: nobody notices one while the lock is held.
    fn loss(&self) -> Option<watch::Receiver<Option<Loss>>>;
}

/// Tells one `Locks` from another, also from one that is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instance(u64);

impl Instance {
    pub(crate) fn new() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(LAST.fetch_add(1, Ordering::Relaxed))
    }
}

/// A name as one `Locks` knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lock {
    pub(crate) locks: Instance,
    pub(crate) name: Name,
}

/// A frame, as somebody sees it who wants to know where he is.
#[cfg(feature = "testing")]
pub(crate) struct Around {
    pub(crate) locks: Instance,
    pub(crate) name: Name,
    pub(crate) kind: Kind,
    /// Neither released nor lost.
    pub(crate) is_held: bool,
}

/// The frames around the calling code, the innermost first.
#[cfg(feature = "testing")]
pub(crate) fn around() -> Vec<Around> {
    frame::Frames::current().map(|frames| frames.list()).unwrap_or_default()
}

#[cfg(all(test, lock_db_shuttle))]
mod interleavings;
#[cfg(test)]
mod tests;
