//! Repeats operations of the session that can be repeated safely.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::database::{Failure, Fault};

/// How long a read is retried while another transaction blocks it, and the pause between attempts.
const PATIENCE: Duration = Duration::from_secs(5);
pub(super) const PAUSE: Duration = Duration::from_millis(20);
/// A read that took this long was blocked on the server, so it is not retried.
const A_WAIT: Duration = Duration::from_secs(1);

/// Runs an operation, and repeats it once if the connection was gone: the server may have closed it
/// while it was idle. An operation without an answer is not repeated. Every operation of the
/// session can be repeated safely.
pub(super) async fn twice<T>(operation: impl AsyncFn() -> Result<T, Failure>) -> Result<T, Failure> {
    match operation().await {
        Err(failure) if failure.fault == Fault::Disconnected && !failure.is_silence() => operation().await,
        answer => answer,
    }
}

/// Like `twice`, and repeats the operation while it is blocked. On SQLite a commit blocks readers,
/// and on a busy machine for longer than a private connection waits.
pub(super) async fn patiently<T>(operation: impl AsyncFn() -> Result<T, Failure>) -> Result<T, Failure> {
    let started = Instant::now();
    loop {
        let asked = Instant::now();
        match twice(&operation).await {
            Err(failure) if failure.passes() && started.elapsed() < PATIENCE && asked.elapsed() < A_WAIT => {
                sleep(PAUSE).await;
            }
            answer => return answer,
        }
    }
}
