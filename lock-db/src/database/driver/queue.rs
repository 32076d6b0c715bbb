//! The queue of the processes that wait for a lock, in its row.

use std::future::Future;

use super::Result;
use crate::database::{QueueEntry, Server};
use crate::secret::Secret;

/// The queue of the processes that wait for a lock, in its row.
pub trait QueueDriver: sqlx::Database + Sized {
    /// Appends an entry to the queue of a name, if the queue has room and no entry of ours yet.
    /// `false`: nothing was appended, or another transaction has the row locked.
    fn enqueue(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
        entry: &QueueEntry,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// Replaces the queue of a name, if it still equals `before`. `false`: it does not, or another
    /// transaction has the row locked.
    fn set_waiters(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
        before: &str,
        after: &str,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// Removes the entry with this secret from the queue of a name, unless another transaction has
    /// the row locked.
    fn dequeue(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
        secret: &Secret,
    ) -> impl Future<Output = Result<()>> + Send;
}
