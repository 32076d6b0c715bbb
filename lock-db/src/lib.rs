#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

#[doc(hidden)]
#[path = "private.rs"]
#[allow(missing_docs, missing_debug_implementations, clippy::missing_errors_doc)]
pub mod __private;
mod ambient;
mod database;
mod error;
mod info;
mod insert;
mod limits;
mod locks;
mod name;
mod reentry;
mod row;
pub mod schema;
mod secret;
mod session;

pub use self::database::LockDatabase;
pub use self::error::{Error, Loss, WaitingFor};
pub use self::info::{Kind, LockInfo};
pub use self::insert::{InsertLock, Lease};
pub use self::locks::{Locks, LocksBuilder};
pub use self::reentry::Owner;
pub use self::row::{HeldRow, RowGuard, RowLock};

#[cfg(feature = "macros")]
pub use lock_macros::distributed_lock;
