//! The compiler's messages for mistakes around `#[distributed_lock]`, and what they point at. The
//! macro's own messages are tested in lock-macros.
//!
//! After an intended change, `TRYBUILD=overwrite` writes the `.stderr` files anew. Read them before
//! you keep them.

use std::process::Command;

/// Compilers differ in their messages, so only the one that wrote the `.stderr` files is tested.
const COMPILER: &str = "rustc 1.95.";

#[test]
fn mistakes_point_at_the_right_place() {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version =
        Command::new(rustc).arg("--version").output().map(|output| output.stdout).unwrap_or_default();
    if version.starts_with(COMPILER.as_bytes()) {
        trybuild::TestCases::new().compile_fail("ui/*.rs");
    } else {
        eprintln!("NOT TESTED: the messages of a compiler other than {COMPILER}x");
    }
}
