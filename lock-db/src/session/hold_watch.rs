//! Warns the operator of locks of this process that have been held for unusually long.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use tokio::select;
use tokio::time::sleep_until;

use super::actor::Actor;
use crate::keyed_queue::KeyedQueue;
use crate::options::WarnAfter;
use crate::text::escaped;

/// More than this many locks at a time are reported in one line.
const ONE_BY_ONE: usize = 5;
/// The minimum time between two checks.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);

const LEASE: &str = "an insert lock has been held for unusually long: should its work hang, it stays held as long as this process lives; \
                     limit it by `at_most`, or set `LocksBuilder::warn_after`";
const ROW_LOCK: &str = "a row lock has been held for unusually long: should its work hang, its transaction stays open; limit the work by a \
                        timeout, or set `LocksBuilder::warn_after`";

/// The locks to watch besides the leases of the session.
#[derive(Debug, Clone)]
pub(crate) struct HoldWatch {
    pub(crate) warn_after: WarnAfter,
    /// The row locks of this process that have their own transaction. The locks of `acquire_in` are
    /// known to the database only.
    pub(crate) row_locks: Arc<KeyedQueue>,
}

struct Long {
    lock: String,
    fencing_token: i64,
    since: Instant,
    text: &'static str,
}

/// A lock that is taken after a check is not due before `earliest` has passed, so this task is
/// never woken up early.
pub(super) async fn watch(actor: Rc<Actor>, watched: HoldWatch) {
    let Some(earliest) = watched.warn_after.earliest() else { return };
    loop {
        let now = Instant::now();
        let (long, next) = read(&actor, &watched, now);
        warn(&actor, &long, now);
        let pause = next.map_or(earliest, |next| next.saturating_duration_since(now).min(earliest));
        select! {
            () = actor.closed() => return,
            () = sleep_until((now + pause.max(SHORTEST_PAUSE)).into()) => {}
        }
    }
}

fn read(actor: &Actor, watched: &HoldWatch, now: Instant) -> (Vec<Long>, Option<Instant>) {
    let (mut long, mut next) = (Vec::new(), None);
    for held in actor.leases.borrow_mut().values_mut() {
        let Some(after) = watched.warn_after.of_lease(held.ttl) else { continue };
        // A lease with a limit ends by itself.
        if held.state.held_until_at_most().is_none() && held.hold_warning().is_due(after, now, &mut next) {
            long.push(Long {
                lock: held.state.name().to_string(),
                fencing_token: held.state.last_fencing_token(),
                since: held.hold_warning().since,
                text: LEASE,
            });
        }
    }
    if let Some(after) = watched.warn_after.of_row_lock() {
        watched.row_locks.held_long(after, now, &mut next, |info, since| {
            let (lock, fencing_token) = (escaped(&info.name).to_string(), info.fencing_token);
            long.push(Long { lock, fencing_token, since, text: ROW_LOCK });
        });
    }
    (long, next)
}

fn warn(actor: &Actor, long: &[Long], now: Instant) {
    let owner = actor.queues.owner();
    let owner = escaped(&owner);
    let times = |since: Instant| {
        let held_for = now.saturating_duration_since(since);
        let since: DateTime<Utc> = Utc::now() - held_for;
        (since, Duration::from_secs(held_for.as_secs()))
    };
    if long.len() > ONE_BY_ONE {
        let names: Vec<&str> = long.iter().take(ONE_BY_ONE).map(|long| &*long.lock).collect();
        let Some((since, held_for)) = long.iter().map(|long| long.since).min().map(times) else { return };
        tracing::warn!(
            locks = long.len(), among_them = names.join(", "), %owner, %since, ?held_for,
            "locks have been held for unusually long: limit the time of each by `at_most`, or set `LocksBuilder::warn_after`"
        );
        return;
    }
    for Long { lock, fencing_token, since, text } in long {
        let (since, held_for) = times(*since);
        tracing::warn!(lock, %owner, %since, ?held_for, fencing_token, "{text}");
    }
}
