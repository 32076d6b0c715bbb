//! What an annotated function requests, and its result when the lock is held elsewhere.

use std::borrow::Cow;
use std::time::Duration;

use crate::Error;
use crate::error::WaitingFor;
#[cfg(feature = "testing")]
use crate::options;
use crate::options::{Settings, Wait};
use crate::text::escaped;

/// A request for a lock, with the options of the attribute. It owns its name, so that taking the
/// lock borrows nothing from the function.
pub struct CallRequest {
    pub(crate) name: Cow<'static, str>,
    pub(crate) ttl: Option<Duration>,
    wait: Option<Duration>,
    pub(crate) at_least: Duration,
    pub(crate) at_most: Option<Duration>,
    skips: bool,
    pub(crate) is_reentrant: bool,
    #[cfg(feature = "testing")]
    binds_guard: bool,
}

#[must_use]
#[allow(clippy::unnecessary_box_returns)]
pub fn ask(name: impl Into<Cow<'static, str>>) -> Box<CallRequest> {
    ask_named(name.into())
}

#[allow(clippy::unnecessary_box_returns)]
fn ask_named(name: Cow<'static, str>) -> Box<CallRequest> {
    Box::new(CallRequest {
        name,
        ttl: None,
        wait: None,
        at_least: Duration::ZERO,
        at_most: None,
        skips: false,
        is_reentrant: true,
        #[cfg(feature = "testing")]
        binds_guard: false,
    })
}

/// Boxed and changed in place. Without optimization each value that the function passes on stays on
/// the stack of every call inside of it, once for each time it is passed on.
impl CallRequest {
    pub fn ttl(&mut self, ttl: Duration) {
        self.ttl = Some(ttl);
    }

    pub fn wait(&mut self, wait: Duration) {
        self.wait = Some(wait);
    }

    pub fn at_least(&mut self, at_least: Duration) {
        self.at_least = at_least;
    }

    pub fn at_most(&mut self, at_most: Duration) {
        self.at_most = Some(at_most);
    }

    pub fn not_reentrant(&mut self) {
        self.is_reentrant = false;
    }

    pub fn or_skip(&mut self) {
        self.skips = true;
    }

    /// The body binds the guard, so it can't run without one.
    #[cfg_attr(not(feature = "testing"), allow(clippy::unused_self, clippy::needless_pass_by_ref_mut))]
    pub(crate) fn binds(&mut self) {
        #[cfg(feature = "testing")]
        {
            self.binds_guard = true;
        }
    }

    /// With `skip` and without a `wait` of its own, a call does not wait.
    pub(crate) fn waits(&self, settings: &Settings) -> Result<Wait, Error> {
        if self.skips && self.wait.is_none() { Ok(Wait::Try) } else { settings.wait(self.wait) }
    }

    /// Whether the function is to run without its lock.
    #[cfg(feature = "testing")]
    pub(crate) fn is_switched_off(&self) -> Result<bool, Error> {
        let is_switched_off = crate::test_support::runs_without_lock(&self.name, self.ttl, self.wait)?;
        options::check_at_least(self.at_least)?;
        options::check_at_most(self.at_most, self.at_least)?;
        if is_switched_off && self.binds_guard {
            return Err(crate::test_support::no_lease(&self.name));
        }
        Ok(is_switched_off)
    }

    /// The error when the lock is held and the request does not wait.
    pub(crate) fn taken_elsewhere(&self) -> Error {
        Error::Timeout {
            name: self.name.clone().into_owned(),
            waited: Duration::ZERO,
            waiting_for: WaitingFor::Lock,
            held_by: None,
        }
    }

    /// The lock, or `None` when it is held elsewhere and the function is to be skipped. Only a lock
    /// that is *held* is a reason to skip. A pool without free connections, for example, does not
    /// mean that another process does the work.
    pub(crate) fn or_skipped<T>(&self, taken: Result<T, Error>) -> Result<Option<T>, Error> {
        match taken {
            Err(Error::Timeout { waiting_for: WaitingFor::Lock | WaitingFor::Sibling, name, .. })
                if self.skips =>
            {
                tracing::debug!(lock = %escaped(&name), "held elsewhere: the annotated function is skipped");
                Ok(None)
            }
            taken => taken.map(Some),
        }
    }
}
