//! Tests of handing leases and permits from thread to thread, in many interleavings.
//!
//! The code under test is what the threads of a process share: the queues, the shared state of a
//! lease, and the release of a guard. The session is a model of `actor`, `acquire` and `release`.
//! Like the real one it runs on its own thread and does one thing at a time. Its database is a map.
//! Callers use the real `Session`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod holders;
mod session;

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

use self::holders::Holders;
use self::session::*;
use super::*;
use crate::database::{Claim, LeaseKey, RowKey, Server};
use crate::error::Loss;
use crate::interleavings::{draw, explore, pause};
use crate::secret::Secret;
use crate::session::{LeaseRequest, LeaseState, Session, SessionChannel, SessionState, Vitals};

/// A time that does not pass during a test.
const LONG: Duration = Duration::from_hours(1);
/// A time that is over at once.
const OVER: Duration = Duration::ZERO;

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
    hand_off: HandOffLimits { holders: 64, time: LONG },
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
        let session = Session { state: Mutex::new(SessionState::Running(channel)), vitals: Vitals::new() };
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
        assert!(queues.state().names.is_empty(), "a permit or a waiter is left over");
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
        assert!(!state.closed || waiting.is_empty(), "a request waits in closed queues");
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
    leases_are_not_handed_on: { hand_off: HandOffLimits { holders: 1, time: LONG } }
    the_time_of_the_hand_off_is_over: { hand_off: HandOffLimits { holders: 64, time: OVER } }
    holders_are_limited: { callers: 4, rounds: 3, hand_off: HandOffLimits { holders: 2, time: LONG }, others_wait: true }
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
        hand_off: HandOffLimits { holders: 3, time: LONG },
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
