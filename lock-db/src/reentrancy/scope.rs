//! Scopes: the holders that the calling code is inside of.

use std::any::Any;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::select;
use tokio::sync::watch;

use super::gate::{Gate, Pass};
use super::{Held, ReentryKey};
use crate::clock::timeout;
use crate::error::{Loss, NoReentry, WaitingFor};
use crate::sync::task_local;
use crate::{Error, Kind};

task_local! {
    static SCOPES: Arc<Scopes>;
}

/// The scopes of a piece of code, as a list that its branches share.
#[derive(Debug)]
pub(super) struct Scopes {
    innermost: Arc<Scope>,
    enclosing: Option<Arc<Scopes>>,
}

impl Scopes {
    /// The scopes of the calling code.
    pub(super) fn current() -> Option<Arc<Self>> {
        SCOPES.try_with(Arc::clone).ok()
    }

    /// Runs a future inside of these scopes.
    pub(super) fn scope<F: Future>(self: Arc<Self>, future: F) -> impl Future<Output = F::Output> + use<F> {
        SCOPES.scope(self, future)
    }

    /// Returns these scopes inside of `others`. A scope that is in both lists stays where `others`
    /// has it.
    pub(super) fn within(&self, others: &Arc<Self>) -> Arc<Self> {
        let own: Vec<_> =
            self.iter().map(|scopes| &scopes.innermost).filter(|scope| !others.has(scope)).collect();
        own.into_iter().rev().fold(Arc::clone(others), |enclosing, innermost| {
            Arc::new(Self { innermost: Arc::clone(innermost), enclosing: Some(enclosing) })
        })
    }

    fn has(&self, scope: &Arc<Scope>) -> bool {
        self.iter().any(|scopes| Arc::ptr_eq(&scopes.innermost, scope))
    }

    fn iter(&self) -> impl Iterator<Item = &Self> {
        std::iter::successors(Some(self), |scopes| scopes.enclosing.as_deref())
    }

    #[cfg(feature = "testing")]
    pub(super) fn list(&self) -> Vec<super::Enclosing> {
        let scopes = self.iter().map(|scopes| &scopes.innermost);
        let enclosing = scopes.map(|scope| super::Enclosing {
            locks: scope.lock.locks,
            name: scope.lock.name.clone(),
            kind: scope.kind,
            is_held: scope.held.strong_count() > 0
                && scope.loss.as_ref().is_none_or(|loss| loss.borrow().is_none()),
        });
        enclosing.collect()
    }

    /// Innermost first.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.iter().map(|scopes| scopes.innermost.lock.name.shown())
    }
}

/// A call that is inside of a lock: the one that took it, or one that entered it again.
#[derive(Debug)]
struct Scope {
    lock: ReentryKey,
    kind: Kind,
    /// For the calls inside of this one.
    gate: Arc<Gate>,
    /// What the calls hold. Gone when the last call has ended.
    held: Weak<dyn Any + Send + Sync>,
    loss: Option<watch::Receiver<Option<Loss>>>,
    /// `None` for the call that took the lock.
    admission: Option<Weak<Admission>>,
    /// Whether calls may enter again from inside of this one.
    is_open: bool,
}

/// The right to be inside of an outer scope. Calls further inside share it: siblings wait as long
/// as one of them exists, even if the call in between has ended.
#[derive(Debug)]
struct Admission {
    _pass: Pass,
    _enclosing: Option<Arc<Admission>>,
}

/// What a call has that is inside of a lock.
#[derive(Debug)]
#[must_use = "the lock is released as soon as this is dropped"]
pub(crate) struct Entered<H> {
    /// Declared before `inside`: the next sibling may enter only after this handle is gone.
    pub(crate) held: Arc<H>,
    pub(crate) inside: Inside,
}

/// Must be kept until the handle has been dropped or released.
#[derive(Debug)]
pub(crate) struct Inside {
    scopes: Arc<Scopes>,
    _admission: Option<Arc<Admission>>,
}

impl Inside {
    /// Runs the work of the call, from which others may enter.
    pub(crate) fn scope<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        Arc::clone(&self.scopes).scope(work)
    }

    /// Runs a part of the work, such as one poll.
    pub(crate) fn enter<R>(&self, part: impl FnOnce() -> R) -> R {
        SCOPES.sync_scope(Arc::clone(&self.scopes), part)
    }

    /// Drops a part of the work. The thread's locals may be gone by then, and no code is inside of
    /// a lock then. tokio handles that case only when it drops a future, so this drops one.
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
    pub(crate) fn first(lock: ReentryKey, held: Arc<H>) -> Self {
        Self::taken(lock, held, true)
    }

    /// For the call that took the lock and is not reentrant.
    pub(crate) fn only(lock: ReentryKey, held: Arc<H>) -> Self {
        Self::taken(lock, held, false)
    }

    fn taken(lock: ReentryKey, held: Arc<H>, is_open: bool) -> Self {
        let weak = Arc::downgrade(&held);
        let loss = held.loss();
        let scope =
            Scope { lock, kind: H::KIND, gate: Arc::default(), held: weak, loss, admission: None, is_open };
        let scopes = Scopes { innermost: Arc::new(scope), enclosing: Scopes::current() };
        Self { held, inside: Inside { scopes: Arc::new(scopes), _admission: None } }
    }
}

/// Enters a lock again that the calling code is inside of, without asking the database. `None`: the
/// calling code is not inside of the lock, so it has to be taken.
///
/// # Errors
///
/// [`Error::Timeout`] when a sibling was inside until the wait was over; [`Error::Lost`];
/// [`Error::Reentry`] when the calling code was inside of the lock, but its holder has ended or is
/// not reentrant; [`Error::WrongKind`].
pub(crate) async fn enter<H: Held>(lock: &ReentryKey, wait: Duration) -> Result<Option<Entered<H>>, Error> {
    let Some(current) = Scopes::current() else { return Ok(None) };
    let started = Instant::now();
    let mut ended = None;
    for scopes in current.iter() {
        let scope = &scopes.innermost;
        if scope.lock != *lock {
            continue;
        }
        if scope.kind != H::KIND {
            let name = lock.name.given();
            return Err(Error::WrongKind { name, wanted: H::KIND, found: scope.kind });
        }
        if !scope.is_open {
            scope.refuse()?;
        }
        if let Some((held, inner, admission)) = scope.enter(started, wait).await? {
            let scopes = Scopes { innermost: Arc::new(inner), enclosing: Some(Arc::clone(&current)) };
            let inside = Inside { scopes: Arc::new(scopes), _admission: Some(admission) };
            return Ok(Some(Entered { held, inside }));
        }
        // This call has ended. A call around it may still be there.
        ended = ended.or(Some(scope));
    }
    ended.map_or(Ok(None), |scope| Err(scope.ended()))
}

/// For a call that is not reentrant: it enters neither its own lock nor that of another call, so
/// there is nothing to wait for.
///
/// # Errors
///
/// [`Error::Reentry`] when the calling code is inside of the lock.
pub(crate) fn refuse_nested(lock: &ReentryKey) -> Result<(), Error> {
    let Some(current) = Scopes::current() else { return Ok(()) };
    current
        .iter()
        .map(|scopes| &scopes.innermost)
        .filter(|scope| scope.lock == *lock)
        .try_for_each(|scope| scope.refuse())
}

impl Scope {
    /// Fails as long as the lock is held through this scope.
    fn refuse(&self) -> Result<(), Error> {
        if self.held.strong_count() == 0 {
            return Ok(());
        }
        Err(Error::Reentry { name: self.lock.name.given(), reason: NoReentry::NotReentrant })
    }

    /// Waits for the gate and becomes an inner call. `None`: the call of this scope has ended.
    async fn enter<H: Held>(
        &self,
        started: Instant,
        wait: Duration,
    ) -> Result<Option<(Arc<H>, Self, Arc<Admission>)>, Error> {
        if self.held.strong_count() == 0 {
            return Ok(None);
        }
        let pass = match self.gate.pass_at_once() {
            Some(pass) => Some(pass),
            None => self.wait_for_pass(started, wait).await?,
        };
        let enclosing = match self.admission.as_ref().map(Weak::upgrade) {
            Some(None) => return Ok(None),
            Some(enclosing) => enclosing,
            None => None,
        };
        let Some(held) = self.held.upgrade().and_then(|held| held.downcast::<H>().ok()) else {
            return Ok(None);
        };
        held.check()?;
        let Some(pass) = pass else { return Ok(None) };
        let admission = Arc::new(Admission { _pass: pass, _enclosing: enclosing });
        let inner = Self {
            lock: self.lock.clone(),
            kind: self.kind,
            gate: Arc::default(),
            held: Weak::clone(&self.held),
            loss: self.loss.clone(),
            admission: Some(Arc::downgrade(&admission)),
            is_open: true,
        };
        Ok(Some((held, inner, admission)))
    }

    /// `None` when there is nothing left to wait for.
    async fn wait_for_pass(&self, started: Instant, wait: Duration) -> Result<Option<Pass>, Error> {
        let timed_out = || Error::Timeout {
            name: self.lock.name.given(),
            waited: started.elapsed(),
            waiting_for: WaitingFor::Sibling,
            held_by: None,
        };
        // A timer takes a moment, in which the gate may open. Without a wait the result must not
        // depend on that.
        if wait.is_zero() && self.reported_loss().is_none() {
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
            // An error means that the lock was released.
            Some(mut loss) => drop(loss.wait_for(Option::is_some).await),
            None => std::future::pending().await,
        }
    }

    fn reported_loss(&self) -> Option<Loss> {
        self.loss.as_ref().and_then(|loss| *loss.borrow())
    }

    fn ended(&self) -> Error {
        let name = self.lock.name.given();
        match self.reported_loss() {
            Some(reason) => Error::lost(name, reason),
            None => Error::Reentry { name, reason: NoReentry::HoldEnded },
        }
    }
}
