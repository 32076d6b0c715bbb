//! Asking for a row lock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use chrono::Utc;
use sqlx::pool::PoolConnection;
use tokio::runtime::is_rt_shutdown_err;
use tokio::select;
use tokio::sync::oneshot;
use tracing::Instrument;

use super::RowGuard;
use crate::clock::{sleep, sleep_until, timeout, timeout_at};
use crate::connecting::{PATIENCE, is_lent_out, refusal};
use crate::database::{Fault, LockDatabase};
use crate::error::{Failure, WaitingFor};
use crate::in_transaction::{Attempt, HeldInTransaction};
use crate::jitter::jitter;
use crate::limits::{FIRST_ANSWER, LONGEST_TRY};
use crate::own_transaction::{Condition, OwnTransaction};
use crate::runtime::{self, Runtime};
use crate::turns::{Known, Turn};
use crate::{Error, Kind, LockInfo, Locks, limits};

/// How long a caller whose wait is over still waits for the task, when the database seems to be silent.
const LAST_WORD: Duration = Duration::from_millis(250);
/// Between two looks at a lock for which too many wait in the database already.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// Before beginning anew after a broken connection or a deadlock.
const PAUSE: Duration = Duration::from_millis(20);

const ACTION: &str = "take the row lock";
const BEGIN: &str = "begin a transaction";

/// A request for a row lock, from [`Locks::row_lock`]. Nothing happens before one of its async methods is called.
///
/// The lock is the row of the name in `distributed_lock`, locked and written by a transaction, and is held until that
/// transaction ends. Waiters queue in the database, which wakes them in order.
///
/// SQLite has no row locks: there this takes the write lock of the whole database, as `BEGIN IMMEDIATE` does, so all
/// row locks exclude one another and every other writer. While somebody writes it is not known whether that is a holder,
/// unless this `Locks` has the lock itself: the answer is a retryable [`Error::Database`] then.
#[derive(Debug)]
#[must_use = "this only describes a lock; call `acquire` or `acquire_in`"]
pub struct RowLock<DB: LockDatabase> {
    locks: Locks<DB>,
    name: String,
    wait: Option<Duration>,
}

// Derived, it would ask for a database type that can be cloned.
impl<DB: LockDatabase> Clone for RowLock<DB> {
    fn clone(&self) -> Self {
        Self { locks: self.locks.clone(), name: self.name.clone(), wait: self.wait }
    }
}

impl<DB: LockDatabase> RowLock<DB> {
    pub(crate) fn new(locks: Locks<DB>, name: &str) -> Self {
        Self { locks, name: name.to_owned(), wait: None }
    }

    /// How long to wait, all in all: for a connection of the pool, where one is needed, and for the lock. At most 365
    /// days; zero asks once.
    ///
    /// A database that has not answered anything by then gets up to a second in all, because without its answer it is not
    /// known whether the lock is held.
    ///
    /// Default: what the [`LocksBuilder`](crate::LocksBuilder) says, else 30 seconds.
    pub const fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Takes the lock in a transaction of its own, begun on a connection of the application's pool.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] when the wait was over first, and for what it was: the lock, which was seen to be held, or a
    /// connection of the pool. [`Error::WrongKind`] when the name is used for insert locks. [`Error::Database`] when the
    /// database was silent, away or stalled until the wait was over (retryable), or at once when it refuses for good.
    /// [`Error::Deadlock`], [`Error::Serialization`], [`Error::SchemaMissing`], [`Error::UnsupportedTable`],
    /// [`Error::ForeignTransaction`], [`Error::Closed`], [`Error::InvalidName`], [`Error::InvalidOption`].
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time. The transaction is rolled back and its connection returned within two seconds, the
    /// longest that one statement waits on the server.
    pub async fn acquire(self) -> Result<RowGuard<DB>, Error> {
        let wait = self.checked_wait()?;
        #[cfg(feature = "testing")]
        let locks = self.locks.clone();
        // A caller that waits gets it or an error.
        let guard = self.in_task(Some(wait)).await?.ok_or(Error::Closed)?;
        #[cfg(feature = "testing")]
        let guard = guard.of_caller(&locks);
        Ok(guard.handed_out())
    }

    /// As [`acquire`](Self::acquire), without waiting for the holder: `None` when somebody has it.
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire); `Timeout` only when the pool had no connection within ten seconds.
    ///
    /// # Cancel safety
    ///
    /// As [`acquire`](Self::acquire).
    pub async fn try_acquire(self) -> Result<Option<RowGuard<DB>>, Error> {
        #[cfg(feature = "testing")]
        let locks = self.locks.clone();
        let guard = self.in_task(None).await?;
        #[cfg(feature = "testing")]
        let guard = guard.map(|guard| guard.of_caller(&locks));
        Ok(guard.map(RowGuard::handed_out))
    }

    /// Takes the lock in the caller's transaction: no other connection is used, and the end of the transaction frees it.
    /// It should be the first statement there (in REPEATABLE READ and above a snapshot from before the lock is refused).
    ///
    /// After [`Error::Timeout`] the transaction is as usable as before. After [`Error::Deadlock`] and
    /// [`Error::Serialization`] it has to be rolled back and run again from its beginning.
    ///
    /// # Errors
    ///
    /// [`Error::NotInTransaction`] when the connection is not in a transaction that sqlx began; else as
    /// [`acquire`](Self::acquire).
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the transaction may or may not have the lock, and its connection answers the next
    /// statement when the one under way has ended: within two seconds; on MySQL and MariaDB perhaps with the error of
    /// that one. Best roll the transaction back.
    pub async fn acquire_in(self, transaction: &mut DB::Connection) -> Result<HeldInTransaction, Error> {
        let wait = self.checked_wait()?;
        #[cfg(feature = "testing")]
        let locks = self.locks.clone();
        // A caller that waits gets it or an error.
        let held = self.take_in(transaction, Some(wait)).await?.ok_or(Error::Closed)?;
        #[cfg(feature = "testing")]
        locks.are_in_transaction(Kind::Row, [&held]);
        Ok(held)
    }

    /// As [`acquire_in`](Self::acquire_in), without waiting for the holder: `None` when somebody has it.
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
        let locks = self.locks.clone();
        let held = self.take_in(transaction, None).await?;
        #[cfg(feature = "testing")]
        locks.are_in_transaction(Kind::Row, &held);
        Ok(held)
    }

    fn checked_wait(&self) -> Result<Duration, Error> {
        limits::check_wait(self.wait.unwrap_or(self.locks.default_wait()))
    }

    pub(crate) async fn take_in(
        self,
        transaction: &mut DB::Connection,
        wait: Option<Duration>,
    ) -> Result<Option<HeldInTransaction>, Error> {
        let started = Instant::now();
        let name = self.locks.checked_name(&self.name)?;
        let attempt = Attempt { locks: &self.locks, name: &name, kind: Kind::Row, wait, started };
        attempt.lock_in(transaction).await
    }

    /// In a task, which a caller who goes away can't cut off in the middle of a statement.
    async fn in_task(self, wait: Option<Duration>) -> Result<Option<RowGuard<DB>>, Error> {
        let started = Instant::now();
        let name = self.locks.checked_name(&self.name)?;
        let runtime = Runtime::current()?;
        let (mut answer, mut answered) = oneshot::channel();
        let (locks, own_name) = (self.locks.clone(), name.clone());
        let for_task = runtime.clone();
        let task = async move {
            let attempt = Attempt { locks: &self.locks, name: &name, kind: Kind::Row, wait, started };
            let (guard, of_guard) = match take(&attempt, &mut answer, &for_task).await {
                Ok(Some(Taken { guard, turn, fencing_token })) => {
                    (Ok(Some(guard)), Some((turn, fencing_token)))
                }
                Ok(None) => (Ok(None), None),
                Err(error) => (Err(error), None),
            };
            // An answer that comes too late is a dropped guard, which rolls back, and holds nothing for those behind it.
            if answer.send(guard).is_ok()
                && let Some((turn, fencing_token)) = of_guard
            {
                turn.learn(Known::Held(Some(Box::new(held_here(&attempt, fencing_token)))));
            }
        };
        runtime.spawn(task.in_current_span());
        let attempt = Attempt { locks: &locks, name: &own_name, kind: Kind::Row, wait, started };
        let error = select! {
            biased;
            answer = &mut answered => return answer.unwrap_or_else(|_| Err(runtime::ended(ACTION, &own_name))),
            error = attempt.over() => error,
        };
        // What the task has been told since counts more.
        let is_silence = matches!(&error, Error::Database { source, .. } if Failure::is_silent(source));
        if !is_silence {
            return Err(error);
        }
        timeout(LAST_WORD, answered).await.ok().and_then(Result::ok).unwrap_or(Err(error))
    }
}

impl<DB: LockDatabase> Attempt<'_, DB> {
    /// When the wait is over, also when the database does not answer at all; but not before it could have answered once. By what is
    /// known of the lock in this process.
    async fn over(&self) -> Error {
        sleep_until(self.started + self.wait.unwrap_or(LONGEST_TRY)).await;
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
                Some(failure.another().into_error(ACTION, Some(self.name)).within(self.wait))
            }
            Known::Nothing => None,
        };
        let told = self.locks.row_queues().turns.learns(self.name, in_the_way);
        timeout_at(self.started + FIRST_ANSWER, told).await.unwrap_or_else(|_elapsed| {
            Failure::no_answer::<DB>(self.started.elapsed()).into_error(ACTION, Some(self.name))
        })
    }
}

type Answer<DB> = oneshot::Sender<Result<Option<RowGuard<DB>>, Error>>;

struct Taken<DB: LockDatabase> {
    guard: RowGuard<DB>,
    turn: Arc<Turn>,
    fencing_token: i64,
}

/// Begins a transaction and locks the row in it; again with another connection when one turns out to be broken.
///
/// Whoever waits keeps as few connections from the others as can be, for it is they who must come to an end first: of
/// the callers for one name only the first has one, and none has one while somebody of this process holds the lock; of
/// those who wait for other processes half of the pool may do so in the database's queue, and the others look again and
/// again.
async fn take<DB: LockDatabase>(
    attempt: &Attempt<'_, DB>,
    answer: &mut Answer<DB>,
    runtime: &Runtime,
) -> Result<Option<Taken<DB>>, Error> {
    // Also whether there can be locks at all, before a connection of the pool is waited for.
    attempt.locate().await?;
    let queues = attempt.locks.row_queues();
    let turn = match queues.turns.try_enter(attempt.name) {
        Some(turn) => turn,
        None if attempt.wait.is_none() => match queues.turns.enter_unless_held(attempt.name).await {
            Some(turn) => turn,
            None => return Ok(None),
        },
        None => match in_time(attempt, answer, queues.turns.enter(attempt.name)).await? {
            Some(turn) => turn,
            None => return Ok(None),
        },
    };
    let turn = Arc::new(turn);
    let mut may_wait = None;
    let (mut broken, mut dead) = (0_u32, 0_u32);
    loop {
        let begun = match connect(attempt, &turn, answer).await {
            Ok(Some(connection)) => begin(attempt, connection, runtime).await,
            Ok(None) => return Ok(None),
            Err(failed) => Err(failed),
        };
        let error = match begun {
            Ok(transaction) => {
                let mut transaction = transaction.keep(Arc::clone(&turn));
                let locked = attempt.lock(&mut transaction, |in_the_way| {
                    turn.learn(
                        in_the_way.map_or(Known::Held(None), |failure| Known::Failure(failure.another())),
                    );
                    may_wait = may_wait.take().or_else(|| queues.waiters.try_acquire().ok());
                    may_wait.is_some() && !answer.is_closed()
                });
                let error = match locked.await {
                    Ok(Some(locked)) => {
                        // The first time: the transaction has only just begun.
                        let counted = attempt.locks.counts().enter_own(locked.secret, &locked.before);
                        let Some(server) = attempt.locks.location().found() else {
                            return Err(Error::Closed);
                        };
                        let (name, fencing_token) = (attempt.name.clone(), locked.fencing_token);
                        let condition = Condition::Row { name, fencing_token, server };
                        let guard = RowGuard::new(transaction, condition, counted);
                        return Ok(Some(Taken { guard, turn, fencing_token }));
                    }
                    Ok(None) => None,
                    Err(error) => Some(error),
                };
                if let Err(error) = transaction.roll_back().await {
                    tracing::debug!(%error, "rolling back");
                }
                error
            }
            // Closed while it was idle, or by the end of the runtime that made it. So may be all others that the pool has.
            Err(NotBegun::Dead(_))
                if dead <= attempt.locks.pool().options().get_max_connections()
                    && attempt.left().is_none_or(|left| !left.is_zero()) =>
            {
                dead += 1;
                continue;
            }
            Err(NotBegun::Failure(failure) | NotBegun::Dead(failure)) => {
                let failure = failure.written_by_others(attempt.name, false);
                turn.learn(Known::Failure(failure.another()));
                Some(failure.into_error(BEGIN, Some(attempt.name)))
            }
            Err(NotBegun::Error(error)) => return Err(error),
        };
        let Some(error) = error else {
            if attempt.wait.is_none() || answer.is_closed() || may_wait.is_some() {
                return Ok(None);
            }
            // Too many wait in the database already.
            let place = timeout(jitter(LOOK_AGAIN), queues.waiters.acquire());
            may_wait = in_time(attempt, answer, place).await?.and_then(Result::ok).and_then(Result::ok);
            continue;
        };
        // A connection whose runtime has ended may still get a quick answer through, such as that to BEGIN.
        let is_dead = matches!(&error, Error::Database { source: sqlx::Error::Io(error), .. } if is_rt_shutdown_err(error));
        if is_dead && !answer.is_closed() && dead <= attempt.locks.pool().options().get_max_connections() {
            dead += 1;
            continue;
        }
        // Nothing was locked and nothing else done in the transaction, so beginning anew is safe.
        let again = match &error {
            Error::Database { source, .. } => {
                matches!(DB::classify(source), Fault::Disconnected | Fault::Passing | Fault::Busy)
            }
            Error::Serialization { .. } | Error::Deadlock { .. } => true,
            _ => false,
        };
        broken += 1;
        let in_time = attempt.wait.is_some_and(|wait| attempt.started.elapsed() < wait);
        let is_silence = matches!(&error, Error::Database { source, .. } if Failure::is_silent(source));
        if !again || answer.is_closed() || (!in_time && (broken > 1 || is_silence)) {
            return Err(if in_time { error } else { error.within(attempt.wait) });
        }
        if let Error::Database { source, .. } = error {
            turn.learn(Known::Failure(Failure::new::<DB>(source)));
        }
        sleep(PAUSE).await;
    }
}

/// Waits in a queue of this process as long as the caller does. `None`: the caller has gone.
async fn in_time<DB: LockDatabase, T>(
    attempt: &Attempt<'_, DB>,
    answer: &mut Answer<DB>,
    queue: impl Future<Output = T>,
) -> Result<Option<T>, Error> {
    select! {
        biased;
        () = answer.closed() => Ok(None),
        turn = queue => Ok(Some(turn)),
        error = attempt.over() => Err(error),
    }
}

/// Why there is no transaction.
enum NotBegun {
    Failure(Failure),
    /// The connection was dead, before anything was done on it.
    Dead(Failure),
    Error(Error),
}

/// Waits for a connection no longer than the caller does. `None`: the caller has gone.
async fn connect<DB: LockDatabase>(
    attempt: &Attempt<'_, DB>,
    turn: &Turn,
    answer: &mut Answer<DB>,
) -> Result<Option<PoolConnection<DB>>, NotBegun> {
    let left = attempt.left().map_or(LONGEST_TRY, |left| left.max(FIRST_ANSWER));
    let mut found_out = false;
    let connected = select! {
        biased;
        () = answer.closed() => return Ok(None),
        connected = timeout(left, attempt.locks.pool().acquire()) => connected,
        error = finds_out_why(attempt, turn, &mut found_out) => Ok(Err(error)),
    };
    match connected {
        Ok(Ok(connection)) => {
            if found_out {
                turn.learn(Known::Nothing);
            }
            Ok(Some(connection))
        }
        Err(_) | Ok(Err(sqlx::Error::PoolTimedOut)) => Err(NotBegun::Error(attempt.gives_up().await)),
        Ok(Err(error)) => Err(NotBegun::Failure(Failure::new::<DB>(error))),
    }
}

/// What keeps the pool from giving a connection. A pool whose connections are all lent looks like one that can't make any, so the
/// session is asked whether the database answers. Resolves when it refuses.
async fn finds_out_why<DB: LockDatabase>(
    attempt: &Attempt<'_, DB>,
    turn: &Turn,
    found_out: &mut bool,
) -> sqlx::Error {
    let pool = attempt.locks.pool();
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
        let looked = attempt.look().await;
        *found_out = true;
        turn.learn(match looked {
            Err(Error::Database { source, .. }) => Known::Failure(Failure::new::<DB>(source)),
            _ => Known::NoConnection,
        });
        pause = FIRST_ANSWER;
    }
}

async fn begin<DB: LockDatabase>(
    attempt: &Attempt<'_, DB>,
    connection: PoolConnection<DB>,
    runtime: &Runtime,
) -> Result<OwnTransaction<DB, Arc<Turn>>, NotBegun> {
    let begun = runtime.spawn(OwnTransaction::begin(connection, DB::BEGIN_WITH_ROW, runtime.clone()));
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

/// For callers of this process that wait behind it.
fn held_here<DB: LockDatabase>(attempt: &Attempt<'_, DB>, fencing_token: i64) -> LockInfo {
    let now = Utc::now();
    LockInfo {
        name: attempt.name.given(),
        kind: Kind::Row,
        owner: attempt.locks.owner().to_string(),
        fencing_token,
        created_at: now,
        acquired_at: now,
        held_until: None,
        finished_at: None,
        is_here: true,
    }
}
