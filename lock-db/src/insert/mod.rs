//! The insert lock: a lease, kept by a row of `distributed_lock`.

mod guarded;
mod lease;
mod lock;
mod locks;

pub use self::guarded::GuardedTransaction;
pub(crate) use self::lease::Hold;
use self::lease::KeptByTransaction;
pub use self::lease::Lease;
pub use self::lock::InsertLock;
pub(crate) use self::lock::release_quietly;
pub use self::locks::{InsertLocks, Leases};
