//! What happened, as those saw it who took part.

use std::collections::BTreeMap;

/// A moment of the host's monotonic clock, in nanoseconds: the same clock in all of its processes.
pub(crate) type Moment = u64;

pub(crate) fn now() -> Moment {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(time.tv_sec).unwrap() * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap()
}

/// Somebody had a lock, or thought so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hold {
    pub(crate) client: u64,
    pub(crate) name: String,
    /// The fencing token. Row locks have none.
    pub(crate) token: Option<i64>,
    pub(crate) asked: Moment,
    /// When the answer had come.
    pub(crate) granted: Moment,
    /// The last moment at which it was certainly held, as far as its holder could know: for a lease, from before an
    /// `is_held()` that said yes; for a row lock, from before a statement of its transaction that succeeded.
    pub(crate) held: Option<Moment>,
    /// When the holder was told of the loss, by `lost()` or a first `is_held()` that said no.
    pub(crate) told: Option<Moment>,
    /// `is_held()` said yes again after `lost()` had resolved.
    pub(crate) held_again: bool,
}

/// A transaction under a lock, on the business register of that lock's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Deed {
    pub(crate) client: u64,
    pub(crate) register: String,
    pub(crate) token: Option<i64>,
    pub(crate) called: Moment,
    /// `None`: nobody heard of its end.
    pub(crate) returned: Option<Moment>,
    /// The value that it read.
    pub(crate) previous: i64,
    /// The value that it wrote, which nobody else ever writes; `None`: it only read.
    pub(crate) value: Option<i64>,
    pub(crate) outcome: Outcome,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Committed,
    /// It was told that nothing was kept.
    Refused,
    /// Nobody knows: the connection broke during the commit, or the process was killed.
    Unknown,
}

/// What the database kept of a transaction that wrote: a row that was written along with the register.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kept {
    pub(crate) register: String,
    pub(crate) previous: i64,
    pub(crate) value: i64,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct History {
    pub(crate) holds: Vec<Hold>,
    pub(crate) deeds: Vec<Deed>,
    pub(crate) kept: Vec<Kept>,
    /// The registers as they stood in the end. All began with 0.
    pub(crate) registers: BTreeMap<String, i64>,
}
