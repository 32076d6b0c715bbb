//! Insert locks in the caller's transaction, and several locks at once.

use std::time::{Duration, Instant};

use lock_db::{Error, Locks};
use lock_tests::{Backend, TestDatabase, eventually};
use tokio::task::JoinSet;

lock_tests::cases! {
    on every database:
    the_transaction_owns_the_insert_lock,
    rollback_and_death_free_the_lock_too,
    a_lease_keeps_transactions_out_and_is_not_disturbed,
    a_waiting_transaction_gets_the_lock_after_the_lease,
    contenders_with_and_without_transaction_never_overlap,
    one_connection_is_enough,
    a_takeover_by_a_transaction_ends_the_old_lease,
    taking_a_lock_again_counts,
    several_names_in_one_order_never_deadlock,
    several_leases_are_all_or_none,
    several_leases_are_released_together,
    no_names_are_refused,
}

const PATIENCE: Duration = Duration::from_secs(20);
const MOMENT: Duration = Duration::from_millis(300);

async fn other<T: TestDatabase>(database: &T) -> Locks<T::Database> {
    Locks::new(database.pool(2).await)
}

async fn the_transaction_owns_the_insert_lock<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let pool = database.pool(2).await;
    let mut last = 0;
    for _ in 0..3 {
        let mut transaction = pool.begin().await.unwrap();
        let held = locks.insert_lock("a").acquire_in(&mut transaction).await.unwrap();
        assert_eq!((held.name(), held.hold_count()), ("a", 1));
        let tried = other.insert_lock("a").try_acquire().await;
        let error = other.insert_lock("a").wait(MOMENT).acquire().await.unwrap_err();
        if T::NAME == "sqlite" {
            // The lock may be held by any writer.
            assert!(tried.unwrap_err().is_retryable());
            assert!(
                error.is_retryable()
                    && matches!(
                        error,
                        Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. }
                    ),
                "{error:?}"
            );
        } else {
            assert!(tried.unwrap().is_none());
            assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
        }
        transaction.commit().await.unwrap();
        let lease = other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap();
        assert!(lease.fencing_token() > last);
        last = lease.fencing_token();
        lease.release().await.unwrap();
    }
}

async fn rollback_and_death_free_the_lock_too<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let pool = database.pool(2).await;
    let mut transaction = pool.begin().await.unwrap();
    locks.insert_lock("a").acquire_in(&mut transaction).await.unwrap();
    transaction.rollback().await.unwrap();
    other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();

    let mut transaction = pool.begin().await.unwrap();
    locks.insert_lock("a").acquire_in(&mut transaction).await.unwrap();
    drop(transaction);
    other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
}

async fn a_lease_keeps_transactions_out_and_is_not_disturbed<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let pool = database.pool(2).await;
    let lease = locks.insert_lock("a").ttl(Duration::from_secs(2)).acquire().await.unwrap();
    let mut transaction = pool.begin().await.unwrap();
    assert!(other.insert_lock("a").try_acquire_in(&mut transaction).await.unwrap().is_none());
    // Longer than the TTL: the lease is still renewed, whatever the transaction has done.
    let wait = Duration::from_secs(4);
    let error = other.insert_lock("a").wait(wait).acquire_in(&mut transaction).await.unwrap_err();
    let Error::Timeout { held_by, .. } = error else { panic!("{error:?}") };
    assert_eq!(held_by.unwrap().fencing_token, lease.fencing_token());
    assert!(lease.is_held());
    lease.release().await.unwrap();
    // And the transaction is as usable as before.
    other.insert_lock("a").wait(PATIENCE).acquire_in(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
}

async fn a_waiting_transaction_gets_the_lock_after_the_lease<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let lease = locks.insert_lock("a").acquire().await.unwrap();
    let mut transaction = database.pool(1).await.begin().await.unwrap();
    let started = Instant::now();
    let (taken, released) =
        tokio::join!(other.insert_lock("a").wait(PATIENCE).acquire_in(&mut transaction), async {
            // The request begins to wait before the release.
            tokio::task::yield_now().await;
            lease.release().await
        });
    taken.unwrap();
    released.unwrap();
    assert!(started.elapsed() < PATIENCE);
    transaction.commit().await.unwrap();
}

async fn contenders_with_and_without_transaction_never_overlap<T: TestDatabase>(database: &T) {
    database.run("CREATE TABLE counter (id BIGINT PRIMARY KEY, n BIGINT)").await;
    database.run("INSERT INTO counter VALUES (1, 0)").await;
    let pool = database.pool(8).await;
    let mut contending = JoinSet::new();
    let locks = database.locks().await;
    for task in 0..8 {
        let (locks, pool) = (locks.clone(), pool.clone());
        contending.spawn(async move {
            for _ in 0..4 {
                let lock = locks.insert_lock("a").wait(PATIENCE * 6);
                if task % 2 == 0 {
                    let lease = lock.acquire().await.unwrap();
                    let mut transaction = lease.begin().await.unwrap();
                    increment::<T::Database>(&mut transaction).await;
                    transaction.commit().await.unwrap();
                    lease.release().await.unwrap();
                } else {
                    loop {
                        let mut transaction = pool.begin().await.unwrap();
                        match lock.clone().acquire_in(&mut transaction).await {
                            Ok(_) => {
                                increment::<T::Database>(&mut transaction).await;
                                break transaction.commit().await.unwrap();
                            }
                            // Another caller took it between the read and the lock.
                            Err(error) => assert!(matches!(error, Error::Serialization { .. }), "{error:?}"),
                        }
                        transaction.rollback().await.unwrap();
                    }
                }
            }
        });
    }
    while let Some(task) = contending.join_next().await {
        task.unwrap();
    }
    assert_eq!(database.number("SELECT n FROM counter").await, 32);
}

async fn increment<DB: Backend>(connection: &mut DB::Connection) {
    let n = DB::find_number(connection, "SELECT n FROM counter WHERE id = 1").await.unwrap().unwrap();
    tokio::task::yield_now().await;
    DB::run(connection, &format!("UPDATE counter SET n = {} WHERE id = 1", n + 1)).await.unwrap();
}

async fn one_connection_is_enough<T: TestDatabase>(database: &T) {
    let pool = database.pool(1).await;
    let locks = Locks::new(pool.clone());
    locks.migrate().await.unwrap();
    for _ in 0..3 {
        let mut transaction = pool.begin().await.unwrap();
        locks.insert_lock("a").wait(PATIENCE).acquire_in(&mut transaction).await.unwrap();
        locks.row_locks(["b", "c"]).wait(PATIENCE).acquire_in(&mut transaction).await.unwrap();
        transaction.commit().await.unwrap();
    }
}

/// The lease has expired, but its holder was not given notice.
async fn a_takeover_by_a_transaction_ends_the_old_lease<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let lease = locks.insert_lock("a").ttl(Duration::from_mins(10)).acquire().await.unwrap();
    database
        .run("UPDATE distributed_lock SET expire_time = '2001-01-01 00:00:00' WHERE lock_name = 'a'")
        .await;
    let mut transaction = database.pool(1).await.begin().await.unwrap();
    other.insert_lock("a").wait(PATIENCE).acquire_in(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
    let guarded = lease.begin().await.unwrap();
    assert!(matches!(guarded.commit().await, Err(Error::Lost { .. })));
    assert!(matches!(lease.release().await, Err(Error::Lost { .. })));
}

async fn taking_a_lock_again_counts<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let pool = database.pool(1).await;
    for _ in 0..2 {
        let mut transaction = pool.begin().await.unwrap();
        for count in 1..=3 {
            let held = locks.insert_lock("a").wait(MOMENT).acquire_in(&mut transaction).await.unwrap();
            assert_eq!(held.hold_count(), count);
            let held = locks.row_lock("b").wait(MOMENT).acquire_in(&mut transaction).await.unwrap();
            assert_eq!(held.hold_count(), count);
        }
        transaction.commit().await.unwrap();
        let mut transaction = pool.begin().await.unwrap();
        let held = locks.row_lock("b").wait(MOMENT).try_acquire_in(&mut transaction).await.unwrap();
        assert_eq!(held.unwrap().hold_count(), 1);
        transaction.rollback().await.unwrap();
    }
}

async fn several_names_in_one_order_never_deadlock<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let pool = database.pool(8).await;
    let mut contending = JoinSet::new();
    for task in 0..8 {
        let (locks, pool) = (locks.clone(), pool.clone());
        contending.spawn(async move {
            for _ in 0..4 {
                let mut names = ["a", "b", "c", "b"];
                if task % 2 == 0 {
                    names.reverse();
                }
                let mut transaction = pool.begin().await.unwrap();
                let held = locks.row_locks(names).wait(PATIENCE * 6).acquire_in(&mut transaction).await;
                let names: Vec<String> = held.unwrap().iter().map(|held| held.name().to_owned()).collect();
                assert_eq!(names, ["a", "b", "c"]);
                transaction.commit().await.unwrap();

                let names = if task % 2 == 0 { ["x", "y"] } else { ["y", "x"] };
                let leases = locks.insert_locks(names).wait(PATIENCE * 6).acquire().await.unwrap();
                leases.release().await.unwrap();
            }
        });
    }
    while let Some(task) = contending.join_next().await {
        task.unwrap();
    }
}

async fn several_leases_are_all_or_none<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let b = other.insert_lock("b").acquire().await.unwrap();
    assert!(locks.insert_locks(["a", "b", "c"]).try_acquire().await.unwrap().is_none());
    let waiting = tokio::spawn(locks.insert_locks(["c", "b", "a"]).wait(PATIENCE).acquire());
    let error = locks.insert_locks(["b", "d"]).wait(MOMENT).acquire().await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    // While it waits for one, it keeps the others free.
    for name in ["a", "c", "d"] {
        other.insert_lock(name).wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    }
    b.release().await.unwrap();
    let leases = waiting.await.unwrap().unwrap();
    assert!(leases.is_held());
    let names: Vec<&str> = leases.iter().map(lock_db::Lease::name).collect();
    assert_eq!(names, ["a", "b", "c"]);
    for name in names {
        assert!(other.insert_lock(name).try_acquire().await.unwrap().is_none(), "{name}");
        assert_eq!(leases.get(name).unwrap().name(), name);
    }
    let mut transaction = database.pool(1).await.begin().await.unwrap();
    leases.verify_in(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
    leases.release().await.unwrap();
}

async fn several_leases_are_released_together<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let leases = locks.insert_locks(["a", "b"]).ttl(Duration::from_secs(1)).acquire().await.unwrap();
    drop(leases);
    eventually(PATIENCE, async || {
        let Some(leases) = other.insert_locks(["b", "a"]).try_acquire().await.unwrap() else { return false };
        leases.release().await.unwrap();
        true
    })
    .await;
    let leases =
        locks.insert_locks(["a", "b"]).wait(PATIENCE).ttl(Duration::from_secs(6)).acquire().await.unwrap();
    database.run("UPDATE distributed_lock SET secret_key = 'somebody else' WHERE lock_name = 'b'").await;
    leases.lost().await;
    assert!(!leases.is_held());
    assert!(leases.get("a").unwrap().is_held());
    assert!(matches!(leases.release().await, Err(Error::Lost { .. })));
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
}

async fn no_names_are_refused<T: TestDatabase>(database: &T) {
    let locks = Locks::new(database.pool(1).await);
    let mut transaction = database.pool(1).await.begin().await.unwrap();
    let none: [&str; 0] = [];
    assert!(matches!(locks.insert_locks(none).acquire().await, Err(Error::InvalidOption { .. })));
    assert!(matches!(
        locks.row_locks(none).acquire_in(&mut transaction).await,
        Err(Error::InvalidOption { .. })
    ));
    assert!(matches!(locks.insert_locks(["a", ""]).acquire().await, Err(Error::InvalidName { .. })));
}
