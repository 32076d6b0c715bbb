//! `LocksBuilder::name_prefix`: two services in one table that use the same names.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lock_db::{Error, Kind, LockDatabase, Locks, distributed_lock};
use lock_tests::{Backend, TestDatabase};

use super::elsewhere::{Ask, BOTH_KINDS, PATIENCE, ask_in, is_free};

lock_tests::cases! {
    on every database:
    two_services_with_one_name_do_not_exclude_each_other,
    annotated_functions_of_two_services_both_run,
    services_with_the_same_prefix_exclude_each_other,
    the_prefix_is_not_in_names_that_are_reported,
    the_prefix_counts_for_the_length_of_a_name,
}

const SHORT: Duration = Duration::from_millis(100);

async fn with_prefix<T: TestDatabase>(database: &T, prefix: &str) -> Locks<T::Database> {
    let locks = Locks::builder(database.pool(4).await).name_prefix(prefix).label(prefix).build();
    locks.migrate().await.unwrap();
    locks
}

async fn two_services_with_one_name_do_not_exclude_each_other<T: TestDatabase>(database: &T) {
    let (billing, mail) = (with_prefix(database, "billing:").await, with_prefix(database, "mail:").await);
    let plain = database.locks().await;
    let mut leases = Vec::new();
    for locks in [&billing, &mail, &plain] {
        leases.push(locks.insert_lock("job").try_acquire().await.unwrap().expect("no other service has it"));
    }
    for lease in leases {
        assert!(lease.is_held());
        lease.begin().await.unwrap().commit().await.unwrap();
        lease.release().await.unwrap();
    }
    if T::NAME != "sqlite" {
        let guard = billing.row_lock("row").acquire().await.unwrap();
        assert!(is_free(&mail, Kind::Row, "row").await && is_free(&plain, Kind::Row, "row").await);
        guard.commit().await.unwrap();
    }
    // In one transaction they are different names, too.
    let mut transaction = database.pool(1).await.begin().await.unwrap();
    for locks in [&billing, &mail, &plain] {
        let held = locks.row_lock("row").acquire_in(&mut transaction).await.unwrap();
        assert_eq!((held.name(), held.hold_count()), ("row", 1));
        let held = locks.insert_lock("job").try_acquire_in(&mut transaction).await.unwrap().unwrap();
        assert_eq!((held.name(), held.hold_count()), ("job", 1));
    }
    transaction.commit().await.unwrap();
    for name in ["job", "billing:job", "mail:job", "row", "billing:row", "mail:row"] {
        let rows = format!("SELECT COUNT(*) FROM distributed_lock WHERE lock_name = '{name}'");
        assert_eq!(database.number(&rows).await, 1, "{name}");
    }
}

#[distributed_lock("cleanup", skip, at_least = "10m", locks = locks)]
async fn clean_up<DB: LockDatabase>(locks: &Locks<DB>, runs: &AtomicUsize) -> Result<(), Error> {
    runs.fetch_add(1, Ordering::SeqCst);
    Ok(())
}

/// Takes the lock of the same name of another service inside.
#[distributed_lock("cleanup all", wait = PATIENCE, locks = one)]
async fn clean_up_both<DB: LockDatabase>(
    one: &Locks<DB>,
    two: &Locks<DB>,
    runs: &AtomicUsize,
) -> Result<(), Error> {
    clean_up_one(two, runs).await
}

#[distributed_lock("cleanup all", wait = PATIENCE, reentrant = false, locks = locks)]
async fn clean_up_one<DB: LockDatabase>(locks: &Locks<DB>, runs: &AtomicUsize) -> Result<(), Error> {
    runs.fetch_add(1, Ordering::SeqCst);
    Ok(())
}

async fn annotated_functions_of_two_services_both_run<T: TestDatabase>(database: &T) {
    let (billing, mail) = (with_prefix(database, "billing:").await, with_prefix(database, "mail:").await);
    let runs = AtomicUsize::new(0);
    clean_up(&billing, &runs).await.unwrap();
    clean_up(&mail, &runs).await.unwrap();
    assert_eq!(runs.load(Ordering::SeqCst), 2);
    // Kept by `at_least`.
    clean_up(&billing, &runs).await.unwrap();
    clean_up(&with_prefix(database, "mail:").await, &runs).await.unwrap();
    assert_eq!(runs.load(Ordering::SeqCst), 2);
    clean_up_both(&billing, &mail, &runs).await.unwrap();
    assert_eq!(runs.load(Ordering::SeqCst), 3);
}

async fn services_with_the_same_prefix_exclude_each_other<T: TestDatabase>(database: &T) {
    let (one, two) = (with_prefix(database, "billing:").await, with_prefix(database, "billing:").await);
    // The whole name is what counts.
    let (shorter, plain) = (with_prefix(database, "bill").await, database.locks().await);
    let whole = [(&two, "job"), (&shorter, "ing:job"), (&plain, "billing:job")];
    let lease = one.insert_lock("job").acquire().await.unwrap();
    for (locks, name) in whole {
        assert!(!is_free(locks, Kind::Insert, name).await, "{name}");
    }
    lease.release().await.unwrap();
    for (locks, name) in whole {
        assert!(is_free(locks, Kind::Insert, name).await, "{name}");
    }
    for kind in BOTH_KINDS {
        let mut transaction = database.pool(1).await.begin().await.unwrap();
        let name = format!("{kind:?}");
        assert!(ask_in(&one, kind, &name, Ask::Acquire, &mut transaction).await.unwrap());
        assert!(!is_free(&two, kind, &name).await);
        assert!(!is_free(&plain, kind, &format!("billing:{name}")).await);
        transaction.commit().await.unwrap();
    }
}

async fn the_prefix_is_not_in_names_that_are_reported<T: TestDatabase>(database: &T) {
    // Not in what the owner is called, either.
    let locks = Locks::builder(database.pool(4).await).name_prefix("hidden:").build();
    locks.migrate().await.unwrap();
    let other = Locks::builder(database.pool(4).await).name_prefix("hidden:").build();
    let lease = locks.insert_lock("job").acquire().await.unwrap();
    assert_eq!(lease.name(), "job");
    assert_eq!(locks.info("job").await.unwrap().unwrap().name, "job");
    assert_eq!(locks.info("hidden:job").await.unwrap(), None);
    let several = locks.insert_locks(["b", "a"]).acquire().await.unwrap();
    assert!(several.iter().map(lock_db::Lease::name).eq(["a", "b"]));
    assert!(several.get("a").is_some() && several.get("hidden:a").is_none());

    let mut told = vec![format!("{lease:?} {several:?}")];
    let is_told = |error: Error, name: &str| {
        assert_eq!(error.name(), Some(name), "{error:?}");
        format!("{error} {error:?}")
    };
    let timeout = other.insert_lock("job").wait(SHORT).acquire().await.unwrap_err();
    let Error::Timeout { held_by: Some(holder), .. } = &timeout else { panic!("{timeout:?}") };
    assert_eq!(holder.name, "job");
    told.push(is_told(timeout, "job"));
    let timeout = locks.insert_lock("job").wait(SHORT).acquire().await.unwrap_err();
    told.push(is_told(timeout, "job"));
    told.push(is_told(other.insert_locks(["a", "c"]).wait(SHORT).acquire().await.unwrap_err(), "a"));
    told.push(is_told(locks.row_lock("job").acquire().await.unwrap_err(), "job"));
    let mut transaction = database.pool(1).await.begin().await.unwrap();
    let timeout = other.insert_lock("job").wait(SHORT).acquire_in(&mut transaction).await.unwrap_err();
    told.push(is_told(timeout, "job"));
    drop(transaction);
    let mut outside = database.connection().await;
    told.push(is_told(locks.row_lock("row").acquire_in(&mut outside).await.unwrap_err(), "row"));
    told.push(is_told(lease.verify_in(&mut outside).await.unwrap_err(), "job"));
    let guard = locks.row_lock("row").acquire().await.unwrap();
    assert_eq!(guard.name(), "row");
    told.push(format!("{guard:?}"));
    guard.commit().await.unwrap();
    several.release().await.unwrap();
    // Somebody else has it.
    T::Database::run(&mut outside, "UPDATE distributed_lock SET secret_key = 'x'").await.unwrap();
    let transaction = lease.begin().await.unwrap();
    told.push(is_told(transaction.commit().await.unwrap_err(), "job"));
    told.push(is_told(lease.release().await.unwrap_err(), "job"));
    for told in told {
        assert!(!told.contains("hidden"), "{told}");
    }
}

async fn the_prefix_counts_for_the_length_of_a_name<T: TestDatabase>(database: &T) {
    let locks = with_prefix(database, &"p".repeat(250)).await;
    assert!(is_free(&locks, Kind::Insert, "12345").await);
    for error in [
        locks.insert_lock("123456").try_acquire().await.map(drop).unwrap_err(),
        locks.row_lock("123456").try_acquire().await.map(drop).unwrap_err(),
        locks.insert_lock("").try_acquire().await.map(drop).unwrap_err(),
        locks.info("é1234").await.map(drop).unwrap_err(),
    ] {
        assert!(matches!(error, Error::InvalidName { .. }), "{error:?}");
        assert!(!error.to_string().contains("ppp"), "{error}");
    }
}
