//! The repository itself: its files, the harness of the tests, and the order of the modules.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod copies;
mod harness;
mod module_order;

use std::process::ExitCode;

fn main() -> ExitCode {
    lock_tests::run([copies::cases(), harness::cases(), module_order::cases()], [harness::roles()])
}
