//! Database errors, and what they mean for a lock.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::is_rt_shutdown_err;

use super::LockDatabase;
use crate::error::{Action, Error, Loss};
use crate::name::Name;
use crate::text::in_one_line;

/// See [`LockDatabase::FOLDER`].
const SQLITE: &str = "sqlite";

/// What an error means for a lock. Each database decides by error code, in one table: `errors.rs`
/// in its folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Another transaction is in the way. Nothing was done, and waiting helps. The transaction, if
    /// any, is still open.
    Busy,
    /// The transaction was ended to break a deadlock.
    Deadlock,
    /// The transaction's snapshot is too old.
    Serialization,
    /// No such table.
    TableMissing,
    /// The table lacks a column.
    TableDiffers,
    /// The table can't keep locks in its present form.
    TableUnusable,
    /// The transaction was ended, or can only be rolled back.
    TransactionEnded,
    /// The connection or the server is gone, or not available yet. Whether the statement was
    /// executed is unknown.
    Disconnected,
    /// The server refuses temporarily, and nothing was done: a limit is reached, or the statement
    /// was cancelled. The connection is as usable as before.
    Passing,
    /// The server refuses until a setting is changed: no such database or role, a wrong password, a
    /// missing privilege, a read-only session.
    Refused,
    /// The text can't be stored in this database's encoding.
    Unstorable,
    /// Anything else.
    Other,
}

/// An error of a database with what it means for a lock.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) fault: Fault,
    cause: Cause,
    /// Text for people, without the prefix that sqlx adds to network errors.
    reason: String,
    source: Arc<sqlx::Error>,
    /// Directory of the database's migrations.
    folder: &'static str,
}

/// Origin of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cause {
    /// The database or sqlx reported it.
    Said,
    /// The server does not answer. What it does with the statement is unknown.
    Silence,
    /// A hook of the application's pool caused it.
    Hook,
    /// The runtime that opened the connection has ended.
    Runtime,
}

impl Failure {
    pub(crate) fn new<DB: LockDatabase>(source: sqlx::Error) -> Self {
        Self::shared::<DB>(Arc::new(source))
    }

    /// A failure with an error that other callers share.
    pub(crate) fn shared<DB: LockDatabase>(source: Arc<sqlx::Error>) -> Self {
        let fault = DB::classify(&source);
        let cause = match &*source {
            source if hook_failure(source).is_some() => Cause::Hook,
            sqlx::Error::Io(error) if is_rt_shutdown_err(error) => Cause::Runtime,
            _ => Cause::Said,
        };
        let reason = reason(DB::NAME, fault, &source);
        Self { fault, cause, reason, source, folder: DB::FOLDER }
    }

    /// The failure behind an error that one caller got, for other callers that wait for the same
    /// result. `None`: the error is not from the database.
    pub(crate) fn of_error<DB: LockDatabase>(error: &Error) -> Option<Self> {
        let source = Arc::clone(error.of_database()?);
        let mut failure = Self::shared::<DB>(source);
        match error {
            Error::Unreachable { silent, reason, .. } => {
                failure.reason.clone_from(reason);
                failure.fault = Fault::Disconnected;
                if *silent {
                    failure.cause = Cause::Silence;
                }
            }
            // The source may be an error of lock-db's own, which no database classifies.
            Error::Database { reason, retryable, .. } => {
                failure.reason.clone_from(reason);
                failure.fault = if *retryable { Fault::Passing } else { Fault::Other };
            }
            Error::Refused { reason, .. } => {
                failure.reason.clone_from(reason);
                failure.fault = Fault::Refused;
            }
            _ => {}
        }
        Some(failure)
    }

    /// A failure that lock-db detected itself, without an error of sqlx.
    fn ours<DB: LockDatabase>(fault: Fault, kind: io::ErrorKind, reason: String) -> Self {
        let source = Arc::new(sqlx::Error::Io(io::Error::new(kind, reason.clone())));
        Self { fault, cause: Cause::Said, reason, source, folder: DB::FOLDER }
    }

    /// A failure of no database.
    #[cfg(all(test, lock_db_shuttle))]
    pub(crate) fn for_tests() -> Self {
        let (source, reason) = (Arc::new(sqlx::Error::WorkerCrashed), String::new());
        Self { fault: Fault::Disconnected, cause: Cause::Said, reason, source, folder: "" }
    }

    pub(crate) fn no_answer<DB: LockDatabase>(limit: Duration) -> Self {
        let reason = format!("{} did not answer within {limit:.3?}", DB::NAME);
        Self {
            cause: Cause::Silence,
            ..Self::ours::<DB>(Fault::Disconnected, io::ErrorKind::TimedOut, reason)
        }
    }

    /// A private connection was not opened, because of the application's hook.
    pub(crate) fn hook<DB: LockDatabase>(failure: HookFailure) -> Self {
        Self::new::<DB>(failure.into())
    }

    /// Whether a hook of the application's pool keeps the connection from being opened.
    pub(crate) fn is_hook(&self) -> bool {
        self.cause == Cause::Hook
    }

    /// Whether the server did not answer at all.
    pub(crate) fn is_silence(&self) -> bool {
        let is_timeout = |error: &io::Error| error.kind() == io::ErrorKind::TimedOut;
        self.cause == Cause::Silence || matches!(&*self.source, sqlx::Error::Io(error) if is_timeout(error))
    }

    /// Whether the connection belongs to a runtime that has ended.
    pub(crate) fn is_of_ended_runtime(&self) -> bool {
        self.cause == Cause::Runtime
    }

    pub(crate) fn source(&self) -> &Arc<sqlx::Error> {
        &self.source
    }

    pub(crate) fn table_missing<DB: LockDatabase>() -> Self {
        let reason = "the table `distributed_lock` does not exist".to_owned();
        let source = Arc::new(sqlx::Error::RowNotFound);
        Self { fault: Fault::TableMissing, cause: Cause::Said, reason, source, folder: DB::FOLDER }
    }

    pub(crate) fn table_differs<DB: LockDatabase>(column: &str) -> Self {
        let source = Arc::new(sqlx::Error::ColumnNotFound(column.into()));
        let reason = reason(DB::NAME, Fault::TableDiffers, &source);
        Self { fault: Fault::TableDiffers, cause: Cause::Said, reason, source, folder: DB::FOLDER }
    }

    /// The table has all columns and still can't be used.
    pub(crate) fn unusable_table<DB: LockDatabase>(reason: String) -> Self {
        let source = Arc::new(sqlx::Error::Configuration(reason.clone().into()));
        Self { fault: Fault::TableUnusable, cause: Cause::Said, reason, source, folder: DB::FOLDER }
    }

    /// The whole table is locked, although no error of the database says so.
    pub(crate) fn table_locked<DB: LockDatabase>() -> Self {
        let reason = "another transaction has locked the table `distributed_lock` as a whole".to_owned();
        Self::ours::<DB>(Fault::Busy, io::ErrorKind::WouldBlock, reason)
    }

    /// A connection was given up, and the server has not ended its session yet.
    pub(crate) fn session_remains<DB: LockDatabase>() -> Self {
        let reason = format!("an earlier session of this process has not ended yet on {}", DB::NAME);
        Self::ours::<DB>(Fault::Disconnected, io::ErrorKind::ResourceBusy, reason)
    }

    /// Explains a busy SQLite database, where one writer excludes all others. `is_free`: whether
    /// the lock is free, as far as others can see.
    pub(crate) fn written_by_others(self, name: &Name, is_free: bool) -> Self {
        if self.folder != SQLITE || self.fault != Fault::Busy {
            return self;
        }
        let reason = if is_free {
            format!(
                "nobody holds `{name}`, but another transaction, perhaps your own, is writing to this SQLite database"
            )
        } else {
            format!(
                "another transaction, perhaps your own, is writing to this SQLite database, and may hold `{name}`"
            )
        };
        Self { reason, ..self }
    }

    /// The row is free and not locked, but could not be written.
    pub(crate) fn not_written<DB: LockDatabase>() -> Self {
        let reason = "the lock is free and its row is not locked, but writing it has no effect: is there a trigger on \
                      `distributed_lock`, or is the right to update it missing?";
        let source = Arc::new(sqlx::Error::Configuration(reason.into()));
        let reason = reason.to_owned();
        Self { fault: Fault::Other, cause: Cause::Said, reason, source, folder: DB::FOLDER }
    }

    /// Whether the transaction in which it happened can't continue.
    pub(crate) fn ends_transaction(&self) -> bool {
        matches!(self.fault, Fault::Deadlock | Fault::Serialization | Fault::TransactionEnded)
    }

    /// Whether the same request may succeed a moment later on the same connection.
    pub(crate) fn passes(&self) -> bool {
        matches!(self.fault, Fault::Busy | Fault::Deadlock | Fault::Serialization | Fault::Passing)
    }

    /// Whether it is a temporary obstacle, and the transaction in which it happened can continue.
    pub(crate) fn is_busy(&self) -> bool {
        self.fault == Fault::Busy
    }

    /// Whether it concerns the table as a whole.
    pub(crate) fn is_about_table(&self) -> bool {
        matches!(self.fault, Fault::TableMissing | Fault::TableDiffers | Fault::TableUnusable)
    }

    /// Whether every other request of the same batch would fail in the same way.
    pub(crate) fn is_the_same_for_all(&self) -> bool {
        self.is_about_table()
            || matches!(self.fault, Fault::Disconnected | Fault::Passing | Fault::Refused | Fault::Busy)
    }

    /// Converts the failure into the caller's error.
    pub(crate) fn into_error(self, action: Action, name: Option<&Name>) -> Error {
        let is_silence = self.is_silence();
        let passes = self.fault == Fault::Passing || self.fault == Fault::Busy;
        let Self { fault, reason, source, folder, .. } = self;
        let known = || name.map(Name::given).unwrap_or_default();
        let (name, within) = (name.map(Name::given), None);
        match fault {
            Fault::TableMissing | Fault::TableDiffers => {
                Error::SchemaMissing { reason, folder, source: Some(source) }
            }
            Fault::TableUnusable => Error::UnsupportedTable { reason },
            Fault::Unstorable => Error::InvalidName {
                name: known(),
                reason: "the database has an encoding in which it can't be stored",
            },
            Fault::TransactionEnded => Error::lost(known(), Loss::TransactionEnded),
            Fault::Deadlock => Error::Deadlock { name: known(), source },
            Fault::Serialization => Error::Serialization { name: known(), source: Some(source) },
            Fault::Disconnected if action == Action::Commit => {
                Error::CommitUnknown { name: known(), reason, source }
            }
            Fault::Disconnected => {
                Error::Unreachable { action, name, within, silent: is_silence, reason, source }
            }
            Fault::Refused => Error::Refused { action, name, within, reason, source },
            Fault::Busy | Fault::Passing | Fault::Other => {
                let retryable = passes && action != Action::Commit;
                Error::Database { action, name, within, retryable, reason, source }
            }
        }
    }
}

/// What a hook of the application's pool did instead of letting a private connection through.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum HookFailure {
    #[error("the pool's 'after_connect' hook panicked: {0}")]
    Panicked(String),
    /// Or the hook has returned errors, which sqlx logs, does not report, and retries.
    #[error("the pool's 'after_connect' hook has not returned for {}s, or has returned errors", .0.as_secs_f32().round())]
    Waits(Duration),
}

impl From<HookFailure> for sqlx::Error {
    fn from(failure: HookFailure) -> Self {
        let kind = match failure {
            HookFailure::Waits(_) => io::ErrorKind::TimedOut,
            HookFailure::Panicked(_) => io::ErrorKind::Other,
        };
        Self::Io(io::Error::new(kind, failure))
    }
}

fn hook_failure(source: &sqlx::Error) -> Option<&HookFailure> {
    match source {
        sqlx::Error::Io(error) => error.get_ref()?.downcast_ref(),
        _ => None,
    }
}

/// One line, for logs.
impl std::fmt::Display for Failure {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.reason)
    }
}

/// One line of text for people, without the prefix that sqlx adds to network errors.
fn reason(database: &str, fault: Fault, source: &sqlx::Error) -> String {
    let text = match source {
        sqlx::Error::Io(error) => of_network(database, error),
        sqlx::Error::Protocol(text) => text.clone(),
        sqlx::Error::Configuration(error) => error.to_string(),
        sqlx::Error::ColumnNotFound(column) if fault == Fault::TableDiffers => format!(
            "the table `distributed_lock` lacks the column `{column}`, which this version of lock-db needs"
        ),
        _ if fault == Fault::TableMissing => "the table `distributed_lock` does not exist".to_owned(),
        _ if fault == Fault::TableDiffers => {
            "the table `distributed_lock` is not what this version of lock-db needs".to_owned()
        }
        source if fault == Fault::Busy => {
            format!("another transaction keeps the others from writing: {source}")
        }
        source => source.to_string(),
    };
    in_one_line(&text).to_string()
}

/// Adds the name of the database to a network error.
fn of_network(database: &str, error: &io::Error) -> String {
    if is_rt_shutdown_err(error) {
        return format!(
            "{error} (the runtime that made the connection has ended: give each runtime a pool of its own)"
        );
    }
    let is_hook = error.get_ref().and_then(|inner| inner.downcast_ref::<HookFailure>()).is_some();
    let is_ours = error.get_ref().is_some() && error.raw_os_error().is_none();
    let kind = error.kind();
    let says = match kind {
        _ if is_hook => return error.to_string(),
        // Already a text of lock-db: a silent server, a locked table, a session or a task that has
        // ended.
        io::ErrorKind::TimedOut
        | io::ErrorKind::WouldBlock
        | io::ErrorKind::ResourceBusy
        | io::ErrorKind::ConnectionAborted
            if is_ours =>
        {
            return error.to_string();
        }
        io::ErrorKind::ConnectionRefused
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::TimedOut
        | io::ErrorKind::UnexpectedEof => kind.to_string(),
        _ => error.to_string(),
    };
    match kind {
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof => format!("the connection to {database} broke ({says})"),
        _ => format!("{database} can't be reached ({says})"),
    }
}

/// Whether the connection to the database failed. sqlx reports this in the same way for every
/// database.
pub(crate) fn is_connection_failure(error: &sqlx::Error) -> bool {
    matches!(
        error,
        sqlx::Error::Io(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::WorkerCrashed
    )
}
