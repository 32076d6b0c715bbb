//! A lease that is released while callers of the same process wait for it is handed from one to the
//! next in memory. Each gets a fencing token of its own. The lease is not handed on while a
//! transaction of the last holder may still commit under it.
//!
//! Leases that were handed on share the secret of one acquisition. The cases use that to tell.

use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::Poll;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lock_db::{Error, Lease, LockDatabase, Locks};
use lock_tests::{Backend, Direction, TestDatabase, TestServer};
use tokio::task::JoinSet;
use tokio::time::timeout;

lock_tests::cases! {
    on every database:
    waiters_get_the_lease_one_after_the_other,
    hand_offs_end_after_a_number_of_turns,
    hand_offs_end_after_a_time,
    a_waiter_that_has_left_is_skipped,
    a_waiter_that_leaves_with_the_lease_hands_it_off,
    a_waiter_for_another_ttl_gets_a_lease_of_its_own,
    a_lock_with_a_minimum_hold_time_is_not_handed_off,
    a_committed_transaction_prevents_no_hand_off,
    a_verified_transaction_prevents_a_hand_off,
    an_older_transaction_is_refused,
    an_expired_lease_is_not_handed_off,
    close_answers_waiters,
    tokens_grow_across_hand_offs_and_processes;

    on every server:
    an_older_transaction_that_sees_each_commit_is_not_refused,
    a_hand_off_sends_no_message,
    a_commit_without_an_answer_prevents_a_hand_off,
}

const PATIENCE: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_mins(10);
/// For what must not happen: if it is too short, a mistake may only pass unnoticed.
const A_WHILE: Duration = Duration::from_millis(300);

type Acquiring<DB> = Pin<Box<dyn Future<Output = Result<Lease<DB>, Error>> + Send>>;

/// A caller that is in the queue when this returns.
async fn queued<DB: LockDatabase>(locks: &Locks<DB>, ttl: Duration) -> Acquiring<DB> {
    let mut acquiring: Acquiring<DB> = Box::pin(locks.insert_lock("a").ttl(ttl).wait(PATIENCE).acquire());
    assert!(poll_fn(|context| Poll::Ready(acquiring.as_mut().poll(context))).await.is_pending());
    acquiring
}

/// A lease that may be handed on, and its waiters: granted while they waited.
async fn held_before<DB: LockDatabase>(locks: &Locks<DB>, waiters: usize) -> (Lease<DB>, Vec<Acquiring<DB>>) {
    let first = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let second = queued(locks, LONG).await;
    let mut waiting = Vec::new();
    for _ in 0..waiters {
        waiting.push(queued(locks, LONG).await);
    }
    first.release().await.unwrap();
    (second.await.unwrap(), waiting)
}

async fn locks_with<T: TestDatabase>(database: &T, turns: u32, time: Duration) -> Locks<T::Database> {
    drop(database.locks().await);
    Locks::builder(database.pool(3).await).hand_off(turns, time).build()
}

async fn locks<T: TestDatabase>(database: &T) -> Locks<T::Database> {
    locks_with(database, 64, LONG).await
}

fn was_handed_on<DB: LockDatabase>(from: &str, to: &Lease<DB>) -> bool {
    to.secret_key() == from
}

async fn waiters_get_the_lease_one_after_the_other<T: TestDatabase>(database: &T) {
    let locks = locks(database).await;
    let (mut held, waiting) = held_before(&locks, 5).await;
    for next in waiting {
        let (secret, token) = (held.secret_key().to_owned(), held.fencing_token());
        // By a drop as well as by a release.
        if token % 2 == 0 {
            drop(held)
        } else {
            held.release().await.unwrap()
        }
        held = timeout(PATIENCE, next).await.unwrap().unwrap();
        assert!(was_handed_on(&secret, &held));
        assert_eq!(held.fencing_token(), token + 1);
        assert!(held.is_held());
    }
    let last = held.fencing_token();
    held.release().await.unwrap();
    let elsewhere = database.locks().await;
    let after = elsewhere.insert_lock("a").wait(PATIENCE).acquire().await.unwrap();
    assert!(after.fencing_token() > last, "{} after {last}", after.fencing_token());
}

async fn hand_offs_end_after_a_number_of_turns<T: TestDatabase>(database: &T) {
    // Without waiters in other processes the limit is four times as high.
    let locks = locks_with(database, 2, LONG).await;
    let (mut held, waiting) = held_before(&locks, 9).await;
    let mut by_hand = Vec::new();
    let mut last = held.fencing_token();
    for next in waiting {
        let secret = held.secret_key().to_owned();
        held.release().await.unwrap();
        held = next.await.unwrap();
        by_hand.push(was_handed_on(&secret, &held));
        assert!(held.fencing_token() > last);
        last = held.fencing_token();
    }
    assert_eq!(by_hand, [true, true, true, true, true, true, true, false, true]);
}

async fn hand_offs_end_after_a_time<T: TestDatabase>(database: &T) {
    let locks = locks_with(database, 64, Duration::ZERO).await;
    let (held, waiting) = held_before(&locks, 1).await;
    let secret = held.secret_key().to_owned();
    held.release().await.unwrap();
    for next in waiting {
        assert!(!was_handed_on(&secret, &next.await.unwrap()));
    }
}

async fn a_waiter_that_has_left_is_skipped<T: TestDatabase>(database: &T) {
    let locks = locks(database).await;
    let (held, mut waiting) = held_before(&locks, 3).await;
    let secret = held.secret_key().to_owned();
    drop(waiting.remove(1));
    drop(waiting.remove(0));
    held.release().await.unwrap();
    let next = waiting.remove(0).await.unwrap();
    assert!(was_handed_on(&secret, &next));
}

/// The waiter has got the lease, but its future is not polled.
async fn a_waiter_that_leaves_with_the_lease_hands_it_off<T: TestDatabase>(database: &T) {
    let locks = locks(database).await;
    let (held, mut waiting) = held_before(&locks, 2).await;
    let secret = held.secret_key().to_owned();
    let (served, next) = (waiting.remove(0), waiting.remove(0));
    held.release().await.unwrap();
    drop(served);
    let next = timeout(PATIENCE, next).await.unwrap().unwrap();
    assert!(was_handed_on(&secret, &next));
}

async fn a_waiter_for_another_ttl_gets_a_lease_of_its_own<T: TestDatabase>(database: &T) {
    let locks = locks(database).await;
    let first = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let second = queued(&locks, LONG).await;
    let third = queued(&locks, 2 * LONG).await;
    first.release().await.unwrap();
    let second = second.await.unwrap();
    let secret = second.secret_key().to_owned();
    second.release().await.unwrap();
    assert!(!was_handed_on(&secret, &third.await.unwrap()));
}

async fn a_lock_with_a_minimum_hold_time_is_not_handed_off<T: TestDatabase>(database: &T) {
    let locks = locks(database).await;
    let first = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    let kept = locks.insert_lock("a").ttl(LONG).wait(PATIENCE).at_least(Duration::from_secs(1));
    let mut second = Box::pin(kept.acquire());
    assert!(poll_fn(|context| Poll::Ready(second.as_mut().poll(context))).await.is_pending());
    let third = queued(&locks, LONG).await;
    first.release().await.unwrap();
    let second = second.await.unwrap();
    let (secret, token) = (second.secret_key().to_owned(), second.fencing_token());
    second.release().await.unwrap();
    let third = third.await.unwrap();
    assert!(!was_handed_on(&secret, &third));
    // Both begin near the microseconds of their grants.
    assert!(third.fencing_token() - token > 900_000);
}

async fn a_committed_transaction_prevents_no_hand_off<T: TestDatabase>(database: &T) {
    let locks = locks(database).await;
    database.run("CREATE TABLE counter (n BIGINT)").await;
    database.run("INSERT INTO counter VALUES (0)").await;
    let (mut held, waiting) = held_before(&locks, 3).await;
    for next in waiting {
        let secret = held.secret_key().to_owned();
        let mut transaction = held.begin().await.unwrap();
        T::Database::run(&mut transaction, "UPDATE counter SET n = n + 1").await.unwrap();
        // The transaction keeps the lease.
        held.release().await.unwrap();
        transaction.commit().await.unwrap();
        held = next.await.unwrap();
        assert!(was_handed_on(&secret, &held));
    }
    let transaction = held.begin().await.unwrap();
    held.commit_and_release(transaction).await.unwrap();
    assert_eq!(database.number("SELECT n FROM counter").await, 3);
    assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_some());
}

/// Only its owner knows when it ends. The next holder comes after it.
async fn a_verified_transaction_prevents_a_hand_off<T: TestDatabase>(database: &T) {
    let locks = locks(database).await;
    let mut connection = database.connection().await;
    let (held, mut waiting) = held_before(&locks, 1).await;
    let secret = held.secret_key().to_owned();
    let mut transaction = sqlx::Connection::begin(&mut connection).await.unwrap();
    held.verify_in(&mut transaction).await.unwrap();
    drop(held);
    let mut next = waiting.remove(0);
    assert!(timeout(A_WHILE, &mut next).await.is_err(), "the transaction is open");
    transaction.commit().await.unwrap();
    let next = timeout(PATIENCE, next).await.unwrap().unwrap();
    assert!(!was_handed_on(&secret, &next));
}

/// The previous holder has changed data since the transaction read it, and the row of the lease has
/// not changed in between.
async fn an_older_transaction_is_refused<T: TestDatabase>(database: &T) {
    let locks = locks(database).await;
    let pool = database.pool(2).await;
    database.run("CREATE TABLE counters (n BIGINT)").await;
    if T::NAME == "sqlite" {
        database.run("PRAGMA journal_mode = WAL").await;
    }
    let (held, mut waiting) = held_before(&locks, 1).await;
    let secret = held.secret_key().to_owned();
    let mut older = begin::<T>(&pool, "REPEATABLE READ").await;
    assert_eq!(count::<T>(&mut older).await, 0);
    let mut changing = held.begin().await.unwrap();
    T::Database::run(&mut changing, "INSERT INTO counters VALUES (1)").await.unwrap();
    changing.commit().await.unwrap();
    drop(held);
    let next = timeout(PATIENCE, waiting.remove(0)).await.unwrap().unwrap();
    assert!(was_handed_on(&secret, &next));

    let refused = next.verify_in(&mut older).await.unwrap_err();
    assert!(matches!(refused, Error::Serialization { .. }), "{refused:?}");
    drop(older);
    assert!(next.is_held());
    // Run again, it is a transaction that began under the lease.
    let mut newer = begin::<T>(&pool, "REPEATABLE READ").await;
    assert_eq!(count::<T>(&mut newer).await, 1);
    next.verify_in(&mut newer).await.unwrap();
    newer.commit().await.unwrap();
    next.release().await.unwrap();

    // From now on the database distinguishes one holder from the next, so no transaction is refused
    // without need.
    let (held, mut waiting) = held_before(&locks, 1).await;
    let secret = held.secret_key().to_owned();
    drop(held);
    let next = timeout(PATIENCE, waiting.remove(0)).await.unwrap().unwrap();
    assert!(!was_handed_on(&secret, &next));
}

async fn an_older_transaction_that_sees_each_commit_is_not_refused<T: TestServer>(database: &T) {
    let locks = locks(database).await;
    let pool = database.pool(2).await;
    database.run("CREATE TABLE counters (n BIGINT)").await;
    let (held, mut waiting) = held_before(&locks, 1).await;
    let mut older = begin::<T>(&pool, "READ COMMITTED").await;
    assert_eq!(count::<T>(&mut older).await, 0);
    drop(held);
    let next = timeout(PATIENCE, waiting.remove(0)).await.unwrap().unwrap();
    next.verify_in(&mut older).await.unwrap();
    older.commit().await.unwrap();
}

async fn begin<T: TestDatabase>(
    pool: &sqlx::Pool<T::Database>,
    level: &str,
) -> sqlx::Transaction<'static, T::Database> {
    let begin = match T::NAME {
        "sqlite" => "BEGIN".to_owned(),
        "postgres" => format!("BEGIN ISOLATION LEVEL {level}"),
        _ => format!("SET TRANSACTION ISOLATION LEVEL {level}; START TRANSACTION"),
    };
    pool.begin_with(sqlx::AssertSqlSafe(begin)).await.unwrap()
}

async fn count<T: TestDatabase>(connection: &mut <T::Database as sqlx::Database>::Connection) -> i64 {
    let count = T::Database::find_number(connection, "SELECT COUNT(*) FROM counters").await;
    count.unwrap().expect("a count is there")
}

async fn an_expired_lease_is_not_handed_off<T: TestDatabase>(database: &T) {
    let locks = locks(database).await;
    let ttl = Duration::from_secs(1);
    let first = locks.insert_lock("a").ttl(ttl).acquire().await.unwrap();
    let (second, third) = (queued(&locks, ttl).await, queued(&locks, ttl).await);
    first.release().await.unwrap();
    let second = second.await.unwrap();
    let secret = second.secret_key().to_owned();
    // The lease is taken by force.
    database.run("UPDATE distributed_lock SET secret_key = 'x', expire_time = '1970-01-01 00:00:00'").await;
    timeout(PATIENCE, second.lost()).await.unwrap();
    assert!(matches!(second.release().await, Err(Error::Lost { .. })));
    assert!(!was_handed_on(&secret, &third.await.unwrap()));
}

async fn close_answers_waiters<T: TestDatabase>(database: &T) {
    let locks = locks(database).await;
    let (held, waiting) = held_before(&locks, 3).await;
    locks.close().await;
    for next in waiting {
        assert!(matches!(timeout(PATIENCE, next).await.unwrap(), Err(Error::Closed)));
    }
    assert!(!held.is_held());
    drop(held);
    let elsewhere = database.locks().await;
    assert!(elsewhere.insert_lock("a").try_acquire().await.unwrap().is_some());
}

/// Two processes of eight callers each, for one name.
async fn tokens_grow_across_hand_offs_and_processes<T: TestDatabase>(database: &T) {
    let is_held = Arc::new(AtomicBool::new(false));
    let tokens = Arc::new(Mutex::new(Vec::new()));
    let processes = [database.locks().await, database.locks().await];
    let mut callers = JoinSet::new();
    for caller in 0..16 {
        let locks = processes[caller % 2].clone();
        let (is_held, tokens) = (Arc::clone(&is_held), Arc::clone(&tokens));
        callers.spawn(async move {
            for _ in 0..20 {
                let lease = locks.insert_lock("a").wait(2 * PATIENCE).acquire().await?;
                assert!(!is_held.swap(true, Ordering::SeqCst), "two holders");
                tokens.lock().unwrap().push(lease.fencing_token());
                tokio::task::yield_now().await;
                is_held.store(false, Ordering::SeqCst);
                lease.release().await?;
            }
            Ok(())
        });
    }
    callers.join_all().await.into_iter().collect::<Result<Vec<()>, Error>>().unwrap();
    let tokens = std::mem::take(&mut *tokens.lock().unwrap());
    assert_eq!(tokens.len(), 320);
    assert!(tokens.is_sorted_by(|before, after| before < after), "{tokens:?}");
    // Never ahead of the clock: a row that is created anew begins with the clock's value.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros();
    let in_the_row = database.number("SELECT fencing_token FROM distributed_lock").await;
    assert!(u128::try_from(in_the_row).unwrap() <= now, "{in_the_row} at {now}");
}

async fn a_hand_off_sends_no_message<T: TestServer>(database: &T) {
    drop(database.locks().await);
    let proxy = database.proxy();
    let pool = lock_tests::pool::<T::Database>(&database.url_by(proxy.address()), 2).await;
    let locks = Locks::builder(pool).hand_off(64, LONG).build();
    let (mut held, waiting) = held_before(&locks, 10).await;
    for direction in [Direction::ToServer, Direction::ToClient] {
        proxy.pause(direction);
    }
    for next in waiting {
        held.release().await.unwrap();
        held = timeout(PATIENCE, next).await.unwrap().unwrap();
    }
    for direction in [Direction::ToServer, Direction::ToClient] {
        proxy.resume(direction);
    }
    held.release().await.unwrap();
}

/// It may be carried out later, under the same lease.
async fn a_commit_without_an_answer_prevents_a_hand_off<T: TestServer>(database: &T) {
    drop(database.locks().await);
    let proxy = database.proxy();
    let far = lock_tests::pool::<T::Database>(&database.url_by(proxy.address()), 2).await;
    let locks = Locks::builder(far).hand_off(64, LONG).build();
    let (held, mut waiting) = held_before(&locks, 1).await;
    let secret = held.secret_key().to_owned();
    let transaction = held.begin().await.unwrap();
    proxy.pause(Direction::ToClient);
    let mut committing = Box::pin(transaction.commit());
    assert!(timeout(A_WHILE, &mut committing).await.is_err(), "no answer comes through");
    // Its last handle.
    drop(held);
    proxy.cut();
    assert!(timeout(PATIENCE, committing).await.unwrap().is_err());
    proxy.resume(Direction::ToClient);
    let next = timeout(PATIENCE, waiting.remove(0)).await.unwrap().unwrap();
    assert!(!was_handed_on(&secret, &next));
}
