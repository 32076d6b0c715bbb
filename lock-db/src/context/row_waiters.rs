//! Limits how many connections of a process wait for row locks.

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::keyed_queue::KeyedQueue;

/// For row locks with their own transaction.
#[derive(Debug)]
pub(crate) struct RowWaiters {
    pub(crate) queue: Arc<KeyedQueue>,
    /// One permit for each connection that may wait in the database.
    pub(crate) waiters: Semaphore,
}

impl RowWaiters {
    /// Leaves half of the pool to the holders of the locks, and to their other work.
    pub(crate) fn new(connections: u32) -> Self {
        let waiters = usize::try_from(connections / 2).unwrap_or(usize::MAX).max(1);
        Self { queue: Arc::default(), waiters: Semaphore::new(waiters.min(Semaphore::MAX_PERMITS)) }
    }
}
