//! The lock is held, and every request says so and by whom.

use std::time::Duration;

use lock_db::{Kind, Locks};
use lock_tests::{Backend, TestDatabase, eventually, queue_of};
use sqlx::Pool;
use tokio::task::JoinSet;

use super::requests::{Request, Requests, Way, assert_none};

lock_tests::cases! {
    on every database:
    a_lease_of_another_process_is_held,
    a_lease_of_this_process_is_held,
    one_of_several_leases_is_held,
    a_free_lock_with_earlier_waiters_is_held,
    a_row_lock_of_this_process_is_held;

    on every server:
    a_row_lock_of_another_process_is_held,
    a_lock_in_a_transaction_is_held,
}

const PATIENCE: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_mins(10);
const WAITS: [Duration; 2] = [Duration::from_millis(1), Duration::from_millis(50)];
const NAME: &str = "held";
const HERE: &str = "this-process";
const ELSEWHERE: &str = "another-process";

fn requests(kind: Kind) -> Vec<Request> {
    Request::all(&WAITS).into_iter().filter(|request| request.way.kind() == kind).collect()
}

async fn labelled<T: TestDatabase>(database: &T, label: &str) -> (Locks<T::Database>, Pool<T::Database>) {
    let pool = database.pool(30).await;
    (lock_tests::migrated(Locks::builder(pool.clone()).label(label).build()).await, pool)
}

/// One after the other, so that none of them meets another one.
async fn ask_for_held<DB: Backend>(
    locks: &Locks<DB>,
    pool: &Pool<DB>,
    kind: Kind,
    owner: impl Fn(Request) -> Option<&'static str>,
    circumstances: &str,
) -> Vec<String> {
    let requests = requests(kind);
    ask(locks, pool, &requests, NAME, owner, circumstances).await
}

async fn ask<DB: Backend>(
    locks: &Locks<DB>,
    pool: &Pool<DB>,
    requests: &[Request],
    name: &str,
    owner: impl Fn(Request) -> Option<&'static str>,
    circumstances: &str,
) -> Vec<String> {
    let mut wrong = Vec::new();
    for request in requests {
        let asking = Requests::prepare(locks, pool, &[*request], |_| name.to_owned()).await;
        wrong.extend(asking.ask().await.not_held(circumstances, &owner));
    }
    wrong
}

async fn a_lease_of_another_process_is_held<T: TestDatabase>(database: &T) {
    let (locks, pool) = labelled(database, HERE).await;
    let (other, _) = labelled(database, ELSEWHERE).await;
    let held = other.insert_lock(NAME).ttl(LONG).acquire().await.unwrap();
    let wrong = ask_for_held(&locks, &pool, Kind::Insert, |_| Some(ELSEWHERE), "a lease elsewhere").await;
    assert!(held.is_held());
    assert_none(&wrong);
}

async fn a_lease_of_this_process_is_held<T: TestDatabase>(database: &T) {
    let (locks, pool) = labelled(database, HERE).await;
    let held = locks.insert_lock(NAME).ttl(LONG).acquire().await.unwrap();
    let wrong = ask_for_held(&locks, &pool, Kind::Insert, |_| Some(HERE), "a lease here").await;
    assert!(held.is_held());
    assert_none(&wrong);
}

/// The second of two names.
async fn one_of_several_leases_is_held<T: TestDatabase>(database: &T) {
    let (locks, pool) = labelled(database, HERE).await;
    for (holder, owner) in [(labelled(database, ELSEWHERE).await.0, ELSEWHERE), (locks.clone(), HERE)] {
        let held = holder.insert_lock("free, the second").ttl(LONG).acquire().await.unwrap();
        let requests: Vec<Request> = requests(Kind::Insert)
            .into_iter()
            .filter(|request| matches!(request.way, Way::Leases | Way::LeasesIn))
            .collect();
        let wrong = ask(&locks, &pool, &requests, "free", |_| Some(owner), "the second of two").await;
        held.release().await.unwrap();
        assert_none(&wrong);
    }
}

/// On SQLite a transaction that writes is not known to hold a lock.
async fn a_row_lock_of_another_process_is_held<T: TestDatabase>(database: &T) {
    let (locks, pool) = labelled(database, HERE).await;
    let (other, _) = labelled(database, ELSEWHERE).await;
    let held = other.row_lock(NAME).acquire().await.unwrap();
    let elsewhere = ask_for_held(&locks, &pool, Kind::Row, |_| None, "a row lock elsewhere").await;
    held.rollback().await.unwrap();
    assert_none(&elsewhere);
}

/// The table doesn't show who has it, but this process knows.
async fn a_row_lock_of_this_process_is_held<T: TestDatabase>(database: &T) {
    let (locks, pool) = labelled(database, HERE).await;
    let held = locks.row_lock(NAME).acquire().await.unwrap();
    let owner = |request: Request| (!request.way.is_in_transaction()).then_some(HERE);
    let requests: Vec<Request> = requests(Kind::Row)
        .into_iter()
        // On SQLite a caller's transaction only finds that another one writes.
        .filter(|request| T::NAME != "sqlite" || !request.way.is_in_transaction())
        .collect();
    let wrong = ask(&locks, &pool, &requests, NAME, owner, "a row lock here").await;
    held.rollback().await.unwrap();
    assert_none(&wrong);
}

/// Both kinds of lock. Others wait for the end of that transaction.
async fn a_lock_in_a_transaction_is_held<T: TestDatabase>(database: &T) {
    let (locks, pool) = labelled(database, HERE).await;
    let (other, other_pool) = labelled(database, ELSEWHERE).await;
    let mut all = Vec::new();
    for is_new in [true, false] {
        for (holder, holding) in [(&locks, &pool), (&other, &other_pool)] {
            for kind in [Kind::Insert, Kind::Row] {
                let name = format!("{kind} {is_new} {}", std::ptr::eq(holder, &raw const locks));
                let mut transaction = holding.begin().await.unwrap();
                if !is_new {
                    take_and_release(&other, kind, &name).await;
                }
                match kind {
                    Kind::Row => holder.row_lock(&name).acquire_in(&mut transaction).await.unwrap(),
                    _ => holder.insert_lock(&name).acquire_in(&mut transaction).await.unwrap(),
                };
                all.extend(ask(&locks, &pool, &requests(kind), &name, |_| None, &name).await);
                transaction.rollback().await.unwrap();
                take_and_release(&locks, kind, &name).await;
            }
        }
    }
    assert_none(&all);
}

async fn take_and_release<DB: Backend>(locks: &Locks<DB>, kind: Kind, name: &str) {
    match kind {
        Kind::Row => {
            locks.row_lock(name).wait(PATIENCE).acquire().await.unwrap().commit().await.unwrap();
        }
        _ => locks.insert_lock(name).wait(PATIENCE).acquire().await.unwrap().release().await.unwrap(),
    }
}

/// The lock is free for a moment, but others are to have it first.
async fn a_free_lock_with_earlier_waiters_is_held<T: TestDatabase>(database: &T) {
    let (locks, pool) = labelled(database, HERE).await;
    let (other, _) = labelled(database, ELSEWHERE).await;
    let held = other.insert_lock(NAME).ttl(LONG).acquire().await.unwrap();
    let mut waiting = JoinSet::new();
    waiting.spawn(other.insert_lock(NAME).ttl(LONG).wait(PATIENCE).acquire());
    let third = labelled(database, "third").await.0;
    waiting.spawn(third.insert_lock(NAME).ttl(LONG).wait(PATIENCE).acquire());
    eventually(PATIENCE, async || !queue_of(database, NAME).await.is_empty()).await;
    let wrong = ask_for_held(&locks, &pool, Kind::Insert, |_| None, "behind others").await;
    held.release().await.unwrap();
    while let Some(next) = waiting.join_next().await {
        next.unwrap().unwrap().release().await.unwrap();
    }
    assert_none(&wrong);
}
