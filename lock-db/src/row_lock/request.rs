//! The request for a row lock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;
use sqlx::pool::PoolConnection;
use tokio::select;
use tokio::sync::oneshot;
use tracing::Instrument;

use super::RowGuard;
use crate::clock::{sleep, sleep_until, timeout, timeout_at};
use crate::connecting::{PATIENCE, is_lent_out, refusal};
use crate::context::Context;
use crate::database::{Failure, Fault, LockDatabase};
use crate::error::{Action, WaitingFor};
use crate::in_transaction::{Attempt, HeldInTransaction};
use crate::jitter::jitter;
use crate::keyed_queue::{Known, RowPermit};
use crate::managed_tx::{Condition, ManagedTransaction};
use crate::options::{FIRST_ANSWER, LONGEST_TRY, Wait};
use crate::runtime::{self, Runtime};
#[cfg(feature = "testing")]
use crate::test_support;
use crate::{Error, Kind, LockInfo};

/// How long a caller whose wait is over still waits for the task when the database seems to be
/// silent.
const LAST_WORD: Duration = Duration::from_millis(250);
/// The pause between two reads of a lock for which too many requests already wait in the database.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// The pause before a new beginning after a broken connection or a deadlock.
const PAUSE: Duration = Duration::from_millis(20);

const ACTION: Action = Action::TakeRowLock;
const BEGIN: Action = Action::BeginTransaction;

/// A request for a row lock, from [`Locks::row_lock`](crate::Locks::row_lock). It does nothing
/// until one of its async methods is called.
///
/// The lock is the row of the name in `distributed_lock`. A transaction locks and writes the row,
/// and holds the lock until it ends. Waiting requests queue in the database, which wakes them in
/// order.
///
/// SQLite has no row locks. There the request takes the write lock of the whole database, as `BEGIN
/// IMMEDIATE` does, so a row lock excludes all other row locks and every other writer. While
/// another connection writes, it is unknown whether that connection holds the lock, unless this
/// `Locks` holds it itself. The result is then a retryable [`Error::Database`].
#[derive(Debug)]
#[must_use = "this only describes a lock; call `acquire` or `acquire_in`"]
pub struct RowLock<DB: LockDatabase> {
    context: Arc<Context<DB>>,
    name: String,
    wait: Option<Duration>,
}

// A derived impl would require `DB: Clone`.
impl<DB: LockDatabase> Clone for RowLock<DB> {
    fn clone(&self) -> Self {
        Self { context: Arc::clone(&self.context), name: self.name.clone(), wait: self.wait }
    }
}

impl<DB: LockDatabase> RowLock<DB> {
    pub(crate) fn new(context: Arc<Context<DB>>, name: &str) -> Self {
        Self { context, name: name.to_owned(), wait: None }
    }

    /// Sets how long to wait in total, for the lock and, where one is needed, for a connection of
    /// the pool. At most 365 days. Zero asks once.
    ///
    /// A database that has not answered at all by then gets up to a second in total, because
    /// without an answer it is unknown whether the lock is held.
    ///
    /// Default: that of the [`LocksBuilder`](crate::LocksBuilder), which is 30 seconds unless set.
    pub const fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Takes the lock in a transaction of its own, on a connection of the application's pool.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let guard = locks.row_lock("stock:7").acquire().await?;
    /// // … statements on `&mut *guard` …
    /// guard.commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::Timeout`] when the wait was over first. `waiting_for` says whether the lock was
    ///   held, or the pool had no connection.
    /// - [`Error::Unreachable`] when the database could not be reached or did not answer until the
    ///   end of the wait. Retryable.
    /// - [`Error::Refused`] at once, when the server refuses until a person changes something: the
    ///   role, the password, a right.
    /// - [`Error::Database`] when the database reports another error: at once if it is permanent,
    ///   otherwise at the end of the wait (with `retryable`).
    /// - [`Error::Deadlock`] and [`Error::Serialization`] when the database ended the transaction
    ///   for such a reason, at the end of the wait. Until then the request begins anew.
    /// - [`Error::WrongKind`] when the name is used for insert locks, or by a later version of
    ///   lock-db for another kind.
    /// - [`Error::SchemaMissing`], [`Error::UnsupportedTable`] and [`Error::ForeignTransaction`]
    ///   when the table can't be used on connections of the pool.
    /// - [`Error::InvalidName`] and [`Error::InvalidOption`] when the request is not valid. The
    ///   latter also outside of a tokio runtime.
    /// - [`Error::Closed`] when the `Locks` was closed.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. The transaction is rolled back and its connection
    /// returned within two seconds, the longest that one statement waits on the server.
    pub async fn acquire(self) -> Result<RowGuard<DB>, Error> {
        let wait = self.context.settings().wait(self.wait)?;
        #[cfg(feature = "testing")]
        let context = Arc::clone(&self.context);
        // A caller that waits gets it or an error.
        let guard = self.in_task(wait).await?.ok_or(Error::Closed)?;
        #[cfg(feature = "testing")]
        let guard = guard.of_caller(&context);
        Ok(guard.handed_out())
    }

    /// Takes the lock in a transaction of its own if it is free now. Returns `None` when it is
    /// held. Otherwise as [`acquire`](Self::acquire).
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire), but `Timeout` only when the pool had no connection within ten
    /// seconds.
    ///
    /// # Cancel safety
    ///
    /// As [`acquire`](Self::acquire).
    pub async fn try_acquire(self) -> Result<Option<RowGuard<DB>>, Error> {
        #[cfg(feature = "testing")]
        let context = Arc::clone(&self.context);
        let guard = self.in_task(Wait::Try).await?;
        #[cfg(feature = "testing")]
        let guard = guard.map(|guard| guard.of_caller(&context));
        Ok(guard.map(RowGuard::handed_out))
    }

    /// Takes the lock in the caller's transaction. No other connection holds it, and the end of the
    /// transaction frees it.
    ///
    /// This should be the first statement of the transaction. In REPEATABLE READ and above, a
    /// snapshot that is older than the lock is refused.
    ///
    /// After [`Error::Timeout`] the transaction is as usable as before. After [`Error::Deadlock`]
    /// and [`Error::Serialization`] it must be rolled back and run again from its beginning.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let mut transaction = locks.pool().begin().await?;
    /// locks.row_lock("stock:7").acquire_in(&mut transaction).await?;
    /// // … statements on `&mut *transaction` …
    /// transaction.commit().await?;    // the lock is free from here on
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::NotInTransaction`] when the connection is not in a transaction that sqlx began.
    /// - [`Error::ForeignTransaction`] when the transaction does not reach the table of this
    ///   `Locks`.
    /// - [`Error::Deadlock`] and [`Error::Serialization`] when the transaction can't continue.
    /// - [`Error::Lost`] when the transaction was ended already, or can only be rolled back.
    /// - Otherwise as [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the transaction may or may not have the lock: roll it back. Its
    /// connection answers the next statement when the running one has ended, within two seconds. On
    /// MySQL and MariaDB the next statement may return the error of the running one.
    pub async fn acquire_in(self, transaction: &mut DB::Connection) -> Result<HeldInTransaction, Error> {
        let wait = self.context.settings().wait(self.wait)?;
        #[cfg(feature = "testing")]
        let context = Arc::clone(&self.context);
        // A caller that waits gets it or an error.
        let held = self.take_in(transaction, wait).await?.ok_or(Error::Closed)?;
        #[cfg(feature = "testing")]
        test_support::are_in_transaction(&context, Kind::Row, [&held]);
        Ok(held)
    }

    /// Takes the lock in the caller's transaction if it is free now. Returns `None` when it is
    /// held. Otherwise as [`acquire_in`](Self::acquire_in).
    ///
    /// # Errors
    ///
    /// As [`acquire_in`](Self::acquire_in), without `Timeout`.
    ///
    /// # Cancel safety
    ///
    /// As [`acquire_in`](Self::acquire_in).
    pub async fn try_acquire_in(
        self,
        transaction: &mut DB::Connection,
    ) -> Result<Option<HeldInTransaction>, Error> {
        #[cfg(feature = "testing")]
        let context = Arc::clone(&self.context);
        let held = self.take_in(transaction, Wait::Try).await?;
        #[cfg(feature = "testing")]
        test_support::are_in_transaction(&context, Kind::Row, &held);
        Ok(held)
    }

    pub(crate) async fn take_in(
        self,
        transaction: &mut DB::Connection,
        wait: Wait,
    ) -> Result<Option<HeldInTransaction>, Error> {
        let started = Instant::now();
        let name = self.context.checked_name(&self.name)?;
        let attempt = Attempt { context: &self.context, name: &name, kind: Kind::Row, wait, started };
        attempt.lock_in(transaction).await
    }

    /// In a task, which a caller who goes away can't cut off in the middle of a statement.
    async fn in_task(self, wait: Wait) -> Result<Option<RowGuard<DB>>, Error> {
        let started = Instant::now();
        let name = self.context.checked_name(&self.name)?;
        let runtime = Runtime::current()?;
        let (mut answer, mut answered) = oneshot::channel();
        let (context, own_name) = (Arc::clone(&self.context), name.clone());
        let for_task = runtime.clone();
        let task = async move {
            let attempt = Attempt { context: &self.context, name: &name, kind: Kind::Row, wait, started };
            let (guard, of_guard) = match take(&attempt, &mut answer, &for_task).await {
                Ok(Some(HeldLock { guard, permit, fencing_token })) => {
                    (Ok(Some(guard)), Some((permit, fencing_token)))
                }
                Ok(None) => (Ok(None), None),
                Err(error) => (Err(error), None),
            };
            // An answer that comes too late is a dropped guard. It rolls back, and holds nothing
            // for the requests behind it.
            if answer.send(guard).is_ok()
                && let Some((permit, fencing_token)) = of_guard
            {
                permit.learn(Known::Held(Some(Box::new(held_here(&attempt, fencing_token)))));
            }
        };
        runtime.spawn(task.in_current_span());
        let attempt = Attempt { context: &context, name: &own_name, kind: Kind::Row, wait, started };
        let error = select! {
            biased;
            answer = &mut answered => return answer.unwrap_or_else(|_| Err(runtime::ended(ACTION, &own_name))),
            error = attempt.over() => error,
        };
        // What the task has learned since then counts more.
        if !error.is_silence() {
            return Err(error);
        }
        timeout(LAST_WORD, answered).await.ok().and_then(Result::ok).unwrap_or(Err(error))
    }
}

impl<DB: LockDatabase> Attempt<'_, DB> {
    /// Resolves when the wait is over, even if the database does not answer at all, but not before
    /// it had time for one answer. The error follows from what is known of the lock in this
    /// process.
    async fn over(&self) -> Error {
        sleep_until(self.started + self.wait.limit().unwrap_or(LONGEST_TRY)).await;
        self.gives_up().await
    }

    async fn gives_up(&self) -> Error {
        let in_the_way = |known: &Known| match known {
            Known::Held(held_by) => Some(Error::Timeout {
                name: self.name.given(),
                waited: self.started.elapsed(),
                waiting_for: WaitingFor::Lock,
                held_by: held_by.clone(),
            }),
            Known::NoConnection => Some(self.timed_out(WaitingFor::Connection, None)),
            Known::Failure(failure) => {
                Some(failure.clone().into_error(ACTION, Some(self.name)).within(self.wait.limit()))
            }
            Known::Nothing => None,
        };
        let told = self.context.row_waiters().queue.learns(self.name, in_the_way);
        timeout_at(self.started + FIRST_ANSWER, told).await.unwrap_or_else(|_elapsed| {
            Failure::no_answer::<DB>(self.started.elapsed()).into_error(ACTION, Some(self.name))
        })
    }
}

type Answer<DB> = oneshot::Sender<Result<Option<RowGuard<DB>>, Error>>;

struct HeldLock<DB: LockDatabase> {
    guard: RowGuard<DB>,
    permit: Arc<RowPermit>,
    fencing_token: i64,
}

/// Begins a transaction and locks the row in it. Begins again on another connection when one turns
/// out to be broken.
///
/// Requests that wait take as few connections as possible from the rest of the application, which
/// has to finish first. Of the callers for one name, only the first has a connection, and none has
/// one while a caller of this process holds the lock. Of the requests that wait for other
/// processes, at most half of the pool may wait in the database's queue. The others try again at
/// intervals.
async fn take<DB: LockDatabase>(
    attempt: &Attempt<'_, DB>,
    answer: &mut Answer<DB>,
    runtime: &Runtime,
) -> Result<Option<HeldLock<DB>>, Error> {
    // Also finds out whether locks are possible at all, before waiting for a connection of the
    // pool.
    attempt.locate().await?;
    let queues = attempt.context.row_waiters();
    let permit = match queues.queue.try_enter(attempt.name) {
        Some(permit) => permit,
        None if attempt.wait.is_try() => match queues.queue.enter_unless_held(attempt.name).await {
            Some(permit) => permit,
            None => return Ok(None),
        },
        None => match in_time(attempt, answer, queues.queue.enter(attempt.name)).await? {
            Some(permit) => permit,
            None => return Ok(None),
        },
    };
    let permit = Arc::new(permit);
    let mut may_wait = None;
    let (mut broken, mut dead) = (0_u32, 0_u32);
    loop {
        let begun = match connect(attempt, &permit, answer).await {
            Ok(Some(connection)) => begin(attempt, connection, runtime).await,
            Ok(None) => return Ok(None),
            Err(failed) => Err(failed),
        };
        let error = match begun {
            Ok(transaction) => {
                let mut transaction = transaction.keep(Arc::clone(&permit));
                let locked = attempt.lock(&mut transaction, |in_the_way| {
                    permit.learn(
                        in_the_way.map_or(Known::Held(None), |failure| Known::Failure(failure.clone())),
                    );
                    may_wait = may_wait.take().or_else(|| queues.waiters.try_acquire().ok());
                    may_wait.is_some() && !answer.is_closed()
                });
                let error = match locked.await {
                    Ok(Some(locked)) => {
                        // The first time: the transaction has only just begun.
                        let counted = attempt.context.hold_counts().enter_own(locked.secret, &locked.before);
                        let Some(server) = attempt.context.location().found() else {
                            return Err(Error::Closed);
                        };
                        let (name, fencing_token) = (attempt.name.clone(), locked.fencing_token);
                        let condition = Condition::Row { name, fencing_token, server };
                        let guard = RowGuard::new(transaction, condition, counted);
                        return Ok(Some(HeldLock { guard, permit, fencing_token }));
                    }
                    Ok(None) => None,
                    Err(error) => Some(error),
                };
                if let Err(error) = transaction.roll_back().await {
                    tracing::debug!(error = %Failure::new::<DB>(error), "rolling back");
                }
                error
            }
            // Closed while it was idle, or by the end of the runtime that opened it. The same may
            // be true of all others in the pool.
            Err(NotBegun::Dead(_))
                if dead <= attempt.context.pool().options().get_max_connections()
                    && attempt.left().is_none_or(|left| !left.is_zero()) =>
            {
                dead += 1;
                continue;
            }
            Err(NotBegun::Failure(failure) | NotBegun::Dead(failure)) => {
                let failure = failure.written_by_others(attempt.name, false);
                permit.learn(Known::Failure(failure.clone()));
                Some(failure.into_error(BEGIN, Some(attempt.name)))
            }
            Err(NotBegun::Error(error)) => return Err(error),
        };
        let Some(error) = error else {
            if attempt.wait.is_try() || answer.is_closed() || may_wait.is_some() {
                return Ok(None);
            }
            // Too many requests already wait in the database.
            let place = timeout(jitter(LOOK_AGAIN), queues.waiters.acquire());
            may_wait = in_time(attempt, answer, place).await?.and_then(Result::ok).and_then(Result::ok);
            continue;
        };
        // A connection whose runtime has ended may still return a quick answer, such as that to
        // BEGIN.
        let failure = Failure::of_error::<DB>(&error);
        let is_dead = failure.as_ref().is_some_and(Failure::is_of_ended_runtime);
        if is_dead && !answer.is_closed() && dead <= attempt.context.pool().options().get_max_connections() {
            dead += 1;
            continue;
        }
        // Nothing was locked and nothing else was done in the transaction, so a new beginning is
        // safe.
        let again = match &error {
            Error::Serialization { .. } | Error::Deadlock { .. } => true,
            error => error.passes(),
        };
        broken += 1;
        let in_time = attempt.wait.limit().is_some_and(|wait| attempt.started.elapsed() < wait);
        let is_silence = error.is_silence();
        if !again || answer.is_closed() || (!in_time && (broken > 1 || is_silence)) {
            return Err(if in_time { error } else { error.within(attempt.wait.limit()) });
        }
        if let Some(failure) = failure {
            permit.learn(Known::Failure(failure));
        }
        sleep(PAUSE).await;
    }
}

/// Waits in a queue of this process as long as the caller does. `None`: the caller is gone.
async fn in_time<DB: LockDatabase, T>(
    attempt: &Attempt<'_, DB>,
    answer: &mut Answer<DB>,
    queue: impl Future<Output = T>,
) -> Result<Option<T>, Error> {
    select! {
        biased;
        () = answer.closed() => Ok(None),
        permit = queue => Ok(Some(permit)),
        error = attempt.over() => Err(error),
    }
}

/// The reason why there is no transaction.
enum NotBegun {
    Failure(Failure),
    /// The connection was dead before anything was done on it.
    Dead(Failure),
    Error(Error),
}

/// Waits for a connection no longer than the caller does. `None`: the caller is gone.
async fn connect<DB: LockDatabase>(
    attempt: &Attempt<'_, DB>,
    permit: &RowPermit,
    answer: &mut Answer<DB>,
) -> Result<Option<PoolConnection<DB>>, NotBegun> {
    let left = attempt.left().map_or(LONGEST_TRY, |left| left.max(FIRST_ANSWER));
    let mut found_out = false;
    let connected = select! {
        biased;
        () = answer.closed() => return Ok(None),
        connected = timeout(left, attempt.context.pool().acquire()) => connected,
        error = finds_out_why(attempt, permit, &mut found_out) => Ok(Err(error)),
    };
    match connected {
        Ok(Ok(connection)) => {
            if found_out {
                permit.learn(Known::Nothing);
            }
            Ok(Some(connection))
        }
        Err(_) | Ok(Err(sqlx::Error::PoolTimedOut)) => Err(NotBegun::Error(attempt.gives_up().await)),
        Ok(Err(error)) => Err(NotBegun::Failure(Failure::new::<DB>(error))),
    }
}

/// Finds out why the pool provides no connection. A pool whose connections are all in use looks
/// like one that can't open any, so the session is asked whether the database answers. Resolves
/// when the database refuses.
async fn finds_out_why<DB: LockDatabase>(
    attempt: &Attempt<'_, DB>,
    permit: &RowPermit,
    found_out: &mut bool,
) -> sqlx::Error {
    let pool = attempt.context.pool();
    let mut pause = PATIENCE;
    if is_lent_out(pool)
        && let Some(left) = attempt.left()
    {
        pause = pause.min(left / 2);
    }
    loop {
        sleep(pause).await;
        if !is_lent_out(pool) {
            return refusal(pool).await;
        }
        let read_at = attempt.read().await;
        *found_out = true;
        let failure = read_at.err().and_then(|error| Failure::of_error::<DB>(&error));
        permit.learn(failure.map_or(Known::NoConnection, Known::Failure));
        pause = FIRST_ANSWER;
    }
}

async fn begin<DB: LockDatabase>(
    attempt: &Attempt<'_, DB>,
    connection: PoolConnection<DB>,
    runtime: &Runtime,
) -> Result<ManagedTransaction<DB, Arc<RowPermit>>, NotBegun> {
    let begun = runtime.spawn(ManagedTransaction::begin(connection, DB::BEGIN_WITH_ROW, runtime.clone()));
    let left = attempt.left().map_or(LONGEST_TRY, |left| left.max(FIRST_ANSWER));
    match timeout(left, begun).await {
        Ok(Ok(Ok(transaction))) => Ok(transaction),
        Ok(Ok(Err(error))) => {
            let failure = Failure::new::<DB>(error);
            let is_dead = failure.fault == Fault::Disconnected && !failure.is_silence();
            Err(if is_dead { NotBegun::Dead(failure) } else { NotBegun::Failure(failure) })
        }
        Ok(Err(_runtime_shut_down)) => Err(NotBegun::Error(runtime::ended(BEGIN, attempt.name))),
        Err(_elapsed) => Err(NotBegun::Failure(Failure::no_answer::<DB>(left))),
    }
}

/// The holder, for callers of this process that wait behind it.
fn held_here<DB: LockDatabase>(attempt: &Attempt<'_, DB>, fencing_token: i64) -> LockInfo {
    let now = Utc::now();
    LockInfo {
        name: attempt.name.given(),
        kind: Kind::Row,
        owner: attempt.context.owner().to_string(),
        fencing_token,
        created_at: now,
        acquired_at: now,
        held_until: None,
        finished_at: None,
        is_here: true,
    }
}
