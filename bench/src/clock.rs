//! One clock for all processes of this machine.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds since a point in time that is the same for all processes.
pub(crate) type Moment = u64;

/// The current time.
pub(crate) fn now() -> Moment {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or_default();
    seconds * 1_000_000_000 + nanoseconds
}

/// The moment that is `duration` after `moment`.
pub(crate) fn after(moment: Moment, duration: Duration) -> Moment {
    moment + nanoseconds(duration)
}

/// The time until `moment`; zero if it has passed.
pub(crate) fn until(moment: Moment) -> Duration {
    Duration::from_nanos(moment.saturating_sub(now()))
}

/// A duration in nanoseconds.
pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
