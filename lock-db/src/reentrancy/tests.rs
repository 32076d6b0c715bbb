//! Scopes without a database: who is inside when, what a call gets, and what is left behind.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
// Futures are returned from their holder.
#![allow(clippy::async_yields_async)]

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt};
use futures_util::{FutureExt, poll};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::yield_now;
use tokio::{join, select};

use super::*;
use crate::error::WaitingFor;

const SECOND: Duration = Duration::from_secs(1);
/// Longer than any test.
const PATIENCE: Duration = Duration::from_mins(1);

/// Stands in for a `Locks` and its database.
#[derive(Clone)]
struct World {
    instance: Instance,
    kept: Arc<Kept>,
}

struct Kept {
    free: Arc<Semaphore>,
    taken: AtomicUsize,
    inside: AtomicUsize,
    most_inside: AtomicUsize,
    loss: Mutex<watch::Sender<Option<Loss>>>,
}

/// Stands in for a lease.
#[derive(Debug)]
struct Lease {
    loss: watch::Receiver<Option<Loss>>,
    _permit: tokio::sync::OwnedSemaphorePermit,
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

/// Stands in for a row lock.
#[derive(Debug)]
struct Row;

impl Held for Row {
    const KIND: Kind = Kind::Row;

    fn check(&self) -> Result<(), Error> {
        Ok(())
    }

    fn loss(&self) -> Option<watch::Receiver<Option<Loss>>> {
        None
    }
}

impl World {
    fn new() -> Self {
        let kept = Kept {
            free: Arc::new(Semaphore::new(1)),
            taken: AtomicUsize::new(0),
            inside: AtomicUsize::new(0),
            most_inside: AtomicUsize::new(0),
            loss: Mutex::default(),
        };
        Self { instance: Instance::new(), kept: Arc::new(kept) }
    }

    fn lock(&self, name: &str) -> ReentryKey {
        ReentryKey { locks: self.instance, name: name.into() }
    }

    /// As `run` and annotated functions do it. The database answers immediately: this never waits
    /// for another holder.
    async fn run<T>(&self, wait: Duration, work: impl AsyncFnOnce(&Arc<Lease>) -> T) -> Result<T, Error> {
        let lock = self.lock("a");
        let entered = match enter::<Lease>(&lock, wait).await? {
            Some(entered) => entered,
            None => Entered::first(lock, Arc::new(self.take()?)),
        };
        let inside = entered.inside;
        let lease = entered.held;
        let output = inside.scope(async { work(&lease).await }).await;
        drop(lease);
        drop(inside);
        Ok(output)
    }

    fn take(&self) -> Result<Lease, Error> {
        let Ok(permit) = Arc::clone(&self.kept.free).try_acquire_owned() else {
            return Err(Error::Timeout {
                name: "a".into(),
                waited: Duration::ZERO,
                waiting_for: WaitingFor::Lock,
                held_by: None,
            });
        };
        self.kept.taken.fetch_add(1, Ordering::Relaxed);
        let (sender, loss) = watch::channel(None);
        *self.kept.loss.lock().unwrap_or_else(PoisonError::into_inner) = sender;
        Ok(Lease { loss, _permit: permit })
    }

    fn lose(&self) {
        self.kept.loss.lock().unwrap().send_replace(Some(Loss::TakenOver));
    }

    fn is_free(&self) -> bool {
        self.kept.free.available_permits() == 1
    }

    /// How often the database was asked.
    fn taken(&self) -> usize {
        self.kept.taken.load(Ordering::Relaxed)
    }

    /// Does some work and counts how many calls do so at the same time. Returns the hold count.
    async fn work(&self) -> Result<usize, Error> {
        self.run(PATIENCE, async |lease| {
            let inside = self.kept.inside.fetch_add(1, Ordering::SeqCst) + 1;
            self.kept.most_inside.fetch_max(inside, Ordering::SeqCst);
            for _ in 0..3 {
                yield_now().await;
            }
            self.kept.inside.fetch_sub(1, Ordering::SeqCst);
            Arc::strong_count(lease)
        })
        .await
    }

    fn one_at_a_time(&self) -> bool {
        self.kept.most_inside.load(Ordering::SeqCst) == 1
    }

    /// Nested calls.
    fn deep(&self, levels: usize) -> Pin<Box<dyn Future<Output = Result<usize, Error>> + Send + '_>> {
        Box::pin(async move {
            let deepest = self.run(PATIENCE, async |lease| match levels {
                1 => Ok(Arc::strong_count(lease)),
                _ => self.deep(levels - 1).await,
            });
            deepest.await?
        })
    }
}

#[tokio::test]
async fn a_nested_call_enters_again() {
    let world = World::new();
    world
        .run(PATIENCE, async |lease| {
            for _ in 0..3 {
                let inner =
                    world.run(PATIENCE, async |inner| (Arc::ptr_eq(inner, lease), Arc::strong_count(inner)));
                assert_eq!(inner.await.unwrap(), (true, 2));
                assert_eq!(Arc::strong_count(lease), 1);
            }
        })
        .await
        .unwrap();
    assert_eq!(world.taken(), 1);
    assert!(world.is_free());
}

#[tokio::test]
async fn nesting_deep_is_free() {
    let world = World::new();
    assert_eq!(world.deep(100).await.unwrap(), 100);
    assert_eq!(world.taken(), 1);
    assert!(world.is_free());
}

#[tokio::test]
async fn joined_siblings_take_turns() {
    let world = World::new();
    let counts = world
        .run(PATIENCE, async |_| {
            let (first, second, third) = join!(world.work(), world.work(), world.work());
            [first.unwrap(), second.unwrap(), third.unwrap()]
        })
        .await
        .unwrap();
    assert_eq!(counts, [2; 3]);
    assert!(world.one_at_a_time());
    assert_eq!(world.taken(), 1);
}

#[tokio::test]
async fn siblings_at_every_depth_take_turns() {
    let world = World::new();
    let pair = async || {
        let (first, second) = world.run(PATIENCE, async |_| join!(world.work(), world.work())).await.unwrap();
        assert_eq!((first.unwrap(), second.unwrap()), (3, 3));
    };
    world.run(PATIENCE, async |_| join!(pair(), pair(), world.work())).await.unwrap().2.unwrap();
    assert!(world.one_at_a_time());
    assert!(world.is_free());
}

#[tokio::test]
async fn buffered_siblings_take_turns() {
    let world = World::new();
    let counts: Vec<_> = world
        .run(PATIENCE, async |_| {
            stream::iter(0..20).map(|_| world.work()).buffer_unordered(5).collect().await
        })
        .await
        .unwrap();
    assert!(counts.into_iter().all(|count| count.unwrap() == 2));
    assert!(world.one_at_a_time());
    assert_eq!(world.taken(), 1);
}

/// The stream is not polled while the loop runs its body, and the stream's next future is first in
/// the queue.
#[tokio::test]
async fn the_loop_over_a_buffer_may_enter_too() {
    let world = World::new();
    world
        .run(PATIENCE, async |_| {
            let mut stream = pin!(stream::iter(0..20).map(|_| world.work()).buffer_unordered(5));
            while let Some(count) = stream.next().await {
                assert_eq!(count.unwrap(), 2);
                assert_eq!(world.work().now_or_never_for(SECOND).await.unwrap(), 2);
            }
        })
        .await
        .unwrap();
    assert!(world.one_at_a_time());
}

trait Limited: Future + Sized {
    /// Fails the test instead of hanging.
    async fn now_or_never_for(self, limit: Duration) -> Self::Output {
        tokio::time::timeout(limit, self).await.expect("does not hang")
    }
}

impl<F: Future> Limited for F {}

#[tokio::test]
async fn a_sibling_that_is_dropped_leaves_nothing_behind() {
    let world = World::new();
    world
        .run(PATIENCE, async |lease| {
            // While it works.
            select! {
                biased;
                _ = world.run(PATIENCE, async |_| std::future::pending::<()>().await) => panic!("it never ends"),
                () = yield_now() => {}
            }
            assert_eq!(Arc::strong_count(lease), 1);
            assert_eq!(world.run(Duration::ZERO, async |lease| Arc::strong_count(lease)).await.unwrap(), 2);

            // While it is in the queue.
            let mut first = Box::pin(world.work());
            assert!(poll!(first.as_mut()).is_pending());
            let mut second = Box::pin(world.work());
            let mut third = Box::pin(world.work());
            for _ in 0..3 {
                assert!(poll!(second.as_mut()).is_pending());
                assert!(poll!(third.as_mut()).is_pending());
            }
            assert_eq!(Arc::strong_count(lease), 2, "who waits does not count");
            drop(second);
            drop(first);
            assert_eq!(third.now_or_never_for(SECOND).await.unwrap(), 2);
            assert_eq!(Arc::strong_count(lease), 1);
        })
        .await
        .unwrap();
    assert!(world.is_free());
}

#[tokio::test]
async fn dropping_the_holder_drops_all_of_it() {
    let world = World::new();
    let holder = world.run(PATIENCE, async |_| {
        join!(world.deep(3), world.run(PATIENCE, async |_| std::future::pending::<()>().await), world.work())
    });
    let mut holder = Box::pin(holder);
    for _ in 0..10 {
        assert!(poll!(holder.as_mut()).is_pending());
    }
    assert!(!world.is_free());
    drop(holder);
    assert!(world.is_free());
}

#[tokio::test]
async fn a_wait_for_a_sibling_ends() {
    let world = World::new();
    world
        .run(PATIENCE, async |_| {
            let wait = Duration::from_millis(50);
            let mut sibling = Box::pin(world.run(PATIENCE, async |_| std::future::pending::<()>().await));
            assert!(poll!(sibling.as_mut()).is_pending());
            let started = Instant::now();
            let error = world.run(wait, async |_| ()).await.unwrap_err();
            assert!(matches!(error, Error::Timeout { waiting_for: WaitingFor::Sibling, .. }), "{error:?}");
            assert!((wait..PATIENCE / 2).contains(&started.elapsed()));
            let error = world.run(Duration::ZERO, async |_| ()).await.unwrap_err();
            assert!(matches!(error, Error::Timeout { waiting_for: WaitingFor::Sibling, .. }), "{error:?}");
        })
        .await
        .unwrap();
}

#[tokio::test]
async fn a_spawned_task_is_outside() {
    let world = World::new();
    world
        .run(PATIENCE, async |_| {
            let spawned = world.clone();
            let outcome = tokio::spawn(async move {
                assert!(ReentryContext::current().is_none());
                spawned.work().await
            });
            assert!(matches!(
                outcome.await.unwrap(),
                Err(Error::Timeout { waiting_for: WaitingFor::Lock, .. })
            ));
        })
        .await
        .unwrap();
}

#[tokio::test]
async fn what_counts_is_where_a_call_is_first_polled() {
    let world = World::new();
    // Created inside, awaited outside: an ordinary call.
    let late = world.run(PATIENCE, async |_| world.work()).await.unwrap();
    assert_eq!(late.await.unwrap(), 1);
    assert_eq!(world.taken(), 2);

    // Created outside, awaited inside: a nested call.
    let early = world.work();
    assert_eq!(world.run(PATIENCE, async |_| early.await.unwrap()).await.unwrap(), 2);
    assert_eq!(world.taken(), 3);
    assert!(world.is_free());
}

#[tokio::test]
async fn a_call_that_is_inside_holds_the_lock_by_itself() {
    let world = World::new();
    let begun = world
        .run(PATIENCE, async |_| {
            let mut work = Box::pin(world.work());
            assert!(poll!(work.as_mut()).is_pending());
            work
        })
        .await
        .unwrap();
    assert!(!world.is_free());
    assert_eq!(begun.await.unwrap(), 1);
    assert!(world.is_free());
}

#[tokio::test]
async fn a_call_that_only_waited_does_not_count_as_held() {
    let world = World::new();
    let (begun, waiting) = world
        .run(PATIENCE, async |_| {
            let (mut begun, mut waiting) = (Box::pin(world.work()), Box::pin(world.work()));
            assert!(poll!(begun.as_mut()).is_pending());
            assert!(poll!(waiting.as_mut()).is_pending());
            (begun, waiting)
        })
        .await
        .unwrap();
    begun.await.unwrap();
    assert!(world.is_free());
    let error = waiting.await.unwrap_err();
    assert!(matches!(error, Error::Reentry { .. }), "{error:?}");
    assert_eq!(world.taken(), 1);
}

#[tokio::test]
async fn an_owner_that_is_carried_enters() {
    let world = World::new();
    world
        .run(PATIENCE, async |_| {
            let owner = ReentryContext::current().unwrap();
            assert_eq!(format!("{owner:?}"), r#"ReentryContext(["a"])"#);
            let spawn = || {
                let spawned = world.clone();
                tokio::spawn(owner.scope(async move { spawned.work().await }))
            };
            let (first, second, own) = join!(spawn(), spawn(), world.work());
            assert_eq!([first.unwrap().unwrap(), second.unwrap().unwrap(), own.unwrap()], [2; 3]);
        })
        .await
        .unwrap();
    assert!(world.one_at_a_time());
    assert_eq!(world.taken(), 1);
    assert!(world.is_free());
}

#[tokio::test]
async fn an_owner_does_not_outlive_the_hold() {
    let world = World::new();
    let owner = world.run(PATIENCE, async |_| ReentryContext::current().unwrap()).await.unwrap();
    assert!(world.is_free(), "an owner holds nothing");
    let error = owner.scope(world.work()).await.unwrap_err();
    assert!(matches!(error, Error::Reentry { .. }), "{error:?}");
    // It does not come back with a new holder either.
    world
        .run(PATIENCE, async |_| {
            let spawned = world.clone();
            let outcome = tokio::spawn(owner.scope(async move { spawned.work().await }));
            assert!(matches!(outcome.await.unwrap(), Err(Error::Reentry { .. })));
            // The scopes of the calling code come first.
            assert_eq!(owner.scope(world.work()).await.unwrap(), 2);
        })
        .await
        .unwrap();
    assert_eq!(world.work().await.unwrap(), 1);
}

#[tokio::test]
async fn an_owner_lasts_as_long_as_a_call_that_got_in() {
    let world = World::new();
    let (entered, has_entered) = oneshot::channel();
    let (finish, finished) = oneshot::channel::<()>();
    let (owner, straggler) = world
        .run(PATIENCE, async |_| {
            let owner = ReentryContext::current().unwrap();
            let spawned = world.clone();
            let straggler = tokio::spawn(owner.scope(async move {
                let work = async |lease: &Arc<Lease>| {
                    entered.send(Arc::strong_count(lease)).unwrap();
                    finished.await.unwrap();
                    Arc::strong_count(lease)
                };
                spawned.run(PATIENCE, work).await
            }));
            assert_eq!(has_entered.await.unwrap(), 2);
            (owner, straggler)
        })
        .await
        .unwrap();
    assert!(!world.is_free());
    // Another call waits behind it. The lock is gone when that call may enter.
    let mut behind = Box::pin(owner.scope(world.work()));
    assert!(poll!(behind.as_mut()).is_pending());
    finish.send(()).unwrap();
    assert_eq!(straggler.await.unwrap().unwrap(), 1);
    assert!(matches!(behind.await, Err(Error::Reentry { .. })));
    assert!(world.is_free());
}

/// The context of an inner call does not bypass the gate of the outer one.
#[tokio::test]
async fn an_owner_of_an_inner_call_that_has_ended_queues_outside() {
    let world = World::new();
    world
        .run(PATIENCE, async |lease| {
            let owner = world.run(PATIENCE, async |_| ReentryContext::current().unwrap()).await.unwrap();
            let mut sibling = Box::pin(world.work());
            assert!(poll!(sibling.as_mut()).is_pending());
            let spawned = world.clone();
            let carried = tokio::spawn(owner.scope(async move { spawned.work().await }));
            for _ in 0..3 {
                yield_now().await;
            }
            assert_eq!(Arc::strong_count(lease), 2);
            let (sibling, carried) = join!(sibling, carried);
            assert_eq!((sibling.unwrap(), carried.unwrap().unwrap()), (2, 2));
        })
        .await
        .unwrap();
    assert!(world.one_at_a_time());
}

/// A nested call keeps out the siblings of the call in between.
#[tokio::test]
async fn a_call_inside_of_an_inner_call_keeps_its_place() {
    let world = World::new();
    world
        .run(PATIENCE, async |_| {
            let mut inner = world
                .run(PATIENCE, async |_| {
                    let mut inner = Box::pin(world.work());
                    assert!(poll!(inner.as_mut()).is_pending());
                    inner
                })
                .await
                .unwrap();
            let mut sibling = Box::pin(world.work());
            for _ in 0..3 {
                assert!(poll!(sibling.as_mut()).is_pending());
            }
            assert_eq!(inner.as_mut().now_or_never_for(SECOND).await.unwrap(), 2);
            assert_eq!(sibling.now_or_never_for(SECOND).await.unwrap(), 2);
        })
        .await
        .unwrap();
    assert!(world.one_at_a_time());
}

#[tokio::test]
async fn a_lock_that_is_lost_is_not_entered() {
    let world = World::new();
    let owner = world
        .run(PATIENCE, async |_| {
            let mut sibling = Box::pin(world.run(PATIENCE, async |_| std::future::pending::<()>().await));
            assert!(poll!(sibling.as_mut()).is_pending());
            let mut waiting = Box::pin(world.work());
            assert!(poll!(waiting.as_mut()).is_pending());
            world.lose();
            let error = waiting.now_or_never_for(SECOND).await.unwrap_err();
            assert!(matches!(error, Error::Lost { reason: Loss::TakenOver, .. }), "{error:?}");
            drop(sibling);
            let error = world.work().await.unwrap_err();
            assert!(matches!(error, Error::Lost { reason: Loss::TakenOver, .. }), "{error:?}");
            ReentryContext::current().unwrap()
        })
        .await
        .unwrap();
    let error = owner.scope(world.work()).await.unwrap_err();
    assert!(matches!(error, Error::Lost { reason: Loss::TakenOver, .. }), "{error:?}");
}

#[tokio::test]
async fn other_names_and_other_locks_are_not_entered() {
    let (world, other) = (World::new(), World::new());
    world
        .run(PATIENCE, async |_| {
            assert!(enter::<Lease>(&world.lock("b"), PATIENCE).await.unwrap().is_none());
            assert!(enter::<Lease>(&other.lock("a"), PATIENCE).await.unwrap().is_none());
            assert_eq!(other.work().await.unwrap(), 1);
            // With another lock in between.
            let between = other.run(PATIENCE, async |_| world.work().await.unwrap());
            assert_eq!(between.await.unwrap(), 2);
        })
        .await
        .unwrap();
    assert_eq!((world.taken(), other.taken()), (1, 2));
}

#[tokio::test]
async fn the_other_kind_is_refused() {
    let world = World::new();
    world
        .run(PATIENCE, async |_| {
            let error = enter::<Row>(&world.lock("a"), PATIENCE).await.unwrap_err();
            assert!(
                matches!(error, Error::WrongKind { wanted: Kind::Row, found: Kind::Insert, .. }),
                "{error:?}"
            );
            let row = Entered::first(world.lock("b"), Arc::new(Row));
            row.inside
                .scope(async {
                    assert!(enter::<Row>(&world.lock("b"), PATIENCE).await.unwrap().is_some());
                    let error = enter::<Lease>(&world.lock("b"), PATIENCE).await.unwrap_err();
                    assert!(matches!(error, Error::WrongKind { .. }), "{error:?}");
                })
                .await;
        })
        .await
        .unwrap();
}

#[tokio::test]
async fn carrying_an_owner_where_it_is_already_adds_nothing() {
    let world = World::new();
    world
        .run(PATIENCE, async |_| {
            let owner = ReentryContext::current().unwrap();
            world
                .run(PATIENCE, async |_| {
                    // The inner call has passed the outer one's gate, so this works only if the
                    // inner scope is found first.
                    let again = owner.scope(async {
                        assert_eq!(world.work().await.unwrap(), 3);
                        ReentryContext::current().unwrap()
                    });
                    assert_eq!(format!("{:?}", again.await), r#"ReentryContext(["a", "a"])"#);
                })
                .await
                .unwrap();
        })
        .await
        .unwrap();
    assert!(ReentryContext::current().is_none());
}

/// With the context of an inner call, a sibling enters inside of that call.
#[tokio::test]
async fn a_sibling_under_the_owner_of_an_inner_call_is_inside_of_that() {
    let world = World::new();
    let (give, given) = oneshot::channel::<ReentryContext>();
    let (done, is_done) = oneshot::channel();
    world
        .run(PATIENCE, async |_| {
            let inner = world.run(PATIENCE, async |_| {
                give.send(ReentryContext::current().unwrap()).unwrap();
                is_done.now_or_never_for(SECOND).await.unwrap()
            });
            let sibling = async {
                let count = given.await.unwrap().scope(world.work()).await;
                done.send(count.unwrap()).unwrap();
            };
            let (count, ()) = join!(inner, sibling);
            assert_eq!(count.unwrap(), 3);
        })
        .await
        .unwrap();
    assert!(world.one_at_a_time());
}

/// Outside of a tokio runtime everything works that need not wait for a sibling.
#[test]
fn without_a_runtime() {
    let world = World::new();
    let nested = world.run(PATIENCE, async |_| {
        assert_eq!(world.deep(3).await.unwrap(), 4);
        let mut sibling = Box::pin(world.run(PATIENCE, async |_| std::future::pending::<()>().await));
        assert!(poll!(sibling.as_mut()).is_pending());
        let error = world.work().await.unwrap_err();
        assert!(matches!(error, Error::InvalidOption { option: "runtime", .. }), "{error:?}");
    });
    nested.now_or_never().unwrap().unwrap();
}
