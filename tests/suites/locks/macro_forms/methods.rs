//! Receivers, traits, and other attributes on the same function.

use std::fmt::Display;
use std::pin::Pin;
use std::sync::Arc;

use async_trait::async_trait;
use lock_db::{Locks, distributed_lock};
use sqlx::{Sqlite, Transaction};

use super::rows::{insert, is_row_locked};
use super::{Answer, ShopError, under, with_locks};

lock_tests::cases! {
    without a database:
    receivers (current_thread),
    traits (current_thread),
    tracing_spans (current_thread),
}

#[derive(Clone)]
pub(crate) struct Shop {
    pub(crate) locks: Locks<Sqlite>,
    pub(crate) city: String,
    pub(crate) sold: i64,
}

impl Shop {
    #[distributed_lock("by-reference:{order_id}", locks = self.locks)]
    async fn by_reference(&self, order_id: i64) -> Answer {
        under(&self.locks, "by-reference:7").await;
        Ok(order_id)
    }

    #[distributed_lock("by-mutable-reference", locks = self.locks)]
    async fn by_mutable_reference(&mut self) -> Answer {
        under(&self.locks, "by-mutable-reference").await;
        self.sold += 1;
        Ok(self.sold)
    }

    #[distributed_lock(format!("by-value:{}", self.city), locks = &self.locks)]
    async fn by_value(self) -> Answer<String> {
        under(&self.locks, "by-value:Ulm").await;
        Ok(self.city)
    }

    #[distributed_lock("by-mutable-value", locks = self.locks())]
    async fn by_mutable_value(mut self) -> Answer<Self> {
        under(&self.locks, "by-mutable-value").await;
        self.sold += 1;
        Ok(self)
    }

    #[distributed_lock("in-box", locks = self.locks)]
    async fn in_box(self: Box<Self>) -> Answer<String> {
        under(&self.locks, "in-box").await;
        Ok(self.city)
    }

    #[distributed_lock("in-arc", locks = self.locks)]
    async fn in_arc(self: Arc<Self>) -> Answer<Arc<Self>> {
        under(&self.locks, "in-arc").await;
        Ok(self)
    }

    #[distributed_lock("in-borrowed-arc", locks = self.locks)]
    async fn in_borrowed_arc(self: &Arc<Self>) -> Answer<Arc<Self>> {
        under(&self.locks, "in-borrowed-arc").await;
        Ok(Arc::clone(self))
    }

    #[distributed_lock("in-pin", locks = self.locks)]
    async fn in_pin(mut self: Pin<&mut Self>) -> Answer {
        under(&self.locks, "in-pin").await;
        self.sold += 1;
        Ok(self.sold)
    }

    #[distributed_lock("{self}", locks = self.locks)]
    async fn captured(&self) -> Answer<()> {
        under(&self.locks, "Ulm").await;
        Ok(())
    }

    #[distributed_lock("city", locks = self.locks)]
    async fn borrowed_from_self(&self) -> Answer<&str> {
        under(&self.locks, "city").await;
        Ok(&self.city)
    }

    #[distributed_lock("sold", locks = self.locks)]
    async fn mutably_borrowed_from_self(&mut self) -> Answer<&mut i64> {
        under(&self.locks, "sold").await;
        Ok(&mut self.sold)
    }

    #[distributed_lock("associated", locks = locks)]
    async fn associated(locks: Locks<Sqlite>) -> Answer<Self> {
        under(&locks, "associated").await;
        Ok(Self { locks, city: "Ulm".into(), sold: 0 })
    }

    fn locks(&self) -> Locks<Sqlite> {
        self.locks.clone()
    }
}

impl Display for Shop {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.city)
    }
}

async fn receivers() {
    with_locks(|locks| async move {
        let mut shop = Shop::associated(locks).await?;
        assert_eq!(shop.by_reference(7).await?, 7);
        assert_eq!(shop.by_mutable_reference().await?, 1);
        assert_eq!(shop.clone().by_value().await?, "Ulm");
        assert_eq!(shop.clone().by_mutable_value().await?.sold, 2);
        assert_eq!(Box::new(shop.clone()).in_box().await?, "Ulm");
        let shared = Arc::new(shop.clone()).in_arc().await?;
        assert_eq!(shared.in_borrowed_arc().await?.sold, 1);
        assert_eq!(Pin::new(&mut shop).in_pin().await?, 2);
        shop.captured().await?;
        assert_eq!(shop.borrowed_from_self().await?, "Ulm");
        *shop.mutably_borrowed_from_self().await? += 1;
        assert_eq!(shop.sold, 3);
        Ok(())
    })
    .await;
}

trait Native {
    fn sell(&self, count: i64) -> impl Future<Output = Answer> + Send;
    fn restock(&mut self) -> impl Future<Output = Answer> + Send;
}

impl Native for Shop {
    #[distributed_lock("native:{count}", locks = self.locks)]
    async fn sell(&self, count: i64) -> Answer {
        under(&self.locks, "native:2").await;
        Ok(self.sold + count)
    }

    #[distributed_lock("native-restock", locks = self.locks)]
    async fn restock(&mut self) -> Answer {
        under(&self.locks, "native-restock").await;
        self.sold = 0;
        Ok(self.sold)
    }
}

#[async_trait]
pub(crate) trait Dynamic: Send + Sync {
    fn locks(&self) -> &Locks<Sqlite>;

    #[distributed_lock("default:{number}", locks = self.locks())]
    async fn default_method(&self, number: i64) -> Answer {
        under(self.locks(), "default:1").await;
        Ok(number)
    }

    async fn by_reference(&self, count: i64) -> Answer;
    async fn by_mutable_reference(&mut self, by: i64) -> Answer;
    async fn in_box(self: Box<Self>) -> Answer<String>;
    async fn in_arc(self: Arc<Self>, text: String) -> Answer<String>;
    async fn patterns(&self, pair: (i64, i64), sum: i64) -> Answer;
    async fn borrowed<'a>(&'a self, other: &'a str) -> Answer<&'a str>;
    async fn coerced(&self) -> Answer<Box<dyn Display + Send>>;
    async fn generic<T: Display + Send + Sync>(&self, value: T) -> Answer<T>
    where
        Self: Sized;
    async fn associated(locks: &Locks<Sqlite>) -> Answer
    where
        Self: Sized;
    async fn early(&mut self, text: &str) -> Answer;
    async fn shown(&mut self) -> Answer;
    async fn in_transaction(&self, tx: Transaction<'static, Sqlite>) -> Answer<()>;
    async fn instrumented(&self, count: i64) -> Answer;
    async fn instrumented_first(&self, count: i64) -> Answer;
}

#[async_trait]
impl Dynamic for Shop {
    fn locks(&self) -> &Locks<Sqlite> {
        &self.locks
    }

    #[distributed_lock("dynamic:{count}", locks = self.locks, ttl = "5s")]
    async fn by_reference(&self, count: i64) -> Answer {
        under(&self.locks, "dynamic:2").await;
        Ok(self.sold + count)
    }

    #[distributed_lock(format!("dynamic:{}", self.city), locks = self.locks)]
    async fn by_mutable_reference(&mut self, mut by: i64) -> Answer {
        under(&self.locks, "dynamic:Ulm").await;
        by += 1;
        self.sold += by;
        Ok(self.sold)
    }

    #[distributed_lock("dynamic-box", locks = self.locks)]
    async fn in_box(mut self: Box<Self>) -> Answer<String> {
        under(&self.locks, "dynamic-box").await;
        self.city.push('!');
        Ok(self.city)
    }

    #[distributed_lock("dynamic-arc:{text}", locks = self.locks)]
    async fn in_arc(self: Arc<Self>, text: String) -> Answer<String> {
        under(&self.locks, "dynamic-arc:a").await;
        Ok(text)
    }

    #[distributed_lock("dynamic:{left}", locks = self.locks)]
    async fn patterns(&self, (left, mut right): (i64, i64), mut sum: i64) -> Answer {
        under(&self.locks, "dynamic:1").await;
        right += 1;
        sum += left + right;
        Ok(sum)
    }

    #[distributed_lock(other, locks = self.locks)]
    async fn borrowed<'a>(&'a self, other: &'a str) -> Answer<&'a str> {
        under(&self.locks, other).await;
        if other.is_empty() { Ok(&self.city) } else { Ok(other) }
    }

    #[distributed_lock("dynamic-coerced", locks = self.locks)]
    async fn coerced(&self) -> Answer<Box<dyn Display + Send>> {
        if self.sold > 0 {
            return Ok(Box::new("sold"));
        }
        Ok(Box::new(self.sold))
    }

    #[distributed_lock("dynamic:{value}", locks = self.locks)]
    async fn generic<T: Display + Send + Sync>(&self, value: T) -> Answer<T> {
        under(&self.locks, &format!("dynamic:{value}")).await;
        Ok(value)
    }

    #[distributed_lock("dynamic-associated", locks = locks)]
    async fn associated(locks: &Locks<Sqlite>) -> Answer {
        const ANSWER: i64 = 1;
        under(locks, "dynamic-associated").await;
        Ok(ANSWER)
    }

    #[distributed_lock("dynamic-early", locks = self.locks)]
    async fn early(&mut self, text: &str) -> Answer {
        if text.is_empty() {
            return Err(ShopError::SoldOut);
        }
        self.sold = text.parse()?;
        Ok(self.sold)
    }

    #[distributed_lock("{self}", locks = self.locks)]
    async fn shown(&mut self) -> Answer {
        under(&self.locks, "Ulm").await;
        self.sold += 1;
        Ok(self.sold)
    }

    #[distributed_lock("dynamic-row", mode = row, tx = tx, locks = self.locks)]
    async fn in_transaction(&self, mut tx: Transaction<'static, Sqlite>) -> Answer<()> {
        assert!(is_row_locked(&self.locks, "dynamic-row").await);
        insert(&mut tx, 5).await;
        tx.commit().await.expect("commits");
        Ok(())
    }

    #[distributed_lock("dynamic:{count}", locks = self.locks)]
    #[tracing::instrument(skip(self))]
    async fn instrumented(&self, count: i64) -> Answer {
        under(&self.locks, "dynamic:8").await;
        Ok(count)
    }

    #[tracing::instrument(skip_all, err(Debug))]
    #[distributed_lock(format!("{}:{count}", self.city), locks = self.locks)]
    async fn instrumented_first(&self, count: i64) -> Answer {
        under(&self.locks, "Ulm:9").await;
        Ok(count)
    }
}

async fn traits() {
    with_locks(|locks| async move {
        let mut shop = Shop { locks: locks.clone(), city: "Ulm".into(), sold: 1 };
        assert_eq!(Native::sell(&shop, 2).await?, 3);
        assert_eq!(shop.restock().await?, 0);

        assert_eq!(shop.default_method(1).await?, 1);
        assert_eq!(Dynamic::by_reference(&shop, 2).await?, 2);
        assert_eq!(Dynamic::by_mutable_reference(&mut shop, 2).await?, 3);
        assert_eq!(Dynamic::in_box(Box::new(shop.clone())).await?, "Ulm!");
        assert_eq!(Dynamic::in_arc(Arc::new(shop.clone()), "a".into()).await?, "a");
        assert_eq!(shop.patterns((1, 2), 3).await?, 7);
        assert_eq!(shop.borrowed("other").await?, "other");
        assert_eq!(shop.coerced().await?.to_string(), "sold");
        assert_eq!(shop.generic(4).await?, 4);
        assert_eq!(<Shop as Dynamic>::associated(&locks).await?, 1);
        assert_eq!(shop.early("6").await?, 6);
        assert!(matches!(shop.early("").await, Err(ShopError::SoldOut)));
        assert_eq!(shop.shown().await?, 7);
        assert_eq!(shop.instrumented(8).await?, 8);
        assert_eq!(shop.instrumented_first(9).await?, 9);
        let dynamic: Box<dyn Dynamic> = Box::new(shop);
        assert_eq!(dynamic.in_box().await?, "Ulm!");
        Ok(())
    })
    .await;
}

#[distributed_lock("waits-in-the-span:{number}")]
#[tracing::instrument(skip(locks), ret, err(Debug))]
async fn instrumented(locks: &Locks<Sqlite>, number: i64) -> Answer<i64> {
    under(locks, "waits-in-the-span:1").await;
    Ok(number)
}

#[tracing::instrument(skip(locks), fields(double = number * 2))]
#[distributed_lock("waits-before-the-span:{number}")]
async fn instrumented_first(locks: &Locks<Sqlite>, number: i64) -> Answer<Box<dyn Display + Send>> {
    under(locks, "waits-before-the-span:1").await;
    Ok(Box::new(number))
}

impl Shop {
    #[tracing::instrument(skip_all)]
    #[distributed_lock("{self}:{count}", locks = self.locks)]
    async fn instrumented_method(&mut self, count: i64) -> Answer<&str> {
        under(&self.locks, "Ulm:1").await;
        self.sold += count;
        Ok(&self.city)
    }
}

async fn tracing_spans() {
    with_locks(|locks| async move {
        assert_eq!(instrumented(&locks, 1).await?, 1);
        assert_eq!(instrumented_first(&locks, 1).await?.to_string(), "1");
        let mut shop = Shop { locks, city: "Ulm".into(), sold: 1 };
        assert_eq!(shop.instrumented_method(1).await?, "Ulm");
        Ok(())
    })
    .await;
}
