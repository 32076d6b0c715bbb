//! Taking a lease from the database, by the one of this process whose turn it is, until its wait is over.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};

use super::baton;
use super::core::{Core, Granted, deadline};
use super::queues::Turn;
use super::release;
use super::request::Acquire;
use crate::database::{Claim, Cluster, Fault, Grant, LeaseKey, LockRow, RowKey, Waiters};
use crate::error::{Failure, WaitingFor};
use crate::insert::Hold;
use crate::jitter::jitter;
use crate::{Error, Kind};

/// The shortest and the longest pause between two looks at a lock that somebody else holds. Jitter makes it shorter, by
/// half at most.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// Where this process waits for very many names, each of them looks less often, so that the lane has time for more than looks;
/// often enough to keep a place in the queue.
const PER_CONTENDER: Duration = Duration::from_micros(250);
const LONGEST_PAUSE_IN_A_CROWD: Duration = Duration::from_millis(250);
/// The first pause when only the row is locked: mostly by another process that takes its place in the queue, for one commit.
/// Doubled from time to time.
const ROW_IS_BUSY: Duration = Duration::from_micros(500);
/// After so many of these it is no commit, but a transaction that has the lock.
const A_WHILE: u32 = 10;
/// Whoever is first in the queue looks so often during the time that it has waited already: for a lock that is held for
/// long it need not be quick.
const LOOKS: u32 = 16;

/// How much longer than the wait an attempt may take that the database leaves without an answer.
const GRACE: Duration = Duration::from_secs(1);
/// How long a try may take, which has no wait of its own: with many others before it.
const LONGEST_TRY: Duration = Duration::from_secs(10);

const ACTION: &str = "acquire";

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
    /// When it was this one's turn to ask the database.
    turn_came: Instant,
    /// Whether a statement was sent whose outcome is not known. The lane sets it when it sends one.
    unsettled: Rc<Cell<bool>>,
    /// Rings when it is this process's turn, if it stands in the queue of the row.
    bell: Option<Rc<Notify>>,
    /// It has rung: no need to look.
    was_called: bool,
    /// What was in the way last.
    last_seen: Option<(Arc<str>, LockRow)>,
    last_failure: Option<Failure>,
}

impl Attempt {
    fn new(core: &Rc<Core>, request: &mut Acquire) -> Self {
        core.contenders.set(core.contenders.get() + 1);
        let claims = std::mem::take(&mut request.claims);
        // The place of whoever had the turn before serves the next one, too, if he keeps to the queue.
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
            turn_came: Instant::now(),
            unsettled: Rc::default(),
            was_called: false,
            last_seen: None,
            last_failure: None,
        }
    }

    /// Ends soon after the wait is over, also when the database does not answer at all.
    async fn run_in_time(&mut self) -> Result<Option<Vec<Hold>>, Error> {
        let limit = self.wait.map_or(LONGEST_TRY, |wait| wait + GRACE).saturating_sub(self.started.elapsed());
        match timeout(limit, self.run()).await {
            Ok(result) => result,
            Err(_elapsed) => Err(self.timed_out()),
        }
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
        let (mut failures, mut busy) = (0_u32, 0_u32);
        let mut nearest = u32::MAX;
        loop {
            let mut held_for = Duration::ZERO;
            let pause = match self.ask().await {
                Ok(Reply::Granted(granted)) => {
                    // The place is gone with the grant.
                    for claim in &self.claims {
                        self.core.calls.leave(&claim.name);
                    }
                    return Ok(Some(granted));
                }
                Ok(Reply::InTheWay { remaining, position }) => {
                    (failures, busy) = (0, 0);
                    self.last_failure = None;
                    self.wait_for_baton(position, &mut nearest);
                    held_for = remaining;
                    let pause = if position == 0 {
                        self.turn_came.elapsed() / LOOKS
                    } else {
                        SHORTEST_PAUSE * position.saturating_add(1)
                    };
                    pause.clamp(SHORTEST_PAUSE, LONGEST_PAUSE).max(self.in_a_crowd())
                }
                Ok(Reply::RowIsBusy) => {
                    self.last_failure = None;
                    busy += 1;
                    if busy < A_WHILE {
                        (ROW_IS_BUSY * 2_u32.saturating_pow(busy)).min(SHORTEST_PAUSE)
                    } else {
                        LONGEST_PAUSE.max(self.in_a_crowd())
                    }
                }
                Ok(Reply::WrongKind(name, found)) => {
                    let name = name.to_string();
                    return Err(Error::WrongKind { name, wanted: Kind::Insert, found });
                }
                // Acquiring is idempotent on the secret, so an attempt with an unknown outcome is just made again.
                Err(failure) if failure.fault == Fault::Disconnected => {
                    failures += 1;
                    let closed_while_idle = failures == 1 && !failure.is_silence();
                    self.last_failure = Some(failure);
                    if closed_while_idle {
                        continue;
                    }
                    if self.wait.is_none() {
                        return Err(self.timed_out());
                    }
                    LONGEST_PAUSE
                }
                Err(failure) if failure.is_contention() => {
                    self.last_failure = None;
                    SHORTEST_PAUSE
                }
                Err(failure) => return Err(failure.into_error(ACTION, Some(self.name()))),
            };
            let Some(left) = self.left() else { return Ok(None) };
            if left.is_zero() {
                return Err(self.timed_out());
            }
            // Never later than the holder's deadline, and once more at our own.
            let jittered = jitter(pause);
            let until_free = if held_for.is_zero() { jittered } else { held_for };
            self.was_called = select! {
                biased;
                () = rings(self.bell.as_deref()) => true,
                () = sleep(jittered.min(until_free).min(left)) => false,
            };
        }
    }

    fn in_a_crowd(&self) -> Duration {
        (PER_CONTENDER * self.core.contenders.get()).min(LONGEST_PAUSE_IN_A_CROWD)
    }

    /// Waits for the baton at our place in the queue. One that comes out of turn goes to the next, and we wait for it again, if
    /// the queue has moved since the last time. Else whoever is first does not wait for it, so it would come back at once.
    fn wait_for_baton(&self, position: u32, nearest: &mut u32) {
        let [Claim { name, .. }] = &*self.claims else { return };
        let (Some(_), Some((_, row))) = (&self.bell, &self.last_seen) else { return };
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
        if (self.last_seen.is_some() || (self.bell.is_some() && self.wait.is_some()))
            && !self.was_called
            && let Some(in_the_way) = self.look_at_all().await?
        {
            return Ok(in_the_way);
        }
        // The second time with the rows that the first time made.
        for _ in 0..2 {
            if let Some(granted) = self.claim().await? {
                return Ok(Reply::Granted(granted));
            }
            if let Some(in_the_way) = self.look_at_all().await? {
                return Ok(in_the_way);
            }
        }
        Ok(Reply::RowIsBusy)
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
        let (grants, cluster, sent) = match self.core.lane.acquire(self.claims.clone(), &self.unsettled).await
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
            let key = LeaseKey { row: RowKey { name, id }, secret, fencing_token, cluster };
            let turns = if others_wait { numbers.min(hand_off.turns) } else { numbers };
            Granted { key, numbers, turns, others_wait, ttl, sent }
        });
        Ok(Some(granted.collect()))
    }

    /// Looks whether a name is in the way, and makes its row when there is none. Whoever waits takes a place in the queue.
    async fn look(&mut self, position: usize) -> Result<Option<Reply>, Failure> {
        let Some(Claim { name, place, .. }) = self.claims.get(position).cloned() else {
            return Ok(None);
        };
        let core = Rc::clone(&self.core);
        let Some(row) = core.lane.look(&name).await? else {
            core.lane.create(&name, Kind::Insert).await?;
            return Ok(None);
        };
        if row.kind != Kind::Insert {
            return Ok(Some(Reply::WrongKind(name, row.kind)));
        }
        if self.claims.iter().any(|claim| claim.secret.as_str() == row.secret_key) {
            // By a request whose answer was lost.
            return Ok(None);
        }
        let (remaining, now) = (row.remaining(), row.now());
        let is_free = remaining.is_zero();
        let mut written = true;
        let mut ahead = 0;
        if let Some(place) = place {
            if is_free && row.waiters.is_empty() {
                return Ok(None);
            }
            let (listener, place) = (core.calls.listener(), place.as_str());
            let mut waiters = Waiters::parse(&row.waiters, now);
            let all_last = waiters.text().len() == row.waiters.len();
            // A place on another node would be a write in the way of the holder's guarded transactions.
            let may_stand = core.lane.cluster() == Cluster::SinglePrimary;
            let waits = may_stand && self.left().is_some_and(|left| !left.is_zero());
            if waits {
                self.bell = Some(core.calls.stand(&name, row.id));
                core.listen();
            }
            if waits && all_last && waiters.has_room() && waiters.position(place).is_none() {
                ahead = waiters.len();
                written = core.lane.stand(&name, core.place()).await?;
            } else {
                let took_place = waits && waiters.stand(place, now, listener);
                // A try has no place: it comes after all who have one.
                ahead = waiters.position(place).unwrap_or_else(|| waiters.len());
                // Those in front whose place is over have to go, or the row knows nothing of us.
                let is_known = !waiters.is_empty() && row.waiters.starts_with(place);
                if took_place || (is_free && ahead == 0 && !is_known) {
                    written = core.lane.set_waiters(&name, &row.waiters, waiters.text()).await?;
                }
            }
        }
        let may_take = is_free && ahead == 0;
        if may_take && written {
            return Ok(None);
        }
        self.last_seen = Some((name, row));
        if !written {
            return Ok(Some(Reply::RowIsBusy));
        }
        let position = u32::try_from(ahead).unwrap_or(u32::MAX);
        Ok(Some(Reply::InTheWay { remaining, position }))
    }

    /// For messages.
    fn name(&self) -> &str {
        self.claims.first().map_or("", |claim| &claim.name)
    }

    /// What is left of the wait; `None` for a try.
    fn left(&self) -> Option<Duration> {
        self.wait.map(|wait| wait.saturating_sub(self.started.elapsed()))
    }

    /// A database that was away to the end is worth more words than the wait.
    fn timed_out(&mut self) -> Error {
        if let Some(failure) = self.last_failure.take() {
            return failure.into_error(ACTION, Some(self.name()));
        }
        let (name, held_by) = match self.last_seen.clone() {
            Some((name, row)) => (name.to_string(), Some(Box::new(row.into_info(&name)))),
            None => (self.name().to_owned(), None),
        };
        let waited = self.started.elapsed();
        Error::Timeout { name, waited, waiting_for: WaitingFor::Lock, held_by }
    }
}

/// However the attempt ends, by an error or because the caller has gone: a lease that it may have got is given back, and
/// nobody waits behind its place.
impl Drop for Attempt {
    fn drop(&mut self) {
        self.core.contenders.set(self.core.contenders.get() - 1);
        if self.unsettled.get() {
            for claim in &self.claims {
                release::undo(&self.core, Arc::clone(&claim.name), claim.secret.clone(), claim.ttl);
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
    /// Somebody else has it, for so long at least; zero when that is not known. So many are to have it before us.
    InTheWay {
        remaining: Duration,
        position: u32,
    },
    /// It is our turn, or we were to take a place in the queue, but somebody has the row locked or was quicker.
    RowIsBusy,
    /// The name is used as something else.
    WrongKind(Arc<str>, Kind),
}
