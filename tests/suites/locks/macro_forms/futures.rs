//! Functions that are not `async fn`: they return a future. Those that `#[tokio::test]` has made to
//! wait for one are in the test binary `test_attributes`.

// It says so with and without the attribute.
#![allow(clippy::manual_async_fn)]

use lock_db::{Locks, distributed_lock};
use sqlx::Sqlite;

use super::{Answer, ShopError, under, with_locks};

lock_tests::cases! {
    without a database:
    returned_futures (current_thread),
}

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

async fn returned_futures() {
    with_locks(|locks| async move {
        assert_eq!(is_send(returned(&locks, 1)).await?, 1);
        let shelf = Shelf { locks, label: "top".into() };
        assert_eq!(is_send(shelf.sell(2)).await?, "top");
        Ok(())
    })
    .await;
}
