//! Runs a test in very many interleavings of its threads. docs/testing.md describes how, and what
//! is checked.
//!
//! This uses shuttle, which draws interleavings at random, and not loom, which tries all of them: a
//! queue with three callers and a session has far too many. Also, loom's `Arc` has neither `Weak`
//! nor `Arc<str>`. In addition loom would check memory orderings weaker than `SeqCst`. The atomics
//! here are independent counters and flags. Where another one depends on them, they are written and
//! read with at least `Release` and `Acquire`.
//!
//! tokio's channels and `Notify` are the real ones, and each operation on them is one step. They
//! are used where nothing else is shared, or directly after an unlock or a read of an atomic. Other
//! threads may run between the two.

#![allow(clippy::unwrap_used)]

use std::env;
use std::sync::LazyLock;

use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler};
use shuttle::{Config, Runner};
use tokio::runtime::{Builder, Runtime};

/// The number of schedules for each test and scheduler.
const SCHEDULES: usize = 2000;
/// The depths of PCT: the number of threads that are interrupted midway, plus one.
const DEPTHS: [usize; 2] = [3, 6];

/// Runs a test in `LOCK_DB_TEST_SCHEDULES` schedules of each scheduler, or only in the schedule of
/// the file `LOCK_DB_TEST_SCHEDULE`, which a failed test has printed.
pub(crate) fn explore(test: fn()) {
    // Timeouts need a runtime with a clock. It is not driven, so no timeout expires. It is never
    // dropped, because the tasks that a failed test leaves behind must not be woken.
    static RUNTIME: LazyLock<Runtime> =
        LazyLock::new(|| Builder::new_current_thread().enable_time().build().unwrap());
    let _entered = RUNTIME.enter();
    if let Ok(file) = env::var("LOCK_DB_TEST_SCHEDULE") {
        run(ReplayScheduler::new_from_file(file).unwrap(), test);
        return;
    }
    let schedules = env::var("LOCK_DB_TEST_SCHEDULES").map_or(SCHEDULES, |it| it.parse().unwrap());
    run(RandomScheduler::new(schedules), test);
    for depth in DEPTHS {
        run(PctScheduler::new(depth, schedules.div_ceil(DEPTHS.len())), test);
    }
}

fn run(scheduler: impl Scheduler + 'static, test: fn()) {
    let mut config = Config::new();
    // Large enough for the futures of a debug build.
    config.stack_size = 0x40_000;
    Runner::new(scheduler, config).run(test);
}

/// Returns a number below `choices`, as the schedule decides.
pub(crate) fn draw(choices: usize) -> usize {
    use shuttle::rand::Rng;

    shuttle::rand::thread_rng().gen_range(0..choices)
}

/// Other threads may run here, or not.
pub(crate) async fn pause() {
    for _ in 0..draw(3) {
        shuttle::future::yield_now().await;
    }
}
