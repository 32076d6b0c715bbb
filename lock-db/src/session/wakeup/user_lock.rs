//! User locks (`GET_LOCK`), which replace notifications on databases that have none. The holder of
//! a lock also holds its user lock, on the renewal connection. The next waiter waits for the user
//! lock there, on the server, for one second at a time.
//!
//! A user lock only shortens pauses, as a notification does: a lock is granted by its row alone. A
//! process has, or waits for, one user lock at a time. For the other locks that it waits for, it
//! polls.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::task::spawn_local;
use tokio::time::sleep;

use super::scan;
use crate::database::Fault;
use crate::name::Name;
use crate::session::actor::Actor;

/// While a lease with a shorter TTL is held, the renewal connection does not wait for a user lock.
/// A slice has to end long before a lease expires whose renewal was due when the slice began.
const SHORTEST_TTL: Duration = Duration::from_secs(6);
/// How long the server waits at a time. If it returns early, the rest is slept here.
const SLICE: Duration = Duration::from_secs(1);

/// How often to check, in memory, whether the renewals in progress are done.
const PAUSE: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
pub(in crate::session) struct UserLock {
    wish: RefCell<Option<Wish>>,
    /// The server, or a proxy in front of it, does not support this.
    is_refused: Cell<bool>,
}

#[derive(Debug)]
struct Wish {
    name: Name,
    row: i64,
    is_ours: bool,
}

impl UserLock {
    pub(in crate::session) fn is_ours(&self, name: &str) -> bool {
        self.wish.borrow().as_ref().is_some_and(|wish| wish.is_ours && *wish.name == *name)
    }
}

/// Whether the renewal connection is waiting while a lease is held that can't wait for it.
pub(in crate::session) fn is_in_the_way(actor: &Actor) -> bool {
    is_awaited(actor) && !may_wait(actor)
}

/// Whether the renewal connection is waiting.
pub(super) fn is_awaited(actor: &Actor) -> bool {
    actor.user_lock.wish.borrow().as_ref().is_some_and(|wish| !wish.is_ours)
}

/// Not while many requests wait: then the renewal connection scans for all of them.
fn may_wait(actor: &Actor) -> bool {
    actor.shortest_ttl().is_none_or(|ttl| ttl >= SHORTEST_TTL) && !scan::is_useful(actor)
}

/// Waits for the user lock of a row in whose queue this process has an entry, and notifies the
/// waiter when it is acquired.
pub(in crate::session) fn wait(actor: &Rc<Actor>, name: &Name, row: i64) {
    let UserLock { wish, is_refused } = &actor.user_lock;
    if wish.borrow().is_some() || is_refused.get() || !actor.worker.has_user_locks() || !may_wait(actor) {
        return;
    }
    *wish.borrow_mut() = Some(Wish { name: name.clone(), row, is_ours: false });
    let (actor, name) = (Rc::clone(actor), name.clone());
    spawn_local(async move {
        if take(&actor, &name, row).await {
            *actor.user_lock.wish.borrow_mut() = Some(Wish { name, row, is_ours: true });
            actor.notifications.notify(row);
        } else {
            actor.user_lock.wish.take();
        }
    });
}

/// `false`: the user lock is not wanted any more, or can't be had.
async fn take(actor: &Actor, name: &str, row: i64) -> bool {
    loop {
        // Otherwise each statement of a long series of renewals would wait for a slice.
        while actor.is_renewing.get() {
            sleep(PAUSE).await;
        }
        let asked = Instant::now();
        let taken = select! {
            () = actor.closed() => return false,
            taken = actor.renewals.take_user_lock(row) => taken,
        };
        let waits = actor.notifications.waiter(name).is_some();
        match taken {
            Ok(true) if waits || actor.has_lease(name) => return true,
            Ok(true) => {
                actor.renewals.release_user_lock(row);
                return false;
            }
            Ok(false) if waits && may_wait(actor) => {}
            Ok(false) => return false,
            Err(failure) => {
                if failure.fault != Fault::Disconnected && !failure.passes() {
                    tracing::debug!(error = %failure, "no user lock: whoever waits looks");
                    actor.user_lock.is_refused.set(true);
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

/// Releases the user lock of a lock to the next waiter, if this process has it.
pub(in crate::session) fn give(actor: &Actor, name: &str) {
    if actor.user_lock.is_ours(name)
        && let Some(Wish { row, .. }) = actor.user_lock.wish.take()
    {
        actor.renewals.release_user_lock(row);
    }
}
