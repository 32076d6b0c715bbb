//! Locks the row of a name in an open transaction, in slices.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::attempt::{ACTION, Attempt, Locked, PAUSE, SHORT_PAUSE, SHORTEST_ANSWER};
use super::find::FoundRow;
use crate::Error;
use crate::bounds::{self, ANSWER_LIMIT};
use crate::clock::sleep;
use crate::database::{Failure, LockDatabase, RowAttempt, RowClaim, RowKey, Server};
use crate::error::WaitingFor;
use crate::jitter::jitter;
use crate::secret::Secret;
use crate::session::Request;

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
/// How often a request for a lock may find that the table or the row was replaced.
const MOST_TABLES: u32 = 3;

/// The state of an attempt to lock a row.
///
/// A transaction that has used the table blocks an `ALTER TABLE`, and a waiting `ALTER TABLE`
/// blocks every other use of the table. So from here on nothing waits for the session: the two
/// would wait for each other.
pub(super) struct LockingRow<'a, DB: LockDatabase> {
    attempt: &'a Attempt<'a, DB>,
    connection: &'a mut DB::Connection,
    server: Server,
    claim: RowClaim,
    /// What else than a holder kept the row from being written when it was last tried.
    stalled: Option<Failure>,
    last_settled: Instant,
    /// How often the table or the row was found to be replaced.
    found_anew: u32,
}

/// What follows from one statement.
enum Progress {
    Done(Locked),
    /// Send it again at once.
    Again,
    /// Wait for a lease, which the row names.
    WaitForLease,
    /// Wait for another transaction, or until writing is possible.
    WaitForRow,
}

/// The result of one statement.
enum Step {
    Done(RowAttempt),
    /// Something other than a holder keeps the table or the whole database from being written. The
    /// transaction is as usable as before.
    Stalled(Failure),
}

impl<'a, DB: LockDatabase> LockingRow<'a, DB> {
    /// `is_own`: the transaction is lock-db's, and nothing was done in it.
    pub(super) fn new(
        attempt: &'a Attempt<'a, DB>,
        connection: &'a mut DB::Connection,
        FoundRow { server, row: found }: FoundRow,
        is_own: bool,
    ) -> Result<Self, Error> {
        let (secret, owner) = (Secret::generate()?, Arc::clone(attempt.context.owner()));
        let row = RowKey { name: attempt.name.clone(), id: found.id };
        let (kind, created, is_try) = (attempt.kind, found.created, attempt.wait.is_try());
        let claim = RowClaim { row, kind, owner, secret, created, is_own, is_try };
        let last_settled = Instant::now();
        Ok(Self { attempt, connection, server, claim, stalled: None, last_settled, found_anew: 0 })
    }

    /// `None`: the row was not free, and this is a try or `may_wait` returned `false`.
    pub(super) async fn lock(
        mut self,
        may_wait: &mut impl FnMut(Option<&Failure>) -> bool,
    ) -> Result<Option<Locked>, Error> {
        let (mut slice, mut quick) = (Duration::ZERO, 0);
        loop {
            let asked = Instant::now();
            let is_lease = match self.next(slice).await? {
                Progress::Done(locked) => return Ok(Some(locked)),
                Progress::Again => continue,
                Progress::WaitForLease => true,
                Progress::WaitForRow => false,
            };
            let Some(left) = self.left() else { return Ok(None) };
            if left.is_zero() {
                return Err(self.give_up(is_lease).await);
            }
            if !may_wait(self.stalled.as_ref()) {
                return Ok(None);
            }
            // The server does not wait for a lease, and some settings keep it from waiting at all.
            quick = if asked.elapsed() < SHORT_PAUSE { quick + 1 } else { 0 };
            let pause = if is_lease { PAUSE } else { (SHORT_PAUSE * quick.max(1)).min(PAUSE) };
            if is_lease || (!slice.is_zero() && asked.elapsed() < slice / 2) {
                sleep(jitter(pause).min(left)).await;
            }
            slice = left.min(next_slice::<DB>(slice));
        }
    }

    /// A try waits for a short time if something other than a holder is in the way. `None`: it does
    /// not wait.
    fn left(&self) -> Option<Duration> {
        let short = || SHORTEST_ANSWER.saturating_sub(self.attempt.started.elapsed());
        self.attempt.left().or_else(|| self.stalled.is_some().then(short))
    }

    /// Sends one statement that waits no longer than `slice`, and does what its result requires.
    async fn next(&mut self, slice: Duration) -> Result<Progress, Error> {
        match self.step(slice).await? {
            Step::Done(RowAttempt::Locked { fencing_token, before, secret }) => {
                let secret = secret.unwrap_or_else(|| self.claim.secret.clone());
                Ok(Progress::Done(Locked { fencing_token, secret, before }))
            }
            Step::Done(RowAttempt::WrongKind) => Err(self.attempt.wrong_kind().await),
            Step::Done(RowAttempt::Unwritten) => {
                Err(Failure::not_written::<DB>().into_error(ACTION, Some(self.attempt.name)))
            }
            Step::Done(RowAttempt::ForeignTransaction) => self.find_table_again().await,
            Step::Done(RowAttempt::Missing) => self.find_row_again().await,
            // Another process was faster, or the transaction may have read what the last holder has
            // changed since.
            Step::Done(RowAttempt::Stale | RowAttempt::Leased { usable: false }) => Err(self.stale().await),
            Step::Done(RowAttempt::Unsettled { usable: false }) => {
                let error = self.stale().await;
                // The next transaction then finds the row settled.
                let _settled = self.attempt.settle().await;
                Err(error)
            }
            Step::Done(RowAttempt::Unsettled { usable: true }) => {
                self.attempt.settle_for(self.connection).await?;
                if self.attempt.wait.is_try() && self.attempt.started.elapsed() < SHORTEST_ANSWER {
                    sleep(SHORT_PAUSE).await;
                    return Ok(Progress::Again);
                }
                Ok(Progress::WaitForLease)
            }
            Step::Done(RowAttempt::Leased { usable: true }) => {
                // The clock may have been set back since. If this transaction keeps the holder from
                // the table, it keeps the session from it as well.
                if self.last_settled.elapsed() > SHORTEST_ANSWER {
                    self.attempt.settle_for(self.connection).await?;
                    self.last_settled = Instant::now();
                }
                Ok(Progress::WaitForLease)
            }
            Step::Done(RowAttempt::Busy) => {
                self.stalled = None;
                Ok(Progress::WaitForRow)
            }
            // Reported as `Stalled`.
            Step::Done(RowAttempt::TableLocked) => Ok(Progress::WaitForRow),
            Step::Stalled(failure) => {
                // On SQLite a holder keeps all others from writing.
                self.stalled = self.attempt.holder_here().is_none().then_some(failure);
                Ok(Progress::WaitForRow)
            }
        }
    }

    /// The row was deleted since it was read, and may have been created again. A row that other
    /// connections see is visible to a locking read, too.
    async fn find_row_again(&mut self) -> Result<Progress, Error> {
        self.found_anew += 1;
        // The transaction has read something.
        self.claim.is_own = false;
        let found = self.attempt.find_row_instead(self.connection, &mut self.claim).await;
        match found {
            Ok(true) => Err(self.foreign_transaction()),
            Ok(false) if self.found_anew <= MOST_TABLES => Ok(Progress::Again),
            Ok(false) | Err(Error::Serialization { .. }) => Err(self.stale().await),
            Err(error) => Err(error),
        }
    }

    /// The transaction is in another database, unless the table or the row was created anew.
    async fn find_table_again(&mut self) -> Result<Progress, Error> {
        let before = self.server.table.identity.clone();
        let located = |answer| Request::Locate { answer, anew: true };
        self.server = self.attempt.ask_for(self.connection, located).await?;
        let is_same_row = self.attempt.read_row_again(self.connection, &mut self.claim).await?;
        self.found_anew += 1;
        self.claim.is_own = false;
        let is_same = is_same_row && self.server.table.identity == before;
        // If the session finds another table each time, none of them is this transaction's.
        if is_same || self.found_anew > MOST_TABLES {
            return Err(self.foreign_transaction());
        }
        if self.claim.row.id == 0 && !DB::ROW_IS_MADE_IN_TRANSACTION {
            return Err(self.stale().await);
        }
        Ok(Progress::Again)
    }

    fn foreign_transaction(&self) -> Error {
        Error::ForeignTransaction { name: self.attempt.name.given() }
    }

    async fn stale(&mut self) -> Error {
        self.attempt.stale(self.connection).await
    }

    async fn step(&mut self, slice: Duration) -> Result<Step, Error> {
        let attempt = self.attempt;
        let limit = slice + ANSWER_LIMIT;
        let asked = DB::lock_row(self.connection, &self.server, &self.claim, slice);
        let failure = match bounds::answer::<DB, _>(limit, asked).await {
            Ok(RowAttempt::TableLocked) => return Ok(Step::Stalled(Failure::table_locked::<DB>())),
            Ok(result) => return Ok(Step::Done(result)),
            Err(failure) => failure,
        };
        if failure.is_busy() {
            return Ok(Step::Stalled(failure.written_by_others(attempt.name, false)));
        }
        // The table may have been replaced.
        attempt.context.row_ids().forget(attempt.name);
        if DB::lacks_right(failure.source())
            && let Err(error) = attempt.ask(|answer| Request::Check { prunes: false, answer }).await
            && let Some(found) = Failure::of_error::<DB>(&error)
        {
            return Err(found.into_error(ACTION, Some(attempt.name)));
        }
        Err(failure.into_error(ACTION, Some(attempt.name)))
    }

    /// The error of a request whose wait is over.
    async fn give_up(self, is_lease: bool) -> Error {
        let Self { attempt, connection, server, stalled, .. } = self;
        if let Some(failure) = stalled {
            return failure.into_error(ACTION, Some(attempt.name)).within(attempt.wait.limit());
        }
        let mut holder = attempt.holder_here();
        if is_lease {
            let read = DB::read(connection, &server, attempt.name);
            let row = bounds::answer::<DB, _>(SHORTEST_ANSWER, read).await.ok().flatten();
            holder = row.map(|row| Box::new(attempt.info(row)));
        }
        attempt.timed_out(WaitingFor::Lock, holder)
    }
}

fn next_slice<DB: LockDatabase>(last: Duration) -> Duration {
    match (DB::SEARCHES_LATE, last.is_zero()) {
        (true, true) => FIRST_SLICE,
        (true, false) => LONG_SLICE,
        (false, _) => SLICE,
    }
}
