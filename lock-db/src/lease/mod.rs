//! The insert lock: a lease that is kept by a row of `distributed_lock`.

mod batch;
mod guard;
mod guarded_transaction;
pub(crate) mod handles;
mod in_transaction;
mod request;
mod watch;

pub(crate) use self::batch::begin_under;
pub use self::batch::{InsertLocks, Leases};
pub use self::guard::Lease;
pub(crate) use self::guard::commit_and_release;
pub use self::guarded_transaction::GuardedTransaction;
pub use self::request::InsertLock;
pub(crate) use self::request::{LeaseOptions, release_quietly};
pub use self::watch::LeaseWatch;
