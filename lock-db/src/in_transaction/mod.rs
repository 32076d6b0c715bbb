//! Locks of either kind that an open transaction holds. The row of the name is locked and written
//! in the transaction, and is free when it ends.

mod attempt;
mod find;
mod locking_row;
mod receipt;
mod several;

pub(crate) use self::attempt::{Attempt, Locked};
pub use self::receipt::HeldInTransaction;
pub(crate) use self::several::{in_order, lock_all};
