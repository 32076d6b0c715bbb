#![doc = include_str!("recipe.md")]

mod assert;
mod locks;

pub(crate) use self::assert::inside_of;
pub use self::assert::{assert_held, assert_held_by};
pub use self::locks::{TestLocks, locks, locks_on};
#[cfg(feature = "testing-without-locks")]
pub use crate::test_support::without_locks;
