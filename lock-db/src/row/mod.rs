//! The row lock: `SELECT … FOR UPDATE` on the row of a name, held by a transaction.

mod attempt;
mod guard;
mod held;
mod known_rows;
mod lock;

pub use self::guard::RowGuard;
pub use self::held::HeldRow;
pub(crate) use self::known_rows::KnownRows;
pub use self::lock::RowLock;
