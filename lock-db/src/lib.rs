#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
// Without any driver there is nothing that uses the better part of it; it compiles all the same.
#![cfg_attr(not(any(feature = "postgres", feature = "mysql", feature = "sqlite")), allow(dead_code))]

#[doc(hidden)]
#[path = "private.rs"]
#[allow(missing_docs, missing_debug_implementations, clippy::missing_errors_doc)]
pub mod __private;
mod ambient;
mod backstop;
mod bounds;
mod clock;
mod connecting;
mod database;
mod dropped_at_once;
mod error;
mod in_transaction;
mod info;
mod insert;
#[cfg(all(test, lock_db_shuttle))]
mod interleavings;
mod jitter;
mod limits;
mod locks;
mod long_hold;
mod name;
mod own_transaction;
mod reentry;
mod row;
mod runtime;
pub mod schema;
mod secret;
mod session;
mod skippable;
mod sync;
#[cfg(feature = "testing")]
pub mod testing;
mod turns;

pub use self::ambient::AmbientLease;
pub use self::database::LockDatabase;
pub use self::error::{Error, Loss, NoReentry, WaitingFor};
pub use self::in_transaction::HeldInTransaction;
pub use self::info::{CheckReport, Kind, LockInfo};
pub use self::insert::{GuardedTransaction, InsertLock, InsertLocks, Lease, Leases};
pub use self::locks::{Locks, LocksBuilder};
pub use self::reentry::Owner;
pub use self::row::{RowGuard, RowLock, RowLocks};
pub use self::skippable::Skippable;

#[cfg(feature = "macros")]
pub use lock_macros::distributed_lock;
