//! Reproducible random numbers.

use std::env;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// The value of `LOCK_DB_TEST_SEED`, or a new one.
pub fn seed() -> u64 {
    match env::var("LOCK_DB_TEST_SEED") {
        Ok(seed) => seed.parse().expect("LOCK_DB_TEST_SEED is a number"),
        Err(_) => RandomState::new().hash_one(std::process::id()),
    }
}

/// `SplitMix64`.
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit as u64).unwrap_or(0)
    }

    pub fn pick<V: Copy>(&mut self, values: &[V]) -> V {
        values[self.below(values.len())]
    }

    /// A duration of at least `from` and less than `to` milliseconds.
    pub fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_micros(from * 1000 + self.next() % ((to - from) * 1000))
    }
}
