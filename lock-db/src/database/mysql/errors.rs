//! What the errors of the servers mean. The SQLSTATE is HY000 for most of them, so the number decides.

use sqlx::mysql::MySqlDatabaseError;

use crate::database::Fault;

pub(super) const DUPLICATE_KEY: u16 = 1062;

pub(super) const DEADLOCK: u16 = 1213;

pub(super) const COMMIT_FAILED: u16 = 1180;

/// `EXECUTE` of what was not prepared on this connection.
pub(super) const UNKNOWN_STATEMENT: u16 = 1243;

pub(super) const NO_SUCH_SAVEPOINT: u16 = 1305;

pub(super) const OUT_OF_RANGE: u16 = 1690;

/// The SQLSTATE is HY000 for most of them, so the number decides.
pub(super) fn number(error: &sqlx::Error) -> Option<u16> {
    let error = error.as_database_error()?.try_downcast_ref::<MySqlDatabaseError>()?;
    Some(error.number())
}

pub(super) fn says(error: &sqlx::Error, text: &str) -> bool {
    error.as_database_error().is_some_and(|error| error.message().contains(text))
}

pub(super) fn classify(error: &sqlx::Error) -> Fault {
    if crate::error::is_connection_failure(error) {
        return Fault::Disconnected;
    }
    match number(error) {
        // lock wait timeout, NOWAIT, the two forms of "execution time exceeded", interrupted
        Some(1205 | 3572 | 1969 | 3024 | 1317) => Fault::Busy,
        // deadlock, which is also what certification answers, and the two other forms of that in group replication
        Some(DEADLOCK | 3101) => Fault::Deadlock,
        Some(COMMIT_FAILED) if says(error, "149") => Fault::Deadlock,
        // MariaDB: record has changed since last read
        Some(1020) => Fault::Serialization,
        Some(1146) => Fault::TableMissing,
        // a column, an index
        Some(1054 | 1176) => Fault::TableDiffers,
        // There is no such savepoint: none of what was set in this message, because no transaction is open.
        Some(NO_SUCH_SAVEPOINT) => Fault::TransactionEnded,
        // too many connections, shutdown, killed, idle for too long, node not ready; and read-only in two forms: a
        // server that is no primary any more, where a new connection may find the one that is. And a node of Galera
        // that was cut off from the others during a commit, which they may have carried out.
        Some(1040 | 1053 | 1927 | 4031 | 1047 | 1290 | 1836 | COMMIT_FAILED) => Fault::Disconnected,
        _ => Fault::Other,
    }
}
