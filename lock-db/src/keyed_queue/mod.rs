//! A queue of callers for each name within a process. They are served in order, and only the first
//! one asks the database.
//!
//! A permit is kept as long as the lock that was taken with it. So the next caller of the same
//! process does not poll for a lock that this process holds, and does not occupy a connection while
//! it waits for it.

use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use tokio::select;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::LockInfo;
use crate::database::Failure;
use crate::hold_warning::HoldWarning;
use crate::name::Name;
use crate::sync::{HashMap, Mutex, MutexGuard};

#[derive(Debug, Default)]
pub(crate) struct KeyedQueue {
    names: Mutex<HashMap<Name, NameEntry>>,
    /// Notified when a caller has learned something.
    learned: Notify,
}

/// The entry of a name. It is removed with the last permit and the last waiter.
#[derive(Debug)]
struct NameEntry {
    /// A semaphore with one permit.
    queue: Weak<Semaphore>,
    known: Known,
    /// Set while a caller of this process holds the lock.
    hold_warning: Option<HoldWarning>,
}

/// What the caller that has the permit for a name knows of the lock. The callers behind it know no
/// more. A lock is reported as held only if it was seen to be held.
#[derive(Debug, Clone, Default)]
pub(crate) enum Known {
    /// Nothing yet.
    #[default]
    Nothing,
    /// The request that has the permit takes several locks, and is waiting for another one of them.
    Queued,
    /// The pool has no free connection.
    NoConnection,
    /// The last attempt to ask the database failed.
    Failure(Failure),
    /// Another transaction holds the lock. With its details if it belongs to this process.
    Held(Option<Box<LockInfo>>),
}

impl KeyedQueue {
    /// Waits for the permit. Dropping the future leaves the queue.
    pub(crate) async fn enter(self: &Arc<Self>, name: &Name) -> RowPermit {
        let queue = self.queue(name);
        // Made before the wait, so that it also cleans up after a waiter that leaves.
        let mut permit = self.permit(name, &queue);
        // The semaphore is never closed, so this is always `Some`.
        permit.semaphore_permit = queue.acquire_owned().await.ok();
        permit
    }

    /// Waits for the permit. `None`: before that, the lock became known to be held, or a request that
    /// waits for another lock was found to be ahead.
    pub(crate) async fn enter_unless_held(self: &Arc<Self>, name: &Name) -> Option<RowPermit> {
        select! {
            biased;
            permit = self.enter(name) => Some(permit),
            () = self.wait_until_known(name, |known| {
                matches!(known, Known::Held(_) | Known::Queued).then_some(())
            }) => None,
        }
    }

    /// Waits until something is known of a lock whose permit is taken.
    pub(crate) async fn wait_until_known<T>(&self, name: &Name, read: impl Fn(&Known) -> Option<T>) -> T {
        loop {
            let learned = self.learned.notified();
            let known = read(self.names().get(name).map_or(&Known::Nothing, |entry| &entry.known));
            if let Some(known) = known {
                return known;
            }
            learned.await;
        }
    }

    /// The holder of the lock, if it is in this process and has its own transaction.
    pub(crate) fn holder(&self, name: &Name) -> Option<Box<LockInfo>> {
        match &self.names().get(name)?.known {
            Known::Held(holder) => holder.clone(),
            _ => None,
        }
    }

    /// Reports the locks that callers of this process have held for long.
    pub(crate) fn held_long(
        &self,
        after: Duration,
        now: Instant,
        next: &mut Option<Instant>,
        mut tell: impl FnMut(&LockInfo, Instant),
    ) {
        for NameEntry { known, hold_warning, .. } in self.names().values_mut() {
            if let (Known::Held(Some(info)), Some(warning)) = (known, hold_warning)
                && warning.is_due(after, now, next)
            {
                tell(info, warning.since);
            }
        }
    }

    /// Returns the permit, if no other caller has it or waits for it.
    pub(crate) fn try_enter(self: &Arc<Self>, name: &Name) -> Option<RowPermit> {
        let queue = self.queue(name);
        let mut permit = self.permit(name, &queue);
        permit.semaphore_permit = Some(queue.try_acquire_owned().ok()?);
        Some(permit)
    }

    fn permit(self: &Arc<Self>, name: &Name, queue: &Arc<Semaphore>) -> RowPermit {
        RowPermit {
            semaphore_permit: None,
            queue: Some(Arc::clone(queue)),
            name: name.clone(),
            keyed_queue: Arc::clone(self),
        }
    }

    fn queue(&self, name: &Name) -> Arc<Semaphore> {
        let mut names = self.names();
        if let Some(queue) = names.get(name).and_then(|entry| entry.queue.upgrade()) {
            return queue;
        }
        let queue = Arc::new(Semaphore::new(1));
        let entry = NameEntry { queue: Arc::downgrade(&queue), known: Known::Nothing, hold_warning: None };
        names.insert(name.clone(), entry);
        queue
    }

    fn names(&self) -> MutexGuard<'_, HashMap<Name, NameEntry>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The local permit to ask the database for a name. Dropping it lets the next waiter of this
/// process ask.
#[derive(Debug)]
pub(crate) struct RowPermit {
    semaphore_permit: Option<OwnedSemaphorePermit>,
    queue: Option<Arc<Semaphore>>,
    name: Name,
    keyed_queue: Arc<KeyedQueue>,
}

impl RowPermit {
    /// Records what the database, or the pool, has reported.
    pub(crate) fn learn(&self, known: Known) {
        self.set(known);
        self.keyed_queue.learned.notify_waiters();
    }

    fn set(&self, known: Known) {
        let mut names = self.keyed_queue.names();
        let before = names.get_mut(&self.name).map(|entry| {
            entry.hold_warning =
                matches!(known, Known::Held(Some(_))).then(|| HoldWarning::new(Instant::now()));
            std::mem::replace(&mut entry.known, known)
        });
        drop(names);
        drop(before);
    }
}

impl Drop for RowPermit {
    fn drop(&mut self) {
        if let Some(permit) = self.semaphore_permit.take() {
            self.set(Known::Nothing);
            drop(permit);
        }
        // The map stays locked, so that no caller finds the queue between the end of its last user
        // and its removal.
        let mut names = self.keyed_queue.names();
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
        let queue = Arc::new(KeyedQueue::default());
        let name: Name = "a".into();
        let held = queue.try_enter(&name).unwrap();
        assert!(queue.try_enter(&name).is_none());
        assert!(queue.try_enter(&"b".into()).is_some());

        let (mut second, mut third) = (pin!(queue.enter(&name)), pin!(queue.enter(&name)));
        assert!(poll(second.as_mut()).is_pending());
        assert!(poll(third.as_mut()).is_pending());
        drop(held);
        assert!(poll(third.as_mut()).is_pending());
        assert!(queue.try_enter(&name).is_none());
        let Poll::Ready(permit) = poll(second.as_mut()) else { panic!("the second was next") };
        drop(permit);
        assert!(poll(third.as_mut()).is_ready());
    }

    #[test]
    fn an_unused_name_is_removed() {
        let queue = Arc::new(KeyedQueue::default());
        for number in 0..1000 {
            drop(queue.try_enter(&format!("name {number}").as_str().into()));
        }
        let name: Name = "left".into();
        let held = queue.try_enter(&name);
        {
            let mut waiter = pin!(queue.enter(&name));
            assert!(poll(waiter.as_mut()).is_pending());
            drop(held);
        }
        assert!(queue.names().is_empty());
    }
}

#[cfg(all(test, lock_db_shuttle))]
mod interleavings;
