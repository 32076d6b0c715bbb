//! Looks for old snapshots anywhere in the database. They keep the old versions of the lock rows,
//! which makes the locks of a busy session slow.
//!
//! The search is triggered by grants, so a session that takes few locks runs no query for it. It
//! uses the renewal connection. The warning is logged at most once an hour.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::sync::Notify;

use super::actor::Actor;
use crate::text::in_one_line;

/// The minimum number of grants between two searches. Below that nothing is slow.
const GRANTS: u32 = 2_000;
/// The minimum time between two searches.
const PAUSE: Duration = Duration::from_secs(15);
/// The minimum time between two warnings.
const SILENCE: Duration = Duration::from_hours(1);

#[derive(Debug, Default)]
pub(super) struct SnapshotWatch {
    grants: Cell<u32>,
    /// No search before this time.
    not_before: Cell<Option<Instant>>,
    due: Notify,
}

impl SnapshotWatch {
    /// Counts a lease that the database has granted.
    pub(super) fn granted(&self) {
        self.grants.set(self.grants.get().saturating_add(1));
        if self.grants.get().is_multiple_of(GRANTS) {
            self.due.notify_one();
        }
    }
}

pub(super) async fn watch(actor: Rc<Actor>) {
    let mut told: Option<Instant> = None;
    loop {
        select! {
            () = actor.closed() => return,
            () = actor.snapshot_watch.due.notified() => {}
        }
        let SnapshotWatch { grants, not_before, .. } = &actor.snapshot_watch;
        if not_before.get().is_some_and(|moment| Instant::now() < moment) {
            continue;
        }
        grants.set(0);
        match actor.renewals.old_snapshots().await {
            // `Locks::check` reports what this account may not see (`unseen`).
            Ok(seen) => {
                if let Some(text) = seen.found
                    && told.is_none_or(|told| told.elapsed() >= SILENCE)
                {
                    tracing::warn!("{}", in_one_line(&text));
                    told = Some(Instant::now());
                }
            }
            Err(failure) => tracing::debug!(error = %failure, "old snapshots could not be looked for"),
        }
        not_before.set(Some(Instant::now() + PAUSE));
    }
}
