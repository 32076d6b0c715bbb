//! The caller's transaction has another `search_path`, another current database (`USE`), or on SQLite a temporary table of
//! the same name.

use std::time::Duration;

use lock_db::{Error, Kind, Locks};
use lock_tests::TestDatabase;
use sqlx::Connection;

use super::elsewhere::{ALL_ASKS, BOTH_KINDS, Elsewhere, PATIENCE, ask_in, begin_elsewhere, is_free};

lock_tests::cases! {
    on every database:
    locks_taken_elsewhere_exclude_others,
    locks_held_by_others_are_not_granted_elsewhere,
    guards_and_releases_elsewhere_find_the_lease,
    a_released_lease_is_free_after_a_commit_elsewhere,
}

async fn locks_taken_elsewhere_exclude_others<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, Locks::new(database.pool(2).await));
    let elsewhere = Elsewhere::new(database).await;
    for kind in BOTH_KINDS {
        for ask in ALL_ASKS {
            let name = format!("{kind:?} {ask:?}");
            let mut connection = database.connection().await;
            let mut transaction = begin_elsewhere(&elsewhere, &mut connection).await;
            assert!(ask_in(&locks, kind, &name, ask, &mut transaction).await.unwrap(), "{name} is free");
            assert!(!is_free(&other, kind, &name).await, "{name} is held");
            transaction.commit().await.unwrap();
            assert!(is_free(&other, kind, &name).await, "{name} was given up");
            assert!(Elsewhere::<T>::is_untouched(&mut connection).await, "{name} was written elsewhere");
            let written = format!(
                "SELECT COUNT(*) FROM distributed_lock WHERE lock_name = '{name}' AND fencing_token > 0"
            );
            assert_eq!(database.number(&written).await, 1);
        }
    }
}

async fn locks_held_by_others_are_not_granted_elsewhere<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, Locks::new(database.pool(4).await));
    let elsewhere = Elsewhere::new(database).await;
    let lease = other.insert_lock("lease").acquire().await.unwrap();
    // The other table has a row of this name, too.
    let row = match T::NAME {
        // Has no locks of rows.
        "sqlite" => None,
        _ => Some(other.row_lock("row").acquire().await.unwrap()),
    };
    let mut connection = database.connection().await;
    let mut transaction = begin_elsewhere(&elsewhere, &mut connection).await;
    assert!(locks.insert_lock("lease").try_acquire_in(&mut transaction).await.unwrap().is_none());
    let waiting =
        locks.insert_lock("lease").wait(Duration::from_millis(100)).acquire_in(&mut transaction).await;
    let Err(Error::Timeout { held_by: Some(holder), .. }) = waiting else { panic!("{waiting:?}") };
    assert_eq!(holder.fencing_token, lease.fencing_token());
    if let Some(row) = row {
        assert!(locks.row_lock("row").try_acquire_in(&mut transaction).await.unwrap().is_none());
        row.commit().await.unwrap();
    }
    lease.release().await.unwrap();
    drop(transaction);
    let mut transaction = connection.begin().await.unwrap();
    for (kind, name) in [(Kind::Insert, "lease"), (Kind::Row, "row")] {
        let granted = ask_in(&locks, kind, name, super::elsewhere::Ask::Acquire, &mut transaction).await;
        assert!(granted.unwrap(), "{name} is free");
    }
    transaction.commit().await.unwrap();
    assert!(Elsewhere::<T>::is_untouched(&mut connection).await);
}

async fn guards_and_releases_elsewhere_find_the_lease<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, Locks::new(database.pool(2).await));
    let elsewhere = Elsewhere::new(database).await;
    let lease = locks.insert_lock("lease").acquire().await.unwrap();
    let mut connection = database.connection().await;
    let mut transaction = begin_elsewhere(&elsewhere, &mut connection).await;
    lease.verify_in(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
    let mut transaction = connection.begin().await.unwrap();
    lease.release_in(&mut transaction).await.unwrap();
    transaction.rollback().await.unwrap();
    assert!(!is_free(&other, Kind::Insert, "lease").await);
    lock_tests::eventually(PATIENCE, async || lease.is_held()).await;
    assert!(Elsewhere::<T>::is_untouched(&mut connection).await);

    // It must be able to fail: of a lease that somebody else has, no transaction elsewhere is guarded.
    database.run("UPDATE distributed_lock SET secret_key = 'another' WHERE lock_name = 'lease'").await;
    let mut transaction = connection.begin().await.unwrap();
    let error = lease.verify_in(&mut transaction).await.unwrap_err();
    assert!(matches!(error, Error::Lost { .. }), "{error:?}");
}

async fn a_released_lease_is_free_after_a_commit_elsewhere<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, Locks::new(database.pool(2).await));
    let elsewhere = Elsewhere::new(database).await;
    let lease = locks.insert_lock("lease").ttl(Duration::from_mins(10)).acquire().await.unwrap();
    let mut connection = database.connection().await;
    let mut transaction = begin_elsewhere(&elsewhere, &mut connection).await;
    lease.release_in(&mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
    assert!(is_free(&other, Kind::Insert, "lease").await);
    assert!(Elsewhere::<T>::is_untouched(&mut connection).await);
}
