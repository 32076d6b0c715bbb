//! Entering a lock again from within its holder, by `run` and by annotated functions, nested and
//! side by side.

// Nested holders, many of them side by side in one future.
#![allow(clippy::large_futures)]

mod owners;
mod row_locks;
mod siblings;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt};
use lock_db::{Error, Lease, LockDatabase, Locks, Loss, ReentryContext, WaitingFor, distributed_lock};
use lock_tests::{Direction, TestDatabase, TestServer, eventually, is_taken};
use sqlx::{Postgres, Sqlite};
use tokio::select;
use tokio::sync::oneshot;
use tokio::task::{JoinSet, yield_now};

use self::row_locks::{in_row, visit_row};

lock_tests::cases! {
    on every database:
    run_enters_again,
    a_clone_is_the_same_owner_and_another_locks_is_another,
    recursion_enters_again,
    annotated_functions_that_call_each_other_enter_again,
    run_and_annotated_functions_enter_each_other,
    guards_are_not_reentrant,
    bad_options_are_refused_inside_too;

    on every server:
    entering_again_sends_nothing;

    in modules: owners, row_locks, siblings
}

const PATIENCE: Duration = Duration::from_mins(1);
/// A wait that times out.
const VAIN: Duration = Duration::from_millis(200);

/// A second `Locks` with connections of its own, as another process would have.
async fn other<T: TestDatabase>(database: &T) -> Locks<T::Database> {
    Locks::new(database.pool(2).await)
}

async fn becomes_free<DB: LockDatabase>(other: &Locks<DB>, name: &str) {
    eventually(PATIENCE, async || other.insert_lock(name).try_acquire().await.unwrap().is_some()).await;
}

/// Counts how many calls are inside at the same time.
#[derive(Debug, Clone, Default)]
struct Room {
    inside: Arc<AtomicUsize>,
    visits: Arc<AtomicUsize>,
}

impl Room {
    /// Stays inside for some polls.
    async fn visit(&self) {
        assert_eq!(self.inside.fetch_add(1, Ordering::SeqCst), 0, "two at once");
        for _ in 0..3 {
            yield_now().await;
        }
        self.visits.fetch_add(1, Ordering::SeqCst);
        self.inside.fetch_sub(1, Ordering::SeqCst);
    }

    fn visits(&self) -> usize {
        self.visits.load(Ordering::SeqCst)
    }
}

/// What distinguishes one acquisition from another, and how many are inside.
type Seen = (i64, String, usize);

fn seen<DB: LockDatabase>(lease: &Lease<DB>) -> Seen {
    assert_eq!(lease.name(), "a");
    (lease.fencing_token(), lease.secret_key().to_owned(), lease.hold_count())
}

async fn nested<DB: LockDatabase>(locks: &Locks<DB>, wait: Duration) -> Result<Seen, Error> {
    locks.insert_lock("a").wait(wait).run(async |lease| Ok(seen(lease))).await
}

#[distributed_lock("a", locks = locks, wait = "60s")]
async fn visit<DB: LockDatabase>(locks: &Locks<DB>, room: &Room) -> Result<(), Error> {
    room.visit().await;
    Ok(())
}

#[distributed_lock("a", locks = locks, wait = wait)]
async fn annotated<DB: LockDatabase>(locks: &Locks<DB>, wait: Duration) -> Result<Seen, Error> {
    nested(locks, wait).await
}

// ----------------------------------------------------------------------------------------- nesting

async fn run_enters_again<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let in_table = async || {
        let number = "SELECT fencing_token FROM distributed_lock WHERE lock_name = 'a'";
        let secret = "SELECT secret_key FROM distributed_lock WHERE lock_name = 'a'";
        (database.number(number).await, database.text(secret).await)
    };
    locks
        .insert_lock("a")
        .run(async |lease| {
            let (token, secret, count) = seen(lease);
            assert_eq!(count, 1);
            for _ in 0..3 {
                assert_eq!(nested(&locks, Duration::ZERO).await?, (token, secret.clone(), 2));
            }
            let second = locks.insert_lock("a").run(async |second| {
                assert_eq!(seen(second), (token, secret.clone(), 2));
                assert_eq!(nested(&locks, Duration::ZERO).await?, (token, secret.clone(), 3));
                assert_eq!(lease.hold_count(), 2);
                Ok::<_, Error>(())
            });
            second.await?;
            assert_eq!(lease.hold_count(), 1);
            assert!(lease.is_held());
            assert_eq!(in_table().await, (token, secret));
            assert!(other.insert_lock("a").try_acquire().await?.is_none());
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some(), "released by the last one");
}

async fn a_clone_is_the_same_owner_and_another_locks_is_another<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    locks
        .insert_lock("a")
        .run(async |lease| {
            assert_eq!(nested(&locks.clone(), Duration::ZERO).await?.0, lease.fencing_token());
            let error = nested(&other, VAIN).await.unwrap_err();
            assert!(matches!(error, Error::Timeout { waiting_for: WaitingFor::Lock, .. }), "{error:?}");
            // Another name is another lock.
            locks
                .insert_lock("b")
                .run(async |inner| {
                    assert_eq!(inner.hold_count(), 1);
                    assert_eq!(nested(&locks, Duration::ZERO).await?, (seen(lease).0, seen(lease).1, 2));
                    Ok::<_, Error>(())
                })
                .await
        })
        .await
        .unwrap();
    assert!(nested(&other, PATIENCE).await.is_ok());
}

#[distributed_lock("a", locks = locks)]
async fn recursive<DB: LockDatabase>(locks: &Locks<DB>, depth: usize) -> Result<Seen, Error> {
    match depth {
        1 => nested(locks, Duration::ZERO).await,
        _ => Box::pin(recursive(locks, depth - 1)).await,
    }
}

async fn recursion_enters_again<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let first = recursive(&locks, 20).await.unwrap();
    assert_eq!(first.2, 21);
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
    let task = tokio::spawn(async move { recursive(&locks, 3).await });
    let second = task.await.unwrap().unwrap();
    assert_eq!(second.2, 4);
    assert!(second.0 > first.0, "another acquisition");
}

#[distributed_lock("a", locks = locks)]
async fn ping<DB: LockDatabase>(locks: &Locks<DB>, left: usize) -> Result<Seen, Error> {
    if left == 0 { nested(locks, Duration::ZERO).await } else { Box::pin(pong(locks, left - 1)).await }
}

#[distributed_lock("a", locks = locks)]
async fn pong<DB: LockDatabase>(locks: &Locks<DB>, left: usize) -> Result<Seen, Error> {
    if left == 0 { nested(locks, Duration::ZERO).await } else { Box::pin(ping(locks, left - 1)).await }
}

async fn annotated_functions_that_call_each_other_enter_again<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let (_, _, count) = ping(&locks, 5).await.unwrap();
    assert_eq!(count, 7);
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
}

async fn run_and_annotated_functions_enter_each_other<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let counts = locks.insert_lock("a").run(async |lease| {
        assert_eq!(annotated(&locks, Duration::ZERO).await?, (seen(lease).0, seen(lease).1, 3));
        recursive(&locks, 3).await
    });
    assert_eq!(counts.await.unwrap().2, 5);
}

/// No bytes are sent to the server.
async fn entering_again_sends_nothing<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let url = database.url_by(proxy.address());
    database.locks().await;
    let pool = lock_tests::pool::<T::Database>(&url, 4).await;
    let locks = Locks::builder(pool).default_ttl(Duration::from_hours(1)).build();
    let room = Room::default();
    // The pool itself sends nothing any more.
    let sent = async || {
        let mut before = proxy.reads(Direction::ToServer);
        eventually(PATIENCE, async || {
            tokio::time::sleep(Duration::from_millis(50)).await;
            before == std::mem::replace(&mut before, proxy.reads(Direction::ToServer))
        })
        .await;
        before
    };
    locks
        .insert_lock("a")
        .run(async |lease| {
            let before = sent().await;
            assert!(before > 0);
            for _ in 0..100 {
                nested(&locks, Duration::ZERO).await?;
            }
            recursive(&locks, 20).await?;
            tokio::try_join!(visit(&locks, &room), visit(&locks, &room), visit(&locks, &room))?;
            assert_eq!((sent().await, lease.hold_count()), (before, 1));
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    in_row(&locks, async || {
        let before = sent().await;
        for _ in 0..100 {
            visit_row(&locks, &room).await?;
        }
        tokio::try_join!(visit_row(&locks, &room), visit_row(&locks, &room))?;
        assert_eq!(sent().await, before);
        Ok(())
    })
    .await
    .unwrap();
    assert_eq!(room.visits(), 105);
}

// ------------------------------------------------------------------------------ what takes no part

async fn guards_are_not_reentrant<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let lease = locks.insert_lock("a").acquire().await.unwrap();
    assert!(ReentryContext::current().is_none(), "a guard is no frame");
    let error = nested(&locks, VAIN).await.unwrap_err();
    assert!(matches!(error, Error::Timeout { waiting_for: WaitingFor::Lock, .. }), "{error:?}");
    lease.release().await.unwrap();
    locks
        .insert_lock("a")
        .run(async |_| {
            assert!(locks.insert_lock("a").try_acquire().await?.is_none());
            let error = locks.insert_lock("a").wait(VAIN).acquire().await.unwrap_err();
            assert!(matches!(error, Error::Timeout { waiting_for: WaitingFor::Lock, .. }), "{error:?}");
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
}

async fn bad_options_are_refused_inside_too<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    locks
        .insert_lock("a")
        .run(async |_| {
            let run = locks.insert_lock("a").ttl(Duration::ZERO).run(async |_| Ok::<_, Error>(()));
            assert!(matches!(run.await, Err(Error::InvalidOption { option: "ttl", .. })));
            let run = locks.insert_lock("a").wait(Duration::MAX).run(async |_| Ok::<_, Error>(()));
            assert!(matches!(run.await, Err(Error::InvalidOption { option: "wait", .. })));
            let run = locks.insert_lock("").run(async |_| Ok::<_, Error>(()));
            assert!(matches!(run.await, Err(Error::InvalidName { .. })));
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
}
