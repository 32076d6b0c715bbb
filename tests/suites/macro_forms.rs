//! Every form of function that `#[distributed_lock]` may stand on, in a crate that allows no lint: what the attribute
//! writes must compile there, run under the lock, and be a future that can be spawned.

#![deny(warnings, clippy::all, clippy::pedantic)]
#![deny(unused_qualifications, unused_lifetimes, elided_lifetimes_in_paths, single_use_lifetimes)]
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

use std::borrow::Cow;
use std::fmt::{Debug, Display};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use lock_db::{Error, Locks, distributed_lock};
use lock_tests::{SqliteFile, TestDatabase};
use sqlx::{Connection, Sqlite, SqliteConnection, Transaction};

// ------------------------------------------------------------------------------------------- what the tests stand on

/// What an application calls its errors.
#[derive(Debug)]
enum ShopError {
    Lock(Error),
    Number(std::num::ParseIntError),
    SoldOut,
}

impl Display for ShopError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Lock(error) => Display::fmt(error, formatter),
            Self::Number(error) => Display::fmt(error, formatter),
            Self::SoldOut => formatter.write_str("sold out"),
        }
    }
}

impl From<Error> for ShopError {
    fn from(error: Error) -> Self {
        Self::Lock(error)
    }
}

impl From<std::num::ParseIntError> for ShopError {
    fn from(error: std::num::ParseIntError) -> Self {
        Self::Number(error)
    }
}

type Answer<T = i64> = Result<T, ShopError>;

/// Runs a case against a database of its own, as a task: so its future is `Send`. Its locks are the ambient ones, too.
async fn with_locks<F>(case: impl FnOnce(Locks<Sqlite>) -> F)
where
    F: Future<Output = Answer<()>> + Send + 'static,
{
    let database = SqliteFile::create().await.expect("a file can be made anywhere");
    let locks = database.locks().await;
    let task = tokio::spawn(locks.scope(case(locks.clone())));
    task.await.expect("the case does not panic").expect("the case succeeds");
    locks.close().await;
}

async fn is_held(locks: &Locks<Sqlite>, name: &str) -> bool {
    let info = locks.info(name).await.expect("the table can be read");
    info.is_some_and(|info| info.held_until.is_some())
}

/// Says from inside of a body that it runs under the lock.
async fn under(locks: &Locks<Sqlite>, name: &str) {
    assert!(is_held(locks, name).await, "`{name}` is not held");
}

async fn is_row_locked(locks: &Locks<Sqlite>, name: &str) -> bool {
    locks.row_lock(name).try_acquire().await.expect("the lock can be asked for").is_none()
}

// -------------------------------------------------------------------------------------------------- free functions

#[distributed_lock("bare")]
async fn bare(locks: &Locks<Sqlite>) -> Result<(), Error> {
    under(locks, "bare").await;
    Ok(())
}

#[distributed_lock("order:{order_id}", ttl = "1m 30s", wait = "500ms")]
async fn captures(locks: &Locks<Sqlite>, order_id: i64) -> Answer {
    under(locks, "order:7").await;
    Ok(order_id)
}

#[distributed_lock("{{{word}}}:{number:03}", locks = locks,)]
async fn formats(locks: &Locks<Sqlite>, word: &str, number: u8) -> Answer<u8> {
    under(locks, "{a}:007").await;
    let _ = word;
    Ok(number)
}

#[distributed_lock("{name}")]
async fn only_a_capture(locks: &Locks<Sqlite>, name: String) -> Answer<String> {
    under(locks, &name).await;
    Ok(name)
}

#[distributed_lock("{{braces}}")]
async fn escaped_braces(locks: &Locks<Sqlite>) -> Answer<()> {
    under(locks, "{braces}").await;
    Ok(())
}

/// Documentation, visibility and other attributes stay.
#[must_use = "it is an answer"]
#[distributed_lock("awaits-nothing")]
pub(crate) async fn awaits_nothing() -> Answer {
    Ok(1)
}

#[distributed_lock("only-awaits")]
async fn only_awaits(locks: &Locks<Sqlite>) -> Answer {
    captures(locks, 7).await
}

#[distributed_lock("unused-argument")]
async fn unused_argument(_locks: &Locks<Sqlite>, _: i64) -> Answer {
    Ok(1)
}

#[tokio::test]
async fn free_functions() {
    with_locks(|locks| async move {
        bare(&locks).await?;
        assert!(!is_held(&locks, "bare").await);
        assert_eq!(captures(&locks, 7).await?, 7);
        assert_eq!(formats(&locks, "a", 7).await?, 7);
        assert_eq!(only_a_capture(&locks, "é".into()).await?, "é");
        escaped_braces(&locks).await?;
        assert_eq!(awaits_nothing().await?, 1);
        assert_eq!(only_awaits(&locks).await?, 7);
        assert_eq!(unused_argument(&locks, 1).await?, 1);
        Ok(())
    })
    .await;
}

// ------------------------------------------------------------------------------------------------ names and options

const NAME: &str = "constant";

#[distributed_lock(NAME)]
async fn constant_name(locks: &Locks<Sqlite>) -> Answer<()> {
    under(locks, NAME).await;
    Ok(())
}

#[distributed_lock(format!("{}:{}", order.kind, order.id))]
async fn formatted_name(locks: &Locks<Sqlite>, order: Order) -> Answer<Order> {
    under(locks, "book:1").await;
    Ok(order)
}

#[distributed_lock(order.lock_name(), ttl = order.patience * 2, wait = Duration::from_secs(5))]
async fn borrowed_name(locks: &Locks<Sqlite>, order: Order) -> Answer<()> {
    under(locks, "book").await;
    drop(order);
    Ok(())
}

#[distributed_lock({ let text: Rc<str> = Rc::from(name); EVALUATED.fetch_add(1, Ordering::Relaxed); text })]
async fn name_that_is_not_send(locks: &Locks<Sqlite>, name: &str) -> Answer<()> {
    under(locks, name).await;
    Ok(())
}

#[distributed_lock(name)]
async fn argument_as_name(locks: &Locks<Sqlite>, name: String) -> Answer<String> {
    under(locks, &name).await;
    Ok(name)
}

#[distributed_lock(prefix.to_owned() + "b", mode = insert)]
async fn sum_as_name(locks: &Locks<Sqlite>, prefix: &str) -> Answer<()> {
    under(locks, "ab").await;
    let _ = prefix;
    Ok(())
}

#[distributed_lock("by-value", locks = locks)]
async fn locks_by_value(locks: Locks<Sqlite>) -> Answer<()> {
    under(&locks, "by-value").await;
    Ok(())
}

#[distributed_lock("in-arc", locks = locks)]
async fn locks_in_arc(locks: Arc<Locks<Sqlite>>) -> Answer<()> {
    under(&locks, "in-arc").await;
    Ok(())
}

#[distributed_lock("renamed", crate = renamed::database_locks)]
async fn renamed_crate(locks: &Locks<Sqlite>) -> Answer<()> {
    under(locks, "renamed").await;
    Ok(())
}

mod renamed {
    pub(crate) use ::lock_db as database_locks;
}

macro_rules! annotated {
    ($function:ident, $name:literal, $expression:expr) => {
        #[distributed_lock($name, ttl = "1s", wait = $expression)]
        async fn $function(locks: &Locks<Sqlite>) -> Answer<()> {
            under(locks, $name).await;
            Ok(())
        }
    };
}

annotated!(from_a_macro, "from-a-macro", Duration::from_secs(1));
annotated!(also_from_a_macro, "also-from-a-macro", "1s");

static EVALUATED: AtomicUsize = AtomicUsize::new(0);

struct Order {
    kind: String,
    id: i64,
    patience: Duration,
}

impl Order {
    fn lock_name(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.kind)
    }
}

fn order() -> Order {
    Order { kind: "book".into(), id: 1, patience: Duration::from_secs(5) }
}

#[tokio::test]
async fn names_and_options() {
    with_locks(|locks| async move {
        constant_name(&locks).await?;
        assert_eq!(formatted_name(&locks, order()).await?.id, 1);
        borrowed_name(&locks, order()).await?;
        name_that_is_not_send(&locks, "rc").await?;
        assert_eq!(EVALUATED.load(Ordering::Relaxed), 1);
        assert_eq!(argument_as_name(&locks, "argument".into()).await?, "argument");
        sum_as_name(&locks, "a").await?;
        locks_by_value(locks.clone()).await?;
        locks_in_arc(Arc::new(locks.clone())).await?;
        renamed_crate(&locks).await?;
        from_a_macro(&locks).await?;
        also_from_a_macro(&locks).await
    })
    .await;
}

// ------------------------------------------------------------------------------------------------------- receivers

#[derive(Clone)]
struct Shop {
    locks: Locks<Sqlite>,
    city: String,
    sold: i64,
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

#[tokio::test]
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

// ------------------------------------------------------------------------------- generics, borrowing, `impl Trait`

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

#[tokio::test]
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

// ---------------------------------------------------------------------------------------- statements and inference

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

#[distributed_lock("second:{number}")]
#[distributed_lock("first")]
async fn stacked(locks: &Locks<Sqlite>, number: i64) -> Answer<Box<dyn Debug + Send>> {
    under(locks, "first").await;
    under(locks, "second:4").await;
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

#[tokio::test]
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
        assert_eq!(format!("{:?}", boxed(&locks).await?), "1");
        Ok(())
    })
    .await;
}

// ---------------------------------------------------------------------------------------------------------- traits

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
trait Dynamic: Send + Sync {
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

#[tokio::test]
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

// --------------------------------------------------------------------------------------------------------- tracing

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

#[tokio::test]
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

// ------------------------------------------------------------------------------------------------------- row locks

async fn insert(connection: &mut SqliteConnection, number: i64) {
    let insert = sqlx::query("INSERT INTO number (number) VALUES (?)").bind(number);
    insert.execute(connection).await.expect("inserts");
}

#[distributed_lock("row:{name}", mode = row)]
async fn row(locks: &Locks<Sqlite>, name: &str) -> Answer<bool> {
    let _ = name;
    Ok(is_row_locked(locks, "row:a").await)
}

#[distributed_lock("row:{number}", mode = row, tx = tx, wait = "5s")]
async fn row_in_transaction(tx: &mut Transaction<'_, Sqlite>, number: i64) -> Answer {
    insert(tx, number).await;
    Ok(number)
}

#[distributed_lock("row:owned", mode = row, tx = tx)]
async fn row_in_owned_transaction(mut tx: Transaction<'static, Sqlite>) -> Answer<()> {
    insert(&mut tx, 2).await;
    tx.commit().await.expect("commits");
    Ok(())
}

#[distributed_lock("row:connection", mode = row, tx = connection)]
async fn row_on_connection(connection: &mut SqliteConnection) -> Answer<&mut SqliteConnection> {
    insert(connection, 3).await;
    Ok(connection)
}

struct Work {
    locks: Locks<Sqlite>,
    transaction: Transaction<'static, Sqlite>,
}

impl Work {
    #[distributed_lock("row:field", mode = row, tx = self.transaction, locks = self.locks)]
    async fn row_in_field(&mut self) -> Answer<()> {
        insert(&mut self.transaction, 4).await;
        Ok(())
    }
}

#[tokio::test]
async fn row_locks() {
    let database = SqliteFile::create().await.expect("a file can be made anywhere");
    database.run("CREATE TABLE number (number BIGINT NOT NULL)").await;
    let (pool, locks) = (database.pool(4).await, database.locks().await);
    let case = async move {
        assert!(row(&locks, "a").await?);
        assert!(!is_row_locked(&locks, "row:a").await);

        let mut transaction = pool.begin().await.expect("begins");
        assert_eq!(row_in_transaction(&mut transaction, 1).await?, 1);
        transaction.commit().await.expect("commits");

        row_in_owned_transaction(pool.begin().await.expect("begins")).await?;

        let mut connection = pool.acquire().await.expect("connects");
        let mut transaction = connection.begin().await.expect("begins");
        insert(row_on_connection(&mut transaction).await?, 3).await;
        transaction.rollback().await.expect("rolls back");
        drop(connection);

        let transaction = pool.begin().await.expect("begins");
        let mut work = Work { locks: locks.clone(), transaction };
        work.row_in_field().await?;
        work.transaction.commit().await.expect("commits");

        let shop = Shop { locks, city: "Ulm".into(), sold: 1 };
        shop.in_transaction(pool.begin().await.expect("begins")).await
    };
    let locks = database.locks().await;
    tokio::spawn(locks.scope(case)).await.expect("no panic").expect("succeeds");
    assert_eq!(database.number("SELECT sum(number) FROM number").await, 1 + 2 + 4 + 5);
}

// ------------------------------------------------------------------------------------------ no lock, panic and loss

static RUNS: AtomicUsize = AtomicUsize::new(0);

#[distributed_lock("refused:{name}", wait = "0s")]
async fn refused(name: &str) -> Answer<String> {
    RUNS.fetch_add(1, Ordering::Relaxed);
    Ok(name.to_owned())
}

#[distributed_lock("panics")]
async fn panics(fails: bool) -> Answer<bool> {
    assert!(!fails, "on purpose");
    Ok(fails)
}

struct SetOnDrop(Arc<AtomicUsize>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[distributed_lock("never-ends", locks = locks)]
async fn never_ends(locks: Locks<Sqlite>, started: Arc<tokio::sync::Notify>, guard: SetOnDrop) -> Answer<()> {
    under(&locks, "never-ends").await;
    started.notify_one();
    std::future::pending::<()>().await;
    drop(guard);
    Ok(())
}

#[tokio::test]
async fn the_body_never_runs_without_the_lock() {
    with_locks(|locks| async move {
        let lease = locks.insert_lock("refused:a").acquire().await?;
        assert!(matches!(refused("a").await, Err(ShopError::Lock(Error::Timeout { .. }))));
        lease.release().await?;

        let too_long = "x".repeat(300);
        assert!(matches!(refused(&too_long).await, Err(ShopError::Lock(Error::InvalidName { .. }))));
        let outside = tokio::spawn(async { refused("a").await }).await.expect("no panic");
        assert!(matches!(outside, Err(ShopError::Lock(Error::NotInstalled { .. }))));
        assert_eq!(RUNS.load(Ordering::Relaxed), 0);

        refused("a").await?;
        assert_eq!(RUNS.load(Ordering::Relaxed), 1);
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn a_panic_frees_the_lock() {
    with_locks(|locks| async move {
        let failed = tokio::spawn(locks.scope(panics(true))).await;
        assert!(failed.is_err_and(|error| error.is_panic()));
        assert!(!panics(false).await?);
        Ok(())
    })
    .await;
}

#[tokio::test]
async fn on_loss_the_body_is_dropped() {
    with_locks(|locks| async move {
        let (started, dropped) = (Arc::new(tokio::sync::Notify::new()), Arc::new(AtomicUsize::new(0)));
        let guard = SetOnDrop(Arc::clone(&dropped));
        let running = tokio::spawn(never_ends(locks.clone(), Arc::clone(&started), guard));
        started.notified().await;
        assert_eq!(dropped.load(Ordering::Relaxed), 0);
        locks.close().await;
        let lost = running.await.expect("no panic");
        assert!(matches!(lost, Err(ShopError::Lock(Error::Lost { .. }))));
        assert_eq!(dropped.load(Ordering::Relaxed), 1);
        Ok(())
    })
    .await;
}
