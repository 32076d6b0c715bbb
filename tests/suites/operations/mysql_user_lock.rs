//! MySQL and MariaDB: a request that waits for a lock waits for its user lock on the server, and
//! nothing depends on that.

use std::time::Duration;

use lock_db::{Error, Lease, LockDatabase, Locks};
use lock_tests::{Backend, TestDatabase, TestServer, eventually};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

lock_tests::cases! {
    on mariadb:
    the_second_waiter_waits_for_the_user_lock_on_the_server,
    no_user_lock_is_left_without_waiters,
    a_waiter_without_the_user_lock_polls,
    a_waiting_process_continues_to_renew,
    a_lease_with_a_short_ttl_is_renewed_in_time,
    many_leases_are_renewed_in_time,
    a_process_that_waits_for_many_names_opens_no_more_connections;

    on mysql:
    the_second_waiter_waits_for_the_user_lock_on_the_server,
    no_user_lock_is_left_without_waiters,
    a_waiter_without_the_user_lock_polls,
    a_waiting_process_continues_to_renew,
    a_lease_with_a_short_ttl_is_renewed_in_time,
    many_leases_are_renewed_in_time,
    a_process_that_waits_for_many_names_opens_no_more_connections,
}

const PATIENCE: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_mins(10);

type Waiting<DB> = JoinHandle<Result<Lease<DB>, Error>>;

fn wait_for<DB: LockDatabase>(locks: &Locks<DB>, name: &str) -> Waiting<DB> {
    tokio::spawn(locks.insert_lock(name).ttl(LONG).wait(PATIENCE).acquire())
}

/// The name of the user lock, in SQL.
async fn baton<T: TestDatabase>(database: &T, name: &str) -> String {
    let row = database.number(&format!("SELECT id FROM distributed_lock WHERE lock_name = '{name}'")).await;
    format!("CONCAT('lock_db:', LEFT(SHA2(DATABASE(), 224), 32), ':{row}')")
}

async fn somebody_has<T: TestDatabase>(database: &T, baton: &str) -> bool {
    database.number(&format!("SELECT IS_USED_LOCK({baton}) IS NOT NULL")).await == 1
}

async fn on_the_server<T: TestDatabase>(database: &T) -> i64 {
    let sql = "SELECT COUNT(*) FROM information_schema.processlist
        WHERE db = DATABASE() AND state = 'User lock' AND info LIKE '%GET_LOCK%'";
    database.number(sql).await
}

async fn the_second_waiter_waits_for_the_user_lock_on_the_server<T: TestServer>(database: &T) {
    let locks = database.locks().await;
    let held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let baton = baton(database, "a").await;
    assert!(!somebody_has(database, &baton).await, "nobody waits, nothing is asked for");
    let (second, third) = (database.locks().await, database.locks().await);
    let next = wait_for(&second, "a");
    eventually(PATIENCE, async || somebody_has(database, &baton).await).await;
    let last = wait_for(&third, "a");
    eventually(PATIENCE, async || on_the_server(database).await == 1).await;
    held.release().await.unwrap();
    let held = next.await.unwrap().unwrap();
    assert!(somebody_has(database, &baton).await, "as long as the lock is held");
    assert!(!last.is_finished());
    held.release().await.unwrap();
    last.await.unwrap().unwrap().release().await.unwrap();
    eventually(PATIENCE, async || !somebody_has(database, &baton).await).await;
}

async fn no_user_lock_is_left_without_waiters<T: TestServer>(database: &T) {
    let locks = database.locks().await;
    let held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let baton = baton(database, "a").await;
    let (second, third) = (database.locks().await, database.locks().await);
    let next = wait_for(&second, "a");
    eventually(PATIENCE, async || somebody_has(database, &baton).await).await;
    let last = wait_for(&third, "a");
    eventually(PATIENCE, async || on_the_server(database).await == 1).await;
    last.abort();
    next.abort();
    eventually(PATIENCE, async || {
        !somebody_has(database, &baton).await && on_the_server(database).await == 0
    })
    .await;
    held.release().await.unwrap();
    // The connection for its renewals is free for the next request.
    let held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let next = wait_for(&second, "a");
    eventually(PATIENCE, async || somebody_has(database, &baton).await).await;
    held.release().await.unwrap();
    next.await.unwrap().unwrap().release().await.unwrap();
}

/// Another session keeps it forever, like a process that was stopped.
async fn a_waiter_without_the_user_lock_polls<T: TestServer>(database: &T) {
    let (locks, other) = (database.locks().await, database.locks().await);
    let mut held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let baton = baton(database, "a").await;
    let mut stopped = database.connection().await;
    T::Database::run(&mut stopped, &format!("DO GET_LOCK({baton}, 0)")).await.unwrap();
    for turn in 0..4 {
        let next = wait_for(if turn % 2 == 0 { &other } else { &locks }, "a");
        eventually(PATIENCE, async || on_the_server(database).await > 0).await;
        held.release().await.unwrap();
        held = timeout(PATIENCE, next).await.unwrap().unwrap().unwrap();
    }
    held.release().await.unwrap();
}

/// Between two slices.
async fn a_waiting_process_continues_to_renew<T: TestServer>(database: &T) {
    let locks = database.locks().await;
    let held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let first_locks = database.locks().await;
    let first = wait_for(&first_locks, "a");
    let baton = baton(database, "a").await;
    eventually(PATIENCE, async || somebody_has(database, &baton).await).await;
    let other = database.locks().await;
    let renewed = other.insert_lock("b").ttl(Duration::from_secs(6)).acquire().await.unwrap();
    let next = wait_for(&other, "a");
    eventually(PATIENCE, async || on_the_server(database).await == 1).await;
    let moved = "SELECT COUNT(*) FROM distributed_lock
        WHERE lock_name = 'b' AND expire_time > acquire_time + INTERVAL 9 SECOND";
    eventually(PATIENCE, async || database.number(moved).await == 1).await;
    assert!(renewed.is_held());
    held.release().await.unwrap();
    first.await.unwrap().unwrap().release().await.unwrap();
    next.await.unwrap().unwrap().release().await.unwrap();
}

/// At first on the other connection. Then this one waits for nothing else any more.
async fn a_lease_with_a_short_ttl_is_renewed_in_time<T: TestServer>(database: &T) {
    let (locks, first_locks, other) =
        (database.locks().await, database.locks().await, database.locks().await);
    let held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let baton = baton(database, "a").await;
    let first = wait_for(&first_locks, "a");
    eventually(PATIENCE, async || somebody_has(database, &baton).await).await;
    let next = wait_for(&other, "a");
    eventually(PATIENCE, async || on_the_server(database).await == 1).await;
    let short = other.insert_lock("b").ttl(Duration::from_secs(2)).acquire().await.unwrap();
    eventually(PATIENCE, async || on_the_server(database).await == 0).await;
    let moved = "SELECT COUNT(*) FROM distributed_lock
        WHERE lock_name = 'b' AND expire_time > acquire_time + INTERVAL 4 SECOND";
    eventually(PATIENCE, async || database.number(moved).await == 1).await;
    assert!(short.is_held());
    short.release().await.unwrap();
    eventually(PATIENCE, async || on_the_server(database).await == 1).await;
    held.release().await.unwrap();
    first.await.unwrap().unwrap().release().await.unwrap();
    next.await.unwrap().unwrap().release().await.unwrap();
}

/// Their statements wait for one slice together, not for one each.
async fn many_leases_are_renewed_in_time<T: TestServer>(database: &T) {
    let (locks, first_locks, other) =
        (database.locks().await, database.locks().await, database.locks().await);
    let held = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let baton = baton(database, "a").await;
    let first = wait_for(&first_locks, "a");
    eventually(PATIENCE, async || somebody_has(database, &baton).await).await;
    let ttl = Duration::from_secs(8);
    let mut taking = JoinSet::new();
    for number in 0..4000 {
        taking.spawn(other.insert_lock(format!("many {number}")).ttl(ttl).wait(PATIENCE).acquire());
    }
    let many = taking.join_all().await.into_iter().collect::<Result<Vec<_>, Error>>().unwrap();
    let next = wait_for(&other, "a");
    eventually(PATIENCE, async || on_the_server(database).await == 1).await;
    let moved = "SELECT COUNT(*) FROM distributed_lock
        WHERE lock_name LIKE 'many %' AND expire_time > acquire_time + INTERVAL 13 SECOND";
    eventually(PATIENCE, async || database.number(moved).await == 4000).await;
    assert!(many.iter().all(Lease::is_held));
    held.release().await.unwrap();
    first.await.unwrap().unwrap().release().await.unwrap();
    next.await.unwrap().unwrap().release().await.unwrap();
}

async fn a_process_that_waits_for_many_names_opens_no_more_connections<T: TestServer>(database: &T) {
    let locks = database.locks().await;
    let names: Vec<String> = (0..10).map(|number| number.to_string()).collect();
    let mut held = Vec::new();
    for name in &names {
        held.push(locks.insert_lock(name).ttl(LONG).acquire().await.unwrap());
    }
    let proxy = database.proxy();
    let far = Locks::new(lock_tests::pool::<T::Database>(&database.url_by(proxy.address()), 1).await);
    let waiting: Vec<_> = names.iter().map(|name| wait_for(&far, name)).collect();
    eventually(PATIENCE, async || {
        database.number("SELECT COUNT(*) FROM distributed_lock WHERE waiters <> ''").await == 10
    })
    .await;
    // The pool opened one to test whether it can.
    assert!(proxy.open() <= 3, "{} connections", proxy.open());
    for lease in held {
        lease.release().await.unwrap();
    }
    for next in waiting {
        next.await.unwrap().unwrap().release().await.unwrap();
    }
}
