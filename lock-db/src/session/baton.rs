//! The baton, which stands in for a call where the database calls nobody: whoever has a lock keeps its baton as well, on the
//! connection for renewals, and the next one waits for it there, on the server, a second at a time.
//!
//! It only shortens pauses, as a call does: a lock is granted by its row alone. A process has one baton at a time, or waits for
//! one; where it waits for more locks than that, for the others it looks from time to time.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::task::spawn_local;
use tokio::time::sleep;

use super::core::Core;
use crate::database::Fault;
use crate::name::Name;

/// As long as a lease is held with a shorter TTL, the connection for renewals waits for nothing else: a slice must be over
/// long before a lease is that was due for renewal when it began.
const SHORTEST_TTL: Duration = Duration::from_secs(6);
/// How long the server waits at a time. Where it doesn't, we do.
const SLICE: Duration = Duration::from_secs(1);

/// How often is looked, in memory, whether the renewals that are under way are done.
const PAUSE: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
pub(super) struct Baton {
    wish: RefCell<Option<Wish>>,
    /// The server, or what stands before it, does not do this.
    is_refused: Cell<bool>,
}

#[derive(Debug)]
struct Wish {
    name: Name,
    row: i64,
    is_ours: bool,
}

impl Baton {
    pub(super) fn is_ours(&self, name: &str) -> bool {
        self.wish.borrow().as_ref().is_some_and(|wish| wish.is_ours && *wish.name == *name)
    }
}

/// Whether the connection for renewals is waiting while a lease is held that can't wait for that.
pub(super) fn is_in_the_way(core: &Core) -> bool {
    let is_awaited = core.baton.wish.borrow().as_ref().is_some_and(|wish| !wish.is_ours);
    is_awaited && !may_wait(core)
}

fn may_wait(core: &Core) -> bool {
    core.shortest_ttl().is_none_or(|ttl| ttl >= SHORTEST_TTL)
}

/// Waits for the baton of a row in whose queue this process stands, and rings when it is there.
pub(super) fn wait(core: &Rc<Core>, name: &Name, row: i64) {
    let Baton { wish, is_refused } = &core.baton;
    if wish.borrow().is_some() || is_refused.get() || !core.lane.has_batons() || !may_wait(core) {
        return;
    }
    *wish.borrow_mut() = Some(Wish { name: name.clone(), row, is_ours: false });
    let (core, name) = (Rc::clone(core), name.clone());
    spawn_local(async move {
        if take(&core, &name, row).await {
            *core.baton.wish.borrow_mut() = Some(Wish { name, row, is_ours: true });
            core.calls.ring(row);
        } else {
            core.baton.wish.take();
        }
    });
}

/// `false`: we don't want it any more, or can't have it.
async fn take(core: &Core, name: &str, row: i64) -> bool {
    loop {
        // Else each of many statements would wait for a slice of its own.
        while core.is_renewing.get() {
            sleep(PAUSE).await;
        }
        let asked = Instant::now();
        let taken = select! {
            () = core.closed() => return false,
            taken = core.renewals.take_baton(row) => taken,
        };
        let waits = core.calls.place(name).is_some();
        match taken {
            Ok(true) if waits || core.has_lease(name) => return true,
            Ok(true) => {
                core.renewals.give_baton(row);
                return false;
            }
            Ok(false) if waits && may_wait(core) => {}
            Ok(false) => return false,
            Err(failure) => {
                if failure.fault != Fault::Disconnected && !failure.passes() {
                    tracing::debug!(error = %failure, "no user lock: whoever waits looks");
                    core.baton.is_refused.set(true);
                }
                return false;
            }
        }
        let rest = SLICE.saturating_sub(asked.elapsed());
        if rest > SLICE / 2 {
            sleep(rest).await;
        }
    }
}

/// Gives the baton of a lock to the next one, if we have it.
pub(super) fn give(core: &Core, name: &str) {
    if core.baton.is_ours(name)
        && let Some(Wish { row, .. }) = core.baton.wish.take()
    {
        core.renewals.give_baton(row);
    }
}
