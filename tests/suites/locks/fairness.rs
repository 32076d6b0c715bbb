//! Processes that wait for the same lease get it in the order of their arrival, even if one of them
//! dies or gives up.

use std::collections::VecDeque;
use std::time::Duration;

use lock_db::{Error, Lease, LockDatabase, Locks};
use lock_tests::{
    Backend, MOST_QUEUED, Parent, Process, Queued, TestDatabase, eventually, queue_of, set_queue,
};
use tokio::task::{JoinHandle, JoinSet};

lock_tests::cases! {
    on every database:
    the_longest_waiter_is_next,
    a_waiter_that_gives_up_is_not_waited_for,
    a_waiter_whose_wait_is_over_is_not_waited_for,
    a_waiter_that_was_killed_is_passed_over,
    a_try_leaves_a_free_lock_to_waiters,
    an_unfair_request_takes_a_free_lock,
    a_batch_does_not_starve,
    a_queue_without_waiters_is_empty,
    another_process_gets_the_lease_after_some_hand_offs,
    fairness_can_be_disabled_for_one_request,
    a_queue_entry_added_by_a_release_is_removed_without_waiters,
    a_queue_entry_is_removed_when_the_next_caller_cannot_use_it,
    a_waiter_that_finds_the_queue_full_waits_without_an_entry,
    rust_and_sql_read_each_others_entries,
}

lock_tests::child_roles! { wait_for_a_lease }

const PATIENCE: Duration = Duration::from_mins(1);
const LONG: Duration = Duration::from_mins(10);

/// How many processes are in the queue of the name that most cases use.
async fn in_queue<T: TestDatabase>(database: &T) -> usize {
    queue_of(database, "a").await.len()
}

type Waiting<T> = JoinHandle<Result<Lease<<T as TestDatabase>::Database>, Error>>;

/// Another process, as far as locks are concerned. It is in the queue when this returns.
async fn waiter<T: TestDatabase>(database: &T) -> (Locks<T::Database>, Waiting<T>) {
    let before = in_queue(database).await;
    let locks = database.locks().await;
    let waiting = tokio::spawn(locks.insert_lock("a").ttl(LONG).wait(PATIENCE).acquire());
    eventually(PATIENCE, async || in_queue(database).await == before + 1).await;
    (locks, waiting)
}

async fn the_longest_waiter_is_next<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let mut held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let mut queue = VecDeque::new();
    for _ in 0..4 {
        queue.push_back(waiter(database).await);
    }
    // Another one arrives when half of the queue is served.
    for round in 0..4 {
        if round == 2 {
            queue.push_back(waiter(database).await);
        }
        held.release().await.unwrap();
        let (_locks, next) = queue.pop_front().unwrap();
        held = tokio::time::timeout(PATIENCE, next).await.unwrap().unwrap().unwrap();
        assert!(queue.iter().all(|(_, waiting)| !waiting.is_finished()));
    }
    held.release().await.unwrap();
    let (_locks, last) = queue.pop_front().unwrap();
    last.await.unwrap().unwrap().release().await.unwrap();
}

async fn a_waiter_that_gives_up_is_not_waited_for<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let (_first_locks, first) = waiter(database).await;
    let (_second_locks, second) = waiter(database).await;
    first.abort();
    eventually(PATIENCE, async || in_queue(database).await == 1).await;
    held.release().await.unwrap();
    second.await.unwrap().unwrap().release().await.unwrap();
}

async fn a_waiter_whose_wait_is_over_is_not_waited_for<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let _held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let short = database.locks().await.insert_lock("a").wait(Duration::from_millis(200));
    let error = short.acquire().await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    eventually(PATIENCE, async || in_queue(database).await == 0).await;
}

async fn wait_for_a_lease<DB: Backend>(parent: Parent) {
    let locks = Locks::new(lock_tests::pool::<DB>(parent.url(), 1).await);
    let _never = locks.insert_lock("a").ttl(LONG).wait(LONG).acquire().await;
}

async fn a_waiter_that_was_killed_is_passed_over<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let mut killed = Process::spawn("wait_for_a_lease", database.url(), [""; 0]);
    eventually(PATIENCE, async || in_queue(database).await == 1).await;
    let (_locks, next) = waiter(database).await;
    killed.kill();
    held.release().await.unwrap();
    tokio::time::timeout(PATIENCE, next).await.unwrap().unwrap().unwrap().release().await.unwrap();
}

/// Another process is first in the queue of a free lock, and never comes back.
async fn leave_a_place<T: TestDatabase>(database: &T) {
    set_queue(database, "a", &[Queued::abandoned(7)]).await;
}

async fn a_try_leaves_a_free_lock_to_waiters<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    leave_a_place(database).await;
    assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_none());
    // Not forever.
    eventually(PATIENCE, async || locks.insert_lock("a").try_acquire().await.unwrap().is_some()).await;
}

async fn an_unfair_request_takes_a_free_lock<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    leave_a_place(database).await;
    let unfair = Locks::builder(database.pool(1).await).fair(false).build();
    let held = unfair.insert_lock("a").ttl(LONG).try_acquire().await.unwrap().unwrap();
    assert_eq!(in_queue(database).await, 1, "it left the queue as it was");
    let short = Locks::builder(database.pool(1).await).fair(false).build();
    let short = short.insert_lock("a").wait(Duration::from_millis(200));
    assert!(matches!(short.acquire().await, Err(Error::Timeout { .. })));
    assert_eq!(in_queue(database).await, 1, "and took no place in it");
    held.release().await.unwrap();
}

async fn fairness_can_be_disabled_for_one_request<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    leave_a_place(database).await;
    assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_none());
    let held = locks.insert_lock("a").ttl(LONG).fair(false).try_acquire().await.unwrap().unwrap();
    let short = locks.insert_lock("a").fair(false).wait(Duration::from_millis(100));
    assert!(matches!(short.acquire().await, Err(Error::Timeout { .. })));
    assert_eq!(in_queue(database).await, 1, "neither of them touched the queue");
    held.release().await.unwrap();
    let unfair = Locks::builder(database.pool(1).await).fair(false).build();
    leave_a_place(database).await;
    assert!(unfair.insert_lock("a").fair(true).try_acquire().await.unwrap().is_none());
}

/// A release adds a queue entry for the next caller of its process, behind the other waiters.
async fn a_queue_entry_added_by_a_release_is_removed_without_waiters<T: TestDatabase>(database: &T) {
    let first = database.locks().await.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let locks = Locks::builder(database.pool(1).await).hand_off(1, LONG).build();
    let lock = locks.insert_lock("a").ttl(LONG).wait(PATIENCE);
    let (one, two) = (tokio::spawn(lock.clone().acquire()), tokio::spawn(lock.acquire()));
    eventually(PATIENCE, async || in_queue(database).await == 1).await;
    let (_others_locks, other) = waiter(database).await;
    first.release().await.unwrap();
    // One of the two has it, and releases it while the other one waits in this process.
    let mut both = VecDeque::from([one, two]);
    let held = next_of(&mut both).await;
    held.release().await.unwrap();
    let held = other.await.unwrap().unwrap();
    eventually(PATIENCE, async || in_queue(database).await == 1).await;
    both[0].abort();
    eventually(PATIENCE, async || in_queue(database).await == 0).await;
    held.release().await.unwrap();
}

/// The next caller wants several locks, and waits for another one of them first.
async fn a_queue_entry_is_removed_when_the_next_caller_cannot_use_it<T: TestDatabase>(database: &T) {
    let (other, locks) = (database.locks().await, database.locks().await);
    let held = other.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let in_the_way = locks.insert_lock("b").ttl(LONG).acquire().await.unwrap();
    let fair = tokio::spawn(locks.insert_lock("a").wait(PATIENCE).acquire());
    eventually(PATIENCE, async || in_queue(database).await > 0).await;
    let both = tokio::spawn(locks.insert_locks(["a", "b"]).wait(PATIENCE).acquire());
    // It is behind the other caller. A try can't tell, because it does not wait. So both have a
    // moment to arrive.
    tokio::task::yield_now().await;
    fair.abort();
    eventually(PATIENCE, async || in_queue(database).await == 0).await;
    held.release().await.unwrap();
    // No queue entry of ours keeps it from the others.
    other.insert_lock("a").try_acquire().await.unwrap().unwrap().release().await.unwrap();
    in_the_way.release().await.unwrap();
    both.await.unwrap().unwrap().release().await.unwrap();
}

async fn a_waiter_that_finds_the_queue_full_waits_without_an_entry<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    let full: Vec<Queued> = (1..=MOST_QUEUED).map(|one| Queued::abandoned(one as u128)).collect();
    set_queue(database, "a", &full).await;
    // Until the entries in front are skipped.
    locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
}

/// The database appends an entry, the process extends it, and the database removes it at the grant.
async fn rust_and_sql_read_each_others_entries<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let (first_locks, first) = waiter(database).await;
    let (second_locks, second) = waiter(database).await;
    let appended = queue_of(database, "a").await;
    for (entry, locks) in appended.iter().zip([&first_locks, &second_locks]) {
        assert!(is_short_for(&entry.owner, locks.owner()), "{entry:?} {}", locks.owner());
        assert!(entry.until > entry.since, "{entry:?}");
    }
    assert_ne!(appended[0].secret, appended[1].secret);
    // Entries are extended as long as their processes wait, but the wait began when it began.
    let mut extended = Vec::new();
    eventually(PATIENCE, async || {
        extended = queue_of(database, "a").await;
        (0..2).all(|one| extended.get(one).is_some_and(|entry| entry.until > appended[one].until))
    })
    .await;
    for (before, after) in appended.iter().zip(&extended) {
        assert_eq!(*after, Queued { until: after.until, listener: after.listener, ..before.clone() });
    }
    held.release().await.unwrap();
    let held = first.await.unwrap().unwrap();
    let left: Vec<String> = queue_of(database, "a").await.into_iter().map(|entry| entry.secret).collect();
    assert_eq!(left, [appended[1].secret.clone()]);
    held.release().await.unwrap();
    second.await.unwrap().unwrap().release().await.unwrap();
    assert_eq!(queue_of(database, "a").await, []);
}

/// An entry has the whole owner, or its beginning and its end around a `~`.
fn is_short_for(short: &str, owner: &str) -> bool {
    let (beginning, end) = short.split_once('~').unwrap_or((short, ""));
    owner.starts_with(beginning) && owner.contains(end)
}

/// All or none, while others take them one by one.
async fn a_batch_does_not_starve<T: TestDatabase>(database: &T) {
    let mut callers = JoinSet::new();
    for process in 0..3 {
        let locks = database.locks().await;
        for name in ["a", "b"] {
            let locks = locks.clone();
            callers.spawn(async move {
                for _ in 0..10 {
                    locks.insert_lock(name).wait(PATIENCE).acquire().await?.release().await?;
                }
                Ok(())
            });
        }
        if process > 0 {
            callers.spawn(async move {
                for _ in 0..5 {
                    locks.insert_locks(["b", "a"]).wait(PATIENCE).acquire().await?.release().await?;
                }
                Ok(())
            });
        }
    }
    callers.join_all().await.into_iter().collect::<Result<Vec<()>, Error>>().unwrap();
}

async fn a_queue_without_waiters_is_empty<T: TestDatabase>(database: &T) {
    let processes = [database.locks().await, database.locks().await, database.locks().await];
    let mut callers = JoinSet::new();
    for caller in 0..9 {
        let locks = processes[caller % 3].clone();
        callers.spawn(async move {
            for _ in 0..5 {
                locks.insert_lock("a").wait(PATIENCE).acquire().await?.release().await?;
            }
            Ok(())
        });
    }
    callers.join_all().await.into_iter().collect::<Result<Vec<()>, Error>>().unwrap();
    eventually(PATIENCE, async || in_queue(database).await == 0).await;
}

async fn another_process_gets_the_lease_after_some_hand_offs<T: TestDatabase>(database: &T) {
    const TURNS: u32 = 3;
    let first = database.locks().await.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let locks = Locks::builder(database.pool(1).await).hand_off(TURNS, LONG).build();
    let mut callers = VecDeque::new();
    for _ in 0..2 * TURNS {
        let lock = locks.insert_lock("a").ttl(LONG).wait(PATIENCE);
        callers.push_back(tokio::spawn(lock.acquire()));
        // The first of them is in the queue, for all.
        eventually(PATIENCE, async || in_queue(database).await == 1).await;
    }
    let (_locks, other) = waiter(database).await;
    first.release().await.unwrap();
    let mut secrets = Vec::new();
    for _ in 0..TURNS {
        assert!(!other.is_finished());
        let held = next_of(&mut callers).await;
        secrets.push(held.secret_key().to_owned());
        held.release().await.unwrap();
    }
    assert!(secrets.iter().all(|secret| *secret == secrets[0]), "they asked the database");
    let held = other.await.unwrap().unwrap();
    assert!(callers.iter().all(|caller| !caller.is_finished()));
    held.release().await.unwrap();
    for _ in 0..TURNS {
        next_of(&mut callers).await.release().await.unwrap();
    }
}

/// The next of them to get the lock. They arrived in no certain order.
async fn next_of<DB: LockDatabase>(
    callers: &mut VecDeque<JoinHandle<Result<Lease<DB>, Error>>>,
) -> Lease<DB> {
    let mut next = None;
    eventually(PATIENCE, async || {
        next = callers.iter().position(JoinHandle::is_finished);
        next.is_some()
    })
    .await;
    callers.remove(next.unwrap()).unwrap().await.unwrap().unwrap()
}
