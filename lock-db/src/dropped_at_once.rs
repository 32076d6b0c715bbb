//! `let _ = locks.insert_lock("a").acquire().await?;` compiles, and releases the lock at once: the work below runs without
//! it, and nothing shows that. `#[must_use]` says nothing about `let _ =`, which the compiler takes for an answer; its lint
//! that does, `let_underscore_drop`, is off unless a crate switches it on; and the one that is on, `let_underscore_lock`, knows
//! the guards of the standard library only. So builds with debug assertions say when it happens, at level INFO: a guard that was not
//! looked at is dropped in the very microseconds in which it was handed out.
//!
//! It is no WARN, because `drop(lock.acquire().await?)` looks the same. Else a false alarm needs a guard that is bound, never looked at, and dropped within [`AT_ONCE`]: a critical section without
//! an `.await`, and then no other process can have been kept from anything that takes time. The other way round a `let _ =` is
//! missed when the thread is interrupted just there; it is there again the next time. Programs that are built for release pay
//! and say nothing.

use std::ops::{Deref, DerefMut};
#[cfg(debug_assertions)]
use std::sync::atomic::{AtomicBool, Ordering};
#[cfg(debug_assertions)]
use std::time::{Duration, Instant};

#[cfg(debug_assertions)]
use crate::name::escaped;

#[cfg(debug_assertions)]
const AT_ONCE: Duration = Duration::from_micros(20);

/// What a guard keeps, and whether anybody has looked at it.
pub(crate) struct Watched<T> {
    /// In front: dropped before what is kept takes its time.
    #[cfg(debug_assertions)]
    watch: Watch,
    kept: T,
}

#[cfg(debug_assertions)]
struct Watch {
    name: Box<str>,
    handed_out: Instant,
    is_used: AtomicBool,
}

impl<T> Watched<T> {
    /// For a guard that is about to be handed out, of the lock of this name.
    #[cfg_attr(not(debug_assertions), allow(unused_variables))]
    pub(crate) fn new(kept: T, name: impl FnOnce(&T) -> Box<str>) -> Self {
        #[cfg(debug_assertions)]
        let watch = Watch { name: name(&kept), handed_out: Instant::now(), is_used: AtomicBool::new(false) };
        Self {
            #[cfg(debug_assertions)]
            watch,
            kept,
        }
    }

    /// For one whose drop says nothing.
    pub(crate) fn unwatched(kept: T) -> Self {
        let unwatched = Self::new(kept, |_| Box::default());
        unwatched.is_used();
        unwatched
    }

    /// It is handed out now: what has come to its caller by way of another task was made earlier.
    #[cfg_attr(
        not(debug_assertions),
        allow(unused_variables, clippy::unused_self, clippy::needless_pass_by_ref_mut)
    )]
    pub(crate) fn is_handed_out(&mut self, name: &str) {
        #[cfg(debug_assertions)]
        {
            self.watch =
                Watch { name: name.into(), handed_out: Instant::now(), is_used: AtomicBool::new(false) };
        }
    }

    pub(crate) fn into_inner(self) -> T {
        self.is_used();
        self.kept
    }

    fn is_used(&self) {
        #[cfg(debug_assertions)]
        self.watch.is_used.store(true, Ordering::Relaxed);
    }
}

impl<T> Deref for Watched<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.is_used();
        &self.kept
    }
}

impl<T> DerefMut for Watched<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.is_used();
        &mut self.kept
    }
}

impl<T: std::fmt::Debug> std::fmt::Debug for Watched<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.kept.fmt(formatter)
    }
}

#[cfg(debug_assertions)]
impl Drop for Watch {
    fn drop(&mut self) {
        let held_for = self.handed_out.elapsed();
        if held_for < AT_ONCE && !*self.is_used.get_mut() && !std::thread::panicking() {
            tracing::info!(
                lock = %escaped(&self.name),
                ?held_for,
                "released as soon as it was taken, and never used: if that was `let _ = …`, bind the guard to a name \
                 (`let _lease = …`); the lint `let_underscore_drop` finds such places"
            );
        }
    }
}
