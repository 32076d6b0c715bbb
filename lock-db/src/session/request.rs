//! What can be asked of a session. No database type stands here: the guards of all databases send the same.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::database::LockRow;
use crate::insert::Hold;
use crate::secret::Secret;
use crate::{Error, Kind};

use super::LeaseState;

pub(crate) type Answer<T> = oneshot::Sender<Result<T, Error>>;

pub(crate) enum Request {
    Acquire(Acquire),
    /// Without an `answer` for a guard that was dropped.
    Release {
        lease: Arc<LeaseState>,
        answer: Option<Answer<()>>,
    },
    /// A transaction that is still open has released it.
    ReleasedIn {
        lease: Arc<LeaseState>,
    },
    /// A transaction that has committed released it.
    Released {
        lease: Arc<LeaseState>,
    },
    /// Makes sure that the row of a name is there and of this kind. Answers its id, and whether it had to be made.
    EnsureRow {
        name: Arc<str>,
        kind: Kind,
        answer: Answer<(i64, bool)>,
    },
    Look {
        name: Arc<str>,
        answer: Answer<Option<LockRow>>,
    },
    Migrate {
        answer: Answer<()>,
    },
    CheckSchema {
        answer: Answer<()>,
    },
    Close {
        answer: oneshot::Sender<()>,
    },
}

pub(crate) struct Acquire {
    pub(crate) name: Arc<str>,
    pub(crate) secret: Secret,
    pub(crate) owner: Arc<str>,
    pub(crate) ttl: Duration,
    /// `None`: a try, which never waits for a holder.
    pub(crate) wait: Option<Duration>,
    pub(crate) started: Instant,
    /// Carries the guard itself: an answer that nobody takes any more is a dropped guard, which releases.
    pub(crate) answer: Answer<Option<Hold>>,
}
