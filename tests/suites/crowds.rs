//! Many callers at once: whoever waits keeps nobody else from what is free.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::task::Poll;
use std::time::Duration;

use lock_db::{Error, Locks};
use lock_tests::{Backend, Direction, TestDatabase, TestServer, eventually, for_each_database};
use tokio::task::JoinSet;

for_each_database! {
    waiters_for_a_row_leave_connections_to_its_holder,
    every_close_waits_for_the_releases,
    ;
    on servers:
    waiters_for_rows_of_other_processes_leave_a_connection,
    waiters_for_names_that_transactions_hold_are_in_nobodys_way,
    a_long_queue_is_no_silence,
}

const PATIENCE: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_mins(10);

/// The body of each holder needs a second connection of the same small pool.
async fn waiters_for_a_row_leave_connections_to_its_holder<T: TestDatabase>(database: &T) {
    database.run("CREATE TABLE counter (n BIGINT)").await;
    database.run("INSERT INTO counter VALUES (7)").await;
    let pool = database.pool(3).await;
    let locks = lock_tests::migrated(Locks::new(pool.clone())).await;
    let mut callers = JoinSet::new();
    for _ in 0..20 {
        let (locks, pool) = (locks.clone(), pool.clone());
        callers.spawn(async move {
            let held = locks.row_lock("a").wait(PATIENCE).acquire().await?;
            let mut connection = pool.acquire().await.unwrap();
            let read = T::Database::find_number(&mut connection, "SELECT n FROM counter").await;
            assert_eq!(read.unwrap(), Some(7));
            held.commit().await
        });
    }
    callers.join_all().await.into_iter().collect::<Result<Vec<_>, Error>>().unwrap();
}

async fn waiters_for_rows_of_other_processes_leave_a_connection<T: TestServer>(database: &T) {
    let other = database.locks().await;
    let mut held = Vec::new();
    for number in 0..6 {
        held.push(other.row_lock(number.to_string()).acquire().await.unwrap());
    }
    let pool = database.pool(3).await;
    let locks = Locks::new(pool.clone());
    let mut waiting = JoinSet::new();
    for number in 0..6 {
        waiting.spawn(locks.row_lock(number.to_string()).wait(PATIENCE).acquire());
    }
    // Both of those that may wait in the database do.
    eventually(PATIENCE, async || database.activity().await.waiting == 2).await;
    for _ in 0..3 {
        let free = locks.row_lock("free").try_acquire().await.unwrap();
        free.expect("nobody has it").commit().await.unwrap();
    }
    drop(held);
    // And they all come to their turn.
    while let Some(taken) = waiting.join_next().await {
        taken.unwrap().unwrap().rollback().await.unwrap();
    }
}

/// Their rows look free, but are locked.
async fn waiters_for_names_that_transactions_hold_are_in_nobodys_way<T: TestServer>(database: &T) {
    let names: Vec<String> = (0..8).map(|number| number.to_string()).collect();
    let (locks, other) = (database.locks().await, database.locks().await);
    let mut holder = database.pool(1).await.begin().await.unwrap();
    other.insert_locks(&names).acquire_in(&mut holder).await.unwrap();
    let mut waiting = JoinSet::new();
    for name in &names {
        waiting.spawn(locks.insert_lock(name).wait(PATIENCE).acquire());
    }
    // As long as they wait, others get what is free, and give it back.
    for number in 0..50 {
        let free = locks.insert_lock(format!("free {number}")).wait(Duration::from_secs(3)).acquire().await;
        free.unwrap().release().await.unwrap();
    }
    assert!(waiting.try_join_next().is_none());
    // And hear that a row is locked when it is theirs.
    let lease = locks.insert_lock("own").ttl(LONG).acquire().await.unwrap();
    let mut verified = database.pool(1).await.begin().await.unwrap();
    lease.verify_in(&mut verified).await.unwrap();
    let releasing = tokio::spawn(lease.release());
    locks.insert_lock("free").wait(Duration::from_secs(3)).acquire().await.unwrap().release().await.unwrap();
    verified.rollback().await.unwrap();
    releasing.await.unwrap().unwrap();

    holder.rollback().await.unwrap();
    while let Some(taken) = waiting.join_next().await {
        taken.unwrap().unwrap().release().await.unwrap();
    }
}

/// More work than the server does in the five seconds after which a silent one is given up.
async fn a_long_queue_is_no_silence<T: TestServer>(database: &T) {
    const CALLERS: usize = 120;
    drop(database.locks().await);
    let proxy = database.proxy();
    let pool = lock_tests::pool::<T::Database>(&database.url_by(proxy.address()), 2).await;
    let locks = Locks::new(pool);
    locks.check().await.unwrap();
    proxy.delay(Direction::ToServer, Duration::from_millis(15));
    let mut callers = JoinSet::new();
    for number in 0..CALLERS {
        let lock = locks.insert_lock(number.to_string()).ttl(LONG).wait(Duration::from_mins(1));
        callers.spawn(async move { lock.acquire().await?.release().await });
    }
    callers.join_all().await.into_iter().collect::<Result<Vec<_>, Error>>().unwrap();
    assert_eq!(
        database.number("SELECT COUNT(*) FROM distributed_lock WHERE expire_time > '2001-01-01'").await,
        0
    );
}

async fn every_close_waits_for_the_releases<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let names = (0..100).map(|number| number.to_string());
    let leases = locks.insert_locks(names).ttl(LONG).wait(PATIENCE).acquire().await.unwrap();
    let closing = |locks: Locks<T::Database>| async move { locks.close().await };
    let mut first = std::pin::pin!(closing(locks.clone()));
    // The first one gives up as soon as it has begun.
    let begun = std::future::poll_fn(|context| Poll::Ready(first.as_mut().poll(context))).await;
    assert!(begun.is_pending());
    let both = tokio::join!(closing(locks.clone()), closing(locks.clone()));
    let ((), ()) = both;
    let held = "SELECT COUNT(*) FROM distributed_lock WHERE expire_time > '2001-01-01 00:00:00'";
    assert_eq!(database.number(held).await, 0);
    drop(leases);
}
