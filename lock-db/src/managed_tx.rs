//! A transaction that lock-db itself begins, on a connection of the application's pool.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use sqlx::pool::PoolConnection;
use sqlx::{SqlSafeStr, Transaction};
use tokio::task::JoinError;

use crate::Error;
use crate::bounds::ANSWER_LIMIT;
use crate::clock::timeout;
use crate::database::{Failure, Fault, Guarded, LeaseKey, LockDatabase, Notification, Server, StepError};
use crate::error::{Action, Loss, WaitingFor};
use crate::name::Name;
use crate::runtime::{self, Runtime};

/// How long a commit may take on a server that is slow to write. After that its caller is told that
/// the outcome is unknown.
const COMMIT_LIMIT: Duration = Duration::from_secs(30);
/// How long a rollback may take. The server rolls back by itself when the connection is closed.
const ROLLBACK_LIMIT: Duration = Duration::from_secs(5);
/// How much longer the caller waits for the task. A thread that is blocked, by a hook of the pool
/// for example, enforces no time limit.
const GRACE: Duration = Duration::from_secs(1);

/// An open transaction, and a value that is kept until the transaction has ended.
///
/// It is [marked](LockDatabase::BEGIN_MARKED): if the server ends it unnoticed, the next statement
/// is refused or rolled back, as far as the database can do that. However the transaction ends, the
/// settings of the mark are undone before the application uses the connection again.
///
/// Dropping it rolls back in a task.
pub(crate) struct ManagedTransaction<DB: LockDatabase, K: Send + 'static> {
    /// Both are taken only by the methods that consume this, and by `drop`.
    transaction: Option<Transaction<'static, DB>>,
    kept: Option<K>,
    runtime: Runtime,
}

/// The condition under which a transaction is committed.
pub(crate) enum Condition {
    /// The leases are ours. The one with the `key` is checked last, and may be released with the
    /// commit.
    Lease { key: LeaseKey, others: Vec<LeaseKey>, release: bool },
    /// The transaction is still the one in which the row was locked.
    Row { name: Name, fencing_token: i64, server: Server },
}

impl<DB: LockDatabase, K: Send + 'static> ManagedTransaction<DB, K> {
    /// Begins it with one of the `BEGIN_…` statements of the trait.
    ///
    /// To be called in a task: in sqlx 0.9 a `begin` that is dropped midway returns its connection
    /// to the pool with the transaction open.
    pub(crate) async fn begin(
        connection: PoolConnection<DB>,
        statement: &'static str,
        runtime: Runtime,
    ) -> sqlx::Result<Self> {
        let transaction = Transaction::begin(connection, Some(statement.into_sql_str())).await?;
        Ok(Self { transaction: Some(transaction), kept: None, runtime })
    }

    /// Keeps a value from now on until the transaction has ended. This is not done while the
    /// transaction begins: a server that does not answer would keep the value, too.
    pub(crate) fn keep(mut self, kept: K) -> Self {
        self.kept = Some(kept);
        self
    }

    /// Commits in a task if the condition holds, and otherwise rolls back. `ended` receives the
    /// outcome, and the notification to send.
    pub(crate) async fn commit(
        mut self,
        condition: Condition,
        ended: impl FnOnce(&Result<Option<Notification>, Error>) + Send + 'static,
    ) -> Result<(), Error> {
        let (transaction, kept) = (self.transaction.take(), self.kept.take());
        let Some(transaction) = transaction else { return Ok(()) };
        let (name, begun) = (condition.name().clone(), Arc::new(AtomicBool::new(false)));
        let (begins, runtime) = (Arc::clone(&begun), self.runtime.clone());
        let limit = condition.commit_limit::<DB>();
        let task = self.runtime.spawn(async move {
            begins.store(true, Ordering::SeqCst);
            let name = condition.name().clone();
            let committing = commit(transaction, condition, runtime.clone());
            let committed = bounded(limit, &runtime, committing)
                .await
                .unwrap_or_else(|unfinished| Err(unfinished.commit_unknown(&name)));
            ended(&committed);
            drop(kept);
            committed.map(drop)
        });
        match timeout(limit + GRACE, task).await {
            Ok(Ok(committed)) => committed,
            // The runtime was shut down during the commit.
            Ok(Err(error)) if begun.load(Ordering::SeqCst) => {
                Err(Unfinished::Ended(error).commit_unknown(&name))
            }
            // The runtime was shut down before the commit began.
            Ok(Err(_shut_down)) => Err(runtime::ended(Action::Commit, &name)),
            Err(_elapsed) => Err(Unfinished::Silent(limit).commit_unknown(&name)),
        }
    }

    /// Rolls back in a task. A rollback that fails has lost its connection, which also rolls back.
    pub(crate) async fn roll_back(mut self) -> Result<(), StepError> {
        let (transaction, kept) = (self.transaction.take(), self.kept.take());
        let Some(transaction) = transaction else { return Ok(()) };
        let runtime = self.runtime.clone();
        let task = self.runtime.spawn(async move {
            let rolled_back = roll_back(transaction, &runtime).await;
            drop(kept);
            rolled_back
        });
        match timeout(ROLLBACK_LIMIT + GRACE, task).await {
            Ok(rolled_back) => rolled_back.unwrap_or(Ok(())),
            Err(_elapsed) => Err(Unfinished::Silent(ROLLBACK_LIMIT).into()),
        }
    }
}

impl Condition {
    /// How long the commit may take. Each lease that has a check of its own adds to it.
    fn commit_limit<DB: LockDatabase>(&self) -> Duration {
        let checks = match self {
            Self::Lease { others, .. } => u32::try_from(others.len()).unwrap_or(u32::MAX),
            Self::Row { .. } => 0,
        };
        COMMIT_LIMIT.saturating_add(check_limit::<DB>().saturating_mul(checks))
    }

    pub(crate) fn name(&self) -> &Name {
        match self {
            Self::Lease { key, .. } => &key.row.name,
            Self::Row { name, .. } => name,
        }
    }

    pub(crate) fn fencing_token(&self) -> i64 {
        match self {
            Self::Lease { key, .. } => key.fencing_token,
            Self::Row { fencing_token, .. } => *fencing_token,
        }
    }
}

/// Waits until a transaction has ended, for `limit` at most. After that the work continues in its
/// own task: if it were interrupted, it could leave its mark on the connection.
async fn bounded<T: Send + 'static>(
    limit: Duration,
    runtime: &Runtime,
    end: impl Future<Output = T> + Send + 'static,
) -> Result<T, Unfinished> {
    match timeout(limit, runtime.spawn(end)).await {
        Ok(ended) => ended.map_err(Unfinished::Ended),
        Err(_elapsed) => Err(Unfinished::Silent(limit)),
    }
}

/// Why the end of a transaction is not known.
#[derive(Debug, thiserror::Error)]
enum Unfinished {
    #[error("no answer within {0:?}")]
    Silent(Duration),
    #[error("{0}")]
    Ended(JoinError),
}

impl Unfinished {
    fn commit_unknown(&self, name: &Name) -> Error {
        Error::commit_unknown(name.given(), self.to_string())
    }
}

impl From<Unfinished> for StepError {
    fn from(unfinished: Unfinished) -> Self {
        match unfinished {
            Unfinished::Silent(limit) => Self::Silent(limit),
            Unfinished::Ended(_) => Self::disconnected(unfinished.to_string()),
        }
    }
}

async fn commit<DB: LockDatabase>(
    mut transaction: Transaction<'static, DB>,
    condition: Condition,
    runtime: Runtime,
) -> Result<Option<Notification>, Error> {
    let (mut name, begun) = (condition.name(), Instant::now());
    let checked = match &condition {
        Condition::Lease { key, others, release } => match guard::<DB>(&mut transaction, others).await {
            Ok(()) => DB::commit_guarded(&mut transaction, key, *release).await,
            Err((other, refused)) => {
                name = other;
                refused
            }
        },
        Condition::Row { name, fencing_token, server } => {
            DB::commit_locked(&mut transaction, server, name, *fencing_token).await
        }
    };
    let busy = || Error::Timeout {
        name: name.given(),
        waited: begun.elapsed(),
        waiting_for: WaitingFor::Lock,
        held_by: None,
    };
    let failed = |failure: Failure| match failure.fault {
        Fault::Busy => busy(),
        // Without a COMMIT nothing is stored.
        Fault::Disconnected if !DB::COMMITS_WITH_CHECK => Error::lost(name.given(), Loss::TransactionEnded),
        _ => failure.into_error(Action::Commit, Some(name)),
    };
    let error = match checked.map_err(Failure::new::<DB>) {
        Ok(Guarded::Ours) => {
            let committed = transaction.commit().await.map_err(Failure::new::<DB>);
            return committed.map(|()| None).map_err(|failure| match failure.fault {
                // SQLite: a reader keeps the COMMIT from writing. Nothing is stored.
                Fault::Busy => busy(),
                _ => failure.into_error(Action::Commit, Some(name)),
            });
        }
        Ok(Guarded::Committed { notification }) => {
            // There is nothing left to commit, but sqlx counts transactions. It sends the ROLLBACK of a
            // dropped one when the connection returns to the pool. Nobody waits for that, and on
            // PostgreSQL it travels with the ping.
            drop(transaction);
            return Ok(notification);
        }
        Ok(Guarded::NotOurs | Guarded::Stale | Guarded::Elsewhere) => {
            Error::lost(name.given(), Loss::TakenOver)
        }
        Ok(Guarded::Ended) => Error::lost(name.given(), Loss::TransactionEnded),
        Err(failure) => failed(failure),
    };
    let _rolled_back = roll_back(transaction, &runtime).await;
    Err(error)
}

/// How long the check of one lease may take.
fn check_limit<DB: LockDatabase>() -> Duration {
    DB::GUARD_LIMIT + ANSWER_LIMIT
}

/// Checks leases, and keeps them until the transaction ends. Fails with the first one that is not
/// ours, and why.
async fn guard<'a, DB: LockDatabase>(
    transaction: &mut DB::Connection,
    leases: &'a [LeaseKey],
) -> Result<(), (&'a Name, Result<Guarded, StepError>)> {
    for key in leases {
        let checked = timeout(check_limit::<DB>(), DB::guard_in_marked(transaction, key)).await;
        let guarded = match checked.unwrap_or(Ok(Guarded::Ended)) {
            Ok(Guarded::Ours | Guarded::Committed { .. }) => continue,
            // The COMMIT was not sent.
            Err(error) if error.fault::<DB>() == Fault::Disconnected => Ok(Guarded::Ended),
            guarded => guarded,
        };
        return Err((&key.row.name, guarded));
    }
    Ok(())
}

/// Restores the connection to its previous state, whatever has become of the transaction.
async fn roll_back<DB: LockDatabase>(
    mut transaction: Transaction<'static, DB>,
    runtime: &Runtime,
) -> Result<(), StepError> {
    let rolling_back = async move {
        let unmarked = DB::unmark(&mut transaction).await;
        DB::reopen(&mut transaction).await;
        let rolled_back = transaction.rollback().await;
        unmarked.and(rolled_back.map_err(StepError::Sqlx))
    };
    bounded(ROLLBACK_LIMIT, runtime, rolling_back).await?
}

impl<DB: LockDatabase, K: Send + 'static> Deref for ManagedTransaction<DB, K> {
    type Target = DB::Connection;

    fn deref(&self) -> &Self::Target {
        match &self.transaction {
            Some(transaction) => transaction,
            None => unreachable!("it is consumed by what takes its transaction"),
        }
    }
}

impl<DB: LockDatabase, K: Send + 'static> DerefMut for ManagedTransaction<DB, K> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        match &mut self.transaction {
            Some(transaction) => transaction,
            None => unreachable!("it is consumed by what takes its transaction"),
        }
    }
}

impl<DB: LockDatabase, K: Send + 'static> Drop for ManagedTransaction<DB, K> {
    fn drop(&mut self) {
        if let Some(transaction) = self.transaction.take() {
            // sqlx also rolls a dropped transaction back in a task, and panics if there is no
            // runtime to run it.
            let (kept, runtime, _entered) = (self.kept.take(), self.runtime.clone(), self.runtime.enter());
            drop(self.runtime.spawn(async move {
                let _rolled_back = roll_back(transaction, &runtime).await;
                drop(kept);
            }));
        }
    }
}
