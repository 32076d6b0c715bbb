//! Giving leases back.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::spawn_local;
use tokio::time::{sleep, timeout_at};

use super::baton;
use super::core::{Core, Held};
use super::lease_state::LeaseState;
use crate::Error;
use crate::database::{Fault, LeaseKey, Return, Standing};
use crate::error::{Failure, Loss};
use crate::jitter::jitter;
use crate::name::Name;
use crate::secret::Secret;

/// How long a caller waits for a release that the database does not confirm.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// Between two attempts: from the one to the other.
const PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// The same while the server can't be reached.
const WHILE_AWAY: Duration = Duration::from_millis(500);

/// Releases a lease whose guard is done with it, and says whether it was still ours.
///
/// Tried until the lease's own end, after which it is free anyway. Who waits for the answer (`somebody_waits`) hears after some seconds
/// that it is not released yet.
pub(super) async fn release(
    core: &Rc<Core>,
    lease: &LeaseState,
    given_up: GivenUp,
    somebody_waits: bool,
) -> Result<(), Error> {
    let GivenUp { held, loss, was_told } = given_up;
    let ttl = lease.key.ttl;
    // One that is lost already is given back behind the answer.
    let until = if somebody_waits || held.is_none() { Until::answered(ttl) } else { Until::ItsEnd(ttl) };
    let released = put_down(core, lease, held, until).await;
    let lost = |reason| {
        if !was_told {
            core.tell_operator(lease, reason);
        }
        lease.lost_error(reason)
    };
    match (loss, released) {
        // Released before: by a transaction that has committed, or that has not and left it to us.
        (None, Ok(Standing::Ours)) | (Some(Loss::Released), Ok(Standing::Ours | Standing::NotOurs)) => Ok(()),
        (None, Ok(Standing::NotOurs)) => Err(lost(core.find_out(lease).await)),
        (None | Some(Loss::Released), Ok(_locked_by_somebody)) => {
            give_back(core, lease.key.row.name.clone(), lease.key.secret.clone(), lease.at_least(), ttl);
            let source = sqlx::Error::Protocol("another transaction has its row locked; it is released when that ends, or free when its TTL is over".into());
            Err(Error::Database { action: "release", name: Some(lease.name().given()), within: None, source })
        }
        (None | Some(Loss::Released), Err(failure)) => {
            give_back(core, lease.key.row.name.clone(), lease.key.secret.clone(), lease.at_least(), ttl);
            Err(failure.into_error("release", Some(lease.name())))
        }
        // Loss is final, even if the row turned out to be ours still: the holder was told to stop.
        (Some(reason), released) => {
            let is_settled = matches!(released, Ok(Standing::Ours | Standing::NotOurs));
            if reason == Loss::NotRenewed && !is_settled {
                // A renewal may be under way that the server carries out late.
                give_back(core, lease.key.row.name.clone(), lease.key.secret.clone(), lease.at_least(), ttl);
            }
            Err(lost(reason))
        }
    }
}

/// A lease whose holder is done with it.
pub(super) struct GivenUp {
    /// With the turn of this process.
    held: Option<Held>,
    loss: Option<Loss>,
    /// Whether the operator has heard of that.
    was_told: bool,
}

/// Takes a lease out of the renewal, before anything else happens to it: nothing renews what is being released, and `close` does not
/// release it once more. The turn of this process goes to the next waiter at the end, when the row is free.
pub(super) fn give_up(core: &Core, lease: &LeaseState) -> GivenUp {
    let loss = lease.loss();
    let held = core.leases.borrow_mut().remove(&lease.number);
    GivenUp { was_told: held.is_none(), held, loss }
}

/// Takes a lease back from a holder that has had it for as long as it may. The holder is told first.
pub(super) fn take_back(core: &Rc<Core>, number: u64) {
    let Some(held) = core.end(number, Loss::HeldTooLong) else { return };
    let (core, busy) = (Rc::clone(core), core.busy.enter());
    spawn_local(async move {
        let lease = Arc::clone(&held.state);
        let until = Until::ItsEnd(held.ttl);
        if let Err(failure) = put_down(&core, &lease, Some(held), until).await {
            let (lock, error) = (lease.name(), &failure);
            tracing::debug!(%lock, %error, "not released: it is free when its TTL is over");
        }
        drop(busy);
    });
}

/// Frees the row, and passes the turn of this process.
async fn put_down(
    core: &Rc<Core>,
    lease: &LeaseState,
    held: Option<Held>,
    until: Until,
) -> Result<Standing, Failure> {
    let name = &lease.key.row.name;
    let mut given_back = Return { name: name.clone(), secret: lease.key.secret.clone(), place: None };
    if held.as_ref().is_some_and(|held| held.others_wait) && core.queues.next_is_fair(name) {
        // The next caller of this process would have to stand behind the others in any case: in the same statement.
        core.calls.stand(name, lease.key.row.id);
        given_back.place = Some(core.place());
    }
    let released = until_settled(core, &given_back, lease.at_least(), until).await;
    // Else somebody of this process may have it by now.
    if held.is_some() {
        baton::give(core, name);
    }
    if given_back.place.is_some() {
        baton::wait(core, name, lease.key.row.id);
    }
    drop(held);
    if !core.queues.is_taken(name) {
        // Whoever was to have the turn has gone.
        leave_queue(core, name);
    }
    released
}

/// Gives back what may be ours still and never got a holder, in the background.
pub(super) fn undo(core: &Rc<Core>, name: Name, secret: Secret, ttl: Duration) {
    give_back(core, name, secret, Duration::ZERO, ttl);
}

/// Gives up our place in the queue of a name, if there is one, in the background. One that stays for want of an answer lasts
/// some seconds.
pub(super) fn leave_queue(core: &Rc<Core>, name: &Name) {
    if !core.calls.leave(name) {
        return;
    }
    baton::give(core, name);
    let (core, name, busy) = (Rc::clone(core), name.clone(), core.busy.enter());
    spawn_local(async move {
        if let Err(failure) = core.lane.remove_waiter(&name, core.queues.place()).await {
            tracing::debug!(lock = %name, error = %failure, "a place in the queue stays until it is over");
        }
        drop(busy);
    });
}

fn give_back(core: &Rc<Core>, name: Name, secret: Secret, at_least: Duration, ttl: Duration) {
    let (core, busy) = (Rc::clone(core), core.busy.enter());
    spawn_local(async move {
        let until = Until::ItsEnd(ttl);
        let given_back = Return { name, secret, place: None };
        let _free_by_then = until_settled(&core, &given_back, at_least, until).await;
        drop(busy);
    });
}

/// Tells all holders, and releases everything that is held in the background.
pub(super) fn release_all(core: &Rc<Core>) {
    let held: Vec<Arc<LeaseState>> =
        core.leases.borrow().values().map(|held| Arc::clone(&held.state)).collect();
    // All are told first: what others may take must not look held to us.
    for lease in &held {
        core.lose(lease.number, Loss::Closed);
    }
    let until = Until::answered(ANSWER_LIMIT);
    for lease in held {
        let (core, busy) = (Rc::clone(core), core.busy.enter());
        spawn_local(async move {
            let LeaseKey { row, secret, .. } = &lease.key;
            let given_back = Return { name: row.name.clone(), secret: secret.clone(), place: None };
            let settled = until_settled(&core, &given_back, lease.at_least(), until).await;
            if let Err(failure) = settled {
                let error = failure.into_error("release", Some(lease.name()));
                tracing::warn!(lock = %lease.name(), %error, "not released: it is free when its TTL is over");
            }
            drop(busy);
        });
    }
}

/// How long a release is tried.
#[derive(Debug, Clone, Copy)]
enum Until {
    /// No new attempt is made after this; one that is under way is waited for until that.
    Answered(Instant, Instant),
    /// A TTL from now, when the lease is free anyway. While the server can't be reached its end moves on: what was sent before may have
    /// been carried out late.
    ItsEnd(Duration),
}

impl Until {
    fn answered(ttl: Duration) -> Self {
        let now = Instant::now();
        Self::Answered(now + ttl.min(ANSWER_LIMIT), now + ANSWER_LIMIT)
    }
}

/// Asks again while the row is busy or the database is gone, once at least.
async fn until_settled(
    core: &Rc<Core>,
    lease: &Return,
    at_least: Duration,
    until: Until,
) -> Result<Standing, Failure> {
    let (mut unsettled, mut was_busy) = (false, false);
    let (mut pause, mut last) = (PAUSE, None);
    let mut end = match until {
        Until::Answered(end, _) => end,
        Until::ItsEnd(ttl) => Instant::now() + ttl,
    };
    loop {
        let asked = core.lane.release(lease.clone(), at_least);
        let answer = match until {
            Until::ItsEnd(_) => asked.await,
            // Among others that wait for the same, a locked table say, it may take long to be answered.
            Until::Answered(_, limit) => match timeout_at(limit.into(), asked).await {
                Ok(answer) => answer,
                Err(_elapsed) => return Err(last.unwrap_or_else(|| core.lane.no_answer(ANSWER_LIMIT))),
            },
        };
        let is_away = matches!(answer, Err(Failure { fault: Fault::Disconnected, .. }));
        if is_away && let Until::ItsEnd(ttl) = until {
            end = Instant::now() + ttl;
        }
        let in_time = Instant::now() < end;
        match answer {
            Ok(Standing::Busy) if in_time => {
                // Mostly by another process, for one statement.
                if !was_busy {
                    was_busy = true;
                    continue;
                }
            }
            // The answer to an earlier attempt was lost, and that one may have released it: then another process may
            // have taken it since. The secret was ours, so it touched no other lock.
            Ok(Standing::NotOurs) if unsettled => return Ok(Standing::Ours),
            Err(failure) if is_away && in_time => {
                unsettled = true;
                last = Some(failure);
            }
            Err(failure) if failure.passes() && in_time => last = Some(failure),
            answer => return answer,
        }
        sleep(jitter(pause)).await;
        pause = (pause * 2).min(if is_away { WHILE_AWAY } else { LONGEST_PAUSE });
    }
}
