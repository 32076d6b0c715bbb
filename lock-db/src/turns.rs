//! The queue of a process before a name: first come, first served, and only the first one asks the database.
//!
//! A turn is kept as long as what was taken with it, so that the next caller of the same process neither polls for a lock
//! that its own neighbour holds nor keeps a connection busy with waiting for it.

use std::sync::{Arc, PoisonError, Weak};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::name::Name;
use crate::sync::{HashMap, Mutex, MutexGuard};

#[derive(Debug, Default)]
pub(crate) struct Turns {
    /// One permit a name. An entry goes with the last turn and the last waiter.
    names: Mutex<HashMap<Name, Weak<Semaphore>>>,
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

    /// The turn, if nobody has it and nobody waits for it.
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
        if let Some(queue) = names.get(name).and_then(Weak::upgrade) {
            return queue;
        }
        let queue = Arc::new(Semaphore::new(1));
        names.insert(name.clone(), Arc::downgrade(&queue));
        queue
    }

    fn names(&self) -> MutexGuard<'_, HashMap<Name, Weak<Semaphore>>> {
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

impl Drop for Turn {
    fn drop(&mut self) {
        drop(self.permit.take());
        // With the map locked, so that nobody finds the queue between its last user and its end.
        let mut names = self.turns.names();
        drop(self.queue.take());
        if names.get(&self.name).is_some_and(|queue| queue.strong_count() == 0) {
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
            drop(turns.try_enter(&format!("name {number}").into()));
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
