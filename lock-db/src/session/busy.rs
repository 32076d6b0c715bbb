//! Counts those who may still have something to give back.

use std::cell::Cell;
use std::rc::Rc;

use tokio::sync::Notify;

#[derive(Debug, Default)]
pub(super) struct Busy {
    state: Rc<State>,
}

#[derive(Debug, Default)]
struct State {
    count: Cell<usize>,
    changed: Notify,
}

impl Busy {
    pub(super) fn enter(&self) -> Entered {
        self.state.count.set(self.state.count.get() + 1);
        Entered { state: Rc::clone(&self.state) }
    }

    /// Resolves when everybody has left.
    pub(super) async fn nobody(&self) {
        while self.state.count.get() > 0 {
            self.state.changed.notified().await;
        }
    }
}

/// Dropping it leaves.
#[derive(Debug)]
pub(super) struct Entered {
    state: Rc<State>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.state.count.set(self.state.count.get() - 1);
        self.state.changed.notify_one();
    }
}
