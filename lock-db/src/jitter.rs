//! Random pauses, so that processes do not act in step.

use std::time::Duration;

/// Returns a random duration between half of `pause` and all of it.
pub(crate) fn jitter(pause: Duration) -> Duration {
    let share = getrandom::u32().unwrap_or(u32::MAX);
    pause / 2 + (pause / 2).mul_f64(f64::from(share) / f64::from(u32::MAX))
}
