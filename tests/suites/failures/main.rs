//! Processes, networks and servers that fail.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod dead_holders;
mod distant_server;
mod outages;
mod process_pauses;
mod processes;
mod read_only_servers;
mod stalls;

use std::process::ExitCode;

fn main() -> ExitCode {
    lock_tests::run(
        [
            dead_holders::cases(),
            distant_server::cases(),
            outages::cases(),
            process_pauses::cases(),
            processes::cases(),
            read_only_servers::cases(),
            stalls::cases(),
        ],
        [dead_holders::roles(), process_pauses::roles(), processes::roles()],
    )
}
