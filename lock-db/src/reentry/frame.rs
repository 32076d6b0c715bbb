//! Frames: the holders that the calling code is inside of.

use std::any::Any;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::select;
use tokio::sync::watch;

use super::gate::{Gate, Pass};
use super::{Held, Lock};
use crate::clock::timeout;
use crate::error::{Loss, NoReentry, WaitingFor};
use crate::sync::task_local;
use crate::{Error, Kind};

task_local! {
    static FRAMES: Arc<Frames>;
}

/// The frames around a piece of code, as a list that its branches share.
#[derive(Debug)]
pub(super) struct Frames {
    innermost: Arc<Frame>,
    around: Option<Arc<Frames>>,
}

impl Frames {
    /// Those of the calling code.
    pub(super) fn current() -> Option<Arc<Self>> {
        FRAMES.try_with(Arc::clone).ok()
    }

    /// Runs a future inside of these frames.
    pub(super) fn scope<F: Future>(self: Arc<Self>, future: F) -> impl Future<Output = F::Output> + use<F> {
        FRAMES.scope(self, future)
    }

    /// These, and around them the others: those that are in both stay where the others have them, further out.
    pub(super) fn within(&self, others: &Arc<Self>) -> Arc<Self> {
        let own: Vec<_> =
            self.iter().map(|frames| &frames.innermost).filter(|frame| !others.has(frame)).collect();
        own.into_iter().rev().fold(Arc::clone(others), |around, innermost| {
            Arc::new(Self { innermost: Arc::clone(innermost), around: Some(around) })
        })
    }

    fn has(&self, frame: &Arc<Frame>) -> bool {
        self.iter().any(|frames| Arc::ptr_eq(&frames.innermost, frame))
    }

    fn iter(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |frames| frames.around.as_deref())
    }

    #[cfg(feature = "testing")]
    pub(super) fn list(&self) -> Vec<super::Around> {
        let frames = self.iter().map(|frames| &frames.innermost);
        let around = frames.map(|frame| super::Around {
            locks: frame.lock.locks,
            name: frame.lock.name.clone(),
            kind: frame.kind,
            is_held: frame.held.strong_count() > 0
                && frame.loss.as_ref().is_none_or(|loss| loss.borrow().is_none()),
        });
        around.collect()
    }

    /// Innermost first.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.iter().map(|frames| frames.innermost.lock.name.shown())
    }
}

/// A call that is inside of a lock: the one that took it, or one that entered it again.
#[derive(Debug)]
struct Frame {
    lock: Lock,
    kind: Kind,
    /// For the calls inside of this one.
    gate: Arc<Gate>,
    /// What the calls hold; gone when the last one has ended.
    held: Weak<dyn Any + Send + Sync>,
    loss: Option<watch::Receiver<Option<Loss>>>,
    /// `None` for the call that took the lock.
    place: Option<Weak<Place>>,
    /// Whether calls may enter again from inside of this one.
    is_open: bool,
}

/// The right to be inside of an outer frame. The calls further inside share it: as long as one of them is there, the
/// siblings wait, even if the call in between has ended.
#[derive(Debug)]
struct Place {
    _pass: Pass,
    _around: Option<Arc<Place>>,
}

/// What a call has that is inside of a lock.
#[derive(Debug)]
#[must_use = "the lock is released as soon as this is dropped"]
pub(crate) struct Entered<H> {
    /// In front of `inside`: the next sibling gets in when this handle is gone.
    pub(crate) held: Arc<H>,
    pub(crate) inside: Inside,
}

/// To be kept until the handle has been given up.
#[derive(Debug)]
pub(crate) struct Inside {
    frames: Arc<Frames>,
    _place: Option<Arc<Place>>,
}

impl Inside {
    /// Runs the work of the call, from which others may enter.
    pub(crate) fn scope<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        Arc::clone(&self.frames).scope(work)
    }

    /// Runs a part of the work, such as one poll.
    pub(crate) fn enter<R>(&self, part: impl FnOnce() -> R) -> R {
        FRAMES.sync_scope(Arc::clone(&self.frames), part)
    }

    /// Drops a part of the work. That may be when the thread's locals are gone already, where nobody can be inside of
    /// anything; tokio knows what to do then when it drops a future, and only then.
    pub(crate) fn drop_within(&self, drops: impl FnOnce()) {
        drop(self.scope(WhenDropped(Some(drops))));
    }
}

/// A future that is not polled.
struct WhenDropped<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Future for WhenDropped<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}

impl<F: FnOnce()> Drop for WhenDropped<F> {
    fn drop(&mut self) {
        if let Some(drops) = self.0.take() {
            drops();
        }
    }
}

impl<H: Held> Entered<H> {
    /// For the call that took the lock.
    pub(crate) fn first(lock: Lock, held: Arc<H>) -> Self {
        Self::taken(lock, held, true)
    }

    /// For the call that took the lock and lets nobody in behind it.
    pub(crate) fn only(lock: Lock, held: Arc<H>) -> Self {
        Self::taken(lock, held, false)
    }

    fn taken(lock: Lock, held: Arc<H>, is_open: bool) -> Self {
        let weak = Arc::downgrade(&held);
        let loss = held.loss();
        let frame =
            Frame { lock, kind: H::KIND, gate: Arc::default(), held: weak, loss, place: None, is_open };
        let frames = Frames { innermost: Arc::new(frame), around: Frames::current() };
        Self { held, inside: Inside { frames: Arc::new(frames), _place: None } }
    }
}

/// Enters a lock again that the calling code is inside of, without asking anybody. `None` when it is not: then the lock is
/// there to be taken.
///
/// # Errors
///
/// [`Error::Timeout`] when a sibling was inside until the wait was over; [`Error::Lost`]; [`Error::Reentry`] when the
/// lock was held once, but its hold has ended, or lets nobody in again; [`Error::WrongKind`].
pub(crate) async fn enter<H: Held>(lock: &Lock, wait: Duration) -> Result<Option<Entered<H>>, Error> {
    let Some(current) = Frames::current() else { return Ok(None) };
    let started = Instant::now();
    let mut ended = None;
    for frames in current.iter() {
        let frame = &frames.innermost;
        if frame.lock != *lock {
            continue;
        }
        if frame.kind != H::KIND {
            let name = lock.name.given();
            return Err(Error::WrongKind { name, wanted: H::KIND, found: frame.kind });
        }
        if !frame.is_open {
            frame.refuse()?;
        }
        if let Some((held, inner, place)) = frame.enter(started, wait).await? {
            let frames = Frames { innermost: Arc::new(inner), around: Some(Arc::clone(&current)) };
            let inside = Inside { frames: Arc::new(frames), _place: Some(place) };
            return Ok(Some(Entered { held, inside }));
        }
        // This call has ended. One that it was made in may still be there.
        ended = ended.or(Some(frame));
    }
    ended.map_or(Ok(None), |frame| Err(frame.ended()))
}

/// For a call that does not run inside of itself, nor of anybody else who has the lock: there is nothing to wait for.
///
/// # Errors
///
/// [`Error::Reentry`] when the calling code is inside of the lock.
pub(crate) fn refuse_nested(lock: &Lock) -> Result<(), Error> {
    let Some(current) = Frames::current() else { return Ok(()) };
    current
        .iter()
        .map(|frames| &frames.innermost)
        .filter(|frame| frame.lock == *lock)
        .try_for_each(|frame| frame.refuse())
}

impl Frame {
    /// Fails as long as somebody has the lock by way of this.
    fn refuse(&self) -> Result<(), Error> {
        if self.held.strong_count() == 0 {
            return Ok(());
        }
        Err(Error::Reentry { name: self.lock.name.given(), reason: NoReentry::NotReentrant })
    }

    /// Waits for the gate, and becomes an inner call. `None`: this one is there no more.
    async fn enter<H: Held>(
        &self,
        started: Instant,
        wait: Duration,
    ) -> Result<Option<(Arc<H>, Self, Arc<Place>)>, Error> {
        if self.held.strong_count() == 0 {
            return Ok(None);
        }
        let pass = match self.gate.pass_at_once() {
            Some(pass) => Some(pass),
            None => self.wait_for_pass(started, wait).await?,
        };
        let around = match self.place.as_ref().map(Weak::upgrade) {
            Some(None) => return Ok(None),
            Some(around) => around,
            None => None,
        };
        let Some(held) = self.held.upgrade().and_then(|held| held.downcast::<H>().ok()) else {
            return Ok(None);
        };
        held.check()?;
        let Some(pass) = pass else { return Ok(None) };
        let place = Arc::new(Place { _pass: pass, _around: around });
        let inner = Self {
            lock: self.lock.clone(),
            kind: self.kind,
            gate: Arc::default(),
            held: Weak::clone(&self.held),
            loss: self.loss.clone(),
            place: Some(Arc::downgrade(&place)),
            is_open: true,
        };
        Ok(Some((held, inner, place)))
    }

    /// `None` when there is nothing left to wait for.
    async fn wait_for_pass(&self, started: Instant, wait: Duration) -> Result<Option<Pass>, Error> {
        let timed_out = || Error::Timeout {
            name: self.lock.name.given(),
            waited: started.elapsed(),
            waiting_for: WaitingFor::Sibling,
            held_by: None,
        };
        // A timer takes a moment, in which the gate may open: whoever does not wait gets the same answer every time.
        if wait.is_zero() && self.told_loss().is_none() {
            return Err(timed_out());
        }
        if Handle::try_current().is_err() {
            return Err(Error::InvalidOption {
                option: "runtime",
                value: "none".into(),
                reason: "siblings within a holder wait for each other inside a tokio runtime",
            });
        }
        let left = wait.saturating_sub(started.elapsed());
        let passed = select! {
            biased;
            () = self.over() => return Ok(None),
            passed = timeout(left, self.gate.pass()) => passed,
        };
        passed.map(Some).map_err(|_elapsed| timed_out())
    }

    /// Resolves when the lock is lost or released.
    async fn over(&self) {
        match self.loss.clone() {
            // An error says that it was released.
            Some(mut loss) => drop(loss.wait_for(Option::is_some).await),
            None => std::future::pending().await,
        }
    }

    fn told_loss(&self) -> Option<Loss> {
        self.loss.as_ref().and_then(|loss| *loss.borrow())
    }

    fn ended(&self) -> Error {
        let name = self.lock.name.given();
        match self.told_loss() {
            Some(reason) => Error::lost(name, reason),
            None => Error::Reentry { name, reason: NoReentry::HoldEnded },
        }
    }
}
