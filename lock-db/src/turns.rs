//! The queue of a process before a name: first come, first served, and only the first one asks the database.
//!
//! A turn is kept as long as what was taken with it, so that the next caller of the same process neither polls for a lock
//! that its own neighbour holds nor keeps a connection busy with waiting for it.

use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::select;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::LockInfo;
use crate::error::Failure;
use crate::long_hold::LongHold;
use crate::name::Name;
use crate::sync::{HashMap, Mutex, MutexGuard};

#[derive(Debug, Default)]
pub(crate) struct Turns {
    names: Mutex<HashMap<Name, Entry>>,
    /// Some caller has learned something.
    learned: Notify,
}

/// Of a name. It goes with the last turn and the last waiter.
#[derive(Debug)]
struct Entry {
    /// With one permit.
    queue: Weak<Semaphore>,
    known: Known,
    /// By a caller of this process.
    held: Option<LongHold>,
}

/// What the caller that has the turn for a name knows of the lock. Those behind it know no more: that the lock is held is said only of
/// what was seen to be held.
#[derive(Debug, Default)]
pub(crate) enum Known {
    /// Nothing yet.
    #[default]
    Nothing,
    /// The pool has no connection to spare.
    NoConnection,
    /// The database was not to be had the last time.
    Failure(Failure),
    /// Another transaction has it: of this process, if it is told which.
    Held(Option<Box<LockInfo>>),
}

impl Turns {
    /// Waits for the turn. Dropping the future leaves the queue.
    pub(crate) async fn enter(self: &Arc<Self>, name: &Name) -> Turn {
        let queue = self.queue(name);
        // Made before the wait, so that it also tidies up behind a waiter that leaves.
        let mut turn = self.turn(name, &queue);
        // The semaphore is never closed, so this only says that there is no permit to give back.
        turn.permit = queue.acquire_owned().await.ok();
        turn
    }

    /// Waits for the turn until it is known that the lock is held: `None`.
    pub(crate) async fn enter_unless_held(self: &Arc<Self>, name: &Name) -> Option<Turn> {
        select! {
            biased;
            turn = self.enter(name) => Some(turn),
            () = self.learns(name, |known| matches!(known, Known::Held(_)).then_some(())) => None,
        }
    }

    /// Waits until something is known of a lock whose turn is taken.
    pub(crate) async fn learns<T>(&self, name: &Name, read: impl Fn(&Known) -> Option<T>) -> T {
        loop {
            let learned = self.learned.notified();
            let known = read(self.names().get(name).map_or(&Known::Nothing, |entry| &entry.known));
            if let Some(known) = known {
                return known;
            }
            learned.await;
        }
    }

    /// The holder of the lock, if it is in this process and has it in a transaction of its own.
    pub(crate) fn holder(&self, name: &Name) -> Option<Box<LockInfo>> {
        match &self.names().get(name)?.known {
            Known::Held(holder) => holder.clone(),
            _ => None,
        }
    }

    /// Tells of those that callers of this process have held for long.
    pub(crate) fn held_long(
        &self,
        after: Duration,
        now: Instant,
        next: &mut Option<Instant>,
        mut tell: impl FnMut(&LockInfo, Instant),
    ) {
        for Entry { known, held, .. } in self.names().values_mut() {
            if let (Known::Held(Some(info)), Some(held)) = (known, held)
                && held.is_due(after, now, next)
            {
                tell(info, held.since);
            }
        }
    }

    /// The turn, if no other caller has it or waits for it.
    pub(crate) fn try_enter(self: &Arc<Self>, name: &Name) -> Option<Turn> {
        let queue = self.queue(name);
        let mut turn = self.turn(name, &queue);
        turn.permit = Some(queue.try_acquire_owned().ok()?);
        Some(turn)
    }

    fn turn(self: &Arc<Self>, name: &Name, queue: &Arc<Semaphore>) -> Turn {
        Turn { permit: None, queue: Some(Arc::clone(queue)), name: name.clone(), turns: Arc::clone(self) }
    }

    fn queue(&self, name: &Name) -> Arc<Semaphore> {
        let mut names = self.names();
        if let Some(queue) = names.get(name).and_then(|entry| entry.queue.upgrade()) {
            return queue;
        }
        let queue = Arc::new(Semaphore::new(1));
        let entry = Entry { queue: Arc::downgrade(&queue), known: Known::Nothing, held: None };
        names.insert(name.clone(), entry);
        queue
    }

    fn names(&self) -> MutexGuard<'_, HashMap<Name, Entry>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to ask the database for a name. Dropping it lets the next waiter of this process ask.
#[derive(Debug)]
pub(crate) struct Turn {
    permit: Option<OwnedSemaphorePermit>,
    queue: Option<Arc<Semaphore>>,
    name: Name,
    turns: Arc<Turns>,
}

impl Turn {
    /// What the database, or the pool before it, has told.
    pub(crate) fn learn(&self, known: Known) {
        self.set(known);
        self.turns.learned.notify_waiters();
    }

    fn set(&self, known: Known) {
        let mut names = self.turns.names();
        let before = names.get_mut(&self.name).map(|entry| {
            entry.held = matches!(known, Known::Held(Some(_))).then(|| LongHold::new(Instant::now()));
            std::mem::replace(&mut entry.known, known)
        });
        drop(names);
        drop(before);
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(permit) = self.permit.take() {
            self.set(Known::Nothing);
            drop(permit);
        }
        // With the map locked, so that no caller finds the queue between its last user and its end.
        let mut names = self.turns.names();
        drop(self.queue.take());
        if names.get(&self.name).is_some_and(|entry| entry.queue.strong_count() == 0) {
            names.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn first_come_first_served() {
        let turns = Arc::new(Turns::default());
        let name: Name = "a".into();
        let held = turns.try_enter(&name).unwrap();
        assert!(turns.try_enter(&name).is_none());
        assert!(turns.try_enter(&"b".into()).is_some());

        let (mut second, mut third) = (pin!(turns.enter(&name)), pin!(turns.enter(&name)));
        assert!(poll(second.as_mut()).is_pending());
        assert!(poll(third.as_mut()).is_pending());
        drop(held);
        assert!(poll(third.as_mut()).is_pending());
        assert!(turns.try_enter(&name).is_none());
        let Poll::Ready(turn) = poll(second.as_mut()) else { panic!("it was second's turn") };
        drop(turn);
        assert!(poll(third.as_mut()).is_ready());
    }

    #[test]
    fn a_name_that_nobody_uses_is_forgotten() {
        let turns = Arc::new(Turns::default());
        for number in 0..1000 {
            drop(turns.try_enter(&format!("name {number}").as_str().into()));
        }
        let name: Name = "left".into();
        let held = turns.try_enter(&name);
        {
            let mut waiter = pin!(turns.enter(&name));
            assert!(poll(waiter.as_mut()).is_pending());
            drop(held);
        }
        assert!(turns.names().is_empty());
    }
}

#[cfg(all(test, lock_db_shuttle))]
mod interleavings;
