//! All ways to ask for a lock, and what each of them answered.

use std::time::Duration;

use lock_db::{Error, Kind, LockDatabase, Locks, WaitingFor, distributed_lock};
use lock_tests::Backend;
use sqlx::{Pool, Transaction};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Longer than any request takes, whatever the database does.
const PATIENCE: Duration = Duration::from_mins(1);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Lease,
    Leases,
    LeaseIn,
    LeasesIn,
    LeaseOrSkip,
    Row,
    RowIn,
    RowsIn,
    RowOrSkip,
    RowInOrSkip,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    pub way: Way,
    /// `None`: a try. A function that skips has a wait of its own, which is zero then.
    pub wait: Option<Duration>,
}

#[derive(Debug)]
pub enum Answer {
    Taken,
    /// `None`, or skipped.
    HeldElsewhere,
    Failed(Error),
}

impl Way {
    pub fn kind(self) -> Kind {
        match self {
            Self::Lease | Self::Leases | Self::LeaseIn | Self::LeasesIn | Self::LeaseOrSkip => Kind::Insert,
            _ => Kind::Row,
        }
    }

    /// Whether it is asked in a transaction of the caller.
    pub fn is_in_transaction(self) -> bool {
        matches!(self, Self::LeaseIn | Self::LeasesIn | Self::RowIn | Self::RowsIn | Self::RowInOrSkip)
    }

    fn skips(self) -> bool {
        matches!(self, Self::LeaseOrSkip | Self::RowOrSkip | Self::RowInOrSkip)
    }
}

impl Request {
    /// Each way, with each wait and as a try.
    pub fn all(waits: &[Duration]) -> Vec<Self> {
        use Way::{
            Lease, LeaseIn, LeaseOrSkip, Leases, LeasesIn, Row, RowIn, RowInOrSkip, RowOrSkip, RowsIn,
        };
        let mut requests = Vec::new();
        for way in [Lease, Leases, LeaseIn, LeasesIn, LeaseOrSkip, Row, RowIn, RowsIn, RowOrSkip, RowInOrSkip]
        {
            // There is no try of several leases in a transaction.
            if way != LeasesIn {
                requests.push(Self { way, wait: None });
            }
            requests.extend(waits.iter().map(|wait| Self { way, wait: Some(*wait) }));
        }
        requests
    }

    /// In the caller's transaction, if that is its way.
    async fn ask<DB: Backend>(
        self,
        locks: &Locks<DB>,
        name: &str,
        transaction: Option<&mut Transaction<'_, DB>>,
    ) -> Answer {
        let wait = self.wait.unwrap_or_default();
        let several = [name.to_owned(), format!("{name}, the second")];
        let (lease, row) = (locks.insert_lock(name).wait(wait), locks.row_lock(name).wait(wait));
        let (leases, rows) = (locks.insert_locks(&several).wait(wait), locks.row_locks(&several).wait(wait));
        match (self.way, transaction, self.wait) {
            (Way::Lease, None, Some(_)) => taken(lease.acquire().await),
            (Way::Lease, None, None) => tried(lease.try_acquire().await),
            (Way::Leases, None, Some(_)) => taken(leases.acquire().await),
            (Way::Leases, None, None) => tried(leases.try_acquire().await),
            (Way::LeaseIn, Some(transaction), Some(_)) => taken(lease.acquire_in(transaction).await),
            (Way::LeaseIn, Some(transaction), None) => tried(lease.try_acquire_in(transaction).await),
            (Way::LeasesIn, Some(transaction), _) => taken(leases.acquire_in(transaction).await),
            (Way::LeaseOrSkip, None, _) => tried(lease_or_skip(locks, name, wait).await),
            (Way::Row, None, Some(_)) => taken(row.acquire().await),
            (Way::Row, None, None) => tried(row.try_acquire().await),
            (Way::RowIn, Some(transaction), Some(_)) => taken(row.acquire_in(transaction).await),
            (Way::RowIn, Some(transaction), None) => tried(row.try_acquire_in(transaction).await),
            (Way::RowsIn, Some(transaction), Some(_)) => taken(rows.acquire_in(transaction).await),
            (Way::RowsIn, Some(transaction), None) => tried(rows.try_acquire_in(transaction).await),
            (Way::RowOrSkip, None, _) => tried(row_or_skip(locks, name, wait).await),
            (Way::RowInOrSkip, Some(transaction), _) => {
                tried(row_in_or_skip(locks, name, wait, transaction).await)
            }
            (way, transaction, _) => panic!("{way:?} with a transaction: {}", transaction.is_some()),
        }
    }

    /// What is wrong with an answer where nobody knows whether the lock is held: it is to say why, and that another attempt may
    /// succeed.
    fn is_not_unknown(self, answer: &Answer) -> Option<String> {
        match answer {
            Answer::Failed(error @ (Error::Database { source, .. } | Error::Unreachable { source, .. }))
                if error.is_retryable() && !source.to_string().is_empty() =>
            {
                None
            }
            answer => Some(format!("{self:?}: {answer:?}")),
        }
    }

    /// What is wrong with an answer where the lock is held by this owner, if that is to be known.
    fn is_not_held(self, answer: &Answer, owner: Option<&str>) -> Option<String> {
        match answer {
            Answer::HeldElsewhere if self.wait.is_none() || self.way.skips() => None,
            Answer::Failed(Error::Timeout { waiting_for: WaitingFor::Lock, held_by, waited, .. })
                if self.wait.is_some_and(|wait| wait <= *waited)
                    && !self.way.skips()
                    && owner.is_none_or(|owner| {
                        held_by.as_ref().is_some_and(|info| info.owner.contains(owner))
                    }) =>
            {
                None
            }
            answer => Some(format!("{self:?}, held by {owner:?}: {answer:?}")),
        }
    }
}

/// The answers of several requests, and what is wrong with them.
pub struct Answers(Vec<(Request, Answer)>);

impl Answers {
    #[must_use]
    pub fn not_unknown(&self, circumstances: &str) -> Vec<String> {
        let wrong = self.0.iter().filter_map(|(request, answer)| request.is_not_unknown(answer));
        wrong.map(|wrong| format!("{circumstances}: {wrong}")).collect()
    }

    #[must_use]
    pub fn not_held(
        &self,
        circumstances: &str,
        owner: impl Fn(Request) -> Option<&'static str>,
    ) -> Vec<String> {
        let wrong =
            self.0.iter().filter_map(|(request, answer)| request.is_not_held(answer, owner(*request)));
        wrong.map(|wrong| format!("{circumstances}: {wrong}")).collect()
    }

    /// That asking again is of no use.
    #[must_use]
    pub fn not_refused(&self, circumstances: &str) -> Vec<String> {
        let is_refused = |answer: &Answer| matches!(answer, Answer::Failed(error @ (Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. })) if !error.is_retryable());
        let wrong = self.0.iter().filter(|(_, answer)| !is_refused(answer));
        wrong.map(|(request, answer)| format!("{circumstances}: {request:?}: {answer:?}")).collect()
    }

    #[must_use]
    pub fn not_taken(&self, circumstances: &str) -> Vec<String> {
        let wrong = self.0.iter().filter(|(_, answer)| !matches!(answer, Answer::Taken));
        wrong.map(|(request, answer)| format!("{circumstances}: {request:?}: {answer:?}")).collect()
    }
}

/// Shows all that is wrong.
#[track_caller]
pub fn assert_none(wrong: &[String]) {
    assert!(wrong.is_empty(), "{} answers are wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// Requests for one name or one each, all at the same time.
pub struct Requests<DB: LockDatabase> {
    locks: Locks<DB>,
    asking: Vec<(Request, String, Option<Transaction<'static, DB>>)>,
}

impl<DB: Backend> Requests<DB> {
    /// With the transactions begun in which some of them are made.
    pub async fn prepare(
        locks: &Locks<DB>,
        pool: &Pool<DB>,
        requests: &[Request],
        name: impl Fn(Request) -> String,
    ) -> Self {
        let mut asking = Vec::new();
        for request in requests {
            let transaction =
                if request.way.is_in_transaction() { Some(pool.begin().await.unwrap()) } else { None };
            asking.push((*request, name(*request), transaction));
        }
        Self { locks: locks.clone(), asking }
    }

    pub async fn ask(self) -> Answers {
        let mut answers = JoinSet::new();
        for (request, name, mut transaction) in self.asking {
            let locks = self.locks.clone();
            answers.spawn(async move {
                let answer = timeout(PATIENCE, request.ask(&locks, &name, transaction.as_mut())).await;
                if let Some(transaction) = transaction {
                    // So that it is in nobody's way, unless the database is away.
                    let _ended = timeout(Duration::from_secs(1), transaction.rollback()).await;
                }
                (request, answer.unwrap_or_else(|_| panic!("{request:?} hangs")))
            });
        }
        Answers(answers.join_all().await)
    }
}

fn taken<L>(answer: Result<L, Error>) -> Answer {
    match answer {
        Ok(_) => Answer::Taken,
        Err(error) => Answer::Failed(error),
    }
}

fn tried<L>(answer: Result<Option<L>, Error>) -> Answer {
    match answer {
        Ok(Some(_)) => Answer::Taken,
        Ok(None) => Answer::HeldElsewhere,
        Err(error) => Answer::Failed(error),
    }
}

#[distributed_lock("{name}", skip, wait = wait, locks = locks)]
async fn lease_or_skip<DB: LockDatabase>(
    locks: &Locks<DB>,
    name: &str,
    wait: Duration,
) -> Result<Option<()>, Error> {
    Ok(Some(()))
}

#[distributed_lock("{name}", mode = row, skip, wait = wait, locks = locks)]
async fn row_or_skip<DB: LockDatabase>(
    locks: &Locks<DB>,
    name: &str,
    wait: Duration,
) -> Result<Option<()>, Error> {
    Ok(Some(()))
}

#[distributed_lock("{name}", mode = row, tx = tx, skip, wait = wait, locks = locks)]
async fn row_in_or_skip<DB: LockDatabase>(
    locks: &Locks<DB>,
    name: &str,
    wait: Duration,
    tx: &mut Transaction<'_, DB>,
) -> Result<Option<()>, Error> {
    Ok(Some(()))
}
