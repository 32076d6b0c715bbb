//! The lock that a call of an annotated function is inside of.

use std::sync::Arc;
use std::task::{Context, Poll, ready};

use super::{BoxFuture, RowCall};
use crate::Error;
use crate::error::Loss;
use crate::lease::release_quietly;
use crate::reentrancy::{Entered, Inside};
use crate::session::{LeaseHandle, LeaseState};

/// `None`: held elsewhere, and the function is to be skipped.
pub(crate) type TakingLock = BoxFuture<'static, Result<Option<HeldLock>, Error>>;

/// A lock that a call is inside of.
pub(crate) enum HeldLock {
    /// Inside of `testing::without_locks`.
    #[cfg(feature = "testing")]
    SwitchedOff,
    Lease(LeaseCall),
    Row(RowCall),
}

pub(crate) struct LeaseCall {
    /// Declared before `inside`: the next sibling may enter only after this handle is gone. `None`
    /// while the body has it.
    pub(crate) handle: Option<Arc<LeaseHandle>>,
    lease: Arc<LeaseState>,
    /// Created when the body returns `Pending` for the first time. `None` also when it need not be
    /// polled any more.
    loss: Option<BoxFuture<'static, Loss>>,
    looks_for_loss: bool,
    /// Why the body was stopped.
    lost: Option<Loss>,
    inside: Inside,
}

impl HeldLock {
    pub(crate) fn lease(Entered { held, inside }: Entered<LeaseHandle>) -> Self {
        let lease = Arc::clone(&held.lease);
        Self::Lease(LeaseCall {
            handle: Some(held),
            lease,
            loss: None,
            looks_for_loss: true,
            lost: None,
            inside,
        })
    }

    /// Ends a call whose body did not run.
    pub(crate) fn withdraw(self) {
        if let Self::Row(call) = self {
            call.withdraw();
        }
    }

    #[cfg_attr(not(feature = "testing"), allow(clippy::unnecessary_wraps))]
    pub(crate) fn inside(&self) -> Option<&Inside> {
        match self {
            #[cfg(feature = "testing")]
            Self::SwitchedOff => None,
            Self::Lease(call) => Some(&call.inside),
            Self::Row(call) => Some(call.inside()),
        }
    }
}

impl HeldLock {
    /// Polls the body inside of the lock.
    pub(crate) fn poll_body(
        &mut self,
        work: &mut dyn FnMut(&mut Context<'_>) -> Poll<bool>,
        context: &mut Context<'_>,
    ) -> Poll<bool> {
        match self {
            #[cfg(feature = "testing")]
            Self::SwitchedOff => work(context),
            Self::Lease(call) => {
                let polled = call.inside.enter(|| work(context));
                if polled.is_pending() {
                    return call.poll_loss(context);
                }
                polled
            }
            Self::Row(call) => call.poll_in(|| work(context)),
        }
    }
}

impl LeaseCall {
    /// Ready when the lease is lost; the body is then dropped at its current await point. Not ready
    /// when the body itself has released the lease, with the commit of a transaction.
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

    /// `None`: this is not the last handle, so there is nothing to wait for.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when the body was stopped. Also when the body ended after the lease was
    /// lost, because it blocked the runtime or was paused together with it.
    pub(crate) fn ending(self) -> Result<Option<BoxFuture<'static, Result<(), Error>>>, Error> {
        let Self { handle, lease, lost, inside, .. } = self;
        let lost = lost.or_else(|| lease.loss().filter(|loss| *loss != Loss::Released));
        if let Some(reason) = lost {
            // Before `inside` is dropped.
            drop(handle);
            return Err(lease.lost_error(reason));
        }
        let Some(last) = handle.and_then(Arc::into_inner) else { return Ok(None) };
        Ok(Some(Box::pin(async move {
            release_quietly(last.release().await);
            drop(inside);
            Ok(())
        })))
    }
}
