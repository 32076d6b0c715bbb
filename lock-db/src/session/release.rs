//! Releases leases.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::task::spawn_local;
use tokio::time::{sleep, timeout_at};

use super::actor::{Actor, READ_LIMIT};
use super::held_lease::HeldLease;
use super::lease_state::LeaseState;
use super::request::AnswerSender;
use crate::Error;
use crate::database::Failure;
use crate::database::{Fault, LeaseStatus, ReleaseClaim};
use crate::error::Action;
use crate::error::Loss;
use crate::jitter::jitter;
use crate::name::Name;
use crate::secret::Secret;
use crate::session::wakeup::user_lock;

/// How long a caller waits for a release that the database does not confirm.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// The first and the longest pause between two attempts.
const PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause while the server can't be reached.
const WHILE_AWAY: Duration = Duration::from_millis(500);

/// Releases a lease in a task. `answer` is `None` if its guard was dropped.
pub(super) fn release_in_task(actor: Rc<Actor>, lease: Arc<LeaseState>, answer: Option<AnswerSender<()>>) {
    let busy = actor.tasks.enter();
    let removed = remove_from_renewal(&actor, &lease);
    drop(spawn_local(async move {
        let released = release(&actor, &lease, removed, answer.is_some()).await;
        match (answer, released) {
            (Some(answer), released) => drop(answer.send(released)),
            // The loss was reported when it was noticed.
            (None, Ok(()) | Err(Error::Lost { .. } | Error::Closed)) => {}
            (None, Err(error)) => {
                tracing::warn!(lock = %lease.name(), error = %error.report(), "a dropped lock could not be released");
            }
        }
        drop(busy);
    }));
}

/// Releases a lease whose guard is done with it, and reports whether it was still ours.
///
/// Attempts continue until the lease's own end, after which the lock is free anyway. A caller that
/// waits for the answer (`is_awaited`) is told after some seconds that the lock is not released
/// yet.
async fn release(
    actor: &Rc<Actor>,
    lease: &LeaseState,
    removed: RemovedLease,
    is_awaited: bool,
) -> Result<(), Error> {
    let RemovedLease { held, loss, was_told } = removed;
    let ttl = lease.key.ttl;
    // A lease that is already lost is released in the background, after the answer.
    let until = if is_awaited || held.is_none() { Until::answered(ttl) } else { Until::ItsEnd(ttl) };
    let released = put_down(actor, lease, held, until).await;
    let lost = |reason| {
        if !was_told {
            actor.tell_operator(lease, reason);
        }
        lease.lost_error(reason)
    };
    match (loss, released) {
        // With `Loss::Released`, a transaction has released the lease. It has committed, or it has
        // not and the release is left to us.
        (None, Ok(LeaseStatus::Ours))
        | (Some(Loss::Released), Ok(LeaseStatus::Ours | LeaseStatus::NotOurs)) => Ok(()),
        (None, Ok(LeaseStatus::NotOurs)) => Err(lost(actor.find_out(lease, READ_LIMIT).await)),
        (None | Some(Loss::Released), not_released) => {
            release_in_background(actor, lease.release_claim(), lease.at_least(), ttl);
            Err(match not_released {
                Ok(_locked_by_another) => row_locked(lease),
                Err(failure) => failure.into_error(Action::Release, Some(lease.name())),
            })
        }
        // A loss is final, even if the row turns out to be still ours: the holder was told to stop.
        (Some(reason), released) => {
            let is_settled = matches!(released, Ok(LeaseStatus::Ours | LeaseStatus::NotOurs));
            if reason == Loss::NotRenewed && !is_settled {
                // A renewal may be in progress that the server carries out late.
                release_in_background(actor, lease.release_claim(), lease.at_least(), ttl);
            }
            Err(lost(reason))
        }
    }
}

fn row_locked(lease: &LeaseState) -> Error {
    let reason =
        "another transaction has its row locked; it is released when that ends, or free when its TTL is over";
    let name = Some(lease.name().given());
    Error::other(Action::Release, name, true, reason)
}

/// A lease whose holder is done with it.
struct RemovedLease {
    /// With the permit of this process.
    held: Option<HeldLease>,
    loss: Option<Loss>,
    /// Whether the end of the lease was logged.
    was_told: bool,
}

/// Removes a lease from renewal before anything else happens to it. A lease that is being released
/// must not be renewed, and `close` must not release it again. The permit of this process goes to
/// the next waiter at the end, when the row is free.
fn remove_from_renewal(actor: &Actor, lease: &LeaseState) -> RemovedLease {
    let loss = lease.loss();
    let held = actor.forget(lease.number);
    RemovedLease { was_told: held.is_none(), held, loss }
}

/// Takes a lease back from a holder that has had it for as long as it may. The holder is told
/// first.
pub(super) fn take_back(actor: &Rc<Actor>, number: u64) {
    let Some(held) = actor.end(number, Loss::HeldTooLong) else { return };
    let (actor, busy) = (Rc::clone(actor), actor.tasks.enter());
    spawn_local(async move {
        let lease = Arc::clone(&held.state);
        let until = Until::ItsEnd(held.ttl);
        if let Err(failure) = put_down(&actor, &lease, Some(held), until).await {
            let (lock, error) = (lease.name(), &failure);
            tracing::debug!(%lock, %error, "not released: it is free when its TTL is over");
        }
        drop(busy);
    });
}

/// Frees the row, and passes on the permit of this process.
async fn put_down(
    actor: &Rc<Actor>,
    lease: &LeaseState,
    held: Option<HeldLease>,
    until: Until,
) -> Result<LeaseStatus, Failure> {
    let name = &lease.key.row.name;
    let mut claim = lease.release_claim();
    if held.as_ref().is_some_and(|held| held.others_wait) && actor.queues.next_is_fair(name) {
        // The next caller of this process has to queue behind the other processes in any case. The
        // release adds its queue entry in the same statement.
        actor.notifications.enqueue(name, lease.key.row.id);
        claim.entry = Some(actor.queue_entry());
    }
    let released = until_settled(actor, &claim, lease.at_least(), until).await;
    // Without `held` another caller of this process may already have the lock, and its user lock.
    if held.is_some() {
        user_lock::give(actor, name);
    }
    if claim.entry.is_some() {
        user_lock::wait(actor, name, lease.key.row.id);
    }
    drop(held);
    if !actor.queues.is_taken(name) {
        // The caller that was to get the permit has gone.
        leave_queue(actor, name);
    }
    released
}

/// Releases, in the background, a lease that may be ours and never got a holder.
pub(super) fn undo(actor: &Rc<Actor>, name: Name, secret: Secret, ttl: Duration) {
    release_in_background(actor, ReleaseClaim { name, secret, entry: None }, Duration::ZERO, ttl);
}

/// Removes our entry from the queue of a name, if there is one, in the background. An entry that
/// stays, because the database does not answer, expires after some seconds.
pub(super) fn leave_queue(actor: &Rc<Actor>, name: &Name) {
    if !actor.notifications.leave(name) {
        return;
    }
    user_lock::give(actor, name);
    let (actor, name, busy) = (Rc::clone(actor), name.clone(), actor.tasks.enter());
    spawn_local(async move {
        if let Err(failure) = actor.worker.dequeue(&name, actor.queues.queue_secret()).await {
            tracing::debug!(lock = %name, error = %failure, "the queue entry stays until it expires");
        }
        drop(busy);
    });
}

fn release_in_background(actor: &Rc<Actor>, lease: ReleaseClaim, at_least: Duration, ttl: Duration) {
    let (actor, busy) = (Rc::clone(actor), actor.tasks.enter());
    spawn_local(async move {
        let _free_by_then = until_settled(&actor, &lease, at_least, Until::ItsEnd(ttl)).await;
        drop(busy);
    });
}

/// Tells all holders, and releases in the background everything that is held.
pub(super) fn release_all(actor: &Rc<Actor>) {
    let held: Vec<Arc<LeaseState>> =
        actor.leases.borrow().values().map(|held| Arc::clone(&held.state)).collect();
    // All holders are told first: a lock that another process may take must not appear held here.
    for lease in &held {
        actor.lose(lease.number, Loss::Closed);
    }
    let until = Until::answered(ANSWER_LIMIT);
    for lease in held {
        let (actor, busy) = (Rc::clone(actor), actor.tasks.enter());
        spawn_local(async move {
            let settled = until_settled(&actor, &lease.release_claim(), lease.at_least(), until).await;
            if let Err(failure) = settled {
                let error = failure.into_error(Action::Release, Some(lease.name()));
                tracing::warn!(lock = %lease.name(), error = %error.report(), "not released: it is free when its TTL is over");
            }
            drop(busy);
        });
    }
}

/// How long a release is attempted.
#[derive(Debug, Clone, Copy)]
enum Until {
    /// No new attempt starts after the first instant. One that is in progress is awaited until the
    /// second.
    Answered(Instant, Instant),
    /// One TTL from now, when the lease has expired anyway. While the server can't be reached the
    /// end moves on, because what was sent before may have been carried out late.
    ItsEnd(Duration),
}

impl Until {
    fn answered(ttl: Duration) -> Self {
        let now = Instant::now();
        Self::Answered(now + ttl.min(ANSWER_LIMIT), now + ANSWER_LIMIT)
    }
}

/// Repeats the release while the row is busy or the database can't be reached. Makes at least one
/// attempt.
async fn until_settled(
    actor: &Rc<Actor>,
    lease: &ReleaseClaim,
    at_least: Duration,
    until: Until,
) -> Result<LeaseStatus, Failure> {
    let (mut unsettled, mut was_busy) = (false, false);
    let (mut pause, mut last) = (PAUSE, None);
    let mut end = match until {
        Until::Answered(end, _) => end,
        Until::ItsEnd(ttl) => Instant::now() + ttl,
    };
    loop {
        let asked = actor.worker.release(lease.clone(), at_least);
        let answer = match until {
            Until::ItsEnd(_) => asked.await,
            // The answer may take long, for example when many requests wait for a locked table.
            Until::Answered(_, limit) => match timeout_at(limit.into(), asked).await {
                Ok(answer) => answer,
                Err(_elapsed) => return Err(last.unwrap_or_else(|| actor.worker.no_answer(ANSWER_LIMIT))),
            },
        };
        let is_away = matches!(answer, Err(Failure { fault: Fault::Disconnected, .. }));
        if is_away && let Until::ItsEnd(ttl) = until {
            end = Instant::now() + ttl;
        }
        let in_time = Instant::now() < end;
        match answer {
            Ok(LeaseStatus::Busy) if in_time => {
                // Usually another process has the row locked for one statement, so the first retry
                // comes at once.
                if !was_busy {
                    was_busy = true;
                    continue;
                }
            }
            // The answer to an earlier attempt was lost. That attempt may have released the lease,
            // and another process may have taken it since. The secret was ours, so no other lock
            // was touched.
            Ok(LeaseStatus::NotOurs) if unsettled => return Ok(LeaseStatus::Ours),
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
