//! The guarded transaction, which commits only while the lease is held. The database decides.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use sqlx::Pool;
use tokio::select;
use tokio::sync::oneshot;

use crate::Error;
use crate::clock::sleep;
use crate::context::Context;
use crate::database::{Failure, Fault, LockDatabase, Notification, StepError};
use crate::error::Action;
use crate::error::{Loss, WaitingFor};
use crate::managed_tx::{Condition, ManagedTransaction};
use crate::runtime::{self, Runtime};
use crate::session::{KeptByTransaction, LeaseHandle};

const PAUSE: Duration = Duration::from_millis(10);
const BEGIN: Action = Action::BeginGuarded;
/// How long other connections may be in the way: another writer on SQLite, or a node that does not
/// see the grant yet.
const BEGIN_LIMIT: Duration = Duration::from_secs(30);

/// A transaction that commits only if its lease is still the current one, from
/// [`Lease::begin`](crate::Lease::begin). It derefs to the connection: `&mut *transaction` runs
/// statements in it.
///
/// [`commit`](Self::commit) locks the row of the lock as its last statement before COMMIT. A
/// takeover has to wait for this row. If the takeover comes first, nothing is committed. Otherwise
/// the takeover comes after the commit. The database orders the two, so no clock, pause or network
/// failure can change the result.
///
/// The lease is released only when its last guarded transaction has ended. Dropping the transaction
/// rolls it back.
#[must_use = "bind it to a name (`let mut transaction = …`); `let _ = …` rolls it back at once"]
#[clippy::has_significant_drop]
pub struct GuardedTransaction<DB: LockDatabase> {
    transaction: ManagedTransaction<DB, KeptByTransaction>,
    hold: KeptByTransaction,
}

impl<DB: LockDatabase> GuardedTransaction<DB> {
    /// Begins on a connection of the application's pool, unless the lease is lost first.
    pub(super) async fn begin(context: &Context<DB>, hold: &Arc<LeaseHandle>) -> Result<Self, Error> {
        hold.check()?;
        // A commit whose caller is gone may still be running. This transaction must see its result.
        select! {
            reason = hold.lease.lost() => return Err(hold.lost(reason)),
            () = hold.lease.commits_have_ended() => {}
        }
        hold.refuse_after_unknown_commit()?;
        let (pool, for_task) = (context.pool().clone(), Arc::downgrade(hold));
        let (mut answer, answered) = oneshot::channel();
        let runtime = Runtime::current()?;
        let for_begin = runtime.clone();
        runtime.spawn(async move {
            let begun = select! {
                biased;
                // A caller that is gone keeps neither a position in the pool's queue nor the lease.
                () = answer.closed() => return,
                begun = begin_on(&pool, &for_task, &for_begin) => begun,
            };
            // A transaction that is not received is dropped, and rolled back.
            let _ = answer.send(begun);
        });
        let result = select! {
            biased;
            reason = hold.lease.lost() => return Err(hold.lost(reason)),
            begun = answered => begun,
        };
        match result {
            Ok(Ok(guarded)) => Ok(guarded),
            Ok(Err(StepError::Sqlx(sqlx::Error::PoolTimedOut))) => Err(Error::Timeout {
                name: hold.lease.name().given(),
                waited: context.pool().options().get_acquire_timeout(),
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

    /// Commits the transaction if the lease is still held. Otherwise the transaction is rolled
    /// back.
    ///
    /// The database decides at the moment of the commit. The local deadline of the lease plays no
    /// part.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// # let lease = locks.insert_lock("stock").acquire().await?;
    /// use lock_db::Error;
    ///
    /// let transaction = lease.begin().await?;
    /// // … statements on `&mut *transaction` …
    /// match transaction.commit().await {
    ///     Ok(()) => println!("committed under the lease"),
    ///     Err(error @ Error::CommitUnknown { .. }) => eprintln!("check the data: {error}"),
    ///     Err(error) => eprintln!("nothing was committed: {error}"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// After these nothing was committed:
    ///
    /// - [`Error::Lost`] when another process has the lock, or when the transaction had ended
    ///   before, for example by a deadlock whose error was ignored.
    /// - [`Error::Serialization`] and [`Error::Deadlock`] when the database rejects the transaction
    ///   with such an error.
    /// - [`Error::Refused`] and [`Error::Database`] when the server rejects the commit for another
    ///   reason.
    /// - [`Error::Timeout`] when another transaction keeps the row of the lock locked.
    /// - [`Error::Lost`] with [`Loss::CommitUnknown`] when an earlier commit of the same lease has
    ///   an unknown result.
    ///
    /// [`Error::CommitUnknown`] when the connection was lost during the commit. It is unknown
    /// whether the transaction was committed. If it was, the lease was held. It may even be
    /// committed later, so this lease begins no other transaction ([`Loss::CommitUnknown`]): take
    /// the lock again.
    ///
    /// # Cancel safety
    ///
    /// The commit continues when the future is dropped. Only its result is lost.
    pub async fn commit(self) -> Result<(), Error> {
        self.end(false).await
    }

    /// Rolls the transaction back. The lease continues.
    ///
    /// # Errors
    ///
    /// [`Error::Unreachable`] when the connection broke, and [`Error::Database`] when the rollback
    /// failed for another reason. The transaction is not committed in either case.
    ///
    /// # Cancel safety
    ///
    /// The rollback continues when the future is dropped. Only its result is lost.
    pub async fn rollback(self) -> Result<(), Error> {
        let Self { transaction, hold } = self;
        transaction
            .roll_back()
            .await
            .map_err(|error| Failure::new::<DB>(error).into_error(Action::RollBack, Some(hold.lease.name())))
    }

    pub(super) fn is_of(&self, hold: &Arc<LeaseHandle>) -> bool {
        self.hold.is(hold)
    }

    /// Checks the lease and commits, or releases it and commits.
    pub(super) async fn end(self, release: bool) -> Result<(), Error> {
        let Self { transaction, hold } = self;
        if let Err(refused) = hold.refuse_after_unknown_commit() {
            let _rolled_back = transaction.roll_back().await;
            return Err(refused);
        }
        // Other processes may have the lock a moment before this process knows.
        let in_doubt = release.then(|| LeaseHandle::doubt(hold.clone()));
        let condition = Condition::Lease { key: hold.lease.key.clone(), release };
        let (under_way, refused) = (hold.lease.commit_begins(), hold.clone());
        let ended = move |ended: &Result<Option<Notification>, Error>| {
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
                // The transaction would still pass its check after another transaction of the same
                // lease.
                Err(Error::CommitUnknown { .. } | Error::Unreachable { .. }) => drop(under_way),
                Err(_nothing_was_committed) => under_way.never_comes(),
            }
            drop(in_doubt);
        };
        match transaction.commit(condition, ended).await {
            // The database reports only that the row does not belong to this lease.
            Err(Error::Lost { reason: Loss::TakenOver, .. }) => Err(match refused.lease.told_loss() {
                Some(Loss::HeldTooLong) => refused.lost(Loss::HeldTooLong),
                _ => refused.taken_over().await,
            }),
            committed => committed,
        }
    }
}

/// Waits for a connection, which may be interrupted, and begins the transaction on it in a task,
/// which may not.
async fn begin_on<DB: LockDatabase>(
    pool: &Pool<DB>,
    hold: &Weak<LeaseHandle>,
    runtime: &Runtime,
) -> Result<GuardedTransaction<DB>, StepError> {
    let mut broken = 0_u32;
    let started = Instant::now();
    loop {
        let connection = pool.acquire().await?;
        let begun = runtime.spawn(ManagedTransaction::begin(connection, DB::BEGIN_GUARDED, runtime.clone()));
        let error = match begun.await {
            Ok(Ok(transaction)) => {
                let Some(hold) = hold.upgrade() else { return Err(sqlx::Error::PoolClosed.into()) };
                let hold = KeptByTransaction::new(&hold);
                let mut guarded = GuardedTransaction { transaction: transaction.keep(hold.clone()), hold };
                let key = guarded.hold.lease.key.clone();
                if DB::sees_grant(&mut guarded, &key).await? {
                    return Ok(guarded);
                }
                guarded.transaction.roll_back().await?;
                if started.elapsed() > BEGIN_LIMIT {
                    return Err(StepError::disconnected(
                        "this node of the cluster has not received the grant of the lease yet",
                    ));
                }
                sleep(PAUSE).await;
                continue;
            }
            Ok(Err(error)) => error,
            Err(_runtime_shut_down) => return Err(sqlx::Error::WorkerCrashed.into()),
        };
        match DB::classify(&error) {
            // SQLite: another connection is writing.
            Fault::Busy if started.elapsed() < BEGIN_LIMIT => sleep(PAUSE).await,
            // The connection was dead before anything was done: closed while it was idle, or by the
            // end of the runtime that opened it. The same may be true of all others in the pool.
            Fault::Disconnected if broken <= pool.options().get_max_connections() => broken += 1,
            _ => return Err(error.into()),
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
