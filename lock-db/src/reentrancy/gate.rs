//! The gate of a scope, which lets in one call at a time.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::{Arc, PoisonError};

use tokio::sync::Notify;
use tokio::task::yield_now;

use crate::sync::{Mutex, MutexGuard};

/// A mutex that is first come, first served among the waiters that are polled.
///
/// tokio's mutex is handed to the first waiter as soon as it is free. That waiter may be a future
/// that is not polled at the moment, such as the next one of a `buffer_unordered` while the loop
/// over it runs its body. A call in the body would then wait forever. So this mutex has no owner
/// until a waiter takes it.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<GateState>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct GateState {
    taken: bool,
    /// The tickets of the waiters, oldest first.
    queue: VecDeque<u64>,
    last_ticket: u64,
}

impl Gate {
    /// Waits for the gate. Dropping the future leaves nothing behind.
    pub(super) async fn pass(self: &Arc<Self>) -> Pass {
        let waiting = Waiting::new(self);
        let mut freed = pin!(self.freed.notified());
        loop {
            // Before the check, so that no wake-up is missed between the two.
            freed.as_mut().enable();
            if let Some(pass) = self.take_if(|state| state.queue.front() == Some(&waiting.ticket)) {
                return pass;
            }
            if !self.state().taken {
                // The waiters in front were woken, too, and take the gate now if they are polled.
                // Two yields, because `join!` starts each round with another branch.
                yield_now().await;
                yield_now().await;
                if let Some(pass) = self.take_if(|_| true) {
                    return pass;
                }
            }
            freed.as_mut().await;
            freed.set(self.freed.notified());
        }
    }

    /// The gate, if it is free and has no waiters.
    pub(super) fn pass_at_once(self: &Arc<Self>) -> Option<Pass> {
        self.take_if(|state| state.queue.is_empty())
    }

    fn take_if(self: &Arc<Self>, may_take: impl FnOnce(&GateState) -> bool) -> Option<Pass> {
        let mut state = self.state();
        if state.taken || !may_take(&state) {
            return None;
        }
        state.taken = true;
        Some(Pass(Arc::clone(self)))
    }

    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Dropping it opens the gate for the next call.
#[derive(Debug)]
pub(super) struct Pass(Arc<Gate>);

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.state().taken = false;
        // All waiters, because the first one may not be polled.
        self.0.freed.notify_waiters();
    }
}

struct Waiting<'a> {
    gate: &'a Gate,
    ticket: u64,
}

impl<'a> Waiting<'a> {
    fn new(gate: &'a Gate) -> Self {
        let mut state = gate.state();
        state.last_ticket += 1;
        let ticket = state.last_ticket;
        state.queue.push_back(ticket);
        Self { gate, ticket }
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.gate.state().queue.retain(|ticket| *ticket != self.ticket);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::poll;

    use super::*;

    macro_rules! queued {
        ($gate:ident) => {{
            let mut waiter = Box::pin($gate.pass());
            assert!(poll!(waiter.as_mut()).is_pending());
            waiter
        }};
    }

    #[tokio::test]
    async fn one_at_a_time_in_order() {
        let gate = Arc::new(Gate::default());
        let first = gate.pass_at_once().unwrap();
        assert!(gate.pass_at_once().is_none());
        let (second, mut third) = (queued!(gate), queued!(gate));
        drop(first);
        assert!(gate.pass_at_once().is_none(), "others came before");
        assert!(poll!(third.as_mut()).is_pending());
        let second = second.await;
        for _ in 0..3 {
            assert!(poll!(third.as_mut()).is_pending());
        }
        drop(second);
        drop(third.await);
        assert!(gate.pass_at_once().is_some());
    }

    #[tokio::test]
    async fn a_waiter_that_leaves_holds_nobody_up() {
        let gate = Arc::new(Gate::default());
        let first = gate.pass_at_once().unwrap();
        let (second, third) = (queued!(gate), queued!(gate));
        drop(second);
        drop(first);
        drop(third.await);
        assert!(gate.pass_at_once().is_some());
        assert!(gate.state().queue.is_empty());
    }

    #[tokio::test]
    async fn a_waiter_that_nobody_polls_holds_nobody_up() {
        let gate = Arc::new(Gate::default());
        let first = gate.pass_at_once().unwrap();
        let (_not_polled, third) = (queued!(gate), queued!(gate));
        drop(first);
        drop(third.await);
        // Nor does it block a later one.
        drop(gate.pass().await);
    }

    #[tokio::test]
    async fn nobody_starves_beside_those_who_come_again_and_again() {
        let gate = Arc::new(Gate::default());
        let permits = AtomicUsize::new(0);
        let greedy = async || {
            for _ in 0..100 {
                let pass = gate.pass().await;
                yield_now().await;
                drop(pass);
                permits.fetch_add(1, Ordering::Relaxed);
            }
        };
        let modest = async {
            let _pass = gate.pass().await;
            permits.load(Ordering::Relaxed)
        };
        let ((), (), before) = tokio::join!(greedy(), greedy(), modest);
        assert_eq!(before, 2);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
    async fn no_wake_up_is_lost_between_threads() {
        let gate = Arc::new(Gate::default());
        let inside = Arc::new(AtomicUsize::new(0));
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..8 {
            let (gate, inside) = (Arc::clone(&gate), Arc::clone(&inside));
            tasks.spawn(async move {
                for round in 0..500 {
                    let pass = gate.pass().await;
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    if round % 3 == 0 {
                        yield_now().await;
                    }
                    inside.fetch_sub(1, Ordering::SeqCst);
                    drop(pass);
                }
            });
        }
        let all = async { while tasks.join_next().await.transpose().unwrap().is_some() {} };
        tokio::time::timeout(std::time::Duration::from_mins(1), all).await.unwrap();
    }
}
