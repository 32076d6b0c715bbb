//! Counts the tasks that may still have a lease to release.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;

#[derive(Debug, Default)]
pub(super) struct TaskTracker {
    state: Rc<TrackerState>,
}

#[derive(Debug, Default)]
struct TrackerState {
    count: Cell<usize>,
    changed: Notify,
}

impl TaskTracker {
    pub(super) fn enter(&self) -> Tracked {
        self.state.count.set(self.state.count.get() + 1);
        Tracked { state: Rc::clone(&self.state) }
    }

    /// Resolves when no task is left.
    pub(super) async fn wait_for_all(&self) {
        while self.state.count.get() > 0 {
            self.state.changed.notified().await;
        }
    }
}

/// A task that is counted until this is dropped.
#[derive(Debug)]
pub(super) struct Tracked {
    state: Rc<TrackerState>,
}

impl Drop for Tracked {
    fn drop(&mut self) {
        self.state.count.set(self.state.count.get() - 1);
        self.state.changed.notify_one();
    }
}
