//! The requests to a session. They contain no database type, so the guards of all databases send
//! the same ones.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::local_queue::Permit;

use super::prune::Walk;
use crate::database::{Claim, LeaseKey, ListPage, LockRow, Notification, PruneScope, Server};
use crate::name::Name;
use crate::options::{FIRST_ANSWER, LONGEST_TRY, Wait};
use crate::session::LeaseHandle;
use crate::{CheckReport, Error, Kind, LockInfo};

use super::LeaseState;

pub(crate) type AnswerSender<T> = oneshot::Sender<Result<T, Error>>;

pub(crate) enum Request {
    Acquire(Acquire),
    /// `answer` is `None` for a guard that was dropped.
    Release {
        lease: Arc<LeaseState>,
        answer: Option<AnswerSender<()>>,
    },
    /// A transaction that is still open has released it.
    ReleasedIn {
        lease: Arc<LeaseState>,
    },
    /// A transaction that has committed released it.
    Released {
        lease: Arc<LeaseState>,
        notification: Option<Notification>,
    },
    /// The database has refused a commit under this lease.
    Lost {
        lease: Arc<LeaseState>,
    },
    /// A lease was handed on to a holder that may have it until then.
    HandedOn {
        until: Instant,
    },
    /// Locates the table, and determines the kind of server. With `anew` also if this was done
    /// before.
    Locate {
        anew: bool,
        answer: AnswerSender<Server>,
    },
    /// Makes sure that the last holder of a lock that is not held can't commit any more.
    Settle {
        name: Name,
        answer: AnswerSender<()>,
    },
    /// Marks the row of a lease, so that transactions see that it was handed on: see
    /// `LeaseKey::mark`.
    Mark {
        lease: LeaseKey,
        answer: AnswerSender<()>,
    },
    /// Makes sure that the row of a name exists and is of this kind. Returns the row. With
    /// `instead_of`, the id of a row that is gone, no row is created unless there is one with a
    /// larger id.
    EnsureRow {
        name: Name,
        kind: Kind,
        instead_of: Option<i64>,
        answer: AnswerSender<LockRow>,
    },
    Read {
        name: Name,
        answer: AnswerSender<Option<LockRow>>,
    },
    /// Reads the lock of a name, for people.
    Info {
        name: Name,
        answer: AnswerSender<Option<LockInfo>>,
    },
    /// Reads a page of locks, for people. The names begin with a prefix of that many bytes. Also answers
    /// with the last name that was looked at, if there may be more.
    List {
        page: ListPage,
        prefix: usize,
        answer: AnswerSender<(Vec<LockInfo>, Option<String>)>,
    },
    /// Ends the lease whose grant has this number. Answers whether it was the present one.
    ForceRelease {
        name: Name,
        fencing_token: i64,
        answer: AnswerSender<bool>,
    },
    /// Whether another process waits for a lease.
    IsWanted {
        name: Name,
        answer: AnswerSender<bool>,
    },
    Migrate {
        answer: AnswerSender<()>,
    },
    /// Reports on the table and its database. With `prunes` also on the right to delete rows.
    Check {
        prunes: bool,
        answer: AnswerSender<CheckReport>,
    },
    /// Carries out the next statement of a walk that removes unused rows.
    Prune {
        scope: PruneScope,
        walk: Walk,
        answer: AnswerSender<Walk>,
    },
    /// Answered at once, if the session's thread runs.
    Ping(oneshot::Sender<()>),
    /// Dropped when everything is released.
    Close {
        done: watch::Sender<()>,
    },
}

pub(crate) struct Acquire {
    /// Identifies the request in the queues, and orders it.
    pub(crate) number: u64,
    /// All or none of them are taken, in the order that all requests use.
    pub(crate) claims: Vec<Claim>,
    /// The permits of the first claims, as many as there are so far.
    pub(crate) permits: Vec<Permit>,
    /// `None`: a try, which never waits for a holder.
    pub(crate) wait: Wait,
    /// How long each holder may have its lease.
    pub(crate) at_most: Option<Duration>,
    pub(crate) started: Instant,
    /// Carries the guards themselves. An answer that is never received drops them, which releases
    /// the leases.
    pub(crate) answer: AnswerSender<Option<Vec<LeaseHandle>>>,
}

impl Acquire {
    /// When the wait ends. A try does not wait for a holder, only for the answer of the database.
    pub(super) fn deadline(&self) -> Instant {
        self.started + self.wait.limit().unwrap_or(LONGEST_TRY)
    }

    /// Until when the database has time for its first answer. This also applies if another caller
    /// asks on behalf of this one.
    pub(super) fn first_answer(&self) -> Instant {
        self.deadline().max(self.started + FIRST_ANSWER)
    }
}

impl std::fmt::Debug for Acquire {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Acquire").field("number", &self.number).finish_non_exhaustive()
    }
}
