#![doc = include_str!("recipe.md")]

mod guards;
mod held;
mod locks;
mod switch;

pub(crate) use self::held::inside_of;
pub use self::held::{assert_held, assert_held_by};
pub use self::locks::{TestLocks, locks, locks_on};
#[cfg(not(debug_assertions))]
pub(crate) use self::switch::warn_of_optimised_program;
pub use self::switch::without_locks;
pub(crate) use self::switch::{is_switched_off, no_lease, runs_without_lock};
