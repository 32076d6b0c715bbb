//! Detects guards that are dropped as soon as they are returned, in builds with debug assertions.
//!
//! `let _ = locks.insert_lock("a").acquire().await?;` compiles, and releases the lock at once: the
//! work below runs without it, unnoticed. `#[must_use]` does not warn, because `let _ =` counts as
//! a use. The compiler's lint `let_underscore_drop` is off by default, and `let_underscore_lock`,
//! which is on, only knows the guards of the standard library. So a guard that was not used is
//! reported, at level INFO, if it is dropped within microseconds of being returned.
//!
//! The level is not WARN, because `drop(lock.acquire().await?)` looks the same. Any other false
//! alarm needs a guard that is bound, never used, and dropped within [`AT_ONCE`]: a critical
//! section without an `.await`. In that time the lock can't have kept another process from anything
//! that takes long. A `let _ =` is missed if the thread is interrupted at that point; the next run
//! reports it. Release builds have no overhead, and report nothing.

use std::ops::{Deref, DerefMut};
#[cfg(debug_assertions)]
use std::sync::atomic::{AtomicBool, Ordering};
#[cfg(debug_assertions)]
use std::time::{Duration, Instant};

#[cfg(debug_assertions)]
use crate::text::escaped;

#[cfg(debug_assertions)]
const AT_ONCE: Duration = Duration::from_micros(20);

/// The content of a guard, and whether the guard was used.
pub(crate) struct Watched<T> {
    /// The first field: it is dropped before the drop of `kept` takes its time.
    #[cfg(debug_assertions)]
    watch: UseWatch,
    kept: T,
}

#[cfg(debug_assertions)]
struct UseWatch {
    name: Box<str>,
    handed_out: Instant,
    is_used: AtomicBool,
}

impl<T> Watched<T> {
    /// Wraps a guard that is about to be returned, of the lock with this name.
    #[cfg_attr(not(debug_assertions), allow(unused_variables))]
    pub(crate) fn new(kept: T, name: impl FnOnce(&T) -> Box<str>) -> Self {
        #[cfg(debug_assertions)]
        let watch =
            UseWatch { name: name(&kept), handed_out: Instant::now(), is_used: AtomicBool::new(false) };
        Self {
            #[cfg(debug_assertions)]
            watch,
            kept,
        }
    }

    /// Wraps a guard whose drop is not reported.
    pub(crate) fn unwatched(kept: T) -> Self {
        let unwatched = Self::new(kept, |_| Box::default());
        unwatched.mark_used();
        unwatched
    }

    pub(crate) fn into_inner(self) -> T {
        self.mark_used();
        self.kept
    }

    fn mark_used(&self) {
        #[cfg(debug_assertions)]
        self.watch.is_used.store(true, Ordering::Relaxed);
    }
}

impl<T> Deref for Watched<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.mark_used();
        &self.kept
    }
}

impl<T> DerefMut for Watched<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.mark_used();
        &mut self.kept
    }
}

impl<T: std::fmt::Debug> std::fmt::Debug for Watched<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.kept.fmt(formatter)
    }
}

#[cfg(debug_assertions)]
impl Drop for UseWatch {
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
