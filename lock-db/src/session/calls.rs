//! Who is called when a lock is free.
//!
//! A call only shortens a pause. Where none comes through, whoever waits looks by himself.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use tokio::sync::Notify;

use crate::name::Name;

/// On the session's own thread.
#[derive(Debug)]
pub(super) struct Calls {
    /// By which a release in another process names this session.
    number: u32,
    /// Where this process stands in the queue, for all we know, and what rings when it is called.
    places: RefCell<HashMap<Name, Bell>>,
    listens: Cell<bool>,
    is_asked: Cell<bool>,
    /// The connection is a pooler's, which hands it to others.
    can_not_listen: Cell<bool>,
}

impl Calls {
    pub(super) fn new() -> Self {
        // Zero names nobody.
        let number = getrandom::u32().unwrap_or_else(|_| std::process::id()).max(1);
        Self {
            number,
            places: RefCell::default(),
            listens: Cell::default(),
            is_asked: Cell::default(),
            can_not_listen: Cell::default(),
        }
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// Whom a release is to call for us: zero for nobody.
    pub(super) fn listener(&self) -> u32 {
        if self.listens.get() { self.number } else { 0 }
    }

    /// A connection listens.
    pub(super) fn begin(&self) {
        self.listens.set(true);
    }

    /// No connection can listen, as long as this one is there.
    pub(super) fn can_not_begin(&self) {
        self.can_not_listen.set(true);
    }

    /// It is gone.
    pub(super) fn end(&self) {
        self.listens.set(false);
        self.can_not_listen.set(false);
    }

    /// Whether somebody should see to it that a connection listens. After `true` that somebody says when it is done.
    pub(super) fn should_begin(&self) -> bool {
        !self.listens.get() && !self.can_not_listen.get() && !self.is_asked.replace(true)
    }

    pub(super) fn was_asked(&self) {
        self.is_asked.set(false);
    }

    /// The queue of a name may have our place from now on. Kept until [`leave`](Self::leave), for whichever caller of this
    /// process has the turn.
    pub(super) fn stand(&self, name: &Name, id: i64) -> Rc<Notify> {
        let mut places = self.places.borrow_mut();
        match places.get(name) {
            // A row that was cleaned away and made anew is another one.
            Some(bell) if bell.id == id => Rc::clone(&bell.rings),
            _ => {
                let rings = Rc::new(Notify::new());
                places.insert(name.clone(), Bell { id, rings: Rc::clone(&rings) });
                rings
            }
        }
    }

    /// What rings for our place in the queue of a name.
    pub(super) fn place(&self, name: &str) -> Option<Rc<Notify>> {
        self.places.borrow().get(name).map(|bell| Rc::clone(&bell.rings))
    }

    /// The place is gone, or will be. `false`: there was none.
    pub(super) fn leave(&self, name: &str) -> bool {
        self.places.borrow_mut().remove(name).is_some()
    }

    /// Whether this process stands in any queue.
    pub(super) fn waits(&self) -> bool {
        !self.places.borrow().is_empty()
    }

    pub(super) fn ring(&self, id: i64) {
        for bell in self.places.borrow().values().filter(|bell| bell.id == id) {
            // Kept for a waiter that is busy at the moment.
            bell.rings.notify_one();
        }
    }
}

/// Rings when the lock of a row is free, and it is our turn.
#[derive(Debug)]
struct Bell {
    id: i64,
    rings: Rc<Notify>,
}
