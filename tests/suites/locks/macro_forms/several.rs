//! Several locks on one function: taken as they are read, from the top down, whatever the attribute is called there.

use std::cell::RefCell;

use lock_db::distributed_lock as locked;
use lock_db::{Error, Locks, distributed_lock};
use sqlx::Sqlite;

use super::{Answer, under, with_locks};

lock_tests::cases! {
    without a database:
    several_locks_are_taken_from_the_top_down (current_thread),
    the_lower_lock_waits_for_the_upper_one (current_thread),
}

/// As a framework hands it on.
mod framework {
    pub(super) use lock_db::distributed_lock as exclusive;
}

tokio::task_local! {
    static TAKEN: RefCell<Vec<&'static str>>;
}

/// Evaluated when its lock is about to be taken.
fn named(name: &'static str) -> &'static str {
    TAKEN.with(|taken| taken.borrow_mut().push(name));
    name
}

async fn order_of(call: impl Future<Output = Answer<()>>) -> Answer<Vec<&'static str>> {
    TAKEN
        .scope(RefCell::default(), async {
            call.await?;
            Ok(TAKEN.with(RefCell::take))
        })
        .await
}

async fn under_both(locks: &Locks<Sqlite>) -> Answer<()> {
    under(locks, "a").await;
    under(locks, "b").await;
    Ok(())
}

#[distributed_lock(named("a"))]
#[distributed_lock(named("b"))]
async fn by_its_name(locks: &Locks<Sqlite>) -> Answer<()> {
    under_both(locks).await
}

#[lock_db::distributed_lock(named("a"))]
#[::lock_db::distributed_lock(named("b"))]
async fn by_paths(locks: &Locks<Sqlite>) -> Answer<()> {
    under_both(locks).await
}

#[locked(named("a"))]
#[locked(named("b"))]
#[locked(named("c"))]
async fn renamed(locks: &Locks<Sqlite>) -> Answer<()> {
    under_both(locks).await
}

#[framework::exclusive(named("a"))]
#[locked(named("b"), lease = lease)]
#[distributed_lock(named("c"), lease = inner)]
async fn mixed(locks: &Locks<Sqlite>) -> Answer<()> {
    assert_eq!((lease.name(), inner.name()), ("b", "c"));
    under_both(locks).await
}

#[distributed_lock(named("a"))]
#[framework::exclusive(named("b"))]
async fn mixed_otherwise(locks: &Locks<Sqlite>) -> Answer<()> {
    under_both(locks).await
}

#[cfg_attr(all(), locked(named("a")))]
#[cfg_attr(all(), distributed_lock(named("b")))]
async fn by_conditions(locks: &Locks<Sqlite>) -> Answer<()> {
    under_both(locks).await
}

#[locked(named("a"))]
#[tracing::instrument(skip_all)]
#[locked(named("b"), skip, wait = "1s")]
async fn around_another_attribute(locks: &Locks<Sqlite>) -> Answer<()> {
    under_both(locks).await
}

#[locked(named("a"), lease = lease)]
#[locked({ assert_eq!(lease.name(), "a"); named("b") })]
async fn named_by_the_upper_lease(locks: &Locks<Sqlite>) -> Answer<()> {
    under_both(locks).await
}

macro_rules! twice_locked {
    ($name:ident, $first:literal, $second:literal) => {
        #[locked(named($first))]
        #[locked(named($second))]
        async fn $name(locks: &Locks<Sqlite>) -> Answer<()> {
            under_both(locks).await
        }
    };
}

twice_locked!(by_a_macro, "a", "b");

struct Shop {
    locks: Locks<Sqlite>,
    names: (&'static str, &'static str),
}

#[async_trait::async_trait]
trait Sells {
    async fn sell(&mut self, count: usize) -> Answer<()>;
    async fn restock(&mut self, count: usize) -> Answer<()>;
}

#[async_trait::async_trait]
impl Sells for Shop {
    #[locked(named(self.names.0), locks = self.locks)]
    #[locked(named(self.names.1), locks = self.locks)]
    async fn sell(&mut self, count: usize) -> Answer<()> {
        assert_eq!(count, 1);
        under_both(&self.locks).await
    }

    #[locked(named(self.names.0), locks = self.locks)]
    #[tracing::instrument(skip_all)]
    #[locked(named(self.names.1), locks = self.locks)]
    async fn restock(&mut self, count: usize) -> Answer<()> {
        assert_eq!(count, 2);
        under_both(&self.locks).await
    }
}

async fn several_locks_are_taken_from_the_top_down() {
    with_locks(|locks| async move {
        assert_eq!(order_of(by_its_name(&locks)).await?, ["a", "b"]);
        assert_eq!(order_of(by_paths(&locks)).await?, ["a", "b"]);
        assert_eq!(order_of(renamed(&locks)).await?, ["a", "b", "c"]);
        assert_eq!(order_of(mixed(&locks)).await?, ["a", "b", "c"]);
        assert_eq!(order_of(mixed_otherwise(&locks)).await?, ["a", "b"]);
        assert_eq!(order_of(by_conditions(&locks)).await?, ["a", "b"]);
        assert_eq!(order_of(around_another_attribute(&locks)).await?, ["a", "b"]);
        assert_eq!(order_of(named_by_the_upper_lease(&locks)).await?, ["a", "b"]);
        assert_eq!(order_of(by_a_macro(&locks)).await?, ["a", "b"]);
        let mut shop = Shop { locks: locks.clone(), names: ("a", "b") };
        assert_eq!(order_of(shop.sell(1)).await?, ["a", "b"]);
        assert_eq!(order_of(shop.restock(2)).await?, ["a", "b"]);
        Ok(())
    })
    .await;
}

/// The lower lock is never asked for where the upper one can't be had.
async fn the_lower_lock_waits_for_the_upper_one() {
    with_locks(|locks| async move {
        #[locked("upper", wait = "0s")]
        #[distributed_lock(named("lower"))]
        async fn both() -> Answer<()> {
            Ok(())
        }
        let _held = locks.insert_lock("upper").acquire().await?;
        let taken = TAKEN.scope(RefCell::default(), async {
            let refused = both().await;
            assert!(matches!(refused, Err(super::ShopError::Lock(Error::Timeout { .. }))));
            TAKEN.with(RefCell::take)
        });
        assert!(taken.await.is_empty());
        Ok(())
    })
    .await;
}
