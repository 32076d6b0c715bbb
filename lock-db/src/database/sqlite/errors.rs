//! What the result codes of SQLite mean: <https://www.sqlite.org/rescode.html>.

use std::borrow::Cow;

use crate::database::Fault;

pub(super) const READ_ONLY: &str = "8";

pub(super) fn code(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    error.as_database_error()?.code()
}

pub(super) fn classify(error: &sqlx::Error) -> Fault {
    if crate::database::is_connection_failure(error) {
        return Fault::Disconnected;
    }
    match error {
        sqlx::Error::BeginFailed => return Fault::TransactionEnded,
        sqlx::Error::Configuration(_) => return Fault::Refused,
        _ => {}
    }
    let Some(error) = error.as_database_error() else {
        return Fault::Other;
    };
    match error.code().as_deref() {
        // SQLITE_BUSY_SNAPSHOT: another writer committed after this transaction's first read
        Some("517") => Fault::Serialization,
        // SQLITE_BUSY with _RECOVERY and _TIMEOUT, SQLITE_LOCKED with _SHAREDCACHE
        Some("5" | "261" | "773" | "6" | "262") => Fault::Busy,
        // SQLITE_FULL, SQLITE_NOMEM, SQLITE_INTERRUPT
        Some("13" | "7" | "9") => Fault::Passing,
        // SQLITE_READONLY and its variants except _DBMOVED and _RECOVERY, SQLITE_CANTOPEN and its
        // variants, SQLITE_PERM, SQLITE_AUTH, SQLITE_NOTADB
        Some(
            READ_ONLY | "520" | "776" | "1288" | "1544" | "14" | "270" | "526" | "782" | "1038" | "1294"
            | "1550" | "3" | "23" | "26",
        ) => Fault::Refused,
        // A plain SQLITE_ERROR, which only its text identifies.
        _ if error.message().starts_with("no such table: ")
            && error.message().ends_with("distributed_lock") =>
        {
            Fault::TableMissing
        }
        _ if error.message().starts_with("no such column")
            || error.message().contains("has no column named") =>
        {
            Fault::TableDiffers
        }
        _ => Fault::Other,
    }
}
