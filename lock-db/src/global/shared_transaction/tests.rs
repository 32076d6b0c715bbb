//! Calls that share a transaction, without a database. They end in all ways and in all orders.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::OnceLock;
use std::time::Duration;

use futures_util::future::poll_immediate;
use tokio::runtime::Handle;

use super::*;

impl RowCall {
    async fn run<F: Future>(&self, body: F) -> F::Output {
        let mut body = std::pin::pin!(body);
        std::future::poll_fn(|context| self.poll_in(|| body.as_mut().poll(context))).await
    }
}
use crate::reentrancy::{Instance, ReentryKey, enter};
use crate::runtime::Runtime;

/// A guard without a database. It records how its transaction ends.
struct Guard {
    ended: Arc<OnceLock<&'static str>>,
    fails: bool,
}

impl AnyRowGuard for Guard {
    fn commit(self: Box<Self>) -> BoxFuture<'static, Outcome> {
        Box::pin(async move {
            self.ended.set("committed").unwrap();
            if self.fails {
                return Err(Error::Serialization {
                    name: "a".into(),
                    source: Some(Arc::new(sqlx::Error::RowNotFound)),
                });
            }
            Ok(())
        })
    }

    fn rollback(self: Box<Self>) -> BoxFuture<'static, Outcome> {
        Box::pin(async move {
            self.ended.set("rolled back").unwrap();
            // A rollback that fails has lost its connection, which rolls back as well.
            if self.fails { Err(Error::Closed) } else { Ok(()) }
        })
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// A lock that one call has taken.
struct World {
    lock: ReentryKey,
    ended: Arc<OnceLock<&'static str>>,
}

impl World {
    fn new() -> Self {
        Self { lock: ReentryKey { locks: Instance::new(), name: "a".into() }, ended: Arc::default() }
    }

    fn take(&self, fails: bool, runtime: Handle) -> RowCall {
        let guard = Box::new(Guard { ended: Arc::clone(&self.ended), fails });
        let (shared, outcome) = SharedTransaction::with_guard(guard, "a".into(), 1, Runtime::of(runtime));
        RowCall::outermost(Entered::first(self.lock.clone(), Arc::new(shared)), outcome)
    }

    async fn enter(&self, enclosing: &RowCall) -> RowCall {
        let entering = enclosing.inside.scope(enter::<SharedTransaction>(&self.lock, Duration::ZERO));
        RowCall::inner(entering.await.unwrap().unwrap())
    }

    /// Waits for the end in the background.
    async fn ended(&self) -> &'static str {
        loop {
            if let Some(ended) = self.ended.get() {
                return ended;
            }
            tokio::task::yield_now().await;
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Well,
    WithError,
    Dropped,
}

const ENDS: [End; 3] = [End::Well, End::WithError, End::Dropped];
const ORDERS: [[usize; 3]; 6] = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];

/// Three nested calls: how they end, and in which order.
async fn all_agree(ends: [End; 3], order: [usize; 3]) {
    let world = World::new();
    let outermost = world.take(false, Handle::current());
    let inner = world.enter(&outermost).await;
    let innermost = world.enter(&inner).await;
    let mut calls = [Some(outermost), Some(inner), Some(innermost)];

    let mut told = [None, None, None];
    let mut waiting = Vec::new();
    let mut doomed = false;
    for (position, &number) in order.iter().enumerate() {
        let (call, end, is_last) = (calls[number].take().unwrap(), ends[number], position == 2);
        assert_eq!(world.ended.get(), None, "ended with a call inside");
        doomed |= end != End::Well;
        if end == End::Dropped {
            drop(call);
            continue;
        }
        let mut ending = Box::pin(call.end(end == End::Well));
        if let Some(outcome) = poll_immediate(ending.as_mut()).await {
            assert!(number > 0 && !is_last, "told before the end");
            assert_eq!(outcome.is_err(), doomed, "not final, but what is known");
            told[number] = Some(outcome);
        } else {
            assert!(number == 0 || is_last, "waits for calls that may wait for it");
            waiting.push((number, ending));
        }
    }
    for (number, ending) in waiting {
        told[number] = Some(ending.await);
        assert!(world.ended.get().is_some(), "told before the end");
    }

    let committed = ends == [End::Well; 3];
    assert_eq!(world.ended().await, if committed { "committed" } else { "rolled back" });
    for outcome in [&told[0], &told[order[2]]].into_iter().flatten() {
        assert_eq!(outcome.is_ok(), committed, "{outcome:?}");
        let rolled_back = matches!(outcome, Err(Error::RolledBack { name }) if name == "a");
        assert!(committed || rolled_back, "{outcome:?}");
    }
}

#[tokio::test]
async fn it_is_committed_if_all_succeed_in_whatever_order_they_end() {
    for outermost in ENDS {
        for inner in ENDS {
            for innermost in ENDS {
                for order in ORDERS {
                    all_agree([outermost, inner, innermost], order).await;
                }
            }
        }
    }
}

#[tokio::test]
async fn a_call_that_is_dropped_while_it_waits_dooms_it() {
    let world = World::new();
    let outermost = world.take(false, Handle::current());
    let inner = world.enter(&outermost).await;
    let mut waiting = Box::pin(outermost.end(true));
    assert!(poll_immediate(waiting.as_mut()).await.is_none());
    drop(waiting);
    assert!(matches!(inner.end(true).await, Err(Error::RolledBack { .. })));
    assert_eq!(world.ended().await, "rolled back");
}

#[tokio::test]
async fn a_call_that_was_refused_does_not_count() {
    for last in [false, true] {
        let world = World::new();
        let outermost = world.take(false, Handle::current());
        let refused = world.enter(&outermost).await;
        if last {
            let mut waiting = Box::pin(outermost.end(true));
            assert!(poll_immediate(waiting.as_mut()).await.is_none());
            refused.withdraw();
            waiting.await.unwrap();
        } else {
            refused.withdraw();
            outermost.end(true).await.unwrap();
        }
        assert_eq!(world.ended().await, "committed");
    }
}

#[tokio::test]
async fn what_the_database_says_is_told_to_both() {
    let world = World::new();
    let outermost = world.take(true, Handle::current());
    let inner = world.enter(&outermost).await;
    let (outermost, inner) = tokio::join!(outermost.end(true), inner.end(true));
    for outcome in [outermost, inner] {
        let Err(Error::Serialization { name, source: Some(source) }) = outcome else { panic!("{outcome:?}") };
        assert_eq!(name, "a");
        assert!(matches!(*source, sqlx::Error::RowNotFound));
    }

    let world = World::new();
    let outcome = world.take(true, Handle::current()).end(false).await;
    assert!(matches!(outcome, Err(Error::RolledBack { .. })), "{outcome:?}");
}

#[tokio::test]
async fn a_guard_that_is_gone_is_told() {
    for stands in [true, false] {
        let world = World::new();
        let outermost = world.take(false, Handle::current());
        drop(outermost.shared.as_ref().unwrap().slot().take());
        let outcome = outermost.end(stands).await;
        assert!(matches!(outcome, Err(Error::Lost { reason: Loss::TransactionEnded, .. })), "{outcome:?}");
    }
}

/// It may be polled only after the holder has returned, unless it was polled elsewhere in the
/// meantime.
#[tokio::test]
async fn a_call_that_the_body_has_begun_is_not_waited_for() {
    let world = World::new();
    let outermost = world.take(false, Handle::current());
    let mut begun = Box::pin(async {
        let call = enter::<SharedTransaction>(&world.lock, Duration::ZERO).await.unwrap().unwrap();
        let call = RowCall::inner(call);
        let body = async {
            for _ in 0..3 {
                tokio::task::yield_now().await;
            }
        };
        call.run(body).await;
        call.end(true).await
    });
    outermost.run(async { assert!(poll_immediate(begun.as_mut()).await.is_none()) }).await;
    let shared = Arc::downgrade(outermost.shared.as_ref().unwrap());
    let in_body = || shared.upgrade().unwrap().in_body.load(Ordering::SeqCst);
    assert_eq!(in_body(), 1);
    assert!(poll_immediate(begun.as_mut()).await.is_none());
    assert_eq!(in_body(), 0, "it goes on elsewhere");
    outermost.run(async { assert!(poll_immediate(begun.as_mut()).await.is_none()) }).await;
    assert_eq!(in_body(), 1);
    assert!(matches!(outermost.end(true).await, Err(Error::RolledBack { .. })));
    assert!(matches!(begun.await, Err(Error::RolledBack { .. })));
    assert_eq!(world.ended().await, "rolled back");
}

#[test]
fn an_outcome_that_does_not_come_is_unknown() {
    for stands in [true, false] {
        let world = World::new();
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let outermost = world.take(false, runtime.handle().clone());
        drop(runtime);
        let outcome = futures_util::FutureExt::now_or_never(outermost.end(stands)).unwrap();
        match outcome {
            Err(Error::RolledBack { .. }) => assert!(!stands),
            Err(error @ Error::CommitUnknown { .. }) => assert!(stands && !error.is_retryable()),
            outcome => panic!("{outcome:?}"),
        }
    }
}
