//! `#[distributed_lock]` on functions that are tests by another attribute. Such an attribute needs the
//! standard harness.

#![deny(warnings, clippy::all, clippy::pedantic)]

use std::cell::RefCell;

use lock_db::{Error, Locks, distributed_lock};
use lock_tests::{SqliteFile, TestDatabase};
use sqlx::Sqlite;

thread_local! {
    /// Goes with the thread of its test.
    static DATABASE: RefCell<Option<SqliteFile>> = const { RefCell::new(None) };
}

/// For functions that have no room for an argument.
async fn own_locks() -> Locks<Sqlite> {
    let database = SqliteFile::create().await;
    let locks = database.locks().await;
    DATABASE.set(Some(database));
    locks
}

#[distributed_lock("above", locks = own_locks().await)]
#[tokio::test]
async fn the_attribute_above_a_test_attribute() -> Result<(), Error> {
    tokio::task::yield_now().await;
    Ok(())
}

#[tokio::test]
#[distributed_lock("below", locks = own_locks().await, lease = lease)]
async fn the_attribute_below_a_test_attribute() -> Result<(), Error> {
    assert_eq!(lease.name(), "below");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
#[distributed_lock("between", locks = own_locks().await)]
#[tracing::instrument]
async fn the_attribute_between_a_test_attribute_and_another() -> Result<(), Error> {
    Ok(())
}
