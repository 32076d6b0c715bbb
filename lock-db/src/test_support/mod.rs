//! What the tests of applications can inspect and switch off. It is a layer below everything that
//! takes locks.

mod guards;
mod switch;

pub(crate) use self::guards::{OpenGuard, note_in_transaction, note_open_lease, note_open_row, of_this_test};
#[cfg(not(debug_assertions))]
pub(crate) use self::switch::warn_of_optimised_program;
#[cfg(feature = "testing-without-locks")]
pub use self::switch::without_locks;
pub(crate) use self::switch::{is_switched_off, no_lease, runs_without_lock};
