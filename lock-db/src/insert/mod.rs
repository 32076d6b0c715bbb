//! The insert lock: a lease, kept by a row of `distributed_lock`.

mod guarded;
mod hold;
mod lease;
mod lock;
mod locks;

pub use self::guarded::GuardedTransaction;
pub(crate) use self::hold::Hold;
use self::hold::KeptByTransaction;
pub use self::lease::Lease;
pub use self::lock::InsertLock;
pub(crate) use self::lock::{LeaseOptions, release_quietly};
pub use self::locks::{InsertLocks, Leases};
