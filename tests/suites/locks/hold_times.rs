//! How long a holder may have a lease, and what happens to a holder that keeps it for too long.

use std::time::{Duration, Instant};

use lock_db::{Error, Locks, Loss};
use lock_tests::{Backend, Direction, TestDatabase, TestServer, eventually};

lock_tests::cases! {
    on every database:
    work_that_hangs_is_stopped_and_the_lock_is_free,
    a_guard_that_is_never_dropped_is_taken_back,
    a_grant_that_is_never_polled_is_taken_back,
    each_holder_after_a_hand_off_has_its_own_hold_time,
    the_next_caller_of_the_process_gets_the_lock_next,
    a_guarded_transaction_does_not_outlive_the_hold_time,
    a_verified_transaction_keeps_the_lock_until_its_end,
    a_nested_call_shares_the_hold_time_of_its_holder,
    several_leases_are_taken_back,
    an_impossible_hold_time_is_refused_before_any_sql;

    on every server:
    the_holder_is_told_in_time_during_an_outage,
}

const MINUTE: Duration = Duration::from_mins(1);
const PATIENCE: Duration = Duration::from_secs(20);
const AT_MOST: Duration = Duration::from_millis(500);

/// A second `Locks` with connections of its own, as another process would have.
async fn other<T: TestDatabase>(database: &T) -> Locks<T::Database> {
    Locks::new(database.pool(2).await)
}

fn is_held_too_long<V>(result: &Result<V, Error>) -> bool {
    matches!(result, Err(Error::Lost { reason: Loss::HeldTooLong, .. }))
}

/// Polls once.
async fn is_pending<F: Future + Unpin>(future: &mut F) -> bool {
    std::future::poll_fn(|context| {
        std::task::Poll::Ready(std::pin::Pin::new(&mut *future).poll(context).is_pending())
    })
    .await
}

async fn work_that_hangs_is_stopped_and_the_lock_is_free<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let started = Instant::now();
    let request = locks.insert_lock("a").ttl(MINUTE).at_most(AT_MOST);
    let ran = request
        .run(async |_| {
            std::future::pending::<()>().await;
            Ok::<_, Error>(())
        })
        .await;
    assert!(is_held_too_long(&ran), "{ran:?}");
    assert!(ran.unwrap_err().to_string().contains("`at_most`"));
    assert!(started.elapsed() >= AT_MOST);
    // Long before its TTL is over.
    other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
}

async fn a_guard_that_is_never_dropped_is_taken_back<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let forgotten = locks.insert_lock("a").ttl(MINUTE).at_most(AT_MOST).acquire().await.unwrap();
    let token = forgotten.fencing_token();
    let lost = forgotten.reenter().unwrap();
    std::mem::forget(forgotten);
    lost.lost().await;
    assert!(!lost.is_held());
    let lease = other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap();
    assert!(lease.fencing_token() > token);
    let released = lost.release().await;
    assert!(is_held_too_long(&released), "{released:?}");
    assert!(lease.is_held());
    lease.release().await.unwrap();
}

/// In a `select!` that polls something else, for example.
async fn a_grant_that_is_never_polled_is_taken_back<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let first = locks.insert_lock("a").ttl(MINUTE).acquire().await.unwrap();
    let request = locks.insert_lock("a").ttl(MINUTE).at_most(AT_MOST).wait(PATIENCE);
    let mut second = Box::pin(request.acquire());
    // After one poll it is in the queue.
    assert!(is_pending(&mut second).await);
    first.release().await.unwrap();
    other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    let second = second.await.unwrap();
    assert!(!second.is_held());
}

async fn each_holder_after_a_hand_off_has_its_own_hold_time<T: TestDatabase>(database: &T) {
    const HOLDERS: u32 = 6;
    let locks = Locks::builder(database.pool(2).await).hand_off(64, MINUTE).build();
    locks.migrate().await.unwrap();
    let request = |at_most: Option<Duration>| {
        let request = locks.insert_lock("a").ttl(MINUTE).wait(PATIENCE);
        at_most.map_or(request.clone(), |at_most| request.at_most(at_most))
    };
    let first = request(Some(4 * AT_MOST)).acquire().await.unwrap();
    let mut waiting = Vec::new();
    for holder in 0..HOLDERS {
        let at_most = (holder + 1 < HOLDERS).then_some(4 * AT_MOST);
        let mut next = Box::pin(request(at_most).acquire());
        assert!(is_pending(&mut next).await);
        waiting.push(next);
    }
    first.release().await.unwrap();
    let started = Instant::now();
    for next in waiting {
        let lease = next.await.unwrap();
        // Together longer than each of them may. The last one alone has no limit.
        let lost = tokio::time::timeout(AT_MOST, lease.lost()).await;
        assert!(lost.is_err(), "after {:?}", started.elapsed());
        if started.elapsed() > HOLDERS * AT_MOST {
            let lost = tokio::time::timeout(5 * AT_MOST, lease.lost()).await;
            assert!(lost.is_err(), "it has no limit");
        }
        lease.release().await.unwrap();
    }
}

async fn the_next_caller_of_the_process_gets_the_lock_next<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let request = locks.insert_lock("a").ttl(MINUTE).at_most(AT_MOST).wait(PATIENCE);
    let hangs = request.clone().acquire().await.unwrap();
    let next = request.acquire().await.unwrap();
    assert!(!hangs.is_held());
    assert!(next.fencing_token() > hangs.fencing_token());
    // The end of the previous lease does not affect the next one.
    drop(hangs);
    next.release().await.unwrap();
}

async fn a_guarded_transaction_does_not_outlive_the_hold_time<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    database.run("CREATE TABLE work (n INTEGER)").await;
    let lease = locks.insert_lock("a").ttl(MINUTE).at_most(AT_MOST).acquire().await.unwrap();
    let mut transaction = lease.begin().await.unwrap();
    T::Database::run(&mut transaction, "INSERT INTO work VALUES (1)").await.unwrap();
    lease.lost().await;
    if T::NAME == "sqlite" {
        // The transaction itself keeps all others from the lock.
        transaction.commit().await.unwrap();
        assert_eq!(database.number("SELECT COUNT(*) FROM work").await, 1);
        return;
    }
    eventually(PATIENCE, async || locks.info("a").await.unwrap().unwrap().held_until.is_none()).await;
    let committed = transaction.commit().await;
    assert!(is_held_too_long(&committed), "{committed:?}");
    let begun = lease.begin().await.map(drop);
    assert!(is_held_too_long(&begun), "{begun:?}");
    assert_eq!(database.number("SELECT COUNT(*) FROM work").await, 0);
}

/// No other process has the lock before the end of the transaction that was verified under it.
async fn a_verified_transaction_keeps_the_lock_until_its_end<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    database.run("CREATE TABLE work (n INTEGER)").await;
    let pool = database.pool(1).await;
    let lease = locks.insert_lock("a").ttl(MINUTE).at_most(4 * AT_MOST).acquire().await.unwrap();
    let mut transaction = pool.begin().await.unwrap();
    T::Database::run(&mut transaction, "INSERT INTO work VALUES (1)").await.unwrap();
    lease.verify_in(&mut transaction).await.unwrap();
    lease.lost().await;
    assert!(!matches!(other.insert_lock("a").try_acquire().await, Ok(Some(_))), "it is not over");
    transaction.commit().await.unwrap();
    other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    assert_eq!(database.number("SELECT COUNT(*) FROM work").await, 1);
}

async fn a_nested_call_shares_the_hold_time_of_its_holder<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let ran = locks
        .insert_lock("a")
        .ttl(MINUTE)
        .at_most(4 * AT_MOST)
        .run(async |outer| {
            let nested = locks.insert_lock("a").at_most(AT_MOST);
            let slow = async |_: &lock_db::Lease<T::Database>| {
                tokio::time::sleep(2 * AT_MOST).await;
                Ok::<_, Error>(())
            };
            nested.run(slow).await?;
            assert!(outer.is_held());
            let hangs = async |_: &lock_db::Lease<T::Database>| {
                std::future::pending::<()>().await;
                Ok::<_, Error>(())
            };
            locks.insert_lock("a").run(hangs).await
        })
        .await;
    assert!(is_held_too_long(&ran), "{ran:?}");
}

async fn several_leases_are_taken_back<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let leases = locks.insert_locks(["a", "b"]).ttl(MINUTE).at_most(AT_MOST).acquire().await.unwrap();
    leases.lost().await;
    assert!(!leases.is_held());
    let taken = other.insert_locks(["a", "b"]).wait(PATIENCE).acquire().await.unwrap();
    let released = leases.release().await;
    assert!(is_held_too_long(&released), "{released:?}");
    assert!(taken.is_held());
}

async fn an_impossible_hold_time_is_refused_before_any_sql<T: TestDatabase>(database: &T) {
    // There is no table: a request that reached the database would get SchemaMissing.
    let pool = database.pool(2).await;
    let locks = Locks::new(pool.clone());
    let is_refused = |result: Result<(), Error>| {
        assert!(matches!(result, Err(Error::InvalidOption { option: "at_most", .. })), "{result:?}");
    };
    for at_most in [Duration::ZERO, Duration::from_millis(49), Duration::MAX] {
        let request = || locks.insert_lock("a").at_most(at_most);
        is_refused(request().acquire().await.map(drop));
        is_refused(request().try_acquire().await.map(drop));
        is_refused(request().run(async |_| Ok::<_, Error>(())).await);
        is_refused(locks.insert_locks(["a"]).at_most(at_most).acquire().await.map(drop));
    }
    let request = locks.insert_lock("a").at_most(AT_MOST).at_least(2 * AT_MOST);
    is_refused(request.clone().acquire().await.map(drop));
    is_refused(request.run(async |_| Ok::<_, Error>(())).await);
    // The caller's transaction ends such a lock.
    let mut transaction = pool.begin().await.unwrap();
    is_refused(locks.insert_lock("a").at_most(MINUTE).acquire_in(&mut transaction).await.map(drop));
    is_refused(locks.insert_locks(["a"]).at_most(MINUTE).acquire_in(&mut transaction).await.map(drop));
}

async fn the_holder_is_told_in_time_during_an_outage<T: TestServer>(database: &T) {
    const TTL: Duration = Duration::from_secs(4);
    drop(database.locks().await);
    let proxy = database.proxy();
    let locks: Locks<T::Database> =
        Locks::new(sqlx::Pool::connect(&database.url_by(proxy.address())).await.unwrap());
    let other = other(database).await;
    let lease = locks.insert_lock("a").ttl(TTL).at_most(AT_MOST).acquire().await.unwrap();
    let started = Instant::now();
    proxy.pause(Direction::ToServer);
    lease.lost().await;
    assert!(started.elapsed() < TTL, "told by its own clock, {:?}", started.elapsed());
    // The row keeps the lease for as long as it was granted, plus the notice, and no longer.
    let lease = other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap();
    assert!(started.elapsed() < AT_MOST + 2 * TTL, "{:?}", started.elapsed());
    lease.release().await.unwrap();
}
