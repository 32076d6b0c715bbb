//! How a session is doing, for everyone to read without asking it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::Health;

/// How a session is doing. Each number is written where it changes, and read at any time.
#[derive(Debug)]
pub(crate) struct Vitals {
    origin: Instant,
    /// Whether the first and the second connection are open.
    open: [AtomicBool; 2],
    /// Microseconds after the origin, plus one. Zero: never.
    answered: AtomicU64,
    held: AtomicUsize,
    waiting: AtomicUsize,
}

/// Which of the two connections of a session.
#[derive(Debug, Clone, Copy)]
pub(super) enum Which {
    First,
    Second,
}

/// A caller that waits. It is counted until this is dropped.
#[derive(Debug)]
pub(crate) struct Waits(Arc<Vitals>);

impl Vitals {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            origin: Instant::now(),
            open: [AtomicBool::new(false), AtomicBool::new(false)],
            answered: AtomicU64::new(0),
            held: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
        })
    }

    pub(super) fn set_open(&self, which: Which, is_open: bool) {
        let [first, second] = &self.open;
        let open = match which {
            Which::First => first,
            Which::Second => second,
        };
        open.store(is_open, Ordering::Relaxed);
    }

    pub(super) fn answered(&self, at: Instant) {
        let micros = at.saturating_duration_since(self.origin).as_micros();
        let micros = u64::try_from(micros).unwrap_or(u64::MAX).saturating_add(1);
        self.answered.fetch_max(micros, Ordering::Relaxed);
    }

    pub(super) fn set_held(&self, count: usize) {
        self.held.store(count, Ordering::Relaxed);
    }

    /// Counts a caller that waits.
    pub(crate) fn wait(self: &Arc<Self>) -> Waits {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waits(Arc::clone(self))
    }

    pub(crate) fn health(&self) -> Health {
        let answered = self.answered.load(Ordering::Relaxed).checked_sub(1);
        let now = u64::try_from(self.origin.elapsed().as_micros()).unwrap_or(u64::MAX);
        let since = |answered| Duration::from_micros(now.saturating_sub(answered));
        Health {
            connected: self.open.iter().any(|open| open.load(Ordering::Relaxed)),
            since_last_answer: answered.map(since),
            held: self.held.load(Ordering::Relaxed),
            waiting: self.waiting.load(Ordering::Relaxed),
        }
    }
}

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}
