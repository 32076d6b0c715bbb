//! The callers of a process that wait for the same name: first come, first served, and only the first one asks the
//! database.
//!
//! What is given back goes to the next of them by the hand of whoever gives it back, without the session's thread: the
//! lease itself while it may be handed on, else the turn to ask for it. So these queues are shared by all threads.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, mpsc};

use super::acquire::ACTION;
use super::lease_state::LeaseState;
use super::request::{Acquire, Request};
use crate::error::{Failure, WaitingFor};
use crate::insert::Hold;
use crate::name::Name;
use crate::secret::{Secret, SecretSource};
use crate::sync::{AtomicU64, HashMap, Mutex, MutexGuard, sleep_until};
use crate::{Error, LockInfo};

/// Names without number are a pattern of their own (`order:{id}`), so what is known of them is bounded.
const MOST_NOT_HANDED_ON: usize = 10_000;

/// How far a lease goes from hand to hand before other processes get their chance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HandOff {
    /// How many holders in a row may have it, the first one included, when other processes wait.
    pub(crate) turns: u32,
    /// How long after the grant it may be handed on.
    pub(crate) time: Duration,
}

impl HandOff {
    /// When nobody waited anywhere else at the time of the grant.
    pub(crate) fn most_turns(self) -> u32 {
        self.turns.saturating_mul(if self.turns > 1 { 4 } else { 1 })
    }
}

#[derive(Debug)]
pub(crate) struct Queues {
    state: Mutex<State>,
    last_number: AtomicU64,
    hand_off: HandOff,
    reports: Reports,
    /// With what the process stands in the queues of all rows.
    place: Secret,
    secrets: SecretSource,
    /// Weak: the session ends when nobody else can send any more.
    session: mpsc::WeakUnboundedSender<Request>,
    /// A waiter came whose wait is over before that of all others.
    sooner: Notify,
}

/// What reports to callers are made of.
#[derive(Debug)]
pub(super) struct Reports {
    /// This process, as others see it.
    pub(super) owner: Arc<str>,
    /// For a database that has not answered for so long.
    pub(super) no_answer: fn(Duration) -> Failure,
}

#[derive(Debug, Default)]
struct State {
    /// An entry for each name whose turn is taken.
    names: HashMap<Name, Line>,
    /// Those whose leases go from holder to holder by the database.
    not_handed_on: HashSet<Name>,
    /// No wait is over before then.
    next_deadline: Option<Instant>,
    closed: bool,
}

/// The callers behind the one that has the turn for a name.
#[derive(Debug, Default)]
struct Line {
    /// In the order in which they came.
    waiting: BTreeMap<u64, Acquire>,
    /// What the one in front of them knows.
    front: Front,
}

/// What the caller that has the turn for a name knows of the lock. Those behind it know no more: that the lock is held is said only of
/// what was seen to be held.
#[derive(Debug, Default)]
pub(super) enum Front {
    /// It asks the database, which has not told anything yet.
    #[default]
    Asks,
    /// The lock is held by another process, or others are to have it first.
    IsHeldElsewhere(Option<Box<LockInfo>>),
    /// The database was not to be had the last time.
    Fails(Failure),
    /// This process has it.
    Holds(Arc<LeaseState>),
}

impl Front {
    fn is_held(&self) -> bool {
        matches!(self, Self::IsHeldElsewhere(_) | Self::Holds(_))
    }
}

impl Queues {
    pub(super) fn new(
        session: mpsc::WeakUnboundedSender<Request>,
        hand_off: HandOff,
        place: Secret,
        reports: Reports,
    ) -> Arc<Self> {
        let (state, last_number) = (Mutex::default(), AtomicU64::new(0));
        let (secrets, sooner) = (SecretSource::default(), Notify::new());
        Arc::new(Self { state, last_number, hand_off, reports, place, secrets, session, sooner })
    }

    pub(crate) fn hand_off(&self) -> HandOff {
        self.hand_off
    }

    /// This process, as others see it.
    pub(super) fn owner(&self) -> Arc<str> {
        Arc::clone(&self.reports.owner)
    }

    /// For one claim.
    pub(super) fn draw_secret(&self) -> Result<Secret, Error> {
        self.secrets.draw()
    }

    pub(super) fn place(&self) -> &Secret {
        &self.place
    }

    /// Where a caller stands in all of its queues.
    pub(super) fn number(&self) -> u64 {
        self.last_number.fetch_add(1, Ordering::Relaxed)
    }

    /// Asks the database as soon as all turns are there that it takes. A try does not wait for a lock that is held.
    pub(super) fn enter(self: &Arc<Self>, mut request: Acquire) {
        let mut state = self.state();
        if state.closed {
            drop(state);
            let _caller_has_gone = request.answer.send(Err(Error::Closed));
            return;
        }
        while let Some(claim) = request.claims.get(request.turns.len()) {
            let name = claim.name.clone();
            match state.names.entry(name.clone()) {
                Entry::Vacant(free) => {
                    free.insert(Line::default());
                    request.turns.push(Turn { name, queues: Arc::clone(self) });
                }
                Entry::Occupied(mut line) => {
                    if request.wait.is_none() && line.get().front.is_held() {
                        drop(state);
                        let _caller_has_gone = request.answer.send(Ok(None));
                        return;
                    }
                    let deadline = request.deadline();
                    // Its caller leaves all queues after that, so it is found here or says so by now.
                    if request.answer.is_closed() {
                        drop(state);
                        return;
                    }
                    line.get_mut().waiting.insert(request.number, request);
                    if state.next_deadline.is_none_or(|next| deadline < next) {
                        state.next_deadline = Some(deadline);
                        self.sooner.notify_one();
                    }
                    return;
                }
            }
        }
        drop(state);
        let sent = match self.session.upgrade() {
            Some(session) => session.send(Request::Acquire(request)).map_err(|unsent| unsent.0),
            None => Err(Request::Acquire(request)),
        };
        if let Err(unsent) = sent {
            // Its thread is gone. All of them at once: one after the other they would be answered from within each other.
            self.close();
            if let Request::Acquire(request) = unsent {
                let _caller_has_gone = request.answer.send(Err(Error::Closed));
            }
        }
    }

    /// A caller has gone. Whatever it got by now is not here any more.
    pub(super) fn leave<'a>(&self, number: u64, names: impl IntoIterator<Item = &'a Name>) {
        let mut state = self.state();
        let waiting = names.into_iter().find_map(|name| state.names.get_mut(name)?.waiting.remove(&number));
        drop(state);
        // With the turns that it had already.
        drop(waiting);
    }

    /// Whether somebody waits for a name whose turn is taken.
    pub(super) fn somebody_waits(&self, name: &str) -> bool {
        self.state().names.get(name).is_some_and(|line| !line.waiting.is_empty())
    }

    /// Whether whoever has the turn next keeps to the queue of the row.
    pub(super) fn next_is_fair(&self, name: &str) -> bool {
        let state = self.state();
        let mut waiting = state.names.get(name).into_iter().flat_map(|line| line.waiting.values());
        let next = waiting.find(|waiting| !waiting.answer.is_closed());
        next.is_some_and(|next| matches!(&*next.claims, [claim] if claim.place.is_some()))
    }

    /// Whether somebody has the turn for a name.
    pub(super) fn is_taken(&self, name: &str) -> bool {
        self.state().names.contains_key(name)
    }

    /// The leases of a name go by the database from now on.
    pub(crate) fn hand_on_no_more(&self, name: &Name) {
        let mut state = self.state();
        if state.not_handed_on.len() >= MOST_NOT_HANDED_ON {
            state.not_handed_on.clear();
        }
        state.not_handed_on.insert(name.clone());
    }

    /// Gives a lease that its holder is done with to the next waiter. `false`: it has to be released.
    pub(crate) fn hand_on(&self, hold: &Hold) -> bool {
        let now = Instant::now();
        while hold.may_be_handed_on(now, self.hand_off.time) && hold.lease.is_given_up() {
            let Some(waiter) = self.first_waiter_for(hold) else { return false };
            if let Some(until) = hold.lease.is_handed_on(now, waiter.at_most)
                && let Some(session) = self.session.upgrade()
            {
                // Whose watch sleeps until something earlier, perhaps.
                let _session_may_be_gone = session.send(Request::HandedOn { until });
            }
            match waiter.answer.send(Ok(Some(vec![hold.successor()]))) {
                Ok(()) => return true,
                // The waiter has gone in this very moment: to the one behind.
                Err(unsent) => unsent.into_iter().flatten().flatten().for_each(Hold::forget),
            }
        }
        false
    }

    /// The first in the queue, if a lease like this one is what it waits for.
    fn first_waiter_for(&self, hold: &Hold) -> Option<Acquire> {
        let mut gone = Vec::new();
        let mut state = self.state();
        if state.closed || state.not_handed_on.contains(hold.name()) {
            return None;
        }
        let line = &mut state.names.get_mut(hold.name())?.waiting;
        let first = loop {
            let first = line.first_entry()?;
            if first.get().answer.is_closed() {
                gone.push(first.remove());
                continue;
            }
            let [claim] = &*first.get().claims else { return None };
            let same = claim.ttl == hold.ttl();
            break same.then(|| first.remove());
        };
        drop(state);
        drop(gone);
        first
    }

    /// This process has a lease, whose turn goes with it.
    pub(super) fn is_held(&self, lease: &Arc<LeaseState>) {
        self.learn(lease.name(), Front::Holds(Arc::clone(lease)));
    }

    /// What the caller with the turn for a name has learned. When the lock is held, those who only try are told; and those whose wait
    /// is over already, whatever it is.
    pub(super) fn learn(&self, name: &str, front: Front) {
        let mut state = self.state();
        let Some(line) = state.names.get_mut(name) else { return };
        let before = std::mem::replace(&mut line.front, front);
        let mut answers = Vec::new();
        if !line.waiting.is_empty() {
            let (now, Line { waiting, front }) = (Instant::now(), line);
            let is_told = |waiting: &Acquire| match waiting.wait {
                None => front.is_held(),
                Some(_) => waiting.deadline() <= now,
            };
            for (_, waiting) in waiting.extract_if(.., |_, waiting| is_told(waiting)) {
                let answer =
                    if waiting.wait.is_none() { Ok(None) } else { Err(self.timed_out(&waiting, front)) };
                answers.push((waiting, answer));
            }
        }
        drop(state);
        drop(before);
        for (waiting, answer) in answers {
            let Acquire { answer: asks, turns, .. } = waiting;
            let _caller_has_gone = asks.send(answer);
            drop(turns);
        }
    }

    /// The turn goes to the next one.
    fn pass(self: &Arc<Self>, name: &Name) {
        let mut gone = Vec::new();
        let mut state = self.state();
        let Some(line) = state.names.get_mut(name) else { return };
        let next = loop {
            match line.waiting.pop_first() {
                Some((_, first)) if first.answer.is_closed() => gone.push(first),
                Some((_, first)) => break Some(first),
                None => break None,
            }
        };
        let before = std::mem::take(&mut line.front);
        if next.is_none() {
            state.names.remove(name);
        }
        drop(state);
        drop((gone, before));
        if let Some(mut next) = next {
            next.turns.push(Turn { name: name.clone(), queues: Arc::clone(self) });
            self.enter(next);
        }
    }

    /// Answers those whose wait is over, for ever.
    pub(super) async fn watch_waits(&self) {
        loop {
            let next = self.state().next_deadline;
            let over = async {
                match next {
                    Some(next) => sleep_until(next.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = over => self.answer_those_whose_wait_is_over(),
                () = self.sooner.notified() => {}
            }
        }
    }

    fn answer_those_whose_wait_is_over(&self) {
        let now = Instant::now();
        let mut over = Vec::new();
        let mut state = self.state();
        let mut next = None;
        for Line { waiting, front } in state.names.values_mut() {
            let asks = matches!(front, Front::Asks);
            // Not before it could be known whether the lock is held at all.
            let is_over =
                |waiting: &Acquire| waiting.deadline() <= now && !(asks && now < waiting.first_answer());
            for (_, waiting) in waiting.extract_if(.., |_, waiting| is_over(waiting)) {
                let error = self.timed_out(&waiting, front);
                over.push((waiting, error));
            }
            let next_look = |waiting: &Acquire| {
                let deadline = waiting.deadline();
                if deadline > now { deadline } else { waiting.first_answer() }
            };
            let earliest = waiting.values().map(next_look).min();
            next = [next, earliest].into_iter().flatten().min();
        }
        state.next_deadline = next;
        drop(state);
        for (waiting, error) in over {
            let _caller_has_gone = waiting.answer.send(Err(error));
        }
    }

    /// For a caller whose wait is over before its turn has come.
    fn timed_out(&self, waiting: &Acquire, front: &Front) -> Error {
        let name = waiting.claims.get(waiting.turns.len()).map(|claim| &claim.name);
        let waited = waiting.started.elapsed();
        let held_by = match front {
            Front::Holds(lease) => Some(Box::new(lease.info(&self.reports.owner))),
            Front::IsHeldElsewhere(info) => info.clone(),
            Front::Fails(failure) => {
                return failure.another().into_error(ACTION, name).within(waiting.wait);
            }
            Front::Asks => return (self.reports.no_answer)(waited).into_error(ACTION, name),
        };
        let name = name.map(Name::given).unwrap_or_default();
        Error::Timeout { name, waited, waiting_for: WaitingFor::Lock, held_by }
    }

    /// Answers everybody, and lets nobody in any more.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        let waiting: Vec<_> =
            state.names.values_mut().map(|line| std::mem::take(&mut line.waiting)).collect();
        drop(state);
        for (_, waiting) in waiting.into_iter().flatten() {
            let _caller_has_gone = waiting.answer.send(Err(Error::Closed));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to ask the database for a name. It is kept as long as the lease, and dropping it lets the next waiter of
/// this process ask.
#[derive(Debug)]
pub(crate) struct Turn {
    name: Name,
    queues: Arc<Queues>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.queues.pass(&self.name);
    }
}

#[cfg(all(test, lock_db_shuttle))]
mod interleavings;
