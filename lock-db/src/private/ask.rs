//! What an annotated function asks for, and what becomes of it when somebody else has the lock.

use std::borrow::Cow;
use std::time::Duration;

use crate::error::WaitingFor;
use crate::name::escaped;
use crate::{Error, limits};

/// A lock that is asked for, by the options of the attribute. It owns its name, so that taking the lock borrows nothing from
/// the function.
pub struct Ask {
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
pub fn ask(name: impl Into<Cow<'static, str>>) -> Box<Ask> {
    ask_named(name.into())
}

#[allow(clippy::unnecessary_box_returns)]
fn ask_named(name: Cow<'static, str>) -> Box<Ask> {
    Box::new(Ask {
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

/// Boxed, and changed where it is: in unoptimised programs all that the function hands on stays on the stack of every call
/// inside of it, as often as it was handed on.
impl Ask {
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
    pub(super) fn binds(&mut self) {
        #[cfg(feature = "testing")]
        {
            self.binds_guard = true;
        }
    }

    /// How long to wait. `None`: not at all, which is what `skip` does unless a `wait` says otherwise.
    pub(crate) fn patience(&self, default: Duration) -> Result<Option<Duration>, Error> {
        match self.wait {
            None if self.skips => Ok(None),
            wait => limits::check_wait(wait.unwrap_or(default)).map(Some),
        }
    }

    /// Whether the function is to run without its lock.
    #[cfg(feature = "testing")]
    pub(crate) fn is_switched_off(&self) -> Result<bool, Error> {
        let is_switched_off = crate::testing::runs_without_lock(&self.name, self.ttl, self.wait)?;
        limits::check_at_least(self.at_least)?;
        limits::check_at_most(self.at_most, self.at_least)?;
        if is_switched_off && self.binds_guard {
            return Err(crate::testing::no_lease(&self.name));
        }
        Ok(is_switched_off)
    }

    /// Somebody has it, and nobody waits.
    pub(crate) fn taken_elsewhere(&self) -> Error {
        Error::Timeout {
            name: self.name.clone().into_owned(),
            waited: Duration::ZERO,
            waiting_for: WaitingFor::Lock,
            held_by: None,
        }
    }

    /// The lock, unless it is held elsewhere and the function is to be skipped then. Only when it was *held*: a pool without
    /// connections, say, is no reason to believe that somebody else does the work.
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
