use std::panic::Location;
use std::time::{Duration, Instant};

/// Asks again and again until the answer is yes; panics, at the caller's line, when it is not within `patience`.
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
