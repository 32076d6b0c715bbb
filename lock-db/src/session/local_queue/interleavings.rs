//! Tests of handing leases and permits from thread to thread, in many interleavings.
//!
//! The code under test is what the threads of a process share: the queues, the shared state of a
//! lease, and the release of a guard. The session is a model of `actor`, `acquire` and `release`.
//! Like the real one it runs on its own thread and does one thing at a time. Its database is a map.
//! Callers use the real `Session`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use futures_util::future::LocalBoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use futures_util::{FutureExt, poll};
use shuttle::future::block_on;
use shuttle::thread;
use tokio::select;
use tokio::sync::watch;

use super::*;
use crate::database::{Claim, LeaseKey, RowKey, Server};
use crate::error::Loss;
use crate::interleavings::{draw, explore, pause};
use crate::secret::Secret;
use crate::session::{LeaseRequest, LeaseState, Session, SessionChannel, SessionState};

/// A time that does not pass during a test.
const LONG: Duration = Duration::from_hours(1);
/// A time that is over at once.
const OVER: Duration = Duration::ZERO;

// Database

/// Each method is one step.
#[derive(Default)]
struct Database {
    rows: std::sync::Mutex<BTreeMap<Name, Row>>,
    freed: Notify,
}

#[derive(Default)]
struct Row {
    holder: Option<Holder>,
    fencing_token: i64,
}

enum Holder {
    Lease(Secret),
    /// Granted to a caller that had already gone. It is released soon. Until then the next caller
    /// has to wait.
    Nobody(Secret),
    AnotherProcess,
}

impl Database {
    /// Returns the last fencing token of each grant, and how many tokens belong to it.
    fn take(&self, claims: &[Claim]) -> Option<Vec<(i64, i64)>> {
        let mut rows = self.rows.lock().unwrap();
        for claim in claims {
            let row = rows.entry(claim.name.clone()).or_default();
            match &row.holder {
                None => {}
                Some(Holder::Lease(_)) => panic!("a turn was passed before the row was free"),
                Some(Holder::Nobody(_) | Holder::AnotherProcess) => return None,
            }
        }
        let grants = claims.iter().map(|claim| {
            let row = rows.get_mut(&claim.name).unwrap();
            let before = row.fencing_token;
            row.fencing_token += if before == 0 { 100 } else { 1 + i64::try_from(draw(6)).unwrap() };
            row.holder = Some(Holder::Lease(claim.secret.clone()));
            (row.fencing_token, row.fencing_token - before)
        });
        Some(grants.collect())
    }

    /// `false`: the row had another holder.
    fn free(&self, name: &Name, secret: &Secret) -> bool {
        let mut rows = self.rows.lock().unwrap();
        let Some(row) = rows.get_mut(name) else { return false };
        let is_ours = match &row.holder {
            Some(Holder::Lease(holder) | Holder::Nobody(holder)) => holder == secret,
            Some(Holder::AnotherProcess) | None => false,
        };
        if is_ours {
            row.holder = None;
            self.freed.notify_waiters();
        }
        is_ours
    }

    /// The caller does not learn of the grant.
    fn abandon(&self, name: &Name, secret: &Secret) {
        let mut rows = self.rows.lock().unwrap();
        if let Some(Row { holder: Some(holder), .. }) = rows.get_mut(name)
            && matches!(holder, Holder::Lease(it) if it == secret)
        {
            *holder = Holder::Nobody(secret.clone());
        }
    }

    fn is_taken_over(&self, name: &Name) {
        let mut rows = self.rows.lock().unwrap();
        let row = rows.get_mut(name).unwrap();
        row.holder = Some(Holder::AnotherProcess);
        row.fencing_token += 1;
    }

    fn is_free_again(&self, name: &Name) {
        self.rows.lock().unwrap().get_mut(name).unwrap().holder = None;
        self.freed.notify_waiters();
    }
}

// Session

/// See `actor::Actor`.
struct Actor {
    database: Arc<Database>,
    holders: Arc<Holders>,
    queues: Arc<LocalQueues>,
    requests: mpsc::WeakUnboundedSender<Request>,
    leases: RefCell<BTreeMap<u64, Held>>,
    last_number: Cell<u64>,
    closing: watch::Sender<bool>,
    /// Leases whose holders have reported that they are done.
    released_now: RefCell<BTreeSet<u64>>,
    /// Tasks to be started.
    spawned: RefCell<Vec<LocalBoxFuture<'static, ()>>>,
    plan: &'static Plan,
}

struct Held {
    state: Arc<LeaseState>,
    lost: watch::Sender<Option<Loss>>,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.state.pass_permit();
    }
}

impl Actor {
    fn spawn(&self, task: impl Future<Output = ()> + 'static) {
        self.spawned.borrow_mut().push(task.boxed_local());
    }

    async fn closed(&self) {
        let mut closing = self.closing.subscribe();
        let _ = closing.wait_for(|closing| *closing).await;
    }

    fn register(
        &self,
        claim: &Claim,
        (fencing_token, tokens): (i64, i64),
        permit: Permit,
    ) -> Option<LeaseHandle> {
        let requests = self.requests.upgrade()?;
        let hand_off = self.queues.hand_off();
        let may_hand_on = tokens != fencing_token && self.queues.has_waiters(&claim.name);
        let most = if may_hand_on { hand_off.most_turns() } else { 1 };
        let tokens = u32::try_from(tokens).unwrap().clamp(1, most);
        let turns = if self.plan.others_wait { tokens.min(hand_off.turns) } else { tokens };
        let number = self.last_number.get() + 1;
        self.last_number.set(number);
        let key = LeaseKey {
            row: RowKey { name: claim.name.clone(), id: 1 },
            secret: claim.secret.clone(),
            fencing_token,
            mark: 0,
            ttl: claim.ttl,
            server: Server::for_tests(),
        };
        let (state, lost) = LeaseState::new(
            number,
            key,
            (tokens, turns),
            claim.ttl,
            None,
            Instant::now() + claim.ttl,
            Some(permit),
        );
        self.holders.may_have(&state, tokens, turns);
        self.leases.borrow_mut().insert(number, Held { state: Arc::clone(&state), lost });
        self.queues.set_lease(&state);
        Some(LeaseHandle::new(state, requests, Arc::clone(&self.queues)))
    }

    fn is_given_back(&self, lease: &LeaseState) {
        assert!(self.released_now.borrow_mut().insert(lease.number), "a lease was given back twice");
    }

    fn lose(&self, number: u64, loss: Loss) {
        let lost = self.leases.borrow_mut().remove(&number);
        if let Some(held) = lost {
            if loss == Loss::Released {
                held.state.pass_permit();
            }
            held.lost.send_replace(Some(loss));
        }
    }

    /// Another process takes a lease over, and releases it soon after.
    async fn takes_over(self: Rc<Self>) {
        for _ in 0..draw(30) {
            shuttle::future::yield_now().await;
        }
        let nth = draw(self.leases.borrow().len().max(1));
        let lease = self.leases.borrow().values().nth(nth).map(|held| Arc::clone(&held.state));
        if let Some(lease) = lease {
            let name = &lease.key.row.name;
            self.database.is_taken_over(name);
            self.lose(lease.number, Loss::TakenOver);
            pause().await;
            self.database.is_free_again(name);
        }
    }
}

/// See `thread::serve`.
async fn serve(actor: Rc<Actor>, mut requests: mpsc::UnboundedReceiver<Request>) {
    while let Some(request) = requests.recv().await {
        let on = Rc::clone(&actor);
        match request {
            Request::Acquire(request) => actor.spawn(acquire(on, request)),
            Request::Release { lease, answer } => {
                actor.is_given_back(&lease);
                actor.spawn(async move {
                    let released = release(&on, &lease).await;
                    let _caller_has_gone = answer.map(|answer| answer.send(released));
                });
            }
            Request::Released { lease, .. } => {
                actor.is_given_back(&lease);
                actor.lose(lease.number, Loss::Released);
            }
            Request::Close { done } => {
                actor.closing.send_replace(true);
                actor.queues.close();
                let held: Vec<_> =
                    actor.leases.borrow().values().map(|held| Arc::clone(&held.state)).collect();
                for lease in held {
                    actor.lose(lease.number, Loss::Closed);
                    actor.database.free(&lease.key.row.name, &lease.key.secret);
                }
                pause().await;
                drop(done);
                break;
            }
            _ => {}
        }
    }
    actor.closing.send_replace(true);
}

/// Does one thing at a time, until no sender is left and no task is running.
async fn run_session(actor: Rc<Actor>, requests: mpsc::UnboundedReceiver<Request>) {
    actor.spawn(serve(Rc::clone(&actor), requests));
    for _ in 0..actor.plan.losses {
        actor.spawn(Rc::clone(&actor).takes_over());
    }
    let mut watching = pin!(actor.queues.watch_waits());
    let mut tasks = FuturesUnordered::new();
    std::future::poll_fn(|context| {
        loop {
            tasks.extend(actor.spawned.take());
            let _never_ready = watching.as_mut().poll(context);
            match tasks.poll_next_unpin(context) {
                Poll::Pending if actor.spawned.borrow().is_empty() => return Poll::Pending,
                Poll::Ready(None) if actor.spawned.borrow().is_empty() => return Poll::Ready(()),
                _ => {}
            }
        }
    })
    .await;
    assert!(actor.leases.borrow().is_empty(), "a lease is left over");
}

/// See `acquire::acquire`.
async fn acquire(actor: Rc<Actor>, mut request: Acquire) {
    let result = {
        let claims = std::mem::take(&mut request.claims);
        let permits = std::mem::take(&mut request.permits);
        let mut attempt = Attempt { actor: Rc::clone(&actor), claims, permits, unsettled: Cell::new(false) };
        select! {
            biased;
            () = request.answer.closed() => return,
            () = actor.closed() => Err(Error::Closed),
            result = attempt.run(request.wait) => result,
        }
    };
    let _ = request.answer.send(result);
}

struct Attempt {
    actor: Rc<Actor>,
    claims: Vec<Claim>,
    permits: Vec<Permit>,
    unsettled: Cell<bool>,
}

impl Attempt {
    async fn run(&mut self, wait: Wait) -> Result<Option<Vec<LeaseHandle>>, Error> {
        assert_eq!(self.claims.len(), self.permits.len());
        loop {
            let actor = Rc::clone(&self.actor);
            let mut freed = pin!(actor.database.freed.notified());
            freed.as_mut().enable();
            self.unsettled.set(true);
            pause().await;
            let grants = self.actor.database.take(&self.claims);
            pause().await;
            if let Some(grants) = grants {
                let permits = std::mem::take(&mut self.permits);
                let granted = self.claims.iter().zip(grants).zip(permits);
                let handles: Option<Vec<LeaseHandle>> = granted
                    .map(|((claim, grant), permit)| self.actor.register(claim, grant, permit))
                    .collect();
                self.unsettled.set(handles.is_none());
                return handles.map(Some).ok_or(Error::Closed);
            }
            self.unsettled.set(false);
            for claim in &self.claims {
                actor.queues.learn(&claim.name, Front::IsHeldElsewhere(None));
            }
            match wait {
                Wait::Try => return Ok(None),
                Wait::Within(OVER) => return Err(timed_out()),
                Wait::Within(_) => freed.await,
            }
        }
    }
}

/// The failure for callers that wait behind others when the database does not answer.
fn no_answer(_waited: Duration) -> Failure {
    Failure::for_tests()
}

fn timed_out() -> Error {
    let (name, waited) = (String::new(), OVER);
    Error::Timeout { name, waited, waiting_for: WaitingFor::Lock, held_by: None }
}

impl Drop for Attempt {
    fn drop(&mut self) {
        if self.unsettled.get() {
            for Claim { name, secret, .. } in self.claims.clone() {
                let actor = Rc::clone(&self.actor);
                actor.database.abandon(&name, &secret);
                let on = Rc::clone(&actor);
                actor.spawn(async move {
                    pause().await;
                    on.database.free(&name, &secret);
                });
            }
        }
    }
}

/// See `release::release`.
async fn release(actor: &Rc<Actor>, lease: &LeaseState) -> Result<(), Error> {
    let loss = lease.loss();
    let held = actor.leases.borrow_mut().remove(&lease.number);
    pause().await;
    let was_ours = actor.database.free(&lease.key.row.name, &lease.key.secret);
    pause().await;
    drop(held);
    match loss {
        None => assert!(was_ours, "a lease was released twice"),
        Some(Loss::Released) => {}
        Some(reason) => return Err(Error::lost(lease.name().given(), reason)),
    }
    Ok(())
}

// Holders

/// Which caller holds what, as the callers see it.
#[derive(Default)]
struct Holders {
    names: std::sync::Mutex<BTreeMap<Name, Inside>>,
}

#[derive(Default)]
struct Inside {
    now: Vec<(Arc<LeaseState>, i64)>,
    last_fencing_token: i64,
    /// By the number of the lease: how many more holders it may have, and its token range.
    left: BTreeMap<u64, (u32, std::ops::RangeInclusive<i64>)>,
    /// Leases that must not get another holder: they were lost, or a commit may still be carried
    /// out under them.
    over: BTreeSet<u64>,
}

impl Holders {
    fn may_have(&self, lease: &LeaseState, tokens: u32, turns: u32) {
        let last = lease.key.fencing_token;
        let of_the_grant = last - i64::from(tokens) + 1..=last;
        let mut names = self.names.lock().unwrap();
        let inside = names.entry(lease.key.row.name.clone()).or_default();
        inside.left.insert(lease.number, (turns, of_the_grant));
    }

    fn enter(&self, handle: &LeaseHandle) {
        let (before, last, turns) = {
            let mut names = self.names.lock().unwrap();
            let inside = names.get_mut(handle.name()).unwrap();
            let before = inside.now.clone();
            inside.now.push((Arc::clone(&handle.lease), handle.fencing_token));
            let last = inside.last_fencing_token;
            inside.last_fencing_token = last.max(handle.fencing_token);
            let (left, of_the_grant) = inside.left.get_mut(&handle.lease.number).unwrap();
            assert!(of_the_grant.contains(&handle.fencing_token), "a fencing token of another grant");
            assert!(!inside.over.contains(&handle.lease.number), "lost, or a former holder may still commit");
            let turns = left.checked_sub(1);
            *left = left.saturating_sub(1);
            (before, last, turns)
        };
        assert!(turns.is_some(), "the lease went too far");
        // A loss is final, so a loss from before this point is still visible now.
        for (other, _) in before {
            let same = Arc::ptr_eq(&other, &handle.lease);
            assert!(!same, "two hold one lease");
            assert!(other.loss().is_some() || handle.lease.loss().is_some(), "two hold the lock");
        }
        if handle.fencing_token <= last {
            assert!(handle.lease.loss().is_some(), "the fencing token did not grow");
        }
    }

    fn leave(&self, handle: &LeaseHandle) {
        let mut names = self.names.lock().unwrap();
        names
            .get_mut(handle.name())
            .unwrap()
            .now
            .retain(|(_, fencing_token)| *fencing_token != handle.fencing_token);
    }

    fn is_over(&self, handle: &LeaseHandle) {
        let mut names = self.names.lock().unwrap();
        names.get_mut(handle.name()).unwrap().over.insert(handle.lease.number);
    }
}

// Callers

/// What callers may do besides what always happens. Probabilities are in percent.
struct Plan {
    callers: usize,
    rounds: usize,
    names: usize,
    hand_off: HandOffLimits,
    /// Whether other processes are in the queue of the row.
    others_wait: bool,
    /// How often another process takes a lease over.
    losses: usize,
    tries: usize,
    waits_that_are_over: usize,
    /// How often a caller drops its future midway.
    leave: usize,
    several: usize,
    other_ttl: usize,
    ends: &'static [End],
    closes: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum End {
    Drop,
    GiveUp,
    TwoHandles,
    Commit,
    UnknownCommit,
    CommitAndRelease,
}

const QUIET: Plan = Plan {
    callers: 3,
    rounds: 2,
    names: 1,
    hand_off: HandOffLimits { turns: 64, time: LONG },
    others_wait: false,
    losses: 0,
    tries: 0,
    waits_that_are_over: 0,
    leave: 0,
    several: 0,
    other_ttl: 0,
    ends: &[End::Drop, End::GiveUp],
    closes: false,
};

struct World {
    session: Session,
    queues: Arc<LocalQueues>,
    database: Arc<Database>,
    holders: Arc<Holders>,
    plan: &'static Plan,
}

impl World {
    fn start(plan: &'static Plan) -> (Arc<Self>, thread::JoinHandle<()>) {
        let (sender, requests) = mpsc::unbounded_channel();
        let weak = sender.downgrade();
        let reports = Reports { owner: "test".into(), no_answer };
        let queues = LocalQueues::new(weak.clone(), plan.hand_off, Secret::generate().unwrap(), reports);
        let (database, holders) = (Arc::<Database>::default(), Arc::<Holders>::default());
        let channel = SessionChannel { requests: sender, queues: Arc::clone(&queues) };
        let session = Session { state: Mutex::new(SessionState::Running(channel)) };
        let world = Self { session, queues, database, holders, plan };
        let (database, holders, queues) =
            (Arc::clone(&world.database), Arc::clone(&world.holders), Arc::clone(&world.queues));
        let running = thread::spawn(move || {
            let actor = Actor {
                database,
                holders,
                queues,
                requests: weak,
                leases: RefCell::default(),
                last_number: Cell::new(0),
                closing: watch::Sender::new(false),
                released_now: RefCell::default(),
                spawned: RefCell::default(),
                plan,
            };
            block_on(run_session(Rc::new(actor), requests));
        });
        (Arc::new(world), running)
    }

    /// Checks that nothing is left over after all callers have ended.
    fn end(self: Arc<Self>, running: thread::JoinHandle<()>) {
        let Self { session, queues, database, .. } = Arc::into_inner(self).unwrap();
        drop(session);
        running.join().unwrap();
        assert!(queues.state().names.is_empty(), "a turn or a waiter is left over");
        assert!(database.rows.lock().unwrap().values().all(|row| row.holder.is_none()), "a row is not free");
    }

    fn ask(numbers: impl IntoIterator<Item = usize>, ttl: Duration, wait: Option<Duration>) -> LeaseRequest {
        let names = numbers.into_iter().map(|number| ["a", "b", "c"][number].into()).collect();
        let wait = wait.map_or(Wait::Try, Wait::Within);
        LeaseRequest { names, ttl, at_most: None, fair: true, wait, started: Instant::now() }
    }

    async fn acquire(&self, name: usize, wait: Option<Duration>) -> Result<Option<LeaseHandle>, Error> {
        let handles = self.session.acquire(Self::ask([name], LONG, wait)).await?;
        Ok(handles.map(|handles| handles.into_iter().next().unwrap()))
    }

    /// Checks the invariants that hold at every moment.
    fn read(&self) {
        let state = self.queues.state();
        let waiting: Vec<_> = state.names.values().flat_map(|line| line.waiting.values()).collect();
        assert!(!state.closed || waiting.is_empty(), "somebody waits in closed queues");
        for waiter in waiting {
            // A waiter whose deadline has passed may stay for a first answer.
            let end = waiter.deadline().max(waiter.first_answer());
            assert!(state.next_deadline.is_some_and(|next| next <= end), "a wait will not end");
        }
        for line in state.names.values().filter(|line| line.front.is_held()) {
            assert!(line.waiting.values().all(|waiter| !waiter.wait.is_try()), "a try waits for a holder");
        }
    }

    async fn caller(&self) {
        for _ in 0..self.plan.rounds {
            self.call().await;
            self.read();
        }
    }

    async fn call(&self) {
        let plan = self.plan;
        let happens = |percent| draw(100) < percent;
        let first = draw(plan.names);
        let last = if happens(plan.several) { plan.names - 1 } else { first };
        let ttl = if happens(plan.other_ttl) { LONG * 2 } else { LONG };
        let wait = match draw(100) {
            percent if percent < plan.tries => None,
            percent if percent < plan.tries + plan.waits_that_are_over => Some(OVER),
            _ => Some(LONG),
        };
        let ask = Self::ask(first.min(last)..=last, ttl, wait);
        let names = ask.names.clone();
        let patience = if happens(plan.leave) { Some(draw(6)) } else { None };
        let leaves = async {
            match patience {
                Some(moments) => {
                    for _ in 0..moments {
                        shuttle::future::yield_now().await;
                    }
                }
                None => std::future::pending().await,
            }
        };
        let answer = select! {
            biased;
            answer = self.session.acquire(ask) => answer,
            () = leaves => return,
        };
        let handles = match answer {
            Ok(Some(handles)) => handles,
            Ok(None) => {
                assert!(wait.is_none(), "only a try gives up");
                return;
            }
            // The lock is held, or the caller with the permit had no answer yet.
            Err(Error::Timeout { .. } | Error::Database { .. } | Error::Unreachable { .. }) => {
                assert_eq!(wait, Some(OVER), "the wait was not over");
                return;
            }
            Err(error) => {
                assert!(matches!(error, Error::Closed) && plan.closes, "{error}");
                return;
            }
        };
        assert!(handles.iter().map(LeaseHandle::name).eq(&names), "other locks");
        for handle in &handles {
            assert_eq!(handle.ttl(), ttl, "another lease");
            self.holders.enter(handle);
        }
        pause().await;
        for handle in handles {
            self.finish(handle).await;
        }
    }

    async fn finish(&self, handle: LeaseHandle) {
        let end = self.plan.ends[draw(self.plan.ends.len())];
        let lease = Arc::clone(&handle.lease);
        match end {
            End::Drop | End::GiveUp | End::TwoHandles => {}
            End::Commit => {
                let commit = lease.begin_commit();
                pause().await;
                commit.mark_carried_out();
            }
            End::UnknownCommit => {
                self.holders.is_over(&handle);
                drop(lease.begin_commit());
            }
            End::CommitAndRelease => {
                lease.begin_doubt();
                let commit = lease.begin_commit();
                pause().await;
                self.holders.leave(&handle);
                if self.database.free(handle.name(), &lease.key.secret) {
                    commit.mark_carried_out();
                    handle.mark_released(None);
                } else {
                    commit.mark_refused();
                }
                lease.let_doubt_settle();
            }
        }
        if lease.loss().is_some() {
            self.holders.is_over(&handle);
        }
        self.holders.leave(&handle);
        match end {
            End::GiveUp => self.expect_released(&lease, Arc::new(handle).give_up().await),
            End::TwoHandles => {
                let (handle, other) = {
                    let handle = Arc::new(handle);
                    (Arc::clone(&handle), handle)
                };
                let dropped = thread::spawn(move || drop(other));
                self.expect_released(&lease, handle.give_up().await);
                dropped.join().unwrap();
            }
            _ => drop(handle),
        }
    }

    fn expect_released(&self, lease: &LeaseState, released: Result<(), Error>) {
        if let Err(error) = released {
            assert!(self.plan.losses > 0 || self.plan.closes, "{error}");
            assert!(matches!(error, Error::Lost { .. }) && lease.loss().is_some(), "{error}");
        }
    }
}

/// Runs the callers of a plan to the end, each on its own thread.
fn play(plan: &'static Plan) {
    let (world, session) = World::start(plan);
    let callers: Vec<_> = (0..plan.callers)
        .map(|_| {
            let world = Arc::clone(&world);
            thread::spawn(move || block_on(world.caller()))
        })
        .collect();
    if plan.closes {
        block_on(async {
            pause().await;
            let earlier = world.acquire(0, Some(LONG)).await.ok().flatten();
            world.session.close().await;
            if let Some(handle) = &earlier {
                assert!(handle.lease.loss().is_some(), "held after the end of the session");
            }
            for wait in [None, Some(OVER), Some(LONG)] {
                assert!(matches!(world.acquire(0, wait).await, Err(Error::Closed)), "the session is closed");
            }
            world.read();
        });
    }
    for caller in callers {
        caller.join().unwrap();
    }
    world.end(session);
}

macro_rules! plans {
    ($($name:ident: { $($field:ident: $value:expr),* $(,)? })*) => {
        $(
            #[test]
            fn $name() {
                static PLAN: Plan = Plan { $($field: $value,)* ..QUIET };
                explore(|| play(&PLAN));
            }
        )*
    };
}

plans! {
    leases_are_handed_on: { callers: 4 }
    leases_are_not_handed_on: { hand_off: HandOffLimits { turns: 1, time: LONG } }
    the_time_of_the_hand_off_is_over: { hand_off: HandOffLimits { turns: 64, time: OVER } }
    turns_are_limited: { callers: 4, rounds: 3, hand_off: HandOffLimits { turns: 2, time: LONG }, others_wait: true }
    waiters_leave: { callers: 5, rounds: 1, leave: 60 }
    waiters_ask_for_other_leases: { callers: 4, rounds: 1, names: 2, other_ttl: 40, several: 30, leave: 30 }
    several_at_once: { names: 3, several: 70 }
    tries: { tries: 50, leave: 20 }
    waits_end: { callers: 4, waits_that_are_over: 50 }
    leases_are_lost: { callers: 4, losses: 3 }
    holders_commit: {
        ends: &[End::Drop, End::TwoHandles, End::Commit, End::UnknownCommit, End::CommitAndRelease],
    }
    the_session_closes: { waits_that_are_over: 20, tries: 10, leave: 20, closes: true }
    all_at_once: {
        callers: 4,
        names: 2,
        hand_off: HandOffLimits { turns: 3, time: LONG },
        losses: 1,
        tries: 10,
        waits_that_are_over: 10,
        leave: 20,
        several: 20,
        other_ttl: 10,
        ends: &[
            End::Drop,
            End::GiveUp,
            End::TwoHandles,
            End::Commit,
            End::UnknownCommit,
            End::CommitAndRelease,
        ],
    }
}

/// The holder keeps the lock until a try and two callers with expired waits have their answers.
#[test]
fn tries_and_expired_waits_are_answered_while_the_lock_is_held() {
    explore(|| {
        let (world, session) = World::start(&QUIET);
        let handle = block_on(world.acquire(0, Some(LONG))).unwrap().unwrap();
        let mut callers = Vec::new();
        for wait in [None, Some(OVER), Some(OVER)] {
            let world = Arc::clone(&world);
            callers.push(thread::spawn(move || match block_on(world.acquire(0, wait)) {
                Ok(None) => assert_eq!(wait, None),
                Err(Error::Timeout { .. }) => assert_eq!(wait, Some(OVER)),
                _ => panic!("two hold the lock"),
            }));
        }
        let patient = {
            let world = Arc::clone(&world);
            thread::spawn(move || drop(block_on(world.acquire(0, Some(LONG))).unwrap().unwrap()))
        };
        for caller in callers {
            caller.join().unwrap();
        }
        drop(handle);
        patient.join().unwrap();
        world.end(session);
    });
}

/// Three callers are queued in order, and then each waits on its own thread. The one in the middle
/// may leave.
#[test]
fn first_come_first_served() {
    explore(|| {
        let (world, session) = World::start(&QUIET);
        let handle = block_on(world.acquire(0, Some(LONG))).unwrap().unwrap();
        let order = Arc::new(std::sync::Mutex::new(Vec::new()));
        let waiters: Vec<_> = (0..3)
            .map(|place| {
                let (on, order) = (Arc::clone(&world), Arc::clone(&order));
                let mut waiter = Box::pin(async move {
                    let handle = on.acquire(0, Some(LONG)).await.unwrap().unwrap();
                    order.lock().unwrap().push(place);
                    pause().await;
                    drop(handle);
                });
                assert!(block_on(async { poll!(waiter.as_mut()).is_pending() }));
                thread::spawn(move || {
                    if place == 1 && draw(2) == 0 {
                        drop(waiter);
                    } else {
                        block_on(waiter);
                    }
                })
            })
            .collect();
        drop(handle);
        for waiter in waiters {
            waiter.join().unwrap();
        }
        assert!(order.lock().unwrap().is_sorted());
        world.end(session);
    });
}

/// A caller has the permit for the first of two locks, or is just getting it, and leaves. Others
/// get the first lock although the second one is not free.
#[test]
fn a_caller_that_leaves_frees_its_permits() {
    explore(|| {
        let (world, session) = World::start(&QUIET);
        let first = block_on(world.acquire(0, Some(LONG))).unwrap().unwrap();
        let second = block_on(world.acquire(1, Some(LONG))).unwrap().unwrap();
        let mut both = Box::pin({
            let world = Arc::clone(&world);
            let ask = World::ask([0, 1], LONG, Some(LONG));
            async move { world.session.acquire(ask).await }
        });
        assert!(block_on(async { poll!(both.as_mut()).is_pending() }));
        let leaves = thread::spawn(move || {
            for _ in 0..draw(20) {
                thread::yield_now();
            }
            drop(both);
        });
        let next = {
            let world = Arc::clone(&world);
            thread::spawn(move || drop(block_on(world.acquire(0, Some(LONG))).unwrap().unwrap()))
        };
        drop(first);
        leaves.join().unwrap();
        next.join().unwrap();
        drop(second);
        world.end(session);
    });
}

/// All waiters, and all later callers, are refused at once, although a caller still has the permit.
#[test]
fn closed_queues_refuse_all_callers() {
    explore(|| {
        let (world, session) = World::start(&QUIET);
        let handle = block_on(world.acquire(0, Some(LONG))).unwrap().unwrap();
        let callers: Vec<_> = (0..3)
            .map(|_| {
                let world = Arc::clone(&world);
                thread::spawn(move || {
                    let refused = block_on(world.acquire(0, Some(LONG)));
                    assert!(matches!(refused, Err(Error::Closed)), "not closed");
                })
            })
            .collect();
        world.queues.close();
        world.read();
        for caller in callers {
            caller.join().unwrap();
        }
        drop(handle);
        world.end(session);
    });
}

/// The same process can take the lock before the session has heard of the commit.
#[test]
fn a_lock_released_by_a_commit_is_free_at_once() {
    explore(|| {
        let (world, session) = World::start(&QUIET);
        let handle = block_on(world.acquire(0, Some(LONG))).unwrap().unwrap();
        assert!(world.database.free(handle.name(), &handle.lease.key.secret));
        handle.mark_released(None);
        drop(handle);
        assert!(block_on(world.acquire(0, None)).unwrap().is_some());
        world.end(session);
    });
}
