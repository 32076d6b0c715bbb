//! Scopes and their gates among concurrent tasks, in many orders of their steps.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::poll;
use shuttle::future::{JoinHandle, block_on, spawn};
use tokio::select;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::*;
use crate::error::NoReentry;
use crate::interleavings::{draw, explore, pause};

/// Longer than any test.
const LONG: Duration = Duration::from_hours(1);

/// Stands in for a `Locks` and its database, and records who is inside.
struct World {
    instance: Instance,
    free: Arc<Semaphore>,
    /// Each access is one step.
    state: Mutex<Inside>,
    /// All tasks that were spawned. A task that waits for one may leave before that one ends.
    tasks: Mutex<Vec<JoinHandle<()>>>,
    plan: &'static Plan,
}

#[derive(Default)]
struct Inside {
    /// The number of the grant.
    taken: Option<u64>,
    grants: u64,
    lost: u64,
    /// The calls that are inside, each with its enclosing calls.
    calls: Vec<Vec<u64>>,
    last_call: u64,
    loss: Option<watch::Sender<Option<Loss>>>,
}

/// Stands in for a lease.
struct Lease {
    world: Arc<World>,
    grant: u64,
    loss: watch::Receiver<Option<Loss>>,
    _permit: OwnedSemaphorePermit,
}

impl Held for Lease {
    const KIND: Kind = Kind::Insert;

    fn check(&self) -> Result<(), Error> {
        let reason = *self.loss.borrow();
        reason.map_or(Ok(()), |reason| Err(Error::lost("a", reason)))
    }

    fn loss(&self) -> Option<watch::Receiver<Option<Loss>>> {
        Some(self.loss.clone())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.world.state.lock().unwrap();
        assert_eq!(state.taken.take(), Some(self.grant), "released twice");
        assert!(state.calls.is_empty(), "released while somebody was inside");
    }
}

/// A call whose body runs.
struct Call<'a> {
    world: &'a World,
    path: Vec<u64>,
}

impl<'a> Call<'a> {
    fn begin(world: &'a World, lease: &Lease, enclosing: &[u64], may_be_lost: bool) -> Self {
        let mut state = world.state.lock().unwrap();
        assert_eq!(state.taken, Some(lease.grant), "inside without the lock");
        assert!(may_be_lost || state.lost < lease.grant, "inside of a lock that was lost before");
        state.last_call += 1;
        let path: Vec<u64> = enclosing.iter().copied().chain([state.last_call]).collect();
        assert!(state.calls.iter().all(|other| path.starts_with(other)), "two siblings are inside");
        state.calls.push(path.clone());
        Self { world, path }
    }
}

impl Drop for Call<'_> {
    fn drop(&mut self) {
        self.world.state.lock().unwrap().calls.retain(|path| *path != self.path);
    }
}

/// What the calls do, out of a hundred cases.
struct Plan {
    /// Tasks that take the lock.
    holders: usize,
    levels: usize,
    /// The largest number of calls in each call.
    calls: usize,
    /// Calls in a task of their own, with the reentry context.
    tasks: usize,
    /// Of those: tasks that are not awaited, so they may outlive the holder.
    detached: usize,
    /// Calls that drop their future at some point.
    leave: usize,
    /// Calls without a wait.
    impatient: usize,
    /// Waiters that are not polled while the others go on.
    not_polled: usize,
    lost: usize,
}

const QUIET: Plan = Plan {
    holders: 1,
    levels: 2,
    calls: 3,
    tasks: 0,
    detached: 0,
    leave: 0,
    impatient: 0,
    not_polled: 0,
    lost: 0,
};

fn happens(percent: usize) -> bool {
    draw(100) < percent
}

impl World {
    /// As `run` and annotated functions do it.
    fn run<'a>(
        self: &'a Arc<Self>,
        enclosing: &'a [u64],
        wait: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<(), Error>> + Send + 'a>> {
        Box::pin(async move {
            let lock = self.lock();
            let lost_before = self.state.lock().unwrap().lost;
            let entered = match enter::<Lease>(&lock, wait).await? {
                Some(entered) => {
                    assert!(entered.held.grant > lost_before, "entered what was lost before");
                    entered
                }
                None => Entered::first(lock, Arc::new(self.take().await)),
            };
            let inside = entered.inside;
            let lease = entered.held;
            inside.scope(self.body(&lease, enclosing)).await;
            drop(lease);
            drop(inside);
            Ok(())
        })
    }

    fn lock(&self) -> ReentryKey {
        ReentryKey { locks: self.instance, name: "a".into() }
    }

    async fn take(self: &Arc<Self>) -> Lease {
        let permit = Arc::clone(&self.free).acquire_owned().await.unwrap();
        pause().await;
        let (sender, loss) = watch::channel(None);
        let mut state = self.state.lock().unwrap();
        state.grants += 1;
        let grant = state.grants;
        assert_eq!(state.taken.replace(grant), None, "taken twice");
        state.loss = Some(sender);
        drop(state);
        Lease { world: Arc::clone(self), grant, loss, _permit: permit }
    }

    async fn body(self: &Arc<Self>, lease: &Lease, enclosing: &[u64]) {
        let plan = self.plan;
        let call = Call::begin(self, lease, enclosing, plan.lost > 0);
        pause().await;
        if call.path.len() < plan.levels {
            let mut siblings = Vec::new();
            let mut tasks = Vec::new();
            let mut not_polled = Vec::new();
            for _ in 0..=draw(plan.calls) {
                if happens(plan.not_polled) {
                    let lock = self.lock();
                    let mut waiter = Box::pin(async move { drop(enter::<Lease>(&lock, LONG).await) });
                    let _entered_at_once = poll!(waiter.as_mut()).is_ready();
                    not_polled.push(waiter);
                } else if happens(plan.tasks) {
                    let (world, path) = (Arc::clone(self), call.path.clone());
                    let detached = happens(plan.detached);
                    let may_outlive = detached || plan.leave > 0;
                    let (ended, end) = oneshot::channel::<()>();
                    let inner = async move {
                        world.inner(&path, may_outlive).await;
                        drop(ended);
                    };
                    let task = spawn(ReentryContext::current().unwrap().scope(inner));
                    self.tasks.lock().unwrap().push(task);
                    if !detached {
                        tasks.push(end);
                    }
                } else {
                    siblings.push(self.inner(&call.path, false));
                }
            }
            if happens(plan.lost) {
                let mut state = self.state.lock().unwrap();
                state.loss.as_ref().unwrap().send_replace(Some(Loss::TakenOver));
                state.lost = lease.grant;
            }
            join_all(siblings).await;
            for end in tasks {
                let _ended = end.await;
            }
        }
        pause().await;
        drop(call);
    }

    /// A call inside of another one.
    async fn inner(self: &Arc<Self>, enclosing: &[u64], may_outlive: bool) {
        let wait = if happens(self.plan.impatient) { Duration::ZERO } else { LONG };
        let patience = if happens(self.plan.leave) { Some(draw(8)) } else { None };
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
        let ran = select! {
            biased;
            ran = self.run(enclosing, wait) => ran,
            () = leaves => return,
        };
        match ran {
            Ok(()) => {}
            Err(Error::Timeout { .. }) => assert_eq!(wait, Duration::ZERO, "the wait was not over"),
            Err(Error::Lost { .. }) => assert!(self.plan.lost > 0, "not lost"),
            Err(Error::Reentry { reason: NoReentry::HoldEnded, .. }) => assert!(may_outlive, "not ended"),
            Err(error) => panic!("{error}"),
        }
    }
}

/// Runs the holders of a plan, each in a task, to their end.
fn play(plan: &'static Plan) {
    let world = Arc::new(World {
        instance: Instance::new(),
        free: Arc::new(Semaphore::new(1)),
        state: Mutex::default(),
        tasks: Mutex::default(),
        plan,
    });
    let holders: Vec<_> = (0..plan.holders)
        .map(|_| {
            let world = Arc::clone(&world);
            spawn(async move { world.run(&[], LONG).await.unwrap() })
        })
        .collect();
    block_on(async {
        // Every schedule then has a choice, which PCT requires.
        shuttle::future::yield_now().await;
        for holder in holders {
            holder.await.unwrap();
        }
        loop {
            let Some(task) = world.tasks.lock().unwrap().pop() else { break };
            task.await.unwrap();
        }
    });
    let state = world.state.lock().unwrap();
    assert_eq!(state.taken, None, "not released");
    assert_eq!(usize::try_from(state.grants).unwrap(), plan.holders, "an inner call took the lock again");
    drop(state);
    // A scope that is left over would keep it.
    let ended = Arc::downgrade(&world);
    drop(world);
    assert_eq!(ended.strong_count(), 0, "something is left over");
}

macro_rules! plans {
    ($($name:ident: { $($field:ident: $value:expr),* $(,)? })*) => {
        $(
            #[test]
            fn $name() {
                #[allow(clippy::needless_update)]
                static PLAN: Plan = Plan { $($field: $value,)* ..QUIET };
                explore(|| play(&PLAN));
            }
        )*
    };
}

plans! {
    siblings_take_turns: { levels: 3, calls: 2, tasks: 60 }
    holders_in_competition: { holders: 3, tasks: 50 }
    siblings_leave: { calls: 4, tasks: 60, leave: 50 }
    siblings_that_nobody_polls: { calls: 4, tasks: 60, not_polled: 40 }
    siblings_do_not_wait: { calls: 4, tasks: 60, impatient: 50 }
    siblings_outlive_their_holder: { levels: 3, tasks: 80, detached: 60, leave: 20 }
    the_lock_is_lost: { holders: 2, calls: 4, tasks: 60, lost: 60, leave: 10 }
    all_at_once: {
        holders: 2,
        calls: 2,
        levels: 3,
        tasks: 50,
        detached: 30,
        leave: 20,
        impatient: 20,
        not_polled: 20,
        lost: 10,
    }
}
