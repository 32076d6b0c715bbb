//! The settings of a `Locks`: defaults, and the validation before any SQL.

use std::time::Duration;

use crate::Error;

/// The default TTL of a lease.
pub(crate) const DEFAULT_TTL: Duration = Duration::from_secs(30);
/// The default wait of an acquire.
pub(crate) const DEFAULT_WAIT: Duration = Duration::from_secs(30);

/// How long the database has for its first answer, even if the wait is shorter. Without an answer
/// it is unknown whether the lock is held.
pub(crate) const FIRST_ANSWER: Duration = Duration::from_secs(1);
/// How long a try may take, for example with many other requests ahead of it. A try has no wait of
/// its own.
pub(crate) const LONGEST_TRY: Duration = Duration::from_secs(10);

/// The default limits for handing on a lease within a process.
pub(crate) const DEFAULT_HAND_OFF: HandOffLimits =
    HandOffLimits { holders: 64, time: Duration::from_millis(50) };
/// Each holder takes a fencing token, and there is one token for each microsecond. The tokens of a
/// grant, four times this number, have to lie within less time than a failover takes, because the
/// failover may have lost the grant.
pub(crate) const MOST_HOLDERS: u32 = 4096;

/// How many locks may be taken together. All of them are written in one transaction, which blocks
/// others.
pub(crate) const MOST_NAMES: usize = 10_000;

/// With less, warnings would follow each other without a pause.
const SHORTEST_WARNING: Duration = Duration::from_secs(1);

/// By default, rows that were not used for this long are removed.
const DEFAULT_PRUNE_AFTER: Duration = Duration::from_hours(30 * 24);
/// Rows that are in use at the moment must not look unused.
pub(crate) const SHORTEST_PRUNE: Duration = Duration::from_secs(1);

/// With less, the renewal of a lease is a race against the network.
const SHORTEST_TTL: Duration = Duration::from_millis(50);
/// Longer durations are rejected, to stay within the clock arithmetic of all databases.
pub(crate) const LONGEST: Duration = Duration::from_hours(365 * 24);

impl HandOffLimits {
    pub(crate) fn check(self) -> Result<(), Error> {
        if (1..=MOST_HOLDERS).contains(&self.holders) {
            return Ok(());
        }
        Err(Error::InvalidOption {
            option: "hand_off",
            value: format!("{} holders", self.holders),
            reason: "1 to 4096 holders are possible",
        })
    }
}

impl WarnAfter {
    pub(crate) fn check(self) -> Result<(), Error> {
        let Self::After(time) = self else { return Ok(()) };
        if time < SHORTEST_WARNING {
            return Err(invalid(
                "warn_after",
                time,
                "one second is the shortest; `None` turns the reports off",
            ));
        }
        check_longest("warn_after", time).map(drop)
    }
}

impl Settings {
    /// What a request asks for, or else the default.
    pub(crate) fn wait(&self, wait: Option<Duration>) -> Result<Wait, Error> {
        check_wait(wait.unwrap_or(self.default_wait)).map(Wait::Within)
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        check_ttl(self.default_ttl)?;
        check_wait(self.default_wait)?;
        self.hand_off.check()?;
        self.warn_after.check()?;
        check_prune_after(self.prune_after)?;
        crate::name::check(&self.name_prefix, "x").map_err(|_| Error::InvalidOption {
            option: "name_prefix",
            value: self.name_prefix.clone(),
            reason: "it leaves no room for a name, or contains a NUL byte",
        })?;
        Ok(())
    }
}

/// How long a request waits for the holder of a lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Not at all: a try.
    Try,
    /// At most this long, counted from the start of the request.
    Within(Duration),
}

impl Wait {
    pub(crate) fn is_try(self) -> bool {
        self == Self::Try
    }

    /// `None` for a try.
    pub(crate) fn limit(self) -> Option<Duration> {
        match self {
            Self::Try => None,
            Self::Within(limit) => Some(limit),
        }
    }
}

/// The settings of the builder of a `Locks`.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) label: String,
    pub(crate) schema: Option<String>,
    pub(crate) name_prefix: String,
    pub(crate) default_ttl: Duration,
    pub(crate) default_wait: Duration,
    pub(crate) hand_off: HandOffLimits,
    pub(crate) warn_after: WarnAfter,
    pub(crate) prune_after: Option<Duration>,
    pub(crate) fair: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            label: String::new(),
            schema: None,
            name_prefix: String::new(),
            default_ttl: DEFAULT_TTL,
            default_wait: DEFAULT_WAIT,
            hand_off: DEFAULT_HAND_OFF,
            warn_after: WarnAfter::TimesTtl,
            prune_after: Some(DEFAULT_PRUNE_AFTER),
            fair: true,
        }
    }
}

/// How often, and for how long, a lease is handed on within a process before other processes get
/// their chance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HandOffLimits {
    /// How many holders in a row may have it, including the first one, while other processes wait.
    pub(crate) holders: u32,
    /// How long after the grant it may be handed on.
    pub(crate) time: Duration,
}

impl HandOffLimits {
    /// The limit for a lease if no other process waited at the time of the grant.
    pub(crate) fn most_holders(self) -> u32 {
        self.holders.saturating_mul(if self.holders > 1 { 4 } else { 1 })
    }
}

/// By default a lease is reported after `TTLS` times its TTL, but not before `SHORTEST_HOLD`.
const SHORTEST_HOLD: Duration = Duration::from_secs(30);
const TTLS: u32 = 10;
/// The same for a row lock, which has no TTL.
const LONG_ROW_LOCK: Duration = Duration::from_mins(5);

/// The setting of the builder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WarnAfter {
    /// A default time, which depends on the TTL.
    TimesTtl,
    After(Duration),
    Never,
}

impl WarnAfter {
    /// The time after which a lease is reported.
    pub(crate) fn of_lease(self, ttl: Duration) -> Option<Duration> {
        match self {
            Self::TimesTtl => Some(ttl.saturating_mul(TTLS).max(SHORTEST_HOLD)),
            Self::After(time) => Some(time),
            Self::Never => None,
        }
    }

    pub(crate) fn of_row_lock(self) -> Option<Duration> {
        match self {
            Self::TimesTtl => Some(LONG_ROW_LOCK),
            Self::After(time) => Some(time),
            Self::Never => None,
        }
    }

    /// The shortest time after which any lock is reported.
    pub(crate) fn earliest(self) -> Option<Duration> {
        self.of_lease(Duration::ZERO)
    }
}

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

/// `None`: never.
pub(crate) fn check_prune_after(prune_after: Option<Duration>) -> Result<(), Error> {
    prune_after.map_or(Ok(()), |time| check_prune("prune_after", time).map(drop))
}

/// How long rows have to be unused in order to be removed.
pub(crate) fn check_prune(option: &'static str, time: Duration) -> Result<Duration, Error> {
    if time < SHORTEST_PRUNE {
        return Err(invalid(option, time, "one second is the shortest"));
    }
    check_longest(option, time)
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

/// A duration in microseconds, the unit of the databases' clocks.
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
        let warn_after = |time| WarnAfter::After(time).check();
        assert!(warn_after(Duration::from_millis(999)).is_err());
        assert!(warn_after(Duration::MAX).is_err());
        assert!(warn_after(SHORTEST_WARNING).is_ok());
        assert!(WarnAfter::Never.check().is_ok());
        assert!(check_prune_after(None).is_ok());
        assert!(check_prune_after(Some(DEFAULT_PRUNE_AFTER)).is_ok());
        assert!(check_prune("older_than", Duration::from_millis(999)).is_err());
        assert!(check_prune("older_than", Duration::MAX).is_err());
    }
}
