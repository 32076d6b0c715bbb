//! One clock for all processes of this machine.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// A point on the clock, in nanoseconds since a moment that is the same for all processes.
pub(crate) type Moment = u64;

/// The current point on the clock.
pub(crate) fn now() -> Moment {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    let nanoseconds = u64::try_from(now.tv_nsec).unwrap_or_default();
    seconds * 1_000_000_000 + nanoseconds
}

/// The point this long after another one.
pub(crate) fn after(moment: Moment, duration: Duration) -> Moment {
    moment + nanoseconds(duration)
}

/// How long it is until then; zero when it is past.
pub(crate) fn until(moment: Moment) -> Duration {
    Duration::from_nanos(moment.saturating_sub(now()))
}

/// A duration in the unit of the clock.
pub(crate) fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
