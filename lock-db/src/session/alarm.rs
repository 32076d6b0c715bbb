//! A clock that can be set to ring earlier.

use std::cell::Cell;
use std::time::Instant;

use tokio::select;
use tokio::sync::Notify;
use tokio::time::sleep_until;

/// For one sleeper on the session's own thread.
#[derive(Debug, Default)]
pub(super) struct Alarm {
    /// What the sleeper sleeps until; `None`: for ever.
    set_to: Cell<Option<Instant>>,
    earlier: Notify,
}

impl Alarm {
    /// Sleeps until then, or until something earlier came up: look again what is to be done.
    pub(super) async fn sleep_until(&self, at: Option<Instant>) {
        self.set_to.set(at);
        let rings = async {
            match at {
                Some(at) => sleep_until(at.into()).await,
                None => std::future::pending().await,
            }
        };
        select! {
            () = rings => {}
            () = self.earlier.notified() => {}
        }
    }

    pub(super) fn no_later_than(&self, at: Instant) {
        if self.set_to.get().is_none_or(|set_to| at < set_to) {
            self.set_to.set(Some(at));
            // Kept for the sleeper when it is busy at the moment.
            self.earlier.notify_one();
        }
    }
}
