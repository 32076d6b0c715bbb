//! Entering a lock again from within its holder, by `run` and by annotated functions, nested and
//! side by side.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]
// Nested holders, many of them side by side in one future.
#![allow(clippy::large_futures)]

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::stream::{self, StreamExt};
use lock_db::{Error, Lease, LockDatabase, Locks, Loss, ReentryContext, WaitingFor, distributed_lock};
use lock_tests::{Direction, TestDatabase, TestServer, eventually, for_each_database, is_taken};
use sqlx::{Postgres, Sqlite};
use tokio::select;
use tokio::sync::oneshot;
use tokio::task::{JoinSet, yield_now};

for_each_database! {
    run_enters_again,
    a_clone_is_the_same_owner_and_another_locks_is_not,
    recursion_enters_again,
    annotated_functions_that_call_each_other_enter_again,
    run_and_annotated_functions_enter_each_other,
    joined_siblings_take_turns,
    joined_siblings_take_turns_on_one_thread (current_thread),
    buffered_siblings_take_turns,
    a_loop_over_a_buffer_enters_too,
    siblings_of_many_holders_exclude_each_other,
    a_sibling_that_is_dropped_leaves_nothing_behind,
    a_holder_that_is_dropped_leaves_nothing_behind,
    a_wait_for_a_sibling_ends,
    a_spawned_task_contends,
    a_future_made_inside_and_awaited_outside_contends,
    an_owner_that_is_carried_enters,
    an_owner_does_not_outlive_the_hold,
    an_owner_lives_as_long_as_the_lease,
    a_call_that_outlives_the_holder_keeps_the_lock,
    a_lock_that_is_lost_is_not_entered,
    a_lock_that_a_transaction_has_released_is_not_entered,
    guarded_transactions_of_inner_calls_are_of_the_same_lease,
    guards_are_not_reentrant,
    bad_options_are_refused_inside_too,
    row_locks_are_entered_again,
    siblings_in_a_row_lock_take_turns,
    a_holder_of_a_row_lock_waits_for_the_calls_inside,
    row_locks_of_a_transaction_know_no_frames,
    the_other_kind_is_refused_inside_too;
    on servers:
    entering_again_asks_nobody,
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

async fn a_clone_is_the_same_owner_and_another_locks_is_not<T: TestDatabase>(database: &T) {
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
async fn entering_again_asks_nobody<T: TestServer>(database: &T) {
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

// ---------------------------------------------------------------------------------------- siblings

async fn joined_siblings_take_turns<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let room = Room::default();
    locks
        .insert_lock("a")
        .run(async |lease| {
            tokio::try_join!(visit(&locks, &room), visit(&locks, &room), visit(&locks, &room))?;
            let (first, second, third) = tokio::try_join!(
                nested(&locks, PATIENCE),
                annotated(&locks, PATIENCE),
                recursive(&locks, 2)
            )?;
            assert_eq!((first.2, second.2, third.2), (2, 3, 4), "siblings don't count for each other");
            assert!([first.0, second.0, third.0].iter().all(|token| *token == lease.fencing_token()));
            assert!(other.insert_lock("a").try_acquire().await?.is_none());
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert_eq!(room.visits(), 3);
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
}

async fn joined_siblings_take_turns_on_one_thread<T: TestDatabase>(database: &T) {
    joined_siblings_take_turns(database).await;
}

async fn buffered_siblings_take_turns<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let room = Room::default();
    locks
        .insert_lock("a")
        .run(async |_| {
            let visits: Vec<_> =
                stream::iter(0..50).map(|_| visit(&locks, &room)).buffer_unordered(5).collect().await;
            visits.into_iter().collect::<Result<Vec<()>, Error>>()
        })
        .await
        .unwrap();
    assert_eq!(room.visits(), 50);
}

/// The stream is not polled while the loop runs its body.
async fn a_loop_over_a_buffer_enters_too<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let room = Room::default();
    locks
        .insert_lock("a")
        .run(async |_| {
            let mut visits = pin!(stream::iter(0..20).map(|_| visit(&locks, &room)).buffer_unordered(5));
            while let Some(visited) = visits.next().await {
                visited?;
                visit(&locks, &room).await?;
            }
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert_eq!(room.visits(), 40);
}

async fn siblings_of_many_holders_exclude_each_other<T: TestDatabase>(database: &T) {
    let all = [database.locks().await, other(database).await];
    let room = Room::default();
    let mut holders = JoinSet::new();
    for holder in 0..8 {
        let (locks, room) = (all[holder % 2].clone(), room.clone());
        holders.spawn(async move {
            locks
                .insert_lock("a")
                .wait(PATIENCE)
                .run(async |_| {
                    tokio::try_join!(visit(&locks, &room), visit(&locks, &room), async {
                        let below = locks
                            .insert_lock("a")
                            .wait(PATIENCE)
                            .run(async |_| tokio::try_join!(visit(&locks, &room), visit(&locks, &room)));
                        below.await
                    })
                })
                .await
                .unwrap();
        });
    }
    while let Some(holder) = holders.join_next().await {
        holder.unwrap();
    }
    assert_eq!(room.visits(), 8 * 4);
}

async fn a_sibling_that_is_dropped_leaves_nothing_behind<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let room = Room::default();
    locks
        .insert_lock("a")
        .run(async |lease| {
            let endless = async || {
                locks
                    .insert_lock("a")
                    .wait(PATIENCE)
                    .run(async |_| {
                        std::future::pending::<()>().await;
                        Ok::<_, Error>(())
                    })
                    .await
            };
            for _ in 0..10 {
                // One inside and one in the queue, both dropped.
                select! {
                    biased;
                    _ = endless() => panic!("it never ends"),
                    _ = endless() => panic!("it never ends"),
                    () = yield_now() => {}
                }
                assert_eq!(lease.hold_count(), 1);
                visit(&locks, &room).await?;
            }
            assert_eq!(nested(&locks, Duration::ZERO).await?.2, 2);
            assert!(other.insert_lock("a").try_acquire().await?.is_none());
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
}

async fn a_holder_that_is_dropped_leaves_nothing_behind<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let (entered, has_entered) = oneshot::channel();
    let holder = locks.insert_lock("a").run(async |_| {
        let inside = locks.insert_lock("a").run(async |_| {
            entered.send(()).unwrap();
            std::future::pending::<()>().await;
            Ok::<_, Error>(())
        });
        tokio::try_join!(inside, annotated(&locks, PATIENCE), annotated(&locks, PATIENCE))
    });
    select! {
        _ = holder => panic!("it never ends"),
        entered = has_entered => entered.unwrap(),
    }
    becomes_free(&other, "a").await;
}

async fn a_wait_for_a_sibling_ends<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    locks
        .insert_lock("a")
        .run(async |_| {
            let endless = locks.insert_lock("a").run(async |_| {
                std::future::pending::<()>().await;
                Ok::<_, Error>(())
            });
            let waiting = async {
                for wait in [VAIN, Duration::ZERO] {
                    for attempt in [nested(&locks, wait).await, annotated(&locks, wait).await] {
                        let error = attempt.unwrap_err();
                        let Error::Timeout { waiting_for: WaitingFor::Sibling, waited, .. } = error else {
                            panic!("{error:?}");
                        };
                        assert!(waited >= wait);
                        assert!(error.is_retryable());
                    }
                }
            };
            let started = Instant::now();
            select! {
                biased;
                _ = endless => panic!("it never ends"),
                () = waiting => {}
            }
            assert!(started.elapsed() >= 2 * VAIN);
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
}

// --------------------------------------------------------------------------- tasks and their owner

async fn a_spawned_task_contends<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let (token, spawned) = locks
        .insert_lock("a")
        .run(async |lease| {
            let contender = locks.clone();
            let contending = tokio::spawn(async move {
                assert!(ReentryContext::current().is_none());
                nested(&contender, VAIN).await
            });
            let error = contending.await.unwrap().unwrap_err();
            assert!(matches!(error, Error::Timeout { waiting_for: WaitingFor::Lock, .. }), "{error:?}");
            let waiter = locks.clone();
            let waiting = tokio::spawn(async move { nested(&waiter, PATIENCE).await });
            Ok::<_, Error>((lease.fencing_token(), waiting))
        })
        .await
        .unwrap();
    let (later, _, count) = spawned.await.unwrap().unwrap();
    assert!(later > token);
    assert_eq!(count, 1);
}

async fn a_future_made_inside_and_awaited_outside_contends<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let made = locks
        .insert_lock("a")
        .run(async |lease| Ok::<_, Error>((lease.fencing_token(), annotated(&locks, PATIENCE))));
    let (token, late) = made.await.unwrap();
    let (later, _, count) = late.await.unwrap();
    assert!(later > token);
    assert_eq!(count, 2);
}

async fn an_owner_that_is_carried_enters<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let room = Room::default();
    locks
        .insert_lock("a")
        .run(async |lease| {
            let owner = ReentryContext::current().unwrap();
            let mut carried = JoinSet::new();
            for _ in 0..8 {
                let (locks, room) = (locks.clone(), room.clone());
                carried.spawn(owner.scope(async move {
                    visit(&locks, &room).await?;
                    annotated(&locks, PATIENCE).await
                }));
            }
            visit(&locks, &room).await?;
            while let Some(entered) = carried.join_next().await {
                assert_eq!(entered.unwrap()?, (seen(lease).0, seen(lease).1, 3));
            }
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert_eq!(room.visits(), 9);
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
}

async fn an_owner_does_not_outlive_the_hold<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let owner = locks
        .insert_lock("a")
        .run(async |_| Ok::<_, Error>(ReentryContext::current().unwrap()))
        .await
        .unwrap();
    // A reentry context holds nothing.
    let held = other.insert_lock("a").try_acquire().await.unwrap().expect("it is free");
    let carried = locks.clone();
    let task = tokio::spawn(
        owner.scope(async move { [nested(&carried, PATIENCE).await, annotated(&carried, PATIENCE).await] }),
    );
    for entered in task.await.unwrap() {
        let error = entered.unwrap_err();
        assert!(matches!(error, Error::Reentry { .. }), "{error:?}");
        assert_eq!(error.name(), Some("a"));
    }
    held.release().await.unwrap();
    // It does not come back with a new holder either.
    locks
        .insert_lock("a")
        .run(async |lease| {
            let carried = locks.clone();
            let task = tokio::spawn(owner.scope(async move { nested(&carried, PATIENCE).await }));
            assert!(matches!(task.await.unwrap(), Err(Error::Reentry { .. })));
            assert_eq!(lease.hold_count(), 1);
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
}

async fn an_owner_lives_as_long_as_the_lease<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let kept = locks
        .insert_lock("a")
        .run(async |lease| Ok::<_, Error>((ReentryContext::current().unwrap(), lease.reenter()?)));
    let (owner, lease) = kept.await.unwrap();
    assert!(lease.is_held());
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_none());
    assert_eq!(owner.scope(nested(&locks, PATIENCE)).await.unwrap(), (seen(&lease).0, seen(&lease).1, 2));
    lease.release().await.unwrap();
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
    assert!(matches!(owner.scope(nested(&locks, PATIENCE)).await, Err(Error::Reentry { .. })));
}

async fn a_call_that_outlives_the_holder_keeps_the_lock<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let (entered, has_entered) = oneshot::channel();
    let (finish, finished) = oneshot::channel::<()>();
    let holder = locks.insert_lock("a").ttl(Duration::from_secs(2)).run(async |_| {
        let carried = locks.clone();
        let straggler = tokio::spawn(ReentryContext::current().unwrap().scope(async move {
            let inside = carried.insert_lock("a").run(async |lease| {
                entered.send(()).unwrap();
                finished.await.unwrap();
                assert!(lease.is_held());
                // Deeper nesting still works.
                nested(&carried, Duration::ZERO).await
            });
            inside.await
        }));
        has_entered.await.unwrap();
        Ok::<_, Error>(straggler)
    });
    let straggler = holder.await.unwrap();
    // For longer than its TTL: it is renewed, too.
    let error = other.insert_lock("a").wait(Duration::from_secs(3)).acquire().await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    finish.send(()).unwrap();
    assert_eq!(straggler.await.unwrap().unwrap().2, 2);
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
}

const TAKE_OVER: &str =
    "UPDATE distributed_lock SET secret_key = 'somebody else', fencing_token = fencing_token + 1
    WHERE lock_name = 'a'";

async fn a_lock_that_is_lost_is_not_entered<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let (go_on, gone_on) = oneshot::channel::<()>();
    let mut carried = None;
    let ran = locks
        .insert_lock("a")
        .ttl(Duration::from_secs(3))
        .run(async |lease| {
            let task_locks = locks.clone();
            carried = Some(tokio::spawn(ReentryContext::current().unwrap().scope(async move {
                gone_on.await.unwrap();
                nested(&task_locks, PATIENCE).await
            })));
            assert_eq!(database.run(TAKE_OVER).await, 1);
            lease.lost().await;
            for entered in [nested(&locks, PATIENCE).await, annotated(&locks, PATIENCE).await] {
                let error = entered.unwrap_err();
                assert!(matches!(error, Error::Lost { reason: Loss::TakenOver, .. }), "{error:?}");
            }
            Ok::<_, Error>(())
        })
        .await;
    assert!(matches!(ran, Err(Error::Lost { .. })), "{ran:?}");
    go_on.send(()).unwrap();
    let error = carried.unwrap().await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Lost { reason: Loss::TakenOver, .. }), "{error:?}");
}

async fn a_lock_that_a_transaction_has_released_is_not_entered<T: TestDatabase>(database: &T) {
    let (locks, pool) = (database.locks().await, database.pool(2).await);
    locks
        .insert_lock("a")
        .run(async |lease| {
            let mut transaction = pool.begin().await.unwrap();
            lease.release_in(&mut transaction).await?;
            assert!(matches!(nested(&locks, PATIENCE).await, Err(Error::Lost { .. })), "nobody knows yet");
            transaction.commit().await.unwrap();
            assert!(matches!(nested(&locks, PATIENCE).await, Err(Error::Lost { .. })));
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert_eq!(nested(&locks, PATIENCE).await.unwrap().2, 1);
}

async fn guarded_transactions_of_inner_calls_are_of_the_same_lease<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let mut open = None;
    locks
        .insert_lock("a")
        .run(async |lease| {
            let inner = locks.insert_lock("a").run(async |inner| inner.begin().await);
            open = Some(inner.await?);
            assert_eq!(lease.hold_count(), 1, "a transaction is no handle");
            assert_eq!(nested(&locks, PATIENCE).await?.2, 2);
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert!(other.insert_lock("a").try_acquire().await.is_ok_and(|lease| lease.is_none()));
    open.unwrap().commit().await.unwrap();
    becomes_free(&other, "a").await;
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

// --------------------------------------------------------------------------------------- row locks

#[distributed_lock("row", mode = row, locks = locks)]
async fn in_row<DB: LockDatabase, R>(
    locks: &Locks<DB>,
    work: impl AsyncFnOnce() -> Result<R, Error>,
) -> Result<R, Error> {
    work().await
}

#[distributed_lock("row", mode = row, locks = locks, wait = "60s")]
async fn visit_row<DB: LockDatabase>(locks: &Locks<DB>, room: &Room) -> Result<(), Error> {
    room.visit().await;
    Ok(())
}

#[distributed_lock("row", mode = row, locks = locks)]
async fn recursive_row<DB: LockDatabase>(locks: &Locks<DB>, depth: usize) -> Result<usize, Error> {
    match depth {
        1 => Ok(1),
        _ => Ok(1 + Box::pin(recursive_row(locks, depth - 1)).await?),
    }
}

async fn row_is_free<T: TestDatabase>(locks: &Locks<T::Database>) -> bool {
    !is_taken::<T, _>(locks.row_lock("row").try_acquire().await)
}

/// With a pool of one connection: entering again needs none.
async fn row_locks_are_entered_again<T: TestDatabase>(database: &T) {
    let other = database.locks().await;
    let locks = Locks::new(database.pool(1).await);
    assert_eq!(recursive_row(&locks, 20).await.unwrap(), 20);
    in_row(&locks, async || {
        assert_eq!(recursive_row(&locks, 3).await?, 3);
        assert!(!row_is_free::<T>(&other).await);
        Ok(())
    })
    .await
    .unwrap();
    assert!(row_is_free::<T>(&other).await);
}

async fn siblings_in_a_row_lock_take_turns<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let room = Room::default();
    in_row(&locks, async || {
        tokio::try_join!(visit_row(&locks, &room), visit_row(&locks, &room), visit_row(&locks, &room))?;
        let visits: Vec<_> =
            stream::iter(0..20).map(|_| visit_row(&locks, &room)).buffer_unordered(5).collect().await;
        visits.into_iter().collect::<Result<Vec<()>, Error>>()?;
        visit_row(&locks, &room).await
    })
    .await
    .unwrap();
    assert_eq!(room.visits(), 24);
    assert!(row_is_free::<T>(&other).await);
    // A call that is dropped lets the next one in, but its part of the work is missing.
    let dropped = in_row(&locks, async || {
        let endless = in_row(&locks, async || {
            std::future::pending::<()>().await;
            Ok(())
        });
        select! {
            biased;
            _ = endless => panic!("it never ends"),
            () = yield_now() => {}
        }
        let visited = visit_row(&locks, &room).await;
        assert!(matches!(visited, Err(Error::RolledBack { .. })), "{visited:?}");
        Ok(())
    });
    let dropped = dropped.await;
    assert!(matches!(dropped, Err(Error::RolledBack { .. })), "{dropped:?}");
    assert_eq!(room.visits(), 25);
    assert!(row_is_free::<T>(&other).await);
}

/// How the transaction ends: see `macro_forms::outcomes`.
async fn a_holder_of_a_row_lock_waits_for_the_calls_inside<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let (entered, has_entered) = oneshot::channel();
    let (finish, finished) = oneshot::channel::<()>();
    let (body_ends, body_has_ended) = oneshot::channel();
    let mut holder = pin!(in_row(&locks, async || {
        let owner = ReentryContext::current().unwrap();
        let carried = locks.clone();
        let straggler = tokio::spawn(owner.scope(async move {
            in_row(&carried, async || {
                entered.send(()).unwrap();
                finished.await.unwrap();
                recursive_row(&carried, 2).await
            })
            .await
        }));
        has_entered.await.unwrap();
        body_ends.send(()).unwrap();
        Ok((owner, straggler))
    }));
    select! {
        biased;
        _ = &mut holder => panic!("a call inside is still under way"),
        ended = body_has_ended => ended.unwrap(),
    }
    assert!(!row_is_free::<T>(&other).await, "a call inside holds the lock by itself");
    finish.send(()).unwrap();
    let (owner, straggler) = holder.await.unwrap();
    assert!(row_is_free::<T>(&other).await);
    assert_eq!(straggler.await.unwrap().unwrap(), 2);
    let error = owner.scope(recursive_row(&locks, 1)).await.unwrap_err();
    assert!(matches!(error, Error::Reentry { .. }), "{error:?}");
}

#[distributed_lock("row", mode = row, tx = tx, locks = locks, wait = "200ms")]
async fn in_transaction<DB: LockDatabase>(
    locks: &Locks<DB>,
    tx: &mut sqlx::Transaction<'_, DB>,
    depth: usize,
) -> Result<usize, Error> {
    match depth {
        1 => Ok(1),
        _ => Ok(1 + Box::pin(in_transaction(locks, tx, depth - 1)).await?),
    }
}

async fn row_locks_of_a_transaction_know_no_frames<T: TestDatabase>(database: &T) {
    let (locks, pool) = (database.locks().await, database.pool(2).await);
    let mut tx = pool.begin().await.unwrap();
    // The database itself is re-entrant.
    assert_eq!(in_transaction(&locks, &mut tx, 5).await.unwrap(), 5);
    assert!(!row_is_free::<T>(&locks).await);
    // A scope of another lock does not interfere.
    let inside = locks.insert_lock("a").run(async |_| in_transaction(&locks, &mut tx, 2).await);
    if T::NAME == "sqlite" {
        // The transaction has the only write lock, so nothing else can be taken.
        drop(inside);
    } else {
        assert_eq!(inside.await.unwrap(), 2);
    }
    tx.commit().await.unwrap();
    assert!(row_is_free::<T>(&locks).await);
    // Another transaction is another holder. This is also true for a caller that holds the row in a
    // transaction of its own.
    in_row(&locks, async || {
        let mut tx = pool.begin().await.unwrap();
        let error = in_transaction(&locks, &mut tx, 1).await.unwrap_err();
        assert!(matches!(error, Error::Timeout { waiting_for: WaitingFor::Lock, .. }), "{error:?}");
        Ok(())
    })
    .await
    .unwrap();
}

#[distributed_lock("a", mode = row, locks = locks)]
async fn as_row<DB: LockDatabase>(locks: &Locks<DB>) -> Result<(), Error> {
    let _ = locks;
    Ok(())
}

async fn the_other_kind_is_refused_inside_too<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    locks
        .insert_lock("a")
        .run(async |_| {
            let error = as_row(&locks).await.unwrap_err();
            assert!(matches!(error, Error::WrongKind { .. }), "{error:?}");
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
}

// ----------------------------------------------------------------------------------- what compiles

#[test]
fn an_owner_crosses_threads() {
    fn crosses<T: Clone + std::fmt::Debug + Send + Sync + 'static>() {}
    crosses::<ReentryContext>();
}

/// Never called: the test is that it compiles.
#[allow(dead_code)]
fn futures_are_send(locks: &Locks<Postgres>, owner: &ReentryContext, room: &Room) {
    fn is_send<T: Send>(_: T) {}
    fn is_static<T: Send + 'static>(_: T) {}
    is_send(owner.scope(visit(locks, room)));
    is_static(owner.scope(async {}));
    is_send(recursive(locks, 1));
    is_send(recursive_row(locks, 1));
    is_send(nested(locks, VAIN));
}

/// Not all connections can be shared between threads; the futures of the holders are `Send`
/// nevertheless.
#[allow(dead_code)]
fn futures_are_send_on_sqlite(locks: &Locks<Sqlite>, room: &Room) {
    fn is_send<T: Send>(_: T) {}
    is_send(visit_row(locks, room));
    is_send(recursive_row(locks, 1));
}
