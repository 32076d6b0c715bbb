//! `at_least`: a job that is through quickly keeps its lock, so that it does not run twice.

use std::time::Duration;

use lock_db::{Error, Lease, LockDatabase, LockInfo, Locks, distributed_lock};
use lock_tests::{Backend, TestDatabase, eventually};

lock_tests::cases! {
    on every database:
    a_job_runs_once,
    a_job_that_fails_keeps_the_lock_too,
    the_time_is_counted_from_the_start,
    the_minimum_hold_time_ends_in_time,
    the_builder_has_at_least_too,
    a_commit_does_not_free_the_lock_early,
    a_lock_that_never_had_a_holder_is_free,
    transactions_have_no_minimum_hold_time,
}

const HOUR: Duration = Duration::from_hours(1);

#[distributed_lock("job", at_least = "1h", skip, locks = locks)]
async fn job<DB: LockDatabase>(locks: &Locks<DB>) -> Result<Option<i64>, Error> {
    Ok(Some(1))
}

/// How much longer than the TTL it is taken: renewed leases are not.
async fn is_kept<DB: LockDatabase>(locks: &Locks<DB>, name: &str) -> bool {
    let LockInfo { held_until, acquired_at, .. } = locks.info(name).await.unwrap().unwrap();
    held_until.is_some_and(|until| (until - acquired_at).num_minutes() >= 59)
}

async fn a_job_runs_once<T: TestDatabase>(database: &T) {
    let (locks, elsewhere) = (database.locks().await, database.locks().await);
    assert_eq!(job(&locks).await.unwrap(), Some(1));
    assert_eq!(job(&elsewhere).await.unwrap(), None);
    assert_eq!(job(&locks).await.unwrap(), None);
    // Not the process keeps it, but the row, which belongs to nobody.
    locks.close().await;
    assert_eq!(job(&elsewhere).await.unwrap(), None);
    assert!(is_kept(&elsewhere, "job").await);
    assert_eq!(database.text("SELECT CONCAT('<', secret_key, '>') FROM distributed_lock").await, "<>");
}

#[distributed_lock("fails", at_least = HOUR, locks = locks, wait = "0s")]
async fn fails<DB: LockDatabase>(locks: &Locks<DB>) -> Result<(), Box<dyn std::error::Error>> {
    Err("on purpose".into())
}

async fn a_job_that_fails_keeps_the_lock_too<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    assert_eq!(fails(&locks).await.unwrap_err().to_string(), "on purpose");
    let second = fails(&locks).await.unwrap_err();
    assert!(matches!(second.downcast_ref(), Some(Error::Timeout { .. })), "{second}");
}

async fn the_time_is_counted_from_the_start<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    // Over long before the release.
    let lease = locks.insert_lock("short").at_least(Duration::from_nanos(1)).acquire().await.unwrap();
    let token = lease.fencing_token();
    lease.release().await.unwrap();
    let lease = locks.insert_lock("short").try_acquire().await.unwrap().expect("it is free");
    assert!(lease.fencing_token() > token);
    lease.release().await.unwrap();
}

async fn the_minimum_hold_time_ends_in_time<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let half_a_second = Duration::from_millis(500);
    let lease = locks.insert_lock("half").at_least(half_a_second).acquire().await.unwrap();
    let first = locks.info("half").await.unwrap().unwrap().acquired_at;
    lease.release().await.unwrap();
    let lease = locks.insert_lock("half").acquire().await.unwrap();
    let second = locks.info("half").await.unwrap().unwrap().acquired_at;
    // By the database's clock, which cuts to milliseconds on SQLite.
    assert!((second - first).num_milliseconds() >= 499, "{first} {second}");
    lease.release().await.unwrap();
}

async fn the_builder_has_at_least_too<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let kept = |name: &str| locks.insert_lock(name).at_least(HOUR);
    kept("acquired").acquire().await.unwrap().release().await.unwrap();
    kept("tried").try_acquire().await.unwrap().unwrap().release().await.unwrap();
    kept("run").run(async |_lease| Ok::<_, Error>(())).await.unwrap();
    drop(kept("dropped").acquire().await.unwrap());
    // The nested call wants it, and the outer one gives the lock back.
    let outer = locks.insert_lock("nested");
    outer.run(async |_lease| kept("nested").run(async |_lease| Ok::<_, Error>(())).await).await.unwrap();
    for name in ["acquired", "tried", "run", "nested"] {
        assert!(is_kept(&locks, name).await, "{name}");
    }
    eventually(Duration::from_secs(5), async || is_kept(&locks, "dropped").await).await;

    let error = locks.insert_lock("a").at_least(HOUR * 24 * 366).acquire().await.unwrap_err();
    assert!(matches!(error, Error::InvalidOption { option: "at_least", .. }), "{error:?}");
}

#[distributed_lock("committed", at_least = "1h", locks = locks, lease = lease)]
async fn commits<DB: Backend>(locks: &Locks<DB>, release: bool) -> Result<(), Error> {
    let lease: &Lease<DB> = lease;
    let mut transaction = lease.begin().await?;
    if release {
        lease.release_in(&mut transaction).await?;
    }
    transaction.commit().await?;
    assert!(lease.is_held());
    Ok(())
}

async fn a_commit_does_not_free_the_lock_early<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    commits(&locks, true).await.unwrap();
    assert!(is_kept(&locks, "committed").await);

    let lease = locks.insert_lock("together").at_least(HOUR).acquire().await.unwrap();
    let transaction = lease.begin().await.unwrap();
    lease.commit_and_release(transaction).await.unwrap();
    assert!(is_kept(&locks, "together").await);
}

async fn a_lock_that_never_had_a_holder_is_free<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let holder = locks.insert_lock("left").acquire().await.unwrap();
    let mut waiting = Box::pin(locks.insert_lock("left").at_least(HOUR).acquire());
    let waited = tokio::time::timeout(Duration::from_millis(20), waiting.as_mut()).await;
    assert!(waited.is_err(), "the lock is held");
    // It is granted to a caller who is not there to take it any more.
    holder.release().await.unwrap();
    drop(waiting);
    locks.insert_lock("left").acquire().await.unwrap().release().await.unwrap();
}

async fn transactions_have_no_minimum_hold_time<T: TestDatabase>(database: &T) {
    let (locks, pool) = (database.locks().await, database.pool(1).await);
    let mut transaction = pool.begin().await.unwrap();
    let error = locks.insert_lock("a").at_least(HOUR).acquire_in(&mut transaction).await.unwrap_err();
    assert!(matches!(error, Error::InvalidOption { option: "at_least", .. }), "{error:?}");
    transaction.rollback().await.unwrap();
}
