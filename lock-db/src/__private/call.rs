//! A call of an annotated function: it takes its lock, runs the body under it, and ends the lock.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use super::bound::Binds;
use crate::Error;
use crate::global::{BoxFuture, HeldLock, TakingLock};

/// The lock of a call, from the request to its end. Boxed, so that it does not make the future of
/// the function larger.
pub struct Lock(Box<CallState>);

struct CallState {
    phase: Phase,
    /// The result, when the call is over. Kept here because, without optimization, each stack frame
    /// that an error passes through reserves room for it twice.
    outcome: CallOutcome,
    /// In a function that binds its guard.
    binds: Option<Box<dyn Binds>>,
}

enum Phase {
    Taking(TakingLock),
    Held(HeldLock),
    /// After the body.
    Ending(BoxFuture<'static, Result<(), Error>>),
    Ended,
}

impl Lock {
    fn new(phase: Phase) -> Self {
        Self(Box::new(CallState { phase, outcome: CallOutcome::Ended, binds: None }))
    }

    pub(super) fn taking(lock: TakingLock) -> Self {
        Self::new(Phase::Taking(lock))
    }

    pub(super) fn refused(error: Error) -> Self {
        Self::taking(Box::pin(std::future::ready(Err(error))))
    }

    #[cfg(feature = "testing")]
    pub(super) fn switched_off() -> Self {
        Self::new(Phase::Held(HeldLock::SwitchedOff))
    }

    pub(super) fn binding(mut self, binds: impl Binds + 'static) -> Self {
        self.0.binds = Some(Box::new(binds));
        self
    }
}

/// Runs the body under the lock.
pub fn run<B: Future>(lock: Lock, body: B, refused: fn(Error) -> B::Output) -> Call<B> {
    Call::new(lock, body, refused, None, None)
}

/// [`run`] in a function with `skip`.
pub fn run_or_skip<B: Future>(
    lock: Lock,
    body: B,
    refused: fn(Error) -> B::Output,
    skipped: fn() -> B::Output,
) -> Call<B> {
    Call::new(lock, body, refused, None, Some(skipped))
}

/// Runs the body under a row lock. `stands` decides whether its transaction is committed.
pub fn run_row<B: Future>(
    lock: Lock,
    body: B,
    refused: fn(Error) -> B::Output,
    stands: fn(&B::Output) -> bool,
) -> Call<B> {
    Call::new(lock, body, refused, Some(stands), None)
}

/// [`run_row`] in a function with `skip`.
pub fn run_row_or_skip<B: Future>(
    lock: Lock,
    body: B,
    refused: fn(Error) -> B::Output,
    stands: fn(&B::Output) -> bool,
    skipped: fn() -> B::Output,
) -> Call<B> {
    Call::new(lock, body, refused, Some(stands), Some(skipped))
}

/// The future of an annotated function. This is all that is compiled for each of them.
#[must_use = "futures do nothing unless polled"]
pub struct Call<B: Future> {
    work: Work<B>,
    lock: Lock,
    refused: fn(Error) -> B::Output,
    skipped: Option<fn() -> B::Output>,
}

/// The body and its output. The body is boxed: otherwise functions with a lock that call one
/// another would grow with each call.
struct Work<B: Future> {
    body: Option<Pin<Box<B>>>,
    output: Option<B::Output>,
    /// Whether the output is a success.
    stands: Option<fn(&B::Output) -> bool>,
}

impl<B: Future> Call<B> {
    fn new(
        lock: Lock,
        body: B,
        refused: fn(Error) -> B::Output,
        stands: Option<fn(&B::Output) -> bool>,
        skipped: Option<fn() -> B::Output>,
    ) -> Self {
        Self { work: Work { body: Some(Box::pin(body)), output: None, stands }, lock, refused, skipped }
    }
}

/// Only the body is pinned, in its box.
impl<B: Future> Unpin for Call<B> {}

impl<B: Future> Future for Call<B> {
    type Output = B::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<B::Output> {
        let this = self.get_mut();
        ready!(this.lock.0.poll(&mut this.work, context));
        Poll::Ready(answer(&mut this.lock.0, &mut this.work.output, this.refused, this.skipped))
    }
}

/// The body is dropped first, and inside of its lock, where it ran.
impl<B: Future> Drop for Call<B> {
    fn drop(&mut self) {
        self.lock.0.stop(&mut self.work);
    }
}

/// Generic over the function's output alone. Not inlined, as the methods below: its locals would
/// otherwise be on the stack of every call inside of the body.
#[inline(never)]
fn answer<T>(
    state: &mut CallState,
    output: &mut Option<T>,
    refused: fn(Error) -> T,
    skipped: Option<fn() -> T>,
) -> T {
    let error = match std::mem::replace(&mut state.outcome, CallOutcome::Ended) {
        CallOutcome::Refused(error) => error,
        CallOutcome::Ended => match output.take() {
            Some(output) => return output,
            None => Error::Closed,
        },
        CallOutcome::Skipped => match skipped {
            Some(skipped) => return skipped(),
            None => Error::Closed,
        },
    };
    refused(error)
}

/// What a call does, independent of the type of the body.
trait Works {
    /// Ready with whether the body returned a success.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<bool>;

    /// Drops the body at its current await point.
    fn stop(&mut self);
}

impl<B: Future> Works for Work<B> {
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<bool> {
        let Some(body) = &mut self.body else { return Poll::Ready(false) };
        let output = self.output.insert(ready!(body.as_mut().poll(context)));
        self.body = None;
        Poll::Ready(self.stands.is_none_or(|stands| stands(output)))
    }

    fn stop(&mut self) {
        self.body = None;
    }
}

enum CallOutcome {
    Ended,
    Skipped,
    Refused(Error),
}

impl CallState {
    /// Small, like everything through which it polls the body: it is on the stack of every call
    /// inside of the body.
    fn poll(&mut self, work: &mut dyn Works, context: &mut Context<'_>) -> Poll<()> {
        if let Phase::Taking(_) = &self.phase {
            ready!(self.poll_taking(context));
        }
        if let Phase::Held(taken) = &mut self.phase {
            let stands = ready!(taken.poll_body(&mut |context| work.poll(context), context));
            self.end(work, stands);
        }
        self.poll_ending(context)
    }

    #[inline(never)]
    fn poll_taking(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Phase::Taking(taking) = &mut self.phase else { return Poll::Ready(()) };
        let taken = ready!(taking.as_mut().poll(context));
        self.phase = Phase::Ended;
        match taken {
            Ok(Some(mut taken)) => match self.binds.as_ref().map_or(Ok(()), |binds| binds.bind(&mut taken)) {
                Ok(()) => self.phase = Phase::Held(taken),
                Err(error) => {
                    taken.withdraw();
                    self.outcome = CallOutcome::Refused(error);
                }
            },
            Ok(None) => self.outcome = CallOutcome::Skipped,
            Err(error) => self.outcome = CallOutcome::Refused(error),
        }
        Poll::Ready(())
    }

    /// Begins to end the lock after the body.
    #[inline(never)]
    fn end(&mut self, work: &mut dyn Works, stands: bool) {
        self.stop(work);
        self.unbind();
        let Phase::Held(taken) = std::mem::replace(&mut self.phase, Phase::Ended) else { return };
        match taken {
            #[cfg(feature = "testing")]
            HeldLock::SwitchedOff => {}
            HeldLock::Lease(call) => match call.ending() {
                Ok(Some(ending)) => self.phase = Phase::Ending(ending),
                // This is not the last handle, so there is nothing to wait for.
                Ok(None) => {}
                Err(lost) => self.outcome = CallOutcome::Refused(lost),
            },
            HeldLock::Row(call) => {
                self.phase = Phase::Ending(Box::pin(async move {
                    let ended = call.end(stands).await;
                    if stands { ended } else { Ok(()) }
                }));
            }
        }
    }

    #[inline(never)]
    fn poll_ending(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let Phase::Ending(ending) = &mut self.phase {
            let ended = ready!(ending.as_mut().poll(context));
            self.phase = Phase::Ended;
            if let Err(error) = ended {
                self.outcome = CallOutcome::Refused(error);
            }
        }
        Poll::Ready(())
    }

    /// Drops the body at its current await point, inside of its lock.
    fn stop(&self, work: &mut dyn Works) {
        let inside = match &self.phase {
            Phase::Held(taken) => taken.inside(),
            _ => None,
        };
        match inside {
            Some(inside) => inside.drop_within(|| work.stop()),
            None => work.stop(),
        }
    }

    /// Takes back what the body has bound.
    fn unbind(&mut self) {
        if let (Some(binds), Phase::Held(taken)) = (&self.binds, &mut self.phase) {
            binds.unbind(taken);
        }
    }
}

/// Enclosing calls need the guard, no matter how this body ends.
impl Drop for CallState {
    fn drop(&mut self) {
        self.unbind();
    }
}
