//! Who of a process waits for row locks, and with how many connections.

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::turns::Turns;

/// For row locks with a transaction of their own.
#[derive(Debug)]
pub(crate) struct RowQueues {
    pub(super) turns: Arc<Turns>,
    /// One permit for each connection on which somebody may wait in the database.
    pub(super) waiters: Semaphore,
}

impl RowQueues {
    /// Leaves one connection to those who have the locks.
    pub(crate) fn new(connections: u32) -> Self {
        let waiters = usize::try_from(connections).unwrap_or(usize::MAX).saturating_sub(1).max(1);
        Self { turns: Arc::default(), waiters: Semaphore::new(waiters.min(Semaphore::MAX_PERMITS)) }
    }
}
