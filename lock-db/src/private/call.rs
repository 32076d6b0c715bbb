//! A call of an annotated function: it takes its lock, runs the body under it, and ends it.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use super::bound::Binds;
use crate::Error;
use crate::ambient::{BoxFuture, RowCall};
use crate::error::Loss;
use crate::insert::{Hold, release_quietly};
use crate::reentry::{Entered, Inside};
use crate::session::LeaseState;

/// `None`: held elsewhere, and the function is to be skipped.
pub(crate) type TakingLock = BoxFuture<'static, Result<Option<Taken>, Error>>;

/// The lock of a call, from being asked for to its end. Boxed, so that the future of the function does not grow by it.
pub struct Lock(Box<State>);

struct State {
    phase: Phase,
    /// When it is through. Kept here: in unoptimised programs each frame that an error is handed through has room for it, twice.
    answer: Outcome,
    /// In a function that binds its guard.
    binds: Option<Box<dyn Binds>>,
}

enum Phase {
    Taking(TakingLock),
    Held(Taken),
    /// After the body.
    Ending(BoxFuture<'static, Result<(), Error>>),
    Ended,
}

/// A lock that a call is inside of.
pub(crate) enum Taken {
    /// Inside of `testing::without_locks`.
    #[cfg(feature = "testing")]
    SwitchedOff,
    Lease(LeaseCall),
    Row(RowCall),
}

pub(crate) struct LeaseCall {
    /// In front of `inside`: the next sibling gets in when this handle is gone. `None` while the body has it.
    pub(super) hold: Option<Arc<Hold>>,
    lease: Arc<LeaseState>,
    /// Made when the body waits for the first time. `None` also when it need not be looked at any more.
    loss: Option<BoxFuture<'static, Loss>>,
    looks_for_loss: bool,
    /// Why the body was stopped.
    lost: Option<Loss>,
    inside: Inside,
}

impl Taken {
    pub(crate) fn lease(Entered { held, inside }: Entered<Hold>) -> Self {
        let lease = Arc::clone(&held.lease);
        Self::Lease(LeaseCall {
            hold: Some(held),
            lease,
            loss: None,
            looks_for_loss: true,
            lost: None,
            inside,
        })
    }

    /// Ends a call whose body did not run.
    fn withdraw(self) {
        if let Self::Row(call) = self {
            call.withdraw();
        }
    }

    #[cfg_attr(not(feature = "testing"), allow(clippy::unnecessary_wraps))]
    fn inside(&self) -> Option<&Inside> {
        match self {
            #[cfg(feature = "testing")]
            Self::SwitchedOff => None,
            Self::Lease(call) => Some(&call.inside),
            Self::Row(call) => Some(call.inside()),
        }
    }
}

impl Lock {
    fn new(phase: Phase) -> Self {
        Self(Box::new(State { phase, answer: Outcome::Ended, binds: None }))
    }

    pub(super) fn taking(lock: TakingLock) -> Self {
        Self::new(Phase::Taking(lock))
    }

    pub(super) fn refused(error: Error) -> Self {
        Self::taking(Box::pin(std::future::ready(Err(error))))
    }

    #[cfg(feature = "testing")]
    pub(super) fn switched_off() -> Self {
        Self::new(Phase::Held(Taken::SwitchedOff))
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

/// As [`run`], in a function with `skip`.
pub fn run_or_skip<B: Future>(
    lock: Lock,
    body: B,
    refused: fn(Error) -> B::Output,
    skipped: fn() -> B::Output,
) -> Call<B> {
    Call::new(lock, body, refused, None, Some(skipped))
}

/// Runs the body under a row lock, whose transaction ends by what `stands` says.
pub fn run_row<B: Future>(
    lock: Lock,
    body: B,
    refused: fn(Error) -> B::Output,
    stands: fn(&B::Output) -> bool,
) -> Call<B> {
    Call::new(lock, body, refused, Some(stands), None)
}

/// As [`run_row`], in a function with `skip`.
pub fn run_row_or_skip<B: Future>(
    lock: Lock,
    body: B,
    refused: fn(Error) -> B::Output,
    stands: fn(&B::Output) -> bool,
    skipped: fn() -> B::Output,
) -> Call<B> {
    Call::new(lock, body, refused, Some(stands), Some(skipped))
}

/// The future of an annotated function: all of it that is compiled for each of them.
#[must_use = "futures do nothing unless polled"]
pub struct Call<B: Future> {
    work: Work<B>,
    lock: Lock,
    refused: fn(Error) -> B::Output,
    skipped: Option<fn() -> B::Output>,
}

/// The body and what came of it. The body is boxed: functions with a lock that call one another would otherwise grow with
/// each call.
struct Work<B: Future> {
    body: Option<Pin<Box<B>>>,
    output: Option<B::Output>,
    /// Whether that is what the function is there for, and no error.
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

/// Nothing in it is pinned but the body, in its box.
impl<B: Future> Unpin for Call<B> {}

impl<B: Future> Future for Call<B> {
    type Output = B::Output;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<B::Output> {
        let this = self.get_mut();
        ready!(this.lock.0.poll(&mut this.work, context));
        Poll::Ready(answer(&mut this.lock.0, &mut this.work.output, this.refused, this.skipped))
    }
}

/// The body goes first, and inside of its lock, as it ran.
impl<B: Future> Drop for Call<B> {
    fn drop(&mut self) {
        self.lock.0.stop(&mut self.work);
    }
}

/// Of what the function returns alone. Not inlined, as its like below: what it needs would otherwise be on the stack of every
/// call inside of the body.
#[inline(never)]
fn answer<T>(
    state: &mut State,
    output: &mut Option<T>,
    refused: fn(Error) -> T,
    skipped: Option<fn() -> T>,
) -> T {
    let error = match std::mem::replace(&mut state.answer, Outcome::Ended) {
        Outcome::Refused(error) => error,
        Outcome::Ended => match output.take() {
            Some(output) => return output,
            None => Error::Closed,
        },
        Outcome::Skipped => match skipped {
            Some(skipped) => return skipped(),
            None => Error::Closed,
        },
    };
    refused(error)
}

/// What a call does, whatever the body.
trait Works {
    /// Ready with whether the body has returned what the function is there for.
    fn poll(&mut self, context: &mut Context<'_>) -> Poll<bool>;

    /// Drops the body where it stands.
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

enum Outcome {
    Ended,
    Skipped,
    Refused(Error),
}

impl State {
    /// Thin, as what it polls the body by: it is on the stack of every call inside of the body.
    fn poll(&mut self, work: &mut dyn Works, context: &mut Context<'_>) -> Poll<()> {
        if let Phase::Taking(_) = &self.phase {
            ready!(self.poll_taking(context));
        }
        if let Phase::Held(taken) = &mut self.phase {
            let stands = ready!(taken.poll_body(work, context));
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
                    self.answer = Outcome::Refused(error);
                }
            },
            Ok(None) => self.answer = Outcome::Skipped,
            Err(error) => self.answer = Outcome::Refused(error),
        }
        Poll::Ready(())
    }

    /// Begins to end the lock behind the body.
    #[inline(never)]
    fn end(&mut self, work: &mut dyn Works, stands: bool) {
        self.stop(work);
        self.unbind();
        let Phase::Held(taken) = std::mem::replace(&mut self.phase, Phase::Ended) else { return };
        match taken {
            #[cfg(feature = "testing")]
            Taken::SwitchedOff => {}
            Taken::Lease(call) => match call.ending() {
                Ok(Some(ending)) => self.phase = Phase::Ending(ending),
                // It is not the last handle, so there is nothing to wait for.
                Ok(None) => {}
                Err(lost) => self.answer = Outcome::Refused(lost),
            },
            Taken::Row(call) => {
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
                self.answer = Outcome::Refused(error);
            }
        }
        Poll::Ready(())
    }

    /// Drops the body where it stands, inside of its lock.
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

/// The calls around this one need the guard, however its body ends.
impl Drop for State {
    fn drop(&mut self) {
        self.unbind();
    }
}

impl Taken {
    fn poll_body(&mut self, work: &mut dyn Works, context: &mut Context<'_>) -> Poll<bool> {
        match self {
            #[cfg(feature = "testing")]
            Self::SwitchedOff => work.poll(context),
            Self::Lease(call) => {
                let polled = call.inside.enter(|| work.poll(context));
                if polled.is_pending() {
                    return call.poll_loss(context);
                }
                polled
            }
            Self::Row(call) => call.poll_in(|| work.poll(context)),
        }
    }
}

impl LeaseCall {
    /// Ready when the lease is lost: the body is dropped then where it stands. Not when the body itself has released it,
    /// with the commit of a transaction.
    #[inline(never)]
    fn poll_loss(&mut self, context: &mut Context<'_>) -> Poll<bool> {
        if !self.looks_for_loss {
            return Poll::Pending;
        }
        let loss = self.loss.get_or_insert_with(|| {
            let lease = Arc::clone(&self.lease);
            Box::pin(async move { lease.lost().await })
        });
        let loss = ready!(loss.as_mut().poll(context));
        self.looks_for_loss = false;
        self.loss = None;
        if loss == Loss::Released {
            return Poll::Pending;
        }
        self.lost = Some(loss);
        Poll::Ready(false)
    }

    /// `None`: there is nothing to wait for, as it is not the last handle.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when the body was stopped, or when a body that blocked the runtime, or was paused together with it,
    /// has ended after the lease did.
    fn ending(self) -> Result<Option<BoxFuture<'static, Result<(), Error>>>, Error> {
        let Self { hold, lease, lost, inside, .. } = self;
        let lost = lost.or_else(|| lease.loss().filter(|loss| *loss != Loss::Released));
        if let Some(reason) = lost {
            // In front of `inside`.
            drop(hold);
            return Err(lease.lost_error(reason));
        }
        let Some(last) = hold.and_then(Arc::into_inner) else { return Ok(None) };
        Ok(Some(Box::pin(async move {
            release_quietly(last.release().await);
            drop(inside);
            Ok(())
        })))
    }
}
