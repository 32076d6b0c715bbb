//! What the statements do: one step each, as the row's lock orders them. After the SQL in `lock-db/src/database`.

use crate::model::{Mutation, Protocol};
use crate::state::{Answer, Request, Row, RowLock, Secret, State, Transaction};

impl Protocol {
    pub(crate) fn carry_out(&self, state: &mut State, secret: Secret, request: Request) -> Answer {
        match request {
            Request::Acquire => self.acquire(state, secret),
            Request::Renew => self.renew(state, secret),
            Request::Release => self.release(state, secret),
        }
    }

    fn acquire(&self, state: &mut State, secret: Secret) -> Answer {
        // A missing row is made, free, and then asked for again.
        let row = state.row.get_or_insert(Row {
            secret: None,
            token: 0,
            expires_in: 0,
            released: true,
            lock: None,
        });
        // SKIP LOCKED
        if row.lock.is_some() {
            return Answer::Refused;
        }
        let again = row.secret == Some(secret);
        let is_free = if self.is(Mutation::ExpiryByClientClock) {
            // Every other client's clock goes ahead of the database's by a tick.
            row.expires_in <= secret.client % 2
        } else {
            row.expires_in == 0
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
        }
        row.secret = Some(secret);
        row.expires_in = self.ttl;
        row.released = false;
        Answer::Granted(row.token)
    }

    fn renew(&self, state: &mut State, secret: Secret) -> Answer {
        let Some(row) = &mut state.row else { return Answer::NotOurs };
        let is_ours = row.secret == Some(secret);
        let found = is_ours || self.is(Mutation::RenewalWithoutSecret);
        if !found || row.released && !self.is(Mutation::RenewalOfReleased) {
            return Answer::NotOurs;
        }
        if row.lock.as_ref().is_some_and(|lock| lock.releases) {
            return Answer::Busy;
        }
        state.wrong.touched_another |= !is_ours;
        row.expires_in = self.ttl;
        row.released = false;
        Answer::Ours
    }

    fn release(&self, state: &mut State, secret: Secret) -> Answer {
        let Some(row) = &mut state.row else { return Answer::NotOurs };
        let is_ours = row.secret == Some(secret);
        if !is_ours && !self.is(Mutation::ReleaseWithoutSecret) {
            return Answer::NotOurs;
        }
        if row.lock.as_ref().is_some_and(|lock| lock.releases) {
            return Answer::Busy;
        }
        state.wrong.touched_another |= !is_ours && row.expires_in > 0;
        row.expires_in = 0;
        row.released = true;
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
        // A secret can be granted twice: an attempt that was made again may arrive once more after the lease is over.
        let is_ours = |row: &Row| {
            row.secret == Some(secret)
                && (row.token == transaction.token || self.is(Mutation::GuardBySecretAlone))
        };
        let Some(row) = state.row.as_mut().filter(|row| is_ours(row)) else { return false };
        if releases || !self.is(Mutation::GuardWithoutLock) {
            row.lock = Some(RowLock { client: secret.client, releases });
        }
        true
    }

    pub(crate) fn commit(state: &mut State, client: u8, transaction: &Transaction) {
        let is_last = (transaction.token, transaction.hand) == (state.greatest_token, state.greatest_hand);
        state.wrong.late_commit |= !is_last;
        let last_committed = &mut state.clients[usize::from(client)].last_committed;
        state.wrong.overtaken_commit |= transaction.number < *last_committed;
        *last_committed = transaction.number.max(*last_committed);
        if let Some(row) = state.row.as_mut()
            && row.lock.as_ref().is_some_and(|lock| lock.client == client && lock.releases)
        {
            row.expires_in = 0;
            row.released = true;
        }
        end(state, client);
    }
}

/// The end of a transaction gives its lock back.
pub(crate) fn end(state: &mut State, client: u8) {
    if let Some(row) = &mut state.row
        && row.lock.as_ref().is_some_and(|lock| lock.client == client)
    {
        row.lock = None;
    }
}
