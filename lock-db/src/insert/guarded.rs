//! The guarded transaction: it commits only while the lease is ours, decided by the database.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use sqlx::Pool;
use tokio::select;
use tokio::sync::oneshot;

use super::{Hold, KeptByTransaction};
use crate::clock::sleep;
use crate::database::{Call, Fault, LockDatabase, is_disconnected};
use crate::error::{Failure, Loss, WaitingFor};
use crate::own_transaction::{Condition, OwnTransaction};
use crate::runtime::{self, Runtime};
use crate::{Error, Locks};

const PAUSE: Duration = Duration::from_millis(10);
const BEGIN: &str = "begin a guarded transaction";
/// How long others may be in the way: another writer on SQLite, or a node that has not heard of the grant yet.
const BEGIN_LIMIT: Duration = Duration::from_secs(30);

/// A transaction that commits only if its lease is still the current one, from [`Lease::begin`](crate::Lease::begin).
/// It derefs to the connection: `&mut *transaction` runs statements in it.
///
/// [`commit`](Self::commit) asks for the lock's row as its last statement before COMMIT, in a way that a takeover has
/// to wait for. So either the takeover came first, and nothing is committed, or it comes after the commit: the database
/// orders the two, and no clock, pause or network can change that.
///
/// The lease is released only when its last guarded transaction has ended. Dropping the transaction rolls it back.
#[must_use = "bind it to a name (`let mut transaction = …`); `let _ = …` rolls it back at once"]
#[clippy::has_significant_drop]
pub struct GuardedTransaction<DB: LockDatabase> {
    transaction: OwnTransaction<DB, KeptByTransaction>,
    hold: KeptByTransaction,
}

impl<DB: LockDatabase> GuardedTransaction<DB> {
    /// Begins on a connection of the application's pool, unless the lease is lost first.
    pub(super) async fn begin(locks: &Locks<DB>, hold: &Arc<Hold>) -> Result<Self, Error> {
        hold.check()?;
        // One that its caller waits for no more may still be under way: this one must see what comes of it.
        select! {
            reason = hold.lease.lost() => return Err(hold.lost(reason)),
            () = hold.lease.commits_have_ended() => {}
        }
        hold.refuse_after_unknown_commit()?;
        let (pool, for_task) = (locks.pool().clone(), Arc::downgrade(hold));
        let (mut answer, answered) = oneshot::channel();
        let runtime = Runtime::current()?;
        let for_begin = runtime.clone();
        runtime.spawn(async move {
            let begun = select! {
                biased;
                // A caller that has gone keeps neither a place before the pool nor the lease.
                () = answer.closed() => return,
                begun = begin_on(&pool, &for_task, &for_begin) => begun,
            };
            // A transaction that nobody takes is dropped, and rolled back.
            let _ = answer.send(begun);
        });
        let result = select! {
            biased;
            reason = hold.lease.lost() => return Err(hold.lost(reason)),
            begun = answered => begun,
        };
        match result {
            Ok(Ok(guarded)) => Ok(guarded),
            Ok(Err(sqlx::Error::PoolTimedOut)) => Err(Error::Timeout {
                name: hold.lease.name().given(),
                waited: locks.pool().options().get_acquire_timeout(),
                waiting_for: WaitingFor::Connection,
                held_by: None,
            }),
            Ok(Err(error)) => {
                let failure = Failure::new::<DB>(error);
                Err(failure.into_error(BEGIN, Some(hold.lease.name())))
            }
            Err(_runtime_shut_down) => Err(runtime::ended(BEGIN, hold.lease.name())),
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
    /// nobody knows whether it was carried out, but if it was, the lease was ours. It may even be carried out later, so no
    /// other transaction begins under this lease then ([`Loss::CommitUnknown`]): take the lock again.
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
        if let Err(refused) = hold.refuse_after_unknown_commit() {
            let _rolled_back = transaction.roll_back().await;
            return Err(refused);
        }
        // Others may have the lock a moment before we hear of it.
        let in_doubt = release.then(|| Hold::doubt(hold.clone()));
        let condition = Condition::Lease { key: hold.lease.key.clone(), release };
        let (under_way, refused) = (hold.lease.commit_begins(), hold.clone());
        let ended = move |ended: &Result<Option<Call>, Error>| {
            match ended {
                Ok(call) => {
                    under_way.was_carried_out();
                    if release {
                        hold.was_released(*call);
                    }
                }
                Err(Error::Lost { reason: Loss::TakenOver, .. }) => {
                    under_way.never_comes();
                    hold.is_lost();
                }
                // It would pass its guard also after another transaction of the same lease.
                Err(Error::Database { source, .. }) if is_disconnected(source) => drop(under_way),
                Err(_nothing_was_committed) => under_way.never_comes(),
            }
            drop(in_doubt);
        };
        match transaction.commit(condition, ended).await {
            // The database tells only that it is not ours.
            Err(Error::Lost { reason: Loss::TakenOver, .. }) => Err(match refused.lease.told_loss() {
                Some(Loss::HeldTooLong) => refused.lost(Loss::HeldTooLong),
                _ => refused.taken_over().await,
            }),
            committed => committed,
        }
    }
}

/// Waits for a connection, which may be cut short at any time, and begins the transaction on it in a task, which may not.
async fn begin_on<DB: LockDatabase>(
    pool: &Pool<DB>,
    hold: &Weak<Hold>,
    runtime: &Runtime,
) -> sqlx::Result<GuardedTransaction<DB>> {
    let mut broken = 0_u32;
    let started = Instant::now();
    loop {
        let connection = pool.acquire().await?;
        let begun = runtime.spawn(OwnTransaction::begin(connection, DB::BEGIN_GUARDED, runtime.clone()));
        let error = match begun.await {
            Ok(Ok(transaction)) => {
                let Some(hold) = hold.upgrade() else { return Err(sqlx::Error::PoolClosed) };
                let hold = KeptByTransaction::new(&hold);
                let mut guarded = GuardedTransaction { transaction: transaction.keep(hold.clone()), hold };
                let key = guarded.hold.lease.key.clone();
                if DB::sees_grant(&mut guarded, &key).await? {
                    return Ok(guarded);
                }
                guarded.transaction.roll_back().await?;
                if started.elapsed() > BEGIN_LIMIT {
                    return Err(sqlx::Error::Protocol("this node has not heard of the lease".into()));
                }
                sleep(PAUSE).await;
                continue;
            }
            Ok(Err(error)) => error,
            Err(_runtime_shut_down) => return Err(sqlx::Error::WorkerCrashed),
        };
        match DB::classify(&error) {
            // SQLite: somebody else is writing.
            Fault::Busy if started.elapsed() < BEGIN_LIMIT => sleep(PAUSE).await,
            // Found dead before anything was done: closed while it was idle, or by the end of the runtime that made it. So may be
            // all others that the pool has.
            Fault::Disconnected if broken <= pool.options().get_max_connections() => broken += 1,
            _ => return Err(error),
        }
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
