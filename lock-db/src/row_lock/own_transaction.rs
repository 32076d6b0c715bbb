//! Takes row locks in a transaction of their own, on a connection of the application's pool.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use chrono::Utc;
use tokio::select;
use tokio::sync::oneshot;
use tracing::Instrument;

use super::locked_rows::LockedRows;
use super::taking::{Taken, Taking};
use crate::clock::{sleep_until, timeout, timeout_at};
use crate::context::Context;
use crate::database::{Failure, LockDatabase};
use crate::error::{Action, WaitingFor};
use crate::in_transaction::Attempt;
use crate::keyed_queue::Known;
use crate::name::Name;
use crate::options::{FIRST_ANSWER, LONGEST_TRY, Wait, check_prune_after};
use crate::runtime::{self, Runtime};
use crate::{Error, Kind, LockInfo};

/// How long a caller whose wait is over still waits for the task when the database seems to be
/// silent.
const LAST_WORD: Duration = Duration::from_millis(250);

const ACTION: Action = Action::TakeRowLock;

/// A request for one or more row locks. The caller and the task that works for it share it.
pub(super) struct TransactionRequest<DB: LockDatabase> {
    pub(super) context: Arc<Context<DB>>,
    /// Checked, each one once, in the order in which they are locked.
    pub(super) names: Vec<Name>,
    pub(super) wait: Wait,
    pub(super) started: Instant,
    /// The index of the name that the task is waiting for.
    current: AtomicUsize,
}

/// Where the task sends the locked rows. It is closed when the caller is gone.
pub(super) type RowsSender<DB> = oneshot::Sender<Result<Option<LockedRows<DB>>, Error>>;

impl<DB: LockDatabase> TransactionRequest<DB> {
    pub(super) fn new(context: Arc<Context<DB>>, names: Vec<Name>, wait: Wait) -> Self {
        Self { context, names, wait, started: Instant::now(), current: AtomicUsize::new(0) }
    }

    /// Takes the locks in a task, so that a caller that goes away does not interrupt a statement.
    /// `None`: a try, and one of them was not free.
    pub(super) async fn take(self) -> Result<Option<LockedRows<DB>>, Error> {
        self.context.settings().warn_after.check()?;
        check_prune_after(self.context.settings().prune_after)?;
        let _waits = self.context.session().vitals().wait();
        let runtime = Runtime::current()?;
        let request = Arc::new(self);
        let (mut answer, mut answered) = oneshot::channel();
        let (for_task, on) = (Arc::clone(&request), runtime.clone());
        let task = async move {
            let (rows, taken) = match Taking::new(&for_task, &mut answer, &on).take().await {
                Ok(Some(Taken { rows, permits, fencing_tokens })) => {
                    (Ok(Some(rows)), Some((permits, fencing_tokens)))
                }
                Ok(None) => (Ok(None), None),
                Err(error) => (Err(error), None),
            };
            // Rows that come too late are dropped, which rolls back. They hold nothing for the
            // requests behind.
            if answer.send(rows).is_ok()
                && let Some((permits, fencing_tokens)) = taken
            {
                let names = permits.iter().zip(&for_task.names).zip(fencing_tokens);
                for ((permit, name), fencing_token) in names {
                    permit.learn(for_task.held_here(name, fencing_token));
                }
            }
        };
        runtime.spawn(task.in_current_span());
        let error = select! {
            biased;
            answer = &mut answered => {
                let rows = answer.unwrap_or_else(|_| Err(runtime::ended(ACTION, request.current().name)));
                return Ok(rows?.map(|rows| rows.into_hands_of_caller(&request.context)));
            }
            error = request.over() => error,
        };
        // What the task has learned since then counts more.
        if !error.is_silence() {
            return Err(error);
        }
        let rows = timeout(LAST_WORD, answered).await.ok().and_then(Result::ok).unwrap_or(Err(error));
        Ok(rows?.map(|rows| rows.into_hands_of_caller(&request.context)))
    }

    pub(super) fn attempt<'a>(&'a self, name: &'a Name) -> Attempt<'a, DB> {
        let Self { context, wait, started, .. } = self;
        Attempt { context, name, kind: Kind::Row, wait: *wait, started: *started }
    }

    /// The attempt for the name that the task is waiting for.
    pub(super) fn current(&self) -> Attempt<'_, DB> {
        // There is at least one name, and the index is always that of a name.
        self.attempt(&self.names[self.current.load(Ordering::Relaxed)])
    }

    /// From now on the task waits for the name with this index.
    pub(super) fn turn_to(&self, index: usize) {
        self.current.store(index, Ordering::Relaxed);
    }

    /// What is left of the wait; `None` for a try.
    pub(super) fn left(&self) -> Option<Duration> {
        self.current().left()
    }

    /// How long a single step may take.
    pub(super) fn step_limit(&self) -> Duration {
        self.left().map_or(LONGEST_TRY, |left| left.max(FIRST_ANSWER))
    }

    /// Waits in a queue of this process as long as the caller does. `None`: the caller is gone.
    pub(super) async fn in_time<T>(
        &self,
        answer: &mut RowsSender<DB>,
        queue: impl Future<Output = T>,
    ) -> Result<Option<T>, Error> {
        select! {
            biased;
            () = answer.closed() => Ok(None),
            entered = queue => Ok(Some(entered)),
            error = self.over() => Err(error),
        }
    }

    /// Resolves when the wait is over, even if the database does not answer at all, but not before
    /// it had time for one answer. The error follows from what is known of the lock in this
    /// process.
    async fn over(&self) -> Error {
        sleep_until(self.started + self.wait.limit().unwrap_or(LONGEST_TRY)).await;
        self.give_up().await
    }

    /// The error of a request whose wait is over.
    pub(super) async fn give_up(&self) -> Error {
        let attempt = self.current();
        let in_the_way = |known: &Known| match known {
            Known::Queued => Some(attempt.timed_out(WaitingFor::Lock, None)),
            Known::Held(held_by) => Some(attempt.timed_out(WaitingFor::Lock, held_by.clone())),
            Known::NoConnection => Some(attempt.timed_out(WaitingFor::Connection, None)),
            Known::Failure(failure) => {
                Some(failure.clone().into_error(ACTION, Some(attempt.name)).within(self.wait.limit()))
            }
            Known::Nothing => None,
        };
        let told = self.context.row_waiters().queue.wait_until_known(attempt.name, in_the_way);
        timeout_at(self.started + FIRST_ANSWER, told).await.unwrap_or_else(|_elapsed| {
            Failure::no_answer::<DB>(self.started.elapsed()).into_error(ACTION, Some(attempt.name))
        })
    }

    /// The holder, for callers of this process that wait behind it.
    pub(super) fn held_here(&self, name: &Name, fencing_token: i64) -> Known {
        let now = Utc::now();
        Known::Held(Some(Box::new(LockInfo {
            name: name.given(),
            kind: Kind::Row,
            owner: self.context.owner().to_string(),
            fencing_token,
            created_at: now,
            acquired_at: now,
            held_until: None,
            expires_in: None,
            held_for: None,
            finished_at: None,
            holders: Vec::new(),
            waiting: Vec::new(),
            row_holder: None,
            is_here: true,
        })))
    }
}
