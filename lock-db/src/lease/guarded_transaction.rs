//! The guarded transaction, which commits only while the lease is held. The database decides.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use sqlx::Pool;
use tokio::select;
use tokio::sync::oneshot;

use super::handles;
use crate::Error;
use crate::clock::sleep;
use crate::context::Context;
use crate::database::{Failure, Fault, LockDatabase, Notification, StepError};
use crate::error::Action;
use crate::error::{Loss, WaitingFor};
use crate::managed_tx::{Condition, ManagedTransaction};
use crate::runtime::{self, Runtime};
use crate::session::{CommitUnderWay, KeptByTransaction, LeaseHandle};

const PAUSE: Duration = Duration::from_millis(10);
const BEGIN: Action = Action::BeginGuarded;
/// How long other connections may be in the way: another writer on SQLite, or a node that does not
/// see the grant yet.
const BEGIN_LIMIT: Duration = Duration::from_secs(30);

/// A transaction that commits only if its lease is still the current one, from
/// [`Lease::begin`](crate::Lease::begin), or if all of several are, from
/// [`Leases::begin`](crate::Leases::begin). It derefs to the connection: `&mut *transaction` runs
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
    transaction: ManagedTransaction<DB, Vec<KeptByTransaction>>,
    /// At least one.
    handles: Vec<KeptByTransaction>,
}

impl<DB: LockDatabase> GuardedTransaction<DB> {
    /// Begins on a connection of the application's pool, unless one of the leases is lost first.
    pub(super) async fn begin(context: &Context<DB>, handles: &[&Arc<LeaseHandle>]) -> Result<Self, Error> {
        handles.iter().try_for_each(|handle| handle.check())?;
        // A commit whose caller is gone may still be running. This transaction must see its result.
        select! {
            lost = first_loss(handles) => return Err(lost),
            () = commits_have_ended(handles) => {}
        }
        handles.iter().try_for_each(|handle| handle.refuse_after_unknown_commit())?;
        // There is at least one.
        let name = handles[0].name();
        let pool = context.pool().clone();
        let for_task: Vec<_> = handles.iter().map(|handle| Arc::downgrade(handle)).collect();
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
            lost = first_loss(handles) => return Err(lost),
            begun = answered => begun,
        };
        match result {
            Ok(Ok(guarded)) => Ok(guarded),
            Ok(Err(StepError::Sqlx(sqlx::Error::PoolTimedOut))) => Err(Error::Timeout {
                name: name.given(),
                waited: context.pool().options().get_acquire_timeout(),
                waiting_for: WaitingFor::Connection,
                held_by: None,
            }),
            Ok(Err(error)) => {
                let failure = Failure::new::<DB>(error);
                Err(failure.into_error(BEGIN, Some(name)))
            }
            Err(_runtime_shut_down) => Err(runtime::ended(BEGIN, name)),
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
        let Self { transaction, handles } = self;
        transaction
            .roll_back()
            .await
            .map_err(|error| Failure::new::<DB>(error).into_error(Action::RollBack, Some(handles[0].name())))
    }

    async fn sees_grants(&mut self) -> Result<bool, StepError> {
        for handle in &self.handles {
            if !DB::sees_grant(&mut self.transaction, &handle.lease.key).await? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether it is guarded by this lease alone.
    pub(super) fn is_of(&self, handle: &Arc<LeaseHandle>) -> bool {
        matches!(&*self.handles, [only] if only.is(handle))
    }

    /// Checks the leases and commits. A single one may be released with the commit.
    pub(super) async fn end(self, release: bool) -> Result<(), Error> {
        let Self { transaction, handles } = self;
        let refused = handles.iter().try_for_each(|handle| handle.refuse_after_unknown_commit());
        if let Err(refused) = refused {
            let _rolled_back = transaction.roll_back().await;
            return Err(refused);
        }
        // Other processes may have the lock a moment before this process knows.
        let in_doubt = release.then(|| LeaseHandle::doubt(handles[0].clone()));
        let mut keys = handles.iter().map(|handle| handle.lease.key.clone());
        let Some(key) = keys.next() else { return Err(Error::Closed) };
        let condition = Condition::Lease { key, others: keys.collect(), release };
        let under_way: Vec<_> = handles.iter().map(|handle| handle.lease.begin_commit()).collect();
        let committed_under = handles.clone();
        let ended = move |ended: &Result<Option<Notification>, Error>| {
            match ended {
                Ok(notification) => {
                    under_way.into_iter().for_each(CommitUnderWay::mark_carried_out);
                    if release {
                        committed_under[0].mark_released(*notification);
                    }
                }
                Err(Error::Lost { reason: Loss::TakenOver, name, .. }) => {
                    under_way.into_iter().for_each(CommitUnderWay::mark_refused);
                    if let Some(handle) = of_name(&committed_under, name) {
                        handle.mark_lost();
                    }
                }
                // The transaction would still pass its check after another transaction of the same
                // lease.
                Err(Error::CommitUnknown { .. } | Error::Unreachable { .. }) => drop(under_way),
                Err(_nothing_was_committed) => {
                    under_way.into_iter().for_each(CommitUnderWay::mark_refused);
                }
            }
            drop(in_doubt);
        };
        match transaction.commit(condition, ended).await {
            // The database reports only that the row does not belong to this lease.
            Err(Error::Lost { reason: Loss::TakenOver, name, taken_over_by }) => {
                Err(match of_name(&handles, &name) {
                    Some(handle) if handle.lease.reported_loss() == Some(Loss::HeldTooLong) => {
                        handle.lost_error(Loss::HeldTooLong)
                    }
                    Some(handle) => handle.taken_over_error().await,
                    None => Error::Lost { reason: Loss::TakenOver, name, taken_over_by },
                })
            }
            committed => committed,
        }
    }
}

fn of_name<'a>(handles: &'a [KeptByTransaction], name: &str) -> Option<&'a KeptByTransaction> {
    handles.iter().find(|handle| handle.name().shown() == name)
}

/// Resolves when one of the leases is lost.
async fn first_loss(leases: &[&Arc<LeaseHandle>]) -> Error {
    handles::lost(leases.iter().map(|handle| &***handle)).await;
    leases.iter().find_map(|handle| handle.check().err()).unwrap_or(Error::Closed)
}

async fn commits_have_ended(leases: &[&Arc<LeaseHandle>]) {
    for handle in leases {
        handle.lease.commits_have_ended().await;
    }
}

/// Waits for a connection, which may be interrupted, and begins the transaction on it in a task,
/// which may not.
async fn begin_on<DB: LockDatabase>(
    pool: &Pool<DB>,
    leases: &[Weak<LeaseHandle>],
    runtime: &Runtime,
) -> Result<GuardedTransaction<DB>, StepError> {
    let mut broken = 0_u32;
    let started = Instant::now();
    loop {
        let connection = pool.acquire().await?;
        let begun = runtime.spawn(ManagedTransaction::begin(connection, DB::BEGIN_GUARDED, runtime.clone()));
        let error = match begun.await {
            Ok(Ok(transaction)) => {
                let handles: Option<Vec<_>> = leases.iter().map(Weak::upgrade).collect();
                let Some(handles) = handles else { return Err(sqlx::Error::PoolClosed.into()) };
                let handles: Vec<_> = handles.iter().map(KeptByTransaction::new).collect();
                let transaction = transaction.keep(handles.clone());
                let mut guarded = GuardedTransaction { transaction, handles };
                if guarded.sees_grants().await? {
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
        let names: Vec<_> = self.handles.iter().map(|handle| handle.name()).collect();
        formatter.debug_struct("GuardedTransaction").field("locks", &names).finish_non_exhaustive()
    }
}
