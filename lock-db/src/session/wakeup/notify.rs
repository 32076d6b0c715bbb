//! Notifications (`LISTEN`/`NOTIFY`) that a lock is free.
//!
//! A notification only shortens a pause. A waiter that gets none polls.

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use tokio::sync::Notify;

use crate::name::Name;

/// Lives on the session's own thread.
#[derive(Debug)]
pub(in crate::session) struct Notifications {
    /// The listener id, by which a release in another process names this session.
    number: u32,
    /// The rows in whose queues this process probably has an entry, and what to notify.
    waiters: RefCell<HashMap<Name, QueueSignal>>,
    listens: Cell<bool>,
    is_asked: Cell<bool>,
    /// The connection belongs to a pooler, which shares it with other clients.
    can_not_listen: Cell<bool>,
}

impl Notifications {
    pub(in crate::session) fn new() -> Self {
        // Zero means no listener.
        let number = getrandom::u32().unwrap_or_else(|_| std::process::id()).max(1);
        Self {
            number,
            waiters: RefCell::default(),
            listens: Cell::default(),
            is_asked: Cell::default(),
            can_not_listen: Cell::default(),
        }
    }

    pub(in crate::session) fn number(&self) -> u32 {
        self.number
    }

    /// The listener id that a release notifies; 0 means none.
    pub(in crate::session) fn listener(&self) -> u32 {
        if self.listens.get() { self.number } else { 0 }
    }

    /// A connection listens from now on.
    pub(in crate::session) fn begin(&self) {
        self.listens.set(true);
    }

    /// The connection can't listen. There is no new attempt while it is open.
    pub(in crate::session) fn mark_unable(&self) {
        self.can_not_listen.set(true);
    }

    /// The connection is gone.
    pub(in crate::session) fn end(&self) {
        self.listens.set(false);
        self.can_not_listen.set(false);
    }

    /// Whether the caller should make a connection listen. After `true` it calls `mark_asked` when
    /// it is done.
    pub(in crate::session) fn should_begin(&self) -> bool {
        !self.listens.get() && !self.can_not_listen.get() && !self.is_asked.replace(true)
    }

    pub(in crate::session) fn mark_asked(&self) {
        self.is_asked.set(false);
    }

    /// Records that the queue of a name may have our entry from now on. This is kept until
    /// [`leave`](Self::leave), for any caller of this process that has the permit.
    pub(in crate::session) fn enqueue(&self, name: &Name, id: i64) -> Rc<Notify> {
        let mut waiters = self.waiters.borrow_mut();
        match waiters.get(name) {
            // A row that was cleaned up and created again is another row.
            Some(signal) if signal.id == id => Rc::clone(&signal.notify),
            _ => {
                let notify = Rc::new(Notify::new());
                waiters.insert(name.clone(), QueueSignal { id, notify: Rc::clone(&notify) });
                notify
            }
        }
    }

    /// The signal for our queue entry of a name.
    pub(in crate::session) fn waiter(&self, name: &str) -> Option<Rc<Notify>> {
        self.waiters.borrow().get(name).map(|signal| Rc::clone(&signal.notify))
    }

    /// The queue entry is gone, or will be. `false`: there was none.
    pub(in crate::session) fn leave(&self, name: &str) -> bool {
        self.waiters.borrow_mut().remove(name).is_some()
    }

    /// Whether this process has an entry in any queue.
    pub(in crate::session) fn waits(&self) -> bool {
        !self.waiters.borrow().is_empty()
    }

    /// In how many queues this process probably has an entry.
    pub(in crate::session) fn waiting(&self) -> usize {
        self.waiters.borrow().len()
    }

    /// The ids of the rows of these queues.
    pub(in crate::session) fn rows(&self) -> Vec<i64> {
        self.waiters.borrow().values().map(|signal| signal.id).collect()
    }

    pub(in crate::session) fn notify(&self, id: i64) {
        self.notify_all(&HashSet::from([id]));
    }

    pub(in crate::session) fn notify_all(&self, ids: &HashSet<i64>) {
        for signal in self.waiters.borrow().values().filter(|signal| ids.contains(&signal.id)) {
            // Stored for a waiter that is busy at the moment.
            signal.notify.notify_one();
        }
    }
}

/// The signal that the lock of a row is free and this process is next.
#[derive(Debug)]
struct QueueSignal {
    id: i64,
    notify: Rc<Notify>,
}
