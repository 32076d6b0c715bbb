//! Distributed locks in the SQL database that a service already has: PostgreSQL, MySQL, MariaDB or
//! SQLite, through sqlx and tokio.
//!
//! Lock and data live in one database, so **a holder that lost its lock cannot commit**: not after a
//! pause, a partition or a clock that jumped.
//!
//! ```no_run
//! use lock_db::{Error, Locks, distributed_lock};
//! use sqlx::Postgres;
//!
//! /// Two of these for one order never run at the same time, in any number of processes.
//! #[distributed_lock("order:{order_id}", wait = "5s", lease = lease)]
//! async fn pay(order_id: i64) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//!     let mut transaction = lease.begin::<Postgres>().await?;
//!     sqlx::query("UPDATE orders SET paid = true WHERE id = $1")
//!         .bind(order_id)
//!         .execute(&mut *transaction)
//!         .await?;
//!     Ok(transaction.commit().await?)     // or `Error::Lost`, and nothing is written
//! }
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
//! let locks = Locks::new(sqlx::PgPool::connect("postgres://localhost/app").await?);
//! locks.migrate().await?;                 // creates the table `distributed_lock`
//! locks.install()?;                       // annotated functions use it from now on
//! pay(42).await?;
//! # Ok(())
//! # }
//! ```
//!
//! # Which lock
//!
//! - An **insert lock** ([`Locks::insert_lock`]) is a lease: a row of `distributed_lock` that is
//!   renewed in the background. It needs no connection while it is held. Use it for jobs, for work
//!   that is longer than one transaction, and behind PgBouncer. It is free one TTL after its holder
//!   is gone.
//! - A **row lock** ([`Locks::row_lock`]) is a locked row: it belongs to a transaction, its own or the
//!   caller's ([`RowLock::acquire_in`]), and ends with it. Use it for a short critical section inside
//!   one transaction.
//!
//! A name is used with one kind only. The other kind is [`Error::WrongKind`].
//!
//! # How to hold one
//!
//! | | |
//! |---|---|
//! | an async function | [`distributed_lock`] |
//! | a closure | [`InsertLock::run`] |
//! | a guard | [`InsertLock::acquire`], [`InsertLock::try_acquire`], [`RowLock::acquire`] |
//! | the caller's transaction | [`RowLock::acquire_in`], [`InsertLock::acquire_in`] |
//! | several at once | [`Locks::insert_locks`], [`Locks::row_locks`] |
//! | a database that is known at run time | [`AnyLocks`] |
//!
//! # What a lease protects
//!
//! A lease protects *work* as long as [`Lease::is_held`]. A process that is paused for longer than the
//! TTL has lost the lock before it knows. So write to this database in a transaction of
//! [`Lease::begin`], which commits only while the lease is held, and hand other systems the
//! [fencing token](Lease::fencing_token), so that they can refuse an older one.
//!
//! # Errors
//!
//! [`Error::is_retryable`] says whether the same call may succeed later; [`Error::is_commit_unknown`]
//! whether a transaction may have been committed. `Ok(None)`, and `Timeout` with
//! [`WaitingFor::Lock`], mean that the lock was seen to be held. Messages name the holder: they are for logs and operators, not for clients.
//!
//! # Cargo features
//!
//! - `postgres`, `mysql` (MySQL and MariaDB), `sqlite`: the drivers. None is on by default.
//! - `sqlite-unbundled`: instead of `sqlite`, for a program that enables `sqlite-unbundled` of sqlx to
//!   link the SQLite of the system.
//! - `macros` (default): the attribute [`distributed_lock`].
//! - `serde`: `serde::Serialize` for [`LockInfo`], [`CheckReport`], [`Health`] and their parts.
//! - `testing`: `lock_db::testing`, for `[dev-dependencies]`.
//! - `testing-without-locks`: `testing::without_locks`, for `[dev-dependencies]`.
//!
//! No TLS feature of sqlx is touched. One minor version of sqlx belongs to one minor version of this
//! crate; [`sqlx`] and [`chrono`] are re-exported.
#![forbid(unsafe_code)]
// Without a driver most of this crate is unused; it must still compile.
#![cfg_attr(not(any(feature = "postgres", feature = "mysql", feature = "_sqlite")), allow(dead_code))]

#[doc(hidden)]
#[allow(missing_docs, missing_debug_implementations, clippy::missing_errors_doc)]
pub mod __private;
mod backstop;
mod bounds;
mod clock;
mod connecting;
mod context;
mod database;
mod dropped_at_once;
mod error;
mod global;
mod hold_warning;
mod in_transaction;
mod info;
#[cfg(all(test, lock_db_shuttle))]
mod interleavings;
mod jitter;
mod keyed_queue;
mod lease;
mod locks;
mod managed_tx;
mod name;
mod options;
mod reentrancy;
mod row_lock;
mod runtime;
pub mod schema;
mod secret;
mod session;
mod skippable;
mod sync;
#[cfg(feature = "testing")]
mod test_support;
#[cfg(feature = "testing")]
pub mod testing;
mod text;

// For callers that name types of theirs: the versions that lock-db was built with.
#[doc(no_inline)]
pub use chrono;
#[doc(no_inline)]
pub use sqlx;

pub use self::database::LockDatabase;
pub use self::error::{Action, Error, Loss, NoReentry, WaitingFor};
pub use self::global::{AnyInsertLock, AnyInsertLocks, AnyLease, AnyLeases, AnyListLocks, AnyLocks};

/// What `lease = …` binds in an annotated function that uses the installed or scoped [`Locks`].
pub type AmbientLease = AnyLease;
pub use self::in_transaction::HeldInTransaction;
pub use self::info::{
    CheckReport, CommitGuard, DatabaseSession, Finding, FindingKind, Health, Holder, Kind, LockInfo,
    RowHolder, Waiter,
};
pub use self::lease::{GuardedTransaction, InsertLock, InsertLocks, Lease, LeaseWatch, Leases};
pub use self::locks::{ListLocks, Locks, LocksBuilder};
pub use self::reentrancy::ReentryContext;
pub use self::row_lock::{RowGuard, RowGuards, RowLock, RowLocks};
pub use self::skippable::Skippable;

#[cfg(feature = "macros")]
pub use lock_macros::distributed_lock;

/// The examples of the README are tests, in the repository.
#[cfg(all(doctest, feature = "postgres"))]
#[doc = include_str!("../../README.md")]
struct Readme;
