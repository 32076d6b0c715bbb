//! Taking a lock in an open transaction, whoever owns that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Connection;

use super::HeldInTransaction;
use super::find::Found;
use super::known_rows::KnownRow;
use crate::bounds::{self, ANSWER_LIMIT};
use crate::clock::{sleep, timeout};
use crate::database::{LockDatabase, LockRow, RowAttempt, RowClaim, RowKey, Server};
use crate::error::{Failure, WaitingFor};
use crate::jitter::jitter;
use crate::name::Name;
use crate::secret::Secret;
use crate::session::Request;
use crate::{Error, Kind, LockInfo, Locks};

/// How long one statement may wait on the server: a caller who has gone is noticed in between. Much less than the second after which
/// sqlx calls a statement slow, also on a busy machine.
const SLICE: Duration = Duration::from_millis(500);
/// On PostgreSQL, where no call waits. Half of what is promised, as it counts it once for the turn in the queue, and once more for the
/// holder.
const LONG_SLICE: Duration = Duration::from_millis(900);
/// The first one is longer than the second after which PostgreSQL looks for a deadlock. Of those who wait for each other
/// the last one to come finds it.
const FIRST_SLICE: Duration = Duration::from_millis(1100);
/// How long a question to the session may take when the caller's wait is shorter.
pub(super) const SHORTEST_ANSWER: Duration = Duration::from_secs(1);
/// How long it may take to see whether a transaction has a lock for the second time.
const QUICK_LOOK: Duration = Duration::from_millis(100);
/// The longest pause between two looks at a lease that another process holds.
pub(super) const PAUSE: Duration = Duration::from_millis(100);
/// Between two attempts, when the server did not wait in between as it was asked to.
pub(super) const SHORT_PAUSE: Duration = Duration::from_millis(20);

/// How often the table may turn out to be another one while a lock is asked for.
const MOST_TABLES: u32 = 3;

pub(super) const ACTION: &str = "lock the row";

/// One caller's wish for a name.
pub(crate) struct Attempt<'a, DB: LockDatabase> {
    pub(crate) locks: &'a Locks<DB>,
    pub(crate) name: &'a Name,
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
        let Some(row) = self.find_in(transaction).await? else { return Ok(None) };
        self.lock_found(transaction, row).await
    }

    /// What is to be done before the caller's transaction locks anything. `None`: the lock is not free, and this is a try.
    pub(super) async fn find_in(&self, transaction: &mut DB::Connection) -> Result<Option<Found>, Error> {
        if !transaction.is_in_transaction() {
            return Err(Error::NotInTransaction { name: self.name.given() });
        }
        self.find(transaction, false, &mut |_| true).await
    }

    pub(super) async fn lock_found(
        &self,
        transaction: &mut DB::Connection,
        found: Found,
    ) -> Result<Option<HeldInTransaction>, Error> {
        let locked = self.lock_row(transaction, found, false, &mut |_| true).await?;
        let Some(locked) = locked else { return Ok(None) };
        let hold_count = self.count(transaction, &locked).await?;
        Ok(Some(HeldInTransaction {
            name: self.name.clone(),
            hold_count,
            #[cfg(feature = "testing")]
            locks: self.locks.instance(),
        }))
    }

    /// Takes the lock in the transaction on the connection. `None`: it was not free, and this is a try, or it `may_wait` no
    /// longer, which is asked with what is in the way if that is no holder.
    pub(crate) async fn lock(
        &self,
        connection: &mut DB::Connection,
        mut may_wait: impl FnMut(Option<&Failure>) -> bool,
    ) -> Result<Option<Locked>, Error> {
        let Some(found) = self.find(connection, true, &mut may_wait).await? else { return Ok(None) };
        self.lock_row(connection, found, true, &mut may_wait).await
    }

    /// A transaction that works with the table keeps it from being altered, and what is to alter it keeps everything else from the
    /// table. So from here on nothing waits for the session: both would wait for each other.
    async fn lock_row(
        &self,
        connection: &mut DB::Connection,
        found: Found,
        is_own: bool,
        may_wait: &mut impl FnMut(Option<&Failure>) -> bool,
    ) -> Result<Option<Locked>, Error> {
        let Found { mut server, row: KnownRow { id, created } } = found;
        let (secret, owner) = (Secret::generate()?, Arc::clone(self.locks.owner()));
        let row = RowKey { name: self.name.clone(), id };
        let is_try = self.wait.is_none();
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
                Step::Done(RowAttempt::WrongKind) => return Err(self.wrong_kind()),
                Step::Done(RowAttempt::Unwritten) => {
                    return Err(Failure::not_written::<DB>().into_error(ACTION, Some(self.name)));
                }
                Step::Done(RowAttempt::ForeignTransaction) => {
                    // Unless it is the table or the row that was made anew.
                    let before = server.table.identity.clone();
                    server =
                        self.ask_for(connection, |answer| Request::Locate { answer, anew: true }).await?;
                    let is_same_row = self.is_same_row(connection, &mut claim).await?;
                    found_anew += 1;
                    let is_same = is_same_row && server.table.identity == before;
                    // A session that finds another table each time finds none that is this transaction's.
                    if is_same || found_anew > MOST_TABLES {
                        return Err(Error::ForeignTransaction { name: self.name.given() });
                    }
                    if claim.row.id == 0 && !DB::ROW_IS_MADE_IN_TRANSACTION {
                        return Err(self.stale(connection).await);
                    }
                    continue;
                }
                Step::Done(RowAttempt::Missing) => {
                    // Cleaned away since it was seen last. What is there for others is there for a read that locks, too.
                    if self.is_same_row(connection, &mut claim).await? {
                        return Err(Error::ForeignTransaction { name: self.name.given() });
                    }
                    return Err(self.stale(connection).await);
                }
                // Told as `Stalled`.
                Step::Done(RowAttempt::TableLocked) => false,
                // Another process was quicker, or the transaction may have read what its last holder has changed since.
                Step::Done(RowAttempt::Stale | RowAttempt::Leased { usable: false }) => {
                    return Err(self.stale(connection).await);
                }
                Step::Done(RowAttempt::Unsettled { usable }) => {
                    if !usable {
                        let error = self.stale(connection).await;
                        // So that the next transaction finds it settled.
                        let _settled = self.settle().await;
                        return Err(error);
                    }
                    self.settle_for(connection).await?;
                    if self.wait.is_none() && self.started.elapsed() < SHORTEST_ANSWER {
                        sleep(SHORT_PAUSE).await;
                        continue;
                    }
                    true
                }
                Step::Done(RowAttempt::Leased { usable: true }) => {
                    // The clock may have been set back since; and where its holder can't reach the table because of this transaction,
                    // the session can't either.
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
                    // On SQLite a holder keeps everybody from writing.
                    stalled = self.holder_here().is_none().then_some(failure);
                    false
                }
            };
            // A try goes on for a while before something that is no holder.
            let left = match (self.left(), &stalled) {
                (Some(left), _) => left,
                (None, Some(_)) => SHORTEST_ANSWER.saturating_sub(self.started.elapsed()),
                (None, None) => return Ok(None),
            };
            if left.is_zero() {
                return Err(match stalled {
                    Some(failure) => failure.into_error(ACTION, Some(self.name)).within(self.wait),
                    None => self.was_held(connection, &server, held_by).await,
                });
            }
            if !may_wait(stalled.as_ref()) {
                return Ok(None);
            }
            // A lease is not waited for on the server; and some settings keep the server from waiting.
            quick = if asked.elapsed() < SHORT_PAUSE { quick + 1 } else { 0 };
            let pause = if held_by { PAUSE } else { (SHORT_PAUSE * quick.max(1)).min(PAUSE) };
            if held_by || (!slice.is_zero() && asked.elapsed() < slice / 2) {
                sleep(jitter(pause).min(left)).await;
            }
            slice = left.min(next_slice::<DB>(slice));
        }
    }

    /// `is_lease`: its holder stands in the row.
    async fn was_held(&self, connection: &mut DB::Connection, server: &Server, is_lease: bool) -> Error {
        let mut holder = self.holder_here();
        if is_lease {
            let look = DB::look(connection, server, self.name);
            let row = bounds::answer::<DB, _>(SHORTEST_ANSWER, look).await.ok().flatten();
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
        // It may be the table that is another one by now.
        self.locks.known_rows().forget(self.name);
        if DB::lacks_right(&failure.source)
            && let Err(Error::Database { source, .. }) = self.ask(|answer| Request::Check { answer }).await
        {
            return Err(Error::Database {
                action: ACTION,
                name: Some(self.name.given()),
                within: None,
                source,
            });
        }
        Err(failure.into_error(ACTION, Some(self.name)))
    }

    /// How often the transaction holds it now. Only a secret that this process wrote needs a second look; and when that takes long,
    /// the table may be about to be altered, and nothing here waits for it.
    async fn count(&self, connection: &mut DB::Connection, locked: &Locked) -> Result<usize, Error> {
        let Locked { secret, before, .. } = locked;
        let counts = self.locks.counts();
        if !counts.knows(before) {
            return Ok(counts.enter(secret, before, false));
        }
        let again = bounds::answer::<DB, _>(ANSWER_LIMIT, DB::was_its_own(connection, before)).await;
        let again = again.map_err(|failure| failure.into_error(ACTION, Some(self.name)))?;
        let again = if let Some(again) = again {
            again
        } else {
            // Others see it when the transaction that wrote it has committed, and don't when it is ours.
            let name = self.name.clone();
            let committed = self.locks.session().ask(|answer| Request::Look { name, answer });
            let committed = timeout(QUICK_LOOK, committed).await;
            committed.is_ok_and(|row| row.is_ok_and(|row| row.is_none_or(|row| row.secret_key != *before)))
        };
        Ok(counts.enter(secret, before, again))
    }

    /// What is left of the wait; `None` for a try.
    pub(crate) fn left(&self) -> Option<Duration> {
        self.wait.map(|wait| wait.saturating_sub(self.started.elapsed()))
    }

    /// The holder of the row lock, if it is in this process and has a transaction of lock-db's own.
    fn holder_here(&self) -> Option<Box<LockInfo>> {
        if self.kind == Kind::Row { self.locks.row_queues().turns.holder(self.name) } else { None }
    }

    fn wrong_kind(&self) -> Error {
        let found = if self.kind == Kind::Row { Kind::Insert } else { Kind::Row };
        Error::WrongKind { name: self.name.given(), wanted: self.kind, found }
    }

    /// The transaction can only be rolled back.
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

/// What came of one statement.
enum Step {
    Done(RowAttempt),
    /// Something keeps the table or the database as a whole from being written. The transaction is as usable as before.
    Stalled(Failure),
}
