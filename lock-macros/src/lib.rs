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
/// that drops the future. **The body never runs without the lock.**
///
/// ```
/// use lock_db::distributed_lock;
///
/// /// One order is paid once at a time, in however many processes.
/// #[distributed_lock("order:{order_id}", ttl = "30s", wait = "5s")]
/// async fn pay(order_id: i64) -> Result<Receipt, PayError> {
///     // …
/// #   Ok(Receipt)
/// }
/// # struct Receipt;
///
/// #[derive(Debug)]
/// enum PayError {
///     NoLock(lock_db::Error),
///     // …
/// }
///
/// impl From<lock_db::Error> for PayError {
///     fn from(error: lock_db::Error) -> Self {
///         Self::NoLock(error)
///     }
/// }
/// ```
///
/// The function must return a `Result<_, E>` where `E: From<lock_db::Error>` (`Box<dyn Error>`, `anyhow::Error` and
/// `lock_db::Error` itself are such): that is where it says that it did not get the lock, or lost it.
///
/// # The name
///
/// Comes first. It is worked out once, before the body.
///
/// ```
/// # use lock_db::{Error, distributed_lock};
/// #[distributed_lock("nightly-report")]                   // checked while compiling
/// # async fn fixed() -> Result<(), Error> { Ok(()) }
/// #[distributed_lock("order:{order_id}:{line:03}")]       // arguments in braces, as in `format!`; `{{` is a brace
/// # async fn captures(order_id: i64, line: u8) -> Result<(), Error> { Ok(()) }
/// #[distributed_lock(format!("user:{}", user.id))]        // braces take only the names of arguments: here is more
/// # async fn formatted(user: User) -> Result<(), Error> { Ok(()) }
/// #[distributed_lock(user.lock_name())]                   // any expression that is `AsRef<str>`
/// # async fn text(user: User) -> Result<(), Error> { Ok(()) }
/// #[distributed_lock(user.id)]                            // … or shown by `Display`
/// # async fn shown(user: User) -> Result<(), Error> { Ok(()) }
/// # struct User { id: u64 }
/// # impl User { fn lock_name(&self) -> &str { "a" } }
/// ```
///
/// A name has 1 to 255 bytes of UTF-8 without NUL, compared byte by byte. What can't be checked while compiling is checked
/// before any SQL: the function then returns `Error::InvalidName`. Text from users belongs at the end of a name, behind
/// what tells its kind: `"{a}:{b}"` is the same name for `("x:y", "z")` and `("x", "y:z")`.
///
/// # The options
///
/// | option | value | when it is left out |
/// |---|---|---|
/// | [`ttl`](#ttl-and-wait) | a duration | the default of the `Locks`: 30 s |
/// | [`wait`](#ttl-and-wait) | a duration | the default of the `Locks`: 30 s |
/// | [`at_least`](#at_least) | a duration | zero |
/// | [`at_most`](#at_most) | a duration | no limit |
/// | [`skip`](#skip) | none | after the wait it fails |
/// | [`mode`](#mode) | `insert`, `row` | `insert` |
/// | [`lease`](#lease-the-guard-in-the-body) | a name | the body does not see the guard |
/// | [`tx`](#tx-the-callers-transaction) | an expression | a transaction of its own |
/// | [`locks`](#locks) | an expression | the ambient `Locks` |
/// | [`reentrant`](#reentrant) | `true`, `false` | `true` |
/// | [`crate`](#crate) | a path | `::lock_db` |
///
/// ## `ttl` and `wait`
///
/// ```
/// # use lock_db::{Error, distributed_lock};
/// # use std::time::Duration;
/// #[distributed_lock("order:{order_id}", ttl = "1m 30s", wait = "500ms")]
/// # async fn texts(order_id: i64) -> Result<(), Error> { Ok(()) }
/// #[distributed_lock("order:{order_id}", ttl = PATIENCE * 2, wait = Duration::ZERO)]
/// # async fn expressions(order_id: i64) -> Result<(), Error> { Ok(()) }
/// # const PATIENCE: Duration = Duration::from_secs(5);
/// ```
///
/// A text is read while compiling: a number and a unit, or several of them (`ms`, `s`, `m`, `h`, `days`). Anything else is
/// an expression of type `std::time::Duration`.
///
/// `ttl` is how long the lock outlives a process that is gone: 50 ms to 365 days. It is renewed, so it need not cover the
/// body. A row lock has none: it ends with its transaction.
///
/// `wait` is how long the call may wait for the lock, all in all. After it comes `Error::Timeout`, which says who has the
/// lock. `"0s"` asks once and fails at once.
///
/// ## `at_least`
///
/// ```
/// # use lock_db::{Error, distributed_lock};
/// /// Every instance starts it at three o'clock; it runs once, also when it takes a second and the clocks differ by two.
/// #[distributed_lock("nightly-report", at_least = "10m", skip)]
/// async fn report() -> Result<(), Error> {
///     // …
/// #   Ok(())
/// }
/// ```
///
/// For how long after the start nobody else gets the lock, even if the body ends before, with a value or with an error.
/// The function does not wait for that: the release writes the moment, by the database's clock, into the row, so that it
/// holds whatever becomes of this process. A process that dies before the body has ended leaves the lock free after its
/// `ttl`, as ever: the work was not done.
///
/// ## `at_most`
///
/// ```
/// # use lock_db::{Error, distributed_lock};
/// /// An import that hangs is stopped after an hour, and the next one may run.
/// #[distributed_lock("import", at_most = "1h")]
/// async fn import() -> Result<(), Error> {
///     // …
/// #   Ok(())
/// }
/// ```
///
/// For how long the call may have the lock, counted from the grant: 50 ms to 365 days, and no less than `at_least`. Then
/// the lock is released, the body's future is dropped at the `.await` where it stands, and the function returns
/// `Error::Lost` (`Loss::HeldTooLong`). A nested call keeps to the time of the lock that it enters. See
/// `InsertLock::at_most`.
///
/// ## `skip`
///
/// ```
/// # use lock_db::{Error, distributed_lock};
/// /// `Ok(None)`: somebody else is at it.
/// #[distributed_lock("cleanup", skip)]
/// async fn clean_up() -> Result<Option<u64>, Error> {
///     Ok(Some(12))
/// }
///
/// /// Waits for five seconds before it gives up quietly. Only that somebody does it matters here.
/// #[distributed_lock("cleanup", skip, wait = "5s")]
/// async fn see_to_it() -> Result<(), Error> {
///     Ok(())
/// }
/// ```
///
/// For work that somebody else is doing already. When the lock is held, the body does not run and the return value says so:
/// `Ok(None)` for `Result<Option<_>, E>`, `Ok(())` for `Result<(), E>`, or what an enum of your own has for it
/// (`lock_db::Skippable`). Without a `wait` it asks once. Only a lock that is *held* is skipped: a database that is away, or
/// a pool without connections, is an error as ever.
///
/// ## `mode`
///
/// ```
/// # use lock_db::{Error, distributed_lock};
/// #[distributed_lock("nightly-report", mode = insert)]
/// # async fn insert() -> Result<(), Error> { Ok(()) }
/// #[distributed_lock("stock:{sku}", mode = row)]
/// # async fn row(sku: i64) -> Result<(), Error> { Ok(()) }
/// ```
///
/// `insert` takes an insert lock: a lease, which holds no connection and is renewed while the body runs. `row` takes a row
/// lock, which is held by a transaction: for short critical sections. A name is used with one of them only.
///
/// The transaction of a row lock is committed after `Ok`, and rolled back after `Err`, a panic or a dropped call. Calls
/// inside share it: see [below](#calls-inside-of-a-row-lock).
///
/// ## `lease`: the guard in the body
///
/// ```
/// # use lock_db::{Error, Locks, distributed_lock};
/// # use sqlx::Postgres;
/// /// `lease` is a `&Lease<Postgres>`.
/// #[distributed_lock("stock:{sku}", lease = lease, locks = locks)]
/// async fn restock(locks: &Locks<Postgres>, sku: i64) -> Result<(), Box<dyn std::error::Error>> {
///     let mut transaction = lease.begin().await?;
///     sqlx::query("UPDATE stock SET left_over = 100 WHERE sku = $1").bind(sku).execute(&mut *transaction).await?;
///     transaction.commit().await?;            // only if the lease is still ours; the lock is released after it
///     Ok(())
/// }
///
/// /// `guard` is a `&mut RowGuard<Postgres>`.
/// #[distributed_lock("stock:{sku}", mode = row, lease = guard, locks = locks)]
/// async fn sell(locks: &Locks<Postgres>, sku: i64) -> Result<(), Box<dyn std::error::Error>> {
///     sqlx::query("UPDATE stock SET left_over = left_over - 1 WHERE sku = $1").bind(sku).execute(&mut **guard).await?;
///     Ok(())                                  // the transaction is committed after `Ok`, rolled back after `Err`
/// }
/// ```
///
/// An insert lock binds its lease: for the fencing token, and for transactions that commit only while the lease is ours.
/// Without `locks = …` it is a `&AmbientLease`, which is told the database when it begins one: `lease.begin::<Postgres>()`.
///
/// A row lock binds the guard of its transaction. Functions that are called from the body get the guard as an argument and
/// take it by [`tx`](#tx-the-callers-transaction); a nested function that binds the same guard gets `Error::Reentry`.
///
/// ```
/// # use lock_db::{Error, Locks, RowGuard, distributed_lock};
/// # use sqlx::Postgres;
/// # #[distributed_lock("stock:{sku}", mode = row, lease = guard, locks = locks)]
/// # async fn order(locks: &Locks<Postgres>, sku: i64) -> Result<(), Error> { take_out(locks, guard, sku).await }
/// #[distributed_lock("stock:{sku}", mode = row, tx = guard, locks = locks)]
/// async fn take_out(locks: &Locks<Postgres>, guard: &mut RowGuard<Postgres>, sku: i64) -> Result<(), Error> {
///     // …
/// #   Ok(())
/// }
/// ```
///
/// ## `tx`: the caller's transaction
///
/// ```
/// # use lock_db::{Error, distributed_lock};
/// # use sqlx::{Postgres, Transaction};
/// #[distributed_lock("stock:{sku}", mode = row, tx = tx)]
/// async fn sell(tx: &mut Transaction<'_, Postgres>, sku: i64) -> Result<(), Error> {
///     // …
/// #   Ok(())
/// }
/// ```
///
/// Takes the row lock in this transaction: no second connection, and the lock ends when the caller commits or rolls
/// back, which may be after the function has returned. It may be a `&mut Transaction`, a `&mut RowGuard`, a
/// `&mut GuardedTransaction`, one of them by value (`mut tx: Transaction`) that the body commits, or a `&mut` connection
/// that is in a transaction. In a function that is generic over the database that is a `&mut DB::Connection` where
/// `DB: LockDatabase`, or a `&mut C` where `C: sqlx::Connection, C::Database: LockDatabase<Connection = C>`.
///
/// A guard of the same lock enters it again, in its own transaction: nothing is waited for.
///
/// ## `locks`
///
/// ```
/// # use lock_db::{Error, Locks, distributed_lock};
/// # struct Shop { locks: Locks<sqlx::Postgres> }
/// # impl Shop {
/// #[distributed_lock("order:{order_id}", locks = self.locks)]
/// async fn pay(&self, order_id: i64) -> Result<(), Error> {
///     // …
/// #   Ok(())
/// }
/// # }
/// ```
///
/// Which `Locks` to use: a `Locks`, a reference to one, or an `Arc` of one. Without it the function uses that of the
/// innermost `locks.scope(..)` around the call, else the one that the process has installed by `locks.install()`, else it
/// returns `Error::NotInstalled`. A spawned task inherits no scope.
///
/// ## `reentrant`
///
/// ```
/// # use lock_db::{Error, distributed_lock};
/// #[distributed_lock("ledger", reentrant = false)]
/// async fn close_month() -> Result<(), Error> {
///     // …
/// #   Ok(())
/// }
/// ```
///
/// Nested calls on the same name of the same `Locks` enter the lock again: a count in memory, no statement, one at a time.
/// With `false` nobody is inside of this function twice: a nested call fails with `Error::Reentry` at once (it would
/// otherwise wait for itself), be the option on the outer function or on the inner one. Calls side by side, as in
/// `join!`, take turns as ever.
///
/// ## `crate`
///
/// ```
/// # mod my_framework { pub use ::lock_db; }
/// # use lock_db::Error;
/// use my_framework::lock_db::distributed_lock;
///
/// #[distributed_lock("order:{order_id}", crate = my_framework::lock_db)]
/// # async fn elsewhere(order_id: i64) -> Result<(), Error> { Ok(()) }
/// ```
///
/// Where `lock_db` is, for crates that know it by another path.
///
/// # Where the transaction lies
///
/// The classic mistake is to unlock before the commit: between the two, the next holder reads the old data, and one of the
/// two changes is lost.
///
/// ```text
/// wrong:  lock → BEGIN → read, write → unlock ─────→ COMMIT
///                                        └ next holder: lock → BEGIN → reads what is not committed yet
/// here:   lock → BEGIN → read, write → COMMIT → unlock
/// ```
///
/// It comes about where one attribute makes the lock, another one the transaction, and their order is wrong. Here the
/// lock encloses the body, and there is no attribute for the transaction, so that there is nothing to put in the wrong
/// order:
///
/// - A transaction that the body opens and commits is over before the lock is released.
/// - A guarded transaction (`lease.begin()`) that outlives the body, because it was returned, say, keeps the lock until it
///   has ended. And it can't be committed after the lock was lost.
/// - A row lock is released *by* the commit; with `tx` by the commit of the caller.
///
/// What is left is a plain `pool.begin()` whose transaction the body hands out, and `tokio::spawn`: neither is held up
/// by the lock.
///
/// # Calls inside of a row lock
///
/// Functions with `mode = row` and without `tx` that enter the same lock share one transaction: nested calls, and calls in
/// tasks that were handed `Owner::current()`. It is committed only if **all of them return `Ok`**. An `Err` that the caller
/// swallows, a panic that it catches, and a call that it drops (by a timeout, or in `select!`) roll it back.
///
/// ```
/// # use lock_db::{Error, Locks, distributed_lock};
/// # use sqlx::Postgres;
/// #[distributed_lock("stock:{sku}", mode = row, lease = guard, locks = locks)]
/// async fn take_out(locks: &Locks<Postgres>, sku: i64) -> Result<(), Box<dyn std::error::Error>> {
///     sqlx::query("UPDATE stock SET left_over = left_over - 1 WHERE sku = $1").bind(sku).execute(&mut **guard).await?;
///     Err("sold out".into())
/// }
///
/// #[distributed_lock("stock:{sku}", mode = row, locks = locks)]
/// async fn order(locks: &Locks<Postgres>, sku: i64) -> Result<(), Box<dyn std::error::Error>> {
///     let _swallowed = take_out(locks, sku).await;
///     Ok(())                                  // the caller gets `Error::RolledBack`
/// }
/// ```
///
/// The outermost function returns when the calls inside have ended: its own `Err` as it is; its `Ok` only if the
/// transaction was committed, and otherwise `Error::RolledBack`, or the error of the commit. So does a call inside that ends
/// last, after the body of the outermost function. The result of any other call inside is not final; its `Ok` becomes
/// `Error::RolledBack` when a call has failed already.
///
/// A call whose body did not run (skipped, `Timeout`, `Reentry`) does not count. For a step that may fail without
/// consequences, return the failure within `Ok`.
///
/// # When the lock is lost
///
/// An insert lock is lost when it could not be renewed for its `ttl`: the database was away, or this process stood still.
/// The body's future is then dropped at the `.await` where it stands, and the function returns
/// `Error::Lost`. That does not undo what the body has done, nor stop tasks that it spawned. A body that is
/// through before the loss is noticed returns `Lost`, too, because it may have run together with another holder.
///
/// A row lock is lost with its transaction. Without `tx` the function finds out when it commits the lock's own
/// transaction after the body, and returns that error; with `tx` the caller's own statements fail.
///
/// # Where it may stand
///
/// On free functions and on methods with any receiver, generic or not, with borrowed arguments and returns and with
/// `impl Trait`; in traits and their implementations; on a function that does nothing but return `async move { … }` or
/// `Box::pin(async move { … })`. Recursion needs no `Box::pin`.
///
/// # What it writes
///
/// The signature stays. Of the `pay` at the top becomes, in essence:
///
/// ```text
/// async fn pay(order_id: i64) -> Result<Receipt, PayError> {
///     let name = format!("order:{order_id}");
///     let lock = ambient_locks().insert_lock(name).ttl(…).wait(…);
///     // Takes the lock, or enters it again; runs the body, and drops it on loss; releases the lock, and waits for that.
///     run(lock, async move { /* the body as it was; `?` and `return` end here */ }, PayError::from).await
/// }
/// ```
///
/// The body is put into a box of its own, so locked functions that call each other do not grow with each call. The future
/// is `Send` when the body is and what it returns is: the result is kept while the lock is released.
///
/// # Other attributes
///
/// Attributes are applied from the top, and the one on top ends up innermost.
///
/// ```
/// # use lock_db::{Error, distributed_lock};
/// #[distributed_lock("order:{order_id}")]
/// #[tracing::instrument]                      // the span includes the wait for the lock
/// async fn pay(order_id: i64) -> Result<(), Error> { Ok(()) }
///
/// #[tracing::instrument]                      // the span begins when the lock is held
/// #[distributed_lock("order:{order_id}")]
/// async fn refund(order_id: i64) -> Result<(), Error> { Ok(()) }
/// ```
///
/// Two locks on one function are an exception: they are taken as they are read, **from the top down**, and released the
/// other way round, also where the attribute has another name (`use lock_db::distributed_lock as locked`). Write them in the
/// same order everywhere.
///
/// ```
/// # use lock_db::{Error, distributed_lock};
/// #[distributed_lock("account:{from}")]       // first
/// #[distributed_lock("ledger", wait = "1s")]  // then this one
/// async fn transfer(from: i64) -> Result<(), Error> { Ok(()) }
/// ```
///
/// With `#[async_trait]` on the trait or `impl`, put `#[distributed_lock]` on the methods. When `#[tracing::instrument]`
/// stands above it there, the name can't use the parts of an argument that is taken apart by a pattern.
///
/// `#[tokio::test]` and `#[tokio::main]` may stand above or below. Other attributes that make an ordinary function of an
/// `async fn` go below.
///
/// # Coming from elsewhere
///
/// | what people know | here |
/// |---|---|
/// | ShedLock `@SchedulerLock(lockAtMostFor = "10m")` has to cover the longest run (unless a keep-alive provider is set up); a run that takes longer goes on, together with the next one | `ttl` is renewed, so it says only how long a crash blocks others; on loss the body is stopped and its guarded transactions can't commit |
/// | ShedLock `lockAtLeastFor` | `at_least`: the same, and by the database's clock always |
/// | ShedLock skips, silently | waits by default; `skip` skips, and the return type says so |
/// | ShedLock: a method with a primitive return type is refused when it is called | a return type that can't say "skipped" does not compile |
/// | Lock4j `@Lock4j(keys = {"#user.id", "#order.id"}, expire, acquireTimeout)`: keys joined by dots, so that `("a.b", "c")` is `("a", "b.c")` | the name is written out: `"{user}:{order}"`, checked by the compiler, and the separator is yours |
/// | Klock: by default, when the wait is over, the body runs without the lock | there is no such option |
/// | Redisson's watchdog renews only when no lease time is given | `ttl` does not turn the renewal off |
/// | Redisson knows the holder by its thread, which is wrong as soon as the code is asynchronous | the holder is where the call stands: nested calls enter again, siblings take turns, spawned tasks are somebody else |
/// | `@Transactional` with a lock aspect: who is outside depends on the order of the aspects, and the wrong one unlocks before the commit | the lock is outside, or the transaction itself is the lock: see [above](#where-the-transaction-lies) |
/// | self-invocation (`this.pay()`) passes by the proxy, without the lock | there is no proxy: every call takes the lock |
/// | a lock and its data in two systems, between which the lock can be lost unseen | a holder that lost its lock can't commit |
#[proc_macro_attribute]
pub fn distributed_lock(arguments: TokenStream, item: TokenStream) -> TokenStream {
    expand::expand(arguments.into(), &item.into()).into()
}
