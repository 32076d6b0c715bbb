//! What the public types guarantee besides locking: kinds of later versions, watching a lease,
//! erased forms, refused settings, and the content of errors.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::error::Error as _;
use std::time::Duration;

use lock_db::{AnyLease, AnyLocks, Error, Kind, LeaseWatch, Locks, Loss, distributed_lock};
use lock_tests::{Backend, TestDatabase};

lock_tests::cases! {
    on every database:
    a_kind_of_a_later_version_is_never_granted,
    a_watch_sees_the_lease_end,
    a_watch_sees_a_lease_go_to_the_next_caller,
    work_is_dropped_with_the_lease,
    leases_can_be_taken_apart,
    several_locks_in_a_transaction_without_waiting,
    any_locks_work_as_locks,
    any_lease_works_as_a_lease,
    settings_that_cannot_work_are_refused,
    getters_return_what_was_set,
    an_error_carries_that_of_sqlx;

    without a database:
    another_can_be_installed_once_the_first_was_closed (current_thread),
}

const TTL: Duration = Duration::from_secs(30);
const PATIENCE: Duration = Duration::from_secs(20);

#[distributed_lock("later", locks = locks)]
async fn annotated<DB: Backend>(locks: &Locks<DB>) -> Result<(), Error> {
    panic!("the body runs without its lock")
}

#[distributed_lock("later", mode = row, locks = locks)]
async fn annotated_row<DB: Backend>(locks: &Locks<DB>) -> Result<(), Error> {
    panic!("the body runs without its lock")
}

fn is_refused<T>(what: &str, answer: Result<T, Error>, wanted: Kind) {
    match answer {
        Err(Error::WrongKind { name, wanted: asked, found: Kind::Unknown, .. }) => {
            assert_eq!((&*name, asked), ("later", wanted), "{what}");
        }
        Err(error) => panic!("{what}: {error:?}"),
        Ok(_) => panic!("{what}: granted"),
    }
}

async fn a_kind_of_a_later_version_is_never_granted<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    locks.insert_lock("later").acquire().await.unwrap().release().await.unwrap();
    database.run("UPDATE distributed_lock SET lock_kind = 'semaphore' WHERE lock_name = 'later'").await;
    let row = "SELECT COUNT(*) FROM distributed_lock WHERE lock_kind = 'semaphore'";
    assert_eq!(database.number(row).await, 1);

    // Both a `Locks` that knows the row, and one that does not.
    for locks in [locks, database.locks().await] {
        let info = locks.info("later").await.unwrap().unwrap();
        assert_eq!((info.kind, info.kind.as_str()), (Kind::Unknown, "unknown"));
        is_refused("acquire", locks.insert_lock("later").acquire().await, Kind::Insert);
        is_refused("try", locks.insert_lock("later").try_acquire().await, Kind::Insert);
        is_refused("several", locks.insert_locks(["a", "later"]).acquire().await, Kind::Insert);
        is_refused("run", locks.insert_lock("later").run(async |_| Ok::<_, Error>(())).await, Kind::Insert);
        is_refused("annotated", annotated(&locks).await, Kind::Insert);
        is_refused("row", locks.row_lock("later").acquire().await, Kind::Row);
        is_refused("try row", locks.row_lock("later").try_acquire().await, Kind::Row);
        is_refused("annotated row", annotated_row(&locks).await, Kind::Row);
        let mut transaction = locks.pool().begin().await.unwrap();
        is_refused("in", locks.insert_lock("later").acquire_in(&mut transaction).await, Kind::Insert);
        transaction.rollback().await.unwrap();
        let mut transaction = locks.pool().begin().await.unwrap();
        is_refused("row in", locks.row_lock("later").acquire_in(&mut transaction).await, Kind::Row);
        transaction.rollback().await.unwrap();
        let mut transaction = locks.pool().begin().await.unwrap();
        is_refused("try in", locks.insert_lock("later").try_acquire_in(&mut transaction).await, Kind::Insert);
        transaction.rollback().await.unwrap();
        // The other name was not kept.
        locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    }
    assert_eq!(database.number(row).await, 1);
}

async fn a_watch_sees_the_lease_end<T: TestDatabase>(database: &T) {
    fn crosses<V: Clone + Send + Sync + 'static>(_: &V) {}
    let locks = database.locks().await;
    let lease = locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
    let inner = lease.reenter().unwrap();
    let watch: LeaseWatch = lease.watch();
    crosses(&watch);
    assert_eq!((watch.is_held(), watch.loss(), lease.loss()), (true, None, None));
    let child = tokio::spawn({
        let watch = watch.clone();
        async move {
            watch.lost().await;
            watch.loss()
        }
    });
    drop(lease);
    assert!(watch.is_held(), "the inner handle holds it");
    assert!(!child.is_finished());
    inner.release().await.unwrap();
    assert_eq!((watch.is_held(), watch.loss()), (false, Some(Loss::Released)));
    assert_eq!(tokio::time::timeout(PATIENCE, child).await.unwrap().unwrap(), Some(Loss::Released));

    // A loss that is not a release.
    let lease = locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
    let watch = lease.watch();
    locks.close().await;
    tokio::time::timeout(PATIENCE, watch.lost()).await.unwrap();
    assert_eq!((watch.loss(), lease.loss()), (Some(Loss::Closed), Some(Loss::Closed)));
    assert_eq!(Loss::Closed.as_str(), "closed");
}

async fn a_watch_sees_a_lease_go_to_the_next_caller<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let lease = locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
    let watch = lease.watch();
    let next = tokio::spawn(locks.insert_lock("a").ttl(TTL).wait(PATIENCE).acquire());
    tokio::task::yield_now().await;
    lease.release().await.unwrap();
    let next = next.await.unwrap().unwrap();
    let next_watch = next.watch();
    assert_eq!((watch.loss(), next_watch.loss()), (Some(Loss::Released), None));
    // What becomes of the next holder is none of the first one's.
    locks.close().await;
    tokio::time::timeout(PATIENCE, next_watch.lost()).await.unwrap();
    assert_eq!((watch.loss(), next_watch.loss()), (Some(Loss::Released), Some(Loss::Closed)));
    drop(next);
    assert_eq!(next_watch.loss(), Some(Loss::Closed));
}

async fn work_is_dropped_with_the_lease<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let lease = locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
    assert_eq!(lease.run_until_lost(async { 12 }).await.unwrap(), 12);
    let leases = locks.insert_locks(["b", "c"]).ttl(TTL).acquire().await.unwrap();
    assert_eq!(leases.run_until_lost(async { 13 }).await.unwrap(), 13);
    assert_eq!(leases.loss(), None);
    let closes = async {
        locks.close().await;
        std::future::pending::<()>().await;
    };
    let boxed: std::pin::Pin<Box<dyn Future<Output = ()> + Send>> = Box::pin(closes);
    let (first, several) = tokio::join!(
        tokio::time::timeout(PATIENCE, lease.run_until_lost(boxed)),
        tokio::time::timeout(PATIENCE, leases.run_until_lost(std::future::pending::<()>())),
    );
    assert!(matches!(first.unwrap(), Err(Error::Lost { reason: Loss::Closed, .. })));
    assert!(matches!(several.unwrap(), Err(Error::Lost { reason: Loss::Closed, .. })));
    assert_eq!(leases.loss(), Some(Loss::Closed));
}

async fn leases_can_be_taken_apart<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let leases = locks.insert_locks(["a", "b"]).ttl(TTL).acquire().await.unwrap();
    let mut leases = leases.into_iter();
    let (a, b) = (leases.next().unwrap(), leases.next().unwrap());
    assert_eq!((a.name(), b.name(), leases.next().is_none()), ("a", "b", true));
    a.release().await.unwrap();
    assert!(locks.insert_lock("b").try_acquire().await.unwrap().is_none());
    locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    b.release().await.unwrap();
}

async fn several_locks_in_a_transaction_without_waiting<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let mut transaction = locks.pool().begin().await.unwrap();
    let held = locks.insert_locks(["a", "b"]).try_acquire_in(&mut transaction).await.unwrap().unwrap();
    assert_eq!(held.iter().map(lock_db::HeldInTransaction::name).collect::<Vec<_>>(), ["a", "b"]);
    transaction.rollback().await.unwrap();
    let lease = locks.insert_lock("b").ttl(TTL).wait(PATIENCE).acquire().await.unwrap();
    let mut transaction = locks.pool().begin().await.unwrap();
    assert!(locks.insert_locks(["a", "b"]).try_acquire_in(&mut transaction).await.unwrap().is_none());
    transaction.rollback().await.unwrap();
    lease.release().await.unwrap();
    let request = locks.insert_locks(["a"]).at_least(TTL);
    let mut transaction = locks.pool().begin().await.unwrap();
    assert!(matches!(
        request.try_acquire_in(&mut transaction).await,
        Err(Error::InvalidOption { option: "at_least", .. })
    ));
    transaction.rollback().await.unwrap();
}

async fn any_locks_work_as_locks<T: TestDatabase>(database: &T) {
    let locks = AnyLocks::from(database.locks().await);
    let clone = locks.clone();
    locks.migrate().await.unwrap();
    locks.check().await.unwrap();
    let lease = locks.insert_lock("a").ttl(TTL).wait(PATIENCE).fair(true).acquire().await.unwrap();
    assert_eq!(lease.name(), "a");
    assert!(clone.insert_lock("a").try_acquire().await.unwrap().is_none());
    assert_eq!(clone.info("a").await.unwrap().unwrap().fencing_token, lease.fencing_token());
    let refused = locks.insert_lock("a").ttl(Duration::ZERO).acquire().await;
    assert!(matches!(refused, Err(Error::InvalidOption { option: "ttl", .. })));
    lease.release().await.unwrap();
    assert!(!locks.is_closed());
    locks.close().await;
    assert!(clone.is_closed());
    assert!(matches!(clone.insert_lock("a").acquire().await, Err(Error::Closed)));
}

async fn any_lease_works_as_a_lease<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let lease = AnyLease::from(locks.insert_lock("a").ttl(TTL).acquire().await.unwrap());
    let inner = lease.reenter().unwrap();
    assert_eq!((lease.hold_count(), lease.loss(), lease.watch().is_held()), (2, None, true));
    assert_eq!(lease.run_until_lost(async { 1 }).await.unwrap(), 1);
    lease.release().await.unwrap();
    let mut transaction = locks.pool().begin().await.unwrap();
    inner.verify_in::<T::Database>(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
    let transaction = inner.begin::<T::Database>().await.unwrap();
    transaction.commit().await.unwrap();
    inner.release().await.unwrap();
}

async fn settings_that_cannot_work_are_refused<T: TestDatabase>(database: &T) {
    let pool = database.pool(2).await;
    let locks = Locks::new(pool.clone());
    locks.migrate().await.unwrap();
    let builder = || Locks::builder(pool.clone());
    for (option, locks) in [
        ("ttl", builder().default_ttl(Duration::ZERO).build()),
        ("wait", builder().default_wait(Duration::MAX).build()),
        ("hand_off", builder().hand_off(0, Duration::from_millis(50)).build()),
        ("hand_off", builder().hand_off(4097, Duration::from_millis(50)).build()),
        ("name_prefix", builder().name_prefix("p".repeat(255)).build()),
    ] {
        let refused = locks.check().await.unwrap_err();
        let is_it = matches!(&refused, Error::InvalidOption { option: refused, .. } if *refused == option);
        assert!(is_it && !refused.is_retryable(), "{option}: {refused:?}");
    }
    let no_turn = builder().hand_off(0, Duration::from_millis(50)).build();
    let refused = no_turn.insert_lock("a").acquire().await;
    assert!(matches!(refused, Err(Error::InvalidOption { option: "hand_off", .. })), "{refused:?}");
    builder().hand_off(4096, Duration::ZERO).build().check().await.unwrap();
}

async fn getters_return_what_was_set<T: TestDatabase>(database: &T) {
    let pool = database.pool(2).await;
    let locks = Locks::builder(pool.clone()).label("billing").build();
    assert!(locks.owner().ends_with("/billing"), "{}", locks.owner());
    assert_eq!(locks.pool().options().get_max_connections(), 2);
    assert!(!locks.is_closed());
    locks.close().await;
    assert!(locks.is_closed());
}

async fn an_error_carries_that_of_sqlx<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    database.run("ALTER TABLE distributed_lock RENAME TO moved").await;
    let error = locks.insert_lock("a").acquire().await.unwrap_err();
    assert!(matches!(error, Error::SchemaMissing { .. }), "{error:?}");
    let copy = error.clone();
    assert_eq!(copy.to_string(), error.to_string());
    let source = copy.source().expect("has a source");
    assert!(source.downcast_ref::<sqlx::Error>().is_some(), "{source:?}");
    assert!(!error.is_commit_unknown());
}

async fn another_can_be_installed_once_the_first_was_closed() {
    let (first, second) =
        (lock_db::testing::locks().await.unwrap(), lock_db::testing::locks().await.unwrap());
    first.install().unwrap();
    let refused = second.install().unwrap_err();
    assert!(matches!(refused, Error::AlreadyInstalled { installed: "SQLite", .. }), "{refused:?}");
    assert!(refused.to_string().contains("`install()` was called already"), "{refused}");
    first.close().await;
    second.install().unwrap();
    assert!(first.install().is_err());
}

fn main() -> std::process::ExitCode {
    lock_tests::run([cases()], [])
}
