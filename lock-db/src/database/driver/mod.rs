//! What lock-db needs of a database: small traits, each about one topic. The folder of each
//! database implements them. SQL and error codes are nowhere else.
//!
//! Each method is one step on one connection. The traits can't be reached from outside of the
//! crate; callers only see `LockDatabase`.

mod error;
mod lease;
mod operate;
mod prune;
mod queue;
mod row_lock;
mod schema;
mod session;
mod transaction;
mod wakeup;

pub(crate) use self::error::{Result, StepError};
pub(crate) use self::lease::LeaseDriver;
pub(crate) use self::operate::OperateDriver;
pub(crate) use self::prune::PruneDriver;
pub(crate) use self::queue::QueueDriver;
pub(crate) use self::row_lock::RowLockDriver;
pub(crate) use self::schema::SchemaDriver;
pub(crate) use self::session::SessionDriver;
pub(crate) use self::transaction::TransactionDriver;
pub(crate) use self::wakeup::WakeUpDriver;

/// All of these traits.
pub trait Driver:
    SchemaDriver
    + SessionDriver
    + WakeUpDriver
    + LeaseDriver
    + QueueDriver
    + RowLockDriver
    + TransactionDriver
    + PruneDriver
    + OperateDriver
{
}

impl<DB> Driver for DB where
    DB: SchemaDriver
        + SessionDriver
        + WakeUpDriver
        + LeaseDriver
        + QueueDriver
        + RowLockDriver
        + TransactionDriver
        + PruneDriver
        + OperateDriver
{
}
