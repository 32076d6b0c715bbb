//! Durations: what is refused before any SQL, and what holds when the caller says nothing.

use std::time::Duration;

use crate::Error;
use crate::session::HandOff;

/// How long a lease lasts without renewal when the caller says nothing.
pub(crate) const DEFAULT_TTL: Duration = Duration::from_secs(30);
/// How long an acquire waits when the caller says nothing.
pub(crate) const DEFAULT_WAIT: Duration = Duration::from_secs(30);

/// What the database has for its first answer, also when the wait is shorter: without one nobody could say whether the lock is held.
pub(crate) const FIRST_ANSWER: Duration = Duration::from_secs(1);
/// How long a try may take, which has no wait of its own: with many others before it.
pub(crate) const LONGEST_TRY: Duration = Duration::from_secs(10);

/// How far a lease goes from hand to hand within a process when the builder says nothing.
pub(crate) const DEFAULT_HAND_OFF: HandOff = HandOff { turns: 64, time: Duration::from_millis(50) };
/// Each takes a fencing token, of which there is one for each microsecond: so that those of a grant, four times as many, lie
/// within less time than any failover takes, which may have lost the grant before.
pub(crate) const MOST_TURNS: u32 = 4096;

/// How many locks may be taken together: all of them are written in one transaction, behind which others wait.
pub(crate) const MOST_NAMES: usize = 10_000;

/// Else one warning would follow the other.
pub(crate) const SHORTEST_WARNING: Duration = Duration::from_secs(1);

/// Below this the renewal of a lease is a race with the network.
const SHORTEST_TTL: Duration = Duration::from_millis(50);
/// Above this no clock arithmetic of any of the databases is asked to go.
const LONGEST: Duration = Duration::from_hours(365 * 24);

pub(crate) fn check_ttl(ttl: Duration) -> Result<Duration, Error> {
    if ttl < SHORTEST_TTL {
        return Err(invalid("ttl", ttl, "a lease needs 50 ms at least, to be renewed in time"));
    }
    check_longest("ttl", ttl)
}

pub(crate) fn check_wait(wait: Duration) -> Result<Duration, Error> {
    check_longest("wait", wait)
}

pub(crate) fn check_at_least(at_least: Duration) -> Result<Duration, Error> {
    check_longest("at_least", at_least)
}

/// `None`: no limit.
pub(crate) fn check_at_most(
    at_most: Option<Duration>,
    at_least: Duration,
) -> Result<Option<Duration>, Error> {
    let Some(at_most) = at_most else { return Ok(None) };
    if at_most < SHORTEST_TTL {
        return Err(invalid("at_most", at_most, "it is 50 ms at least, as a TTL is"));
    }
    if at_most < at_least {
        return Err(invalid("at_most", at_most, "it is shorter than `at_least`"));
    }
    check_longest("at_most", at_most).map(Some)
}

fn check_longest(option: &'static str, duration: Duration) -> Result<Duration, Error> {
    if duration > LONGEST {
        return Err(invalid(option, duration, "365 days is the longest"));
    }
    Ok(duration)
}

fn invalid(option: &'static str, duration: Duration, reason: &'static str) -> Error {
    Error::InvalidOption { option, value: format!("{duration:?}"), reason }
}

/// A duration in the unit of the databases' clocks.
pub(crate) fn micros(duration: Duration) -> i64 {
    i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absurd_durations_are_refused() {
        assert!(check_ttl(Duration::ZERO).is_err());
        assert!(check_ttl(Duration::from_millis(49)).is_err());
        assert!(check_ttl(Duration::MAX).is_err());
        assert!(check_ttl(DEFAULT_TTL).is_ok());
        assert!(check_wait(Duration::ZERO).is_ok());
        assert!(check_wait(Duration::MAX).is_err());
        let at_most = |at_most, at_least| check_at_most(Some(at_most), at_least);
        assert!(at_most(Duration::from_millis(49), Duration::ZERO).is_err());
        assert!(at_most(Duration::MAX, Duration::ZERO).is_err());
        assert!(at_most(DEFAULT_TTL, DEFAULT_TTL).is_ok());
        assert!(at_most(DEFAULT_TTL, DEFAULT_TTL * 2).is_err());
        assert!(check_at_most(None, DEFAULT_TTL).is_ok());
    }
}
