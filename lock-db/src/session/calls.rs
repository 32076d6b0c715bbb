//! Who is called when a lock is free.
//!
//! A call only shortens a pause. Where none comes through, whoever waits looks by himself.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::{Rc, Weak};

use tokio::sync::Notify;

/// On the session's own thread.
#[derive(Debug)]
pub(super) struct Calls {
    /// By which a release in another process names this session.
    number: u32,
    /// By the id of the row.
    waiting: RefCell<HashMap<i64, Weak<Notify>>>,
    listens: Cell<bool>,
    is_asked: Cell<bool>,
}

impl Calls {
    pub(super) fn new() -> Self {
        // Zero names nobody.
        let number = getrandom::u32().unwrap_or_else(|_| std::process::id()).max(1);
        let (listens, is_asked) = (Cell::new(false), Cell::new(false));
        Self { number, waiting: RefCell::default(), listens, is_asked }
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

    /// It is gone.
    pub(super) fn end(&self) {
        self.listens.set(false);
    }

    /// Whether somebody should see to it that a connection listens. After `true` that somebody says when it is done.
    pub(super) fn should_begin(&self) -> bool {
        !self.listens.get() && !self.is_asked.replace(true)
    }

    pub(super) fn was_asked(&self) {
        self.is_asked.set(false);
    }

    pub(super) fn ring(&self, id: i64) {
        if let Some(bell) = self.waiting.borrow().get(&id).and_then(Weak::upgrade) {
            // Kept for a waiter that is busy at the moment.
            bell.notify_one();
        }
    }
}

/// Rings when one of the locks that its owner waits for is free.
#[derive(Debug)]
pub(super) struct Bell {
    calls: Rc<Calls>,
    rings: Rc<Notify>,
    ids: Vec<i64>,
}

impl Bell {
    pub(super) fn new(calls: &Rc<Calls>) -> Self {
        Self { calls: Rc::clone(calls), rings: Rc::default(), ids: Vec::new() }
    }

    /// Only one waits for a row in a process: the others stand behind it.
    pub(super) fn hang(&mut self, id: i64) {
        if !self.ids.contains(&id) {
            self.ids.push(id);
            self.calls.waiting.borrow_mut().insert(id, Rc::downgrade(&self.rings));
        }
    }

    pub(super) async fn rings(&self) {
        self.rings.notified().await;
    }
}

impl Drop for Bell {
    fn drop(&mut self) {
        let mut waiting = self.calls.waiting.borrow_mut();
        for id in &self.ids {
            if waiting.get(id).is_some_and(|bell| bell.as_ptr() == Rc::as_ptr(&self.rings)) {
                waiting.remove(id);
            }
        }
    }
}
