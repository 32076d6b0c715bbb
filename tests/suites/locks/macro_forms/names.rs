//! Free functions, what a lock may be called, and the options.

use std::borrow::Cow;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use lock_db::{Error, Locks, distributed_lock};
use sqlx::Sqlite;

use super::{Answer, is_held, under, with_locks};

lock_tests::cases! {
    without a database:
    free_functions (current_thread),
    names_and_options (current_thread),
    names_that_are_no_strings (current_thread),
}

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

pub(crate) struct Order {
    pub(crate) kind: String,
    pub(crate) id: i64,
    patience: Duration,
}

impl Order {
    fn lock_name(&self) -> Cow<'_, str> {
        Cow::Borrowed(&self.kind)
    }
}

pub(crate) fn order() -> Order {
    Order { kind: "book".into(), id: 1, patience: Duration::from_secs(5) }
}

/// Names that the attribute uses as well.
#[distributed_lock(__name, locks = __locks, ttl = __duration)]
async fn same_names(__locks: &Locks<Sqlite>, __name: &str, __duration: Duration, __body: i64) -> Answer {
    let (__held, __error, __outcome, __output) = (__body, 1, 1, 1);
    under(__locks, __name).await;
    Ok(__held + __error + __outcome + __output)
}

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
        also_from_a_macro(&locks).await?;
        assert_eq!(same_names(&locks, "same", Duration::from_secs(1), 1).await?, 4);
        Ok(())
    })
    .await;
}

/// Shows itself, and is no text.
struct OrderId(u64);

impl std::fmt::Display for OrderId {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "order-{}", self.0)
    }
}

/// Is text, and does not show itself.
struct Slug(&'static str);

impl AsRef<str> for Slug {
    fn as_ref(&self) -> &str {
        self.0
    }
}

#[distributed_lock(id)]
async fn shown_name(locks: &Locks<Sqlite>, id: OrderId) -> Answer<OrderId> {
    under(locks, "order-7").await;
    Ok(id)
}

#[distributed_lock(number + 1)]
async fn number_as_name(locks: &Locks<Sqlite>, number: u32) -> Answer<()> {
    under(locks, "42").await;
    let _ = number;
    Ok(())
}

#[distributed_lock(slug)]
async fn text_that_is_not_shown(locks: &Locks<Sqlite>, slug: &Slug) -> Answer<()> {
    under(locks, slug.0).await;
    Ok(())
}

#[distributed_lock(name[2..])]
async fn part_as_name(locks: &Locks<Sqlite>, name: &str) -> Answer<()> {
    under(locks, "cd").await;
    let _ = name;
    Ok(())
}

#[distributed_lock(name)]
async fn generic_text<N: AsRef<str> + Sync>(locks: &Locks<Sqlite>, name: &N) -> Answer<()> {
    under(locks, name.as_ref()).await;
    Ok(())
}

#[distributed_lock(format_args!("{}-{name}", 1))]
async fn generic_display<N: std::fmt::Display + Sync>(locks: &Locks<Sqlite>, name: &N) -> Answer<()> {
    under(locks, &format!("1-{name}")).await;
    Ok(())
}

async fn names_that_are_no_strings() {
    with_locks(|locks| async move {
        assert_eq!(shown_name(&locks, OrderId(7)).await?.0, 7);
        number_as_name(&locks, 41).await?;
        text_that_is_not_shown(&locks, &Slug("slug")).await?;
        part_as_name(&locks, "abcd").await?;
        generic_text(&locks, &Slug("generic")).await?;
        generic_display(&locks, &7).await?;
        Ok(())
    })
    .await;
}
