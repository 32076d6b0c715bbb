//! The compiler's messages for mistakes around `#[distributed_lock]`, and what they point at. The
//! macro's own messages are tested in lock-macros.
//!
//! After an intended change, `TRYBUILD=overwrite` writes the `.stderr` files anew. Read them before
//! you keep them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::process::Command;

lock_tests::cases! {
    without a database:
    messages_point_at_the_mistake,
}

/// Compilers differ in their messages, so only the one that wrote the `.stderr` files is tested.
const COMPILER: &str = "rustc 1.95.";

fn messages_point_at_the_mistake() {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version =
        Command::new(rustc).arg("--version").output().map(|output| output.stdout).unwrap_or_default();
    if version.starts_with(COMPILER.as_bytes()) {
        trybuild::TestCases::new().compile_fail("ui/*.rs");
    } else {
        lock_tests::ignore(format_args!("the messages are those of {COMPILER}x"));
    }
}

fn main() -> std::process::ExitCode {
    lock_tests::run([cases()], [])
}
