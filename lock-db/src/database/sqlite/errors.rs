//! What the result codes of SQLite mean: <https://www.sqlite.org/rescode.html>.

use std::borrow::Cow;

use crate::database::Fault;

pub(super) const READ_ONLY: &str = "8";

/// The code of an error of sqlx, or of the one behind a [`StepError`](crate::database::StepError).
pub(super) fn code<'e>(error: impl Into<Option<&'e sqlx::Error>>) -> Option<Cow<'e, str>> {
    error.into()?.as_database_error()?.code()
}

pub(super) fn classify(error: &sqlx::Error) -> Fault {
    if let Some(fault) = Fault::of_sqlx(error) {
        return fault;
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
