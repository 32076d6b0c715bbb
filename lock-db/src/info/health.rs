//! How a `Locks` is doing.

use std::time::Duration;

/// How a [`Locks`](crate::Locks) is doing, for a readiness probe: see
/// [`Locks::health`](crate::Locks::health).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Health {
    /// Whether a connection of its own to the database is open. `false` before the first use, after
    /// the database was lost until it answers again, and while the `Locks` is idle for longer than the
    /// pool keeps its connections.
    pub connected: bool,
    /// How long ago the database last answered on such a connection. `None`: never yet.
    #[cfg_attr(feature = "serde", serde(serialize_with = "super::in_seconds"))]
    pub since_last_answer: Option<Duration>,
    /// How many leases are held. One of them may be that of the background task which removes unused rows.
    pub held: usize,
    /// How many callers wait for a lock.
    pub waiting: usize,
}
