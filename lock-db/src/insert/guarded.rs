//! The guarded transaction: it commits only while the lease is ours, decided by the database.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::Duration;

use tokio::select;
use tokio::time::sleep;

use super::{Hold, KeptByTransaction};
use crate::database::{Fault, LockDatabase};
use crate::error::{Failure, Loss, WaitingFor};
use crate::own_transaction::{OwnTransaction, commit, current_runtime};
use crate::{Error, Locks};

const PAUSE: Duration = Duration::from_millis(10);

/// A transaction that commits only if its lease is still the current one, from [`Lease::begin`](crate::Lease::begin).
/// It derefs to the connection: `&mut *transaction` runs statements in it.
///
/// [`commit`](Self::commit) asks for the lock's row as its last statement before COMMIT, in a way that a takeover has
/// to wait for. So either the takeover came first, and nothing is committed, or it comes after the commit: the database
/// orders the two, and no clock, pause or network can change that.
///
/// The lease is released only when its last guarded transaction has ended. Dropping the transaction rolls it back.
#[must_use = "the transaction is rolled back when it is dropped"]
#[clippy::has_significant_drop]
pub struct GuardedTransaction<DB: LockDatabase> {
    transaction: OwnTransaction<DB, KeptByTransaction>,
    hold: KeptByTransaction,
}

impl<DB: LockDatabase> GuardedTransaction<DB> {
    /// Begins on a connection of the application's pool, unless the lease is lost first.
    pub(super) async fn begin(locks: &Locks<DB>, hold: &Arc<Hold>) -> Result<Self, Error> {
        hold.check()?;
        let (pool, for_task) = (locks.pool().clone(), KeptByTransaction::new(hold));
        let begun = current_runtime()?.spawn(async move {
            loop {
                let kept = for_task.clone();
                match OwnTransaction::begin(&pool, DB::BEGIN_GUARDED, kept).await {
                    Ok(mut transaction) => {
                        let lease = &for_task.lease;
                        if DB::sees_grant(&mut transaction, &lease.key, lease.fencing_token).await? {
                            return Ok(Self { transaction, hold: for_task });
                        }
                        if for_task.check().is_err() {
                            return Err(sqlx::Error::RowNotFound);
                        }
                        transaction.roll_back().await?;
                        sleep(PAUSE).await;
                    }
                    // SQLite: somebody else is writing.
                    Err(error) if DB::classify(&error) == Fault::Busy && for_task.check().is_ok() => {
                        sleep(PAUSE).await;
                    }
                    Err(error) => return Err(error),
                }
            }
        });
        let result = select! {
            biased;
            reason = hold.lease.lost() => return Err(hold.lost(reason)),
            begun = begun => begun,
        };
        match result {
            Ok(Ok(guarded)) => Ok(guarded),
            Ok(Err(sqlx::Error::PoolTimedOut)) => Err(Error::Timeout {
                name: hold.lease.name().to_owned(),
                waited: locks.pool().options().get_acquire_timeout(),
                waiting_for: WaitingFor::Connection,
                held_by: None,
            }),
            Ok(Err(error)) => {
                let failure = Failure::new::<DB>(error);
                Err(failure.into_error("begin a guarded transaction", Some(hold.lease.name())))
            }
            Err(_runtime_shut_down) => Err(hold.lost(Loss::TransactionEnded)),
        }
    }

    /// Commits the transaction if the lease is still ours, by what the database says at that moment; the local deadline
    /// plays no part. Else it is rolled back.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when somebody else has the lock, or when the transaction had ended before (by a deadlock, say, whose
    /// error was swallowed): nothing was committed. [`Error::Serialization`] and [`Error::Deadlock`] likewise, when it is
    /// that by which the database tells. [`Error::Database`] when the commit itself failed; after a broken connection
    /// nobody knows whether it was carried out, but if it was, the lease was ours.
    ///
    /// # Cancel safety
    ///
    /// The commit goes on when the future is dropped; only the answer is lost.
    pub async fn commit(self) -> Result<(), Error> {
        self.end(false).await
    }

    /// Rolls the transaction back. The lease goes on.
    ///
    /// # Errors
    ///
    /// [`Error::Database`] when the connection broke, which rolls back too.
    ///
    /// # Cancel safety
    ///
    /// The rollback goes on when the future is dropped; only the answer is lost.
    pub async fn rollback(self) -> Result<(), Error> {
        let Self { transaction, hold } = self;
        transaction.roll_back().await.map_err(|error| {
            Failure::new::<DB>(error).into_error("roll back the transaction", Some(hold.lease.name()))
        })
    }

    pub(super) fn is_of(&self, hold: &Arc<Hold>) -> bool {
        self.hold.is(hold)
    }

    /// Guard and commit, or release and commit.
    pub(super) async fn end(self, release: bool) -> Result<(), Error> {
        let Self { transaction, hold } = self;
        let lost = hold.lost(Loss::TransactionEnded);
        let ended = transaction.end(|mut transaction| async move {
            // Others may have the lock a moment before we hear of it.
            let in_doubt = release.then(|| hold.doubt());
            let key = &hold.lease.key;
            let checked = DB::commit_guarded(&mut transaction, key, release).await;
            let ended = commit(transaction, checked, &key.row.name).await;
            if release && ended.is_ok() {
                hold.was_released();
            }
            drop(in_doubt);
            ended
        });
        ended.await.unwrap_or(Err(lost))
    }
}

impl<DB: LockDatabase> Deref for GuardedTransaction<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &Self::Target {
        &self.transaction
    }
}

impl<DB: LockDatabase> DerefMut for GuardedTransaction<DB> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.transaction
    }
}

impl<DB: LockDatabase> std::fmt::Debug for GuardedTransaction<DB> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("GuardedTransaction")
            .field("lock", &self.hold.lease.name())
            .finish_non_exhaustive()
    }
}
