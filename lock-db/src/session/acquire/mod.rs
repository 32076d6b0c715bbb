//! Takes a lease from the database until the wait is over, for the caller that has the local
//! permit.

mod ask;
mod obstacle;

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::sync::Notify;
use tokio::time::{sleep, sleep_until};

use self::ask::AttemptOutcome;
use self::obstacle::Obstacle;
use super::actor::Actor;
use super::held_lease::Granted;
use super::local_queue::{Front, Permit};
use super::release;
use super::request::Acquire;
use crate::database::Failure;
use crate::database::{Claim, Fault, LockRow};
use crate::error::Action;
use crate::jitter::jitter;
use crate::name::Name;
use crate::options::{FIRST_ANSWER, Wait};
use crate::session::LeaseHandle;
use crate::session::wakeup::{scan, user_lock};
use crate::{Error, Kind};

/// The shortest and the longest pause between two reads of a lock that another process holds.
/// Jitter shortens it by up to half.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// Where this process waits for very many names, each of them is read less often, so that the
/// connection worker has time for other work. It is still read often enough to keep the queue entry
/// alive.
const PER_CONTENDER: Duration = Duration::from_micros(250);
const LONGEST_PAUSE_IN_A_CROWD: Duration = Duration::from_millis(250);
/// Each attempt to create a row that a transaction is creating occupies the connection worker for
/// some milliseconds.
const PER_CREATION: Duration = Duration::from_millis(12);
/// A transaction that is seen creating a row this often does more than create it. Answers that are
/// late this often are not late by chance.
const NO_MOMENT: u32 = 3;
/// The base of the pause when only the row is locked, doubled with each attempt. Usually another
/// process is writing its queue entry, which takes one commit.
const ROW_IS_BUSY: Duration = Duration::from_micros(500);
/// A row that is locked this often is not locked by a single commit, but by a transaction that has
/// the lock.
const A_WHILE: u32 = 10;
/// A row that was not used for a while may be locked because it is removed. It counts as held only
/// if it is still locked after this time.
const REMOVAL: Duration = Duration::from_millis(50);
/// A request that finds a free row unlocked this often, and can't write it, fails.
const OFTEN_ENOUGH: u32 = 5;
/// The first in the queue pauses for the time that it has waited so far, divided by this. A lock
/// that is held for long need not be taken quickly.
const READS: u32 = 16;

/// How long a try continues while the obstacle is not a holder, but another writer on SQLite or a
/// table that is locked as a whole.
const TRY_PATIENCE: Duration = Duration::from_secs(1);

pub(super) const ACTION: Action = Action::Acquire;

/// Answers an acquire or a try. If the caller has gone, what was acquired is released.
pub(super) async fn acquire(actor: Rc<Actor>, mut request: Acquire) {
    let result = {
        let mut attempt = AcquireAttempt::new(&actor, &mut request);
        select! {
            biased;
            () = request.answer.closed() => return,
            () = actor.closed() => Err(Error::Closed),
            result = attempt.run_in_time() => result,
        }
    };
    // An answer that comes too late is a dropped guard, which releases its lease.
    let _ = request.answer.send(result);
}

struct AcquireAttempt {
    actor: Rc<Actor>,
    /// All or none of them are taken, in the order that all requests use.
    claims: Vec<Claim>,
    permits: Vec<Permit>,
    wait: Wait,
    at_most: Option<Duration>,
    started: Instant,
    /// When the attempt ends.
    deadline: Instant,
    /// When this attempt got the local permits.
    permit_came: Instant,
    /// Whether the database has answered anything.
    answered: Rc<Cell<bool>>,
    /// Whether a statement was sent whose outcome is unknown. The connection worker sets it when it
    /// sends one.
    unsettled: Rc<Cell<bool>>,
    /// Which of several locks was held when they were last read.
    was_in_the_way: Option<usize>,
    /// Notified when this process is next in the queue of the row. `None` without a queue entry.
    signal: Option<Rc<Notify>>,
    /// We are next, or the notice is over: claim without a read.
    may_claim: bool,
    /// Whether a read comes before the next write.
    reads_first: bool,
    /// The rows that were free when they were last read.
    seen_free: Vec<(Name, LockRow)>,
    /// The last obstacle.
    last: Obstacle,
    met: Met,
}

/// How often in a row an attempt met each of these.
#[derive(Default)]
struct Met {
    failures: u32,
    /// Failures because of a hook of the application.
    hooks: u32,
    /// A free row that could not be written.
    busy: u32,
    /// A free row that could not be written, and that a probe found unlocked.
    not_locked: u32,
    /// A row that another transaction was creating.
    made: u32,
    /// A grant whose answer took too long.
    late: u32,
    late_since: Option<Instant>,
    /// The lowest queue position at which a user lock arrived out of order.
    nearest: u32,
}

/// What to do after an answer.
enum Next {
    /// The lock was not free, and this is a try.
    Nothing,
    AtOnce,
    After(Duration),
}

impl AcquireAttempt {
    fn new(actor: &Rc<Actor>, request: &mut Acquire) -> Self {
        actor.contenders.set(actor.contenders.get() + 1);
        let deadline = request.deadline();
        let mut claims = std::mem::take(&mut request.claims);
        for claim in &mut claims {
            claim.makes_row = !actor.known_names.contains(&claim.name);
        }
        // The queue entry of the caller that had the permit before also serves the next one. A
        // request that skips the queue removes it.
        for claim in claims.iter().filter(|claim| claim.entry.is_none()) {
            release::leave_queue(actor, &claim.name);
        }
        Self {
            signal: claims.first().and_then(|claim| actor.notifications.waiter(&claim.name)),
            actor: Rc::clone(actor),
            claims,
            permits: std::mem::take(&mut request.permits),
            wait: request.wait,
            at_most: request.at_most,
            started: request.started,
            deadline,
            permit_came: Instant::now(),
            answered: Rc::default(),
            unsettled: Rc::default(),
            was_in_the_way: None,
            may_claim: false,
            reads_first: false,
            seen_free: Vec::new(),
            last: Obstacle::Unknown,
            met: Met { nearest: u32::MAX, ..Met::default() },
        }
    }

    /// Ends when the wait is over, even if the database does not answer at all, but not before the
    /// database has had time for a first answer.
    async fn run_in_time(&mut self) -> Result<Option<Vec<LeaseHandle>>, Error> {
        let (deadline, answered) = (self.deadline, Rc::clone(&self.answered));
        let first_answer = Instant::now() + FIRST_ANSWER;
        let over = async {
            sleep_until(deadline.into()).await;
            if !answered.get() {
                sleep_until(first_answer.into()).await;
            }
        };
        let result = select! {
            biased;
            result = self.run() => Some(result),
            () = over => None,
        };
        result.unwrap_or_else(|| Err(self.timed_out()))
    }

    async fn run(&mut self) -> Result<Option<Vec<LeaseHandle>>, Error> {
        let Some(granted) = self.contend().await? else { return Ok(None) };
        let permits = std::mem::take(&mut self.permits);
        let handle = |(granted, permit)| self.actor.register(granted, self.at_most, permit);
        let handles = granted.into_iter().zip(permits).map(handle);
        let handles: Option<Vec<LeaseHandle>> = handles.collect();
        self.unsettled.set(handles.is_none());
        handles.map(Some).ok_or(Error::Closed)
    }

    /// Asks the database until it grants the leases. `None`: this is a try, and a lock was not
    /// free.
    async fn contend(&mut self) -> Result<Option<Vec<Granted>>, Error> {
        loop {
            let outcome = self.ask().await;
            let is_silence = matches!(&outcome, Err(failure) if failure.is_silence());
            if !is_silence && !matches!(outcome, Ok(AttemptOutcome::RowIsBusy(..))) {
                self.answered.set(true);
            }
            self.reads_first = true;
            if !matches!(outcome, Ok(AttemptOutcome::TooLate(_))) {
                (self.met.late, self.met.late_since) = (0, None);
            }
            let next = match outcome {
                Ok(AttemptOutcome::Granted(granted)) => {
                    // The grant removed the queue entry.
                    for claim in &self.claims {
                        self.actor.known_names.insert(&claim.name);
                        self.actor.notifications.leave(&claim.name);
                    }
                    return Ok(Some(granted));
                }
                Ok(AttemptOutcome::InTheWay { name, row, remaining, position }) => {
                    self.after_a_read(name, row, remaining, position)
                }
                Ok(AttemptOutcome::Noticed { name, row }) => {
                    (self.met.failures, self.met.busy) = (0, 0);
                    let notice = row.notice();
                    // The holder may still renew the lease until then.
                    self.last = Obstacle::Held(name, row);
                    self.may_claim = !self.pause(notice).await;
                    Next::AtOnce
                }
                Ok(AttemptOutcome::RowIsBusy(rows)) => self.after_a_locked_row(rows).await?,
                Ok(AttemptOutcome::RowIsMade(name)) => self.after_a_row_that_is_made(name),
                Ok(AttemptOutcome::WrongKind(name, found)) => {
                    let name = name.given();
                    return Err(Error::WrongKind { name, wanted: Kind::Insert, found });
                }
                Ok(AttemptOutcome::TooLate(took)) => self.after_a_late_grant(took)?,
                Err(failure) => self.after_a_failure(failure)?,
            };
            let pause = match next {
                Next::Nothing => return Ok(None),
                Next::AtOnce => continue,
                Next::After(pause) => pause,
            };
            let is_over = self.left().is_zero() && self.answered.get();
            if is_over || (self.wait.is_try() && self.started.elapsed() > TRY_PATIENCE) {
                return Err(self.timed_out());
            }
            // Try once more at our own deadline.
            let left = self.left().max(ROW_IS_BUSY);
            self.may_claim = self.pause(pause.min(left)).await;
        }
    }

    fn after_a_read(&mut self, name: Name, row: LockRow, remaining: Duration, position: u32) -> Next {
        (self.met.failures, self.met.busy) = (0, 0);
        self.set_holder(name, row);
        if self.wait.is_try() {
            return Next::Nothing;
        }
        self.wait_for_user_lock(position);
        let pause = if position == 0 {
            self.permit_came.elapsed() / READS
        } else {
            SHORTEST_PAUSE * position.saturating_add(1)
        };
        let pause = jitter(pause.clamp(SHORTEST_PAUSE, LONGEST_PAUSE).max(self.in_a_crowd()));
        // Not later than the holder's deadline.
        Next::After(if remaining.is_zero() { pause } else { pause.min(remaining) })
    }

    async fn after_a_locked_row(&mut self, rows: Vec<(Name, LockRow)>) -> Result<Next, Error> {
        self.met.busy += 1;
        let busy = self.met.busy;
        if busy == 1 {
            // A transaction may have the row locked, or none. A probe finds out before the wait
            // ends.
            self.met.not_locked = 0;
            self.answered.set(false);
            if let Some((name, row)) = rows.first().cloned() {
                self.last = Obstacle::RowLocked(name, row);
            }
        }
        let may_be_removed =
            self.permit_came.elapsed() < REMOVAL && rows.iter().any(|(_, row)| row.may_be_removed());
        let is_over = self.wait.is_try() || self.left().is_zero();
        let is_time = (is_over && !may_be_removed) || busy.is_multiple_of(A_WHILE);
        if (is_time || self.met.not_locked > 0) && self.find_locked(rows).await? && self.wait.is_try() {
            return Ok(Next::Nothing);
        }
        Ok(Next::After(jitter(if busy < A_WHILE {
            (ROW_IS_BUSY * 2_u32.saturating_pow(busy)).min(SHORTEST_PAUSE)
        } else {
            LONGEST_PAUSE.max(self.in_a_crowd())
        })))
    }

    fn after_a_row_that_is_made(&mut self, name: Name) -> Next {
        self.met.made += 1;
        // Below this count it may be another process that only creates the row.
        let is_a_transaction = self.met.made >= NO_MOMENT;
        if is_a_transaction {
            self.actor.queues.learn(&name, Front::IsHeldElsewhere(None));
            if self.wait.is_try() {
                return Next::Nothing;
            }
        }
        self.last = Obstacle::Transaction(name);
        Next::After(jitter(if is_a_transaction {
            LONGEST_PAUSE.max(PER_CREATION * self.actor.contenders.get())
        } else {
            SHORTEST_PAUSE
        }))
    }

    /// Asks for the lease again, which restarts its whole TTL. Gives up if the network is always
    /// that slow.
    fn after_a_late_grant(&mut self, took: Duration) -> Result<Next, Error> {
        self.met.late += 1;
        self.last = Obstacle::Network(took);
        let since = *self.met.late_since.get_or_insert_with(Instant::now);
        let is_no_moment = self.met.late >= NO_MOMENT && since.elapsed() >= TRY_PATIENCE;
        if is_no_moment || self.left().is_zero() {
            return Err(self.timed_out());
        }
        self.may_claim = true;
        Ok(Next::AtOnce)
    }

    fn after_a_failure(&mut self, failure: Failure) -> Result<Next, Error> {
        let (is_gone, is_silence) = (failure.fault == Fault::Disconnected, failure.is_silence());
        if !is_gone && !failure.passes() {
            let name = self.name_for(&failure).cloned();
            return Err(failure.into_error(ACTION, name.as_ref()));
        }
        self.met.failures += 1;
        if failure.is_hook() {
            self.met.hooks += 1;
            // The first time may be chance. Each further attempt would run the application's hook
            // again for nothing.
            if self.met.hooks > 1 {
                let name = self.name_for(&failure).cloned();
                return Err(failure.into_error(ACTION, name.as_ref()));
            }
        }
        let is_first = self.met.failures == 1 || failure.is_hook();
        let closed_while_idle = is_gone && is_first && !is_silence;
        self.set_failure(failure);
        // Acquiring is idempotent on the secret, so an attempt with an unknown outcome is repeated.
        if closed_while_idle {
            return Ok(Next::AtOnce);
        }
        if self.wait.is_try() && (is_silence || self.started.elapsed() > TRY_PATIENCE) {
            return Err(self.timed_out());
        }
        Ok(Next::After(jitter(if is_gone {
            LONGEST_PAUSE
        } else {
            SHORTEST_PAUSE.max(self.permit_came.elapsed() / READS).min(LONGEST_PAUSE)
        })))
    }

    /// Pauses. Returns `true` early when this process is next.
    async fn pause(&self, pause: Duration) -> bool {
        select! {
            biased;
            () = signal(self.signal.as_deref()) => true,
            () = sleep(pause) => false,
        }
    }

    fn in_a_crowd(&self) -> Duration {
        if self.signal.is_some() && scan::is_told(&self.actor) {
            return LONGEST_PAUSE_IN_A_CROWD;
        }
        (PER_CONTENDER * self.actor.contenders.get()).min(LONGEST_PAUSE_IN_A_CROWD)
    }

    /// Waits for the user lock of the row that this process is queued for. A user lock that arrives
    /// out of order is released to the next waiter. It is requested again only if the queue has
    /// moved since the last time. Otherwise the first in the queue does not wait for it, and it
    /// would come back at once.
    fn wait_for_user_lock(&mut self, position: u32) {
        let [Claim { name, .. }] = &*self.claims else { return };
        let (Some(_), Obstacle::Held(_, row)) = (&self.signal, &self.last) else { return };
        let out_of_turn = position > 0 && self.actor.user_lock.is_ours(name);
        if out_of_turn {
            user_lock::give(&self.actor, name);
        }
        if position > 0 && position >= self.met.nearest {
            return;
        }
        if out_of_turn {
            self.met.nearest = position;
        }
        user_lock::wait(&self.actor, name, row.id);
    }

    /// The time that is left for the attempt.
    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }
}

/// When the attempt ends by an error, or because the caller has gone, a lease that it may have got
/// is released, and its queue entry does not block other processes.
impl Drop for AcquireAttempt {
    fn drop(&mut self) {
        self.actor.contenders.set(self.actor.contenders.get() - 1);
        if self.unsettled.get() {
            for claim in &self.claims {
                release::undo(&self.actor, claim.name.clone(), claim.secret.clone(), claim.ttl);
            }
        }
        let queues = &self.actor.queues;
        let next_is_fair: Vec<bool> =
            self.claims.iter().map(|claim| queues.next_is_fair(&claim.name)).collect();
        self.permits.clear();
        for (claim, next_is_fair) in self.claims.iter().zip(next_is_fair) {
            // Otherwise the next caller already has the permit, and uses the queue entry.
            if !next_is_fair || !queues.is_taken(&claim.name) {
                release::leave_queue(&self.actor, &claim.name);
            }
        }
    }
}

async fn signal(signal: Option<&Notify>) {
    match signal {
        Some(signal) => signal.notified().await,
        None => std::future::pending().await,
    }
}
