//! What an annotated function asks for, and what becomes of it when somebody else has the lock.

use std::time::Duration;

use crate::error::WaitingFor;
use crate::{Error, limits};

/// A lock that is asked for, by the options of the attribute.
#[derive(Clone, Copy)]
pub struct Ask<'a, P = Waits> {
    pub(crate) asked: Asked<'a>,
    policy: P,
}

#[derive(Clone, Copy)]
/// What a lock is asked for with, whatever the policy.
pub struct Asked<'a> {
    pub(crate) name: &'a str,
    pub(crate) ttl: Option<Duration>,
    wait: Option<Duration>,
    pub(crate) at_least: Duration,
    pub(crate) at_most: Option<Duration>,
    skips: bool,
    pub(crate) is_reentrant: bool,
    binds_lease: bool,
}

#[must_use]
pub fn ask(name: &str) -> Ask<'_> {
    let asked = Asked {
        name,
        ttl: None,
        wait: None,
        at_least: Duration::ZERO,
        at_most: None,
        skips: false,
        is_reentrant: true,
        binds_lease: false,
    };
    Ask { asked, policy: Waits }
}

impl<'a> Ask<'a> {
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.asked.ttl = Some(ttl);
        self
    }

    #[must_use]
    pub fn wait(mut self, wait: Duration) -> Self {
        self.asked.wait = Some(wait);
        self
    }

    #[must_use]
    pub fn at_least(mut self, at_least: Duration) -> Self {
        self.asked.at_least = at_least;
        self
    }

    #[must_use]
    pub fn at_most(mut self, at_most: Duration) -> Self {
        self.asked.at_most = Some(at_most);
        self
    }

    #[must_use]
    pub fn not_reentrant(mut self) -> Self {
        self.asked.is_reentrant = false;
        self
    }

    #[must_use]
    pub fn with_lease(mut self) -> Self {
        self.asked.binds_lease = true;
        self
    }

    #[must_use]
    pub fn or_skip(mut self) -> Ask<'a, Skips> {
        self.asked.skips = true;
        Ask { asked: self.asked, policy: Skips }
    }
}

impl<P: Policy> Ask<'_, P> {
    pub(crate) fn settle<H>(&self, taken: Result<H, Error>) -> Result<P::Taken<H>, Error> {
        match taken {
            Ok(held) => Ok(self.policy.taken(held)),
            Err(error) => self.policy.not_taken(error),
        }
    }
}

impl Asked<'_> {
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
        let is_switched_off = crate::testing::runs_without_lock(self.name, self.ttl, self.wait)?;
        limits::check_at_least(self.at_least)?;
        limits::check_at_most(self.at_most, self.at_least)?;
        if is_switched_off && self.binds_lease {
            return Err(crate::testing::no_lease(self.name));
        }
        Ok(is_switched_off)
    }

    /// Somebody has it, and nobody waits.
    pub(crate) fn taken_elsewhere(&self) -> Error {
        Error::Timeout {
            name: self.name.to_owned(),
            waited: Duration::ZERO,
            waiting_for: WaitingFor::Lock,
            held_by: None,
        }
    }
}

/// What becomes of a call that finds the lock held elsewhere.
pub trait Policy: Copy {
    type Taken<H>;

    fn taken<H>(self, held: H) -> Self::Taken<H>;

    fn not_taken<H>(self, error: Error) -> Result<Self::Taken<H>, Error>;
}

/// It fails when its wait is over.
#[derive(Clone, Copy)]
pub struct Waits;

impl Policy for Waits {
    type Taken<H> = H;

    fn taken<H>(self, held: H) -> H {
        held
    }

    fn not_taken<H>(self, error: Error) -> Result<H, Error> {
        Err(error)
    }
}

/// It is skipped. Only when the lock was held: a pool without connections, say, is no reason to believe that somebody
/// else does the work.
#[derive(Clone, Copy)]
pub struct Skips;

impl Policy for Skips {
    type Taken<H> = Option<H>;

    fn taken<H>(self, held: H) -> Option<H> {
        Some(held)
    }

    fn not_taken<H>(self, error: Error) -> Result<Option<H>, Error> {
        match error {
            Error::Timeout { waiting_for: WaitingFor::Lock | WaitingFor::Sibling, name, .. } => {
                tracing::debug!(lock = name, "held elsewhere: the annotated function is skipped");
                Ok(None)
            }
            error => Err(error),
        }
    }
}
