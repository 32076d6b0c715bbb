//! Decides when the operator is warned of a lock that has been held for long.

use std::time::{Duration, Instant};

/// Since when a lock is held, and how often a warning was logged. The first warning comes after a
/// given time, and each further one when the lock has been held for twice as long as at the last
/// one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HoldWarning {
    pub(crate) since: Instant,
    warned: u32,
}

impl HoldWarning {
    pub(crate) fn new(since: Instant) -> Self {
        Self { since, warned: 0 }
    }

    /// Whether a warning is due. If so, it counts as logged. The time of the next warning is
    /// written to `next`.
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
    use crate::options::WarnAfter;

    const MINUTE: Duration = Duration::from_mins(1);

    #[test]
    fn the_time_between_warnings_doubles() {
        let since = Instant::now();
        let mut hold = HoldWarning::new(since);
        let warned_at: Vec<u32> = (0..100)
            .filter(|minutes| {
                let mut next = None;
                hold.is_due(3 * MINUTE, since + *minutes * MINUTE, &mut next)
            })
            .collect();
        assert_eq!(warned_at, [3, 6, 12, 24, 48, 96]);
    }

    #[test]
    fn the_time_of_the_next_warning_is_returned() {
        let since = Instant::now();
        let mut hold = HoldWarning::new(since);
        let mut next = None;
        assert!(!hold.is_due(MINUTE, since, &mut next));
        assert_eq!(next, Some(since + MINUTE));
        // A task that was late warns once.
        let mut next = None;
        assert!(hold.is_due(MINUTE, since + 9 * MINUTE, &mut next));
        assert_eq!(next, Some(since + 16 * MINUTE));
    }

    #[test]
    fn short_ttls_are_not_warned_of_at_once() {
        let after = |ttl| WarnAfter::TimesTtl.of_lease(ttl).unwrap();
        assert_eq!(after(Duration::from_secs(1)), Duration::from_secs(30));
        assert_eq!(after(MINUTE), 10 * MINUTE);
        assert_eq!(WarnAfter::Never.of_lease(MINUTE), None);
    }
}
