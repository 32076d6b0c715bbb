//! Who of a process waits for row locks, and with how many connections.

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::turns::Turns;

/// For row locks with a transaction of their own.
#[derive(Debug)]
pub(crate) struct RowQueues {
    pub(crate) turns: Arc<Turns>,
    /// One permit for each connection on which somebody may wait in the database.
    pub(super) waiters: Semaphore,
}

impl RowQueues {
    /// Leaves half of the pool to those who have the locks, and to what they do besides.
    pub(crate) fn new(connections: u32) -> Self {
        let waiters = usize::try_from(connections / 2).unwrap_or(usize::MAX).max(1);
        Self { turns: Arc::default(), waiters: Semaphore::new(waiters.min(Semaphore::MAX_PERMITS)) }
    }
}
