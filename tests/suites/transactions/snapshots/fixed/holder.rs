//! The holder: how it holds the lock, how it increments the counter under it, and how it gives the lock up.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use lock_db::{Error, Kind, Lease, LockDatabase, Locks, RowGuard};
use lock_tests::{Backend, TestDatabase};
use sqlx::{Pool, Transaction};
use tokio::sync::watch;

use super::data::increment;
use crate::snapshots::level::{Level, begin};

const PATIENCE: Duration = Duration::from_secs(20);
/// So long that no lease expires or is renewed.
const LONG: Duration = Duration::from_mins(10);
/// How long a lock stays taken that is kept for a while.
const AT_LEAST: Duration = Duration::from_millis(150);

/// How the holder holds the lock, and how it writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// There is no holder, and locks of this kind are asked for.
    Nothing(Kind),
    /// A lease, and a transaction that it guards.
    GuardedTransaction,
    /// A lease, and a transaction of its own that asks for it before the commit.
    VerifiedTransaction,
    /// A lease, and a transaction that is not guarded.
    PlainTransaction,
    /// A row lock in a transaction that lock-db began.
    RowGuard,
    /// A row lock in a transaction of its own.
    RowLockIn,
    /// An insert lock in a transaction of its own.
    InsertLockIn,
}

/// How the lock becomes free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Release,
    Drop,
    CommitAndRelease,
    ReleaseIn,
    /// A release before the lock may become free (`at_least`).
    AtLeast,
    /// A second caller of the process gets the lease in memory, commits as well, and releases it.
    HandOff,
    /// The holder itself has got the lease in memory, and releases it.
    AfterHandOff,
    /// The transaction that has the lock commits.
    Commit,
    /// The transaction that has the lock is rolled back, so nothing changes.
    Rollback,
    /// The process is killed after its commit, before it could release anything.
    Crash,
    /// The lease has expired before the commit, but was not taken over. The process is killed after the commit.
    LateCommit,
    /// The process is killed after its commit, and another one takes the lease over, commits and releases it.
    Takeover,
}

impl Way {
    pub fn kind(self) -> Kind {
        match self {
            Self::Nothing(kind) => kind,
            Self::RowGuard | Self::RowLockIn => Kind::Row,
            _ => Kind::Insert,
        }
    }
}

/// How far the holder is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Holding,
    /// The lock may be free from now on.
    Ending,
    Ended,
}

type Acquiring<DB> = Pin<Box<dyn Future<Output = Result<Lease<DB>, Error>> + Send>>;

/// What the holder has while it holds the lock.
pub enum Held<DB: Backend> {
    Nothing,
    Lease {
        lease: Lease<DB>,
        /// A caller of the same process that waits for it.
        next: Option<Acquiring<DB>>,
    },
    Guard(RowGuard<DB>),
    Transaction(Transaction<'static, DB>),
}

/// A process that holds locks.
pub struct Holder<DB: Backend> {
    pub locks: Locks<DB>,
    pub pool: Pool<DB>,
}

impl<DB: Backend> Holder<DB> {
    pub async fn new<T: TestDatabase<Database = DB>>(database: &T) -> Self {
        let pool = database.pool(3).await;
        let locks = Locks::builder(pool.clone()).hand_off(64, LONG).build();
        Self { locks, pool }
    }

    /// Makes names that have been used before.
    pub async fn use_names<T: TestDatabase<Database = DB>>(&self, kind: Kind, names: &[String]) {
        // The newest rows must be seen, which the levels above do not promise.
        let level = if T::NAME == "sqlite" { Level::Sqlite } else { Level::ReadCommitted };
        let mut transaction = begin(&self.pool, level).await.unwrap();
        if kind == Kind::Row {
            self.locks.row_locks(names).acquire_in(&mut transaction).await.unwrap();
        } else {
            self.locks.insert_locks(names).acquire_in(&mut transaction).await.unwrap();
        }
        transaction.commit().await.unwrap();
    }

    pub async fn take(&self, way: Way, end: End, name: &str) -> Held<DB> {
        match way {
            Way::Nothing(_) => Held::Nothing,
            Way::GuardedTransaction | Way::VerifiedTransaction | Way::PlainTransaction => {
                self.take_lease(end, name).await
            }
            Way::RowGuard => Held::Guard(self.locks.row_lock(name).wait(PATIENCE).acquire().await.unwrap()),
            Way::RowLockIn => {
                let mut transaction = self.pool.begin().await.unwrap();
                self.locks.row_lock(name).wait(PATIENCE).acquire_in(&mut transaction).await.unwrap();
                Held::Transaction(transaction)
            }
            Way::InsertLockIn => {
                let mut transaction = self.pool.begin().await.unwrap();
                self.locks.insert_lock(name).wait(PATIENCE).acquire_in(&mut transaction).await.unwrap();
                Held::Transaction(transaction)
            }
        }
    }

    async fn take_lease(&self, end: End, name: &str) -> Held<DB> {
        let lock = self.locks.insert_lock(name).ttl(LONG).wait(PATIENCE);
        let (lease, next) = match end {
            End::AtLeast => (lock.at_least(AT_LEAST).acquire().await.unwrap(), None),
            End::HandOff => {
                let (lease, next) = self.take_with_a_waiter(name).await;
                (lease, Some(next))
            }
            End::AfterHandOff => {
                let (lease, next) = self.take_with_a_waiter(name).await;
                let secret = lease.secret_key().to_owned();
                lease.release().await.unwrap();
                let lease = next.await.unwrap();
                assert_eq!(lease.secret_key(), secret, "it was handed over in memory");
                (lease, None)
            }
            _ => (lock.acquire().await.unwrap(), None),
        };
        Held::Lease { lease, next }
    }

    /// Only a lease that was granted while others waited is handed over.
    async fn take_with_a_waiter(&self, name: &str) -> (Lease<DB>, Acquiring<DB>) {
        let first = self.locks.insert_lock(name).ttl(LONG).wait(PATIENCE).acquire().await.unwrap();
        let second = queued(&self.locks, name).await;
        let third = queued(&self.locks, name).await;
        first.release().await.unwrap();
        (second.await.unwrap(), third)
    }

    /// Increments the counter under the lock, commits, and gives the lock up. Answers by how much the counter has grown.
    pub async fn commit_and_end(
        &self,
        held: Held<DB>,
        way: Way,
        end: End,
        id: i64,
        phase: &watch::Sender<Phase>,
    ) -> i64 {
        let ending = || {
            phase.send_replace(Phase::Ending);
        };
        let increments = match held {
            Held::Nothing => 0,
            Held::Lease { lease, next } => self.end_lease(lease, next, way, end, id, phase).await,
            Held::Guard(mut guard) => {
                increment::<DB>(&mut guard, id).await.unwrap();
                ending();
                if end == End::Rollback {
                    guard.rollback().await.unwrap();
                } else {
                    guard.commit().await.unwrap();
                }
                i64::from(end != End::Rollback)
            }
            Held::Transaction(mut transaction) => {
                increment::<DB>(&mut transaction, id).await.unwrap();
                ending();
                if end == End::Rollback {
                    transaction.rollback().await.unwrap();
                } else {
                    transaction.commit().await.unwrap();
                }
                i64::from(end != End::Rollback)
            }
        };
        phase.send_replace(Phase::Ended);
        increments
    }

    async fn end_lease(
        &self,
        lease: Lease<DB>,
        next: Option<Acquiring<DB>>,
        way: Way,
        end: End,
        id: i64,
        phase: &watch::Sender<Phase>,
    ) -> i64 {
        let ending = || {
            phase.send_replace(Phase::Ending);
        };
        match (end, way) {
            (End::CommitAndRelease, _) => {
                let mut transaction = lease.begin().await.unwrap();
                increment::<DB>(&mut transaction, id).await.unwrap();
                ending();
                lease.commit_and_release(transaction).await.unwrap();
                return 1;
            }
            (End::ReleaseIn, Way::GuardedTransaction) => {
                let mut transaction = lease.begin().await.unwrap();
                increment::<DB>(&mut transaction, id).await.unwrap();
                lease.release_in(&mut transaction).await.unwrap();
                ending();
                transaction.commit().await.unwrap();
                return 1;
            }
            (End::ReleaseIn, _) => {
                let mut transaction = self.pool.begin().await.unwrap();
                increment::<DB>(&mut transaction, id).await.unwrap();
                lease.release_in(&mut transaction).await.unwrap();
                ending();
                transaction.commit().await.unwrap();
                return 1;
            }
            _ => {}
        }
        commit_under(&lease, &self.pool, way, id).await;
        let (lease, increments) = match next {
            None => (lease, 1),
            Some(next) => {
                // It goes to the next one by the database, because the library does not know how the verified
                // transaction has ended. Others may have it in between.
                if way == Way::VerifiedTransaction {
                    ending();
                }
                lease.release().await.unwrap();
                let lease = next.await.unwrap();
                phase.send_replace(Phase::Holding);
                commit_under(&lease, &self.pool, way, id).await;
                (lease, 2)
            }
        };
        ending();
        if end == End::Drop {
            drop(lease);
        } else {
            lease.release().await.unwrap();
        }
        increments
    }
}

/// A caller that stands in the queue of its process when this returns.
async fn queued<DB: LockDatabase>(locks: &Locks<DB>, name: &str) -> Acquiring<DB> {
    let mut acquiring: Acquiring<DB> = Box::pin(locks.insert_lock(name).ttl(LONG).wait(PATIENCE).acquire());
    assert!(poll_fn(|context| Poll::Ready(acquiring.as_mut().poll(context))).await.is_pending());
    acquiring
}

/// Increments the counter in a transaction, and commits that.
pub async fn commit_under<DB: Backend>(lease: &Lease<DB>, pool: &Pool<DB>, way: Way, id: i64) {
    if way == Way::GuardedTransaction {
        let mut transaction = lease.begin().await.unwrap();
        increment::<DB>(&mut transaction, id).await.unwrap();
        transaction.commit().await.unwrap();
        return;
    }
    let mut transaction = pool.begin().await.unwrap();
    increment::<DB>(&mut transaction, id).await.unwrap();
    if way == Way::VerifiedTransaction {
        lease.verify_in(&mut transaction).await.unwrap();
    }
    transaction.commit().await.unwrap();
}
