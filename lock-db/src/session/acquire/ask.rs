//! One attempt: what it asks of the database, and the answers.

use std::rc::Rc;
use std::time::Duration;

use super::{AcquireAttempt, Obstacle, SHORTEST_PAUSE};
use crate::Kind;
use crate::database::Failure;
use crate::database::{Claim, Cluster, Fault, Grant, LeaseKey, LockRow, RowKey, WaitQueue, begins_with};
use crate::name::Name;
use crate::secret::Secret;
use crate::session::held_lease::Granted;
use crate::session::wakeup::scan;

pub(super) enum AttemptOutcome {
    Granted(Vec<Granted>),
    /// Another process holds the lock, for `remaining` at least; zero if that is unknown.
    /// `position` is the number of requests ahead in the queue.
    InTheWay {
        name: Name,
        row: LockRow,
        remaining: Duration,
        position: u32,
    },
    /// The holder was given notice. The lock is free after the notice, unless the lease is renewed.
    Noticed {
        name: Name,
        row: LockRow,
    },
    /// The lock could be taken, or a queue entry was to be written, but another transaction has one
    /// of these rows locked or was faster.
    RowIsBusy(Vec<(Name, LockRow)>),
    /// A transaction that is the first to use the name holds the lock, and has created the row.
    RowIsMade(Name),
    /// The name is used for another kind of lock.
    WrongKind(Name, Kind),
    /// Granted, but the answer took so long that too little of the TTL is left. Another attempt
    /// gets the lease again.
    TooLate(Duration),
}

impl AcquireAttempt {
    /// Makes one attempt. Every attempt but the first reads before it writes, because a plain read
    /// costs the database next to nothing.
    pub(super) async fn ask(&mut self) -> Result<AttemptOutcome, Failure> {
        let may_claim = std::mem::take(&mut self.may_claim);
        let reads_first = self.reads_first || (self.signal.is_some() && !self.wait.is_try());
        if reads_first
            && !may_claim
            && let Some(in_the_way) = self.read_first().await?
        {
            return Ok(in_the_way);
        }
        // The second round uses the rows that the first one created.
        let mut free = Vec::new();
        for _ in 0..2 {
            let claimed = match self.make_rows().await {
                Ok(Some(name)) => return Ok(AttemptOutcome::RowIsMade(name)),
                Ok(None) => self.claim().await,
                Err(failure) => Err(failure),
            };
            match claimed {
                Ok(Some(outcome)) => return Ok(outcome),
                Ok(None) => {}
                // What blocks a write does not block a read, which shows whether there is a holder.
                Err(failure) if failure.is_busy() => {
                    let in_the_way = self.read_each().await;
                    let is_free = matches!(in_the_way, Ok(None));
                    let name = self.claims.first().map(|claim| claim.name.clone());
                    return in_the_way.ok().flatten().ok_or_else(|| match name {
                        Some(name) => failure.written_by_others(&name, is_free),
                        None => failure,
                    });
                }
                Err(failure) => return Err(failure),
            }
            if let Some(in_the_way) = self.read_each().await? {
                return Ok(in_the_way);
            }
            let seen_free = std::mem::take(&mut self.seen_free);
            if !seen_free.is_empty() {
                free = seen_free;
            }
        }
        if !free.is_empty() {
            return Ok(AttemptOutcome::RowIsBusy(free));
        }
        // Otherwise the row was created, but can't be seen.
        Err((self.actor.not_written)())
    }

    /// Whether one of the locks is not free. Of several, only the one is read that was not free the
    /// last time. If it is free now, the claim finds out about the others.
    async fn read_first(&mut self) -> Result<Option<AttemptOutcome>, Failure> {
        let Some(position) = self.was_in_the_way.filter(|_| self.claims.len() > 1) else {
            return self.read_each().await;
        };
        let actor = Rc::clone(&self.actor);
        let Some(Claim { name, .. }) = self.claims.get(position) else { return Ok(None) };
        match actor.worker.read(name).await? {
            Some(row) if row.kind == Kind::Insert && row.is_free() => Ok(None),
            Some(row) if row.kind == Kind::Insert && !row.notice_is_due() && !self.is_own(position, &row) => {
                let (name, remaining) = (name.clone(), row.remaining());
                Ok(Some(AttemptOutcome::InTheWay { name, row, remaining, position: 0 }))
            }
            _ => self.read_each().await,
        }
    }

    /// Whether one of the locks is not free, and which.
    async fn read_each(&mut self) -> Result<Option<AttemptOutcome>, Failure> {
        if self.claims.len() == 1 { self.read(0).await } else { self.read_several().await }
    }

    /// Sends the claims to the database. `None`: one of the locks was not free.
    async fn claim(&mut self) -> Result<Option<AttemptOutcome>, Failure> {
        // If this attempt gets nothing, that does not settle what an earlier one may have got.
        let unsettled_before = self.unsettled.get();
        let (grants, server, sent) =
            match self.actor.worker.acquire(self.claims.clone(), &self.unsettled).await {
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
        // The rest of the TTL has to last until the first renewal. Another attempt gets the lease
        // again.
        let took = sent.elapsed();
        if self.claims.iter().any(|claim| took > claim.ttl / 2) {
            return Ok(Some(AttemptOutcome::TooLate(took)));
        }
        let hand_off = self.actor.queues.hand_off();
        let granted = self.claims.iter().zip(grants).map(|(claim, grant)| {
            let Grant { id, fencing_token, tokens, others_wait } = grant;
            let Claim { name, secret, ttl, .. } = claim.clone();
            // Without a waiter in this process a grant uses only the token in the row. The same
            // holds for a new row, although it shows no earlier grant: if the row was cleaned up
            // and created again, there may have been a grant a moment ago, with tokens of this
            // range.
            let is_new_row = tokens == fencing_token;
            let may_hand_on = !is_new_row && self.actor.queues.has_waiters(&name);
            let most = if may_hand_on { hand_off.most_holders() } else { 1 };
            let tokens = u32::try_from(tokens).unwrap_or(u32::MAX).clamp(1, most);
            let server = server.clone();
            let key = LeaseKey { row: RowKey { name, id }, secret, fencing_token, mark: 0, ttl, server };
            let holders = if others_wait { tokens.min(hand_off.holders) } else { tokens };
            Granted { key, tokens, holders, others_wait, ttl, sent }
        });
        Ok(Some(AttemptOutcome::Granted(granted.collect())))
    }

    /// `read` for several names in one statement. They have no queue entries.
    async fn read_several(&mut self) -> Result<Option<AttemptOutcome>, Failure> {
        let actor = Rc::clone(&self.actor);
        let names: Vec<Name> = self.claims.iter().map(|claim| claim.name.clone()).collect();
        let rows = actor.worker.read_all(&names).await?;
        let (mut missing, mut free, mut over, mut held) = (Vec::new(), Vec::new(), Vec::new(), None);
        for (position, (name, row)) in names.into_iter().zip(rows).enumerate() {
            match row {
                None => {
                    self.actor.known_names.remove(&name);
                    missing.push(name);
                }
                Some(row) if row.kind != Kind::Insert => {
                    return Ok(Some(AttemptOutcome::WrongKind(name, row.kind)));
                }
                Some(row) if self.is_own(position, &row) => {}
                Some(row) if row.is_free() => free.push((name, row)),
                Some(row) if row.notice_is_due() => over.push((name, row)),
                Some(row) => held = held.or(Some((position, name, row))),
            }
        }
        self.was_in_the_way = held.as_ref().map(|(position, ..)| *position);
        if let Some((_, name, row)) = &held {
            // Independent of what becomes of the others.
            self.answered.set(true);
            self.set_holder(name.clone(), row.clone());
        }
        // Notice is given to all of them at once, even if another lock is held for longer: each
        // notice takes its time.
        let told = if over.is_empty() { Ok(0) } else { self.give_notice_to(&over).await };
        if let Some((_, name, row)) = held {
            let remaining = row.remaining();
            return Ok(Some(AttemptOutcome::InTheWay { name, row, remaining, position: 0 }));
        }
        if let Some((name, row)) = over.iter().max_by_key(|(_, row)| row.notice()).cloned() {
            let is_over = over.iter().all(|(_, row)| row.remaining().is_zero());
            return Ok(Some(match told? {
                0 => AttemptOutcome::RowIsBusy(over),
                // A deadline too far ahead was shortened. The next read returns the new one.
                _ if !is_over => {
                    AttemptOutcome::InTheWay { name, row, remaining: SHORTEST_PAUSE, position: 0 }
                }
                _ => AttemptOutcome::Noticed { name, row },
            }));
        }
        self.seen_free = free;
        if let Some(name) = self.create_rows(&missing).await? {
            return Ok(Some(AttemptOutcome::RowIsMade(name)));
        }
        Ok(None)
    }

    /// Makes the rows of several names that are probably new. A claim for all or none makes no rows, and
    /// would only find that they are missing. Returns a name as [`create_rows`](Self::create_rows) does.
    async fn make_rows(&mut self) -> Result<Option<Name>, Failure> {
        let new: Vec<Name> =
            self.claims.iter().filter(|claim| claim.makes_row).map(|claim| claim.name.clone()).collect();
        if self.claims.len() < 2 || new.is_empty() {
            return Ok(None);
        }
        let in_the_way = self.create_rows(&new).await?;
        if in_the_way.is_none() {
            for position in 0..self.claims.len() {
                self.note_row(position, true);
            }
        }
        Ok(in_the_way)
    }

    /// Returns a name whose row an open transaction has created. The name of the last time is tried
    /// first; among all of them it would have to be found again.
    async fn create_rows(&self, names: &[Name]) -> Result<Option<Name>, Failure> {
        let worker = &self.actor.worker;
        if let Obstacle::Transaction(last) = &self.last
            && names.len() > 1
            && let Some(last) = names.iter().find(|name| *name == last)
            && let Some(name) = worker.create_all(std::slice::from_ref(last), Kind::Insert).await?
        {
            return Ok(Some(name));
        }
        worker.create_all(names, Kind::Insert).await
    }

    async fn give_notice_to(&self, over: &[(Name, LockRow)]) -> Result<u64, Failure> {
        let names: Vec<Name> = over.iter().map(|(name, _)| name.clone()).collect();
        self.actor.worker.give_notice(&names).await
    }

    /// Whether a request of ours whose answer was lost has taken it. The claims are in the order of
    /// their names.
    fn is_own(&self, position: usize, row: &LockRow) -> bool {
        self.claims.get(position).is_some_and(|claim| claim.secret.as_str() == row.secret_key)
    }

    /// Reads whether a lock is free, and creates its row if there is none. A waiting request also
    /// adds its entry to the queue.
    async fn read(&mut self, position: usize) -> Result<Option<AttemptOutcome>, Failure> {
        let Some(Claim { name, entry: secret, .. }) = self.claims.get(position).cloned() else {
            return Ok(None);
        };
        let actor = Rc::clone(&self.actor);
        let Some(row) = actor.worker.read(&name).await? else {
            return self.after_a_missing_row(position, name).await;
        };
        self.note_row(position, true);
        if row.kind != Kind::Insert {
            return Ok(Some(AttemptOutcome::WrongKind(name, row.kind)));
        }
        if self.is_own(position, &row) {
            return Ok(None);
        }
        let (remaining, is_free) = (row.remaining(), row.is_free());
        if !remaining.is_zero() {
            // Independent of what becomes of the queue entry.
            self.answered.set(true);
            self.set_holder(name.clone(), row.clone());
        }
        let (ahead, written) = match secret {
            Some(secret) => self.keep_entry(&name, &row, &secret).await,
            None => (0, Ok(true)),
        };
        let written = match written {
            // The lock is held, whether or not the queue entry was written.
            Err(failure) if failure.is_busy() && !remaining.is_zero() => {
                let position = u32::try_from(ahead).unwrap_or(u32::MAX);
                return Ok(Some(AttemptOutcome::InTheWay { name, row, remaining, position }));
            }
            written => written?,
        };
        if is_free && ahead == 0 && written {
            self.seen_free.push((name, row));
            return Ok(None);
        }
        if !written {
            return Ok(Some(AttemptOutcome::RowIsBusy(vec![(name, row)])));
        }
        if ahead == 0 && row.notice_is_due() {
            // A deadline too far ahead was shortened. The next read returns the new one.
            let is_over = row.remaining().is_zero();
            return Ok(Some(match actor.worker.give_notice(std::slice::from_ref(&name)).await? {
                0 => AttemptOutcome::RowIsBusy(vec![(name, row)]),
                _ if is_over => AttemptOutcome::Noticed { name, row },
                _ => AttemptOutcome::InTheWay { name, row, remaining: SHORTEST_PAUSE, position: 0 },
            }));
        }
        let position = u32::try_from(ahead).unwrap_or(u32::MAX);
        Ok(Some(AttemptOutcome::InTheWay { name, row, remaining, position }))
    }

    /// The next claim makes the row. If a claim that was to make it did not, the row is made alone,
    /// which tells whether an open transaction has made it.
    async fn after_a_missing_row(
        &mut self,
        position: usize,
        name: Name,
    ) -> Result<Option<AttemptOutcome>, Failure> {
        if self.note_row(position, false) {
            return Ok(None);
        }
        let made = self.actor.worker.create(&name, Kind::Insert).await?;
        Ok((!made).then_some(AttemptOutcome::RowIsMade(name)))
    }

    /// Records whether a row exists. Returns whether that is news.
    fn note_row(&mut self, position: usize, exists: bool) -> bool {
        let Some(claim) = self.claims.get_mut(position) else { return false };
        let known = &self.actor.known_names;
        if exists {
            known.insert(&claim.name);
        } else {
            known.remove(&claim.name);
        }
        std::mem::replace(&mut claim.makes_row, !exists) == exists
    }

    /// Keeps this process's entry in the queue of the row, if the request waits. Returns how many
    /// requests are ahead, and whether the row could be written where that was necessary.
    async fn keep_entry(
        &mut self,
        name: &Name,
        row: &LockRow,
        secret: &Secret,
    ) -> (usize, Result<bool, Failure>) {
        if row.is_free() && row.waiters.is_empty() {
            return (0, Ok(true));
        }
        let actor = Rc::clone(&self.actor);
        let now = row.now();
        let mut waiters = WaitQueue::parse(&row.waiters, now);
        let all_last = waiters.text().len() == row.waiters.len();
        // On a cluster, a queue entry written on another node would conflict with the holder's
        // guarded transactions.
        let may_have_entry = actor.worker.cluster() == Cluster::SinglePrimary;
        let waits = may_have_entry && !self.wait.is_try() && !self.left().is_zero();
        if waits {
            self.signal = Some(actor.notifications.enqueue(name, row.id));
            actor.listen();
            scan::begin(&actor);
        }
        let entry = actor.queue_entry();
        let has_changed = waits && waiters.enqueue(&entry, now);
        // A try has no queue entry: it comes after all requests that have one.
        let ahead = waiters.position(secret).unwrap_or_else(|| waiters.len());
        // Expired entries in front are removed. Otherwise the row does not show that this process
        // is next.
        let is_known = !waiters.is_empty() && begins_with(&row.waiters, secret);
        if has_changed && all_last {
            return (ahead, actor.worker.enqueue(name, entry).await);
        }
        if has_changed || (row.is_free() && ahead == 0 && !is_known) {
            return (ahead, actor.worker.set_waiters(name, &row.waiters, waiters.text()).await);
        }
        (ahead, Ok(true))
    }
}
