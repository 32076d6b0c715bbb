//! The baton, which stands in for a call where the database calls nobody: whoever has a lock keeps its baton as well, on the
//! connection for renewals, and the next one waits for it there, on the server, a second at a time.
//!
//! It only shortens pauses, as a call does: a lock is granted by its row alone. A process has one baton at a time, or waits for
//! one; where it waits for more locks than that, for the others it looks from time to time.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use tokio::select;
use tokio::task::spawn_local;

use super::core::Core;

#[derive(Debug, Default)]
pub(super) struct Baton(RefCell<Option<Wish>>);

#[derive(Debug)]
struct Wish {
    name: Arc<str>,
    row: i64,
    is_ours: bool,
}

impl Baton {
    /// Whether the connection for renewals is waiting.
    pub(super) fn is_awaited(&self) -> bool {
        self.0.borrow().as_ref().is_some_and(|wish| !wish.is_ours)
    }

    pub(super) fn is_ours(&self, name: &str) -> bool {
        self.0.borrow().as_ref().is_some_and(|wish| wish.is_ours && *wish.name == *name)
    }
}

/// Waits for the baton of a row in whose queue this process stands, and rings when it is there.
pub(super) fn wait(core: &Rc<Core>, name: &Arc<str>, row: i64) {
    let mut wish = core.baton.0.borrow_mut();
    if wish.is_some() || !core.lane.has_batons() {
        return;
    }
    *wish = Some(Wish { name: Arc::clone(name), row, is_ours: false });
    let (core, name) = (Rc::clone(core), Arc::clone(name));
    spawn_local(async move {
        let is_ours = loop {
            let taken = select! {
                () = core.closed() => break false,
                taken = core.renewals.take_baton(row) => taken,
            };
            let waits = core.calls.place(&name).is_some();
            match taken {
                Ok(true) if waits || core.has_lease(&name) => break true,
                Ok(true) => {
                    core.renewals.give_baton(row);
                    break false;
                }
                Ok(false) if waits => {}
                Ok(false) | Err(_) => break false,
            }
        };
        if is_ours {
            *core.baton.0.borrow_mut() = Some(Wish { name, row, is_ours });
            core.calls.ring(row);
        } else {
            core.baton.0.take();
        }
    });
}

/// Gives the baton of a lock to the next one, if we have it.
pub(super) fn give(core: &Core, name: &str) {
    if core.baton.is_ours(name)
        && let Some(Wish { row, .. }) = core.baton.0.take()
    {
        core.renewals.give_baton(row);
    }
}
