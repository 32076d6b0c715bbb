//! The task that takes row locks: local permits, a connection, a transaction, and the rows.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::SemaphorePermit;

use super::begin::{self, NotBegun};
use super::locked_rows::{LockedRows, Permits};
use super::own_transaction::{RowsSender, TransactionRequest};
use crate::Error;
use crate::clock::{sleep, timeout};
use crate::database::{Failure, LockDatabase};
use crate::error::Action;
use crate::in_transaction::Locked;
use crate::jitter::jitter;
use crate::keyed_queue::{Known, RowPermit};
use crate::managed_tx::{Condition, ManagedTransaction};
use crate::name::Name;
use crate::runtime::Runtime;

/// The pause between two reads of a lock for which too many requests already wait in the database.
const LOOK_AGAIN: Duration = Duration::from_millis(100);
/// The pause before a new beginning after a broken connection or a deadlock.
const PAUSE: Duration = Duration::from_millis(20);

/// The work of the task. It begins a transaction and locks the rows in it. It begins again on
/// another connection when one turns out to be broken.
///
/// Requests that wait take as few connections as possible from the rest of the application, which
/// has to finish first. Of the callers for one name, only the first has a connection, and none has
/// one while a caller of this process holds the lock. Of the requests that wait for other
/// processes, at most half of the pool may wait in the database's queue. The others try again at
/// intervals.
pub(super) struct Taking<'a, DB: LockDatabase> {
    request: &'a TransactionRequest<DB>,
    answer: &'a mut RowsSender<DB>,
    runtime: &'a Runtime,
    /// Present while this request may wait in the database's queue.
    may_wait: Option<SemaphorePermit<'a>>,
    /// How often a new beginning followed a failure, and how often a dead connection.
    broken: u32,
    dead: u32,
}

/// Row locks that were taken.
pub(super) struct Taken<DB: LockDatabase> {
    pub(super) rows: LockedRows<DB>,
    pub(super) permits: Permits,
    /// One for each permit.
    pub(super) fencing_tokens: Vec<i64>,
}

/// Why one attempt has no locks.
enum Failed {
    NotBegun(NotBegun),
    /// Locking a row has failed.
    NotLocked(Error),
    /// Not to be tried again.
    Final(Error),
}

impl<'a, DB: LockDatabase> Taking<'a, DB> {
    pub(super) fn new(
        request: &'a TransactionRequest<DB>,
        answer: &'a mut RowsSender<DB>,
        runtime: &'a Runtime,
    ) -> Self {
        Self { request, answer, runtime, may_wait: None, broken: 0, dead: 0 }
    }

    /// `None`: this is a try and one of the locks is held, or the caller is gone.
    pub(super) async fn take(mut self) -> Result<Option<Taken<DB>>, Error> {
        // Also finds out whether locks are possible at all, before waiting for a connection of the
        // pool.
        self.request.current().locate().await?;
        let Some(permits) = self.enter_queues().await? else { return Ok(None) };
        loop {
            match self.attempt(&permits).await {
                Ok(Some(taken)) => return Ok(Some(taken)),
                Ok(None) if !self.wait_for_place().await? => return Ok(None),
                Ok(None) => {}
                Err(failed) => self.recover(failed, &permits).await?,
            }
        }
    }

    /// Enters the local queue of each name, in the order of all requests. `None` as for
    /// [`take`](Self::take).
    async fn enter_queues(&mut self) -> Result<Option<Permits>, Error> {
        let mut permits = Vec::with_capacity(self.request.names.len());
        for (index, name) in self.request.names.iter().enumerate() {
            self.request.turn_to(index);
            match self.enter_queue(name).await? {
                Some(permit) => {
                    self.is_queued(&permit);
                    permits.push(permit);
                }
                None => return Ok(None),
            }
        }
        self.request.turn_to(0);
        Ok(Some(Arc::new(permits)))
    }

    /// Tells the callers behind that this request is ahead of them, and waits for another lock.
    fn is_queued(&self, permit: &RowPermit) {
        if self.request.names.len() > 1 {
            permit.learn(Known::Queued);
        }
    }

    async fn enter_queue(&mut self, name: &Name) -> Result<Option<RowPermit>, Error> {
        let queue = &self.request.context.row_waiters().queue;
        if let Some(permit) = queue.try_enter(name) {
            return Ok(Some(permit));
        }
        if self.request.wait.is_try() {
            let entered = self.request.in_time(self.answer, queue.enter_unless_held(name)).await?;
            return Ok(entered.flatten());
        }
        self.request.in_time(self.answer, queue.enter(name)).await
    }

    /// `None`: one of the locks is not free, or the caller is gone.
    async fn attempt(&mut self, permits: &Permits) -> Result<Option<Taken<DB>>, Failed> {
        self.request.turn_to(0);
        let prepared = self.request.in_time(self.answer, prepare_rows(self.request)).await;
        match prepared.map_err(Failed::Final)? {
            Some(prepared) => prepared.map_err(Failed::NotLocked)?,
            None => return Ok(None),
        }
        let connection = begin::connect(self.request, permits, self.answer).await;
        let Some(connection) = connection.map_err(Failed::NotBegun)? else { return Ok(None) };
        let begun = begin::begin(self.request, connection, self.runtime).await;
        let mut transaction = begun.map_err(Failed::NotBegun)?.keep(Arc::clone(permits));
        let locked = match self.lock(&mut transaction, permits).await {
            Ok(Some(locked)) => return self.taken(transaction, permits, locked).map(Some),
            Ok(None) => Ok(None),
            Err(error) => Err(Failed::NotLocked(error)),
        };
        if let Err(error) = transaction.roll_back().await {
            tracing::debug!(error = %Failure::new::<DB>(error), "rolling back");
        }
        // None of them is locked any more.
        permits.iter().for_each(|permit| self.is_queued(permit));
        locked
    }

    /// Locks all rows in the transaction. `None` as for [`attempt`](Self::attempt).
    async fn lock(
        &mut self,
        transaction: &mut DB::Connection,
        permits: &Permits,
    ) -> Result<Option<Vec<Locked>>, Error> {
        let request = self.request;
        // All rows are found before the first is locked. A locked row would block other requests
        // that create the remaining rows.
        let mut found = Vec::with_capacity(permits.len());
        for (index, (name, permit)) in request.names.iter().zip(permits.iter()).enumerate() {
            request.turn_to(index);
            let may_wait = |in_the_way: Option<&Failure>| self.may_wait(permit, in_the_way);
            match request.attempt(name).find_in_own(transaction, may_wait).await? {
                Some(row) => {
                    self.is_queued(permit);
                    found.push(row);
                }
                None => return Ok(None),
            }
        }
        let mut locked = Vec::with_capacity(found.len());
        for (index, row) in found.into_iter().enumerate() {
            let (name, permit) = (&request.names[index], &permits[index]);
            request.turn_to(index);
            let may_wait = |in_the_way: Option<&Failure>| self.may_wait(permit, in_the_way);
            let Some(row) = request.attempt(name).lock_in_own(transaction, row, index == 0, may_wait).await?
            else {
                return Ok(None);
            };
            if index + 1 < request.names.len() {
                permit.learn(request.held_here(name, row.fencing_token));
            }
            locked.push(row);
        }
        Ok(Some(locked))
    }

    /// Tells the callers behind what is in the way: a failure, or else a holder. Returns whether
    /// this request may wait in the database.
    fn may_wait(&mut self, permit: &RowPermit, in_the_way: Option<&Failure>) -> bool {
        permit.learn(in_the_way.map_or(Known::Held(None), |failure| Known::Failure(failure.clone())));
        let waiters = &self.request.context.row_waiters().waiters;
        self.may_wait = self.may_wait.take().or_else(|| waiters.try_acquire().ok());
        self.may_wait.is_some() && !self.answer.is_closed()
    }

    fn taken(
        &self,
        transaction: ManagedTransaction<DB, Permits>,
        permits: &Permits,
        locked: Vec<Locked>,
    ) -> Result<Taken<DB>, Failed> {
        let TransactionRequest { context, names, .. } = self.request;
        let server = context.location().found().ok_or(Failed::Final(Error::Closed))?;
        let fencing_tokens: Vec<_> = locked.iter().map(|row| row.fencing_token).collect();
        // The first time: the transaction has only just begun.
        let counts = context.hold_counts();
        let counted = locked.into_iter().map(|row| counts.enter_own(row.secret, &row.before)).collect();
        // The transaction has all of the rows as long as it has the first one.
        let condition = Condition::Row { name: names[0].clone(), fencing_token: fencing_tokens[0], server };
        let rows = LockedRows::new(transaction, condition, names.clone(), counted);
        Ok(Taken { rows, permits: Arc::clone(permits), fencing_tokens })
    }

    /// After an attempt that found a lock not to be free. Returns whether to try again.
    async fn wait_for_place(&mut self) -> Result<bool, Error> {
        if self.request.wait.is_try() || self.answer.is_closed() || self.may_wait.is_some() {
            return Ok(false);
        }
        // Too many requests already wait in the database.
        let waiters = &self.request.context.row_waiters().waiters;
        let place = timeout(jitter(LOOK_AGAIN), waiters.acquire());
        let place = self.request.in_time(self.answer, place).await?;
        self.may_wait = place.and_then(Result::ok).and_then(Result::ok);
        Ok(true)
    }

    /// After a failed attempt. `Ok`: try again.
    async fn recover(&mut self, failed: Failed, permits: &Permits) -> Result<(), Error> {
        let error = match failed {
            // Closed while it was idle, or by the end of the runtime that opened it. The same may
            // be true of all others in the pool.
            Failed::NotBegun(NotBegun::Dead(_))
                if self.may_be_another_dead() && self.request.left().is_none_or(|left| !left.is_zero()) =>
            {
                self.dead += 1;
                return Ok(());
            }
            Failed::NotBegun(NotBegun::Failure(failure) | NotBegun::Dead(failure)) => {
                let name = self.request.current().name;
                let failure = failure.written_by_others(name, false);
                permits.iter().for_each(|permit| permit.learn(Known::Failure(failure.clone())));
                failure.into_error(Action::BeginTransaction, Some(name))
            }
            Failed::NotBegun(NotBegun::Error(error)) | Failed::Final(error) => return Err(error),
            Failed::NotLocked(error) => error,
        };
        // A connection whose runtime has ended may still return a quick answer, such as that to
        // BEGIN.
        let failure = Failure::of_error::<DB>(&error);
        let is_dead = failure.as_ref().is_some_and(Failure::is_of_ended_runtime);
        if is_dead && !self.answer.is_closed() && self.may_be_another_dead() {
            self.dead += 1;
            return Ok(());
        }
        // Nothing was handed out and nothing else was done in the transaction, so a new beginning
        // is safe.
        let again = match &error {
            Error::Serialization { .. } | Error::Deadlock { .. } => true,
            error => error.passes(),
        };
        self.broken += 1;
        let limit = self.request.wait.limit();
        let in_time = limit.is_some_and(|wait| self.request.started.elapsed() < wait);
        let is_last = !in_time && (self.broken > 1 || error.is_silence());
        if !again || self.answer.is_closed() || is_last {
            return Err(if in_time { error } else { error.within(limit) });
        }
        if let Some(failure) = failure {
            permits.iter().for_each(|permit| permit.learn(Known::Failure(failure.clone())));
        }
        sleep(PAUSE).await;
        Ok(())
    }

    /// Every connection of the pool may be dead.
    fn may_be_another_dead(&self) -> bool {
        self.dead <= self.request.context.pool().options().get_max_connections()
    }
}

/// Finds or makes the rows of all names at once, where that needs no transaction. The session does so
/// in one message.
async fn prepare_rows<DB: LockDatabase>(request: &TransactionRequest<DB>) -> Result<(), Error> {
    let prepare = |name| async move { request.attempt(name).prepare_row().await };
    let mut rows: Vec<_> = request.names.iter().map(|name| Box::pin(prepare(name))).collect();
    poll_fn(|context| {
        let mut position = 0;
        while let Some(row) = rows.get_mut(position) {
            match row.as_mut().poll(context) {
                Poll::Ready(Ok(())) => drop(rows.swap_remove(position)),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => position += 1,
            }
        }
        if rows.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending }
    })
    .await
}
