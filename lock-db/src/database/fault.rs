//! What an error means for a lock.

#[cfg(any(feature = "postgres", feature = "mysql", feature = "sqlite"))]
use super::LockDatabase;

/// What an error means for a lock. Each database decides by its codes, in one table: `errors.rs` in its folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Another transaction is in the way: nothing was done, and waiting helps. The transaction, if any, goes on.
    Busy,
    /// The transaction was ended to break a deadlock.
    Deadlock,
    /// The transaction's snapshot is too old.
    Serialization,
    /// No such table.
    TableMissing,
    /// The table lacks a column.
    TableDiffers,
    /// The table can't keep locks as it is.
    TableUnusable,
    /// The transaction was ended, or can only be rolled back.
    TransactionEnded,
    /// The connection or the server is gone, or not there yet. Whether the statement was carried out is unknown.
    Disconnected,
    /// The server refuses for the moment, and nothing was done: a limit is reached, or the statement was cancelled. It passes by
    /// itself, and the connection is as good as before.
    Passing,
    /// The server refuses, and goes on refusing until somebody changes a setting: no such database or role, a wrong password, a
    /// right that is missing, a session that may only read.
    Refused,
    /// The text can't be stored in this database's encoding.
    Unstorable,
    /// Anything else.
    Other,
}

/// What an error means, whichever database it comes from.
#[cfg_attr(not(any(feature = "postgres", feature = "mysql", feature = "sqlite")), allow(unused_variables))]
fn faults(error: &sqlx::Error) -> Vec<Fault> {
    vec![
        #[cfg(feature = "postgres")]
        sqlx::Postgres::classify(error),
        #[cfg(feature = "mysql")]
        sqlx::MySql::classify(error),
        #[cfg(feature = "sqlite")]
        sqlx::Sqlite::classify(error),
    ]
}

/// Whether the way to the database is gone, or not there yet.
pub(crate) fn is_disconnected(error: &sqlx::Error) -> bool {
    faults(error).contains(&Fault::Disconnected)
}

/// Whether another transaction is in the way: on SQLite one that writes, else one that has the whole table locked.
pub(crate) fn is_busy(error: &sqlx::Error) -> bool {
    faults(error).contains(&Fault::Busy)
}

/// Whether the same may succeed when it is asked for again later.
pub(crate) fn passes(error: &sqlx::Error) -> bool {
    faults(error).iter().any(|fault| matches!(fault, Fault::Disconnected | Fault::Passing | Fault::Busy))
}
