//! Functions that are not `async fn`: they return a future, or another attribute has made them to wait for one.

// It says so with and without the attribute.
#![allow(clippy::manual_async_fn)]

use std::cell::RefCell;

use lock_db::{Error, Locks, distributed_lock};
use lock_tests::{SqliteFile, TestDatabase};
use sqlx::Sqlite;

use crate::{Answer, ShopError, under, with_locks};

#[distributed_lock("returned:{number}")]
fn returned(locks: &Locks<Sqlite>, number: i64) -> impl Future<Output = Answer<i64>> + Send {
    async move {
        under(locks, "returned:1").await;
        if number > 1 {
            return Err(ShopError::SoldOut);
        }
        Ok(number)
    }
}

trait Stock {
    fn sell(&self, count: i64) -> impl Future<Output = Answer<&str>> + Send;
}

struct Shelf {
    locks: Locks<Sqlite>,
    label: String,
}

impl Stock for Shelf {
    #[distributed_lock("shelf:{count}", locks = self.locks)]
    fn sell(&self, count: i64) -> impl Future<Output = Answer<&str>> + Send {
        async move {
            under(&self.locks, &format!("shelf:{count}")).await;
            Ok(&*self.label)
        }
    }
}

fn is_send<T: Send>(future: T) -> T {
    future
}

#[tokio::test]
async fn returned_futures() {
    with_locks(|locks| async move {
        assert_eq!(is_send(returned(&locks, 1)).await?, 1);
        let shelf = Shelf { locks, label: "top".into() };
        assert_eq!(is_send(shelf.sell(2)).await?, "top");
        Ok(())
    })
    .await;
}

thread_local! {
    /// Goes with the thread of its test.
    static DATABASE: RefCell<Option<SqliteFile>> = const { RefCell::new(None) };
}

/// For functions that have no room for an argument.
async fn own_locks() -> Locks<Sqlite> {
    let database = SqliteFile::create().await.expect("a file can be made anywhere");
    let locks = database.locks().await;
    DATABASE.set(Some(database));
    locks
}

#[distributed_lock("above", locks = own_locks().await)]
#[tokio::test]
async fn above_the_test() -> Result<(), Error> {
    tokio::task::yield_now().await;
    Ok(())
}

#[tokio::test]
#[distributed_lock("below", locks = own_locks().await, lease = lease)]
async fn below_the_test() -> Result<(), Error> {
    assert_eq!(lease.name(), "below");
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
#[distributed_lock("between", locks = own_locks().await)]
#[tracing::instrument]
async fn between_both() -> Result<(), Error> {
    Ok(())
}
