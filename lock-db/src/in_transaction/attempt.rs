//! Takes a lock in an open transaction, which belongs to the caller or to lock-db.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Connection;

use super::HeldInTransaction;
use super::find::FoundRow;
use crate::bounds::{self, ANSWER_LIMIT};
use crate::clock::{sleep, timeout};
use crate::context::Context;
use crate::context::RowId;
use crate::database::{Failure, LockDatabase, LockRow, RowAttempt, RowClaim, RowKey, Server};
use crate::error::{Action, WaitingFor};
use crate::jitter::jitter;
use crate::name::Name;
use crate::options::Wait;
use crate::secret::Secret;
use crate::session::Request;
use crate::{Error, Kind, LockInfo};

/// How long one statement may wait on the server. Between two statements a dropped caller is
/// noticed. Well below one second, after which sqlx logs a statement as slow, even on a busy
/// machine.
const SLICE: Duration = Duration::from_millis(500);
/// [`SLICE`] on PostgreSQL, where `lock_timeout` covers the wait in the row's queue and the wait
/// for the holder separately. So one statement takes at most twice as long, which is less than the
/// two seconds within which a dropped caller is to be noticed.
const LONG_SLICE: Duration = Duration::from_millis(900);
/// The first slice on PostgreSQL. It is longer than one second, after which PostgreSQL looks for a
/// deadlock. The last transaction to join a cycle finds the deadlock.
const FIRST_SLICE: Duration = Duration::from_millis(1100);
/// The minimum time for an answer of the session, even when the caller's wait is shorter.
pub(super) const SHORTEST_ANSWER: Duration = Duration::from_secs(1);
/// Limit of the read that tells whether a transaction takes the lock for the second time.
const QUICK_LOOK: Duration = Duration::from_millis(100);
/// The longest pause between two reads of a lease that another process holds.
pub(super) const PAUSE: Duration = Duration::from_millis(100);
/// The pause between two attempts when the server did not wait as requested.
pub(super) const SHORT_PAUSE: Duration = Duration::from_millis(20);

/// How often a request for a lock may find that the table was replaced.
const MOST_TABLES: u32 = 3;

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
        let locked = self.lock_row(transaction, found, false, &mut |_| true).await?;
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
        self.lock_row(transaction, found, is_first, &mut may_wait).await
    }

    /// A transaction that has used the table blocks an `ALTER TABLE`, and a waiting `ALTER TABLE`
    /// blocks every other use of the table. So from here on nothing waits for the session: the two
    /// would wait for each other.
    async fn lock_row(
        &self,
        connection: &mut DB::Connection,
        found: FoundRow,
        is_own: bool,
        may_wait: &mut impl FnMut(Option<&Failure>) -> bool,
    ) -> Result<Option<Locked>, Error> {
        let FoundRow { mut server, row: RowId { id, created } } = found;
        let (secret, owner) = (Secret::generate()?, Arc::clone(self.context.owner()));
        let row = RowKey { name: self.name.clone(), id };
        let is_try = self.wait.is_try();
        let mut claim = RowClaim { row, kind: self.kind, owner, secret, created, is_own, is_try };
        let (mut slice, mut stalled, mut last_settled) = (Duration::ZERO, None, Instant::now());
        let (mut found_anew, mut quick) = (0, 0);
        loop {
            let asked = Instant::now();
            let held_by = match self.step(connection, &server, &claim, slice).await? {
                Step::Done(RowAttempt::Locked { fencing_token, before, secret }) => {
                    let secret = secret.unwrap_or(claim.secret);
                    return Ok(Some(Locked { fencing_token, secret, before }));
                }
                Step::Done(RowAttempt::WrongKind) => return Err(self.wrong_kind().await),
                Step::Done(RowAttempt::Unwritten) => {
                    return Err(Failure::not_written::<DB>().into_error(ACTION, Some(self.name)));
                }
                Step::Done(RowAttempt::ForeignTransaction) => {
                    // Unless the table or the row was created anew.
                    let before = server.table.identity.clone();
                    server =
                        self.ask_for(connection, |answer| Request::Locate { answer, anew: true }).await?;
                    let is_same_row = self.read_row_again(connection, &mut claim).await?;
                    found_anew += 1;
                    let is_same = is_same_row && server.table.identity == before;
                    // If the session finds another table each time, none of them is this
                    // transaction's.
                    if is_same || found_anew > MOST_TABLES {
                        return Err(Error::ForeignTransaction { name: self.name.given() });
                    }
                    if claim.row.id == 0 && !DB::ROW_IS_MADE_IN_TRANSACTION {
                        return Err(self.stale(connection).await);
                    }
                    continue;
                }
                Step::Done(RowAttempt::Missing) => {
                    // The row was deleted since the last read. A row that other connections see is
                    // visible to a locking read, too.
                    if self.read_row_again(connection, &mut claim).await? {
                        return Err(Error::ForeignTransaction { name: self.name.given() });
                    }
                    return Err(self.stale(connection).await);
                }
                // Reported as `Stalled`.
                Step::Done(RowAttempt::TableLocked) => false,
                // Another process was faster, or the transaction may have read what the last holder
                // has changed since.
                Step::Done(RowAttempt::Stale | RowAttempt::Leased { usable: false }) => {
                    return Err(self.stale(connection).await);
                }
                Step::Done(RowAttempt::Unsettled { usable }) => {
                    if !usable {
                        let error = self.stale(connection).await;
                        // The next transaction then finds the row settled.
                        let _settled = self.settle().await;
                        return Err(error);
                    }
                    self.settle_for(connection).await?;
                    if self.wait.is_try() && self.started.elapsed() < SHORTEST_ANSWER {
                        sleep(SHORT_PAUSE).await;
                        continue;
                    }
                    true
                }
                Step::Done(RowAttempt::Leased { usable: true }) => {
                    // The clock may have been set back since. If this transaction keeps the holder
                    // from the table, it keeps the session from it as well.
                    if last_settled.elapsed() > SHORTEST_ANSWER {
                        self.settle_for(connection).await?;
                        last_settled = Instant::now();
                    }
                    true
                }
                Step::Done(RowAttempt::Busy) => {
                    stalled = None;
                    false
                }
                Step::Stalled(failure) => {
                    // On SQLite a holder keeps all others from writing.
                    stalled = self.holder_here().is_none().then_some(failure);
                    false
                }
            };
            // A try waits for a short time if something other than a holder is in the way.
            let left = match (self.left(), &stalled) {
                (Some(left), _) => left,
                (None, Some(_)) => SHORTEST_ANSWER.saturating_sub(self.started.elapsed()),
                (None, None) => return Ok(None),
            };
            if left.is_zero() {
                return Err(match stalled {
                    Some(failure) => failure.into_error(ACTION, Some(self.name)).within(self.wait.limit()),
                    None => self.held_error(connection, &server, held_by).await,
                });
            }
            if !may_wait(stalled.as_ref()) {
                return Ok(None);
            }
            // The server does not wait for a lease, and some settings keep it from waiting at all.
            quick = if asked.elapsed() < SHORT_PAUSE { quick + 1 } else { 0 };
            let pause = if held_by { PAUSE } else { (SHORT_PAUSE * quick.max(1)).min(PAUSE) };
            if held_by || (!slice.is_zero() && asked.elapsed() < slice / 2) {
                sleep(jitter(pause).min(left)).await;
            }
            slice = left.min(next_slice::<DB>(slice));
        }
    }

    /// `is_lease`: the row names its holder.
    async fn held_error(&self, connection: &mut DB::Connection, server: &Server, is_lease: bool) -> Error {
        let mut holder = self.holder_here();
        if is_lease {
            let read = DB::read(connection, server, self.name);
            let row = bounds::answer::<DB, _>(SHORTEST_ANSWER, read).await.ok().flatten();
            holder = row.map(|row| Box::new(self.info(row)));
        }
        self.timed_out(WaitingFor::Lock, holder)
    }

    async fn step(
        &self,
        connection: &mut DB::Connection,
        server: &Server,
        claim: &RowClaim,
        slice: Duration,
    ) -> Result<Step, Error> {
        let limit = slice + ANSWER_LIMIT;
        let asked = DB::lock_row(connection, server, claim, slice);
        let failure = match bounds::answer::<DB, _>(limit, asked).await {
            Ok(RowAttempt::TableLocked) => return Ok(Step::Stalled(Failure::table_locked::<DB>())),
            Ok(attempt) => return Ok(Step::Done(attempt)),
            Err(failure) => failure,
        };
        if failure.is_busy() {
            return Ok(Step::Stalled(failure.written_by_others(self.name, false)));
        }
        // The table may have been replaced.
        self.context.row_ids().forget(self.name);
        if DB::lacks_right(failure.source())
            && let Err(error) = self.ask(|answer| Request::Check { answer }).await
            && let Some(found) = Failure::of_error::<DB>(&error)
        {
            return Err(found.into_error(ACTION, Some(self.name)));
        }
        Err(failure.into_error(ACTION, Some(self.name)))
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
    fn holder_here(&self) -> Option<Box<LockInfo>> {
        if self.kind == Kind::Row { self.context.row_waiters().queue.holder(self.name) } else { None }
    }

    /// The row tells which kind it has.
    async fn wrong_kind(&self) -> Error {
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

fn next_slice<DB: LockDatabase>(last: Duration) -> Duration {
    match (DB::SEARCHES_LATE, last.is_zero()) {
        (true, true) => FIRST_SLICE,
        (true, false) => LONG_SLICE,
        (false, _) => SLICE,
    }
}

/// The result of one statement.
enum Step {
    Done(RowAttempt),
    /// Something other than a holder keeps the table or the whole database from being written. The
    /// transaction is as usable as before.
    Stalled(Failure),
}
