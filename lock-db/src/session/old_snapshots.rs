//! What makes the locks of a busy session slow without any fault of theirs: a snapshot, anywhere in the database, that keeps
//! the old versions of their rows.
//!
//! Looked for by the grants, so that a session that takes few locks asks nothing, on the connection of the renewals, and told once an hour.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::sync::Notify;

use super::core::Core;
use crate::name::in_one_line;

/// So many rows were written since the last look, at least: below that nothing is slow.
const GRANTS: u32 = 2_000;
/// Between two looks, at least.
const PAUSE: Duration = Duration::from_secs(15);
/// Between two warnings.
const SILENCE: Duration = Duration::from_hours(1);

#[derive(Debug, Default)]
pub(super) struct OldSnapshots {
    grants: Cell<u32>,
    /// No look before.
    not_before: Cell<Option<Instant>>,
    due: Notify,
}

impl OldSnapshots {
    /// The database has granted a lease.
    pub(super) fn granted(&self) {
        self.grants.set(self.grants.get().saturating_add(1));
        if self.grants.get().is_multiple_of(GRANTS) {
            self.due.notify_one();
        }
    }
}

pub(super) async fn watch(core: Rc<Core>) {
    let mut told: Option<Instant> = None;
    loop {
        select! {
            () = core.closed() => return,
            () = core.old_snapshots.due.notified() => {}
        }
        let OldSnapshots { grants, not_before, .. } = &core.old_snapshots;
        if not_before.get().is_some_and(|moment| Instant::now() < moment) {
            continue;
        }
        grants.set(0);
        match core.renewals.old_snapshots().await {
            // What this account may not see, `Locks::check` tells those who ask.
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
