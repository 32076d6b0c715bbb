//! Locks that an open transaction holds, of either kind: the row of the name is locked and written in it, and free when
//! it ends.

mod attempt;
mod counts;
mod find;
mod held;
mod known_rows;
mod several;

pub(crate) use self::attempt::Attempt;
pub(crate) use self::counts::{Counted, Counts};
pub use self::held::HeldInTransaction;
pub(crate) use self::known_rows::KnownRows;
pub(crate) use self::several::{in_order, lock_all};
