//! The actions that can happen next, and how clients react. Modeled after `lock-db/src/session` and
//! `lock-db/src/lease`.

use crate::database::end;
use crate::model::{Mutation, Protocol};
use crate::state::{
    Answer, Client, Phase, Request, Secret, Snapshot, State, Statement, Transaction,
    TransactionStage as Stage,
};

/// One action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// All clocks advance, except perhaps the clock of one client.
    Tick {
        /// The client whose clock is late.
        missed_by: Option<u8>,
    },
    /// The row is deleted.
    CleanRow,
    /// The server executes a request that no client waits for any more.
    CarryOutLate(usize),
    /// The same for a commit.
    CommitLate(usize),
    /// A takeover gives notice to the holder of a lease that has expired, or nearly so.
    GiveNotice,
    /// The last holder is ruled out.
    Settle,
    /// A commit waits for the disk, or the server writes its log by itself.
    Flush,
    /// The server is killed, and starts again.
    Crash,
    /// A transaction without knowledge of leases locks the row, or ends.
    LockByOthers,
    UnlockByOthers,
    /// A transaction that is to take the lock itself reads something.
    TakeSnapshot,
    /// That transaction requests the lock.
    LockBySnapshot,
    /// A step of a client or of its connections.
    Client(u8, Step),
}

/// A private connection of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// For statements that callers wait for.
    Callers,
    /// For the watchdog.
    Renewals,
}

/// What happens at a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    Want,
    SendAcquire,
    GiveUp,
    SendRenewal,
    /// To the next holder in the same process.
    HandOn,
    Release,
    SendRelease,
    CarryOut(Lane),
    Hear(Lane),
    /// The request or its answer is lost.
    Lose(Lane),
    /// The connection is given up, and the request arrives later.
    LoseUntilLater(Lane),
    /// Data that is written without a guard.
    CommitUnguarded,
    BeginTransaction,
    Guard,
    Commit,
    /// The connection is given up while guard and commit are on their way.
    LoseCommit,
    RollBack,
    SendReleaseIn,
    CarryOutReleaseIn,
    HearReleaseIn,
    CommitAndRelease,
    HearReleased,
    LoseReleased,
}

impl Client {
    fn lane(&self, lane: Lane) -> Option<&Statement> {
        match lane {
            Lane::Callers => self.lane.as_ref(),
            Lane::Renewals => self.renewal.as_ref(),
        }
    }

    fn lane_mut(&mut self, lane: Lane) -> &mut Option<Statement> {
        match lane {
            Lane::Callers => &mut self.lane,
            Lane::Renewals => &mut self.renewal,
        }
    }

    fn send(&mut self, request: Request) {
        let (acquisition, after_doubt) = (self.acquisition, self.doubt);
        let lane = if request == Request::Renew { Lane::Renewals } else { Lane::Callers };
        *self.lane_mut(lane) =
            Some(Statement { request, acquisition, age: 0, after_doubt, answer: None, durable: false });
    }

    /// Begins a doubt. Answers to earlier requests do not end it.
    fn doubt_anew(&mut self) {
        self.doubt = self.phase == Phase::Holding;
        if let Some(renewal) = &mut self.renewal {
            renewal.after_doubt = false;
        }
    }

    fn rest(&mut self) {
        self.phase = Phase::Idle;
        (self.unsettled, self.late_clock, self.doubt) = (false, false, false);
        (self.token, self.left) = (0, 0);
        (self.hand, self.commit_is_open) = (0, false);
    }

    /// Whether a statement that releases the lease, or its commit, is on its way.
    fn is_releasing_in(&self) -> bool {
        let stage = self.transaction.as_ref().map(|transaction| transaction.stage);
        matches!(stage, Some(Stage::ReleaseSent | Stage::ReleaseDone | Stage::Released))
    }

    /// The server has crashed.
    pub(crate) fn lose_connections(&mut self, keeps_answers: bool) {
        let is_lost = |statement: &mut Statement| !(keeps_answers && statement.answer.is_some());
        if let Some(statement) = self.lane.take_if(is_lost) {
            self.unsettled |= statement.request == Request::Acquire && self.phase == Phase::Acquiring;
        }
        self.renewal = None;
        if let Some(transaction) = self.transaction.take()
            && matches!(transaction.stage, Stage::ReleaseSent | Stage::ReleaseDone | Stage::Released)
        {
            self.doubt_anew();
        }
    }

    fn tick(&mut self, longest: u8, missed: bool) {
        if missed {
            self.late_clock = true;
            return;
        }
        self.left = self.left.saturating_sub(1);
        for statement in [&mut self.lane, &mut self.renewal].into_iter().flatten() {
            statement.age = (statement.age + 1).min(longest);
        }
    }
}

impl Protocol {
    pub(crate) fn steps(&self, state: &State, client: &Client, steps: &mut Vec<Step>) {
        match client.phase {
            Phase::Idle if client.acquisition < self.acquisitions && client.lane.is_none() => {
                steps.push(Step::Want);
            }
            Phase::Acquiring => {
                if client.lane.is_none() {
                    steps.push(Step::SendAcquire);
                }
                if client.lane.is_none() || !self.is(Mutation::NothingUndone) {
                    steps.push(Step::GiveUp);
                }
            }
            Phase::Holding => {
                if client.renewal.is_none() {
                    steps.push(Step::SendRenewal);
                }
                let is_in_use = client.transaction.is_some() && !self.is(Mutation::HandOnDuringTransaction)
                    || client.commit_is_open && !self.is(Mutation::HandOnAfterLostCommit);
                if client.is_held() && client.hand + 1 < self.hands && !is_in_use {
                    steps.push(Step::HandOn);
                }
                if client.is_held() && state.snapshot.as_ref().is_some_and(|snapshot| !snapshot.is_old) {
                    steps.push(Step::CommitUnguarded);
                }
                if client.transaction.is_none() {
                    steps.push(Step::Release);
                    let may_begin = !client.commit_is_open || self.is(Mutation::BeginAfterLostCommit);
                    if client.is_held() && may_begin && client.transactions < self.transactions {
                        steps.push(Step::BeginTransaction);
                    }
                }
            }
            Phase::Releasing if client.lane.is_none() => steps.push(Step::SendRelease),
            Phase::Releasing | Phase::Idle => {}
        }
        for lane in [Lane::Callers, Lane::Renewals] {
            let Some(statement) = client.lane(lane) else { continue };
            let can_be_lost = state.losses < self.losses;
            if let Some(answer) = statement.answer {
                let is_grant = matches!(answer, Answer::Granted(_)) && self.may_crash(state);
                if !is_grant || statement.durable || self.is(Mutation::AnsweredBeforeFlush) {
                    steps.push(Step::Hear(lane));
                }
            } else {
                steps.push(Step::CarryOut(lane));
                if can_be_lost && state.late.len() < self.late {
                    steps.push(Step::LoseUntilLater(lane));
                }
            }
            if can_be_lost {
                steps.push(Step::Lose(lane));
            }
        }
        let Some(transaction) = &client.transaction else { return };
        match transaction.stage {
            Stage::Open => {
                steps.extend([Step::Guard, Step::RollBack]);
                if state.losses < self.losses {
                    steps.push(Step::LoseCommit);
                }
                if self.releases_in {
                    steps.push(Step::SendReleaseIn);
                }
            }
            Stage::Guarded | Stage::ReleaseAnswered => steps.extend([Step::Commit, Step::RollBack]),
            Stage::ReleaseSent => steps.extend([Step::CarryOutReleaseIn, Step::RollBack]),
            Stage::ReleaseDone => {
                steps.extend([Step::HearReleaseIn, Step::CommitAndRelease, Step::RollBack]);
            }
            Stage::Released => {
                steps.push(Step::HearReleased);
                if state.losses < self.losses {
                    steps.push(Step::LoseReleased);
                }
            }
        }
    }

    pub(crate) fn actions_of_others(&self, state: &State, actions: &mut Vec<Action>) {
        if state.snapshots < self.snapshots && state.snapshot.is_none() {
            actions.push(Action::TakeSnapshot);
        }
        if self.may_crash(state) {
            actions.extend([Action::Flush, Action::Crash]);
        }
        let Some(row) = &state.row else { return };
        if self.notice_is_due(row) {
            actions.push(Action::GiveNotice);
        }
        if self.snapshots > 0 && self.can_be_settled(row) {
            actions.push(Action::Settle);
        }
        if row.foreign_lock {
            actions.push(Action::UnlockByOthers);
        } else if state.foreign_locks < self.foreign_locks && row.lock.is_none() {
            actions.push(Action::LockByOthers);
        }
        if state.snapshot.is_some() && !row.is_locked() {
            actions.push(Action::LockBySnapshot);
        }
    }

    pub(crate) fn apply(&self, state: &mut State, action: Action) {
        match action {
            Action::Tick { missed_by } => {
                for row in [&mut state.row, &mut state.disk].into_iter().flatten() {
                    row.expires_in = row.expires_in.saturating_sub(1);
                }
                for (index, client) in (0_u8..).zip(&mut state.clients) {
                    client.tick(self.reliable, missed_by == Some(index));
                }
            }
            Action::CleanRow => {
                state.row = None;
                state.cleanings += 1;
            }
            Action::CarryOutLate(index) => {
                let (secret, request) = state.late.remove(index);
                self.carry_out(state, secret, request);
            }
            Action::CommitLate(index) => {
                let (secret, transaction) = state.late_commits.remove(index);
                if self.guard(state, secret, &transaction, false) {
                    self.commit(state, secret.client, &transaction);
                }
            }
            Action::TakeSnapshot => {
                let row = state.row.as_ref();
                state.snapshots += 1;
                state.snapshot = Some(Snapshot {
                    settled: row.filter(|row| row.settled).map(|row| row.token),
                    token: row.map(|row| row.token),
                    is_old: false,
                });
            }
            Action::LockBySnapshot => state.snapshot_was_good |= self.lock_by_snapshot(state),
            Action::GiveNotice | Action::Settle | Action::LockByOthers | Action::UnlockByOthers => {
                let Some(row) = &mut state.row else { return };
                match action {
                    Action::GiveNotice => self.give_notice(row),
                    Action::Settle => Self::settle(row),
                    _ => row.foreign_lock = action == Action::LockByOthers,
                }
                state.foreign_locks += u8::from(action == Action::LockByOthers);
                self.flush(state);
            }
            Action::Flush => self.flush(state),
            Action::Crash => self.crash(state),
            Action::Client(client, step) => self.step(state, client, step),
        }
    }

    fn step(&self, state: &mut State, number: u8, step: Step) {
        let index = usize::from(number);
        let client = &mut state.clients[index];
        match step {
            Step::Want => {
                client.acquisition += 1;
                client.phase = Phase::Acquiring;
            }
            Step::SendAcquire => client.send(Request::Acquire),
            Step::GiveUp => {
                let may_have_it = client.unsettled || client.lane.is_some();
                if may_have_it && !self.is(Mutation::NothingUndone) {
                    client.phase = Phase::Releasing;
                } else {
                    client.rest();
                }
            }
            Step::SendRenewal => client.send(Request::Renew),
            Step::HandOn => {
                client.hand += 1;
                if client.token == state.greatest_token {
                    state.greatest_hand = state.greatest_hand.max(client.hand);
                }
            }
            Step::CommitUnguarded => {
                if let Some(snapshot) = &mut state.snapshot {
                    snapshot.is_old = true;
                }
            }
            Step::Release => {
                client.rest();
                client.phase = Phase::Releasing;
            }
            Step::SendRelease => client.send(Request::Release),
            Step::CarryOut(lane) => {
                let Some(statement) = client.lane(lane) else { return };
                let secret = Secret { client: number, acquisition: statement.acquisition };
                let answer = self.carry_out(state, secret, statement_request(state, index, lane));
                if let Some(statement) = state.clients[index].lane_mut(lane) {
                    statement.answer = Some(answer);
                }
            }
            Step::Hear(lane) => {
                if let Some(statement) = client.lane_mut(lane).take()
                    && statement.acquisition == client.acquisition
                {
                    self.hear(client, &statement);
                }
            }
            Step::Lose(lane) | Step::LoseUntilLater(lane) => {
                state.losses += 1;
                let Some(statement) = client.lane_mut(lane).take() else { return };
                client.unsettled |= statement.request == Request::Acquire && client.phase == Phase::Acquiring;
                if let Step::LoseUntilLater(_) = step {
                    let secret = Secret { client: number, acquisition: statement.acquisition };
                    state.late.push((secret, statement.request));
                    state.late.sort_unstable();
                }
            }
            _ => self.transaction_step(state, number, step),
        }
    }

    fn hear(&self, client: &mut Client, statement: &Statement) {
        let left = self.reliable.saturating_sub(statement.age);
        match (statement.request, statement.answer) {
            (Request::Acquire, Some(Answer::Granted(token))) if client.phase == Phase::Acquiring => {
                let left = if self.is(Mutation::DeadlineFromTheAnswer) { self.reliable } else { left };
                if left == 0 {
                    // Too late to be used, but ours: it is for another attempt, or to be released.
                    client.unsettled = true;
                    return;
                }
                client.phase = Phase::Holding;
                (client.token, client.left, client.hand) = (token, left, 0);
                // Not needed any more: a release goes by the secret in any case.
                client.unsettled = false;
            }
            (Request::Renew, Some(Answer::Ours)) if client.phase == Phase::Holding => {
                let left = if self.is(Mutation::DeadlineFromTheAnswer) { self.reliable } else { left };
                client.left = client.left.max(left);
                let is_answered = statement.after_doubt
                    && (!client.is_releasing_in() || self.is(Mutation::DoubtEndsWhileReleasing));
                client.doubt &= !is_answered;
            }
            (Request::Renew, Some(Answer::BusyUnchallenged)) if client.phase == Phase::Holding => {
                client.left = client.left.max(self.reliable_notice.saturating_sub(statement.age));
            }
            (Request::Renew, Some(Answer::NotOurs)) if client.phase == Phase::Holding => client.left = 0,
            (Request::Release, Some(Answer::Ours | Answer::NotOurs)) => client.rest(),
            _ => {}
        }
    }

    fn transaction_step(&self, state: &mut State, number: u8, step: Step) {
        let client = &mut state.clients[usize::from(number)];
        if step == Step::BeginTransaction {
            client.transactions += 1;
            let (acquisition, token, hand) = (client.acquisition, client.token, client.hand);
            let number = client.transactions;
            client.transaction = Some(Transaction { stage: Stage::Open, acquisition, token, hand, number });
            return;
        }
        let Some(mut transaction) = client.transaction.take() else { return };
        let secret = Secret { client: number, acquisition: transaction.acquisition };
        // The next stage; `None` when the transaction has ended.
        let stage = match step {
            Step::Guard => self.guard(state, secret, &transaction, false).then_some(Stage::Guarded),
            Step::Commit => {
                self.commit(state, number, &transaction);
                None
            }
            Step::LoseCommit => {
                state.losses += 1;
                client.commit_is_open |= transaction.acquisition == client.acquisition;
                state.late_commits.push((secret, transaction.clone()));
                state.late_commits.sort_unstable();
                None
            }
            Step::RollBack => {
                if matches!(transaction.stage, Stage::ReleaseSent | Stage::ReleaseDone) {
                    client.doubt_anew();
                }
                end(state, number);
                None
            }
            Step::SendReleaseIn => {
                if !self.is(Mutation::ReleaseInWithoutDoubt) {
                    client.doubt_anew();
                }
                Some(Stage::ReleaseSent)
            }
            Step::CarryOutReleaseIn => {
                self.guard(state, secret, &transaction, true).then_some(Stage::ReleaseDone)
            }
            Step::HearReleaseIn => {
                if !self.is(Mutation::ReleaseInWithoutDoubt) {
                    client.doubt_anew();
                }
                Some(Stage::ReleaseAnswered)
            }
            Step::CommitAndRelease => {
                self.commit(state, number, &transaction);
                Some(Stage::Released)
            }
            Step::HearReleased => {
                client.rest();
                None
            }
            _lost_answer => {
                state.losses += 1;
                client.doubt_anew();
                None
            }
        };
        state.clients[usize::from(number)].transaction = stage.map(|stage| {
            transaction.stage = stage;
            transaction
        });
    }
}

fn statement_request(state: &State, index: usize, lane: Lane) -> Request {
    state.clients[index].lane(lane).map_or(Request::Renew, |statement| statement.request)
}
