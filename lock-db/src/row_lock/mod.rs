//! The row lock: `SELECT … FOR UPDATE` on the row of a name, held by a transaction.

mod batch;
mod guard;
mod request;

pub use self::batch::RowLocks;
pub use self::guard::RowGuard;
pub use self::request::RowLock;
