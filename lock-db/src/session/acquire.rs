//! Taking a lease from the database, by the one of this process whose turn it is, until its wait is over.

mod ask;
mod obstacle;

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::sync::Notify;
use tokio::time::{sleep, sleep_until};

use self::ask::Reply;
use self::obstacle::Obstacle;
use super::baton;
use super::core::{Core, Granted};
use super::queues::{Front, Turn};
use super::release;
use super::request::Acquire;
use crate::database::{Claim, Fault, LockRow};
use crate::error::Failure;
use crate::insert::Hold;
use crate::jitter::jitter;
use crate::limits::FIRST_ANSWER;
use crate::name::Name;
use crate::{Error, Kind};

/// The shortest and the longest pause between two looks at a lock that somebody else holds. Jitter makes it shorter, by
/// half at most.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// Where this process waits for very many names, each of them looks less often, so that the lane has time for more than looks;
/// often enough to keep a place in the queue.
const PER_CONTENDER: Duration = Duration::from_micros(250);
const LONGEST_PAUSE_IN_A_CROWD: Duration = Duration::from_millis(250);
/// Each attempt to make a row that a transaction is making takes the lane for some milliseconds.
const PER_CREATION: Duration = Duration::from_millis(12);
/// Whoever is seen making a row so often does more than that; and answers that are late so often are not so by chance.
const NO_MOMENT: u32 = 3;
/// The first pause when only the row is locked: mostly by another process that takes its place in the queue, for one commit.
/// Doubled from time to time.
const ROW_IS_BUSY: Duration = Duration::from_micros(500);
/// After so many of these it is no commit, but a transaction that has the lock.
const A_WHILE: u32 = 10;
/// Whoever finds a free row unlocked so often, and can't write it, stops.
const OFTEN_ENOUGH: u32 = 5;
/// Whoever is first in the queue looks so often during the time that it has waited already: for a lock that is held for
/// long it need not be quick.
const LOOKS: u32 = 16;

/// How long a try goes on while it is not a holder that is in the way: another writer on SQLite, a table that is locked as a whole.
const TRY_PATIENCE: Duration = Duration::from_secs(1);

pub(super) const ACTION: &str = "acquire";

/// Answers an acquire or a try. When the caller has gone, whatever was reached is undone.
pub(super) async fn acquire(core: Rc<Core>, mut request: Acquire) {
    let result = {
        let mut attempt = Attempt::new(&core, &mut request);
        select! {
            biased;
            () = request.answer.closed() => return,
            () = core.closed() => Err(Error::Closed),
            result = attempt.run_in_time() => result,
        }
    };
    // An answer that comes too late is a dropped guard, which releases.
    let _ = request.answer.send(result);
}

struct Attempt {
    core: Rc<Core>,
    /// All or none of them, in the order in which everybody takes them.
    claims: Vec<Claim>,
    turns: Vec<Turn>,
    wait: Option<Duration>,
    at_most: Option<Duration>,
    started: Instant,
    /// Until when it goes on.
    deadline: Instant,
    /// When it was this one's turn to ask the database.
    turn_came: Instant,
    /// Whether the database has answered anything.
    answered: Rc<Cell<bool>>,
    /// Whether a statement was sent whose outcome is not known. The lane sets it when it sends one.
    unsettled: Rc<Cell<bool>>,
    /// Which of several was held when they were looked at last.
    was_in_the_way: Option<usize>,
    /// Rings when it is this process's turn, if it stands in the queue of the row.
    bell: Option<Rc<Notify>>,
    /// It is our turn, or notice is over: no need to look.
    may_claim: bool,
    /// Whether the next look comes before the next write.
    looks_first: bool,
    /// The rows that were free when they were looked at last.
    seen_free: Vec<(Name, LockRow)>,
    /// What was in the way last.
    last: Obstacle,
    met: Met,
}

/// How often what was met, in a row.
#[derive(Default)]
struct Met {
    failures: u32,
    /// ... because of a hook of the application.
    hooks: u32,
    /// A free row that could not be written.
    busy: u32,
    /// ... and was not locked when somebody looked.
    not_locked: u32,
    /// A row that another transaction was making.
    made: u32,
    /// A grant whose answer took too long.
    late: u32,
    late_since: Option<Instant>,
    /// The nearest place to the front at which a baton came out of turn.
    nearest: u32,
}

/// What comes after an answer.
enum Next {
    /// It was not free, and this is a try.
    Nothing,
    AtOnce,
    After(Duration),
}

impl Attempt {
    fn new(core: &Rc<Core>, request: &mut Acquire) -> Self {
        core.contenders.set(core.contenders.get() + 1);
        let deadline = request.deadline();
        let claims = std::mem::take(&mut request.claims);
        // The place of whichever caller had the turn before serves the next one, too, if it keeps to the queue.
        for claim in claims.iter().filter(|claim| claim.place.is_none()) {
            release::leave_queue(core, &claim.name);
        }
        Self {
            bell: claims.first().and_then(|claim| core.calls.place(&claim.name)),
            core: Rc::clone(core),
            claims,
            turns: std::mem::take(&mut request.turns),
            wait: request.wait,
            at_most: request.at_most,
            started: request.started,
            deadline,
            turn_came: Instant::now(),
            answered: Rc::default(),
            unsettled: Rc::default(),
            was_in_the_way: None,
            may_claim: false,
            looks_first: false,
            seen_free: Vec::new(),
            last: Obstacle::Unknown,
            met: Met { nearest: u32::MAX, ..Met::default() },
        }
    }

    /// Ends when the wait is over, also when the database does not answer at all; but not before it could have answered once.
    async fn run_in_time(&mut self) -> Result<Option<Vec<Hold>>, Error> {
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

    async fn run(&mut self) -> Result<Option<Vec<Hold>>, Error> {
        let Some(granted) = self.contend().await? else { return Ok(None) };
        let turns = std::mem::take(&mut self.turns);
        let hold = |(granted, turn)| self.core.hold(granted, self.at_most, turn);
        let holds = granted.into_iter().zip(turns).map(hold);
        let holds: Option<Vec<Hold>> = holds.collect();
        self.unsettled.set(holds.is_none());
        holds.map(Some).ok_or(Error::Closed)
    }

    /// Asks the database until it grants the leases. `None`: a try, and one was not free.
    async fn contend(&mut self) -> Result<Option<Vec<Granted>>, Error> {
        loop {
            let reply = self.ask().await;
            let is_silence = matches!(&reply, Err(failure) if failure.is_silence());
            if !is_silence && !matches!(reply, Ok(Reply::RowIsBusy(..))) {
                self.answered.set(true);
            }
            self.looks_first = true;
            if !matches!(reply, Ok(Reply::TooLate(_))) {
                (self.met.late, self.met.late_since) = (0, None);
            }
            let next = match reply {
                Ok(Reply::Granted(granted)) => {
                    // The place is gone with the grant.
                    for claim in &self.claims {
                        self.core.calls.leave(&claim.name);
                    }
                    return Ok(Some(granted));
                }
                Ok(Reply::InTheWay { name, row, remaining, position }) => {
                    self.after_a_look(name, row, remaining, position)
                }
                Ok(Reply::Noticed { name, row }) => {
                    (self.met.failures, self.met.busy) = (0, 0);
                    let notice = row.notice();
                    // It may still be renewed until then.
                    self.last = Obstacle::Held(name, row);
                    self.may_claim = !self.pause(notice).await;
                    Next::AtOnce
                }
                Ok(Reply::RowIsBusy(rows)) => self.after_a_locked_row(rows).await?,
                Ok(Reply::RowIsMade(name)) => self.after_a_row_that_is_made(name),
                Ok(Reply::WrongKind(name, found)) => {
                    let name = name.given();
                    return Err(Error::WrongKind { name, wanted: Kind::Insert, found });
                }
                Ok(Reply::TooLate(took)) => self.after_a_late_grant(took)?,
                Err(failure) => self.after_a_failure(failure)?,
            };
            let pause = match next {
                Next::Nothing => return Ok(None),
                Next::AtOnce => continue,
                Next::After(pause) => pause,
            };
            let is_over = self.left().is_zero() && self.answered.get();
            if is_over || (self.wait.is_none() && self.started.elapsed() > TRY_PATIENCE) {
                return Err(self.timed_out());
            }
            // Once more at our own deadline.
            let left = self.left().max(ROW_IS_BUSY);
            self.may_claim = self.pause(pause.min(left)).await;
        }
    }

    fn after_a_look(&mut self, name: Name, row: LockRow, remaining: Duration, position: u32) -> Next {
        (self.met.failures, self.met.busy) = (0, 0);
        self.is_held_by(name, row);
        if self.wait.is_none() {
            return Next::Nothing;
        }
        self.wait_for_baton(position);
        let pause = if position == 0 {
            self.turn_came.elapsed() / LOOKS
        } else {
            SHORTEST_PAUSE * position.saturating_add(1)
        };
        let pause = jitter(pause.clamp(SHORTEST_PAUSE, LONGEST_PAUSE).max(self.in_a_crowd()));
        // Never later than the holder's deadline.
        Next::After(if remaining.is_zero() { pause } else { pause.min(remaining) })
    }

    async fn after_a_locked_row(&mut self, rows: Vec<(Name, LockRow)>) -> Result<Next, Error> {
        self.met.busy += 1;
        let busy = self.met.busy;
        if busy == 1 {
            // By a transaction, or by nobody: that is found out before the end.
            self.met.not_locked = 0;
            self.answered.set(false);
            if let Some((name, row)) = rows.first().cloned() {
                self.last = Obstacle::RowLocked(name, row);
            }
        }
        let is_time = self.wait.is_none() || self.left().is_zero() || busy.is_multiple_of(A_WHILE);
        if (is_time || self.met.not_locked > 0) && self.is_one_locked(rows).await? && self.wait.is_none() {
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
        // Else it may be another process that only makes the row.
        let is_a_transaction = self.met.made >= NO_MOMENT;
        if is_a_transaction {
            self.core.queues.learn(&name, Front::IsHeldElsewhere(None));
            if self.wait.is_none() {
                return Next::Nothing;
            }
        }
        self.last = Obstacle::Transaction(name);
        Next::After(jitter(if is_a_transaction {
            LONGEST_PAUSE.max(PER_CREATION * self.core.contenders.get())
        } else {
            SHORTEST_PAUSE
        }))
    }

    /// It is asked for again, which makes its whole TTL begin anew; unless the network is always that slow.
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
            // Once may be chance. Each further attempt would run the application's hook again, for nothing.
            if self.met.hooks > 1 {
                let name = self.name_for(&failure).cloned();
                return Err(failure.into_error(ACTION, name.as_ref()));
            }
        }
        let is_first = self.met.failures == 1 || failure.is_hook();
        let closed_while_idle = is_gone && is_first && !is_silence;
        self.fails(failure);
        // Acquiring is idempotent on the secret, so an attempt with an unknown outcome is just made again.
        if closed_while_idle {
            return Ok(Next::AtOnce);
        }
        if self.wait.is_none() && (is_silence || self.started.elapsed() > TRY_PATIENCE) {
            return Err(self.timed_out());
        }
        Ok(Next::After(jitter(if is_gone {
            LONGEST_PAUSE
        } else {
            SHORTEST_PAUSE.max(self.turn_came.elapsed() / LOOKS).min(LONGEST_PAUSE)
        })))
    }

    /// Waits, or less when it is our turn: `true`.
    async fn pause(&self, pause: Duration) -> bool {
        select! {
            biased;
            () = rings(self.bell.as_deref()) => true,
            () = sleep(pause) => false,
        }
    }

    fn in_a_crowd(&self) -> Duration {
        (PER_CONTENDER * self.core.contenders.get()).min(LONGEST_PAUSE_IN_A_CROWD)
    }

    /// Waits for the baton at our place in the queue. One that comes out of turn goes to the next, and we wait for it again, if
    /// the queue has moved since the last time. Else whoever is first does not wait for it, so it would come back at once.
    fn wait_for_baton(&mut self, position: u32) {
        let [Claim { name, .. }] = &*self.claims else { return };
        let (Some(_), Obstacle::Held(_, row)) = (&self.bell, &self.last) else { return };
        let out_of_turn = position > 0 && self.core.baton.is_ours(name);
        if out_of_turn {
            baton::give(&self.core, name);
        }
        if position > 0 && position >= self.met.nearest {
            return;
        }
        if out_of_turn {
            self.met.nearest = position;
        }
        baton::wait(&self.core, name, row.id);
    }

    /// What is left of the time in which it goes on.
    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }
}

/// However the attempt ends, by an error or because the caller has gone: a lease that it may have got is given back, and
/// nobody waits behind its place.
impl Drop for Attempt {
    fn drop(&mut self) {
        self.core.contenders.set(self.core.contenders.get() - 1);
        if self.unsettled.get() {
            for claim in &self.claims {
                release::undo(&self.core, claim.name.clone(), claim.secret.clone(), claim.ttl);
            }
        }
        let queues = &self.core.queues;
        let next_is_fair: Vec<bool> =
            self.claims.iter().map(|claim| queues.next_is_fair(&claim.name)).collect();
        self.turns.clear();
        for (claim, next_is_fair) in self.claims.iter().zip(next_is_fair) {
            // Else the next one has the turn by now, and use for the place.
            if !next_is_fair || !queues.is_taken(&claim.name) {
                release::leave_queue(&self.core, &claim.name);
            }
        }
    }
}

async fn rings(bell: Option<&Notify>) {
    match bell {
        Some(bell) => bell.notified().await,
        None => std::future::pending().await,
    }
}
