//! Leases that are released in a transaction.

use super::*;

lock_tests::cases! {
    on every database:
    several_leases_are_released_by_their_own_transaction,
    a_release_counts_with_the_commit,
    a_lease_released_in_a_transaction_guards_that_one,
    a_release_that_is_rolled_back_does_not_count,
    commit_and_release_do_both_or_nothing,
    a_lease_released_by_a_commit_is_free_immediately,
    a_transaction_of_another_lease_is_refused,
    run_may_release_in_a_transaction,
    a_release_that_is_dropped_midway_and_rolled_back_does_not_count,
    a_release_after_one_that_was_rolled_back_is_a_release;

    on every server:
    a_lease_released_in_a_transaction_guards_no_other_one,
    a_release_of_one_of_several_covers_no_other_one,
    a_lease_whose_release_may_be_committed_is_not_held,
}

async fn a_release_counts_with_the_commit<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let other = Locks::new(database.pool(1).await);
    let lease = lease::<T>(&locks).await;
    let mut transaction = database.pool(1).await.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    lease.release_in(&mut transaction).await.unwrap();
    assert!(!lease.is_held(), "nobody knows before the transaction has ended");
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_none());
    transaction.commit().await.unwrap();
    other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    lease.lost().await;
    assert!(matches!(lease.begin().await, Err(Error::Lost { reason: Loss::Released, .. })));
    // The next caller of this process gets the lock, too.
    locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
}

/// On the same connection: the marks of the first transaction end with it. (On SQLite this works
/// only before another process has taken the lock: a transaction with an older snapshot than the
/// lock's row can't take it afterwards.)
async fn a_lease_released_in_a_transaction_guards_no_other_one<T: TestServer>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let pool = database.pool(1).await;
    for round in 0..20 {
        let lease = lease::<T>(&locks).await;
        let mut transaction = pool.begin().await.unwrap();
        lease.release_in(&mut transaction).await.unwrap();
        transaction.commit().await.unwrap();
        let mut transaction = pool.begin().await.unwrap();
        increment::<T::Database>(&mut transaction).await;
        // Possibly before the watchdog has noticed.
        let asked = if round % 2 == 0 {
            lease.verify_in(&mut transaction).await
        } else {
            lease.release_in(&mut transaction).await
        };
        assert!(matches!(asked, Err(Error::Lost { .. } | Error::Serialization { .. })), "{asked:?}");
        drop(transaction);
    }
    assert_eq!(count(database).await, 0);
}

/// Leases that were granted together can have the same fencing token.
async fn a_release_of_one_of_several_covers_no_other_one<T: TestServer>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let leases = locks.insert_locks(["a", "b"]).ttl(LONG).acquire().await.unwrap();
    let mut transaction = leases.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    leases.get("b").unwrap().release_in(&mut transaction).await.unwrap();
    // Released elsewhere, such as by `at_most`.
    let released = "UPDATE distributed_lock SET expire_time = '1970-01-01 00:00:00', ttl_micros = 0
        WHERE lock_name = 'a'";
    assert_eq!(database.run(released).await, 1);
    let ended = transaction.commit().await;
    assert!(matches!(ended, Err(Error::Lost { .. })), "{ended:?}");
    assert_eq!(count(database).await, 0);
}

async fn several_leases_are_released_by_their_own_transaction<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    for _ in 0..3 {
        let leases = locks.insert_locks(["a", "b", "c"]).ttl(LONG).wait(PATIENCE).acquire().await.unwrap();
        let mut transaction = leases.begin().await.unwrap();
        increment::<T::Database>(&mut transaction).await;
        leases.release_in(&mut transaction).await.unwrap();
        transaction.commit().await.unwrap();
    }
    assert_eq!(count(database).await, 3);
    // The release is no loss for the work that made it.
    let leases = locks.insert_locks(["a", "b", "c"]).ttl(LONG).wait(PATIENCE).acquire().await.unwrap();
    let work = async {
        let mut transaction = leases.begin().await?;
        increment::<T::Database>(&mut transaction).await;
        leases.release_in(&mut transaction).await?;
        transaction.commit().await?;
        leases.lost().await;
        Ok::<_, Error>(7)
    };
    assert_eq!(leases.run_until_lost(work).await.unwrap().unwrap(), 7);
    assert_eq!(count(database).await, 4);
}

async fn a_lease_released_in_a_transaction_guards_that_one<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let lease = lease::<T>(&locks).await;
    let mut transaction = database.pool(1).await.begin().await.unwrap();
    lease.release_in(&mut transaction).await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    lease.verify_in(&mut transaction).await.unwrap();
    lease.release_in(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(count(database).await, 1);
    locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
}

async fn a_release_that_is_rolled_back_does_not_count<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let other = Locks::new(database.pool(1).await);
    let lease = lease::<T>(&locks).await;
    let mut transaction = lease.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    lease.release_in(&mut transaction).await.unwrap();
    transaction.rollback().await.unwrap();
    eventually(PATIENCE, async || lease.is_held()).await;
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_none());
    let mut transaction = lease.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    transaction.commit().await.unwrap();
    assert_eq!(count(database).await, 1);
    lease.release().await.unwrap();
}

/// By a try, which waits neither for a holder nor for a local permit.
async fn a_lease_released_by_a_commit_is_free_immediately<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let mut lease = lease::<T>(&locks).await;
    for _ in 0..100 {
        let transaction = lease.begin().await.unwrap();
        lease.commit_and_release(transaction).await.unwrap();
        lease = locks.insert_lock("a").ttl(LONG).try_acquire().await.unwrap().unwrap();
    }
}

async fn commit_and_release_do_both_or_nothing<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let other = Locks::new(database.pool(1).await);
    for _ in 0..3 {
        let lease = lease::<T>(&locks).await;
        let mut transaction = lease.begin().await.unwrap();
        increment::<T::Database>(&mut transaction).await;
        lease.commit_and_release(transaction).await.unwrap();
        let next = other.insert_lock("a").try_acquire().await.unwrap().expect("it is free");
        next.release().await.unwrap();
    }
    assert_eq!(count(database).await, 3);

    let lost = lease::<T>(&locks).await;
    let taken = if T::NAME == "sqlite" {
        let taken = take_over(database).await;
        let mut transaction = lost.begin().await.unwrap();
        increment::<T::Database>(&mut transaction).await;
        assert!(matches!(lost.commit_and_release(transaction).await, Err(Error::Lost { .. })));
        taken
    } else {
        let mut transaction = lost.begin().await.unwrap();
        increment::<T::Database>(&mut transaction).await;
        let taken = take_over(database).await;
        assert!(matches!(lost.commit_and_release(transaction).await, Err(Error::Lost { .. })));
        taken
    };
    assert_eq!(count(database).await, 3);
    assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_none(), "the new holder has it still");
    taken.release().await.unwrap();
}

async fn a_transaction_of_another_lease_is_refused<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let (a, b) =
        (locks.insert_lock("a").acquire().await.unwrap(), locks.insert_lock("b").acquire().await.unwrap());
    let mut transaction = a.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    assert!(matches!(b.commit_and_release(transaction).await, Err(Error::InvalidOption { .. })));
    eventually(PATIENCE, async || database.activity().await.transactions == 0).await;
    assert_eq!(count(database).await, 0);
}

async fn run_may_release_in_a_transaction<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let other = Locks::new(database.pool(1).await);
    let done = locks
        .insert_lock("a")
        .run(async |lease| {
            let mut transaction = lease.begin().await?;
            increment::<T::Database>(&mut transaction).await;
            lease.release_in(&mut transaction).await?;
            transaction.commit().await?;
            let next = other.insert_lock("a").wait(PATIENCE).acquire().await?;
            // Work after the release is not cut off when the watchdog notices it.
            lease.lost().await;
            tokio::task::yield_now().await;
            next.release().await?;
            Ok::<_, Error>(7)
        })
        .await;
    assert_eq!(done.unwrap(), 7);
    assert_eq!(count(database).await, 1);
}

async fn a_release_that_is_dropped_midway_and_rolled_back_does_not_count<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let pool = database.pool(1).await;
    let lease = lease::<T>(&locks).await;
    let mut transaction = pool.begin().await.unwrap();
    {
        let mut releasing = std::pin::pin!(lease.release_in(&mut transaction));
        // Usually pending; a fast server may have answered already.
        let _sent = std::future::poll_fn(|context| Poll::Ready(releasing.as_mut().poll(context))).await;
    }
    assert!(!lease.is_held(), "nobody knows");
    transaction.rollback().await.unwrap();
    // Soon, and not only when it is due for renewal.
    eventually(PATIENCE, async || lease.is_held()).await;
    lease.release().await.unwrap();
}

/// The answer to the COMMIT is late, and then lost.
async fn a_lease_whose_release_may_be_committed_is_not_held<T: TestServer>(database: &T) {
    counter(database).await;
    drop(database.locks().await);
    let proxy = database.proxy();
    let far = Locks::new(lock_tests::pool::<T::Database>(&database.url_by(proxy.address()), 2).await);
    let lease = lease::<T>(&far).await;
    let other = lease.reenter().unwrap();
    let mut transaction = lease.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    proxy.delay(Direction::ToClient, Duration::from_millis(300));
    let near = Locks::new(database.pool(1).await);
    let (ended, ()) = tokio::join!(lease.commit_and_release(transaction), async {
        let theirs = self::lease::<T>(&near).await;
        assert!(!other.is_held(), "two holders");
        proxy.pause(Direction::ToClient);
        proxy.cut();
        proxy.resume(Direction::ToClient);
        proxy.delay(Direction::ToClient, Duration::ZERO);
        assert!(theirs.is_held());
        // Permanently: the watchdog finds out.
        other.lost().await;
        assert!(!other.is_held());
        theirs.release().await.unwrap();
    });
    // Whether the answer arrived in time does not matter here.
    let _known_or_not = ended;
    assert_eq!(count(database).await, 1);
}

async fn a_release_after_one_that_was_rolled_back_is_a_release<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let pool = database.pool(1).await;
    for commits in [false, true] {
        let lease = lease::<T>(&locks).await;
        let mut transaction = pool.begin().await.unwrap();
        lease.release_in(&mut transaction).await.unwrap();
        if commits {
            transaction.commit().await.unwrap();
        } else {
            transaction.rollback().await.unwrap();
        }
        lease.release().await.unwrap();
        let other = Locks::new(database.pool(1).await);
        other.insert_lock("a").try_acquire().await.unwrap().expect("it is free").release().await.unwrap();
    }
}
