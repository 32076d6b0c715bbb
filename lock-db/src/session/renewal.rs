//! The watchdog, which renews all leases of a session.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::task::spawn_local;

use super::actor::Actor;
use super::held_lease::HeldLease;
use super::release;
use super::retry::twice;
use crate::database::{Fault, LeaseStatus, Renewal, Renewed};
use crate::error::Loss;
use crate::jitter::jitter;
use crate::session::wakeup::user_lock;

/// How many leases are renewed in one statement.
const BATCH: usize = 500;
/// A renewal without an answer within its interval is repeated on another connection. These bounds
/// apply, so that a lease with a very short TTL does not interrupt the statement of the others.
const SHORTEST_STATEMENT: Duration = Duration::from_secs(1);
const LONGEST_STATEMENT: Duration = Duration::from_secs(5);
/// The pause before a challenged lease is renewed again.
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
/// The pauses after a connection was lost, and between two attempts while the server can't be
/// reached. They keep processes from connecting all at the same moment.
const SOON: Duration = Duration::from_millis(100);
const WHILE_AWAY: Duration = Duration::from_millis(500);

/// Renews every lease at a third of its TTL. Leases that are due at about the same time are renewed
/// together.
pub(super) async fn renew(actor: Rc<Actor>) {
    loop {
        let next = actor.leases.borrow().values().map(|held| held.next_renewal).min();
        let connects = connects_at(&actor);
        select! {
            () = actor.closed() => return,
            () = actor.due.sleep_until(next.into_iter().chain(connects).min()) => {}
        }
        if connects_at(&actor).is_some_and(|at| at <= Instant::now()) {
            connect_ahead(&actor);
        }
        let (together, alone) = take_due(&actor, Instant::now());
        actor.is_renewing.set(true);
        for batch in together.chunks(BATCH).chain(alone.chunks(1)) {
            renew_batch(&actor, batch).await;
        }
        actor.is_renewing.set(false);
    }
}

/// When to open the renewal connection ahead of the first renewal. An open connection notices at
/// once that the server is gone, see `watch_connections`.
fn connects_at(actor: &Actor) -> Option<Instant> {
    if !actor.may_connect_ahead() {
        return None;
    }
    actor.leases.borrow().values().map(HeldLease::second_needed_from).min()
}

/// Opens the renewal connection without a renewal. If this fails, the first renewal connects.
fn connect_ahead(actor: &Rc<Actor>) {
    actor.connects_ahead.set(true);
    let (actor, limit) = (Rc::clone(actor), limit(actor));
    drop(spawn_local(async move {
        if let Err(failure) = actor.renewals.connect(limit).await {
            tracing::debug!(error = %failure, "the connection for renewals could not be made yet");
            if failure.fault == Fault::Disconnected {
                // The connection may have been lost while it was made.
                actor.lost.notify_one();
            }
        }
    }));
}

/// How long a renewal may take. The shortest TTL of all leases counts, because leases that come due
/// next wait behind it.
fn limit(actor: &Actor) -> Duration {
    let shortest = actor.shortest_ttl().map_or(LONGEST_STATEMENT, |ttl| ttl / 3);
    shortest.clamp(SHORTEST_STATEMENT, LONGEST_STATEMENT)
}

/// A lease that is due: its number, and the renewal to send.
type Due = (u64, Renewal);

/// Returns the leases that are due now, and those that will be within a quarter of their interval.
/// They are renewed a little early, so that leases taken at different times end up in the same
/// statement. Leases that a transaction has released are returned separately, and each of them is
/// renewed alone: only its own answer shows how the transaction ended.
fn take_due(actor: &Actor, now: Instant) -> (Vec<Due>, Vec<Due>) {
    let (mut together, mut alone) = (Vec::new(), Vec::new());
    for (&number, held) in &mut *actor.leases.borrow_mut() {
        let interval = held.ttl / 3;
        if held.next_renewal <= now + interval / 4 {
            // The next attempt, in case this one gets no answer.
            held.next_renewal = now + held.pause();
            let due = (number, held.renewal());
            if held.state.is_in_doubt() { alone.push(due) } else { together.push(due) }
        }
    }
    // Neighbours in the table are written together.
    together.sort_unstable_by_key(|(_, renewal)| renewal.id);
    (together, alone)
}

async fn renew_batch(actor: &Rc<Actor>, batch: &[Due]) {
    let leases: Vec<Renewal> = batch.iter().map(|(_, renewal)| renewal.clone()).collect();
    let limit = limit(actor);
    // The renewal connection may be waiting for a user lock. A lease with a short TTL can't wait
    // for the end of that slice, so the other connection is used. After the slice no new one
    // begins.
    let is_second = !user_lock::is_in_the_way(actor);
    let worker = if is_second { &actor.renewals } else { &actor.worker };
    actor.renewing_since.set(Some(Instant::now()));
    // The connection may have been closed while it was idle.
    let mut renewed = twice(async || worker.renew(leases.clone(), limit).await).await;
    actor.renewal_took.set(actor.renewing_since.take().map(|since| since.elapsed()).unwrap_or_default());
    // The server may refuse this process a second connection, because of an account limit for
    // example, or not answer on it.
    match renewed {
        Err(failure) if is_second && failure.fault == Fault::Disconnected => {
            let by_the_first = twice(async || actor.worker.renew(leases.clone(), limit).await).await;
            if by_the_first.is_ok() {
                actor.report_missing_second(&failure);
            }
            renewed = if by_the_first.is_ok() { by_the_first } else { Err(failure) };
        }
        Ok(_) if is_second => actor.report_second_again(),
        _ => {}
    }
    let error = renewed.as_ref().err().map(ToString::to_string);
    let is_news = *actor.not_renewed.borrow() != error;
    actor.not_renewed.replace(error);
    match renewed {
        Ok((Renewed { statuses, read_at }, sent)) => {
            for ((key, _), status) in batch.iter().zip(statuses) {
                match status {
                    LeaseStatus::Ours | LeaseStatus::StillOurs => {
                        if !record_renewal(actor, *key, status, sent) {
                            actor.lose(*key, Loss::NotRenewed);
                        }
                    }
                    // Locked by another transaction, and still ours: renewed again soon.
                    LeaseStatus::Busy => {
                        if let Some(held) = actor.leases.borrow_mut().get_mut(key) {
                            held.record_locked_row(read_at.unwrap_or(sent));
                        }
                    }
                    // It has to be renewed before the notice is over.
                    LeaseStatus::Challenged => {
                        if let Some(held) = actor.leases.borrow_mut().get_mut(key) {
                            held.next_renewal = Instant::now() + SHORTEST_PAUSE;
                        }
                    }
                    // Lost, unless it was released while this renewal was in progress.
                    LeaseStatus::NotOurs => end_not_ours(actor, *key),
                }
            }
        }
        // Without an answer a lease is not lost. It is retried until the deadline, which ends the
        // lease without any answer.
        Err(failure) if failure.passes() || failure.fault == Fault::Disconnected => {
            if failure.fault == Fault::Disconnected {
                renew_within(actor, jitter(WHILE_AWAY), batch.iter().map(|(number, _)| *number));
            }
            tracing::debug!(leases = batch.len(), error = %failure, "leases could not be renewed yet");
        }
        // A failure that is not temporary. Logged once, whatever the number of leases and attempts.
        Err(failure) if is_news => {
            tracing::warn!(leases = batch.len(), error = %failure, "leases can't be renewed: they are lost at their deadlines if that lasts");
        }
        Err(failure) => tracing::debug!(leases = batch.len(), error = %failure, "leases can't be renewed"),
    }
}

/// `false`: its holder has already been told that it is over.
fn record_renewal(actor: &Actor, number: u64, status: LeaseStatus, sent: Instant) -> bool {
    let mut leases = actor.leases.borrow_mut();
    let Some(held) = leases.get_mut(&number) else { return true };
    if status == LeaseStatus::Ours {
        held.state.confirm(sent);
    }
    held.record_renewal(sent)
}

/// The row is not ours: a transaction that released it has committed, or another process has taken
/// it over.
fn end_not_ours(actor: &Rc<Actor>, number: u64) {
    let state = actor.leases.borrow().get(&number).map(|held| Arc::clone(&held.state));
    let Some(state) = state else { return };
    if state.is_in_doubt() {
        actor.lose(number, Loss::Released);
        actor.notify_next(&state.key.row.name);
    } else {
        actor.report_takeover(&state);
    }
}

/// After a connection was lost, all leases are renewed at once instead of when they are due. The
/// server may have been replaced by one that does not know the last grants (an asynchronous
/// failover). If a lease is unknown there, its holder is told before another process has had the
/// lock for long.
pub(super) async fn watch_connections(actor: Rc<Actor>) {
    loop {
        select! {
            () = actor.closed() => return,
            () = actor.lost.notified() => {}
        }
        renew_within(&actor, jitter(SOON), tokens(&actor));
    }
}

fn tokens(actor: &Actor) -> Vec<u64> {
    actor.leases.borrow().keys().copied().collect()
}

fn renew_within(actor: &Actor, pause: Duration, leases: impl IntoIterator<Item = u64>) {
    let next = Instant::now() + pause;
    for number in leases {
        if let Some(held) = actor.leases.borrow_mut().get_mut(&number) {
            held.next_renewal = held.next_renewal.min(next);
        }
    }
    actor.due.no_later_than(next);
}

/// Ends every lease that was not renewed by its deadline, whatever the database and the network do.
/// Also ends each lease that its holder has had for as long as it may.
pub(super) async fn watch_deadlines(actor: Rc<Actor>) {
    loop {
        let next = actor.leases.borrow().values().map(HeldLease::ends).min();
        select! {
            () = actor.closed() => return,
            () = actor.over.sleep_until(next) => {}
        }
        let now = Instant::now();
        let ends = |(&key, held): (&u64, &HeldLease)| {
            if held.state.is_held_too_long() {
                return Some((key, Loss::HeldTooLong));
            }
            (held.deadline <= now).then_some((key, Loss::NotRenewed))
        };
        let over: Vec<_> = actor.leases.borrow().iter().filter_map(ends).collect();
        for (key, loss) in over {
            if loss == Loss::HeldTooLong {
                release::take_back(&actor, key);
            } else {
                actor.lose(key, loss);
            }
        }
    }
}
