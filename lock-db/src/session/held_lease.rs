//! A lease as the session has it, and when it is to be renewed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;

use super::lease_state::LeaseState;
use crate::database::{Cluster, LeaseKey, Renewal, reliable_without_notice};
use crate::error::Loss;
use crate::hold_warning::HoldWarning;

/// The end of a transaction that has released a lease is noticed within this time.
const READ_AFTER: Duration = Duration::from_millis(100);
/// The shortest time between two renewals of a lease whose row another transaction has locked.
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
/// A lease that is held for this long needs the second connection ready.
const LONG_ENOUGH: Duration = Duration::from_secs(1);
/// The part of the TTL that a holder relies on. It gives up a little before the database does.
const RELIABLE: (u32, u32) = (9, 10);

/// A lease that the database granted.
pub(super) struct Granted {
    pub(super) key: LeaseKey,
    /// The size of the token range: how many fencing tokens its holders have.
    pub(super) tokens: u32,
    /// How many holders may have it, `tokens` at most.
    pub(super) holders: u32,
    pub(super) others_wait: bool,
    pub(super) ttl: Duration,
    /// When the request for it was sent.
    pub(super) sent: Instant,
}

/// A lease that this process holds.
pub(super) struct HeldLease {
    pub(super) state: Arc<LeaseState>,
    pub(super) ttl: Duration,
    pub(super) deadline: Instant,
    pub(super) next_renewal: Instant,
    /// Whether other processes were in the queue when it was granted.
    pub(super) others_wait: bool,
    pub(super) hold_warning: HoldWarning,
    pub(super) lost: watch::Sender<Option<Loss>>,
}

impl HeldLease {
    /// When it ends for its holder, if nothing else happens.
    pub(super) fn ends(&self) -> Instant {
        self.state.held_until_at_most().map_or(self.deadline, |until| until.min(self.deadline))
    }

    /// The warning of its present holder.
    pub(super) fn hold_warning(&mut self) -> &mut HoldWarning {
        let since = self.state.held_since();
        if self.hold_warning.since != since {
            self.hold_warning = HoldWarning::new(since);
        }
        &mut self.hold_warning
    }

    pub(super) fn renewal(&self) -> Renewal {
        let LeaseKey { row, secret, fencing_token, .. } = &self.state.key;
        Renewal { id: row.id, secret: secret.clone(), fencing_token: *fencing_token, ttl: self.ttl }
    }

    /// From when on the renewal connection has to be ready.
    pub(super) fn second_needed_from(&self) -> Instant {
        let sent = self.next_renewal.checked_sub(self.ttl / 3).unwrap_or(self.next_renewal);
        sent + LONG_ENOUGH
    }

    /// The pause before the next attempt, if this one has no result.
    pub(super) fn pause(&self) -> Duration {
        let pause = self.ttl / 12;
        if self.state.is_in_doubt() { pause.min(READ_AFTER) } else { pause }
    }

    /// The row was locked by another transaction when it was read, at `looked` or later, and it
    /// showed no takeover. A process that takes over has to give notice first, so the lease is
    /// valid for that long. This does not hold on a cluster, where the notice may be on another
    /// node.
    pub(super) fn record_locked_row(&mut self, read_at: Instant) {
        if self.state.key.server.cluster == Cluster::SinglePrimary {
            let deadline = read_at + reliable_without_notice(self.ttl);
            if deadline > self.deadline && self.state.extend(deadline) {
                self.deadline = deadline;
            }
        }
        let now = Instant::now();
        let left = self.deadline.saturating_duration_since(now);
        // Several attempts fit into the rest, so that one late answer does no harm.
        self.next_renewal = now + self.pause().min((left / 6).max(SHORTEST_PAUSE));
    }

    /// `false`: too late, its holder was already told that it is over.
    pub(super) fn record_renewal(&mut self, sent: Instant) -> bool {
        self.deadline = self.deadline.max(deadline(sent, self.ttl));
        self.next_renewal = sent + self.ttl / 3;
        self.state.extend(self.deadline)
    }
}

impl Drop for HeldLease {
    fn drop(&mut self) {
        self.state.pass_permit();
    }
}

/// Until when the holder may rely on a lease that was requested at `sent`. This is counted from
/// before the request went out, on our own monotonic clock, and is shorter than the TTL that the
/// database counts from later on.
pub(super) fn deadline(sent: Instant, ttl: Duration) -> Instant {
    sent + ttl * RELIABLE.0 / RELIABLE.1
}
