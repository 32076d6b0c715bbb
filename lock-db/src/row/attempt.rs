//! Locking the row of a name in an open transaction, whoever owns that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::timeout;

use crate::database::{LockDatabase, RowAttempt, RowKey};
use crate::error::{Failure, WaitingFor};
use crate::session::Request;
use crate::{Error, Kind, Locks};

/// How long one statement may wait on the server: a caller who has gone is noticed in between. More than the second
/// after which PostgreSQL looks for a deadlock.
const SLICE: Duration = Duration::from_secs(2);
/// How much longer than its slice a statement may take before the server counts as gone.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How long making the row may take when the caller's wait is shorter.
const SHORTEST_PREPARATION: Duration = Duration::from_secs(1);

/// One caller's wish for the row of a name.
pub(super) struct Attempt<'a, DB: LockDatabase> {
    pub(super) locks: &'a Locks<DB>,
    pub(super) name: &'a Arc<str>,
    /// `None`: a try.
    pub(super) wait: Option<Duration>,
    pub(super) started: Instant,
}

impl<DB: LockDatabase> Attempt<'_, DB> {
    /// Locks the row in the transaction on the connection and answers the number that was written. `None`: a try, and it
    /// was not free; or nobody `is_wanted` any more.
    pub(super) async fn lock(
        &self,
        connection: &mut DB::Connection,
        is_wanted: impl Fn() -> bool,
    ) -> Result<Option<i64>, Error> {
        if self.locks.session().is_closed() {
            return Err(Error::Closed);
        }
        let (mut key, mut checked) = self.ensure_row().await?;
        let mut slice = Duration::ZERO;
        loop {
            match self.step(connection, &key, slice).await? {
                RowAttempt::Locked { fencing_token } => return Ok(Some(fencing_token)),
                RowAttempt::Stale => return Err(self.stale()),
                RowAttempt::WrongKind => {
                    return Err(Error::WrongKind {
                        name: self.name.to_string(),
                        wanted: Kind::Row,
                        found: Kind::Insert,
                    });
                }
                // The row is there, but was made after this transaction's snapshot.
                RowAttempt::Missing if checked => return Err(self.stale()),
                RowAttempt::Busy | RowAttempt::Missing => {}
            }
            if !checked {
                // Busy, or cleaned away since it was last seen? In the second case InnoDB has locked the gap, so that the
                // row can be made only for the next transaction.
                checked = true;
                self.locks.known_rows().remove(self.name);
                let made;
                (key, made) = self.ask_for_row().await?;
                if made {
                    continue;
                }
            }
            let Some(wait) = self.wait else { return Ok(None) };
            let left = wait.saturating_sub(self.started.elapsed());
            if left.is_zero() {
                return Err(self.timed_out(WaitingFor::Lock));
            }
            if !is_wanted() {
                return Ok(None);
            }
            slice = left.min(SLICE);
        }
    }

    async fn step(
        &self,
        connection: &mut DB::Connection,
        key: &RowKey,
        slice: Duration,
    ) -> Result<RowAttempt, Error> {
        let limit = slice + ANSWER_LIMIT;
        let answer = timeout(limit, DB::lock_row(connection, key, self.locks.owner(), slice)).await;
        let failure = match answer {
            Ok(Ok(attempt)) => return Ok(attempt),
            Ok(Err(error)) => Failure::new::<DB>(error),
            Err(_elapsed) => Failure::no_answer::<DB>(limit),
        };
        Err(failure.into_error("lock the row", Some(self.name)))
    }

    /// Makes sure that the row is there before the transaction touches it. Answers whether that was just seen.
    async fn ensure_row(&self) -> Result<(RowKey, bool), Error> {
        match self.locks.known_rows().get(self.name) {
            Some(id) => Ok((self.key(id), false)),
            None => Ok((self.ask_for_row().await?.0, true)),
        }
    }

    /// On a connection of the session: never in the caller's transaction, where it would be seen only at the end of it,
    /// and would make others wait for that. Answers whether the row had to be made.
    async fn ask_for_row(&self) -> Result<(RowKey, bool), Error> {
        if DB::ROW_IS_MADE_IN_TRANSACTION {
            return Ok((self.key(0), false));
        }
        let asked = self.locks.session().ask(|answer| Request::EnsureRow {
            name: Arc::clone(self.name),
            kind: Kind::Row,
            answer,
        });
        let left = self.wait.unwrap_or(ANSWER_LIMIT).saturating_sub(self.started.elapsed());
        let Ok(answer) = timeout(left.max(SHORTEST_PREPARATION), asked).await else {
            return Err(self.timed_out(WaitingFor::Connection));
        };
        let (id, made) = answer?;
        self.locks.known_rows().insert(Arc::clone(self.name), id);
        Ok((self.key(id), made))
    }

    fn key(&self, id: i64) -> RowKey {
        RowKey { name: Arc::clone(self.name), id }
    }

    fn stale(&self) -> Error {
        Error::Serialization { name: self.name.to_string(), source: None }
    }

    pub(super) fn timed_out(&self, waiting_for: WaitingFor) -> Error {
        Error::Timeout {
            name: self.name.to_string(),
            waited: self.started.elapsed(),
            waiting_for,
            held_by: None,
        }
    }
}
