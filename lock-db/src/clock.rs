//! Sleeping and timeouts by the real clock, on whatever runtime the caller has.
//!
//! In a test the clock of tokio may be paused (`start_paused`, `tokio::time::pause`). It then jumps to the next timer
//! whenever the runtime has nothing to do, such as when it waits for a database: a timer of tokio is over at once. The
//! database counts real seconds, so what is waited for here does, too. As long as tokio's clock is running its timers are used.

use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::sync::oneshot;

/// What a sum of times that is too large stands for, as in tokio.
const FAR: Duration = Duration::from_hours(24 * 365 * 30);
/// How long a thread sleeps at a time where it can't be woken.
const SLICE: Duration = Duration::from_millis(10);

/// The time was over first.
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
        // Paused since.
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

/// Whether tokio's clock is another than the real one: one that runs shows a time between two looks at the real one. A
/// clock that was paused once and goes on counts as paused, because it is behind or ahead for good.
fn is_paused() -> bool {
    let before = Instant::now();
    let told = tokio::time::Instant::now().into_std();
    told < before || Instant::now() < told
}

/// Leaves tokio's clock to itself, so that it goes on jumping for those who sleep by it, perhaps with what is waited for here.
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
        // Whom we wait for may sleep by tokio's clock.
        assert!(timeout(LONG, tokio::time::sleep(LONG)).await.is_ok());
    }

    #[tokio::test]
    async fn a_clock_that_is_paused_meanwhile_ends_nothing_early() {
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
