//! The row lock: `SELECT … FOR UPDATE` on the row of a name, held by a transaction.

mod guard;
mod lock;
mod locks;
mod queues;

pub use self::guard::RowGuard;
pub use self::lock::RowLock;
pub use self::locks::RowLocks;
pub(crate) use self::queues::RowQueues;
