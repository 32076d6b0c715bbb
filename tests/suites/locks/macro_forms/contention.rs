//! What becomes of a call that finds the lock held: it waits, fails or is skipped, and its body never runs without the lock.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lock_db::{Error, LockDatabase, Locks, NoReentry, Skippable, WaitingFor, distributed_lock};
use lock_tests::TestDatabase;
use sqlx::Transaction;

lock_tests::cases! {
    on every database:
    a_function_skips_a_held_lease,
    a_function_skips_a_held_row_lock,
    a_function_skips_beside_a_sibling,
    a_function_skips_only_a_lock_that_is_held,
    a_function_without_wait_fails_immediately,
    a_function_waits_for_the_lock,
    a_skipping_function_does_not_enter_again,
    siblings_outside_of_a_holder_take_turns,
}

const SHORT: Duration = Duration::from_millis(50);

/// An answer that can say that nothing was done.
#[derive(Debug, PartialEq, Eq)]
enum Cleanup {
    Done(u64),
    HeldElsewhere,
}

impl Skippable for Cleanup {
    fn skipped() -> Self {
        Self::HeldElsewhere
    }
}

#[distributed_lock("job", skip, locks = locks)]
async fn maybe<DB: LockDatabase>(locks: &Locks<DB>, runs: &AtomicUsize) -> Result<Option<u64>, Error> {
    runs.fetch_add(1, Ordering::SeqCst);
    Ok(Some(1))
}

#[distributed_lock("job", skip, wait = SHORT, locks = locks)]
async fn maybe_later<DB: LockDatabase>(locks: &Locks<DB>, runs: &AtomicUsize) -> Result<(), Error> {
    runs.fetch_add(1, Ordering::SeqCst);
    Ok(())
}

#[distributed_lock("job", locks = locks, skip)]
async fn of_own_type<DB: LockDatabase>(locks: &Locks<DB>) -> Result<Cleanup, Box<dyn std::error::Error>> {
    Ok(Cleanup::Done(7))
}

async fn a_function_skips_a_held_lease<T: TestDatabase>(database: &T) {
    let (locks, runs) = (database.locks().await, AtomicUsize::new(0));
    let lease = locks.insert_lock("job").acquire().await.unwrap();
    assert_eq!(maybe(&locks, &runs).await.unwrap(), None);
    maybe_later(&locks, &runs).await.unwrap();
    assert_eq!(of_own_type(&locks).await.unwrap(), Cleanup::HeldElsewhere);

    // The same from another process, which does not queue in memory.
    let elsewhere = database.locks().await;
    assert_eq!(maybe(&elsewhere, &runs).await.unwrap(), None);
    assert_eq!(runs.load(Ordering::SeqCst), 0);

    lease.release().await.unwrap();
    assert_eq!(maybe(&elsewhere, &runs).await.unwrap(), Some(1));
    maybe_later(&locks, &runs).await.unwrap();
    assert_eq!(of_own_type(&locks).await.unwrap(), Cleanup::Done(7));
    assert_eq!(runs.load(Ordering::SeqCst), 2);
}

#[distributed_lock("row", mode = row, skip, locks = locks)]
async fn maybe_in_a_row<DB: LockDatabase>(locks: &Locks<DB>) -> Result<Option<u64>, Error> {
    Ok(Some(1))
}

#[distributed_lock("row", mode = row, tx = tx, skip, locks = locks)]
async fn maybe_in_a_transaction<DB: LockDatabase>(
    locks: &Locks<DB>,
    tx: &mut Transaction<'_, DB>,
) -> Result<Option<u64>, Error> {
    Ok(Some(1))
}

async fn a_function_skips_a_held_row_lock<T: TestDatabase>(database: &T) {
    let (locks, pool) = (database.locks().await, database.pool(2).await);
    let guard = locks.row_lock("row").acquire().await.unwrap();
    assert_eq!(maybe_in_a_row(&locks).await.unwrap(), None);
    let mut transaction = pool.begin().await.unwrap();
    assert_eq!(maybe_in_a_transaction(&locks, &mut transaction).await.unwrap(), None);
    transaction.rollback().await.unwrap();

    guard.commit().await.unwrap();
    assert_eq!(maybe_in_a_row(&locks).await.unwrap(), Some(1));
    let mut transaction = pool.begin().await.unwrap();
    assert_eq!(maybe_in_a_transaction(&locks, &mut transaction).await.unwrap(), Some(1));
    transaction.rollback().await.unwrap();
}

async fn a_function_skips_beside_a_sibling<T: TestDatabase>(database: &T) {
    let (locks, runs) = (database.locks().await, AtomicUsize::new(0));
    let inside = locks.insert_lock("job").run(async |_lease| {
        // One enters again, and the other does not wait for it.
        let inner = locks.insert_lock("job");
        inner
            .run(async |_lease| {
                // Nested, not beside: nobody else is in there.
                assert_eq!(maybe(&locks, &runs).await?, Some(1));
                Ok::<_, Error>(())
            })
            .await?;
        let (first, second) = tokio::join!(
            locks.insert_lock("job").run(async |_lease| {
                let beside = maybe(&locks, &runs).await?;
                tokio::task::yield_now().await;
                Ok::<_, Error>(beside)
            }),
            maybe(&locks, &runs),
        );
        assert_eq!((first?, second?), (Some(1), None));
        Ok::<_, Error>(())
    });
    inside.await.unwrap();
    assert_eq!(runs.load(Ordering::SeqCst), 2);
}

async fn a_function_skips_only_a_lock_that_is_held<T: TestDatabase>(database: &T) {
    let (locks, runs) = (database.locks().await, AtomicUsize::new(0));
    assert!(matches!(ambient_maybe().await, Err(Error::NotInstalled { .. })));
    locks.row_lock("job").acquire().await.unwrap().commit().await.unwrap();
    assert!(matches!(maybe(&locks, &runs).await, Err(Error::WrongKind { .. })));
    locks.close().await;
    assert!(matches!(maybe(&locks, &runs).await, Err(Error::Closed)));
    assert_eq!(runs.load(Ordering::SeqCst), 0);
}

#[distributed_lock("ambient", skip)]
async fn ambient_maybe() -> Result<(), Error> {
    panic!("must not run: nobody has installed any locks")
}

#[distributed_lock("busy", wait = "0s", locks = locks)]
async fn at_once<DB: LockDatabase>(locks: &Locks<DB>) -> Result<(), Error> {
    Ok(())
}

async fn a_function_without_wait_fails_immediately<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let lease = locks.insert_lock("busy").acquire().await.unwrap();
    let error = at_once(&locks).await.unwrap_err();
    assert!(matches!(&error, Error::Timeout { waiting_for: WaitingFor::Lock, .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.starts_with("gave up on lock `busy`") && message.contains("longer `wait`"), "{message}");
    lease.release().await.unwrap();
    at_once(&locks).await.unwrap();
}

#[distributed_lock("patient", locks = locks)]
async fn patient<DB: LockDatabase>(locks: &Locks<DB>) -> Result<i64, Error> {
    Ok(1)
}

async fn a_function_waits_for_the_lock<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let lease = locks.insert_lock("patient").acquire().await.unwrap();
    let mut waiting = Box::pin(patient(&locks));
    let waited = tokio::time::timeout(SHORT, waiting.as_mut()).await;
    assert!(waited.is_err(), "the lock is held");
    lease.release().await.unwrap();
    assert_eq!(waiting.await.unwrap(), 1);

    // The default of the `Locks` is what it waits when it says nothing.
    let impatient = Locks::builder(database.pool(1).await).default_wait(SHORT).build();
    let lease = locks.insert_lock("patient").acquire().await.unwrap();
    assert!(matches!(patient(&impatient).await, Err(Error::Timeout { .. })));
    lease.release().await.unwrap();
}

#[distributed_lock("once", locks = locks, reentrant = false)]
async fn once<DB: LockDatabase>(locks: &Locks<DB>, depth: u32) -> Result<u32, Error> {
    if depth == 0 {
        return Ok(0);
    }
    Ok(once(locks, depth - 1).await? + 1)
}

#[distributed_lock("once", locks = locks)]
async fn enters<DB: LockDatabase>(
    locks: &Locks<DB>,
    inner: impl AsyncFnOnce() -> Result<u32, Error>,
) -> Result<u32, Error> {
    inner().await
}

#[distributed_lock("once", locks = locks, reentrant = false)]
async fn lets_nobody_in<DB: LockDatabase>(locks: &Locks<DB>) -> Result<u32, Error> {
    enters(locks, async || Ok(1)).await
}

#[distributed_lock("once-row", locks = locks, reentrant = false, mode = row)]
async fn once_in_a_row<DB: LockDatabase>(locks: &Locks<DB>, depth: u32) -> Result<u32, Error> {
    if depth == 0 { Ok(0) } else { once_in_a_row(locks, depth - 1).await }
}

async fn a_skipping_function_does_not_enter_again<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let refused = |result: Result<u32, Error>| {
        let error = result.unwrap_err();
        assert!(matches!(&error, Error::Reentry { reason: NoReentry::NotReentrant, .. }), "{error:?}");
        assert!(!error.is_retryable());
        let message = error.to_string();
        assert!(message.contains("lock `once") && message.contains("`reentrant = false`"), "{message}");
    };
    assert_eq!(once(&locks, 0).await.unwrap(), 0);
    refused(once(&locks, 1).await);
    // Whichever of the two functions says so, the outer one or the inner one.
    refused(enters(&locks, async || once(&locks, 0).await).await);
    refused(lets_nobody_in(&locks).await);
    refused(once_in_a_row(&locks, 1).await);
    assert_eq!(enters(&locks, async || enters(&locks, async || Ok(2)).await).await.unwrap(), 2);
    // Nothing of it is left.
    assert_eq!(once(&locks, 0).await.unwrap(), 0);
}

async fn siblings_outside_of_a_holder_take_turns<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let (first, second) = tokio::join!(once(&locks, 0), once(&locks, 0));
    assert_eq!((first.unwrap(), second.unwrap()), (0, 0));
}
