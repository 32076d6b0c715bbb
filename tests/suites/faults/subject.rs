//! The lease that is tried: lock-db's, or one that is broken on purpose.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use lock_db::{Error, GuardedTransaction, Lease, Locks};
use lock_tests::Backend;
use sqlx::Transaction;

use super::broken::{BrokenLease, BrokenLocks};
use super::history::Outcome;

pub(crate) enum Subject<DB: Backend> {
    LockDb(Locks<DB>),
    Broken(BrokenLocks<DB>),
}

pub(crate) enum SubjectLease<DB: Backend> {
    LockDb(Lease<DB>),
    Broken(BrokenLease<DB>),
}

pub(crate) enum SubjectTransaction<DB: Backend> {
    LockDb(GuardedTransaction<DB>),
    Broken(Transaction<'static, DB>),
}

impl<DB: Backend> Subject<DB> {
    /// `None`: it is not free, or could not be had for another reason.
    pub(crate) async fn acquire(
        &self,
        name: &str,
        ttl: Duration,
        wait: Duration,
    ) -> Option<SubjectLease<DB>> {
        match self {
            Self::LockDb(locks) => {
                let request = locks.insert_lock(name).ttl(ttl).wait(wait);
                let lease = if wait.is_zero() {
                    request.try_acquire().await.ok().flatten()
                } else {
                    request.acquire().await.ok()
                };
                lease.map(SubjectLease::LockDb)
            }
            Self::Broken(locks) => locks.acquire(name, ttl, wait).await.map(SubjectLease::Broken),
        }
    }
}

impl<DB: Backend> SubjectLease<DB> {
    pub(crate) fn token(&self) -> i64 {
        match self {
            Self::LockDb(lease) => lease.fencing_token(),
            Self::Broken(lease) => lease.token(),
        }
    }

    pub(crate) fn is_held(&self) -> bool {
        match self {
            Self::LockDb(lease) => lease.is_held(),
            Self::Broken(lease) => lease.is_held(),
        }
    }

    pub(crate) async fn lost(&self) {
        match self {
            Self::LockDb(lease) => lease.lost().await,
            Self::Broken(lease) => lease.lost().await,
        }
    }

    pub(crate) async fn begin(&self) -> Option<SubjectTransaction<DB>> {
        match self {
            Self::LockDb(lease) => lease.begin().await.ok().map(SubjectTransaction::LockDb),
            Self::Broken(lease) => lease.begin().await.map(SubjectTransaction::Broken),
        }
    }

    pub(crate) async fn commit(&self, transaction: SubjectTransaction<DB>) -> Outcome {
        match (self, transaction) {
            (Self::LockDb(_), SubjectTransaction::LockDb(transaction)) => outcome(transaction.commit().await),
            (Self::Broken(lease), SubjectTransaction::Broken(transaction)) => lease.commit(transaction).await,
            _ => unreachable!("a transaction is of its lease"),
        }
    }

    pub(crate) async fn commit_and_release(self, transaction: SubjectTransaction<DB>) -> Outcome {
        match (self, transaction) {
            (Self::LockDb(lease), SubjectTransaction::LockDb(transaction)) => {
                outcome(lease.commit_and_release(transaction).await)
            }
            (Self::Broken(lease), SubjectTransaction::Broken(transaction)) => {
                let outcome = lease.commit(transaction).await;
                lease.release().await;
                outcome
            }
            _ => unreachable!("a transaction is of its lease"),
        }
    }

    pub(crate) async fn release(self) {
        match self {
            // What it says of a loss was seen before.
            Self::LockDb(lease) => drop(lease.release().await),
            Self::Broken(lease) => lease.release().await,
        }
    }
}

/// What lock-db says of a commit.
pub(crate) fn outcome(committed: Result<(), Error>) -> Outcome {
    match committed {
        Ok(()) => Outcome::Committed,
        Err(Error::CommitUnknown { .. }) => Outcome::Unknown,
        Err(_) => Outcome::Refused,
    }
}

impl<DB: Backend> Deref for SubjectTransaction<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &DB::Connection {
        match self {
            Self::LockDb(transaction) => transaction,
            Self::Broken(transaction) => transaction,
        }
    }
}

impl<DB: Backend> DerefMut for SubjectTransaction<DB> {
    fn deref_mut(&mut self) -> &mut DB::Connection {
        match self {
            Self::LockDb(transaction) => transaction,
            Self::Broken(transaction) => transaction,
        }
    }
}
