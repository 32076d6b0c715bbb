//! Deadlines that almost never expire. They are cheap to set, follow the real clock, and fire up to
//! 100 ms late.
//!
//! A tokio timer costs a tenth of what it costs to hand a lock on. Calls that only guard against a
//! stopped thread share one thread of the process instead, which checks all their deadlines from
//! time to time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::{Duration, Instant};

use tokio::select;

use crate::clock::{self, Elapsed};

/// The time between two checks of the deadlines, and how late one may fire.
const PERIOD: Duration = Duration::from_millis(100);
/// After this many checks without a deadline the thread sleeps until there is one.
const IDLE_SCANS: u32 = 100;

/// Like [`clock::timeout_at`], up to 100 ms late.
pub(crate) async fn timeout_at<F: Future>(deadline: Instant, future: F) -> Result<F::Output, Elapsed> {
    let Some(watch) = Watch::of_process() else { return clock::timeout_at(deadline, future).await };
    select! {
        biased;
        output = future => Ok(output),
        () = (Backstop { watch, deadline, place: None }) => Err(Elapsed),
    }
}

/// The deadlines that the thread checks.
#[derive(Default)]
struct Watch {
    state: Mutex<Deadlines>,
    has_deadlines: Condvar,
}

#[derive(Default)]
struct Deadlines {
    places: Vec<Option<Deadline>>,
    free: Vec<usize>,
    /// Whether the thread sleeps until it is woken.
    sleeps: bool,
}

struct Deadline {
    deadline: Instant,
    /// `None`: the deadline has expired.
    waker: Option<Waker>,
}

impl Watch {
    /// `None`: the thread could not be started.
    fn of_process() -> Option<&'static Arc<Self>> {
        static WATCH: OnceLock<Option<Arc<Watch>>> = OnceLock::new();
        let watch = WATCH.get_or_init(|| {
            let watch = Arc::new(Self::default());
            let of_thread = Arc::clone(&watch);
            let thread = thread::Builder::new().name("lock-db watch".into());
            let started = thread.spawn(move || of_thread.scan_forever());
            started.inspect_err(|error| tracing::warn!(%error, "no thread")).ok().map(|_detached| watch)
        });
        watch.as_ref()
    }

    fn scan_forever(&self) {
        let mut idle = 0;
        loop {
            thread::sleep(PERIOD);
            let mut state = self.state();
            if state.is_empty() {
                idle += 1;
                if idle >= IDLE_SCANS {
                    state.sleeps = true;
                    let has_none = |state: &mut Deadlines| state.is_empty();
                    let awake = self.has_deadlines.wait_while(state, has_none);
                    awake.unwrap_or_else(PoisonError::into_inner).sleeps = false;
                    idle = 0;
                }
                continue;
            }
            idle = 0;
            let due = state.due(Instant::now());
            drop(state);
            for waker in due {
                // A waker of another runtime may panic. The others are woken all the same.
                let _panic = catch_unwind(AssertUnwindSafe(|| waker.wake()));
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, Deadlines> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Deadlines {
    fn is_empty(&self) -> bool {
        self.places.len() == self.free.len()
    }

    fn due(&mut self, now: Instant) -> Vec<Waker> {
        let due = self.places.iter_mut().flatten().filter(|entry| entry.deadline <= now);
        due.filter_map(|entry| entry.waker.take()).collect()
    }

    fn insert(&mut self, entry: Deadline) -> usize {
        let Some(place) = self.free.pop() else {
            self.places.push(Some(entry));
            return self.places.len() - 1;
        };
        self.places[place] = Some(entry);
        place
    }

    fn remove(&mut self, place: usize) -> Option<Deadline> {
        self.free.push(place);
        self.places[place].take()
    }
}

/// Ready when its deadline has expired.
struct Backstop {
    watch: &'static Arc<Watch>,
    deadline: Instant,
    /// Its index in `places`, once it was polled.
    place: Option<usize>,
}

impl Future for Backstop {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut state = self.watch.state();
        let Some(place) = self.place else {
            let entry = Deadline { deadline: self.deadline, waker: Some(context.waker().clone()) };
            let place = state.insert(entry);
            if state.sleeps {
                self.watch.has_deadlines.notify_one();
            }
            drop(state);
            self.place = Some(place);
            return Poll::Pending;
        };
        let waker = state.places[place].as_mut().and_then(|entry| entry.waker.as_mut());
        let Some(waker) = waker else { return Poll::Ready(()) };
        if !waker.will_wake(context.waker()) {
            let before = std::mem::replace(waker, context.waker().clone());
            drop(state);
            // Dropped outside of the lock: dropping a waker may drop a task, which has deadlines of
            // its own.
            drop(before);
        }
        Poll::Pending
    }
}

impl Drop for Backstop {
    fn drop(&mut self) {
        let entry = self.place.and_then(|place| self.watch.state().remove(place));
        drop(entry);
    }
}

#[cfg(all(test, not(lock_db_shuttle)))]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(30);
    const LONG: Duration = Duration::from_hours(1);

    #[tokio::test]
    async fn a_future_that_ends_in_time_returns_its_output() {
        let later = async {
            tokio::task::yield_now().await;
            7
        };
        assert_eq!(timeout_at(Instant::now() + LONG, later).await.unwrap(), 7);
        let (never, _pending) = tokio::sync::oneshot::channel::<()>();
        drop(never);
        assert!(timeout_at(Instant::now() + LONG, std::future::ready(())).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pending_future_times_out_by_the_real_clock() {
        let started = Instant::now();
        assert!(timeout_at(started + SHORT, std::future::pending::<()>()).await.is_err());
        assert!(started.elapsed() >= SHORT);
    }

    /// A waker may drop a task, and with it a deadline.
    #[tokio::test]
    async fn many_deadlines_leave_nothing_behind() {
        let tasks: Vec<_> = (0..100_u32)
            .map(|number| {
                tokio::spawn(async move {
                    let limit = if number % 2 == 0 { SHORT } else { LONG };
                    let work = async {
                        if number % 2 == 0 {
                            std::future::pending::<()>().await;
                        }
                        tokio::task::yield_now().await;
                    };
                    timeout_at(Instant::now() + limit, work).await.is_ok()
                })
            })
            .collect();
        for (number, task) in tasks.into_iter().enumerate() {
            assert_eq!(task.await.unwrap(), number % 2 == 1);
        }
        let aborted = tokio::spawn(timeout_at(Instant::now() + LONG, std::future::pending::<()>()));
        tokio::task::yield_now().await;
        aborted.abort();
        assert!(aborted.await.unwrap_err().is_cancelled());
    }
}
