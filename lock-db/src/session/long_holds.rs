//! Tells the operator of locks of this process that have been held for unusually long.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use tokio::select;
use tokio::time::sleep_until;

use super::core::Core;
use crate::long_hold::WarnAfter;
use crate::name::escaped;
use crate::turns::Turns;

/// More than so many at a time are told in one line.
const ONE_BY_ONE: usize = 5;
/// Between two looks.
const SHORTEST_PAUSE: Duration = Duration::from_millis(50);

const LEASE: &str = "an insert lock has been held for unusually long: should its work hang, it stays held as long as this process lives; \
                     limit it by `at_most`, or set `LocksBuilder::warn_after`";
const ROW_LOCK: &str = "a row lock has been held for unusually long: should its work hang, its transaction stays open; limit the work by a \
                        timeout, or set `LocksBuilder::warn_after`";

/// What is watched besides the leases of the session.
#[derive(Debug, Clone)]
pub(crate) struct Watched {
    pub(crate) warn_after: WarnAfter,
    /// The row locks of this process that have a transaction of their own. What an `acquire_in` holds is known to the database alone.
    pub(crate) turns: Arc<Turns>,
}

struct Long {
    lock: String,
    fencing_token: i64,
    since: Instant,
    text: &'static str,
}

/// Nothing that is taken after a look can be due before `earliest` has passed, so nobody has to wake this up.
pub(super) async fn watch(core: Rc<Core>, watched: Watched) {
    let Some(earliest) = watched.warn_after.earliest() else { return };
    loop {
        let now = Instant::now();
        let (long, next) = look(&core, &watched, now);
        warn(&core, &long, now);
        let pause = next.map_or(earliest, |next| next.saturating_duration_since(now).min(earliest));
        select! {
            () = core.closed() => return,
            () = sleep_until((now + pause.max(SHORTEST_PAUSE)).into()) => {}
        }
    }
}

fn look(core: &Core, watched: &Watched, now: Instant) -> (Vec<Long>, Option<Instant>) {
    let (mut long, mut next) = (Vec::new(), None);
    for held in core.leases.borrow_mut().values_mut() {
        let Some(after) = watched.warn_after.of_lease(held.ttl) else { continue };
        // That has an end already.
        if held.state.held_until_at_most().is_none() && held.long_hold().is_due(after, now, &mut next) {
            long.push(Long {
                lock: held.state.name().to_string(),
                fencing_token: held.state.last_fencing_token(),
                since: held.long_hold().since,
                text: LEASE,
            });
        }
    }
    if let Some(after) = watched.warn_after.of_row_lock() {
        watched.turns.held_long(after, now, &mut next, |info, since| {
            let (lock, fencing_token) = (escaped(&info.name).to_string(), info.fencing_token);
            long.push(Long { lock, fencing_token, since, text: ROW_LOCK });
        });
    }
    (long, next)
}

fn warn(core: &Core, long: &[Long], now: Instant) {
    let owner = core.queues.owner();
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
