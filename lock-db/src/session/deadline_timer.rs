//! A timer whose deadline can be moved earlier.

use std::cell::Cell;
use std::time::Instant;

use tokio::select;
use tokio::sync::Notify;
use tokio::time::sleep_until;

/// For one sleeping task on the session's own thread.
#[derive(Debug, Default)]
pub(super) struct DeadlineTimer {
    /// The time that the task sleeps until. `None`: no limit.
    set_to: Cell<Option<Instant>>,
    earlier: Notify,
}

impl DeadlineTimer {
    /// Sleeps until `at`, or until an earlier deadline was set. After that the caller checks what
    /// is due.
    pub(super) async fn sleep_until(&self, at: Option<Instant>) {
        self.set_to.set(at);
        let signal = async {
            match at {
                Some(at) => sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        select! {
            () = signal => {}
            () = self.earlier.notified() => {}
        }
    }

    pub(super) fn no_later_than(&self, at: Instant) {
        if self.set_to.get().is_none_or(|set_to| at < set_to) {
            self.set_to.set(Some(at));
            // Stored for a task that is busy at the moment.
            self.earlier.notify_one();
        }
    }
}
