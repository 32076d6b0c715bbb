//! The row lock: `SELECT … FOR UPDATE` on the row of a name, held by a transaction.

mod batch;
mod begin;
mod guard;
mod guards;
mod locked_rows;
mod own_transaction;
mod request;
mod taking;

pub use self::batch::RowLocks;
pub use self::guard::RowGuard;
pub use self::guards::RowGuards;
pub use self::request::RowLock;
