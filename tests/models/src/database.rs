//! What the statements do: one step each, in the order in which they lock the row. Modeled after
//! the SQL in `lock-db/src/database`.

use crate::model::{Mutation, Protocol};
use crate::state::{Answer, Client, Request, Row, RowLock, Secret, State, Transaction};

impl Protocol {
    pub(crate) fn carry_out(&self, state: &mut State, secret: Secret, request: Request) -> Answer {
        match request {
            Request::Acquire => self.acquire(state, secret),
            Request::Renew => {
                let answer = self.renew(state, secret);
                self.flush(state);
                answer
            }
            Request::Release => self.release(state, secret),
        }
    }

    /// Whether what is not on disk can still be lost.
    pub(crate) fn may_crash(&self, state: &State) -> bool {
        state.crashes < self.crashes
    }

    /// A commit that waits for the disk, and so for all earlier ones.
    pub(crate) fn flush(&self, state: &mut State) {
        if !self.may_crash(state) {
            return;
        }
        state.disk = state.row.clone();
        if let Some(row) = &mut state.disk {
            (row.lock, row.foreign_lock) = (None, false);
        }
        for lane in state.clients.iter_mut().filter_map(|client| client.lane.as_mut()) {
            lane.durable = lane.answer.is_some();
        }
    }

    /// The server forgets what is not on disk, and every session ends.
    pub(crate) fn crash(&self, state: &mut State) {
        state.row = state.disk.take();
        state.crashes += 1;
        if self.may_crash(state) {
            state.disk = state.row.clone();
        }
        state.latest_token = state.row.as_ref().map_or(0, |row| row.token);
        (state.late, state.late_commits) = (Vec::new(), Vec::new());
        for client in &mut state.clients {
            client.lose_connections(self.is(Mutation::FlushAfterCrash));
            if let Some(lane) = &mut client.lane {
                lane.durable = false;
            }
        }
    }

    fn acquire(&self, state: &mut State, secret: Secret) -> Answer {
        // A missing row is made by the claim.
        let row = state.row.get_or_insert_default();
        // SKIP LOCKED
        if row.is_locked() {
            return Answer::Refused;
        }
        let again = row.secret == Some(secret);
        let is_free = match self.mutation {
            // The clock of every other client is one tick ahead of the database's.
            Some(Mutation::ExpiryByClientClock) => row.expires_in <= secret.client % 2,
            Some(Mutation::TakeoverWithoutNotice) => row.expires_in == 0,
            _ => row.is_free(),
        };
        let idempotent = again && !self.is(Mutation::AcquireNotIdempotent);
        if !is_free && !idempotent {
            state.wrong.refused_by_itself |= again;
            return Answer::Refused;
        }
        if !again {
            state.wrong.two_leases |= row.expires_in > 0;
            let clock = if self.clock_stands_still { 0 } else { state.greatest_token + 1 };
            row.token = match self.mutation {
                Some(Mutation::TokenOfTheRowAlone) => row.token + 1,
                Some(Mutation::TokenOfTheClockAlone) => clock,
                _ => clock.max(row.token + 1),
            };
            state.wrong.token_did_not_grow |= row.token <= state.greatest_token;
            if row.token > state.greatest_token {
                (state.greatest_token, state.greatest_hand) = (row.token, 0);
            }
            state.latest_token = state.greatest_token;
        }
        row.secret = Some(secret);
        row.expires_in = self.ttl;
        (row.released, row.noticed, row.settled) = (false, false, false);
        Answer::Granted(row.token)
    }

    fn renew(&self, state: &mut State, secret: Secret) -> Answer {
        let Some(row) = &mut state.row else { return Answer::NotOurs };
        let is_ours = row.secret == Some(secret);
        let found = is_ours || self.is(Mutation::RenewalWithoutSecret);
        if !found || row.released && !self.is(Mutation::RenewalOfReleased) {
            return Answer::NotOurs;
        }
        if row.foreign_lock || row.lock.as_ref().is_some_and(|lock| lock.releases) {
            let is_challenged = row.noticed && !self.is(Mutation::NoticeUnread);
            return if is_challenged { Answer::Busy } else { Answer::BusyUnchallenged };
        }
        state.wrong.touched_another |= !is_ours;
        row.expires_in = self.ttl;
        (row.released, row.noticed) = (false, false);
        Answer::Ours
    }

    fn release(&self, state: &mut State, secret: Secret) -> Answer {
        let Some(row) = &mut state.row else { return Answer::NotOurs };
        let is_ours = row.secret == Some(secret);
        if !is_ours && !self.is(Mutation::ReleaseWithoutSecret) {
            return Answer::NotOurs;
        }
        if row.foreign_lock || row.lock.as_ref().is_some_and(|lock| lock.releases) {
            return Answer::Busy;
        }
        state.wrong.touched_another |= !is_ours && row.expires_in > 0;
        row.expires_in = 0;
        // The lease can be released under a guard, but one of its transactions may commit
        // afterwards.
        (row.released, row.settled) = (true, row.lock.is_none());
        Answer::Ours
    }

    /// The last statement before COMMIT. `false`: not ours.
    pub(crate) fn guard(
        &self,
        state: &mut State,
        secret: Secret,
        transaction: &Transaction,
        releases: bool,
    ) -> bool {
        // A secret can be granted twice: an attempt that was repeated may arrive once more after
        // the lease is over.
        let is_ours = |row: &Row| {
            row.secret == Some(secret)
                && !row.foreign_lock
                && (row.token == transaction.token || self.is(Mutation::GuardBySecretAlone))
                && (!row.released || self.is(Mutation::GuardByReleased))
        };
        let Some(row) = state.row.as_mut().filter(|row| is_ours(row)) else { return false };
        if releases || !self.is(Mutation::GuardWithoutLock) {
            row.lock = Some(RowLock { client: secret.client, releases });
        }
        true
    }

    pub(crate) fn commit(&self, state: &mut State, client: u8, transaction: &Transaction) {
        let is_last = (transaction.token, transaction.hand) == (state.latest_token, state.greatest_hand);
        state.wrong.late_commit |= !is_last;
        let last_committed = &mut state.clients[usize::from(client)].last_committed;
        state.wrong.overtaken_commit |= transaction.number < *last_committed;
        *last_committed = transaction.number.max(*last_committed);
        if let Some(row) = state.row.as_mut()
            && row.lock.as_ref().is_some_and(|lock| lock.client == client && lock.releases)
        {
            row.expires_in = 0;
            (row.released, row.settled) = (true, true);
        }
        if let Some(snapshot) = &mut state.snapshot {
            snapshot.is_old = true;
        }
        end(state, client);
        self.flush(state);
    }
}

impl Protocol {
    /// Whether a takeover gives notice.
    pub(crate) fn notice_is_due(&self, row: &Row) -> bool {
        let may_write = !row.foreign_lock && !row.lock.as_ref().is_some_and(|lock| lock.releases);
        may_write && !row.released && !row.noticed && row.expires_in <= self.notice
    }

    pub(crate) fn give_notice(&self, row: &mut Row) {
        row.noticed = true;
        row.expires_in = row.expires_in.max(self.notice);
    }

    /// Whether the last holder of a free lock can be ruled out.
    pub(crate) fn can_be_settled(&self, row: &Row) -> bool {
        row.is_free() && !row.settled && (!row.is_locked() || self.is(Mutation::SettledUnderGuard))
    }

    /// Removes the secret, so that no transaction can commit by it any more.
    pub(crate) fn settle(row: &mut Row) {
        row.secret = None;
        (row.released, row.noticed, row.settled) = (true, false, true);
    }

    /// A transaction with a snapshot requests the lock. `false`: refused.
    pub(crate) fn lock_by_snapshot(&self, state: &mut State) -> bool {
        let Some(snapshot) = state.snapshot.take() else { return false };
        let Some(row) = &mut state.row else { return false };
        let seen = if self.is(Mutation::SnapshotByTokenAlone) { snapshot.token } else { snapshot.settled };
        let is_good = row.is_free()
            && seen == Some(row.token)
            && (row.settled || self.is(Mutation::SnapshotByTokenAlone));
        if is_good {
            state.wrong.old_snapshot |= snapshot.is_old;
            state.wrong.two_leases |= state.clients.iter().any(Client::is_held);
            // The transaction commits at once, because the others could do nothing in the meantime.
            row.token = row.token.max(state.greatest_token) + 1;
            (state.greatest_token, state.greatest_hand) = (row.token, 0);
            state.latest_token = row.token;
            Self::settle(row);
        }
        is_good
    }
}

/// Ends a transaction, which unlocks its row.
pub(crate) fn end(state: &mut State, client: u8) {
    if let Some(row) = &mut state.row
        && row.lock.as_ref().is_some_and(|lock| lock.client == client)
    {
        row.lock = None;
    }
}
