//! Generics, borrowing, inference, and what may stand in a body.

use std::fmt::{Debug, Display};
use std::pin::Pin;

use lock_db::{Error, Locks, distributed_lock};
use sqlx::Sqlite;

use super::names::{Order, order};
use super::{Answer, ShopError, under, with_locks};

lock_tests::cases! {
    without a database:
    generics_and_borrowing (current_thread),
    statements_and_inference (current_thread),
}

#[distributed_lock("generic:{key}")]
async fn generic<K: Display + Send, V, const N: usize>(key: K, values: [V; N]) -> Answer<(K, V)>
where
    V: Clone + Send,
{
    let value = values.first().cloned().ok_or(ShopError::SoldOut)?;
    Ok((key, value))
}

#[distributed_lock("longest")]
async fn longest<'a>(left: &'a str, right: &'a str) -> Answer<&'a str> {
    if left.len() < right.len() {
        return Ok(right);
    }
    Ok(left)
}

#[distributed_lock("elided")]
async fn elided(text: &mut String) -> Answer<&str> {
    text.push('!');
    Ok(text)
}

#[distributed_lock(name)]
async fn taken_as_impl_trait(name: impl AsRef<str> + Send, give: impl FnOnce() -> i64 + Send) -> Answer {
    let _ = name;
    Ok(give())
}

#[distributed_lock("given-as-impl-trait")]
async fn given_as_impl_trait(up_to: i64) -> Answer<impl Iterator<Item = i64>> {
    if up_to < 0 {
        return Err(ShopError::SoldOut);
    }
    Ok((0..up_to).map(|number| number * 2))
}

#[distributed_lock("given-as-closure")]
async fn given_as_closure(step: i64) -> Answer<Box<dyn Fn(i64) -> i64 + Send>> {
    Ok(Box::new(move |number| number + step))
}

async fn generics_and_borrowing() {
    with_locks(|_| async move {
        assert_eq!(generic("a", [1, 2]).await?, ("a", 1));
        assert!(matches!(generic::<_, i64, 0>(1, []).await, Err(ShopError::SoldOut)));
        assert_eq!(longest("a", "bc").await?, "bc");
        assert_eq!(elided(&mut String::from("a")).await?, "a!");
        assert_eq!(taken_as_impl_trait("impl", || 5).await?, 5);
        assert_eq!(given_as_impl_trait(3).await?.collect::<Vec<_>>(), [0, 2, 4]);
        assert!(given_as_impl_trait(-1).await.is_err());
        assert_eq!(given_as_closure(1).await?(1), 2);
        Ok(())
    })
    .await;
}

#[distributed_lock("early")]
async fn early(text: &str) -> Answer<u32> {
    let parts = async { text.split(',').next() };
    let Some(part) = parts.await else { return Err(ShopError::SoldOut) };
    let parse = |part: &str| -> Answer<u32> { Ok(part.parse()?) };
    for round in 0.. {
        if round > 1 {
            return parse(part);
        }
    }
    unreachable!("the loop has no end")
}

#[distributed_lock("coerced")]
async fn coerced(number: i64) -> Answer<Box<dyn Display + Send>> {
    if number == 0 {
        return Ok(Box::new("none"));
    }
    Ok(Box::new(number))
}

#[distributed_lock("coerced-error")]
async fn coerced_error(number: i64) -> Result<&'static [i64], Box<dyn std::error::Error + Send + Sync>> {
    if number == 0 {
        return Err("none".into());
    }
    Ok(&[1, 2])
}

#[distributed_lock("inferred")]
async fn inferred(text: &str) -> Answer<Vec<u8>> {
    Ok(text.bytes().collect::<Vec<_>>().into_iter().rev().collect())
}

#[distributed_lock("diverges")]
async fn diverges(stop: bool) -> Answer<()> {
    loop {
        if stop {
            return Err(ShopError::SoldOut);
        }
        tokio::task::yield_now().await;
    }
}

#[distributed_lock("expression")]
async fn expression(number: i64) -> Answer<&'static str> {
    match number {
        0 => Ok("none"),
        1 => Ok("one"),
        _ => Err(ShopError::SoldOut),
    }
}

#[distributed_lock("items")]
async fn items(number: i64) -> Answer {
    #![allow(clippy::unreadable_literal)]
    use std::cmp::max;
    const LEAST: i64 = 1000000;
    fn twice(number: i64) -> i64 {
        number * 2
    }

    let number = twice(number);
    Ok(max(number, LEAST))
}

#[distributed_lock("patterns:{left}:{kind}")]
async fn patterns(
    (left, mut right): (i64, i64),
    Order { kind, id, .. }: Order,
    mut sum: i64,
    [first, ..]: [i64; 2],
) -> Answer<String> {
    right += 1;
    sum += left + right + id + first;
    Ok(format!("{kind}{sum}"))
}

#[distributed_lock("nested:{depth}")]
async fn nested(locks: &Locks<Sqlite>, depth: u32) -> Answer<u32> {
    if depth == 0 {
        under(locks, "nested:2").await;
        under(locks, "nested:1").await;
        return Ok(0);
    }
    let below = nested(locks, depth - 1).await?;
    Ok(below + 1)
}

/// Taken from the top down, whatever stands in between.
#[distributed_lock("first", wait = "0s")]
#[tracing::instrument(skip(locks))]
#[lock_db::distributed_lock("second:{number}", wait = "0s", lease = second)]
async fn stacked(locks: &Locks<Sqlite>, number: i64) -> Answer<Box<dyn Debug + Send>> {
    under(locks, "first").await;
    under(locks, "second:4").await;
    assert_eq!(second.name(), "second:4");
    Ok(Box::new(number))
}

type BoxedDebug = Box<dyn Debug + Send>;

#[distributed_lock("in-a-box")]
fn boxed(locks: &Locks<Sqlite>) -> Pin<Box<dyn Future<Output = Answer<BoxedDebug>> + Send + '_>> {
    Box::pin(async move {
        under(locks, "in-a-box").await;
        Ok(Box::new(1))
    })
}

async fn statements_and_inference() {
    with_locks(|locks| async move {
        assert_eq!(early("12,13").await?, 12);
        assert!(matches!(early("x").await, Err(ShopError::Number(_))));
        assert_eq!(coerced(0).await?.to_string(), "none");
        assert_eq!(coerced(1).await?.to_string(), "1");
        assert_eq!(coerced_error(1).await.unwrap(), [1, 2]);
        assert_eq!(coerced_error(0).await.unwrap_err().to_string(), "none");
        assert_eq!(inferred("ab").await?, b"ba");
        assert!(matches!(diverges(true).await, Err(ShopError::SoldOut)));
        assert_eq!(expression(1).await?, "one");
        assert_eq!(items(3).await?, 1_000_000);
        assert_eq!(patterns((1, 2), order(), 3, [4, 5]).await?, "book12");
        assert_eq!(nested(&locks, 2).await?, 2);
        assert_eq!(format!("{:?}", stacked(&locks, 4).await?), "4");
        let leases =
            (locks.insert_lock("first").acquire().await?, locks.insert_lock("second:4").acquire().await?);
        let refused = stacked(&locks, 4).await;
        assert!(matches!(refused, Err(ShopError::Lock(Error::Timeout { name, .. })) if name == "first"));
        drop(leases);
        assert_eq!(format!("{:?}", boxed(&locks).await?), "1");
        Ok(())
    })
    .await;
}
