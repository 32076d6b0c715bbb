//! What the SQLSTATEs of PostgreSQL mean:
//! <https://www.postgresql.org/docs/current/errcodes-appendix.html>.

use sqlx::postgres::{PgDatabaseError, PgSeverity};

use crate::database::Fault;

/// The transaction is no longer the one that was begun: see `transaction`.
pub(super) const LOGARITHM_OF_ZERO: &str = "2201E";

pub(super) const INSUFFICIENT_PRIVILEGE: &str = "42501";

/// The session or the server is read-only.
pub(super) const READ_ONLY: &str = "25006";

/// Raised by NOWAIT or `lock_timeout`.
pub(super) const LOCK_NOT_AVAILABLE: &str = "55P03";

/// The SQLSTATE of an error of sqlx, or of the one behind a [`StepError`](crate::database::StepError).
pub(super) fn code<'e>(error: impl Into<Option<&'e sqlx::Error>>) -> Option<&'e str> {
    Some(error.into()?.as_database_error()?.try_downcast_ref::<PgDatabaseError>()?.code())
}

pub(super) fn says<'e>(error: impl Into<Option<&'e sqlx::Error>>, text: &str) -> bool {
    let error = error.into().and_then(sqlx::Error::as_database_error);
    error.is_some_and(|error| error.message().contains(text))
}

/// For a `LOCK_NOT_AVAILABLE` error: whether `lock_timeout` raised it, and not NOWAIT. The error's
/// text is in the server's language, so its source routine tells.
pub(super) fn is_timeout<'e>(error: impl Into<Option<&'e sqlx::Error>>) -> bool {
    let error = error
        .into()
        .and_then(sqlx::Error::as_database_error)
        .and_then(|error| error.try_downcast_ref::<PgDatabaseError>());
    error.and_then(PgDatabaseError::routine) == Some("ProcessInterrupts")
}

pub(super) fn meaning(error: &sqlx::Error) -> Option<&'static str> {
    match code(error)? {
        READ_ONLY => Some("the session may only read, as on a server that is no longer the primary"),
        _ => None,
    }
}

pub(super) fn classify(error: &sqlx::Error) -> Fault {
    if let Some(fault) = Fault::of_sqlx(error) {
        return fault;
    }
    let Some(error) = error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>())
    else {
        return Fault::Other;
    };
    match error.code() {
        LOCK_NOT_AVAILABLE => Fault::Busy,
        // in_failed_sql_transaction, no_active_sql_transaction
        "25P02" | "25P01" => Fault::TransactionEnded,
        "40P01" => Fault::Deadlock,
        "40001" => Fault::Serialization,
        "42P01" => Fault::TableMissing,
        "42703" => Fault::TableDiffers,
        // untranslatable_character, character_not_in_repertoire
        "22P05" | "22021" => Fault::Unstorable,
        // invalid_authorization_specification (no such role, not in pg_hba.conf, may not log in),
        // invalid_password, invalid_catalog_name (no such database), insufficient_privilege, also
        // for a database at the login
        "28000" | "28P01" | "3D000" | INSUFFICIENT_PRIVILEGE => Fault::Refused,
        // read_only_sql_transaction: the server may no longer be the primary. A new connection
        // leads to the current primary, or finds that it is a setting.
        READ_ONLY => Fault::Disconnected,
        code if code.starts_with("08") => Fault::Disconnected,
        // Whatever the code, the server has closed the connection or rejected it: too many
        // connections, of the server or of a role (53300), starting up or shutting down (57P03,
        // 57P01), crashed (57P02), idle for too long (57P05, 25P03), a database that takes no
        // connections at the moment (55000).
        _ if matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic) => Fault::Disconnected,
        // query_canceled: statement_timeout, or by an administrator
        "57014" => Fault::Passing,
        // insufficient_resources (disk full, out of memory, a configured limit), system_error,
        // io_error
        code if code.starts_with("53") || code.starts_with("58") => Fault::Passing,
        // A prepared statement is gone (a pooler, DEALLOCATE), or its table was altered ("cached
        // plan must not change result type"). A new connection prepares its statements again.
        "26000" | "0A000" => Fault::Disconnected,
        _ => Fault::Other,
    }
}
