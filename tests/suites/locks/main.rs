//! Leases and row locks: how they are requested, held, shared within a process and released.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod bad_input;
mod cancellation;
mod contention;
mod fairness;
mod first_use;
mod hand_off;
mod hold_times;
mod insert_lock;
mod macro_forms;
mod many_queues;
mod names;
mod reentrancy;
mod reported_as_held;
mod row_lock;
mod runtimes;

use std::process::ExitCode;

fn main() -> ExitCode {
    lock_tests::run(
        [
            bad_input::cases(),
            cancellation::cases(),
            contention::cases(),
            fairness::cases(),
            first_use::cases(),
            hand_off::cases(),
            hold_times::cases(),
            insert_lock::cases(),
            macro_forms::cases(),
            many_queues::cases(),
            names::cases(),
            reentrancy::cases(),
            reported_as_held::cases(),
            row_lock::cases(),
            runtimes::cases(),
        ],
        [fairness::roles()],
    )
}
