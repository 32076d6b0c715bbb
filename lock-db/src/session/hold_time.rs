//! How long the present holder of a lease has had it, and how long it may have it.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::sync::AtomicU64;

/// Read and written without a lock, by the holders and by the session.
#[derive(Debug)]
pub(super) struct HoldTime {
    /// When the database granted the lease.
    granted: Instant,
    /// When the present holder got it, in microseconds after the grant.
    since: AtomicU64,
    /// Until when the present holder may have it, in microseconds after the grant, or `UNLIMITED`,
    /// or `OVER`.
    until: AtomicU64,
}

const UNLIMITED: u64 = u64::MAX;
/// Final, once the time was seen to be over.
const OVER: u64 = u64::MAX - 1;

impl HoldTime {
    pub(super) fn new(granted: Instant, at_most: Option<Duration>) -> Self {
        let until = at_most.map_or(UNLIMITED, micros);
        Self { granted, since: AtomicU64::new(0), until: AtomicU64::new(until) }
    }

    pub(super) fn granted(&self) -> Instant {
        self.granted
    }

    /// When the present holder got the lease.
    pub(super) fn since(&self) -> Instant {
        self.granted + Duration::from_micros(self.since.load(Ordering::Acquire))
    }

    /// Removes the limit of the present holder. `false`: too late, its time was seen to be over.
    pub(super) fn end(&self) -> bool {
        let unlimited = |before| (before != OVER).then_some(UNLIMITED);
        // Most holders have no limit, and then a load is enough.
        self.until.load(Ordering::Acquire) == UNLIMITED
            || self.until.fetch_update(Ordering::AcqRel, Ordering::Acquire, unlimited).is_ok()
    }

    /// Starts the time of the next holder at `now`. `false`: too late, the time of the holder
    /// before was seen to be over.
    pub(super) fn begin_anew(&self, now: Instant, at_most: Option<Duration>) -> bool {
        let now = micros(now.saturating_duration_since(self.granted));
        let until = at_most.map_or(UNLIMITED, |at_most| now.saturating_add(micros(at_most)).min(OVER - 1));
        let anew = |before| (before != OVER).then_some(until);
        let begins = self.until.fetch_update(Ordering::AcqRel, Ordering::Acquire, anew).is_ok();
        if begins {
            self.since.store(now, Ordering::Release);
        }
        begins
    }

    /// Until when the present holder may have it.
    pub(super) fn until(&self) -> Option<Instant> {
        match self.until.load(Ordering::Acquire) {
            UNLIMITED => None,
            OVER => Some(self.granted),
            until => Some(self.granted + Duration::from_micros(until)),
        }
    }

    pub(super) fn is_over(&self) -> bool {
        let mut until = self.until.load(Ordering::Acquire);
        loop {
            match until {
                UNLIMITED => return false,
                OVER => return true,
                _ if Instant::now() < self.granted + Duration::from_micros(until) => return false,
                _ => {}
            }
            match self.until.compare_exchange(until, OVER, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return true,
                Err(anew) => until = anew,
            }
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX).min(OVER - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_hours(1);

    #[test]
    fn each_holder_has_a_time_of_its_own() {
        let granted = Instant::now().checked_sub(HOUR).unwrap();
        let time = HoldTime::new(granted, Some(2 * HOUR));
        assert_eq!(time.until(), Some(granted + 2 * HOUR));
        assert!(!time.is_over());
        assert!(time.begin_anew(Instant::now(), Some(2 * HOUR)));
        assert!(time.until().unwrap() >= granted + 3 * HOUR);
        assert!(time.since() >= granted + HOUR);
        assert!(time.begin_anew(Instant::now(), None));
        assert_eq!(time.until(), None);
        assert!(time.begin_anew(Instant::now(), Some(HOUR)) && time.end());
        assert_eq!(time.until(), None);
        assert!(!time.is_over());
    }

    #[test]
    fn a_time_that_was_seen_to_be_over_stays_over() {
        let granted = Instant::now().checked_sub(HOUR).unwrap();
        let time = HoldTime::new(granted, Some(HOUR));
        assert!(time.begin_anew(Instant::now(), Some(HOUR)), "it was not seen yet");
        let time = HoldTime::new(granted, Some(HOUR));
        assert!(time.is_over());
        assert!(!time.end());
        assert!(!time.begin_anew(Instant::now(), Some(HOUR)));
        assert!(time.is_over());
    }
}
