//! One attempt: what is asked of the database, and what it answers.

use std::rc::Rc;
use std::time::Duration;

use super::{Attempt, Obstacle, SHORTEST_PAUSE};
use crate::Kind;
use crate::database::{Claim, Cluster, Fault, Grant, LeaseKey, LockRow, RowKey, Waiters};
use crate::error::Failure;
use crate::name::Name;
use crate::session::core::Granted;

pub(super) enum Reply {
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
    /// It was granted, in an answer that took so long that too little of the TTL was left. It is ours for another attempt.
    TooLate(Duration),
}

impl Attempt {
    /// One attempt. Unless it is the first one it looks before it writes: a plain read costs the database next to nothing.
    pub(super) async fn ask(&mut self) -> Result<Reply, Failure> {
        let may_claim = std::mem::take(&mut self.may_claim);
        let looks_first = self.looks_first || (self.bell.is_some() && self.wait.is_some());
        if looks_first
            && !may_claim
            && let Some(in_the_way) = self.look_first().await?
        {
            return Ok(in_the_way);
        }
        // The second time with the rows that the first time made.
        let mut free = Vec::new();
        for _ in 0..2 {
            match self.claim().await {
                Ok(Some(reply)) => return Ok(reply),
                Ok(None) => {}
                // Who keeps us from writing keeps nobody from reading that there is a holder.
                Err(failure) if failure.is_busy() => {
                    let in_the_way = self.look_at_all().await;
                    let is_free = matches!(in_the_way, Ok(None));
                    let name = self.claims.first().map(|claim| claim.name.clone());
                    return in_the_way.ok().flatten().ok_or_else(|| match name {
                        Some(name) => failure.written_by_others(&name, is_free),
                        None => failure,
                    });
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
        Err((self.core.not_written)())
    }

    /// Whether one of them is in the way. Of several only the one is looked at that was in the way the last time: when that is free, the
    /// claim tells.
    async fn look_first(&mut self) -> Result<Option<Reply>, Failure> {
        let Some(position) = self.was_in_the_way.filter(|_| self.claims.len() > 1) else {
            return self.look_at_all().await;
        };
        let core = Rc::clone(&self.core);
        let Some(Claim { name, .. }) = self.claims.get(position) else { return Ok(None) };
        match core.lane.look(name).await? {
            Some(row) if row.kind == Kind::Insert && row.is_free() => Ok(None),
            Some(row) if row.kind == Kind::Insert && !row.notice_is_due() && !self.is_own(position, &row) => {
                let (name, remaining) = (name.clone(), row.remaining());
                Ok(Some(Reply::InTheWay { name, row, remaining, position: 0 }))
            }
            _ => self.look_at_all().await,
        }
    }

    /// Whether one of them is in the way, and which.
    async fn look_at_all(&mut self) -> Result<Option<Reply>, Failure> {
        if self.claims.len() == 1 { self.look(0).await } else { self.look_at_several().await }
    }

    /// Sends the claims to the database. Answers what came of it, unless one of them was not free.
    async fn claim(&mut self) -> Result<Option<Reply>, Failure> {
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
        // What is left has to do for the first renewal. What was granted is ours for another attempt.
        let took = sent.elapsed();
        if self.claims.iter().any(|claim| took > claim.ttl / 2) {
            return Ok(Some(Reply::TooLate(took)));
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
            let key = LeaseKey { row: RowKey { name, id }, secret, fencing_token, mark: 0, ttl, server };
            let turns = if others_wait { numbers.min(hand_off.turns) } else { numbers };
            Granted { key, numbers, turns, others_wait, ttl, sent }
        });
        Ok(Some(Reply::Granted(granted.collect())))
    }

    /// `look` for several, which have no places in queues, in one statement.
    async fn look_at_several(&mut self) -> Result<Option<Reply>, Failure> {
        let core = Rc::clone(&self.core);
        let names: Vec<Name> = self.claims.iter().map(|claim| claim.name.clone()).collect();
        let rows = core.lane.look_all(&names).await?;
        let (mut missing, mut free, mut over, mut held) = (Vec::new(), Vec::new(), Vec::new(), None);
        for (position, (name, row)) in names.into_iter().zip(rows).enumerate() {
            match row {
                None => missing.push(name),
                Some(row) if row.kind != Kind::Insert => return Ok(Some(Reply::WrongKind(name, row.kind))),
                Some(row) if self.is_own(position, &row) => {}
                Some(row) if row.is_free() => free.push((name, row)),
                Some(row) if row.notice_is_due() => over.push((name, row)),
                Some(row) => held = held.or(Some((position, name, row))),
            }
        }
        self.was_in_the_way = held.as_ref().map(|(position, ..)| *position);
        if let Some((_, name, row)) = &held {
            // Whatever becomes of the others.
            self.answered.set(true);
            self.is_held_by(name.clone(), row.clone());
        }
        // To all of them at once, also when another one is held for longer: each takes its time.
        let told = if over.is_empty() { Ok(0) } else { self.give_notice_to(&over).await };
        if let Some((_, name, row)) = held {
            let remaining = row.remaining();
            return Ok(Some(Reply::InTheWay { name, row, remaining, position: 0 }));
        }
        if let Some((name, row)) = over.iter().max_by_key(|(_, row)| row.notice()).cloned() {
            let is_over = over.iter().all(|(_, row)| row.remaining().is_zero());
            return Ok(Some(match told? {
                0 => Reply::RowIsBusy(over),
                // A deadline that lay too far ahead is drawn in: the next look tells how far.
                _ if !is_over => Reply::InTheWay { name, row, remaining: SHORTEST_PAUSE, position: 0 },
                _ => Reply::Noticed { name, row },
            }));
        }
        self.seen_free = free;
        if let Some(name) = self.create_rows(&missing).await? {
            return Ok(Some(Reply::RowIsMade(name)));
        }
        Ok(None)
    }

    /// Answers one whose row an open transaction has made. First that of the last time: among all of them it would have to be found again.
    async fn create_rows(&self, names: &[Name]) -> Result<Option<Name>, Failure> {
        let lane = &self.core.lane;
        if let Obstacle::Transaction(last) = &self.last
            && names.len() > 1
            && let Some(last) = names.iter().find(|name| *name == last)
            && let Some(name) = lane.create_all(std::slice::from_ref(last), Kind::Insert).await?
        {
            return Ok(Some(name));
        }
        lane.create_all(names, Kind::Insert).await
    }

    async fn give_notice_to(&self, over: &[(Name, LockRow)]) -> Result<u64, Failure> {
        let names: Vec<Name> = over.iter().map(|(name, _)| name.clone()).collect();
        self.core.lane.give_notice(&names).await
    }

    /// By a request whose answer was lost: the claims are in the order of their names.
    fn is_own(&self, position: usize, row: &LockRow) -> bool {
        self.claims.get(position).is_some_and(|claim| claim.secret.as_str() == row.secret_key)
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
        if self.is_own(position, &row) {
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
            return Ok(Some(match core.lane.give_notice(std::slice::from_ref(&name)).await? {
                0 => Reply::RowIsBusy(vec![(name, row)]),
                _ if is_over => Reply::Noticed { name, row },
                _ => Reply::InTheWay { name, row, remaining: SHORTEST_PAUSE, position: 0 },
            }));
        }
        let position = u32::try_from(ahead).unwrap_or(u32::MAX);
        Ok(Some(Reply::InTheWay { name, row, remaining, position }))
    }
}
