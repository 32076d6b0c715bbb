//! What the public types guarantee besides locking: kinds of later versions, watching a lease,
//! erased forms, refused settings, and the content of errors.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::error::Error as _;
use std::time::Duration;

use lock_db::{
    Action, AnyInsertLock, AnyInsertLocks, AnyLease, AnyLeases, AnyListLocks, AnyLocks, CheckReport,
    CommitGuard, DatabaseSession, Error, Finding, FindingKind, Health, HeldInTransaction, Holder, InsertLock,
    InsertLocks, Kind, Lease, LeaseWatch, Leases, ListLocks, LockInfo, Locks, LocksBuilder, Loss, NoReentry,
    ReentryContext, RowGuard, RowGuards, RowHolder, RowLock, RowLocks, Waiter, WaitingFor, distributed_lock,
};
use lock_tests::{Backend, TestDatabase};

lock_tests::cases! {
    on every database:
    a_kind_of_a_later_version_is_never_granted,
    a_watch_sees_the_lease_end,
    a_watch_sees_a_lease_go_to_the_next_caller,
    work_is_dropped_with_the_lease,
    leases_can_be_taken_apart,
    several_locks_in_a_transaction_without_waiting,
    several_are_released_by_a_transaction,
    a_transaction_under_several_leases,
    a_takeover_of_one_of_several_refuses_the_commit,
    row_locks_in_one_transaction,
    row_locks_are_all_or_none,
    row_locks_that_are_left_hold_nothing,
    locks_of_any_database,
    several_locks_of_any_database,
    a_lease_of_any_database,
    work_under_a_lock_of_any_database,
    settings_that_cannot_work_are_refused,
    getters_return_what_was_set,
    an_error_carries_that_of_sqlx;

    without a database:
    another_can_be_installed_once_the_first_was_closed (current_thread),
    a_scope_without_the_type_of_its_database (current_thread),
    common_traits,
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

async fn several_are_released_by_a_transaction<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let leases = locks.insert_locks(["a", "b"]).ttl(TTL).acquire().await.unwrap();
    let mut transaction = locks.pool().begin().await.unwrap();
    leases.release_in(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
    let again = locks.insert_locks(["a", "b"]).ttl(TTL).wait(PATIENCE).acquire().await.unwrap();
    drop(leases);
    assert!(again.is_held());
    again.release().await.unwrap();
}

const WRITE: &str = "INSERT INTO written VALUES (1)";

async fn written<T: TestDatabase>(database: &T) -> i64 {
    database.number("SELECT COUNT(*) FROM written").await
}

async fn a_transaction_under_several_leases<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    database.run("CREATE TABLE written (value INTEGER)").await;
    let leases = locks.insert_locks(["a", "b", "c"]).ttl(TTL).acquire().await.unwrap();
    for commits in 1..=2 {
        let mut transaction = leases.begin().await.unwrap();
        T::Database::run(&mut transaction, WRITE).await.unwrap();
        transaction.commit().await.unwrap();
        assert_eq!(written(database).await, commits);
    }
    let mut transaction = leases.begin().await.unwrap();
    assert!(format!("{transaction:?}").contains('b'), "{transaction:?}");
    T::Database::run(&mut transaction, WRITE).await.unwrap();
    transaction.rollback().await.unwrap();
    assert_eq!(written(database).await, 2);
    // A lease of them is not the only one that guards it.
    let transaction = leases.begin().await.unwrap();
    let first = leases.get("a").unwrap().reenter().unwrap();
    let refused = first.commit_and_release(transaction).await;
    assert!(matches!(refused, Err(Error::InvalidOption { option: "transaction", .. })), "{refused:?}");
    leases.release().await.unwrap();

    // The leases stay until the transaction has ended.
    let leases = AnyLeases::from(locks.insert_locks(["a", "b"]).wait(PATIENCE).acquire().await.unwrap());
    let mut transaction = leases.begin::<T::Database>().await.unwrap();
    drop(leases);
    assert!(locks.insert_lock("b").try_acquire().await.unwrap().is_none());
    T::Database::run(&mut transaction, WRITE).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(written(database).await, 3);
    locks.insert_locks(["a", "b"]).wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
}

async fn a_takeover_of_one_of_several_refuses_the_commit<T: TestDatabase>(database: &T) {
    let (locks, others) = (database.locks().await, database.locks().await);
    database.run("CREATE TABLE written (value INTEGER)").await;
    for name in ["a", "b", "c"] {
        let leases = locks.insert_locks(["a", "b", "c"]).ttl(TTL).wait(PATIENCE).acquire().await.unwrap();
        let take_over = async || {
            let past = "UPDATE distributed_lock SET expire_time = '2001-01-01 00:00:00' WHERE lock_name";
            assert_eq!(database.run(&format!("{past} = '{name}'")).await, 1);
            others.insert_lock(name).ttl(TTL).wait(PATIENCE).acquire().await.unwrap()
        };
        // On SQLite an open transaction has the write lock, so the takeover can only come before it.
        let (mut transaction, taken) = if T::NAME == "sqlite" {
            let taken = take_over().await;
            (leases.begin().await.unwrap(), taken)
        } else {
            (leases.begin().await.unwrap(), take_over().await)
        };
        T::Database::run(&mut transaction, WRITE).await.unwrap();
        let error = transaction.commit().await.unwrap_err();
        let is_of = |lost: &str| lost == name;
        assert!(
            matches!(&error, Error::Lost { reason: Loss::TakenOver, name, .. } if is_of(name)),
            "{error:?}"
        );
        assert!(taken.is_held());
        assert!(!leases.is_held() && !leases.get(name).unwrap().is_held());
        assert!(leases.iter().all(|lease| lease.name() == name || lease.is_held()));
        taken.release().await.unwrap();
        drop(leases);
    }
    assert_eq!(written(database).await, 0);
}

async fn is_free<T: TestDatabase>(locks: &Locks<T::Database>, name: &str) -> bool {
    let guard = locks.row_lock(name).try_acquire().await;
    // SQLite locks the whole database, and can't tell who does.
    match guard {
        Ok(Some(guard)) => {
            guard.rollback().await.unwrap();
            true
        }
        Ok(None) => false,
        Err(error) => {
            assert!(error.is_retryable(), "{error}");
            false
        }
    }
}

async fn row_locks_in_one_transaction<T: TestDatabase>(database: &T) {
    let (locks, others) = (database.locks().await, database.locks().await);
    database.run("CREATE TABLE written (value INTEGER)").await;
    let mut guards = locks.row_locks(["b", "a", "b"]).acquire().await.unwrap();
    assert_eq!(guards.names().collect::<Vec<_>>(), ["a", "b"]);
    T::Database::run(&mut guards, WRITE).await.unwrap();
    for locks in [&locks, &others] {
        assert!(!is_free::<T>(locks, "a").await);
        assert!(!is_free::<T>(locks, "b").await);
    }
    let held = locks.row_lock("b").wait(Duration::ZERO).acquire().await.unwrap_err();
    let Error::Timeout { held_by: Some(held_by), .. } = held else { panic!("{held:?}") };
    assert!(held_by.is_here && held_by.kind == Kind::Row, "{held_by:?}");
    guards.commit().await.unwrap();
    assert_eq!(written(database).await, 1);

    let mut guards = others.row_locks(["a", "b"]).wait(PATIENCE).acquire().await.unwrap();
    T::Database::run(&mut guards, "INSERT INTO written VALUES (2)").await.unwrap();
    guards.rollback().await.unwrap();
    assert_eq!(written(database).await, 1);
    assert!(is_free::<T>(&locks, "b").await);

    let refused = locks.row_locks([""; 0]).acquire().await;
    assert!(matches!(refused, Err(Error::InvalidOption { option: "names", .. })), "{refused:?}");
}

async fn row_locks_are_all_or_none<T: TestDatabase>(database: &T) {
    let (locks, others) = (database.locks().await, database.locks().await);
    // Held by this process, and by another one.
    for holder in [&locks, &others] {
        let held = holder.row_lock("b").wait(PATIENCE).acquire().await.unwrap();
        let is_none = match locks.row_locks(["a", "b"]).try_acquire().await {
            Ok(guards) => guards.is_none(),
            // SQLite can't tell whether the other writer holds it.
            Err(error) => T::NAME == "sqlite" && error.is_retryable(),
        };
        assert!(is_none);
        let waits = locks.row_locks(["a", "b"]).wait(Duration::from_millis(300)).acquire().await;
        let error = waits.unwrap_err();
        assert!(error.is_retryable() && error.name().is_some(), "{error:?}");
        if T::NAME != "sqlite" {
            assert!(matches!(&error, Error::Timeout { name, .. } if name == "b"), "{error:?}");
            // The task rolls back a moment later.
            locks.row_lock("a").wait(PATIENCE).acquire().await.unwrap().rollback().await.unwrap();
        }
        let waiting = tokio::spawn(locks.row_locks(["a", "b"]).wait(PATIENCE).acquire());
        tokio::task::yield_now().await;
        held.commit().await.unwrap();
        waiting.await.unwrap().unwrap().commit().await.unwrap();
    }
}

async fn row_locks_that_are_left_hold_nothing<T: TestDatabase>(database: &T) {
    let (locks, others) = (database.locks().await, database.locks().await);
    drop(locks.row_locks(["a", "b"]).acquire().await.unwrap());
    let held = others.row_lock("b").wait(PATIENCE).acquire().await.unwrap();
    // Left while it has the first one and waits for the second.
    let left = tokio::time::timeout(
        Duration::from_millis(300),
        locks.row_locks(["a", "b"]).wait(PATIENCE).acquire(),
    );
    assert!(left.await.is_err());
    held.commit().await.unwrap();
    for locks in [&locks, &others] {
        let guards = locks.row_locks(["a", "b"]).wait(PATIENCE).acquire().await.unwrap();
        guards.rollback().await.unwrap();
    }
}

async fn locks_of_any_database<T: TestDatabase>(database: &T) {
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
    let known = locks.of::<T::Database>().unwrap();
    assert_eq!(known.owner(), locks.owner());
    assert!(format!("{locks:?}").contains(locks.owner()), "{locks:?}");
    known.row_lock("row").acquire().await.unwrap().commit().await.unwrap();
    assert_eq!(locks.of::<sqlx::Sqlite>().is_some(), T::NAME == "sqlite");
    locks.close().await;
    assert!(clone.is_closed());
    assert!(matches!(clone.insert_lock("a").acquire().await, Err(Error::Closed)));
}

async fn several_locks_of_any_database<T: TestDatabase>(database: &T) {
    let of_one = database.locks().await;
    let locks = AnyLocks::from(of_one.clone());
    let request = locks.insert_locks(["b", "a"]).ttl(TTL).wait(PATIENCE);
    let leases = request.clone().acquire().await.unwrap();
    assert_eq!(leases.iter().map(AnyLease::name).collect::<Vec<_>>(), ["a", "b"]);
    assert!(leases.is_held() && leases.loss().is_none() && leases.get("c").is_none());
    assert!(leases.get("a").unwrap().is_held());
    assert!(request.clone().try_acquire().await.unwrap().is_none());
    assert_eq!(leases.run_until_lost(async { 1 }).await.unwrap(), 1);
    let mut transaction = of_one.pool().begin().await.unwrap();
    leases.verify_in::<T::Database>(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
    leases.release().await.unwrap();
    let leases = request.clone().try_acquire().await.unwrap().unwrap();
    let mut transaction = of_one.pool().begin().await.unwrap();
    leases.release_in::<T::Database>(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
    let leases = AnyLeases::from(of_one.insert_locks(["a", "b"]).wait(PATIENCE).acquire().await.unwrap());
    locks.close().await;
    tokio::time::timeout(PATIENCE, leases.lost()).await.unwrap();
    assert_eq!(leases.into_iter().filter_map(|lease| lease.loss()).collect::<Vec<_>>(), [Loss::Closed; 2]);
    assert!(matches!(request.acquire().await, Err(Error::Closed)));
}

async fn work_under_a_lock_of_any_database<T: TestDatabase>(database: &T) {
    let locks = AnyLocks::from(database.locks().await);
    let inner = locks.clone();
    let output = locks.insert_lock("a").ttl(TTL).run(async |lease| {
        assert_eq!((lease.name(), lease.hold_count()), ("a", 1));
        assert!(inner.insert_lock("a").try_acquire().await?.is_none());
        inner.insert_lock("a").run(async |lease| Ok::<_, Error>(lease.hold_count())).await
    });
    assert_eq!(output.await.unwrap(), 2);
    locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    let closes = locks.clone();
    let lost = locks.insert_lock("a").run(async |_| {
        closes.close().await;
        std::future::pending::<Result<(), Error>>().await
    });
    let lost = tokio::time::timeout(PATIENCE, lost).await.unwrap();
    assert!(matches!(lost, Err(Error::Lost { reason: Loss::Closed, .. })), "{lost:?}");
}

async fn a_lease_of_any_database<T: TestDatabase>(database: &T) {
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
    let other = AnyLease::from(locks.insert_lock("b").ttl(TTL).acquire().await.unwrap());
    let refused = inner.commit_and_release(other.begin::<T::Database>().await.unwrap()).await;
    assert!(matches!(refused, Err(Error::InvalidOption { option: "transaction", .. })), "{refused:?}");
    let transaction = other.begin::<T::Database>().await.unwrap();
    other.commit_and_release(transaction).await.unwrap();
    let lease = AnyLease::from(locks.insert_lock("b").ttl(TTL).wait(PATIENCE).acquire().await.unwrap());
    let mut transaction = locks.pool().begin().await.unwrap();
    lease.release_in::<T::Database>(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
    locks.insert_locks(["a", "b"]).wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
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
        ("warn_after", builder().warn_after(Duration::from_millis(999)).build()),
        ("warn_after", builder().warn_after(Duration::MAX).build()),
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
    let hurried = builder().warn_after(Duration::ZERO).build();
    let refused = hurried.insert_lock("a").acquire().await;
    assert!(matches!(refused, Err(Error::InvalidOption { option: "warn_after", .. })), "{refused:?}");
    let refused = hurried.row_lock("a").acquire().await;
    assert!(matches!(refused, Err(Error::InvalidOption { option: "warn_after", .. })), "{refused:?}");
    builder().warn_after(Duration::from_secs(1)).build().check().await.unwrap();
    builder().warn_after(None).build().check().await.unwrap();
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
    // Also without the type of its database.
    AnyLocks::from((*second).clone()).install().unwrap();
    assert!(first.install().is_err());
    assert!(matches!(AnyLocks::from((*first).clone()).install(), Err(Error::AlreadyInstalled { .. })));
    ambient().await.unwrap();
    second.close().await;
}

#[distributed_lock("ambient")]
async fn ambient() -> Result<(), Error> {
    Ok(())
}

async fn a_scope_without_the_type_of_its_database() {
    let locks = lock_db::testing::locks().await.unwrap();
    AnyLocks::from((*locks).clone()).scope(ambient()).await.unwrap();
    locks.close().await;
    let refused = AnyLocks::from((*locks).clone()).scope(ambient()).await;
    assert!(matches!(refused, Err(Error::Closed)), "{refused:?}");
}

/// What callers rely on without naming it. It compiles or does not.
fn common_traits() {
    fn key<T: Copy + Eq + std::hash::Hash + std::fmt::Debug + std::fmt::Display + Send + Sync + 'static>() {}
    fn value<T: Clone + Eq + std::hash::Hash + std::fmt::Debug + Send + Sync + 'static>() {}
    fn request<T: Clone + std::fmt::Debug + Send + Sync + 'static>() {}
    fn guard<T: std::fmt::Debug + Send + Sync + 'static>() {}
    fn with<DB: lock_db::LockDatabase>() {
        request::<InsertLock<DB>>();
        request::<InsertLocks<DB>>();
        request::<RowLock<DB>>();
        request::<RowLocks<DB>>();
        request::<Locks<DB>>();
        request::<ListLocks<DB>>();
        request::<LocksBuilder<DB>>();
        guard::<Lease<DB>>();
        guard::<Leases<DB>>();
        fn send<T: std::fmt::Debug + Send + 'static>() {}
        send::<RowGuard<DB>>();
        send::<RowGuards<DB>>();
    }
    key::<Kind>();
    key::<Loss>();
    key::<NoReentry>();
    key::<WaitingFor>();
    key::<Action>();
    value::<LockInfo>();
    value::<CheckReport>();
    value::<Finding>();
    value::<Holder>();
    value::<Waiter>();
    value::<RowHolder>();
    value::<DatabaseSession>();
    value::<Health>();
    key::<CommitGuard>();
    key::<FindingKind>();
    request::<AnyListLocks>();
    value::<HeldInTransaction>();
    request::<AnyLocks>();
    request::<AnyInsertLock>();
    request::<AnyInsertLocks>();
    request::<LeaseWatch>();
    request::<ReentryContext>();
    guard::<AnyLease>();
    guard::<AnyLeases>();
    with::<sqlx::Postgres>();
    with::<sqlx::MySql>();
    with::<sqlx::Sqlite>();
}

fn main() -> std::process::ExitCode {
    lock_tests::run([cases()], [])
}
