use std::panic::Location;
use std::time::{Duration, Instant};

/// Repeats `question` until the answer is yes. Panics, at the caller's line, if that takes longer
/// than `patience`.
#[track_caller]
pub fn eventually(patience: Duration, mut question: impl AsyncFnMut() -> bool) -> impl Future<Output = ()> {
    let caller = Location::caller();
    async move {
        let deadline = Instant::now() + patience;
        while !question().await {
            assert!(Instant::now() < deadline, "not within {patience:?}: what is asked at {caller}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}
