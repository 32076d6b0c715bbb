#![doc = include_str!("recipe.md")]

mod held;
mod locks;
mod switch;

pub use self::held::assert_held;
pub(crate) use self::held::inside_of;
pub use self::locks::{TestLocks, locks};
#[cfg(not(debug_assertions))]
pub(crate) use self::switch::warn_of_optimised_program;
pub use self::switch::without_locks;
pub(crate) use self::switch::{is_switched_off, no_lease, runs_without_lock};
