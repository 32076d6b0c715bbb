//! What can be asked of a session. No database type stands here: the guards of all databases send the same.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::queues::Turn;

use crate::database::{Call, Claim, LeaseKey, LockRow, Server};
use crate::insert::Hold;
use crate::limits::{FIRST_ANSWER, LONGEST_TRY};
use crate::name::Name;
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
        call: Option<Call>,
    },
    /// The database has refused a commit by this lease.
    Lost {
        lease: Arc<LeaseState>,
    },
    /// A lease went from hand to hand to a holder that may have it until then.
    HandedOn {
        until: Instant,
    },
    /// Finds the table, and what kind of server has it; `anew` also when it was found before.
    Locate {
        anew: bool,
        answer: Answer<Server>,
    },
    /// Rules out the last holder of a lock that is not held any more.
    Settle {
        name: Name,
        answer: Answer<()>,
    },
    /// Makes the row of a lease tell transactions that it went to another holder: see `LeaseKey::mark`.
    Mark {
        lease: LeaseKey,
        answer: Answer<()>,
    },
    /// Makes sure that the row of a name is there and of this kind. Answers it, and whether it was missing.
    EnsureRow {
        name: Name,
        kind: Kind,
        answer: Answer<(LockRow, bool)>,
    },
    Look {
        name: Name,
        answer: Answer<Option<LockRow>>,
    },
    Migrate {
        answer: Answer<()>,
    },
    /// Answers what could be better.
    Check {
        answer: Answer<Vec<String>>,
    },
    /// Answered at once, if the session's thread runs.
    Answer(oneshot::Sender<()>),
    /// Dropped when everything is released.
    Close {
        done: watch::Sender<()>,
    },
}

pub(crate) struct Acquire {
    /// By which it is found in the queues.
    pub(crate) number: u64,
    /// All or none of them, in the order in which everybody takes them.
    pub(crate) claims: Vec<Claim>,
    /// For the first so many of the claims.
    pub(crate) turns: Vec<Turn>,
    /// `None`: a try, which never waits for a holder.
    pub(crate) wait: Option<Duration>,
    /// For how long each holder may have its lease.
    pub(crate) at_most: Option<Duration>,
    pub(crate) started: Instant,
    /// Carries the guards themselves: an answer that nobody takes any more is dropped guards, which release.
    pub(crate) answer: Answer<Option<Vec<Hold>>>,
}

impl Acquire {
    /// Until when it is waited for. A try waits for no holder, only for what the database says of one.
    pub(super) fn deadline(&self) -> Instant {
        self.started + self.wait.unwrap_or(LONGEST_TRY)
    }

    /// Until when the database has time for its first answer, to whoever asks for this one, too.
    pub(super) fn first_answer(&self) -> Instant {
        self.deadline().max(self.started + FIRST_ANSWER)
    }
}

impl std::fmt::Debug for Acquire {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Acquire").field("number", &self.number).finish_non_exhaustive()
    }
}
