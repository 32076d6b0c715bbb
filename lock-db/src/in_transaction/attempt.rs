//! Taking a lock in an open transaction, whoever owns that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Connection;
use tokio::time::{sleep, timeout};

use super::HeldInTransaction;
use crate::database::{LockDatabase, LockRow, RowAttempt, RowClaim, RowKey};
use crate::error::{Failure, WaitingFor};
use crate::jitter::jitter;
use crate::secret::Secret;
use crate::session::{Answer, Request};
use crate::{Error, Kind, Locks};

/// How long one statement may wait on the server: a caller who has gone is noticed in between. Half of what is promised, as
/// PostgreSQL counts it once for the turn in the queue, and once more for the holder; and less than the second after which
/// sqlx calls a statement slow.
const SLICE: Duration = Duration::from_millis(950);
/// The first one is longer than the second after which PostgreSQL looks for a deadlock. Of those who wait for each other
/// the last one to come finds it.
const FIRST_SLICE: Duration = Duration::from_millis(1100);
/// How much longer than its slice a statement may take before the server counts as gone.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long a question to the session may take when the caller's wait is shorter.
const SHORTEST_ANSWER: Duration = Duration::from_secs(1);
/// The longest pause between two looks at a lease that somebody else holds.
const PAUSE: Duration = Duration::from_millis(100);

/// One caller's wish for a name.
pub(crate) struct Attempt<'a, DB: LockDatabase> {
    pub(crate) locks: &'a Locks<DB>,
    pub(crate) name: &'a Arc<str>,
    pub(crate) kind: Kind,
    /// `None`: a try.
    pub(crate) wait: Option<Duration>,
    pub(crate) started: Instant,
}

/// A lock that was taken.
pub(crate) struct Locked {
    pub(crate) fencing_token: i64,
    /// What stands in the row now, and what did before.
    pub(crate) secret: Secret,
    pub(crate) before: String,
}

impl<DB: LockDatabase> Attempt<'_, DB> {
    /// Takes the lock in the caller's transaction.
    pub(crate) async fn lock_in(
        &self,
        transaction: &mut DB::Connection,
    ) -> Result<Option<HeldInTransaction>, Error> {
        if !transaction.is_in_transaction() {
            return Err(Error::NotInTransaction { name: self.name.to_string() });
        }
        let Some(locked) = self.lock(transaction, || true).await? else { return Ok(None) };
        let hold_count = self.count(&locked.secret, &locked.before).await;
        Ok(Some(HeldInTransaction { name: Arc::clone(self.name), hold_count }))
    }

    /// Takes the lock in the transaction on the connection. `None`: it was not free, and this is a try, or it `may_wait` no
    /// longer.
    pub(crate) async fn lock(
        &self,
        connection: &mut DB::Connection,
        mut may_wait: impl FnMut() -> bool,
    ) -> Result<Option<Locked>, Error> {
        if self.locks.session().is_closed() {
            return Err(Error::Closed);
        }
        let secret = Secret::generate()?;
        let mut slice = Duration::ZERO;
        // Whether the row was just seen, so that not finding it means something else.
        let mut seen = false;
        loop {
            let known = self.locks.known_rows().get(self.name);
            let id = match known {
                // A lease may hold it, which the transaction must not find out by locking the holder's row.
                _ if self.kind == Kind::Insert => {
                    seen = true;
                    match self.wait_for_lease(&mut may_wait).await? {
                        Some(id) => id,
                        None => return Ok(None),
                    }
                }
                Some(id) => id,
                None => {
                    seen = true;
                    self.ensure_row().await?.map_or(0, |(row, _)| row.id)
                }
            };
            let row = RowKey { name: Arc::clone(self.name), id };
            let owner = Arc::clone(self.locks.owner());
            let claim = RowClaim { row, kind: self.kind, owner, secret: secret.clone() };
            match self.step(connection, &claim, slice).await? {
                RowAttempt::Locked { fencing_token, before } => {
                    return Ok(Some(Locked { fencing_token, secret, before }));
                }
                RowAttempt::WrongKind => {
                    let found = if self.kind == Kind::Row { Kind::Insert } else { Kind::Row };
                    let name = self.name.to_string();
                    return Err(Error::WrongKind { name, wanted: self.kind, found });
                }
                // Too late for this transaction: somebody was quicker, or the row is newer than its snapshot.
                RowAttempt::Stale | RowAttempt::Leased => return Err(self.stale()),
                RowAttempt::Missing if seen => return Err(self.stale()),
                RowAttempt::Missing | RowAttempt::Busy => {}
            }
            if !seen {
                // Busy, or cleaned away since it was last seen? In the second case InnoDB has locked the gap, so that the
                // row can be made only for the next transaction.
                self.locks.known_rows().remove(self.name);
                if let Some((_, true)) = self.ensure_row().await? {
                    continue;
                }
                seen = true;
            }
            let Some(left) = self.left() else { return Ok(None) };
            if left.is_zero() {
                return Err(self.timed_out(WaitingFor::Lock, None));
            }
            if !may_wait() {
                return Ok(None);
            }
            slice = left.min(if slice.is_zero() { FIRST_SLICE } else { SLICE });
        }
    }

    async fn step(
        &self,
        connection: &mut DB::Connection,
        claim: &RowClaim,
        slice: Duration,
    ) -> Result<RowAttempt, Error> {
        let limit = slice + ANSWER_LIMIT;
        let failure = match timeout(limit, DB::lock_row(connection, claim, slice)).await {
            Ok(Ok(attempt)) => return Ok(attempt),
            Ok(Err(error)) => Failure::new::<DB>(error),
            Err(_elapsed) => Failure::no_answer::<DB>(limit),
        };
        Err(failure.into_error("lock the row", Some(self.name)))
    }

    /// Waits, outside of the transaction, until no lease holds the lock. Answers the row's id; `None` as in `lock`.
    async fn wait_for_lease(&self, mut may_wait: impl FnMut() -> bool) -> Result<Option<i64>, Error> {
        loop {
            let Some((row, _)) = self.ensure_row().await? else { return Ok(Some(0)) };
            let remaining = row.remaining();
            if remaining.is_zero() {
                return Ok(Some(row.id));
            }
            let Some(left) = self.left() else { return Ok(None) };
            if left.is_zero() {
                return Err(self.timed_out(WaitingFor::Lock, Some(row)));
            }
            if !may_wait() {
                return Ok(None);
            }
            sleep(jitter(PAUSE).min(remaining).min(left)).await;
        }
    }

    /// Makes sure that the row is there before the transaction touches it, on a connection of the session: never in the
    /// caller's transaction, where it would be seen only at the end of it, and would make others wait for that. Answers
    /// the row and whether it was missing; `None` when there is none and the transaction itself makes it.
    async fn ensure_row(&self) -> Result<Option<(LockRow, bool)>, Error> {
        let name = Arc::clone(self.name);
        if DB::ROW_IS_MADE_IN_TRANSACTION {
            let row = self.ask(|answer| Request::Look { name, answer }).await?;
            return Ok(row.map(|row| (row, false)));
        }
        let found = self.ask(|answer| Request::EnsureRow { name, kind: self.kind, answer }).await?;
        if self.kind == Kind::Row {
            self.locks.known_rows().insert(Arc::clone(self.name), found.0.id);
        }
        Ok(Some(found))
    }

    /// Asks the session, not much longer than the wait.
    async fn ask<T>(&self, request: impl FnOnce(Answer<T>) -> Request) -> Result<T, Error> {
        let left = self.left().unwrap_or(ANSWER_LIMIT).max(SHORTEST_ANSWER);
        match timeout(left, self.locks.session().ask(request)).await {
            Ok(answer) => answer,
            Err(_elapsed) => Err(self.timed_out(WaitingFor::Connection, None)),
        }
    }

    /// How often the transaction holds it now. Only a secret that this process wrote needs a second look: others see it
    /// when the transaction that wrote it has committed, and don't when it is ours.
    async fn count(&self, secret: &Secret, before: &str) -> usize {
        let counts = self.locks.counts();
        let again = counts.knows(before) && {
            let name = Arc::clone(self.name);
            let committed = self.ask(|answer| Request::Look { name, answer }).await;
            committed.is_ok_and(|row| row.is_none_or(|row| row.secret_key != before))
        };
        counts.enter(secret, before, again)
    }

    /// What is left of the wait; `None` for a try.
    pub(crate) fn left(&self) -> Option<Duration> {
        self.wait.map(|wait| wait.saturating_sub(self.started.elapsed()))
    }

    fn stale(&self) -> Error {
        Error::Serialization { name: self.name.to_string(), source: None }
    }

    pub(crate) fn timed_out(&self, waiting_for: WaitingFor, held_by: Option<LockRow>) -> Error {
        Error::Timeout {
            name: self.name.to_string(),
            waited: self.started.elapsed(),
            waiting_for,
            held_by: held_by.map(|row| Box::new(row.into_info(self.name))),
        }
    }
}
