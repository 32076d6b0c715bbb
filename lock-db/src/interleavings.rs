//! Runs a test in very many orders of the steps of its threads; docs/testing.md says how, and what is checked.
//!
//! By shuttle, which draws the orders, and not by loom, which tries all of them: a queue with three callers and a session
//! has far too many, and loom's `Arc` has neither `Weak` nor `Arc<str>`. What loom would see besides are orders of memory
//! below `SeqCst`. The atomics here are counters and flags of which each tells its own story, and are written and read
//! with `Release` and `Acquire` at least where another one depends on them.
//!
//! tokio's channels and `Notify` are the real ones, and each operation on them is one step. They are used where nothing else
//! is shared, or right after an unlock or a read of an atomic, and others may go on after the one and before the other.

#![allow(clippy::unwrap_used)]

use std::env;
use std::sync::LazyLock;

use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler};
use shuttle::{Config, Runner};
use tokio::runtime::{Builder, Runtime};

/// Of each test, by each of the schedulers.
const SCHEDULES: usize = 2000;
/// How many threads are stopped in the middle, and one more, in the orders of PCT.
const DEPTHS: [usize; 2] = [3, 6];

/// Runs a test in `LOCK_DB_TEST_SCHEDULES` orders by each of the schedulers, or in the one in the file
/// `LOCK_DB_TEST_SCHEDULE`, which a failure has printed.
pub(crate) fn explore(test: fn()) {
    // Timeouts ask for a runtime with a clock. Nobody drives it, so none of them is ever over; and it never ends, because
    // what a failure leaves behind must not be woken.
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
    // Futures of a debug build.
    config.stack_size = 0x40_000;
    Runner::new(scheduler, config).run(test);
}

/// One of so many, as the schedule says.
pub(crate) fn draw(choices: usize) -> usize {
    use shuttle::rand::Rng;

    shuttle::rand::thread_rng().gen_range(0..choices)
}

/// Others may go on, or not.
pub(crate) async fn pause() {
    for _ in 0..draw(3) {
        shuttle::future::yield_now().await;
    }
}
