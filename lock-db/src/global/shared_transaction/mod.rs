//! The transaction of a row lock, and the annotated functions that share it.
//!
//! It ends when the last of them has ended. It is committed only if all of them returned `Ok`. An
//! error, a panic or a dropped future of one of them dooms it, in whatever order they end.
//!
//! The outermost call, which took the lock, waits for that end and reports it. A call inside does
//! not wait for the others, because they may wait for it. So its result is not final, unless it
//! ends last.

use std::any::Any;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{oneshot, watch};

use super::BoxFuture;
use super::body_polls::{self, BodyPoll};
use crate::database::LockDatabase;
use crate::error::{Loss, NoReentry};
use crate::reentrancy::{Entered, Held, Inside};
use crate::row_lock::RowGuard;
use crate::runtime::Runtime;
use crate::{Error, Kind};

/// What has become of the transaction. `Ok`: it was committed.
type Outcome = Result<(), Error>;

/// The transaction of a row lock that only annotated functions know of. It ends when the last
/// handle is dropped.
pub(crate) struct SharedTransaction {
    name: String,
    fencing_token: i64,
    /// The mutex is never waited for: it makes a guard shareable that is not, as SQLite's
    /// connections are not. Empty as long as a body works with the guard.
    guard: Mutex<Option<Box<dyn AnyRowGuard>>>,
    is_doomed: AtomicBool,
    /// How many calls inside were last polled within the body of the outermost one.
    in_body: AtomicUsize,
    /// To the outermost call. Closed when that call is dropped, also while it waits.
    to_outermost: Option<oneshot::Sender<Outcome>>,
    /// To the call inside that ended last.
    to_last: Option<oneshot::Sender<Outcome>>,
    runtime: Runtime,
}

impl SharedTransaction {
    /// The transaction, and what tells the outermost call about its end.
    pub(super) fn new<DB: LockDatabase>(
        guard: RowGuard<DB>,
        runtime: Runtime,
    ) -> (Self, oneshot::Receiver<Outcome>) {
        let (name, fencing_token) = (guard.name().to_owned(), guard.fencing_token());
        Self::with_guard(Box::new(guard), name, fencing_token, runtime)
    }

    fn with_guard(
        guard: Box<dyn AnyRowGuard>,
        name: String,
        fencing_token: i64,
        runtime: Runtime,
    ) -> (Self, oneshot::Receiver<Outcome>) {
        let (to_outermost, outcome) = oneshot::channel();
        let shared = Self {
            name,
            fencing_token,
            guard: Mutex::new(Some(guard)),
            is_doomed: AtomicBool::new(false),
            in_body: AtomicUsize::new(0),
            to_outermost: Some(to_outermost),
            to_last: None,
            runtime,
        };
        (shared, outcome)
    }

    fn doom(&self) {
        self.is_doomed.store(true, Ordering::SeqCst);
    }

    fn is_doomed(&self) -> bool {
        self.is_doomed.load(Ordering::SeqCst)
            || self.to_outermost.as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    fn rolled_back(&self) -> Error {
        Error::RolledBack { name: self.name.clone() }
    }

    fn slot(&self) -> MutexGuard<'_, Option<Box<dyn AnyRowGuard>>> {
        self.guard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends it as the last handle, and waits for what becomes of it.
    async fn end(mut self) -> Outcome {
        let (to_last, outcome) = oneshot::channel();
        let untold = Untold::of(&self);
        self.to_last = Some(to_last);
        drop(self);
        outcome.await.unwrap_or_else(|_| Err(untold.error()))
    }
}

/// Ends the transaction in a task: a drop must not wait, and the outermost call needs the outcome
/// even if the last call is dropped before it is there.
impl Drop for SharedTransaction {
    fn drop(&mut self) {
        let is_doomed = self.is_doomed();
        let guard = self.slot().take();
        let name = std::mem::take(&mut self.name);
        let (to_outermost, to_last) = (self.to_outermost.take(), self.to_last.take());
        drop(self.runtime.spawn(async move {
            let outcome = end(guard, is_doomed, name).await;
            // A receiver may have been dropped meanwhile.
            if let Some(to_last) = to_last {
                let _gone = to_last.send(outcome.clone());
            }
            if let Some(to_outermost) = to_outermost {
                let _gone = to_outermost.send(outcome);
            }
        }));
    }
}

async fn end(guard: Option<Box<dyn AnyRowGuard>>, is_doomed: bool, name: String) -> Outcome {
    let Some(guard) = guard else {
        // A body has replaced the guard by another one, so its transaction may have ended in any
        // way.
        return Err(Error::lost(name, Loss::TransactionEnded));
    };
    if !is_doomed {
        return guard.commit().await;
    }
    if let Err(error) = guard.rollback().await {
        // The connection broke, which rolls back as well.
        tracing::debug!(error = %error.report(), "rolling back");
    }
    Err(Error::RolledBack { name })
}

/// The error for a transaction whose outcome never arrives, because its runtime was shut down.
struct Untold {
    name: String,
    is_doomed: bool,
}

impl Untold {
    fn of(shared: &SharedTransaction) -> Self {
        Self { name: shared.name.clone(), is_doomed: shared.is_doomed() }
    }

    fn error(self) -> Error {
        if self.is_doomed {
            return Error::RolledBack { name: self.name };
        }
        Error::commit_unknown(self.name, "the runtime was shut down")
    }
}

impl Held for SharedTransaction {
    const KIND: Kind = Kind::Row;

    /// Always succeeds: a lost transaction shows when it is committed.
    fn check(&self) -> Result<(), Error> {
        Ok(())
    }

    fn loss(&self) -> Option<watch::Receiver<Option<Loss>>> {
        None
    }
}

/// A call of an annotated function that is inside of a row lock.
///
/// Dropping it dooms the transaction: the future of the call was dropped, or its body panicked.
pub(crate) struct RowCall {
    /// Declared before `inside`: the next sibling may enter only after this handle is gone. `None`
    /// after the end.
    shared: Option<Arc<SharedTransaction>>,
    role: Role,
    inside: Inside,
}

enum Role {
    /// The call that took the lock. It receives the outcome.
    Outermost(oneshot::Receiver<Outcome>),
    /// A call that entered the lock again.
    Inner {
        /// Whether it was last polled within the body of the outermost call.
        in_body: AtomicBool,
    },
}

impl RowCall {
    pub(super) fn outermost(
        entered: Entered<SharedTransaction>,
        outcome: oneshot::Receiver<Outcome>,
    ) -> Self {
        Self::new(entered, Role::Outermost(outcome))
    }

    pub(super) fn inner(entered: Entered<SharedTransaction>) -> Self {
        Self::new(entered, Role::Inner { in_body: AtomicBool::new(false) })
    }

    fn new(Entered { held, inside }: Entered<SharedTransaction>, role: Role) -> Self {
        Self { shared: Some(held), role, inside }
    }

    pub(crate) fn inside(&self) -> &Inside {
        &self.inside
    }

    /// Polls the body, from which others may enter.
    pub(crate) fn poll_in<R>(&self, poll: impl FnOnce() -> R) -> R {
        let _poll = self.begin_poll();
        self.inside.enter(poll)
    }

    fn begin_poll(&self) -> Option<BodyPoll> {
        let shared = self.shared.as_ref()?;
        let holder = Arc::as_ptr(shared).addr();
        match &self.role {
            Role::Outermost(_) => Some(BodyPoll::begin(holder)),
            Role::Inner { in_body } => {
                let is_in_body = body_polls::is_polled(holder);
                if in_body.swap(is_in_body, Ordering::SeqCst) != is_in_body {
                    if is_in_body {
                        shared.in_body.fetch_add(1, Ordering::SeqCst);
                    } else {
                        shared.in_body.fetch_sub(1, Ordering::SeqCst);
                    }
                }
                None
            }
        }
    }

    /// Ends the call after its body. `stands`: the function returned `Ok`.
    ///
    /// `Ok` of the outermost call and of the last one means that the transaction was committed.
    /// `Ok` of another call means that no call has failed so far.
    ///
    /// # Errors
    ///
    /// [`Error::RolledBack`] when the transaction was rolled back, or will be. Otherwise as
    /// [`RowGuard::commit`].
    pub(crate) async fn end(mut self, stands: bool) -> Outcome {
        let Some(shared) = self.take_handle() else { return Ok(()) };
        if !stands {
            shared.doom();
        }
        let Role::Outermost(outcome) = &mut self.role else {
            let so_far = if shared.is_doomed() { Err(shared.rolled_back()) } else { Ok(()) };
            return match Arc::into_inner(shared) {
                Some(last) => last.end().await,
                None => so_far,
            };
        };
        // The body has begun a call inside of it and handed the future out, in its return value for
        // example. Such a future may be polled only after this call has returned, so waiting for it
        // could deadlock.
        let left_unfinished = shared.in_body.load(Ordering::SeqCst) > 0;
        if left_unfinished {
            shared.doom();
        }
        let (untold, rolled_back) = (Untold::of(&shared), shared.rolled_back());
        let was_last = Arc::into_inner(shared).is_some();
        if left_unfinished && !was_last {
            return Err(rolled_back);
        }
        outcome.await.unwrap_or_else(|_| Err(untold.error()))
    }

    /// Ends a call whose body did not run, so that it says nothing about the transaction.
    pub(crate) fn withdraw(mut self) {
        drop(self.take_handle());
    }

    fn take_handle(&mut self) -> Option<Arc<SharedTransaction>> {
        let shared = self.shared.take()?;
        if let Role::Inner { in_body } = &self.role
            && in_body.swap(false, Ordering::SeqCst)
        {
            shared.in_body.fetch_sub(1, Ordering::SeqCst);
        }
        Some(shared)
    }

    /// Takes the guard, for the body.
    ///
    /// # Errors
    ///
    /// [`Error::Reentry`] when another body works with it.
    pub(crate) fn take_guard<DB: LockDatabase>(&self) -> Result<RowGuard<DB>, Error> {
        let name = || self.shared.as_ref().map(|shared| shared.name.clone()).unwrap_or_default();
        let in_use = || Error::Reentry { name: name(), reason: NoReentry::GuardInUse };
        let guard = self.shared.as_ref().and_then(|shared| shared.slot().take()).ok_or_else(in_use)?;
        // A scope belongs to one `Locks`, and so to one database.
        let gone = |_| Error::lost(name(), Loss::TransactionEnded);
        guard.into_any().downcast::<RowGuard<DB>>().map(|guard| *guard).map_err(gone)
    }

    /// Takes the guard back from the body. Through its `&mut RowGuard` the body can have replaced
    /// the guard by another one. That one is dropped, which rolls it back.
    pub(crate) fn put_guard_back<DB: LockDatabase>(&self, guard: RowGuard<DB>) {
        if let Some(shared) = &self.shared
            && (guard.name(), guard.fencing_token()) == (&*shared.name, shared.fencing_token)
        {
            *shared.slot() = Some(Box::new(guard));
        }
    }
}

impl Drop for RowCall {
    fn drop(&mut self) {
        if let Some(shared) = self.take_handle() {
            shared.doom();
        }
    }
}

/// The guard of a row lock in any database.
pub(crate) trait AnyRowGuard: Send {
    fn commit(self: Box<Self>) -> BoxFuture<'static, Result<(), Error>>;

    fn rollback(self: Box<Self>) -> BoxFuture<'static, Result<(), Error>>;

    fn into_any(self: Box<Self>) -> Box<dyn Any>;
}

impl<DB: LockDatabase> AnyRowGuard for RowGuard<DB> {
    fn commit(self: Box<Self>) -> BoxFuture<'static, Result<(), Error>> {
        Box::pin((*self).commit())
    }

    fn rollback(self: Box<Self>) -> BoxFuture<'static, Result<(), Error>> {
        Box::pin((*self).rollback())
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests;
