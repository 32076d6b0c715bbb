//! Time limits for statements on a connection of the application, so that a server that does not
//! answer can't block the caller.

use std::time::Duration;

use crate::clock::timeout;
use crate::database::Failure;
use crate::database::{LockDatabase, StepError};

/// How much longer than its own wait on the server a statement may take. After that the server
/// counts as gone.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Waits for the answer. After the limit the connection still has a statement in progress, and can
/// only be closed.
pub(crate) async fn answer<DB: LockDatabase, T>(
    limit: Duration,
    asked: impl Future<Output = Result<T, impl Into<StepError>>>,
) -> Result<T, Failure> {
    match timeout(limit, asked).await {
        Ok(answered) => answered.map_err(Failure::new::<DB>),
        Err(_elapsed) => Err(Failure::no_answer::<DB>(limit)),
    }
}

/// Makes sure that the transaction can only be rolled back. On a silent connection it can't be
/// committed either.
pub(crate) async fn doom<DB: LockDatabase>(connection: &mut DB::Connection) {
    let _silent = timeout(ANSWER_LIMIT, DB::doom(connection)).await;
}
