//! Statements on a connection of the application: each has a bound here, for a server that hears nothing can't keep the one it was given.

use std::time::Duration;

use crate::clock::timeout;
use crate::database::LockDatabase;
use crate::error::Failure;

/// How much longer than it may wait on the server a statement takes at most, before the server counts as gone.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Waits for the answer. After the limit the connection has a statement under way, and is good for nothing but being closed.
pub(crate) async fn answer<DB: LockDatabase, T>(
    limit: Duration,
    asked: impl Future<Output = sqlx::Result<T>>,
) -> Result<T, Failure> {
    match timeout(limit, asked).await {
        Ok(answered) => answered.map_err(Failure::new::<DB>),
        Err(_elapsed) => Err(Failure::no_answer::<DB>(limit)),
    }
}

/// Sees to it that the transaction can only be rolled back. On a connection that is silent it can't be committed either.
pub(crate) async fn doom<DB: LockDatabase>(connection: &mut DB::Connection) {
    let _silent = timeout(ANSWER_LIMIT, DB::doom(connection)).await;
}
