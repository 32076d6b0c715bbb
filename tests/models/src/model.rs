//! The bounds, the mutations and the properties.

use stateright::{Model, Property};

use crate::actions::Action;
use crate::state::{Answer, Phase, Request, State, Transaction, TransactionStage};

/// The protocol within bounds. Time, renewals, attempts, pauses and delays are not bounded.
#[derive(Clone, Debug)]
pub struct Protocol {
    /// The number of clients.
    pub clients: usize,
    /// How many times each of them wants the lock.
    pub acquisitions: u8,
    /// How many guarded transactions each of them begins.
    pub transactions: u8,
    /// Whether those may release the lease with their commit.
    pub releases_in: bool,
    /// How many successive holders a lease may have within its process.
    pub hands: u8,
    /// How many requests or answers are lost in total.
    pub losses: u8,
    /// How many of those requests may be waiting for late execution at the same time.
    pub late: usize,
    /// How many times the row is deleted.
    pub cleanings: u8,
    /// Whether the row may also be deleted while a lease is held, which takes the lease from its
    /// holder.
    pub cleans_held_rows: bool,
    /// Whether each client's clock may lose a tick during a lease.
    pub late_clocks: bool,
    /// Whether the database's clock was set back, and does not reach the last token again.
    /// Otherwise every grant is later than the previous one.
    pub clock_stands_still: bool,
    /// How many times a transaction without knowledge of leases locks the row, for any time.
    pub foreign_locks: u8,
    /// How many times the server crashes. It then has what was committed before the last commit that
    /// waited for the disk. A grant and a release don't wait; a grant is answered only later.
    pub crashes: u8,
    /// How many transactions take a snapshot and request the lock some time later.
    pub snapshots: u8,
    /// How long a takeover gives notice, in ticks. A holder that has just seen that no notice was
    /// given relies on `reliable_notice` of these ticks.
    pub notice: u8,
    pub reliable_notice: u8,
    /// How long a lease lasts, in ticks.
    pub ttl: u8,
    /// How many ticks of the TTL its holder relies on.
    pub reliable: u8,
    /// The rule that is left out, if any.
    pub mutation: Option<Mutation>,
}

/// A rule that is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mutation {
    ReleaseWithoutSecret,
    RenewalWithoutSecret,
    RenewalOfReleased,
    ExpiryByClientClock,
    GuardWithoutLock,
    /// The guard does not compare the fencing token.
    GuardBySecretAlone,
    DeadlineFromTheAnswer,
    AcquireNotIdempotent,
    NothingUndone,
    TokenOfTheRowAlone,
    TokenOfTheClockAlone,
    ReleaseInWithoutDoubt,
    /// A holder hands the lease on, and its guarded transaction continues.
    HandOnDuringTransaction,
    /// A holder hands the lease on after a commit without an answer.
    HandOnAfterLostCommit,
    /// Another transaction of a lease begins after a commit without an answer.
    BeginAfterLostCommit,
    /// An expired lease is taken at once.
    TakeoverWithoutNotice,
    /// A holder that can't renew relies on the row without checking whether notice was given.
    NoticeUnread,
    /// A guard accepts a lease that was released.
    GuardByReleased,
    /// The last holder counts as ruled out although one of its transactions may still commit.
    SettledUnderGuard,
    /// A transaction gets the lock if the token equals that of its snapshot.
    SnapshotByTokenAlone,
    /// A renewal that is sent and answered while `commit_and_release` is in progress ends the
    /// doubt.
    DoubtEndsWhileReleasing,
    /// A grant is answered before it is on disk.
    AnsweredBeforeFlush,
    /// A grant that a crash has undone is answered after a flush on the new server.
    FlushAfterCrash,
}

impl Default for Protocol {
    fn default() -> Self {
        Self {
            clients: 2,
            acquisitions: 1,
            transactions: 0,
            releases_in: false,
            hands: 1,
            losses: 0,
            late: 0,
            cleanings: 0,
            cleans_held_rows: false,
            late_clocks: false,
            clock_stands_still: false,
            foreign_locks: 0,
            crashes: 0,
            snapshots: 0,
            notice: 1,
            reliable_notice: 1,
            ttl: 2,
            reliable: 2,
            mutation: None,
        }
    }
}

impl Protocol {
    pub(crate) fn is(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }
}

/// The names of the properties.
pub mod property {
    pub const ONE_LEASE: &str = "at most one current lease by the database";
    pub const HOLDERS_HOLD: &str = "the lease of whose `is_held` is true can't be taken";
    pub const TOKENS_GROW: &str = "fencing tokens only grow";
    pub const COMMITS_ARE_SERIAL: &str = "no guarded commit after a newer grant";
    pub const COMMITS_ARE_IN_ORDER: &str =
        "no guarded commit after that of a later transaction of the same client";
    pub const OWN_ROW_ONLY: &str = "releases and renewals touch nobody else's lease";
    pub const SNAPSHOTS_ARE_NEW: &str =
        "no transaction works under the lock that may have read before the last holder's commit";
    pub const NOT_REFUSED_BY_ITSELF: &str = "nobody is refused because of a grant to itself";
    pub const NOTHING_LEFT: &str = "when nobody wants it any more and nothing is under way, it is free";
    pub const ALL_GRANTED: &str = "(reached) every client got the lock";
    pub const TAKEN_FROM_PAUSED: &str = "(reached) an open transaction of a lease that was taken over";
    pub const HANDED_ON: &str = "(reached) a guard by a lease that was handed on";
    pub const HELD_BY_LOOKING: &str = "(reached) a holder that can't renew, beyond its TTL";
    pub const GOOD_SNAPSHOT: &str = "(reached) a transaction that got the lock by its snapshot";
    pub const LATE_RELEASE: &str = "(reached) a release under way while another one holds it";
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State::new(self.clients)]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        actions.push(Action::Tick { missed_by: None });
        let mut steps = Vec::new();
        for (number, client) in (0_u8..).zip(&state.clients) {
            if self.late_clocks && !client.late_clock && client.phase != Phase::Idle {
                actions.push(Action::Tick { missed_by: Some(number) });
            }
            self.steps(state, client, &mut steps);
            actions.extend(steps.drain(..).map(|step| Action::Client(number, step)));
        }
        actions.extend((0..state.late.len()).map(Action::CarryOutLate));
        actions.extend((0..state.late_commits.len()).map(Action::CommitLate));
        if let Some(row) = &state.row
            && state.cleanings < self.cleanings
            && !row.is_locked()
            && (row.is_free() || self.cleans_held_rows)
        {
            actions.push(Action::CleanRow);
        }
        self.actions_of_others(state, actions);
    }

    fn next_state(&self, before: &State, action: Action) -> Option<State> {
        let mut after = before.clone();
        self.apply(&mut after, action);
        let after = self.without_differences(after);
        (after != *before).then_some(after)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties = vec![
            Property::<Self>::always(property::TOKENS_GROW, |_, state| !state.wrong.token_did_not_grow),
            Property::<Self>::always(property::COMMITS_ARE_SERIAL, |_, state| !state.wrong.late_commit),
            Property::<Self>::always(property::COMMITS_ARE_IN_ORDER, |_, state| {
                !state.wrong.overtaken_commit
            }),
            Property::<Self>::always(property::OWN_ROW_ONLY, |_, state| !state.wrong.touched_another),
            Property::<Self>::always(property::NOT_REFUSED_BY_ITSELF, |_, state| {
                !state.wrong.refused_by_itself
            }),
            Property::<Self>::always(property::SNAPSHOTS_ARE_NEW, |_, state| !state.wrong.old_snapshot),
            Property::<Self>::always(property::ONE_LEASE, |_, state| !state.wrong.two_leases),
            Property::<Self>::sometimes(property::ALL_GRANTED, |_, state| {
                state.clients.iter().all(|client| client.phase == Phase::Holding)
            }),
            Property::<Self>::sometimes(property::LATE_RELEASE, |_, state| {
                state.clients.iter().any(|client| client.phase == Phase::Releasing && client.lane.is_some())
                    && state.clients.iter().any(super::Client::is_held)
            }),
        ];
        if !self.cleans_held_rows {
            properties.push(Property::<Self>::always(property::HOLDERS_HOLD, |_, state| holders_hold(state)));
        }
        // A crash may undo a release. The lease then ends by itself.
        if self.late == 0 && self.crashes == 0 {
            properties.push(Property::<Self>::always(property::NOTHING_LEFT, |_, state| nothing_left(state)));
        }
        if self.foreign_locks > 0 {
            properties.push(Property::<Self>::sometimes(property::HELD_BY_LOOKING, |_, state| {
                let is_over = state.row.as_ref().is_some_and(|row| row.expires_in == 0 && !row.released);
                is_over && state.clients.iter().any(super::Client::is_held)
            }));
        }
        if self.snapshots > 0 {
            properties.push(Property::<Self>::sometimes(property::GOOD_SNAPSHOT, |_, state| {
                state.snapshot_was_good
            }));
        }
        if self.transactions > 0 && self.hands > 1 {
            properties.push(Property::<Self>::sometimes(property::HANDED_ON, |_, state| {
                state.clients.iter().any(|client| {
                    let is_guarded = |transaction: &Transaction| {
                        transaction.stage == TransactionStage::Guarded && transaction.hand > 0
                    };
                    client.transaction.as_ref().is_some_and(is_guarded)
                })
            }));
        }
        if self.transactions > 0 {
            properties.push(Property::<Self>::sometimes(property::TAKEN_FROM_PAUSED, |_, state| {
                state.clients.iter().any(|client| {
                    client.transaction.as_ref().is_some_and(|transaction| {
                        transaction.stage == TransactionStage::Open
                            && transaction.token < state.greatest_token
                    })
                })
            }));
        }
        properties
    }
}

impl Protocol {
    /// Removes what has no further effect, so that states that differ in nothing else become equal.
    fn without_differences(&self, mut state: State) -> State {
        for client in &mut state.clients {
            let (phase, acquisition, left) = (client.phase, client.acquisition, client.left);
            // Only the holder uses the answer of a renewal, and an answer that changes nothing can
            // be dropped.
            client.renewal.take_if(|renewal| {
                let is_heeded = phase == Phase::Holding && renewal.acquisition == acquisition;
                if !is_heeded {
                    (renewal.age, renewal.after_doubt) = (0, false);
                }
                match renewal.answer {
                    None => false,
                    Some(Answer::Ours) => {
                        let is_news = self.reliable - renewal.age > left || renewal.after_doubt;
                        let is_news = is_news || self.is(Mutation::DeadlineFromTheAnswer);
                        !is_heeded || !is_news
                    }
                    Some(Answer::NotOurs) => !is_heeded || left == 0,
                    Some(Answer::BusyUnchallenged) => {
                        !is_heeded || self.reliable_notice.saturating_sub(renewal.age) <= left
                    }
                    Some(_) => true,
                }
            });
            client.lane.take_if(|statement| {
                if phase != Phase::Acquiring || statement.request != Request::Acquire {
                    statement.age = 0;
                }
                match statement.request {
                    Request::Acquire => {
                        statement.answer.is_some() && phase != Phase::Acquiring
                            || statement.answer == Some(Answer::Refused)
                    }
                    Request::Renew | Request::Release => statement.answer == Some(Answer::Busy),
                }
            });
        }
        state.with_small_tokens()
    }
}

fn holders_hold(state: &State) -> bool {
    (0_u8..).zip(&state.clients).filter(|(_, client)| client.is_held()).all(|(number, client)| {
        state.row.as_ref().is_some_and(|row| {
            let is_ours = row
                .secret
                .is_some_and(|secret| secret.client == number && secret.acquisition == client.acquisition);
            is_ours && !row.is_free()
        })
    })
}

/// A late request may take a lease for a client that no longer wants it. That lease is over after a
/// TTL.
fn nothing_left(state: &State) -> bool {
    let at_rest = state.clients.iter().all(super::Client::is_at_rest);
    !at_rest || state.row.as_ref().is_none_or(|row| row.expires_in == 0)
}
