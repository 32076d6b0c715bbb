//! Local queues: the callers of this process that wait for the same name. They are served in order,
//! and only the first one of each name asks the database.
//!
//! A caller that releases a lease hands it directly to the next waiter, without the session's
//! thread, as long as the lease may be handed on. Otherwise it passes on the permit to ask for the
//! lease. For this reason all threads share the queues.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::futures::Notified;
use tokio::sync::{Notify, mpsc};

use super::acquire::ACTION;
use super::lease_state::LeaseState;
use super::request::{Acquire, Request};
use crate::database::Failure;
use crate::error::WaitingFor;
use crate::name::Name;
use crate::options::{HandOffLimits, Wait};
use crate::secret::{Secret, SecretSource};
use crate::session::LeaseHandle;
use crate::sync::{AtomicU64, HashMap, Mutex, MutexGuard, sleep_until};
use crate::{Error, LockInfo};

/// Lock names are unbounded (`order:{id}`), so this set is capped.
const MOST_NOT_HANDED_ON: usize = 10_000;

#[derive(Debug)]
pub(crate) struct LocalQueues {
    state: Mutex<QueueState>,
    last_number: AtomicU64,
    hand_off: HandOffLimits,
    reports: Reports,
    /// Identifies this process in the wait queues of all rows.
    queue_secret: Secret,
    secrets: SecretSource,
    /// Weak, so that the session ends when all other senders are gone.
    session: mpsc::WeakUnboundedSender<Request>,
    /// Notified when a waiter arrives whose deadline is earlier than all others.
    sooner: Notify,
    /// Notified when any waiter arrives.
    arrived: Notify,
}

/// Data for the errors that callers get.
#[derive(Debug)]
pub(super) struct Reports {
    /// This process, as other processes see it.
    pub(super) owner: Arc<str>,
    /// Builds the failure for a database that has not answered for the given time.
    pub(super) no_answer: fn(Duration) -> Failure,
}

#[derive(Debug, Default)]
struct QueueState {
    /// One entry for each name whose permit is taken.
    names: HashMap<Name, NameQueue>,
    /// Names whose leases are released to the database instead of handed on.
    not_handed_on: HashSet<Name>,
    /// No waiter has an earlier deadline.
    next_deadline: Option<Instant>,
    closed: bool,
}

/// The callers behind the one that has the permit for a name.
#[derive(Debug, Default)]
struct NameQueue {
    /// In the order of arrival.
    waiting: BTreeMap<u64, Acquire>,
    /// What the caller that has the permit knows.
    front: Front,
}

/// What the caller that has the permit for a name knows of the lock. The callers behind it know no
/// more. A lock is reported as held only if it was seen to be held.
#[derive(Debug, Default)]
pub(super) enum Front {
    /// It asks the database, which has not answered yet.
    #[default]
    Asks,
    /// Another process holds the lock, or other processes are ahead in the queue.
    IsHeldElsewhere(Option<Box<LockInfo>>),
    /// The last attempt to ask the database failed.
    Fails(Failure),
    /// This process holds the lock.
    Holds(Arc<LeaseState>),
}

impl Front {
    fn is_held(&self) -> bool {
        matches!(self, Self::IsHeldElsewhere(_) | Self::Holds(_))
    }
}

impl LocalQueues {
    pub(super) fn new(
        session: mpsc::WeakUnboundedSender<Request>,
        hand_off: HandOffLimits,
        queue_secret: Secret,
        reports: Reports,
    ) -> Arc<Self> {
        let (state, last_number) = (Mutex::default(), AtomicU64::new(0));
        let secrets = SecretSource::default();
        let (sooner, arrived) = (Notify::new(), Notify::new());
        Arc::new(Self {
            state,
            last_number,
            hand_off,
            reports,
            queue_secret,
            secrets,
            session,
            sooner,
            arrived,
        })
    }

    pub(crate) fn hand_off(&self) -> HandOffLimits {
        self.hand_off
    }

    /// This process, as other processes see it.
    pub(super) fn owner(&self) -> Arc<str> {
        Arc::clone(&self.reports.owner)
    }

    /// Draws the secret of one claim.
    pub(super) fn draw_secret(&self) -> Result<Secret, Error> {
        self.secrets.draw()
    }

    pub(super) fn queue_secret(&self) -> &Secret {
        &self.queue_secret
    }

    /// Draws the number that orders a caller in all of its queues.
    pub(super) fn number(&self) -> u64 {
        self.last_number.fetch_add(1, Ordering::Relaxed)
    }

    /// Queues a request. The database is asked as soon as the request has the permits of all its
    /// names. A try does not wait for a lock that is held.
    pub(super) fn enter(self: &Arc<Self>, mut request: Acquire) {
        let mut state = self.state();
        if state.closed {
            drop(state);
            let _caller_has_gone = request.answer.send(Err(Error::Closed));
            return;
        }
        while let Some(claim) = request.claims.get(request.permits.len()) {
            let name = claim.name.clone();
            match state.names.entry(name.clone()) {
                Entry::Vacant(free) => {
                    free.insert(NameQueue::default());
                    request.permits.push(Permit { name, queues: Arc::clone(self) });
                }
                Entry::Occupied(mut line) => {
                    if request.wait.is_try() && line.get().front.is_held() {
                        drop(state);
                        let _caller_has_gone = request.answer.send(Ok(None));
                        return;
                    }
                    let deadline = request.deadline();
                    // A caller closes its channel before it leaves the queues. So either the
                    // channel is closed here, or `leave` finds the request.
                    if request.answer.is_closed() {
                        drop(state);
                        return;
                    }
                    line.get_mut().waiting.insert(request.number, request);
                    if state.next_deadline.is_none_or(|next| deadline < next) {
                        state.next_deadline = Some(deadline);
                        self.sooner.notify_one();
                    }
                    self.arrived.notify_waiters();
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
            // The session's thread is gone. All waiters are answered together: an answer drops
            // permits, and each of them would call `enter` again for the next waiter.
            self.close();
            if let Request::Acquire(request) = unsent {
                let _caller_has_gone = request.answer.send(Err(Error::Closed));
            }
        }
    }

    /// Removes the request of a caller that has gone. A request that has been answered is not in
    /// the queues any more.
    pub(super) fn leave<'a>(&self, number: u64, names: impl IntoIterator<Item = &'a Name>) {
        let mut state = self.state();
        let waiting = names.into_iter().find_map(|name| state.names.get_mut(name)?.waiting.remove(&number));
        drop(state);
        // This also drops the permits that it already had.
        drop(waiting);
    }

    /// Resolves when a caller begins to wait, for whatever name, after this was called.
    pub(super) fn arrival(&self) -> Notified<'_> {
        self.arrived.notified()
    }

    /// Whether a caller waits for a name whose permit is taken.
    pub(super) fn has_waiters(&self, name: &str) -> bool {
        self.state().names.get(name).is_some_and(|line| !line.waiting.is_empty())
    }

    /// Whether the next caller that gets the permit is fair, and so uses the queue of the row.
    pub(super) fn next_is_fair(&self, name: &str) -> bool {
        let state = self.state();
        let mut waiting = state.names.get(name).into_iter().flat_map(|line| line.waiting.values());
        let next = waiting.find(|waiting| !waiting.answer.is_closed());
        next.is_some_and(|next| matches!(&*next.claims, [claim] if claim.entry.is_some()))
    }

    /// Whether a caller has the permit for a name.
    pub(super) fn is_taken(&self, name: &str) -> bool {
        self.state().names.contains_key(name)
    }

    /// From now on the leases of a name are released to the database instead of handed on.
    pub(crate) fn stop_hand_on(&self, name: &Name) {
        let mut state = self.state();
        if state.not_handed_on.len() >= MOST_NOT_HANDED_ON {
            state.not_handed_on.clear();
        }
        state.not_handed_on.insert(name.clone());
    }

    /// Hands a lease that its holder is done with to the next waiter. `false`: it has to be
    /// released.
    pub(crate) fn hand_on(&self, handle: &LeaseHandle) -> bool {
        let now = Instant::now();
        while handle.may_be_handed_on(now, self.hand_off.time) && handle.lease.end_hold() {
            let Some(waiter) = self.first_waiter_for(handle) else { return false };
            if let Some(until) = handle.lease.begin_next_hold(now, waiter.at_most)
                && let Some(session) = self.session.upgrade()
            {
                // The deadline watch of the session may sleep past `until`.
                let _session_may_be_gone = session.send(Request::HandedOn { until });
            }
            match waiter.answer.send(Ok(Some(vec![handle.successor()]))) {
                Ok(()) => return true,
                // The waiter has gone at this moment: try the one behind it.
                Err(unsent) => unsent.into_iter().flatten().flatten().for_each(LeaseHandle::forget),
            }
        }
        false
    }

    /// Removes and returns the first waiter, if it waits for a lease like this one.
    fn first_waiter_for(&self, handle: &LeaseHandle) -> Option<Acquire> {
        let mut gone = Vec::new();
        let mut state = self.state();
        if state.closed || state.not_handed_on.contains(handle.name()) {
            return None;
        }
        let line = &mut state.names.get_mut(handle.name())?.waiting;
        let first = loop {
            let first = line.first_entry()?;
            if first.get().answer.is_closed() {
                gone.push(first.remove());
                continue;
            }
            let [claim] = &*first.get().claims else { return None };
            let same = claim.ttl == handle.ttl();
            break same.then(|| first.remove());
        };
        drop(state);
        drop(gone);
        first
    }

    /// This process holds a lease, and the permit stays with it.
    pub(super) fn set_lease(&self, lease: &Arc<LeaseState>) {
        self.learn(lease.name(), Front::Holds(Arc::clone(lease)));
    }

    /// Records what the caller with the permit for a name has learned. If the lock is held, tries
    /// are answered. Waiters whose deadline has passed are answered in any case.
    pub(super) fn learn(&self, name: &str, front: Front) {
        let mut state = self.state();
        let Some(line) = state.names.get_mut(name) else { return };
        let before = std::mem::replace(&mut line.front, front);
        let mut answers = Vec::new();
        if !line.waiting.is_empty() {
            let (now, NameQueue { waiting, front }) = (Instant::now(), line);
            let is_told = |waiting: &Acquire| match waiting.wait {
                Wait::Try => front.is_held(),
                Wait::Within(_) => waiting.deadline() <= now,
            };
            for (_, waiting) in waiting.extract_if(.., |_, waiting| is_told(waiting)) {
                let answer =
                    if waiting.wait.is_try() { Ok(None) } else { Err(self.timed_out(&waiting, front)) };
                answers.push((waiting, answer));
            }
        }
        drop(state);
        drop(before);
        for (waiting, answer) in answers {
            let Acquire { answer: asks, permits, .. } = waiting;
            let _caller_has_gone = asks.send(answer);
            drop(permits);
        }
    }

    /// Passes the permit to the next caller.
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
            next.permits.push(Permit { name: name.clone(), queues: Arc::clone(self) });
            self.enter(next);
        }
    }

    /// Answers the waiters whose deadline has passed. Never returns.
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
        for NameQueue { waiting, front } in state.names.values_mut() {
            let asks = matches!(front, Front::Asks);
            // Until the database has answered, a waiter gets at least the time for a first answer.
            let is_over =
                |waiting: &Acquire| waiting.deadline() <= now && !(asks && now < waiting.first_answer());
            for (_, waiting) in waiting.extract_if(.., |_, waiting| is_over(waiting)) {
                let error = self.timed_out(&waiting, front);
                over.push((waiting, error));
            }
            let next_read = |waiting: &Acquire| {
                let deadline = waiting.deadline();
                if deadline > now { deadline } else { waiting.first_answer() }
            };
            let earliest = waiting.values().map(next_read).min();
            next = [next, earliest].into_iter().flatten().min();
        }
        state.next_deadline = next;
        drop(state);
        for (waiting, error) in over {
            let _caller_has_gone = waiting.answer.send(Err(error));
        }
    }

    /// The error for a caller whose wait ends before it has the permit.
    fn timed_out(&self, waiting: &Acquire, front: &Front) -> Error {
        let name = waiting.claims.get(waiting.permits.len()).map(|claim| &claim.name);
        let waited = waiting.started.elapsed();
        let held_by = match front {
            Front::Holds(lease) => Some(Box::new(lease.info(&self.reports.owner))),
            Front::IsHeldElsewhere(info) => info.clone(),
            Front::Fails(failure) => {
                return failure.clone().into_error(ACTION, name).within(waiting.wait.limit());
            }
            Front::Asks => return (self.reports.no_answer)(waited).into_error(ACTION, name),
        };
        let name = name.map(Name::given).unwrap_or_default();
        Error::Timeout { name, waited, waiting_for: WaitingFor::Lock, held_by }
    }

    /// Answers all waiters, and refuses new ones.
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

    fn state(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The local permit to ask the database for a name. It is kept as long as the lease. Dropping it
/// lets the next waiter of this process ask.
#[derive(Debug)]
pub(crate) struct Permit {
    name: Name,
    queues: Arc<LocalQueues>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.queues.pass(&self.name);
    }
}

#[cfg(all(test, lock_db_shuttle))]
mod interleavings;
