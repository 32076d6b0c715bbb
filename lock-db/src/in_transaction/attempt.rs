//! Takes a lock in an open transaction, which belongs to the caller or to lock-db.

use std::time::{Duration, Instant};

use sqlx::Connection;

use super::HeldInTransaction;
use super::find::FoundRow;
use super::locking_row::LockingRow;
use crate::bounds::{self, ANSWER_LIMIT};
use crate::clock::timeout;
use crate::context::Context;
use crate::database::{Failure, LockDatabase, LockRow};
use crate::error::{Action, WaitingFor};
use crate::name::Name;
use crate::options::Wait;
use crate::secret::Secret;
use crate::session::Request;
use crate::{Error, Kind, LockInfo};

/// The minimum time for an answer of the session, even when the caller's wait is shorter.
pub(super) const SHORTEST_ANSWER: Duration = Duration::from_secs(1);
/// Limit of the read that tells whether a transaction takes the lock for the second time.
const QUICK_LOOK: Duration = Duration::from_millis(100);
/// The longest pause between two reads of a lease that another process holds.
pub(super) const PAUSE: Duration = Duration::from_millis(100);
/// The pause between two attempts when the server did not wait as requested.
pub(super) const SHORT_PAUSE: Duration = Duration::from_millis(20);

pub(super) const ACTION: Action = Action::LockRow;

/// One caller's request for a name.
pub(crate) struct Attempt<'a, DB: LockDatabase> {
    pub(crate) context: &'a Context<DB>,
    pub(crate) name: &'a Name,
    pub(crate) kind: Kind,
    pub(crate) wait: Wait,
    pub(crate) started: Instant,
}

/// A lock that was taken.
pub(crate) struct Locked {
    pub(crate) fencing_token: i64,
    /// The secret in the row now, and the one before.
    pub(crate) secret: Secret,
    pub(crate) before: String,
}

impl<DB: LockDatabase> Attempt<'_, DB> {
    /// Takes the lock in the caller's transaction.
    pub(crate) async fn lock_in(
        &self,
        transaction: &mut DB::Connection,
    ) -> Result<Option<HeldInTransaction>, Error> {
        let _waits = self.context.session().vitals().wait();
        let Some(row) = self.find_in(transaction).await? else { return Ok(None) };
        self.lock_found(transaction, row).await
    }

    /// Does what must be done before the caller's transaction locks anything. `None`: the lock is
    /// not free, and this is a try.
    pub(super) async fn find_in(&self, transaction: &mut DB::Connection) -> Result<Option<FoundRow>, Error> {
        if !transaction.is_in_transaction() {
            return Err(Error::NotInTransaction { name: self.name.given() });
        }
        self.find(transaction, false, &mut |_| true).await
    }

    pub(super) async fn lock_found(
        &self,
        transaction: &mut DB::Connection,
        found: FoundRow,
    ) -> Result<Option<HeldInTransaction>, Error> {
        let locked = LockingRow::new(self, transaction, found, false)?.lock(&mut |_| true).await?;
        let Some(locked) = locked else { return Ok(None) };
        let hold_count = self.count(transaction, &locked).await?;
        Ok(Some(HeldInTransaction {
            name: self.name.clone(),
            hold_count,
            #[cfg(feature = "testing")]
            locks: self.context.instance(),
        }))
    }

    /// Does what must be done before a transaction of lock-db locks anything. `None`: the lock is
    /// not free, and either this is a try or `may_wait` returned `false`. `may_wait` receives the
    /// failure that is in the way, or `None` if that is a holder.
    pub(crate) async fn find_in_own(
        &self,
        transaction: &mut DB::Connection,
        mut may_wait: impl FnMut(Option<&Failure>) -> bool,
    ) -> Result<Option<FoundRow>, Error> {
        self.find(transaction, true, &mut may_wait).await
    }

    /// Takes the lock in a transaction of lock-db. `None` as for [`find_in_own`](Self::find_in_own).
    /// If the lock is the first one of the transaction, the transaction may be begun anew.
    pub(crate) async fn lock_in_own(
        &self,
        transaction: &mut DB::Connection,
        found: FoundRow,
        is_first: bool,
        mut may_wait: impl FnMut(Option<&Failure>) -> bool,
    ) -> Result<Option<Locked>, Error> {
        LockingRow::new(self, transaction, found, is_first)?.lock(&mut may_wait).await
    }

    /// Returns how often the transaction holds the lock now. A second read is needed only if this
    /// process wrote the secret. If that read takes long, the table may be about to be altered, so
    /// its limit is short.
    async fn count(&self, connection: &mut DB::Connection, locked: &Locked) -> Result<usize, Error> {
        let Locked { secret, before, .. } = locked;
        let counts = self.context.hold_counts();
        if !counts.knows(before) {
            return Ok(counts.enter(secret, before, false));
        }
        let again = bounds::answer::<DB, _>(ANSWER_LIMIT, DB::was_its_own(connection, before)).await;
        let again = again.map_err(|failure| failure.into_error(ACTION, Some(self.name)))?;
        let again = if let Some(again) = again {
            again
        } else {
            // Other connections see the secret if the transaction that wrote it has committed. They
            // don't if it is this transaction.
            let name = self.name.clone();
            let committed = self.context.session().ask(|answer| Request::Read { name, answer });
            let committed = timeout(QUICK_LOOK, committed).await;
            committed.is_ok_and(|row| row.is_ok_and(|row| row.is_none_or(|row| row.secret_key != *before)))
        };
        Ok(counts.enter(secret, before, again))
    }

    /// What is left of the wait; `None` for a try.
    pub(crate) fn left(&self) -> Option<Duration> {
        self.wait.limit().map(|wait| wait.saturating_sub(self.started.elapsed()))
    }

    /// The holder of the row lock, if it is in this process and has a transaction of lock-db's own.
    pub(super) fn holder_here(&self) -> Option<Box<LockInfo>> {
        if self.kind == Kind::Row { self.context.row_waiters().queue.holder(self.name) } else { None }
    }

    /// The row tells which kind it has.
    pub(super) async fn wrong_kind(&self) -> Error {
        let found = match self.read().await {
            Ok(Some(row)) if row.kind != self.kind => row.kind,
            _ if self.kind == Kind::Row => Kind::Insert,
            _ => Kind::Row,
        };
        Error::WrongKind { name: self.name.given(), wanted: self.kind, found }
    }

    /// Makes sure that the transaction can only be rolled back.
    pub(super) async fn stale(&self, connection: &mut DB::Connection) -> Error {
        bounds::doom::<DB>(connection).await;
        Error::Serialization { name: self.name.given(), source: None }
    }

    pub(crate) fn timed_out(&self, waiting_for: WaitingFor, held_by: Option<Box<LockInfo>>) -> Error {
        let (name, waited) = (self.name.given(), self.started.elapsed());
        Error::Timeout { name, waited, waiting_for, held_by }
    }

    pub(super) fn info(&self, row: LockRow) -> LockInfo {
        row.into_info(self.name)
    }
}
