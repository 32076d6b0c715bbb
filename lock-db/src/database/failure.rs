//! Database errors, and what they mean for a lock.

use std::borrow::Cow;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::is_rt_shutdown_err;

use super::{LockDatabase, StepError};
use crate::error::{Action, Error, Finding, Loss};
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

const TABLE_MISSING: &str = "the table `distributed_lock` does not exist";

impl Fault {
    /// What an error means that sqlx makes itself, in the same way for every database. `None`: it
    /// is an error of the server, or has no meaning for a lock.
    #[cfg(any(feature = "postgres", feature = "mysql", feature = "_sqlite"))]
    pub(crate) fn of_sqlx(error: &sqlx::Error) -> Option<Self> {
        match error {
            sqlx::Error::Io(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::WorkerCrashed => Some(Self::Disconnected),
            sqlx::Error::Configuration(_) => Some(Self::Refused),
            sqlx::Error::BeginFailed => Some(Self::TransactionEnded),
            _ => None,
        }
    }
}

/// An error of a database with what it means for a lock.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub(crate) fault: Fault,
    cause: Cause,
    /// What is known, for people, in words of lock-db. The words of the server are in `source`.
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
    /// A hook of the application's pool caused it, and may still be running.
    Hook { is_silent: bool },
    /// The runtime that opened the connection has ended.
    Runtime,
}

impl Failure {
    pub(crate) fn new<DB: LockDatabase>(error: impl Into<StepError>) -> Self {
        match error.into() {
            StepError::Sqlx(source) => Self::shared::<DB>(Arc::new(source)),
            StepError::OutcomeUnknown(source) => {
                Self { fault: Fault::Disconnected, ..Self::shared::<DB>(Arc::new(source)) }
            }
            StepError::Silent(limit) => Self::no_answer::<DB>(limit),
            StepError::Found(fault, text) => Self::found::<DB>(fault, text),
            StepError::Explained(fault, reason, source) => {
                Self { fault, reason, ..Self::shared::<DB>(Arc::new(source)) }
            }
        }
    }

    /// A failure with an error that other callers share.
    fn shared<DB: LockDatabase>(source: Arc<sqlx::Error>) -> Self {
        let fault = DB::classify(&source);
        let cause = match &*source {
            sqlx::Error::Io(error) if is_rt_shutdown_err(error) => Cause::Runtime,
            _ => Cause::Said,
        };
        let reason = reason::<DB>(fault, &source);
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

    /// lock-db found it itself, without an error of sqlx.
    fn found<DB: LockDatabase>(fault: Fault, reason: impl Into<Cow<'static, str>>) -> Self {
        let reason = reason.into().into_owned();
        let source = Finding::error(reason.clone());
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
        Self { cause: Cause::Silence, ..Self::found::<DB>(Fault::Disconnected, reason) }
    }

    /// A private connection was not opened, because of the application's hook.
    pub(crate) fn hook<DB: LockDatabase>(failure: &HookFailure) -> Self {
        let is_silent = matches!(failure, HookFailure::Waits(_));
        Self {
            cause: Cause::Hook { is_silent },
            ..Self::found::<DB>(Fault::Disconnected, failure.to_string())
        }
    }

    /// Whether a hook of the application's pool keeps the connection from being opened.
    pub(crate) fn is_hook(&self) -> bool {
        matches!(self.cause, Cause::Hook { .. })
    }

    /// Whether the server did not answer at all.
    pub(crate) fn is_silence(&self) -> bool {
        let is_timeout = |error: &io::Error| error.kind() == io::ErrorKind::TimedOut;
        matches!(self.cause, Cause::Silence | Cause::Hook { is_silent: true })
            || matches!(&*self.source, sqlx::Error::Io(error) if is_timeout(error))
    }

    /// Whether the connection belongs to a runtime that has ended.
    pub(crate) fn is_of_ended_runtime(&self) -> bool {
        self.cause == Cause::Runtime
    }

    pub(crate) fn source(&self) -> &Arc<sqlx::Error> {
        &self.source
    }

    pub(crate) fn table_missing<DB: LockDatabase>() -> Self {
        Self::found::<DB>(Fault::TableMissing, TABLE_MISSING)
    }

    pub(crate) fn table_differs<DB: LockDatabase>(column: &str) -> Self {
        let reason = format!(
            "the table `distributed_lock` lacks the column `{column}`, which this version of lock-db needs"
        );
        Self::found::<DB>(Fault::TableDiffers, reason)
    }

    /// The table has all columns and still can't be used.
    pub(crate) fn unusable_table<DB: LockDatabase>(reason: String) -> Self {
        Self::found::<DB>(Fault::TableUnusable, reason)
    }

    /// The whole table is locked, although no error of the database says so.
    pub(crate) fn table_locked<DB: LockDatabase>() -> Self {
        let reason = "another transaction has locked the table `distributed_lock` as a whole";
        Self::found::<DB>(Fault::Busy, reason)
    }

    /// A connection was given up, and the server has not ended its session yet.
    pub(crate) fn session_remains<DB: LockDatabase>() -> Self {
        let reason = format!("an earlier session of this process has not ended yet on {}", DB::NAME);
        Self::found::<DB>(Fault::Disconnected, reason)
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
        Self::found::<DB>(Fault::Other, reason)
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

/// One line with the words of the server, for logs.
impl std::fmt::Display for Failure {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.reason)?;
        match Finding::unless_ours(&self.source) {
            Some(source) => write!(formatter, ": {}", in_one_line(&source.to_string())),
            None => Ok(()),
        }
    }
}

/// One line of text for people, which does not repeat the error of sqlx.
fn reason<DB: LockDatabase>(fault: Fault, source: &sqlx::Error) -> String {
    let database = DB::NAME;
    let code = DB::code(source).map(|code| format!(" (error {code})")).unwrap_or_default();
    if let Some(meaning) = DB::meaning(source) {
        return format!("{meaning}{code}");
    }
    match (fault, source) {
        (Fault::TableMissing, _) => TABLE_MISSING.to_owned(),
        (Fault::TableDiffers, _) => {
            "the table `distributed_lock` is not what this version of lock-db needs".to_owned()
        }
        (Fault::Busy, _) => "another transaction keeps the others from writing".to_owned(),
        (_, sqlx::Error::Io(error)) => of_network(database, error),
        (_, sqlx::Error::Protocol(_)) => {
            format!("the connection to {database} can't be used any more")
        }
        (_, sqlx::Error::PoolTimedOut | sqlx::Error::PoolClosed) => "the pool gave no connection".to_owned(),
        (_, sqlx::Error::WorkerCrashed) => "the thread of the connection has ended".to_owned(),
        (_, sqlx::Error::Configuration(_)) => "the options of the pool are not valid".to_owned(),
        (Fault::Disconnected, _) => format!("{database} ended or refused the connection{code}"),
        (Fault::Passing, _) => format!("{database} can't do it at present{code}"),
        (Fault::Refused, _) => {
            format!("denied by {database}{code} until a right, a setting or an option of the pool is changed")
        }
        (_, sqlx::Error::Database(_)) => format!("{database} reported an error{code}"),
        _ => "sqlx reported an error".to_owned(),
    }
}

/// What an error of the network means.
fn of_network(database: &str, error: &io::Error) -> String {
    if is_rt_shutdown_err(error) {
        return "the runtime that made the connection has ended: give each runtime a pool of its own"
            .to_owned();
    }
    match error.kind() {
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof => format!("the connection to {database} broke"),
        io::ErrorKind::Other => format!("{database} can't be reached"),
        kind => format!("{database} can't be reached ({kind})"),
    }
}
