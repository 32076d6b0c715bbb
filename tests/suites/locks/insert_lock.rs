//! The insert lock: exclusion, ownership, expiry, renewal, loss, release.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use lock_db::{Error, Locks};
use lock_tests::{Backend, TestDatabase, eventually, migrated};
use tokio::task::JoinSet;

lock_tests::cases! {
    on every database:
    one_holder_among_64_tasks,
    one_holder_among_several_locks,
    tasks_of_one_process_take_turns_in_order,
    fencing_tokens_only_grow,
    the_secret_is_128_bits_and_new_each_time,
    the_row_says_who_holds_it,
    a_wait_ends_in_time,
    try_acquire_never_waits,
    bad_input_is_refused_before_any_sql,
    a_lease_outlives_its_ttl_while_it_is_held,
    an_expired_lease_is_taken_over,
    another_process_neither_releases_nor_renews,
    a_late_release_affects_no_other_holder,
    loss_is_final,
    a_row_deleted_by_hand_is_a_loss,
    a_released_row_is_not_renewed_back_to_life,
    dropping_a_lease_releases_it,
    reentering_counts_holds,
    run_releases_after_success_failure_and_panic,
    run_stops_when_the_lock_is_lost,
    close_releases_leases_and_refuses_requests,
    the_other_kind_of_lock_is_refused,
    a_granted_lock_is_in_the_table,
}

const SECOND: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(20);

/// A second `Locks` with connections of its own, as another process would have.
async fn other<T: TestDatabase>(database: &T) -> Locks<T::Database> {
    Locks::new(database.pool(2).await)
}

async fn one_holder_among_64_tasks<T: TestDatabase>(database: &T) {
    contend(vec![database.locks().await], 64, 4).await;
}

async fn one_holder_among_several_locks<T: TestDatabase>(database: &T) {
    let first = database.locks().await;
    contend(vec![first, other(database).await, other(database).await, other(database).await], 16, 8).await;
}

async fn contend<DB: lock_db::LockDatabase>(locks: Vec<Locks<DB>>, tasks: usize, rounds: usize) {
    let inside = Arc::new(AtomicUsize::new(0));
    let last_token = Arc::new(AtomicI64::new(0));
    let mut contending = JoinSet::new();
    for task in 0..tasks {
        let locks = locks[task % locks.len()].clone();
        let (inside, last_token) = (Arc::clone(&inside), Arc::clone(&last_token));
        contending.spawn(async move {
            for _ in 0..rounds {
                let lease = locks.insert_lock("hot").wait(Duration::from_secs(120)).acquire().await.unwrap();
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two holders");
                let before = last_token.swap(lease.fencing_token(), Ordering::SeqCst);
                assert!(before < lease.fencing_token(), "a token did not grow");
                tokio::task::yield_now().await;
                inside.fetch_sub(1, Ordering::SeqCst);
                lease.release().await.unwrap();
            }
        });
    }
    while let Some(task) = contending.join_next().await {
        task.unwrap();
    }
}

async fn tasks_of_one_process_take_turns_in_order<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let held = locks.insert_lock("a").acquire().await.unwrap();
    let order = Arc::new(AtomicUsize::new(0));
    let mut waiting = JoinSet::new();
    for place in 0..8 {
        let mut acquire = Box::pin(locks.insert_lock("a").wait(PATIENCE).acquire());
        // After one poll it is in the queue.
        assert!(poll_once(&mut acquire).await.is_none());
        let order = Arc::clone(&order);
        waiting.spawn(async move {
            let lease = acquire.await.unwrap();
            assert_eq!(order.fetch_add(1, Ordering::SeqCst), place);
            lease.release().await.unwrap();
        });
    }
    held.release().await.unwrap();
    while let Some(task) = waiting.join_next().await {
        task.unwrap();
    }
}

/// Polls once.
async fn poll_once<F: Future + Unpin>(future: &mut F) -> Option<F::Output> {
    std::future::poll_fn(|context| {
        std::task::Poll::Ready(match std::pin::Pin::new(&mut *future).poll(context) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        })
    })
    .await
}

async fn fencing_tokens_only_grow<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let mut last = 0;
    for round in 0..20 {
        let locks = if round % 2 == 0 { &locks } else { &other };
        let lease = locks.insert_lock("a").acquire().await.unwrap();
        assert!(lease.fencing_token() > last);
        last = lease.fencing_token();
        lease.release().await.unwrap();
        if round % 5 == 4 {
            // Tokens don't go back when rows have been deleted.
            assert_eq!(database.run("DELETE FROM distributed_lock WHERE lock_name = 'a'").await, 1);
        }
    }
}

async fn the_secret_is_128_bits_and_new_each_time<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let first = locks.insert_lock("a").acquire().await.unwrap();
    let secret = first.secret_key().to_owned();
    assert_eq!(secret.len(), 32);
    assert_eq!(database.text("SELECT secret_key FROM distributed_lock WHERE lock_name = 'a'").await, secret);
    assert!(!format!("{first:?}").contains(&secret), "the secret belongs in no log");
    first.release().await.unwrap();
    let second = locks.insert_lock("a").acquire().await.unwrap();
    assert_ne!(second.secret_key(), secret);
}

async fn the_row_says_who_holds_it<T: TestDatabase>(database: &T) {
    let locks = Locks::builder(database.pool(2).await).label("billing").build();
    locks.migrate().await.unwrap();
    assert_eq!(locks.info("a").await.unwrap(), None);
    let lease = locks.insert_lock("a").ttl(Duration::from_mins(1)).acquire().await.unwrap();
    let info = locks.info("a").await.unwrap().unwrap();
    assert_eq!(info.fencing_token, lease.fencing_token());
    assert!(info.owner.ends_with("/billing"), "{}", info.owner);
    assert!(info.owner.contains(&std::process::id().to_string()), "{}", info.owner);
    let left = info.held_until.unwrap() - info.acquired_at;
    assert!((59..=61).contains(&left.num_seconds()), "{left}");

    let Err(Error::Timeout { held_by, .. }) =
        other(database).await.insert_lock("a").wait(Duration::from_millis(50)).acquire().await
    else {
        panic!("it is held")
    };
    assert_eq!(held_by.unwrap().owner, info.owner);

    lease.release().await.unwrap();
    let info = locks.info("a").await.unwrap().unwrap();
    assert_eq!(info.held_until, None, "free");
}

async fn a_wait_ends_in_time<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let _held = locks.insert_lock("a").acquire().await.unwrap();
    // The first answer of a database may take longer than the wait.
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_none());
    // Behind another process, behind our own, and behind a queue.
    for locks in [&other, &locks] {
        let started = Instant::now();
        let error = locks.insert_lock("a").wait(Duration::from_millis(300)).acquire().await.unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
        assert!(error.is_retryable());
        assert_eq!(error.name(), Some("a"));
        assert!(started.elapsed() >= Duration::from_millis(300));
        assert!(started.elapsed() < PATIENCE);
    }
    let error = other.insert_lock("a").wait(Duration::ZERO).acquire().await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    // If the lock is free, a wait of zero is enough.
    other.insert_lock("b").wait(Duration::ZERO).acquire().await.unwrap().release().await.unwrap();
}

async fn try_acquire_never_waits<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let held = locks.insert_lock("a").try_acquire().await.unwrap().expect("it is free");
    assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_none());
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_none());
    held.release().await.unwrap();
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
}

async fn bad_input_is_refused_before_any_sql<T: TestDatabase>(database: &T) {
    // There is no table: a request that reached the database would get SchemaMissing.
    let locks = Locks::new(database.pool(2).await);
    for name in ["", "a\0b", &"x".repeat(256), &"é".repeat(128)] {
        let error = locks.insert_lock(name).acquire().await.unwrap_err();
        assert!(matches!(error, Error::InvalidName { .. }), "{error:?}");
        let error = locks.insert_lock(name).try_acquire().await.unwrap_err();
        assert!(matches!(error, Error::InvalidName { .. }), "{error:?}");
        let error = locks.row_lock(name).acquire().await.unwrap_err();
        assert!(matches!(error, Error::InvalidName { .. }), "{error:?}");
    }
    for ttl in [Duration::ZERO, Duration::from_millis(1), Duration::MAX] {
        let error = locks.insert_lock("a").ttl(ttl).acquire().await.unwrap_err();
        assert!(matches!(error, Error::InvalidOption { .. }), "{error:?}");
    }
    let error = locks.insert_lock("a").wait(Duration::MAX).acquire().await.unwrap_err();
    assert!(matches!(error, Error::InvalidOption { .. }), "{error:?}");
    let error = locks.row_lock("a").wait(Duration::MAX).acquire().await.unwrap_err();
    assert!(matches!(error, Error::InvalidOption { .. }), "{error:?}");
    let locks = Locks::builder(database.pool(2).await).default_ttl(Duration::ZERO).build();
    let error = locks.insert_lock("a").acquire().await.unwrap_err();
    assert!(matches!(error, Error::InvalidOption { .. }), "{error:?}");
}

async fn a_lease_outlives_its_ttl_while_it_is_held<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    // Long enough for a busy machine to renew it.
    let lease = locks.insert_lock("a").ttl(2 * SECOND).acquire().await.unwrap();
    let error = other.insert_lock("a").wait(4 * SECOND).acquire().await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    assert!(lease.is_held());
    lease.release().await.unwrap();
}

/// A lease that is not renewed, as a killed process leaves it.
async fn abandoned<T: TestDatabase>(database: &T, name: &str, ttl: Duration) {
    let locks = other(database).await;
    locks.insert_lock(name).ttl(ttl).acquire().await.unwrap().release().await.unwrap();
    locks.close().await;
    let (quoted, millis) = (name.replace('\'', "''"), ttl.as_millis());
    let deadline = match T::NAME {
        "postgres" => format!("clock_timestamp() + interval '{millis} milliseconds'"),
        "sqlite" => format!(
            "strftime('%Y-%m-%d %H:%M:%f000', 'now', '+{}.{:03} seconds')",
            millis / 1000,
            millis % 1000
        ),
        _ => format!("UTC_TIMESTAMP(6) + INTERVAL {} MICROSECOND", millis * 1000),
    };
    database
        .run(&format!(
            "UPDATE distributed_lock SET expire_time = {deadline}, secret_key = 'of the dead' WHERE lock_name = '{quoted}'"
        ))
        .await;
}

async fn an_expired_lease_is_taken_over<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    abandoned(database, "a", 2 * SECOND).await;
    assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_none());
    let started = Instant::now();
    let lease = locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap();
    assert!(started.elapsed() < 4 * SECOND, "free within its TTL: {:?}", started.elapsed());
    lease.release().await.unwrap();
}

const TAKE_OVER: &str =
    "UPDATE distributed_lock SET secret_key = 'somebody else', fencing_token = fencing_token + 1
    WHERE lock_name = 'a'";

async fn another_process_neither_releases_nor_renews<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let lease = locks.insert_lock("a").ttl(SECOND).acquire().await.unwrap();
    // Another holder has it from here on, as after a pause that was too long.
    assert_eq!(database.run(TAKE_OVER).await, 1);
    let deadline = "SELECT CAST(expire_time AS CHAR(40)) FROM distributed_lock WHERE lock_name = 'a'";
    let before = database.text(deadline).await;
    lease.lost().await;
    assert!(!lease.is_held());
    let error = lease.release().await.unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error:?}");
    assert_eq!(database.text(deadline).await, before, "neither renewed nor released");
    assert_eq!(
        database.text("SELECT secret_key FROM distributed_lock WHERE lock_name = 'a'").await,
        "somebody else"
    );
}

async fn a_late_release_affects_no_other_holder<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let lease = locks.insert_lock("a").acquire().await.unwrap();
    assert_eq!(database.run(TAKE_OVER).await, 1);
    // Before the watchdog has noticed: the database reports it.
    assert!(lease.is_held());
    let error = lease.release().await.unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error:?}");
    assert!(!error.is_retryable());
    assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_none(), "still somebody else's");
}

async fn loss_is_final<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let lease = locks.insert_lock("a").ttl(SECOND).acquire().await.unwrap();
    let secret = lease.secret_key().to_owned();
    assert_eq!(database.run(TAKE_OVER).await, 1);
    lease.lost().await;
    // Even if the row comes back.
    database.run(&format!("UPDATE distributed_lock SET secret_key = '{secret}' WHERE lock_name = 'a'")).await;
    lease.lost().await;
    assert!(!lease.is_held());
    assert!(matches!(lease.reenter(), Err(Error::Lost { .. })));
    assert!(matches!(lease.release().await, Err(Error::Lost { .. })));
}

async fn a_row_deleted_by_hand_is_a_loss<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let lease = locks.insert_lock("a").ttl(SECOND).acquire().await.unwrap();
    database.run("DELETE FROM distributed_lock").await;
    lease.lost().await;
    let next = locks.insert_lock("a").acquire().await.unwrap();
    assert!(next.fencing_token() > lease.fencing_token());
}

async fn a_released_row_is_not_renewed_back_to_life<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    for _ in 0..30 {
        // The shortest interval, so that releases coincide with renewals.
        let lease = locks.insert_lock("a").ttl(Duration::from_millis(90)).acquire().await.unwrap();
        let due = Instant::now() + Duration::from_millis(30);
        while Instant::now() < due {
            tokio::task::yield_now().await;
        }
        let _ = lease.release().await;
        let next = other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap();
        next.release().await.unwrap();
    }
}

async fn dropping_a_lease_releases_it<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let lease = locks.insert_lock("a").ttl(Duration::from_mins(10)).acquire().await.unwrap();
    // Outside of any runtime, too.
    std::thread::spawn(move || drop(lease)).join().unwrap();
    other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
}

async fn reentering_counts_holds<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let lease = locks.insert_lock("a").acquire().await.unwrap();
    assert_eq!(lease.hold_count(), 1);
    let inner = lease.reenter().unwrap();
    assert_eq!((lease.hold_count(), inner.hold_count()), (2, 2));
    assert_eq!(inner.fencing_token(), lease.fencing_token());
    drop(inner);
    assert_eq!(lease.hold_count(), 1);
    let inner = lease.reenter().unwrap();
    lease.release().await.unwrap();
    assert!(inner.is_held());
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_none(), "the inner one still holds it");
    inner.release().await.unwrap();
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
}

async fn run_releases_after_success_failure_and_panic<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let is_free = async || {
        eventually(PATIENCE, async || other.insert_lock("a").try_acquire().await.unwrap().is_some()).await;
    };
    let done = locks
        .insert_lock("a")
        .run(async |lease| {
            assert!(lease.is_held());
            assert!(other.insert_lock("a").try_acquire().await?.is_none());
            Ok::<_, Error>(7)
        })
        .await
        .unwrap();
    assert_eq!(done, 7);
    is_free().await;

    let failed =
        locks.insert_lock("a").run(async |_| Err::<(), _>(Box::<dyn std::error::Error>::from("no"))).await;
    assert_eq!(failed.unwrap_err().to_string(), "no");
    is_free().await;

    let task_locks = locks.clone();
    let panicked = tokio::spawn(async move {
        task_locks.insert_lock("a").run(async |_| -> Result<(), Error> { panic!("on purpose") }).await
    });
    assert!(panicked.await.unwrap_err().is_panic());
    is_free().await;
}

async fn run_stops_when_the_lock_is_lost<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let ran = locks
        .insert_lock("a")
        .ttl(SECOND)
        .run(async |_| {
            database.run(TAKE_OVER).await;
            std::future::pending::<()>().await;
            Ok::<_, Error>(())
        })
        .await;
    assert!(matches!(ran, Err(Error::Lost { .. })), "{ran:?}");
}

async fn close_releases_leases_and_refuses_requests<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let lease = locks.insert_lock("a").acquire().await.unwrap();
    let waiting = tokio::spawn(locks.insert_lock("a").wait(PATIENCE).acquire());
    eventually(PATIENCE, async || other.insert_lock("a").try_acquire().await.unwrap().is_none()).await;
    locks.close().await;
    lease.lost().await;
    assert!(!lease.is_held());
    assert!(matches!(waiting.await.unwrap(), Err(Error::Closed)));
    assert!(matches!(lease.release().await, Err(Error::Lost { .. })));
    assert!(matches!(locks.insert_lock("a").acquire().await, Err(Error::Closed)));
    assert!(matches!(locks.insert_lock("a").try_acquire().await, Err(Error::Closed)));
    assert!(matches!(locks.row_lock("b").acquire().await, Err(Error::Closed)));
    assert!(matches!(locks.check().await, Err(Error::Closed)));
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some(), "it was released");
    locks.close().await;
}

async fn the_other_kind_of_lock_is_refused<T: TestDatabase>(database: &T) {
    let locks = migrated(Locks::new(database.pool(4).await)).await;
    let lease = locks.insert_lock("lease").acquire().await.unwrap();
    locks.row_lock("row").acquire().await.unwrap().commit().await.unwrap();
    let error = locks.row_lock("lease").wait(Duration::ZERO).acquire().await.unwrap_err();
    assert!(matches!(error, Error::WrongKind { .. }), "{error:?}");
    let error = locks.insert_lock("row").wait(Duration::ZERO).acquire().await.unwrap_err();
    assert!(matches!(error, Error::WrongKind { .. }), "{error:?}");
    let error = locks.insert_lock("row").try_acquire().await.unwrap_err();
    assert!(matches!(error, Error::WrongKind { .. }), "{error:?}");
    lease.release().await.unwrap();
}

/// A reader holds off a commit on SQLite: a grant that could not be committed was not given.
async fn a_granted_lock_is_in_the_table<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    let mut reader = database.pool(1).await.begin().await.unwrap();
    T::Database::find_number(&mut reader, "SELECT COUNT(*) FROM distributed_lock").await.unwrap();
    let mut waiting = Box::pin(locks.insert_lock("a").ttl(Duration::from_mins(1)).acquire());
    // On SQLite the commit fails in the meantime; elsewhere the lock is granted.
    let early = tokio::time::timeout(Duration::from_secs(1), &mut waiting).await;
    assert_eq!(early.is_err(), T::NAME == "sqlite");
    reader.rollback().await.unwrap();
    let lease = match early {
        Ok(lease) => lease.unwrap(),
        Err(_) => waiting.await.unwrap(),
    };
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_none(), "two holders");
    lease.release().await.unwrap();
}
