//! When a lock has been held for so long that the operator is told.

use std::time::{Duration, Instant};

/// The shortest time that is unusual when the builder says nothing, and after how many TTLs.
const SHORTEST: Duration = Duration::from_secs(30);
const TTLS: u32 = 10;
/// The same for a row lock, which has no TTL.
const ROW_LOCK: Duration = Duration::from_mins(5);

/// What the builder says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WarnAfter {
    /// A while that depends on the TTL.
    TimesTtl,
    After(Duration),
    Never,
}

impl WarnAfter {
    /// After how long a lease is warned of.
    pub(crate) fn of_lease(self, ttl: Duration) -> Option<Duration> {
        match self {
            Self::TimesTtl => Some(ttl.saturating_mul(TTLS).max(SHORTEST)),
            Self::After(time) => Some(time),
            Self::Never => None,
        }
    }

    pub(crate) fn of_row_lock(self) -> Option<Duration> {
        match self {
            Self::TimesTtl => Some(ROW_LOCK),
            Self::After(time) => Some(time),
            Self::Never => None,
        }
    }

    /// No lock is warned of earlier after it was taken.
    pub(crate) fn earliest(self) -> Option<Duration> {
        self.of_lease(Duration::ZERO)
    }
}

/// Since when a lock is held, and how often that was warned of: after a while, and again each time that twice as much has passed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LongHold {
    pub(crate) since: Instant,
    warned: u32,
}

impl LongHold {
    pub(crate) fn new(since: Instant) -> Self {
        Self { since, warned: 0 }
    }

    /// Whether it is time to warn, which counts as done then. Else the next time is noted.
    pub(crate) fn is_due(&mut self, after: Duration, now: Instant, next: &mut Option<Instant>) -> bool {
        let mut is_due = false;
        loop {
            let due = self.since.checked_add(after.saturating_mul(2_u32.saturating_pow(self.warned)));
            match due {
                Some(due) if due <= now => {
                    is_due = true;
                    self.warned += 1;
                }
                due => {
                    *next = [*next, due].into_iter().flatten().min();
                    return is_due;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_mins(1);

    #[test]
    fn twice_as_much_has_to_pass_each_time() {
        let since = Instant::now();
        let mut hold = LongHold::new(since);
        let warned_at: Vec<u32> = (0..100)
            .filter(|minutes| {
                let mut next = None;
                hold.is_due(3 * MINUTE, since + *minutes * MINUTE, &mut next)
            })
            .collect();
        assert_eq!(warned_at, [3, 6, 12, 24, 48, 96]);
    }

    #[test]
    fn the_next_time_is_told() {
        let since = Instant::now();
        let mut hold = LongHold::new(since);
        let mut next = None;
        assert!(!hold.is_due(MINUTE, since, &mut next));
        assert_eq!(next, Some(since + MINUTE));
        // Whoever was asleep warns once.
        let mut next = None;
        assert!(hold.is_due(MINUTE, since + 9 * MINUTE, &mut next));
        assert_eq!(next, Some(since + 16 * MINUTE));
    }

    #[test]
    fn short_ttls_are_not_warned_of_at_once() {
        let after = |ttl| WarnAfter::TimesTtl.of_lease(ttl).unwrap();
        assert_eq!(after(Duration::from_secs(1)), SHORTEST);
        assert_eq!(after(MINUTE), 10 * MINUTE);
        assert_eq!(WarnAfter::Never.of_lease(MINUTE), None);
    }
}
