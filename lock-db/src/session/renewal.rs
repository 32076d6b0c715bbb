//! The watchdog: one for all leases of a session.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::task::spawn_local;

use super::baton;
use super::core::{Core, Held, twice};
use super::release;
use crate::database::{Fault, Renewal, Renewed, Standing};
use crate::error::Loss;
use crate::jitter::jitter;

/// How many leases travel in one statement.
const BATCH: usize = 500;
/// A renewal that has no answer in its interval is made again on another connection; within these bounds, so that a
/// lease with a very short TTL does not cut off the others' statement.
const SHORTEST_STATEMENT: Duration = Duration::from_secs(1);
const LONGEST_STATEMENT: Duration = Duration::from_secs(5);
/// Before a lease is asked for again whose notice is running.
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
/// After a connection was lost, so that not all processes come at the same moment; and between two attempts while
/// the server can't be reached.
const SOON: Duration = Duration::from_millis(100);
const WHILE_AWAY: Duration = Duration::from_millis(500);

/// Renews every lease at a third of its TTL, those that are due at about the same time together.
pub(super) async fn renew(core: Rc<Core>) {
    loop {
        let next = core.leases.borrow().values().map(|held| held.next_renewal).min();
        let connects = connects_at(&core);
        select! {
            () = core.closed() => return,
            () = core.due.sleep_until(next.into_iter().chain(connects).min()) => {}
        }
        if connects_at(&core).is_some_and(|at| at <= Instant::now()) {
            connect_ahead(&core);
        }
        let (together, alone) = take_due(&core, Instant::now());
        core.is_renewing.set(true);
        for batch in together.chunks(BATCH).chain(alone.chunks(1)) {
            renew_batch(&core, batch).await;
        }
        core.is_renewing.set(false);
    }
}

/// When the connection is made ahead of the first renewal: it notices at once that the server has gone, see `watch_connections`.
fn connects_at(core: &Core) -> Option<Instant> {
    if !core.may_connect_ahead() {
        return None;
    }
    core.leases.borrow().values().map(Held::is_held_on).min()
}

/// Renews nothing. When it fails the first renewal connects.
fn connect_ahead(core: &Rc<Core>) {
    core.connects_ahead.set(true);
    let (core, limit) = (Rc::clone(core), limit(core));
    drop(spawn_local(async move {
        if let Err(failure) = core.renewals.connect(limit).await {
            tracing::debug!(error = %failure, "the connection for renewals could not be made yet");
            if failure.fault == Fault::Disconnected {
                // It may have been lost while it was made.
                core.lost.notify_one();
            }
        }
    }));
}

/// How long a renewal may take. Of all leases: those that come due next wait behind it.
fn limit(core: &Core) -> Duration {
    let shortest = core.shortest_ttl().map_or(LONGEST_STATEMENT, |ttl| ttl / 3);
    shortest.clamp(SHORTEST_STATEMENT, LONGEST_STATEMENT)
}

/// A lease that is due: its number, and what to ask for.
type Due = (u64, Renewal);

/// The leases that are due now, and those that will be within a quarter of their interval: a little early, so that
/// leases taken at different times end up in the same statement. Apart from them those that a transaction has released,
/// of which each is asked for alone: no answer but its own tells how the transaction ended.
fn take_due(core: &Core, now: Instant) -> (Vec<Due>, Vec<Due>) {
    let (mut together, mut alone) = (Vec::new(), Vec::new());
    for (&number, held) in &mut *core.leases.borrow_mut() {
        let interval = held.ttl / 3;
        if held.next_renewal <= now + interval / 4 {
            // The next attempt, in case nothing is heard of this one.
            held.next_renewal = now + held.pause();
            let due = (number, held.renewal());
            if held.state.is_in_doubt() { alone.push(due) } else { together.push(due) }
        }
    }
    // Neighbours in the table, so that what is written lies together.
    together.sort_unstable_by_key(|(_, renewal)| renewal.id);
    (together, alone)
}

async fn renew_batch(core: &Rc<Core>, batch: &[Due]) {
    let leases: Vec<Renewal> = batch.iter().map(|(_, renewal)| renewal.clone()).collect();
    let limit = limit(core);
    // One with a short TTL can't wait for the end of the slice; after that slice it need not.
    let is_second = !baton::is_in_the_way(core);
    let lane = if is_second { &core.renewals } else { &core.lane };
    core.renewing_since.set(Some(Instant::now()));
    // The connection may have been closed while it was idle.
    let mut renewed = twice(async || lane.renew(leases.clone(), limit).await).await;
    core.renewal_took.set(core.renewing_since.take().map(|since| since.elapsed()).unwrap_or_default());
    // A server that lets this process have no second connection, because of a limit of its account say; or nothing but silence there.
    match renewed {
        Err(failure) if is_second && failure.fault == Fault::Disconnected => {
            let by_the_first = twice(async || core.lane.renew(leases.clone(), limit).await).await;
            if by_the_first.is_ok() {
                core.misses_second(&failure);
            }
            renewed = if by_the_first.is_ok() { by_the_first } else { Err(failure) };
        }
        Ok(_) if is_second => core.has_second(),
        _ => {}
    }
    let error = renewed.as_ref().err().map(ToString::to_string);
    let is_news = *core.not_renewed.borrow() != error;
    core.not_renewed.replace(error);
    match renewed {
        Ok((Renewed { standings, looked }, sent)) => {
            for ((key, _), standing) in batch.iter().zip(standings) {
                match standing {
                    Standing::Ours | Standing::StillOurs => {
                        if !was_renewed(core, *key, standing, sent) {
                            core.lose(*key, Loss::NotRenewed);
                        }
                    }
                    // Locked by another transaction, and still ours: asked again soon.
                    Standing::Busy => {
                        if let Some(held) = core.leases.borrow_mut().get_mut(key) {
                            held.not_renewed(looked.unwrap_or(sent));
                        }
                    }
                    // It has to be renewed before the notice is over.
                    Standing::Challenged => {
                        if let Some(held) = core.leases.borrow_mut().get_mut(key) {
                            held.next_renewal = Instant::now() + SHORTEST_PAUSE;
                        }
                    }
                    // Unless it was released while this was under way.
                    Standing::NotOurs => is_gone(core, *key),
                }
            }
        }
        // Not heard is not lost: asked again until the deadline, which ends the lease without any answer.
        Err(failure) if failure.passes() || failure.fault == Fault::Disconnected => {
            if failure.fault == Fault::Disconnected {
                renew_within(core, jitter(WHILE_AWAY), batch.iter().map(|(number, _)| *number));
            }
            tracing::debug!(leases = batch.len(), error = %failure, "leases could not be renewed yet");
        }
        // That does not look as if it would pass. Said once, however many leases and attempts there are.
        Err(failure) if is_news => {
            tracing::warn!(leases = batch.len(), error = %failure, "leases can't be renewed: they are lost at their deadlines if that lasts");
        }
        Err(failure) => tracing::debug!(leases = batch.len(), error = %failure, "leases can't be renewed"),
    }
}

/// `false` when its holder has been told that it is over.
fn was_renewed(core: &Core, number: u64, standing: Standing, sent: Instant) -> bool {
    let mut leases = core.leases.borrow_mut();
    let Some(held) = leases.get_mut(&number) else { return true };
    if standing == Standing::Ours {
        held.state.confirm(sent);
    }
    held.renewed(sent)
}

/// The row is not ours: a transaction that released it has committed, or another process was quicker.
fn is_gone(core: &Rc<Core>, number: u64) {
    let state = core.leases.borrow().get(&number).map(|held| Arc::clone(&held.state));
    let Some(state) = state else { return };
    if state.is_in_doubt() {
        core.lose(number, Loss::Released);
        core.call_next(&state.key.row.name);
    } else {
        core.is_taken_over(&state);
    }
}

/// The server behind a connection that was lost may have been replaced by one that has not heard of the last grants (an asynchronous
/// failover). So all leases are renewed at once, and not only when they are due: a holder whose lease is not known there is told
/// before another process has had it for long.
pub(super) async fn watch_connections(core: Rc<Core>) {
    loop {
        select! {
            () = core.closed() => return,
            () = core.lost.notified() => {}
        }
        renew_within(&core, jitter(SOON), numbers(&core));
    }
}

fn numbers(core: &Core) -> Vec<u64> {
    core.leases.borrow().keys().copied().collect()
}

fn renew_within(core: &Core, pause: Duration, leases: impl IntoIterator<Item = u64>) {
    let next = Instant::now() + pause;
    for number in leases {
        if let Some(held) = core.leases.borrow_mut().get_mut(&number) {
            held.next_renewal = held.next_renewal.min(next);
        }
    }
    core.due.no_later_than(next);
}

/// Ends every lease that was not renewed by its deadline, whatever the database and the network do; and each that its holder has had for
/// as long as it may.
pub(super) async fn watch_deadlines(core: Rc<Core>) {
    loop {
        let next = core.leases.borrow().values().map(Held::ends).min();
        select! {
            () = core.closed() => return,
            () = core.over.sleep_until(next) => {}
        }
        let now = Instant::now();
        let ends = |(&key, held): (&u64, &Held)| {
            if held.state.is_held_too_long() {
                return Some((key, Loss::HeldTooLong));
            }
            (held.deadline <= now).then_some((key, Loss::NotRenewed))
        };
        let over: Vec<_> = core.leases.borrow().iter().filter_map(ends).collect();
        for (key, loss) in over {
            if loss == Loss::HeldTooLong {
                release::take_back(&core, key);
            } else {
                core.lose(key, loss);
            }
        }
    }
}
