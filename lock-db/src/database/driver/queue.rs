//! The queue of the processes that wait for a lock, in its row.

use std::future::Future;

use super::Result;
use crate::database::{QueueChange, QueueEntry, Server};
use crate::name::Name;
use crate::secret::Secret;

/// The queue of the processes that wait for a lock, in its row.
///
/// Each step takes many names, each of which occurs once, and uses as few messages as the server
/// allows. A row that another transaction has locked is skipped.
pub trait QueueDriver: sqlx::Database + Sized {
    /// Appends an entry of this process to the queues of some names. Where the entry is already in
    /// the queue and has not expired, its time starts anew, and its listener is replaced. Returns
    /// one result per name, in order. `false`: nothing was written. The queue is full, the entry
    /// has expired, the name has no lease, or its row is locked.
    fn enqueue(
        connection: &mut Self::Connection,
        server: &Server,
        names: &[Name],
        entry: &QueueEntry,
    ) -> impl Future<Output = Result<Vec<bool>>> + Send;

    /// Replaces queues, each if it has not changed since it was read. Returns one result per queue,
    /// in order. `false`: it has changed, or its row is locked.
    fn set_waiters(
        connection: &mut Self::Connection,
        server: &Server,
        changes: &[QueueChange],
    ) -> impl Future<Output = Result<Vec<bool>>> + Send;

    /// Returns the ids of those rows whose lock can be taken, and whose queue begins with the entry of
    /// this secret. Locks nothing.
    fn next_in_line(
        connection: &mut Self::Connection,
        server: &Server,
        ids: &[i64],
        secret: &Secret,
    ) -> impl Future<Output = Result<Vec<i64>>> + Send;

    /// Removes the entry with this secret from the queues of some names, unless their rows are
    /// locked.
    fn dequeue(
        connection: &mut Self::Connection,
        server: &Server,
        names: &[Name],
        secret: &Secret,
    ) -> impl Future<Output = Result<()>> + Send;
}
