//! The server's clock was ahead, and is corrected: what it wrote before lies in the far future.

use std::time::{Duration, Instant};

use lock_db::Locks;
use lock_tests::{Backend, Parent, Process, TestDatabase, eventually, pool};

lock_tests::cases! {
    on every database:
    the_lease_of_a_killed_holder_is_free_in_time,
    tries_get_the_lease_of_a_killed_holder,
    the_lease_of_a_killed_holder_that_was_given_notice_is_free_in_time,
    transactions_get_the_lease_of_a_killed_holder,
    batches_get_the_leases_of_a_killed_holder,
    a_living_holder_corrects_a_deadline_of_a_wrong_clock,
    a_lock_with_a_minimum_hold_time_is_free_in_time,
    transactions_get_a_lock_after_its_minimum_hold_time,
}

/// Less than the day by which the clock was ahead.
const PATIENCE: Duration = Duration::from_secs(20);
const TTL: Duration = Duration::from_secs(2);

/// Holds a lease until it is killed.
pub async fn hold_a_lease_until_killed<DB: Backend>(mut parent: Parent) {
    let locks = Locks::new(pool::<DB>(parent.url(), 2).await);
    let _lease = locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
    parent.say("held");
    parent.hear().await;
}

/// As the rows are when the clock has been set back by so much.
async fn set_back<T: TestDatabase>(database: &T, seconds: u32) {
    let later = |column: &str| match T::NAME {
        "postgres" => format!("{column} + interval '{seconds} s'"),
        "sqlite" => format!("strftime('%Y-%m-%d %H:%M:%f000', {column}, '+{seconds} seconds')"),
        _ => format!("{column} + INTERVAL {seconds} SECOND"),
    };
    let sql = format!(
        "UPDATE distributed_lock SET acquire_time = {}, expire_time = {} WHERE expire_time > '2000-01-01'",
        later("acquire_time"),
        later("expire_time")
    );
    assert_eq!(database.run(&sql).await, 1);
}

const DAY: u32 = 24 * 60 * 60;

async fn dead_holder<T: TestDatabase>(database: &T) {
    let mut holder = Process::spawn("hold_a_lease_until_killed", database.url(), [""; 0]);
    holder.expect("held").await;
    holder.kill();
}

async fn the_lease_of_a_killed_holder_is_free_in_time<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    dead_holder(database).await;
    set_back(database, DAY).await;
    let asked = Instant::now();
    let taken = locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap();
    // Nobody knows that the holder is dead.
    assert!(asked.elapsed() >= TTL, "{:?}", asked.elapsed());
    taken.release().await.unwrap();
}

/// Those that do not wait find it free after a while, too.
async fn tries_get_the_lease_of_a_killed_holder<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    dead_holder(database).await;
    set_back(database, DAY).await;
    eventually(PATIENCE, async || {
        locks.insert_lock("a").try_acquire().await.is_ok_and(|taken| taken.is_some())
    })
    .await;
}

/// The process that gave notice is gone as well.
async fn the_lease_of_a_killed_holder_that_was_given_notice_is_free_in_time<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    dead_holder(database).await;
    set_back(database, DAY).await;
    assert_eq!(database.run("UPDATE distributed_lock SET ttl_micros = 0 WHERE lock_name = 'a'").await, 1);
    locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
}

async fn transactions_get_the_lease_of_a_killed_holder<T: TestDatabase>(database: &T) {
    let (locks, pool) = (database.locks().await, database.pool(2).await);
    dead_holder(database).await;
    set_back(database, DAY).await;
    let mut transaction = pool.begin().await.unwrap();
    locks.insert_lock("a").wait(PATIENCE).acquire_in(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
}

async fn batches_get_the_leases_of_a_killed_holder<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    dead_holder(database).await;
    set_back(database, DAY).await;
    let taken = locks.insert_locks(["0", "a", "b"]).wait(PATIENCE).acquire().await.unwrap();
    taken.release().await.unwrap();
}

/// It keeps its lease, and its next renewal corrects the deadline.
async fn a_living_holder_corrects_a_deadline_of_a_wrong_clock<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, database.locks().await);
    let lease = locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
    set_back(database, DAY).await;
    let waiting = tokio::spawn(other.insert_lock("a").wait(PATIENCE).acquire());
    let soon = match T::NAME {
        "postgres" => "clock_timestamp() + interval '1 hour'",
        "sqlite" => "datetime('now', '+1 hour')",
        _ => "UTC_TIMESTAMP(6) + INTERVAL 1 HOUR",
    };
    let corrected =
        format!("SELECT COUNT(*) FROM distributed_lock WHERE lock_name = 'a' AND expire_time < {soon}");
    eventually(PATIENCE, async || database.number(&corrected).await == 1).await;
    // For longer than whoever waits may have to.
    let watched = Instant::now();
    while watched.elapsed() < 2 * TTL {
        assert!(lease.is_held());
        assert!(!waiting.is_finished());
        tokio::time::sleep(TTL / 10).await;
    }
    lease.release().await.unwrap();
    waiting.await.unwrap().unwrap().release().await.unwrap();
}

/// The process that kept the lock has released it, so nobody renews anything.
async fn a_lock_with_a_minimum_hold_time_is_free_in_time<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, database.locks().await);
    for waits in [true, false] {
        keep_for_a_while(database, &locks).await;
        if waits {
            other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
        } else {
            eventually(PATIENCE, async || {
                other.insert_lock("a").try_acquire().await.is_ok_and(|taken| taken.is_some())
            })
            .await;
        }
    }
}

async fn transactions_get_a_lock_after_its_minimum_hold_time<T: TestDatabase>(database: &T) {
    let (locks, other, pool) = (database.locks().await, database.locks().await, database.pool(1).await);
    keep_for_a_while(database, &locks).await;
    let mut transaction = pool.begin().await.unwrap();
    other.insert_lock("a").wait(PATIENCE).acquire_in(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
}

async fn keep_for_a_while<T: TestDatabase>(database: &T, locks: &Locks<T::Database>) {
    let lease = locks.insert_lock("a").at_least(TTL).wait(PATIENCE).acquire().await.unwrap();
    lease.release().await.unwrap();
    set_back(database, DAY).await;
}
