//! The attribute macro of [lock-db](https://docs.rs/lock-db): `#[distributed_lock("name")]`.
//!
//! Use it as `lock_db::distributed_lock`; the code that it writes calls into `lock_db`.

#![forbid(unsafe_code)]

mod args;
mod expand;

use proc_macro::TokenStream;

/// Runs an `async fn` under a distributed lock.
///
/// The lock is taken before the body and released after it, whatever comes of it: a value, an error, a panic, or a caller
/// that drops the future. When there is no lock, the body does not run and the function returns the error.
///
/// The examples on this page are not compiled, because this crate comes before `lock_db`; those in the documentation of
/// `lock_db` are.
///
/// ```text
/// use lock_db::distributed_lock;
///
/// #[distributed_lock("order:{order_id}", ttl = "30s", wait = "5s")]
/// async fn pay(order_id: i64) -> Result<Receipt, PayError> {
///     // …
/// }
///
/// impl From<lock_db::Error> for PayError { … }
/// ```
///
/// The function must return a `Result<_, E>` where `E: From<lock_db::Error>`: that is where it says that it did not get
/// the lock in time, or lost it.
///
/// # The name
///
/// Comes first. It is worked out once, before the body.
///
/// ```text
/// #[distributed_lock("nightly-report")]               // checked while compiling
/// #[distributed_lock("order:{order_id}:{line:03}")]   // arguments in braces, as in `format!`; `{{` is a brace
/// #[distributed_lock(order.lock_name())]              // any expression that is `AsRef<str>`
/// #[distributed_lock(format!("user:{}", self.id))]    // braces take only the names of arguments: here is more
/// ```
///
/// A name has 1 to 255 bytes of UTF-8 without NUL. What can't be checked while compiling is checked before any SQL:
/// the function then returns `lock_db::Error::InvalidName`.
///
/// # The options
///
/// | option | value | when it is left out |
/// |---|---|---|
/// | [`mode`](#mode) | `insert`, `row` | `insert` |
/// | [`ttl`](#ttl-and-wait) | a duration | the default of the `Locks` |
/// | [`wait`](#ttl-and-wait) | a duration | the default of the `Locks` |
/// | [`locks`](#locks) | an expression | the ambient `Locks` |
/// | [`tx`](#tx) | an expression | a transaction of its own |
/// | [`crate`](#crate) | a path | `::lock_db` |
///
/// ## `mode`
///
/// ```text
/// #[distributed_lock("nightly-report", mode = insert)]
/// #[distributed_lock("stock:{sku}", mode = row)]
/// ```
///
/// `insert` takes an insert lock: a lease, which holds no connection and is renewed while the body runs. `row` takes a row
/// lock, which is held by a transaction: for short critical sections. A name is used with one of them only.
///
/// ## `ttl` and `wait`
///
/// ```text
/// #[distributed_lock("order:{order_id}", ttl = "1m 30s", wait = "500ms")]
/// #[distributed_lock("order:{order_id}", ttl = self.ttl, wait = Duration::ZERO)]
/// ```
///
/// A text is read while compiling: a number and a unit, or several of them (`ms`, `s`, `m`, `h`, `days`). Anything else is
/// an expression of type `std::time::Duration`.
///
/// `ttl` is how long the lock outlives a process that is gone: 50 ms to 365 days. It is renewed, so it need not
/// cover the body. A row lock has none: it ends with its transaction.
///
/// `wait` is how long the call may wait for the lock, all in all; `"0s"` asks once. After it comes
/// `lock_db::Error::Timeout`.
///
/// ## `locks`
///
/// ```text
/// #[distributed_lock("order:{order_id}", locks = self.locks)]
/// async fn pay(&self, order_id: i64) -> Result<Receipt, PayError>
/// ```
///
/// Which `Locks` to use: a `Locks`, a reference to one, or an `Arc` of one. Without it the function uses that of the
/// innermost `locks.scope(..)` around the call, else the one that the process has installed by `locks.install()`, else it
/// returns `lock_db::Error::NotInstalled`.
///
/// ## `tx`
///
/// ```text
/// #[distributed_lock("stock:{sku}", mode = row, tx = tx)]
/// async fn sell(tx: &mut Transaction<'_, Postgres>, sku: i64) -> Result<(), SellError>
/// ```
///
/// Takes the row lock in this transaction: no second connection, and the lock ends when the caller commits or rolls
/// back, which may be after the function has returned. It may be a `&mut Transaction`, a `mut tx: Transaction` that the
/// body commits, or a `&mut` connection that is in a transaction.
///
/// ## `crate`
///
/// ```text
/// #[distributed_lock("order:{order_id}", crate = my_framework::lock_db)]
/// ```
///
/// Where `lock_db` is, for crates that know it by another path.
///
/// # When the lock is lost
///
/// An insert lock is lost when it could not be renewed for its `ttl`: the database was away, or this process stood still.
/// The body's future is then dropped at the `.await` where it stands, and the function returns
/// `lock_db::Error::Lost`. That does not undo what the body has done, nor stop tasks that it spawned. A body that is
/// through before the loss is noticed returns `Lost`, too, because it may have run together with another holder.
///
/// A row lock is lost with its transaction. Without `tx` the function finds out when it commits the lock's own
/// transaction after the body, and returns that error; with `tx` the caller's own statements fail.
///
/// # Where it may stand
///
/// On free functions and on methods with any receiver, generic or not, with borrowed arguments and returns and with
/// `impl Trait`; in traits and their implementations; on a function that does nothing but return
/// `Box::pin(async move { … })`. Recursion needs no `Box::pin`.
///
/// The body is put into a box of its own, so locked functions that call each other do not grow with each call. The future
/// is `Send` when the body is and what it returns is: the result is kept while the lock is released.
///
/// # Other attributes
///
/// Attributes are applied from the top, and the one on top ends up innermost.
///
/// ```text
/// #[distributed_lock("order:{order_id}")]
/// #[tracing::instrument]                      // the span includes the wait for the lock
/// async fn pay(order_id: i64) -> Result<Receipt, PayError>
///
/// #[tracing::instrument]                      // the span begins when the lock is held
/// #[distributed_lock("order:{order_id}")]
/// async fn pay(order_id: i64) -> Result<Receipt, PayError>
/// ```
///
/// Two locks on one function are taken from the lowest to the top one, and released the other way round: write them in
/// the same order everywhere.
///
/// With `#[async_trait]` on the trait or `impl`, put `#[distributed_lock]` on the methods. When `#[tracing::instrument]`
/// stands above it there, the name can't use the parts of an argument that is taken apart by a pattern.
///
/// Attributes such as `#[tokio::main]` and `#[tokio::test]` make an ordinary function of an `async fn`: put
/// `#[distributed_lock]` above them.
#[proc_macro_attribute]
pub fn distributed_lock(arguments: TokenStream, item: TokenStream) -> TokenStream {
    expand::expand(arguments.into(), &item.into()).into()
}
