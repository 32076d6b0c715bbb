//! The attribute macro of [lock-db](https://docs.rs/lock-db): `#[distributed_lock("name")]`.
//!
//! Use it as `lock_db::distributed_lock`. The generated code calls into `lock_db`.

#![forbid(unsafe_code)]

mod args;
mod expand;

use proc_macro::TokenStream;

/// Runs an `async fn` under a distributed lock.
///
/// The lock is taken before the body and released after it, however the body ends: with a value,
/// with an error, with a panic, or because the caller drops the future. **The body never runs
/// without the lock.**
///
/// ```
/// use lock_db::distributed_lock;
///
/// /// Payments of one order run one at a time, in all processes together.
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
/// The function must return a `Result<_, E>` where `E: From<lock_db::Error>`. `Box<dyn Error>`,
/// `anyhow::Error` and `lock_db::Error` itself are such types. The error reports that the lock was
/// not acquired, or was lost.
///
/// # The name
///
/// The name comes first. It is evaluated once, before the body.
///
/// ```
/// # use lock_db::{Error, distributed_lock};
/// // A literal, which is checked at compile time.
/// #[distributed_lock("nightly-report")]
/// # async fn fixed() -> Result<(), Error> { Ok(()) }
///
/// // Arguments in braces, as in `format!`. `{{` is a brace.
/// #[distributed_lock("order:{order_id}:{line:03}")]
/// # async fn captures(order_id: i64, line: u8) -> Result<(), Error> { Ok(()) }
///
/// // Braces take only the names of arguments. `format!` takes any expression.
/// #[distributed_lock(format!("user:{}", user.id))]
/// # async fn formatted(user: User) -> Result<(), Error> { Ok(()) }
///
/// // Any expression that is `AsRef<str>` …
/// #[distributed_lock(user.lock_name())]
/// # async fn text(user: User) -> Result<(), Error> { Ok(()) }
///
/// // … or implements `Display`.
/// #[distributed_lock(user.id)]
/// # async fn shown(user: User) -> Result<(), Error> { Ok(()) }
/// # struct User { id: u64 }
/// # impl User { fn lock_name(&self) -> &str { "a" } }
/// ```
///
/// A name has 1 to 255 bytes of UTF-8 without NUL, and is compared byte by byte. A name that can't
/// be checked at compile time is checked before any SQL is sent: the function then returns
/// `Error::InvalidName`.
///
/// Put text from users at the end of a name, after a fixed prefix. `"{a}:{b}"` is the same name for
/// `("x:y", "z")` and `("x", "y:z")`.
///
/// # The options
///
/// | option | value | default |
/// |---|---|---|
/// | [`ttl`](#ttl-and-wait) | a duration | that of the `Locks`: 30 s |
/// | [`wait`](#ttl-and-wait) | a duration | that of the `Locks`: 30 s |
/// | [`at_least`](#at_least) | a duration | zero |
/// | [`at_most`](#at_most) | a duration | no limit |
/// | [`skip`](#skip) | none | fails after the wait |
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
/// A string literal is parsed at compile time. It has one or more numbers, each with a unit (`ms`,
/// `s`, `m`, `h`, `days`). Anything else is an expression of type `std::time::Duration`.
///
/// `ttl` is how long the lock outlives a process that is gone: 50 ms to 365 days. The lock is
/// renewed, so the TTL need not cover the body. A row lock has no TTL: it ends with its
/// transaction.
///
/// `wait` is how long the call may wait for the lock in total. After that it returns
/// `Error::Timeout`, which names the holder. `"0s"` asks once and fails at once.
///
/// ## `at_least`
///
/// ```
/// # use lock_db::{Error, distributed_lock};
/// /// Every instance starts it at three o'clock. It runs once, even if it takes a second and the
/// /// clocks differ by two.
/// #[distributed_lock("nightly-report", at_least = "10m", skip)]
/// async fn report() -> Result<(), Error> {
///     // …
/// #   Ok(())
/// }
/// ```
///
/// The lock stays taken for this time after the grant, even if the body ends earlier, with a value
/// or with an error. The function does not wait for that: the release writes the end of the time
/// into the row, by the database's clock. The lock therefore stays taken even if this process ends.
/// If a process dies before the body has ended, the lock is free after its `ttl`, as usual, because
/// the work was not completed.
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
/// The call may have the lock for at most this time, counted from the grant: 50 ms to 365 days, and
/// at least `at_least`. Then the lock is released, the future of the body is dropped at its current
/// `.await`, and the function returns `Error::Lost` (`Loss::HeldTooLong`). A nested call keeps the
/// limit of the lock that it enters. See `InsertLock::at_most`.
///
/// ## `skip`
///
/// ```
/// # use lock_db::{Error, distributed_lock};
/// /// `Ok(None)`: the lock is held elsewhere.
/// #[distributed_lock("cleanup", skip)]
/// async fn clean_up() -> Result<Option<u64>, Error> {
///     Ok(Some(12))
/// }
///
/// /// Waits up to 5 s, then returns `Ok(())` without running the body.
/// #[distributed_lock("cleanup", skip, wait = "5s")]
/// async fn clean_up_somewhere() -> Result<(), Error> {
///     Ok(())
/// }
/// ```
///
/// For work that another call is already doing. When the lock is held, the body does not run and
/// the return value says so: `Ok(None)` for `Result<Option<_>, E>`, `Ok(())` for `Result<(), E>`,
/// or the value of an enum of yours that implements `lock_db::Skippable`. Without a `wait` the call
/// asks once.
///
/// Only a lock that is *held* is skipped. A database that can't be reached and a pool without a
/// free connection are errors, as usual.
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
/// `insert` takes an insert lock: a lease, which holds no connection and is renewed while the body
/// runs. `row` takes a row lock, which a transaction holds: use it for short critical sections. A
/// name is used with one of them only.
///
/// The transaction of a row lock is committed after `Ok`, and rolled back after `Err`, a panic or a
/// dropped call. Nested calls share it: see [below](#calls-inside-of-a-row-lock).
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
///     sqlx::query("UPDATE stock SET left_over = 100 WHERE sku = $1")
///         .bind(sku)
///         .execute(&mut *transaction)
///         .await?;
///     // Commits only if the lease is still held. The lock is released after that.
///     transaction.commit().await?;
///     Ok(())
/// }
///
/// /// `guard` is a `&mut RowGuard<Postgres>`.
/// #[distributed_lock("stock:{sku}", mode = row, lease = guard, locks = locks)]
/// async fn sell(locks: &Locks<Postgres>, sku: i64) -> Result<(), Box<dyn std::error::Error>> {
///     sqlx::query("UPDATE stock SET left_over = left_over - 1 WHERE sku = $1")
///         .bind(sku)
///         .execute(&mut **guard)
///         .await?;
///     // The transaction is committed after `Ok`, and rolled back after `Err`.
///     Ok(())
/// }
/// ```
///
/// With an insert lock, the body gets the lease: for the fencing token, and for transactions that
/// commit only while the lease is held. Without `locks = …` the lease is a `&AmbientLease`, which
/// takes the database when it begins a transaction: `lease.begin::<Postgres>()`.
///
/// With a row lock, the body gets the guard of its transaction. Functions that the body calls get
/// the guard as an argument and take it by [`tx`](#tx-the-callers-transaction). A nested function
/// that binds the same guard returns `Error::Reentry`.
///
/// ```
/// # use lock_db::{Error, Locks, RowGuard, distributed_lock};
/// # use sqlx::Postgres;
/// # #[distributed_lock("stock:{sku}", mode = row, lease = guard, locks = locks)]
/// # async fn order(locks: &Locks<Postgres>, sku: i64) -> Result<(), Error> {
/// #     take_out(locks, guard, sku).await
/// # }
/// #[distributed_lock("stock:{sku}", mode = row, tx = guard, locks = locks)]
/// async fn take_out(
///     locks: &Locks<Postgres>,
///     guard: &mut RowGuard<Postgres>,
///     sku: i64,
/// ) -> Result<(), Error> {
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
/// Takes the row lock in this transaction. It uses no second connection, and the lock ends when the
/// caller commits or rolls back, which may be after the function has returned.
///
/// The expression may be one of these:
///
/// - a `&mut Transaction`, a `&mut RowGuard` or a `&mut GuardedTransaction`;
/// - one of them by value (`mut tx: Transaction`), which the body commits;
/// - a `&mut` connection that is in a transaction.
///
/// In a function that is generic over the database, it is a `&mut DB::Connection` where `DB:
/// LockDatabase`, or a `&mut C` where `C: sqlx::Connection, C::Database: LockDatabase<Connection =
/// C>`.
///
/// A guard of the same lock enters the lock again, in its own transaction, without waiting.
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
/// The `Locks` to use: a `Locks`, a reference to one, or an `Arc` of one. Without this option the
/// function uses the `Locks` of the innermost `locks.scope(..)` around the call. If there is none,
/// it uses the one that was installed for the process by `locks.install()`. If there is none
/// either, it returns `Error::NotInstalled`. A spawned task inherits no scope.
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
/// Nested calls on the same name of the same `Locks` enter the lock again, one at a time. This is a
/// count in memory, without any statement.
///
/// With `reentrant = false` a nested call fails at once with `Error::Reentry`, because it would
/// otherwise wait for itself. This applies if either the outer or the inner function has the
/// option. Concurrent calls, as in `join!`, still run one after the other.
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
/// The path of `lock_db`, for crates that reach it by another path.
///
/// # Lock and transaction
///
/// A common mistake is to unlock before the commit. Between the two, the next holder reads the old
/// data, and one of the two changes is lost.
///
/// ```text
/// wrong:  lock → BEGIN → read, write → unlock ─────→ COMMIT
///                                        └ next holder: lock → BEGIN → reads the old data
/// here:   lock → BEGIN → read, write → COMMIT → unlock
/// ```
///
/// It happens when one attribute takes the lock, another one opens the transaction, and their order
/// is wrong. Here the lock encloses the body, and no attribute opens a transaction, so this order
/// can't be wrong:
///
/// - A transaction that the body opens and commits ends before the lock is released.
/// - A guarded transaction (`lease.begin()`) that outlives the body, for example because the body
///   returns it, keeps the lock until it has ended. It can't be committed after the lock was lost.
/// - A row lock is released *by* the commit; with `tx`, by the commit of the caller.
///
/// Two cases remain that the lock does not wait for: a plain `pool.begin()` whose transaction
/// leaves the body, and `tokio::spawn`.
///
/// # Calls inside of a row lock
///
/// Functions with `mode = row` and without `tx` that enter the same lock share one transaction.
/// These are nested calls, and calls in tasks that got the `ReentryContext::current()` of the
/// holder. The transaction is committed only if **all of them return `Ok`**. It is rolled back by
/// an `Err` that the caller ignores, by a panic that the caller catches, and by a call that the
/// caller drops (by a timeout, or in `select!`).
///
/// ```
/// # use lock_db::{Error, Locks, distributed_lock};
/// # use sqlx::Postgres;
/// #[distributed_lock("stock:{sku}", mode = row, lease = guard, locks = locks)]
/// async fn take_out(locks: &Locks<Postgres>, sku: i64) -> Result<(), Box<dyn std::error::Error>> {
///     sqlx::query("UPDATE stock SET left_over = left_over - 1 WHERE sku = $1")
///         .bind(sku)
///         .execute(&mut **guard)
///         .await?;
///     Err("sold out".into())
/// }
///
/// #[distributed_lock("stock:{sku}", mode = row, locks = locks)]
/// async fn order(locks: &Locks<Postgres>, sku: i64) -> Result<(), Box<dyn std::error::Error>> {
///     let _ignored = take_out(locks, sku).await;
///     // The caller gets `Error::RolledBack`.
///     Ok(())
/// }
/// ```
///
/// The outermost function returns when the nested calls have ended. It returns its own `Err`
/// unchanged. It returns its `Ok` only if the transaction was committed, and otherwise
/// `Error::RolledBack` or the error of the commit. The same applies to a nested call that ends
/// last, after the body of the outermost function. The result of any other nested call is not
/// final; its `Ok` becomes `Error::RolledBack` when another call has already failed.
///
/// A call whose body did not run (skipped, `Timeout`, `Reentry`) does not count. For a step that
/// may fail without consequences, return the failure within `Ok`.
///
/// # When the lock is lost
///
/// An insert lock is lost when it could not be renewed for its `ttl`: the database could not be
/// reached, or this process was paused. The future of the body is then dropped at its current
/// `.await`, and the function returns `Error::Lost`. This neither undoes what the body has done nor
/// stops tasks that it spawned. A body that completes before the loss is noticed also returns
/// `Lost`, because it may have run together with another holder.
///
/// A row lock is lost with its transaction. Without `tx`, the function notices it when it commits
/// the transaction of the lock after the body, and returns that error. With `tx`, the caller's own
/// statements fail.
///
/// # Supported functions
///
/// - Free functions and methods with any receiver, generic or not, with borrowed arguments and
///   return values, and with `impl Trait`.
/// - Methods in traits and their implementations.
/// - Functions that only return `async move { … }` or `Box::pin(async move { … })`.
///
/// Recursion needs no `Box::pin`.
///
/// # Generated code
///
/// The signature stays the same. The function `pay` at the top becomes, in essence:
///
/// ```text
/// async fn pay(order_id: i64) -> Result<Receipt, PayError> {
///     let name = format!("order:{order_id}");
///     let lock = ambient_locks().insert_lock(name).ttl(…).wait(…);
///     // Takes the lock, or enters it again. Runs the body, and drops it when the lock is lost.
///     // Releases the lock, and waits for the release.
///     run(lock, async move { /* the body; `?` and `return` end here */ }, PayError::from).await
/// }
/// ```
///
/// The body is boxed, so locked functions that call each other do not grow with each call. The
/// future is `Send` if the body and its return value are: the result is kept while the lock is
/// released.
///
/// # Other attributes
///
/// Attributes are applied from the top down, and the topmost one ends up innermost.
///
/// ```
/// # use lock_db::{Error, distributed_lock};
/// // The span includes the wait for the lock.
/// #[distributed_lock("order:{order_id}")]
/// #[tracing::instrument]
/// async fn pay(order_id: i64) -> Result<(), Error> { Ok(()) }
///
/// // The span begins when the lock is held.
/// #[tracing::instrument]
/// #[distributed_lock("order:{order_id}")]
/// async fn refund(order_id: i64) -> Result<(), Error> { Ok(()) }
/// ```
///
/// Two locks on one function are an exception. They are taken **from the top down**, and released
/// in the reverse order, also when the attribute is renamed (`use lock_db::distributed_lock as
/// locked`). Write them in the same order everywhere.
///
/// ```
/// # use lock_db::{Error, distributed_lock};
/// #[distributed_lock("account:{from}")]       // first
/// #[distributed_lock("ledger", wait = "1s")]  // then this one
/// async fn transfer(from: i64) -> Result<(), Error> { Ok(()) }
/// ```
///
/// With `#[async_trait]` on the trait or `impl`, put `#[distributed_lock]` on the methods. If
/// `#[tracing::instrument]` is above it there, the name can't use the parts of an argument that is
/// destructured by a pattern.
///
/// `#[tokio::test]` and `#[tokio::main]` may be above or below. Other attributes that turn an
/// `async fn` into an ordinary function go below.
///
/// # Coming from other libraries
///
/// - **ShedLock** `@SchedulerLock(lockAtMostFor = "10m")` has to cover the longest run, unless a
///   keep-alive provider is set up. A run that takes longer continues beside the next one. Here the
///   `ttl` is renewed, so it only says how long a crash blocks others. On loss the body is stopped,
///   and its guarded transactions can't commit.
/// - **ShedLock** `lockAtLeastFor` is `at_least`, always by the database's clock.
/// - **ShedLock** skips silently. Here a call waits by default; `skip` skips, and the return type
///   says so. ShedLock refuses a method with a primitive return type when it is called. Here a
///   return type that can't express a skipped call does not compile.
/// - **Lock4j** `@Lock4j(keys = {"#user.id", "#order.id"}, expire, acquireTimeout)` joins keys by
///   dots, so `("a.b", "c")` is the same as `("a", "b.c")`. Here the name is written out,
///   `"{user}:{order}"`, with a separator of your choice, and checked by the compiler.
/// - **Klock** by default runs the body without the lock when the wait is over. There is no such
///   option here.
/// - **Redisson** renews a lock only when no lease time is given. Here `ttl` does not turn the
///   renewal off.
/// - **Redisson** identifies the holder by its thread, which does not work for asynchronous code.
///   Here the place of the call counts: nested calls enter again, concurrent calls take turns, and
///   spawned tasks are separate.
/// - **`@Transactional`** with a lock aspect: the order of the aspects decides which is outside,
///   and the wrong order unlocks before the commit. Here the lock is outside, or the transaction is
///   itself the lock: see [above](#lock-and-transaction).
/// - **Self-invocation** (`this.pay()`) bypasses a proxy, and with it the lock. Here there is no
///   proxy: every call takes the lock.
/// - **A lock and its data in two systems**: the lock can be lost unnoticed. Here a holder that
///   lost its lock can't commit.
#[proc_macro_attribute]
pub fn distributed_lock(arguments: TokenStream, item: TokenStream) -> TokenStream {
    expand::expand(arguments.into(), &item.into()).into()
}
