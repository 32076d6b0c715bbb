//! PostgreSQL notifies the next process when a lock is free. It notifies only that process, and
//! only if it waits. Nothing depends on the notification.

use std::time::Duration;

use lock_db::{Error, Lease, Locks};
use lock_tests::{PostgresServer, TestDatabase, TestServer, eventually, queue_of};
use sqlx::Postgres;
use sqlx::postgres::PgListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

lock_tests::cases! {
    on postgres:
    a_release_notifies_the_next_waiter,
    a_commit_that_releases_notifies_the_next_waiter,
    a_batch_of_releases_notifies_one_waiter_for_each,
    no_notification_is_sent_without_waiters,
    a_waiter_that_is_not_notified_polls,
    a_waiting_process_opens_no_more_connections,
    a_waiting_process_continues_to_renew,
}

const PATIENCE: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_mins(10);

type Waiting = JoinHandle<Result<Lease<Postgres>, Error>>;

fn wait_for(locks: &Locks<Postgres>, name: &str) -> Waiting {
    tokio::spawn(locks.insert_lock(name).ttl(LONG).wait(PATIENCE).acquire())
}

/// The channel of the first process in the queue of a name.
async fn channel_before(database: &PostgresServer, name: &str) -> String {
    let mut listener = 0;
    // It is in the queue before it can be notified.
    eventually(PATIENCE, async || {
        listener = queue_of(database, name).await.first().map_or(0, |first| first.listener);
        listener > 0
    })
    .await;
    format!("lock_db_{listener:08x}")
}

async fn listener(database: &PostgresServer, channel: &str) -> PgListener {
    let mut listener = PgListener::connect(database.url()).await.unwrap();
    listener.listen(channel).await.unwrap();
    listener
}

async fn id(database: &PostgresServer, name: &str) -> String {
    database.number(&format!("SELECT id FROM distributed_lock WHERE lock_name = '{name}'")).await.to_string()
}

async fn hears(listener: &mut PgListener) -> String {
    timeout(PATIENCE, listener.recv()).await.expect("no call").unwrap().payload().to_owned()
}

async fn a_release_notifies_the_next_waiter(database: &PostgresServer) {
    let (locks, other) = (database.locks().await, database.locks().await);
    let held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let next = wait_for(&other, "a");
    let mut listener = listener(database, &channel_before(database, "a").await).await;
    held.release().await.unwrap();
    assert_eq!(hears(&mut listener).await, id(database, "a").await);
    next.await.unwrap().unwrap().release().await.unwrap();
}

async fn a_commit_that_releases_notifies_the_next_waiter(database: &PostgresServer) {
    let (locks, other) = (database.locks().await, database.locks().await);
    let held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let next = wait_for(&other, "a");
    let mut listener = listener(database, &channel_before(database, "a").await).await;
    let transaction = held.begin().await.unwrap();
    held.commit_and_release(transaction).await.unwrap();
    assert_eq!(hears(&mut listener).await, id(database, "a").await);
    next.await.unwrap().unwrap().release().await.unwrap();
}

async fn a_batch_of_releases_notifies_one_waiter_for_each(database: &PostgresServer) {
    let (locks, other) = (database.locks().await, database.locks().await);
    let names: Vec<String> = (0..20).map(|number| number.to_string()).collect();
    let mut held = Vec::new();
    let mut waiting = Vec::new();
    let mut ids = Vec::new();
    for name in &names {
        held.push(locks.insert_lock(name).ttl(LONG).acquire().await.unwrap());
        waiting.push(wait_for(&other, name));
        ids.push(id(database, name).await);
    }
    let mut channels = Vec::new();
    for name in &names {
        channels.push(channel_before(database, name).await);
    }
    assert!(channels.iter().all(|channel| *channel == channels[0]), "one process has one channel");
    let mut listener = listener(database, &channels[0]).await;
    let releases: JoinSet<_> = held.into_iter().map(Lease::release).collect();
    releases.join_all().await.into_iter().collect::<Result<Vec<()>, Error>>().unwrap();
    let mut called = Vec::new();
    for _ in &names {
        called.push(hears(&mut listener).await);
    }
    called.sort();
    ids.sort();
    assert_eq!(called, ids);
    for next in waiting {
        next.await.unwrap().unwrap().release().await.unwrap();
    }
}

async fn no_notification_is_sent_without_waiters(database: &PostgresServer) {
    let (locks, other) = (database.locks().await, database.locks().await);
    let held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let next = wait_for(&other, "a");
    let channel = channel_before(database, "a").await;
    held.release().await.unwrap();
    let held = next.await.unwrap().unwrap();
    let mut listener = listener(database, &channel).await;
    held.release().await.unwrap();
    database.run(&format!("NOTIFY {channel}, 'last'")).await;
    assert_eq!(hears(&mut listener).await, "last");
}

/// Its listening connection is gone, so the notification is lost.
async fn a_waiter_that_is_not_notified_polls(database: &PostgresServer) {
    let (locks, other) = (database.locks().await, database.locks().await);
    let held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let next = wait_for(&other, "a");
    channel_before(database, "a").await;
    let ended = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
        WHERE datname = current_database() AND query LIKE 'LISTEN%'";
    assert_eq!(database.number(ended).await, 1);
    held.release().await.unwrap();
    let held = timeout(PATIENCE, next).await.unwrap().unwrap().unwrap();
    // The next time it is notified again.
    let next = wait_for(&locks, "a");
    channel_before(database, "a").await;
    held.release().await.unwrap();
    let held = next.await.unwrap().unwrap();
    let next = wait_for(&other, "a");
    channel_before(database, "a").await;
    held.release().await.unwrap();
    next.await.unwrap().unwrap().release().await.unwrap();
}

async fn a_waiting_process_opens_no_more_connections(database: &PostgresServer) {
    let locks = database.locks().await;
    let held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let proxy = database.proxy();
    let far = Locks::new(lock_tests::pool::<Postgres>(&database.url_by(proxy.address()), 1).await);
    let others = far.insert_lock("b").ttl(Duration::from_secs(5)).acquire().await.unwrap();
    let next = wait_for(&far, "a");
    channel_before(database, "a").await;
    // The pool opened one to test whether it can.
    assert!(proxy.open() <= 3, "{} connections", proxy.open());
    held.release().await.unwrap();
    next.await.unwrap().unwrap().release().await.unwrap();
    assert!(others.is_held());
}

/// On the connection that listens.
async fn a_waiting_process_continues_to_renew(database: &PostgresServer) {
    let (locks, other) = (database.locks().await, database.locks().await);
    let held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let renewed = other.insert_lock("b").ttl(Duration::from_secs(3)).acquire().await.unwrap();
    let next = wait_for(&other, "a");
    channel_before(database, "a").await;
    let moved = "SELECT count(*) FROM distributed_lock WHERE lock_name = 'b'
        AND expire_time > acquire_time + interval '4 seconds'";
    eventually(PATIENCE, async || database.number(moved).await == 1).await;
    assert!(renewed.is_held());
    held.release().await.unwrap();
    next.await.unwrap().unwrap().release().await.unwrap();
}
