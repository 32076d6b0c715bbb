//! Taking a lease from the database, by the one of this process whose turn it is, until its wait is over.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::sync::Notify;
use tokio::time::{sleep, sleep_until};

use super::baton;
use super::core::{Core, Granted, deadline};
use super::queues::{Front, Turn};
use super::release;
use super::request::Acquire;
use crate::database::{Claim, Cluster, Fault, Grant, LeaseKey, LockRow, Probe, RowKey, Waiters};
use crate::error::{Failure, WaitingFor};
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
/// Whoever is seen making a row so often does more than that.
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
    started: Instant,
    /// Until when it goes on.
    deadline: Instant,
    /// When it was this one's turn to ask the database.
    turn_came: Instant,
    /// Whether the database has answered anything.
    answered: Rc<Cell<bool>>,
    /// Whether a statement was sent whose outcome is not known. The lane sets it when it sends one.
    unsettled: Rc<Cell<bool>>,
    /// Whether a grant came when less than nothing was left of it.
    came_too_late: bool,
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
}

/// What keeps the lock from us, as far as the database has told.
enum Obstacle {
    /// It has not told anything.
    Unknown,
    /// A holder, or those who are to have it before us.
    Held(Name, LockRow),
    /// Another transaction that has the row locked.
    RowLocked(Name, LockRow),
    /// One that has made the row.
    Transaction(Name),
    /// The database itself.
    Failure(Failure),
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
            started: request.started,
            deadline,
            turn_came: Instant::now(),
            answered: Rc::default(),
            unsettled: Rc::default(),
            came_too_late: false,
            may_claim: false,
            looks_first: false,
            seen_free: Vec::new(),
            last: Obstacle::Unknown,
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
        let holds = granted.into_iter().zip(turns).map(|(granted, turn)| self.core.hold(granted, turn));
        let holds: Option<Vec<Hold>> = holds.collect();
        self.unsettled.set(holds.is_none());
        holds.map(Some).ok_or(Error::Closed)
    }

    /// Asks the database until it grants the leases. `None`: a try, and one was not free.
    async fn contend(&mut self) -> Result<Option<Vec<Granted>>, Error> {
        let (mut failures, mut busy, mut not_locked, mut made) = (0_u32, 0_u32, 0_u32, 0_u32);
        let mut nearest = u32::MAX;
        loop {
            let reply = self.ask().await;
            let is_silence = matches!(&reply, Err(failure) if failure.is_silence());
            if !is_silence && !matches!(reply, Ok(Reply::RowIsBusy(..))) {
                self.answered.set(true);
            }
            let mut at_most = Duration::MAX;
            self.looks_first = true;
            let pause = match reply {
                Ok(Reply::Granted(granted)) => {
                    // The place is gone with the grant.
                    for claim in &self.claims {
                        self.core.calls.leave(&claim.name);
                    }
                    return Ok(Some(granted));
                }
                Ok(Reply::InTheWay { name, row, remaining, position }) => {
                    (failures, busy) = (0, 0);
                    self.is_held_by(name, row);
                    if self.wait.is_none() {
                        return Ok(None);
                    }
                    self.wait_for_baton(position, &mut nearest);
                    // Never later than the holder's deadline.
                    if !remaining.is_zero() {
                        at_most = remaining;
                    }
                    let pause = if position == 0 {
                        self.turn_came.elapsed() / LOOKS
                    } else {
                        SHORTEST_PAUSE * position.saturating_add(1)
                    };
                    pause.clamp(SHORTEST_PAUSE, LONGEST_PAUSE).max(self.in_a_crowd())
                }
                Ok(Reply::Noticed { name, row }) => {
                    (failures, busy) = (0, 0);
                    let notice = row.notice();
                    // It may still be renewed until then.
                    self.last = Obstacle::Held(name, row);
                    self.may_claim = !self.pause(notice).await;
                    continue;
                }
                Ok(Reply::RowIsBusy(rows)) => {
                    busy += 1;
                    if busy == 1 {
                        // By a transaction, or by nobody: that is found out before the end.
                        not_locked = 0;
                        self.answered.set(false);
                        if let Some((name, row)) = rows.first().cloned() {
                            self.last = Obstacle::RowLocked(name, row);
                        }
                    }
                    if self.wait.is_none()
                        || self.left().is_zero()
                        || busy.is_multiple_of(A_WHILE)
                        || not_locked > 0
                    {
                        let locked = self.is_one_locked(rows, &mut not_locked).await?;
                        if locked && self.wait.is_none() {
                            return Ok(None);
                        }
                    }
                    if busy < A_WHILE {
                        (ROW_IS_BUSY * 2_u32.saturating_pow(busy)).min(SHORTEST_PAUSE)
                    } else {
                        LONGEST_PAUSE.max(self.in_a_crowd())
                    }
                }
                Ok(Reply::RowIsMade(name)) => {
                    made += 1;
                    // Else it may be another process that only makes the row.
                    if made >= NO_MOMENT {
                        self.core.queues.learn(&name, Front::IsHeldElsewhere(None));
                        if self.wait.is_none() {
                            return Ok(None);
                        }
                    }
                    self.last = Obstacle::Transaction(name);
                    if made < NO_MOMENT {
                        SHORTEST_PAUSE
                    } else {
                        LONGEST_PAUSE.max(PER_CREATION * self.core.contenders.get())
                    }
                }
                Ok(Reply::WrongKind(name, found)) => {
                    let name = name.to_string();
                    return Err(Error::WrongKind { name, wanted: Kind::Insert, found });
                }
                Err(failure) => {
                    let is_gone = failure.fault == Fault::Disconnected;
                    if !is_gone && !failure.passes() {
                        let name = self.name_for(&failure).cloned();
                        return Err(failure.into_error(ACTION, name.as_ref()));
                    }
                    failures += 1;
                    let closed_while_idle = is_gone && failures == 1 && !failure.is_silence();
                    self.fails(failure);
                    // Acquiring is idempotent on the secret, so an attempt with an unknown outcome is just made again.
                    if closed_while_idle {
                        continue;
                    }
                    if self.wait.is_none() && (is_silence || self.started.elapsed() > TRY_PATIENCE) {
                        return Err(self.timed_out());
                    }
                    if is_gone {
                        LONGEST_PAUSE
                    } else {
                        SHORTEST_PAUSE.max(self.turn_came.elapsed() / LOOKS).min(LONGEST_PAUSE)
                    }
                }
            };
            let is_over = self.left().is_zero() && self.answered.get();
            if is_over || (self.wait.is_none() && self.started.elapsed() > TRY_PATIENCE) {
                return Err(self.timed_out());
            }
            // Once more at our own deadline.
            let left = self.left().max(ROW_IS_BUSY);
            self.may_claim = self.pause(jitter(pause).min(at_most).min(left)).await;
        }
    }

    /// Waits, or less when it is our turn: `true`.
    async fn pause(&self, pause: Duration) -> bool {
        select! {
            biased;
            () = rings(self.bell.as_deref()) => true,
            () = sleep(pause) => false,
        }
    }

    /// Notes who is in the way, for this caller and for those that wait behind it.
    fn is_held_by(&mut self, name: Name, row: LockRow) {
        let info = Box::new(row.clone().into_info(&name));
        self.core.queues.learn(&name, Front::IsHeldElsewhere(Some(info)));
        self.last = Obstacle::Held(name, row);
    }

    fn fails(&mut self, failure: Failure) {
        for claim in &self.claims {
            self.core.queues.learn(&claim.name, Front::Fails(failure.another()));
        }
        self.last = Obstacle::Failure(failure);
    }

    /// Whether free rows could not be had because another transaction has one of them locked. If none was, each time that somebody
    /// looked, they can't be written at all.
    async fn is_one_locked(
        &mut self,
        rows: Vec<(Name, LockRow)>,
        not_locked: &mut u32,
    ) -> Result<bool, Error> {
        for (name, row) in rows {
            match self.core.lane.probe(&name).await {
                Ok(Probe::Locked) => {
                    *not_locked = 0;
                    self.answered.set(true);
                    self.core.queues.learn(&name, Front::IsHeldElsewhere(None));
                    self.last = Obstacle::RowLocked(name, row);
                    return Ok(true);
                }
                Ok(Probe::Free | Probe::Nothing) => {}
                Err(failure) if failure.passes() || failure.fault == Fault::Disconnected => {
                    self.answered.set(true);
                    self.fails(failure);
                    return Ok(false);
                }
                Err(failure) => return Err(failure.into_error(ACTION, Some(&name))),
            }
        }
        *not_locked += 1;
        if *not_locked >= OFTEN_ENOUGH {
            let failure = (self.core.not_written)();
            self.fails(failure.another());
            return Err(failure.into_error(ACTION, self.name()));
        }
        Ok(false)
    }

    fn in_a_crowd(&self) -> Duration {
        (PER_CONTENDER * self.core.contenders.get()).min(LONGEST_PAUSE_IN_A_CROWD)
    }

    /// Waits for the baton at our place in the queue. One that comes out of turn goes to the next, and we wait for it again, if
    /// the queue has moved since the last time. Else whoever is first does not wait for it, so it would come back at once.
    fn wait_for_baton(&self, position: u32, nearest: &mut u32) {
        let [Claim { name, .. }] = &*self.claims else { return };
        let (Some(_), Obstacle::Held(_, row)) = (&self.bell, &self.last) else { return };
        let out_of_turn = position > 0 && self.core.baton.is_ours(name);
        if out_of_turn {
            baton::give(&self.core, name);
        }
        if position > 0 && position >= *nearest {
            return;
        }
        if out_of_turn {
            *nearest = position;
        }
        baton::wait(&self.core, name, row.id);
    }

    /// One attempt. Unless it is the first one it looks before it writes: a plain read costs the database next to nothing.
    async fn ask(&mut self) -> Result<Reply, Failure> {
        let may_claim = std::mem::take(&mut self.may_claim);
        let looks_first = self.looks_first || (self.bell.is_some() && self.wait.is_some());
        if looks_first
            && !may_claim
            && let Some(in_the_way) = self.look_at_all().await?
        {
            return Ok(in_the_way);
        }
        // The second time with the rows that the first time made.
        let mut free = Vec::new();
        for _ in 0..2 {
            match self.claim().await {
                Ok(Some(granted)) => return Ok(Reply::Granted(granted)),
                Ok(None) => {}
                // Who keeps us from writing keeps nobody from reading that there is a holder.
                Err(failure) if failure.is_busy() => {
                    let in_the_way = self.look_at_all().await.ok().flatten();
                    return in_the_way.ok_or(failure);
                }
                Err(failure) => return Err(failure),
            }
            if let Some(in_the_way) = self.look_at_all().await? {
                return Ok(in_the_way);
            }
            let seen_free = std::mem::take(&mut self.seen_free);
            if !seen_free.is_empty() {
                free = seen_free;
            }
        }
        if !free.is_empty() {
            return Ok(Reply::RowIsBusy(free));
        }
        // Else its row was made, and could not be seen.
        Err(if self.came_too_late {
            self.core.lane.no_answer(self.started.elapsed())
        } else {
            (self.core.not_written)()
        })
    }

    /// The first name that is in the way.
    async fn look_at_all(&mut self) -> Result<Option<Reply>, Failure> {
        for position in 0..self.claims.len() {
            if let Some(in_the_way) = self.look(position).await? {
                return Ok(Some(in_the_way));
            }
        }
        Ok(None)
    }

    /// Sends the claims to the database.
    async fn claim(&mut self) -> Result<Option<Vec<Granted>>, Failure> {
        // What an earlier attempt may have got is not settled by what this one does not get.
        let unsettled_before = self.unsettled.get();
        let (grants, server, sent) = match self.core.lane.acquire(self.claims.clone(), &self.unsettled).await
        {
            Err(failure) if failure.fault != Fault::Disconnected => {
                self.unsettled.set(unsettled_before);
                return Err(failure);
            }
            answer => answer?,
        };
        let Some(grants) = grants else {
            self.unsettled.set(unsettled_before);
            return Ok(None);
        };
        // An answer that took longer than the lease lasts is worth nothing. What it granted is ours for another attempt.
        if self.claims.iter().any(|claim| Instant::now() >= deadline(sent, claim.ttl)) {
            self.came_too_late = true;
            return Ok(None);
        }
        let hand_off = self.core.queues.hand_off();
        let granted = self.claims.iter().zip(grants).map(|(claim, grant)| {
            let Grant { id, fencing_token, numbers, others_wait } = grant;
            let Claim { name, secret, ttl, .. } = claim.clone();
            // Whoever has nobody behind him has the number that stands in the row.
            // In a new row there was no grant before: in a row that was cleaned away there may have been, a moment ago.
            let is_new_row = numbers == fencing_token;
            let may_hand_on = !is_new_row && self.core.queues.somebody_waits(&name);
            let most = if may_hand_on { hand_off.most_turns() } else { 1 };
            let numbers = u32::try_from(numbers).unwrap_or(u32::MAX).clamp(1, most);
            let server = server.clone();
            let key = LeaseKey { row: RowKey { name, id }, secret, fencing_token, ttl, server };
            let turns = if others_wait { numbers.min(hand_off.turns) } else { numbers };
            Granted { key, numbers, turns, others_wait, ttl, sent }
        });
        Ok(Some(granted.collect()))
    }

    /// Looks whether a name is in the way, and makes its row when there is none. Who waits takes a place in the queue.
    async fn look(&mut self, position: usize) -> Result<Option<Reply>, Failure> {
        let Some(Claim { name, place, .. }) = self.claims.get(position).cloned() else {
            return Ok(None);
        };
        let core = Rc::clone(&self.core);
        let Some(row) = core.lane.look(&name).await? else {
            let made = core.lane.create(&name, Kind::Insert).await?;
            return Ok((!made).then_some(Reply::RowIsMade(name)));
        };
        if row.kind != Kind::Insert {
            return Ok(Some(Reply::WrongKind(name, row.kind)));
        }
        if self.claims.iter().any(|claim| claim.secret.as_str() == row.secret_key) {
            // By a request whose answer was lost.
            return Ok(None);
        }
        let (remaining, now, is_free) = (row.remaining(), row.now(), row.is_free());
        if !remaining.is_zero() {
            // Whatever becomes of a place in the queue.
            self.answered.set(true);
            self.is_held_by(name.clone(), row.clone());
        }
        let mut written = true;
        let mut ahead = 0;
        if let Some(place) = place {
            if is_free && row.waiters.is_empty() {
                self.seen_free.push((name, row));
                return Ok(None);
            }
            let (listener, place) = (core.calls.listener(), place.as_str());
            let mut waiters = Waiters::parse(&row.waiters, now);
            let all_last = waiters.text().len() == row.waiters.len();
            // A place on another node would be a write in the way of the holder's guarded transactions.
            let may_stand = core.lane.cluster() == Cluster::SinglePrimary;
            let waits = may_stand && self.wait.is_some() && !self.left().is_zero();
            if waits {
                self.bell = Some(core.calls.stand(&name, row.id));
                core.listen();
            }
            let mut wrote = Ok(true);
            if waits && all_last && waiters.has_room() && waiters.position(place).is_none() {
                ahead = waiters.len();
                wrote = core.lane.stand(&name, core.place()).await;
            } else {
                let took_place = waits && waiters.stand(place, now, listener);
                // A try has no place: it comes after all who have one.
                ahead = waiters.position(place).unwrap_or_else(|| waiters.len());
                // Those in front whose place is over have to go, or the row knows nothing of us.
                let is_known = !waiters.is_empty() && row.waiters.starts_with(place);
                if took_place || (is_free && ahead == 0 && !is_known) {
                    wrote = core.lane.set_waiters(&name, &row.waiters, waiters.text()).await;
                }
            }
            written = match wrote {
                // It is held, whether or not there is a place for us.
                Err(failure) if failure.is_busy() && !remaining.is_zero() => {
                    let position = u32::try_from(ahead).unwrap_or(u32::MAX);
                    return Ok(Some(Reply::InTheWay { name, row, remaining, position }));
                }
                wrote => wrote?,
            };
        }
        if is_free && ahead == 0 && written {
            self.seen_free.push((name, row));
            return Ok(None);
        }
        if !written {
            return Ok(Some(Reply::RowIsBusy(vec![(name, row)])));
        }
        if ahead == 0 && row.notice_is_due() {
            // A deadline that lay too far ahead is drawn in: the next look tells how far.
            let is_over = row.remaining().is_zero();
            return Ok(Some(match core.lane.give_notice(&name).await? {
                true if is_over => Reply::Noticed { name, row },
                true => Reply::InTheWay { name, row, remaining: SHORTEST_PAUSE, position: 0 },
                false => Reply::RowIsBusy(vec![(name, row)]),
            }));
        }
        let position = u32::try_from(ahead).unwrap_or(u32::MAX);
        Ok(Some(Reply::InTheWay { name, row, remaining, position }))
    }

    /// For messages.
    fn name(&self) -> Option<&Name> {
        self.claims.first().map(|claim| &claim.name)
    }

    /// The same where it may be about one of several.
    fn name_for(&self, failure: &Failure) -> Option<&Name> {
        let mut names = self.claims.iter().map(|claim| &claim.name);
        let is_odd = |name: &&Name| failure.fault == Fault::Unstorable && !name.is_ascii();
        names.find(is_odd).or_else(|| self.name())
    }

    /// What is left of the time in which it goes on.
    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// A database that was away to the end is worth more words than the wait.
    fn timed_out(&mut self) -> Error {
        let waited = self.started.elapsed();
        let (name, row) = match std::mem::replace(&mut self.last, Obstacle::Unknown) {
            Obstacle::Held(name, row) | Obstacle::RowLocked(name, row) => (name, Some(row)),
            Obstacle::Transaction(name) => (name, None),
            Obstacle::Failure(failure) => return failure.into_error(ACTION, self.name()),
            Obstacle::Unknown => {
                return self.core.lane.no_answer(waited).into_error(ACTION, self.name());
            }
        };
        let held_by = row.map(|row| Box::new(row.into_info(&name)));
        Error::Timeout { name: name.to_string(), waited, waiting_for: WaitingFor::Lock, held_by }
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

enum Reply {
    Granted(Vec<Granted>),
    /// Another process has it, for so long at least; zero when that is not known. So many are to have it before us.
    InTheWay {
        name: Name,
        row: LockRow,
        remaining: Duration,
        position: u32,
    },
    /// Its holder was given notice: it is free after that time, unless it is renewed.
    Noticed {
        name: Name,
        row: LockRow,
    },
    /// It is our turn, or we were to take a place in the queue, but another transaction has one of these rows locked or was quicker.
    RowIsBusy(Vec<(Name, LockRow)>),
    /// A transaction has it that is the first to use the name, and has made its row.
    RowIsMade(Name),
    /// The name is used as something else.
    WrongKind(Name, Kind),
}
