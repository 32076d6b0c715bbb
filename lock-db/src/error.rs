//! The one error type.

mod words;

pub(crate) use self::words::lost as lost_how;

use std::time::Duration;

use crate::database::{self, Fault, LockDatabase};
use crate::name::{Name, escaped};
use crate::{Kind, LockInfo};

/// See [`LockDatabase::FOLDER`].
const SQLITE: &str = "sqlite";

/// As the action of [`Error::Database`]: the only one that may be done although it failed, and must not be done twice.
pub(crate) const COMMIT: &str = "commit the transaction";

/// What can go wrong with a lock: what was tried, on which lock, and what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The lock was not free within the wait that the caller allowed.
    #[error(
        "gave up on lock `{}` after {waited:.3?}, waiting for {waiting_for}{}: try again later, or allow a longer `wait`",
        escaped(.name), words::holder(.held_by.as_deref())
    )]
    Timeout {
        /// The name of the lock.
        name: String,
        /// How long it was tried.
        waited: Duration,
        /// What it was that did not come in time.
        waiting_for: WaitingFor,
        /// Who held it when it was last looked at.
        held_by: Option<Box<LockInfo>>,
    },

    /// The lock is no longer ours: somebody else may hold it by now.
    #[error(
        "lock `{}` is lost: {}; stop the work that it protects, and begin anew with a new lock",
        escaped(.name), words::lost(*.reason, .taken_over_by.as_deref())
    )]
    Lost {
        /// The name of the lock.
        name: String,
        /// How it was noticed.
        reason: Loss,
        /// Who has taken it over, if that is known.
        taken_over_by: Option<Box<LockInfo>>,
    },

    /// The database ended the transaction to break a deadlock. Nothing of it was kept.
    #[error(
        "the database ended the transaction that was locking `{}` to break a deadlock: roll back and run the whole transaction again; take several locks in one order",
        escaped(.name)
    )]
    Deadlock {
        /// The name of the lock.
        name: String,
        /// What the database said.
        source: sqlx::Error,
    },

    /// The transaction's snapshot is older than the last holder's commit: going on would work on old data.
    #[error(
        "the transaction began before the last holder of lock `{}` committed and would read old data: roll back and run the whole transaction again, with the lock as its first statement",
        escaped(.name)
    )]
    Serialization {
        /// The name of the lock.
        name: String,
        /// What the database said; `None` when lock-db saw it first.
        source: Option<sqlx::Error>,
    },

    /// The name can't be stored on every database. Nothing was sent.
    #[error(
        "`{}` can't be the name of a lock: {reason}; a name has 1 to 255 bytes of UTF-8 without NUL",
        escaped(.name)
    )]
    InvalidName {
        /// The name, shortened.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },

    /// An option has a value that can't work. Nothing was sent.
    #[error("{}", invalid_option(option, value, reason))]
    InvalidOption {
        /// The option.
        option: &'static str,
        /// What it was set to.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },

    /// A lease with this TTL can't be kept on this network: several times in a row the answer to the request for it took more than
    /// half of the TTL, which leaves too little for the first renewal. What was granted was given back.
    ///
    /// Not retryable: a lease that was had by luck would be lost by the next answer that is as slow as the others.
    #[error(
        "lock `{}` can't be kept with a `ttl` of {ttl:?}: an answer of the database took {took:.0?}, and a lease needs twice that and more; allow a longer `ttl`",
        escaped(.name)
    )]
    TtlTooShort {
        /// The name of the lock; of several, the first one.
        name: String,
        /// What was asked for.
        ttl: Duration,
        /// How long the last answer took.
        took: Duration,
    },

    /// The name belongs to the other kind of lock. The two do not exclude each other, so one name never has both.
    #[error(
        "`{}` is used as {found} and can't be taken as {wanted}: use another name; or, once no program uses the old kind any more, delete its row from `distributed_lock`",
        escaped(.name)
    )]
    WrongKind {
        /// The name of the lock.
        name: String,
        /// What was asked for.
        wanted: Kind,
        /// What the table says.
        found: Kind,
    },

    /// A lock can't be entered again: by way of an owner whose own hold has ended, or because of `reentrant = false`.
    #[error("lock `{}` can't be entered again: {reason}", escaped(.name))]
    Reentry {
        /// The name of the lock.
        name: String,
        /// What is in the way.
        reason: NoReentry,
    },

    /// An annotated function succeeded, but the transaction of its row lock was rolled back: another function that shared
    /// the transaction failed. Nothing of it was kept.
    #[error(
        "the transaction of row lock `{}` was rolled back, because another annotated function that shared it returned an error, panicked, was dropped or was left unfinished: nothing of it was kept; fix that failure, and call the outermost function again",
        escaped(.name)
    )]
    RolledBack {
        /// The name of the lock.
        name: String,
    },

    /// The connection is not in a transaction, so a row lock would end with its own statement.
    #[error(
        "lock `{}` was asked for on a connection that is not in a transaction, where it would end at once: call `pool.begin()` first (a BEGIN sent as text is not seen)",
        escaped(.name)
    )]
    NotInTransaction {
        /// The name of the lock.
        name: String,
    },

    /// An annotated function was called where no `Locks` is known.
    #[error(
        "lock `{}`: {reason}: call `locks.install()` once in `main`, before the first annotated function; or run the call inside `locks.scope(..)`, again in each task that it spawns; or write `locks = …` in the attribute",
        escaped(.name)
    )]
    NotInstalled {
        /// The name of the lock.
        name: String,
        /// What is missing.
        reason: String,
    },

    /// The table `distributed_lock` is not there, or not as this version of lock-db needs it.
    #[error(
        "{reason}: run `locks.migrate().await` at start, or apply the SQL files of lock-db's folder `migrations/{folder}` (also in `lock_db::schema`) with your own migration tool"
    )]
    SchemaMissing {
        /// What is missing.
        reason: String,
        /// The folder of this database's migrations.
        folder: &'static str,
        /// What the database said.
        source: Option<sqlx::Error>,
    },

    /// The table `distributed_lock` is there, but it can't keep locks as it is: it is partitioned, say, or row level security hides
    /// its rows. Nothing is granted on it.
    #[error("{reason}; nothing is locked on such a table")]
    UnsupportedTable {
        /// Which table it is and what is wrong with it.
        reason: String,
    },

    /// The transaction is in another database than the table `distributed_lock` of this `Locks`, or its connection has a
    /// temporary table of that name, which hides the true one (MySQL, MariaDB). Nothing was done in it.
    #[error(
        "lock `{}` was asked for in a transaction that does not reach the table `distributed_lock` of this `Locks`: begin it on the pool that the `Locks` was made with, and without a temporary table of that name",
        escaped(.name)
    )]
    ForeignTransaction {
        /// The name of the lock.
        name: String,
    },

    /// The `Locks` was closed.
    #[error("this `Locks` is closed: take locks before `close()`, or make a new one")]
    Closed,

    /// The database answered with an error that is no matter of locking.
    #[error("could not {}: {}", words::tried(.action, .name.as_deref(), *.within, .source), words::cause(.source))]
    Database {
        /// What was tried.
        action: &'static str,
        /// The name of the lock, if it was about one.
        name: Option<String>,
        /// The wait that the caller allowed, if it was over by then.
        within: Option<Duration>,
        /// What sqlx or the database said.
        source: sqlx::Error,
    },
}

/// What a wait was for when its time ran out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum WaitingFor {
    /// Somebody else holds the lock.
    Lock,
    /// The pool had no connection to spare.
    Connection,
    /// Another call is inside of the lock by way of the same holder, as nested calls are one at a time.
    Sibling,
}

impl std::fmt::Display for WaitingFor {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Lock => "the lock",
            Self::Connection => "a connection of the pool",
            Self::Sibling => "another call within the same holder",
        })
    }
}

/// Why a lock can't be entered again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum NoReentry {
    /// The hold that the call would go on with has ended.
    HoldEnded,
    /// The calling code is inside of the lock, and `reentrant = false` stands on one of the two functions. Waiting would be
    /// for oneself.
    NotReentrant,
    /// A function around the call has bound the guard of the row lock (`lease = …`), and so works with its transaction.
    GuardInUse,
}

impl std::fmt::Display for NoReentry {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::HoldEnded => "the hold that this would go on with has ended; take the lock anew",
            Self::NotReentrant => {
                "the calling code holds it already, and one of the two functions is `reentrant = false`: call this one \
                 outside of the lock, or leave `reentrant = false` out"
            }
            Self::GuardInUse => {
                "a function around this one has bound its guard by `lease = …`: hand the guard on as an argument (`guard: &mut RowGuard<_>`), \
                 and take it there by `tx = guard` instead"
            }
        })
    }
}

/// How the loss of a lock was noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Loss {
    /// The lease could not be renewed in time, so that the database may have given it to somebody else.
    NotRenewed,
    /// The row carries another secret key: somebody else has it.
    TakenOver,
    /// Its row says that it was released, and nothing in this process has done that.
    ReleasedByHand,
    /// Its row was deleted from `distributed_lock`.
    RowDeleted,
    /// The transaction or connection that held it is gone.
    TransactionEnded,
    /// The `Locks` was closed, which releases what is still held.
    Closed,
    /// Its holder has had it for as long as [`at_most`](crate::InsertLock::at_most) allows, so it was taken back.
    HeldTooLong,
    /// It was released, by a transaction that has committed.
    Released,
    /// Nobody knows whether an earlier transaction of the lease was committed, or still will be: no other one may begin under
    /// the same lease. Release it, and take the lock again.
    CommitUnknown,
}

impl std::fmt::Display for Loss {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::NotRenewed => "its lease could not be renewed in time",
            Self::TakenOver => "the table names another owner, or it was released by hand",
            Self::ReleasedByHand => "released by hand",
            Self::RowDeleted => "its row was deleted from `distributed_lock`",
            Self::TransactionEnded => "the transaction that held it is gone",
            Self::Closed => "its `Locks` was closed",
            Self::HeldTooLong => "it was held for as long as `at_most` allows",
            Self::Released => "a transaction has released it",
            Self::CommitUnknown => {
                "an earlier transaction of the lease may still be committed; take the lock again"
            }
        })
    }
}

/// As the option of [`Error::InvalidOption`], with the database of the `Locks` that is installed as its value.
pub(crate) const INSTALL: &str = "install";

fn invalid_option(option: &str, value: &str, reason: &str) -> String {
    if option == INSTALL {
        return format!("`install()` was called already: this process uses its {value} `Locks`; {reason}");
    }
    format!("option `{option}` can't be {}: {reason}", escaped(value))
}

impl Error {
    /// Whether nothing was done and the same call may succeed when it is made again: after `Deadlock` and
    /// `Serialization` together with its whole transaction, after `Timeout`, a broken connection and what passes by itself (too many
    /// connections, a statement that was cancelled, a table that is locked as a whole) as it is.
    ///
    /// A commit during which the connection broke is not: nobody knows whether it was carried out.
    /// `Lost` is not: work was under way, and only its author knows whether it may be repeated. `RolledBack` is not: that
    /// depends on the error of the function that failed.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Timeout { .. } | Self::Deadlock { .. } | Self::Serialization { .. } => true,
            Self::Database { action, source, .. } => *action != COMMIT && database::passes(source),
            _ => false,
        }
    }

    /// A copy for another call that waits for the end of the same transaction. Errors of sqlx can't be cloned, so the copy
    /// has the text of the source.
    pub(crate) fn another(&self) -> Self {
        match self {
            Self::Timeout { name, waited, waiting_for, held_by } => Self::Timeout {
                name: name.clone(),
                waited: *waited,
                waiting_for: *waiting_for,
                held_by: held_by.clone(),
            },
            Self::Lost { name, reason, taken_over_by } => {
                Self::Lost { name: name.clone(), reason: *reason, taken_over_by: taken_over_by.clone() }
            }
            Self::RolledBack { name } => Self::RolledBack { name: name.clone() },
            Self::Deadlock { name, source } => {
                Self::Deadlock { name: name.clone(), source: another_source(source) }
            }
            Self::Serialization { name, source } => {
                Self::Serialization { name: name.clone(), source: source.as_ref().map(another_source) }
            }
            Self::Database { action, name, within, source } => {
                Self::Database { action, name: name.clone(), within: *within, source: another_source(source) }
            }
            // The end of a transaction does not return these.
            error => Self::Database {
                action: COMMIT,
                name: error.name().map(str::to_owned),
                within: None,
                source: sqlx::Error::Io(std::io::Error::other(error.to_string())),
            },
        }
    }

    pub(crate) fn lost(name: impl Into<String>, reason: Loss) -> Self {
        Self::Lost { name: name.into(), reason, taken_over_by: None }
    }

    /// Of what was done for a lock.
    pub(crate) fn about(mut self, lock: &Name) -> Self {
        if let Self::Database { name, .. } = &mut self {
            name.get_or_insert_with(|| lock.given());
        }
        self
    }

    /// For a caller whose wait is over.
    pub(crate) fn within(mut self, wait: Option<Duration>) -> Self {
        if let Self::Database { within, .. } = &mut self {
            *within = wait;
        }
        self
    }

    /// The name of the lock that it was about, if it was about one.
    #[must_use]
    pub fn name(&self) -> Option<&str> {
        match self {
            Self::Timeout { name, .. }
            | Self::Lost { name, .. }
            | Self::Deadlock { name, .. }
            | Self::Serialization { name, .. }
            | Self::InvalidName { name, .. }
            | Self::TtlTooShort { name, .. }
            | Self::WrongKind { name, .. }
            | Self::Reentry { name, .. }
            | Self::RolledBack { name }
            | Self::NotInTransaction { name }
            | Self::ForeignTransaction { name }
            | Self::NotInstalled { name, .. } => Some(name),
            Self::Database { name, .. } => name.as_deref(),
            Self::InvalidOption { .. }
            | Self::SchemaMissing { .. }
            | Self::UnsupportedTable { .. }
            | Self::Closed => None,
        }
    }
}

/// An error of a database with what it means for a lock.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) fault: Fault,
    pub(crate) source: sqlx::Error,
    /// Of the database's migrations.
    folder: &'static str,
}

impl Failure {
    pub(crate) fn new<DB: LockDatabase>(source: sqlx::Error) -> Self {
        let fault = DB::classify(&source);
        Self { fault, source: words::of_database(DB::NAME, source), folder: DB::FOLDER }
    }

    /// Of no database.
    #[cfg(all(test, lock_db_shuttle))]
    pub(crate) fn for_tests() -> Self {
        Self { fault: Fault::Disconnected, source: sqlx::Error::WorkerCrashed, folder: "" }
    }

    /// A server that does not answer, whatever it does with what it was sent.
    pub(crate) fn no_answer<DB: LockDatabase>(limit: Duration) -> Self {
        let message = format!("{} did not answer within {limit:.3?}", DB::NAME);
        Self::new::<DB>(sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::TimedOut, message)))
    }

    /// A private connection that was not made, because of the application's hook.
    pub(crate) fn hook<DB: LockDatabase>(failure: HookFailure) -> Self {
        Self::new::<DB>(failure.into())
    }

    /// Whether a hook of the application's pool keeps the connection from being made.
    pub(crate) fn is_hook(&self) -> bool {
        hook_failure(&self.source).is_some()
    }

    /// The same for another who asked together with the first: the errors of sqlx can't be cloned.
    pub(crate) fn another(&self) -> Self {
        Self { fault: self.fault, source: another_source(&self.source), folder: self.folder }
    }

    /// Whether the server did not answer at all.
    pub(crate) fn is_silence(&self) -> bool {
        Self::is_silent(&self.source)
    }

    pub(crate) fn is_silent(source: &sqlx::Error) -> bool {
        matches!(source, sqlx::Error::Io(error) if error.kind() == std::io::ErrorKind::TimedOut)
    }

    pub(crate) fn table_missing<DB: LockDatabase>() -> Self {
        Self { fault: Fault::TableMissing, source: sqlx::Error::RowNotFound, folder: DB::FOLDER }
    }

    pub(crate) fn table_differs<DB: LockDatabase>(column: &str) -> Self {
        let source = sqlx::Error::ColumnNotFound(column.into());
        Self { fault: Fault::TableDiffers, source, folder: DB::FOLDER }
    }

    /// A table that has all columns and still can't be used.
    pub(crate) fn unusable_table<DB: LockDatabase>(reason: String) -> Self {
        let source = sqlx::Error::Configuration(reason.into());
        Self { fault: Fault::TableUnusable, source, folder: DB::FOLDER }
    }

    /// What keeps everybody from the table, when no error of the database says so.
    pub(crate) fn table_locked<DB: LockDatabase>() -> Self {
        let message = "another transaction has locked the table `distributed_lock` as a whole";
        let source = sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::WouldBlock, message));
        Self { fault: Fault::Busy, source, folder: DB::FOLDER }
    }

    /// A connection was given up, and the server has not ended what it was doing.
    pub(crate) fn session_remains<DB: LockDatabase>() -> Self {
        let message = format!("an earlier session of this process has not ended yet on {}", DB::NAME);
        let source = sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::ResourceBusy, message));
        Self { fault: Fault::Disconnected, source, folder: DB::FOLDER }
    }

    /// On SQLite, where whoever writes keeps everybody from writing. `is_free`: the lock, as far as others can see.
    pub(crate) fn written_by_others(self, name: &Name, is_free: bool) -> Self {
        if self.folder != SQLITE || self.fault != Fault::Busy {
            return self;
        }
        let message = if is_free {
            format!(
                "nobody holds `{name}`, but another transaction, perhaps your own, is writing to this SQLite database"
            )
        } else {
            format!(
                "another transaction, perhaps your own, is writing to this SQLite database, and may hold `{name}`"
            )
        };
        let source = sqlx::Error::Io(std::io::Error::new(std::io::ErrorKind::WouldBlock, message));
        Self { source, ..self }
    }

    /// A row that is free, is locked by nobody, and still was not written.
    pub(crate) fn not_written<DB: LockDatabase>() -> Self {
        let message = "the lock is free and its row is not locked, but writing it has no effect: is there a trigger on \
                       `distributed_lock`, or is the right to update it missing?";
        Self { fault: Fault::Other, source: sqlx::Error::Configuration(message.into()), folder: DB::FOLDER }
    }

    /// Whether the transaction in which it happened can't go on.
    pub(crate) fn ends_transaction(&self) -> bool {
        matches!(self.fault, Fault::Deadlock | Fault::Serialization | Fault::TransactionEnded)
    }

    /// Whether the same may succeed a moment later on the same connection.
    pub(crate) fn passes(&self) -> bool {
        matches!(self.fault, Fault::Busy | Fault::Deadlock | Fault::Serialization | Fault::Passing)
    }

    /// Whether something is in the way that will go by itself, and the transaction in which it happened goes on.
    pub(crate) fn is_busy(&self) -> bool {
        self.fault == Fault::Busy
    }

    /// Whether it is about the table as a whole.
    pub(crate) fn is_about_table(&self) -> bool {
        matches!(self.fault, Fault::TableMissing | Fault::TableDiffers | Fault::TableUnusable)
    }

    /// Whether everything that was asked for together with it would meet the same.
    pub(crate) fn is_the_same_for_all(&self) -> bool {
        self.is_about_table()
            || matches!(self.fault, Fault::Disconnected | Fault::Passing | Fault::Refused | Fault::Busy)
    }

    /// For the caller: `action` completes "could not …".
    pub(crate) fn into_error(self, action: &'static str, name: Option<&Name>) -> Error {
        let Self { fault, source, folder } = self;
        let known = || name.map(Name::given).unwrap_or_default();
        match fault {
            Fault::TableMissing => Error::SchemaMissing {
                reason: "the table `distributed_lock` does not exist".into(),
                folder,
                source: Some(source),
            },
            Fault::TableDiffers => Error::SchemaMissing {
                reason: match &source {
                    sqlx::Error::ColumnNotFound(column) => format!(
                        "the table `distributed_lock` lacks the column `{column}`, which this version of lock-db needs"
                    ),
                    _ => "the table `distributed_lock` is not what this version of lock-db needs".into(),
                },
                folder,
                source: Some(source),
            },
            Fault::TableUnusable => Error::UnsupportedTable {
                reason: match source {
                    sqlx::Error::Configuration(reason) => reason.to_string(),
                    source => source.to_string(),
                },
            },
            Fault::Unstorable => Error::InvalidName {
                name: known(),
                reason: "the database has an encoding in which it can't be stored",
            },
            Fault::TransactionEnded => Error::lost(known(), Loss::TransactionEnded),
            Fault::Deadlock => Error::Deadlock { name: known(), source },
            Fault::Serialization => Error::Serialization { name: known(), source: Some(source) },
            Fault::Busy | Fault::Disconnected | Fault::Passing | Fault::Refused | Fault::Other => {
                Error::Database { action, name: name.map(Name::given), within: None, source }
            }
        }
    }
}

/// What a hook of the application's pool did instead of letting a private connection through.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum HookFailure {
    #[error("the pool's 'after_connect' hook panicked: {0}")]
    Panicked(String),
    /// Or it has returned errors: sqlx logs them, passes none on, and tries again.
    #[error("the pool's 'after_connect' hook has not returned for {}s, or has returned errors", .0.as_secs_f32().round())]
    Waits(Duration),
}

impl From<HookFailure> for sqlx::Error {
    fn from(failure: HookFailure) -> Self {
        let kind = match failure {
            HookFailure::Waits(_) => std::io::ErrorKind::TimedOut,
            HookFailure::Panicked(_) => std::io::ErrorKind::Other,
        };
        Self::Io(std::io::Error::new(kind, failure))
    }
}

pub(crate) fn hook_failure(source: &sqlx::Error) -> Option<&HookFailure> {
    match source {
        sqlx::Error::Io(error) => error.get_ref()?.downcast_ref(),
        _ => None,
    }
}

/// In one line, for logs.
impl std::fmt::Display for Failure {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&words::cause(&self.source))
    }
}

/// An error with the same text, and retryable if that is.
fn another_source(source: &sqlx::Error) -> sqlx::Error {
    if let Some(failure) = hook_failure(source) {
        return failure.clone().into();
    }
    match source {
        sqlx::Error::Io(error) => sqlx::Error::Io(words::another(error)),
        source if database::passes(source) || database::is_busy(source) => {
            sqlx::Error::Io(std::io::Error::other(source.to_string()))
        }
        sqlx::Error::Configuration(reason) => sqlx::Error::Configuration(reason.to_string().into()),
        source => sqlx::Error::Configuration(source.to_string().into()),
    }
}

/// Failures of the way to the database, as sqlx reports them whatever the database.
pub(crate) fn is_connection_failure(error: &sqlx::Error) -> bool {
    matches!(
        error,
        sqlx::Error::Io(_)
            | sqlx::Error::Protocol(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::WorkerCrashed
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_say_what_to_do() {
        let message =
            Error::WrongKind { name: "a".into(), wanted: Kind::Row, found: Kind::Insert }.to_string();
        assert!(
            message.contains("`a` is used as an insert lock and can't be taken as a row lock"),
            "{message}"
        );
        let message = Error::Timeout {
            name: "a".into(),
            waited: Duration::from_millis(1500),
            waiting_for: WaitingFor::Lock,
            held_by: None,
        }
        .to_string();
        assert!(message.starts_with("gave up on lock `a` after 1.500s, waiting for the lock"), "{message}");
    }

    #[test]
    fn a_commit_without_an_answer_is_not_made_again() {
        let broken = |action| {
            let source = sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into());
            Error::Database { action, name: None, within: None, source }
        };
        assert!(!broken(COMMIT).is_retryable());
        let knows_a_database = cfg!(any(feature = "postgres", feature = "mysql", feature = "sqlite"));
        assert_eq!(broken("acquire").is_retryable(), knows_a_database);
    }

    #[test]
    fn errors_cross_threads() {
        fn crosses<T: Send + Sync + 'static>() {}
        crosses::<Error>();
    }
}
