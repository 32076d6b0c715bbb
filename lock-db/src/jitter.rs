//! Pauses that do not keep step with each other.

use std::time::Duration;

/// Between half of it and all of it.
pub(crate) fn jitter(pause: Duration) -> Duration {
    let share = getrandom::u32().unwrap_or(u32::MAX);
    pause / 2 + (pause / 2).mul_f64(f64::from(share) / f64::from(u32::MAX))
}
