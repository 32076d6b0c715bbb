//! The error type of the crate.

mod action;
mod display;
mod finding;
mod reasons;

use std::sync::Arc;
use std::time::Duration;

pub use self::action::Action;
use self::display::Report;
pub(crate) use self::display::lost as lost_how;
pub(crate) use self::finding::Finding;
pub use self::reasons::{Loss, NoReentry, WaitingFor};
use crate::{Kind, LockInfo};

/// The error of every fallible operation. It says what was tried, on which lock, and what to do
/// next.
///
/// The messages are for operators and logs. They name the holder of a lock: its host, process id
/// and label. Do not return them to clients. The words of the database are not part of a message:
/// print the [sources](std::error::Error::source) as well, as `{:#}` of anyhow does, or use
/// [`report`](Error::report).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let locks = lock_db::testing::locks().await?;
/// # let _lease = locks.insert_lock("order:1").acquire().await?;
/// use std::time::Duration;
///
/// use lock_db::Error;
///
/// match locks.insert_lock("order:1").wait(Duration::ZERO).acquire().await {
///     Ok(lease) => lease.release().await?,
///     Err(Error::Timeout { name, .. }) => println!("{name} is in use, try again later"),
///     Err(error) if error.is_retryable() => println!("try again later"),
///     Err(error) => return Err(error.into()),
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Error {
    /// The lock was not free within the wait. Retryable.
    #[non_exhaustive]
    Timeout {
        /// The name of the lock.
        name: String,
        /// How long the request waited.
        waited: Duration,
        /// What the request was waiting for.
        waiting_for: WaitingFor,
        /// The holder, when the lock was last read.
        held_by: Option<Box<LockInfo>>,
    },

    /// The lock is no longer held by this process. Another process may hold it.
    #[non_exhaustive]
    Lost {
        /// The name of the lock.
        name: String,
        /// How the loss was noticed.
        reason: Loss,
        /// The new holder, if it is known.
        taken_over_by: Option<Box<LockInfo>>,
    },

    /// The database ended the transaction to break a deadlock. Nothing of it was kept. Retryable,
    /// with the whole transaction.
    #[non_exhaustive]
    Deadlock {
        /// The name of the lock.
        name: String,
        /// The error of the database.
        source: Arc<sqlx::Error>,
    },

    /// The transaction's snapshot is older than the last holder's commit, so the transaction would
    /// work on old data. Retryable, with the whole transaction.
    #[non_exhaustive]
    Serialization {
        /// The name of the lock.
        name: String,
        /// The error of the database; `None` when lock-db noticed it first.
        source: Option<Arc<sqlx::Error>>,
    },

    /// The name can't be used on every database, or the encoding of this database can't store it.
    /// Nothing was locked.
    #[non_exhaustive]
    InvalidName {
        /// The name, shortened.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },

    /// An option has a value that can't work. Nothing was sent.
    #[non_exhaustive]
    InvalidOption {
        /// The option.
        option: &'static str,
        /// The value that was set.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },

    /// A lease with this TTL can't be kept on this network. Several times in a row, the answer to
    /// the request took more than half of the TTL, which leaves too little time for the first
    /// renewal. Each lease that was granted was released again.
    ///
    /// Not retryable: a lease that is granted by chance would be lost with the next answer that is
    /// as slow.
    #[non_exhaustive]
    TtlTooShort {
        /// The name of the lock. With several locks, the first name.
        name: String,
        /// The requested TTL.
        ttl: Duration,
        /// How long the last answer took.
        took: Duration,
    },

    /// The name is used for another kind of lock. The kinds do not exclude each other, so a name
    /// never has two.
    #[non_exhaustive]
    WrongKind {
        /// The name of the lock.
        name: String,
        /// The requested kind.
        wanted: Kind,
        /// The kind in the table. [`Kind::Unknown`] is a kind of a later version of lock-db.
        found: Kind,
    },

    /// A lock can't be entered again: its holder has ended, or `reentrant = false` forbids it, or
    /// its guard is in use.
    #[non_exhaustive]
    Reentry {
        /// The name of the lock.
        name: String,
        /// The reason.
        reason: NoReentry,
    },

    /// An annotated function succeeded, but the transaction of its row lock was rolled back because
    /// another function that shared the transaction failed. Nothing of it was kept.
    #[non_exhaustive]
    RolledBack {
        /// The name of the lock.
        name: String,
    },

    /// The connection is not in a transaction, so a row lock would end with its own statement.
    #[non_exhaustive]
    NotInTransaction {
        /// The name of the lock.
        name: String,
    },

    /// An annotated function was called without a `Locks` that it can use.
    #[non_exhaustive]
    NotInstalled {
        /// The name of the lock.
        name: String,
        /// What is missing.
        reason: String,
    },

    /// The table `distributed_lock` does not exist, or lacks something that this version of lock-db
    /// needs.
    #[non_exhaustive]
    SchemaMissing {
        /// What is missing.
        reason: String,
        /// The folder of the migrations for this database.
        folder: &'static str,
        /// The error of the database.
        source: Option<Arc<sqlx::Error>>,
    },

    /// The table `distributed_lock` exists, but can't keep locks in its present form. For example,
    /// it is partitioned, or row level security hides its rows. No lock is granted on it.
    #[non_exhaustive]
    UnsupportedTable {
        /// Which table it is and what is wrong with it.
        reason: String,
    },

    /// The transaction is in another database than the table `distributed_lock` of this `Locks`, or
    /// its connection has a temporary table of the same name, which hides the real one (MySQL,
    /// MariaDB). Nothing was done in the transaction.
    #[non_exhaustive]
    ForeignTransaction {
        /// The name of the lock.
        name: String,
    },

    /// The `Locks` was closed.
    Closed,

    /// [`Locks::install`](crate::Locks::install) was called, and a `Locks` is installed for the
    /// process already. It stays installed.
    #[non_exhaustive]
    AlreadyInstalled {
        /// The database of the installed `Locks`.
        installed: &'static str,
    },

    /// The connection was lost during a commit, and it is unknown whether the transaction was
    /// committed.
    ///
    /// It comes from [`GuardedTransaction::commit`](crate::GuardedTransaction::commit),
    /// [`Lease::commit_and_release`](crate::Lease::commit_and_release) and
    /// [`RowGuard::commit`](crate::RowGuard::commit). Before the transaction is repeated, ask the
    /// database whether it was committed.
    #[non_exhaustive]
    CommitUnknown {
        /// The name of the lock.
        name: String,
        /// What is known, in words for people.
        reason: String,
        /// The error of sqlx. If lock-db noticed the condition itself, its text is `reason`, and
        /// [`source`](std::error::Error::source) returns `None`.
        source: Arc<sqlx::Error>,
    },

    /// The database can't be reached, did not answer in time, or the connection broke. Retryable.
    ///
    /// This includes a server that is starting, shutting down or out of connections, and a server
    /// that is read-only because it may no longer be the primary.
    #[non_exhaustive]
    Unreachable {
        /// Whether the database was reached and did not answer in time.
        silent: bool,
        /// What was tried.
        action: Action,
        /// The name of the lock, if a lock was involved.
        name: Option<String>,
        /// The wait of the request, if it was over by then.
        within: Option<Duration>,
        /// What is known, in words for people.
        reason: String,
        /// The error of sqlx. If lock-db noticed the condition itself, its text is `reason`, and
        /// [`source`](std::error::Error::source) returns `None`.
        source: Arc<sqlx::Error>,
    },

    /// The server refuses, and continues to do so until a person changes something: the role or the
    /// database does not exist, the password is wrong, a right is missing, or the session is
    /// read-only by a setting. Not retryable.
    #[non_exhaustive]
    Refused {
        /// What was tried.
        action: Action,
        /// The name of the lock, if a lock was involved.
        name: Option<String>,
        /// The wait of the request, if it was over by then.
        within: Option<Duration>,
        /// What is known, in words for people.
        reason: String,
        /// The error of sqlx. If lock-db noticed the condition itself, its text is `reason`, and
        /// [`source`](std::error::Error::source) returns `None`.
        source: Arc<sqlx::Error>,
    },

    /// The database returned any other error.
    #[non_exhaustive]
    Database {
        /// What was tried.
        action: Action,
        /// The name of the lock, if a lock was involved.
        name: Option<String>,
        /// The wait of the request, if it was over by then.
        within: Option<Duration>,
        /// Whether the cause is temporary: a limit is reached, a statement was cancelled, a table
        /// is locked.
        retryable: bool,
        /// What is known, in words for people.
        reason: String,
        /// The error of sqlx. If lock-db noticed the condition itself, its text is `reason`, and
        /// [`source`](std::error::Error::source) returns `None`.
        source: Arc<sqlx::Error>,
    },
}

impl Error {
    /// Whether nothing was done and the same call may succeed later.
    ///
    /// - `Timeout`, `Unreachable`, and `Database` with `retryable`: repeat the call.
    /// - `Deadlock` and `Serialization`: repeat the whole transaction.
    ///
    /// All other errors are not retryable. In particular, `CommitUnknown` is not: the transaction
    /// may have been committed. `Lost` is not: work was in progress, and only its author knows
    /// whether it may be repeated. `RolledBack` is not: that depends on the error of the function
    /// that failed.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Timeout { .. }
            | Self::Deadlock { .. }
            | Self::Serialization { .. }
            | Self::Unreachable { .. } => true,
            Self::Database { retryable, .. } => *retryable,
            _ => false,
        }
    }

    /// Whether a transaction was to be committed, and it is unknown whether it was.
    #[must_use]
    pub fn is_commit_unknown(&self) -> bool {
        matches!(self, Self::CommitUnknown { .. } | Self::Lost { reason: Loss::CommitUnknown, .. })
    }

    /// The message followed by the words of the database, in one line, for logs.
    ///
    /// `Display` says what was tried and what is known, but leaves out the words of the database or
    /// of the network. They are in [`source`](std::error::Error::source).
    ///
    /// ```no_run
    /// # async fn f(locks: lock_db::Locks<sqlx::Sqlite>) {
    /// if let Err(error) = locks.insert_lock("order:1").acquire().await {
    ///     // … : permission denied for table distributed_lock
    ///     eprintln!("{}", error.report());
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn report(&self) -> impl std::fmt::Display {
        Report(self)
    }

    /// The error of sqlx, if this is an error of the database or of the connection to it.
    pub(crate) fn of_database(&self) -> Option<&Arc<sqlx::Error>> {
        match self {
            Self::Database { source, .. }
            | Self::Unreachable { source, .. }
            | Self::Refused { source, .. } => Some(source),
            _ => None,
        }
    }

    /// Whether a request to the database failed for a temporary reason.
    pub(crate) fn passes(&self) -> bool {
        self.of_database().is_some() && self.is_retryable()
    }

    /// An error that does not come from sqlx.
    pub(crate) fn other(
        action: Action,
        name: Option<String>,
        retryable: bool,
        reason: impl Into<String>,
    ) -> Self {
        let reason = reason.into();
        let source = Finding::error(reason.clone());
        Self::Database { action, name, within: None, retryable, reason, source }
    }

    /// Whether the database did not answer in time.
    pub(crate) fn is_silence(&self) -> bool {
        matches!(self, Self::Unreachable { silent: true, .. })
    }

    /// Whether a COMMIT was carried out is unknown, for a reason that is not an error of sqlx.
    pub(crate) fn commit_unknown(name: impl Into<String>, reason: impl Into<String>) -> Self {
        let reason = reason.into();
        let source = Finding::error(reason.clone());
        Self::CommitUnknown { name: name.into(), reason, source }
    }

    pub(crate) fn lost(name: impl Into<String>, reason: Loss) -> Self {
        Self::Lost { name: name.into(), reason, taken_over_by: None }
    }

    /// Adds the name of the lock that was involved.
    pub(crate) fn about(mut self, lock: &str) -> Self {
        if let Self::Database { name, .. } | Self::Unreachable { name, .. } | Self::Refused { name, .. } =
            &mut self
        {
            name.get_or_insert_with(|| lock.to_owned());
        }
        self
    }

    /// Adds the wait of the caller, which is over.
    pub(crate) fn within(mut self, wait: Option<Duration>) -> Self {
        if let Self::Database { within, .. }
        | Self::Unreachable { within, .. }
        | Self::Refused { within, .. } = &mut self
        {
            *within = wait;
        }
        self
    }

    /// The name of the lock, if a lock was involved.
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
            | Self::NotInstalled { name, .. }
            | Self::CommitUnknown { name, .. } => Some(name),
            Self::Database { name, .. } | Self::Unreachable { name, .. } | Self::Refused { name, .. } => {
                name.as_deref()
            }
            Self::InvalidOption { .. }
            | Self::AlreadyInstalled { .. }
            | Self::SchemaMissing { .. }
            | Self::UnsupportedTable { .. }
            | Self::Closed => None,
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        let source = match self {
            Self::Deadlock { source, .. }
            | Self::CommitUnknown { source, .. }
            | Self::Unreachable { source, .. }
            | Self::Refused { source, .. }
            | Self::Database { source, .. } => source,
            Self::Serialization { source, .. } | Self::SchemaMissing { source, .. } => source.as_ref()?,
            _ => return None,
        };
        Finding::unless_ours(source).map(|source| source as _)
    }
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
        let source = Arc::new(sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into()));
        let error = Error::CommitUnknown { name: "a".into(), reason: "broken".into(), source };
        assert!(!error.is_retryable() && error.is_commit_unknown());
        assert!(!Error::lost("a", Loss::TakenOver).is_commit_unknown());
    }

    #[test]
    fn the_source_is_the_error_of_sqlx() {
        let source = Arc::new(sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into()));
        let error = Error::CommitUnknown { name: "a".into(), reason: "broken".into(), source };
        let source = std::error::Error::source(&error).unwrap();
        assert!(source.downcast_ref::<sqlx::Error>().is_some());
    }

    #[test]
    fn what_lock_db_found_itself_is_told_once() {
        let error = Error::other(Action::Acquire, None, true, "some reason");
        assert_eq!(error.clone().to_string(), "could not acquire: some reason");
        assert!(std::error::Error::source(&error).is_none());
    }

    #[test]
    fn errors_cross_threads() {
        fn crosses<T: Send + Sync + 'static>() {}
        crosses::<Error>();
    }
}
