//! Sleeps and timeouts that follow the real clock, on the caller's runtime.
//!
//! In a test tokio's clock may be paused (`start_paused`, `tokio::time::pause`). It then jumps to
//! the next timer whenever the runtime is idle, such as while it waits for a database, so that a
//! tokio timer expires at once. The database counts real seconds, so the waits here do, too. While
//! tokio's clock is running, its timers are used.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::sync::oneshot;

/// Replaces a duration that is too large to add, as in tokio.
const FAR: Duration = Duration::from_hours(24 * 365 * 30);
/// How long the thread sleeps at a time if no sleeper thread can be started.
const SLICE: Duration = Duration::from_millis(10);

/// The time limit was reached first.
#[derive(Debug)]
pub(crate) struct Elapsed;

pub(crate) async fn sleep(time: Duration) {
    sleep_until(after(time)).await;
}

pub(crate) async fn sleep_until(deadline: Instant) {
    if Instant::now() >= deadline {
        return;
    }
    if !is_paused() {
        tokio::time::sleep_until(deadline.into()).await;
        if Instant::now() >= deadline {
            return;
        }
        // The clock was paused in the meantime.
    }
    sleep_in_thread(deadline).await;
}

pub(crate) async fn timeout<F: Future>(limit: Duration, future: F) -> Result<F::Output, Elapsed> {
    timeout_at(after(limit), future).await
}

pub(crate) async fn timeout_at<F: Future>(deadline: Instant, future: F) -> Result<F::Output, Elapsed> {
    select! {
        biased;
        output = future => Ok(output),
        () = sleep_until(deadline) => Err(Elapsed),
    }
}

fn after(time: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(time).unwrap_or_else(|| now + FAR)
}

/// Whether tokio's clock differs from the real one. A running clock shows a time between two
/// readings of the real clock. A clock that was paused once and resumed counts as paused, because
/// it stays behind or ahead.
fn is_paused() -> bool {
    let before = Instant::now();
    let told = tokio::time::Instant::now().into_std();
    told < before || Instant::now() < told
}

/// Sleeps without a tokio timer. A paused tokio clock can then still jump for other sleepers, which
/// this future may be waiting for.
async fn sleep_in_thread(deadline: Instant) {
    let (over, is_over) = oneshot::channel::<()>();
    // Dropped with the future, which ends the thread.
    let (_awake, gone) = mpsc::channel::<()>();
    let left = move || deadline.saturating_duration_since(Instant::now());
    let sleeper = move || {
        while let Err(mpsc::RecvTimeoutError::Timeout) = gone.recv_timeout(left()) {
            if left().is_zero() {
                break;
            }
        }
        drop(over);
    };
    match thread::Builder::new().name("lock-db clock".into()).spawn(sleeper) {
        Ok(_detached) => drop(is_over.await),
        Err(_no_thread) => {
            while !left().is_zero() {
                thread::sleep(left().min(SLICE));
                tokio::task::yield_now().await;
            }
        }
    }
}

#[cfg(all(test, not(lock_db_shuttle)))]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(30);
    const LONG: Duration = Duration::from_hours(1);

    #[tokio::test]
    async fn a_running_clock_is_not_paused() {
        for _ in 0..1000 {
            assert!(!is_paused());
        }
        let started = Instant::now();
        sleep(SHORT).await;
        assert!(started.elapsed() >= SHORT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_paused_clock_ends_nothing_early() {
        let started = Instant::now();
        tokio::time::sleep(LONG).await;
        assert!(started.elapsed() < LONG);
        assert!(is_paused());
        sleep(SHORT).await;
        assert!(started.elapsed() >= SHORT);
        assert!(timeout(SHORT, std::future::pending::<()>()).await.is_err());
        assert!(started.elapsed() >= 2 * SHORT);
        // The future that is waited for may sleep by tokio's clock.
        assert!(timeout(LONG, tokio::time::sleep(LONG)).await.is_ok());
    }

    #[tokio::test]
    async fn a_clock_paused_during_a_sleep_ends_nothing_early() {
        let started = Instant::now();
        let pause = async {
            tokio::task::yield_now().await;
            tokio::time::pause();
        };
        tokio::join!(sleep(SHORT), pause);
        assert!(started.elapsed() >= SHORT);
        tokio::time::resume();
        sleep(SHORT).await;
        assert!(started.elapsed() >= 2 * SHORT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_sleep_leaves_no_thread() {
        let mut sleep = Box::pin(sleep(LONG));
        assert!(timeout(SHORT, &mut sleep).await.is_err());
        drop(sleep);
    }
}
