//! Taking a lock in an open transaction, whoever owns that.

use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Connection;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

use super::HeldInTransaction;
use super::known_rows::KnownRow;
use crate::bounds::{self, ANSWER_LIMIT};
use crate::database::{LockDatabase, LockRow, RowAttempt, RowClaim, RowKey, Server, is_busy};
use crate::error::{Failure, WaitingFor};
use crate::jitter::jitter;
use crate::name::Name;
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
/// How long a question to the session may take when the caller's wait is shorter.
const SHORTEST_ANSWER: Duration = Duration::from_secs(1);
/// How long the table may be looked for while a transaction of the caller is open.
const LOCATE_LIMIT: Duration = Duration::from_secs(3);
/// How long a takeover gives notice, and no longer.
const LONGEST_NOTICE: Duration = Duration::from_secs(1);
/// How long a private connection may look for a row before the caller's transaction looks itself.
const ROW_LIMIT: Duration = Duration::from_millis(500);
/// How long it may take to see whether a transaction has a lock for the second time.
const QUICK_LOOK: Duration = Duration::from_millis(100);
/// The longest pause between two looks at a lease that another process holds.
const PAUSE: Duration = Duration::from_millis(100);
/// Between two attempts, when the server did not wait in between as it was asked to.
const SHORT_PAUSE: Duration = Duration::from_millis(20);

const ACTION: &str = "lock the row";

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
            return Err(Error::NotInTransaction { name: self.name.to_string() });
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
        Ok(Some(HeldInTransaction { name: self.name.clone(), hold_count }))
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
        let secret = Secret::generate()?;
        let owner = Arc::clone(self.locks.owner());
        let row = RowKey { name: self.name.clone(), id };
        let is_try = self.wait.is_none();
        let mut claim = RowClaim { row, kind: self.kind, owner, secret, created, is_own, is_try };
        let (mut slice, mut stalled) = (Duration::ZERO, None);
        let mut last_settled = Instant::now();
        loop {
            let asked = Instant::now();
            let held_by = match self.step(connection, &server, &claim, slice).await? {
                Step::Done(RowAttempt::Locked { fencing_token, before }) => {
                    return Ok(Some(Locked { fencing_token, secret: claim.secret, before }));
                }
                Step::Done(RowAttempt::WrongKind) => return Err(self.wrong_kind()),
                Step::Done(RowAttempt::Unwritten) => {
                    return Err(Failure::not_written::<DB>().into_error(ACTION, Some(self.name)));
                }
                Step::Done(RowAttempt::ForeignTransaction) => {
                    // Unless it is the table or the row that was made anew.
                    let before = server.table.identity.clone();
                    server = self.ask(|answer| Request::Locate { answer, anew: true }).await?;
                    let is_same_row = self.is_same_row(&mut claim).await?;
                    if is_same_row && server.table.identity == before {
                        return Err(Error::ForeignTransaction { name: self.name.to_string() });
                    }
                    if claim.row.id == 0 && !DB::ROW_IS_MADE_IN_TRANSACTION {
                        return Err(self.stale(connection).await);
                    }
                    continue;
                }
                Step::Done(RowAttempt::Missing) => {
                    // Cleaned away since it was seen last. What is there for others is there for a read that locks, too.
                    if self.is_same_row(&mut claim).await? {
                        return Err(Error::ForeignTransaction { name: self.name.to_string() });
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
                    self.settle().await?;
                    if self.wait.is_none() && self.started.elapsed() < SHORTEST_ANSWER {
                        sleep(SHORT_PAUSE).await;
                        continue;
                    }
                    true
                }
                Step::Done(RowAttempt::Leased { usable: true }) => {
                    // The clock may have been set back since; nothing here waits for what the session does about it.
                    if last_settled.elapsed() > SHORTEST_ANSWER {
                        last_settled = Instant::now();
                        let (answer, _nobody_waits) = oneshot::channel();
                        self.locks.session().tell(Request::Settle { name: self.name.clone(), answer });
                    }
                    true
                }
                Step::Done(RowAttempt::Busy) => {
                    stalled = None;
                    false
                }
                Step::Stalled(failure) => {
                    stalled = Some(failure);
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
                if let Some(failure) = stalled {
                    return Err(failure.into_error(ACTION, Some(self.name)));
                }
                let mut holder = None;
                if held_by {
                    let look = DB::look(connection, &server, self.name);
                    holder = bounds::answer::<DB, _>(SHORTEST_ANSWER, look).await.ok().flatten();
                }
                return Err(self.timed_out(WaitingFor::Lock, holder));
            }
            if !may_wait(stalled.as_ref()) {
                return Ok(None);
            }
            // A lease is not waited for on the server.
            let pause = if held_by { PAUSE } else { SHORT_PAUSE };
            if held_by || (!slice.is_zero() && asked.elapsed() < slice / 2) {
                sleep(jitter(pause).min(left)).await;
            }
            slice = left.min(if slice.is_zero() { FIRST_SLICE } else { SLICE });
        }
    }

    /// Finds the row, and waits until no lease holds it, where that has to be done outside of the transaction. Answers the row's id, or
    /// zero where that is not needed. `None` as in `lock`.
    async fn find(
        &self,
        connection: &mut DB::Connection,
        is_own: bool,
        may_wait: &mut impl FnMut(Option<&Failure>) -> bool,
    ) -> Result<Option<Found>, Error> {
        if self.locks.session().is_closed() {
            return Err(Error::Closed);
        }
        let server = self.locate_for_transaction().await?;
        let found = match self.kind {
            Kind::Row => self.find_row(connection, &server, is_own).await.map(Some),
            Kind::Insert => self.find_lease(connection, &server, may_wait).await,
        };
        match found {
            Ok(row) => Ok(row.map(|row| Found { server, row })),
            // The transaction itself keeps the row from being made.
            Err(Error::Serialization { .. }) => {
                let error = self.stale(connection).await;
                // So that the next one finds it.
                let _made = self.ensure_row().await;
                Err(error)
            }
            Err(error) => Err(error),
        }
    }

    async fn find_row(
        &self,
        connection: &mut DB::Connection,
        server: &Server,
        is_own: bool,
    ) -> Result<KnownRow, Error> {
        if DB::ROW_IS_MADE_IN_TRANSACTION {
            return Ok(NO_ROW);
        }
        if let Some(row) = self.locks.known_rows().get(self.name) {
            return Ok(row);
        }
        if !is_own {
            return Ok(known(&self.ensure_row_for(connection, server).await?));
        }
        let row = known(&self.ensure_row().await?.0);
        self.locks.known_rows().insert(self.name.clone(), row);
        Ok(row)
    }

    /// The row of a name for a caller's transaction, which may have locks already, and keep an ALTER waiting that keeps private
    /// connections from the table. Then the transaction finds or makes the row itself.
    async fn ensure_row_for(
        &self,
        connection: &mut DB::Connection,
        server: &Server,
    ) -> Result<LockRow, Error> {
        let ensured = self.ensure_row();
        let mut ensured = std::pin::pin!(ensured);
        let error = match timeout(ROW_LIMIT, &mut ensured).await {
            Ok(Ok((row, _))) => {
                self.locks.known_rows().insert(self.name.clone(), known(&row));
                return Ok(row);
            }
            Ok(Err(error @ Error::Database { .. })) if error.is_retryable() => Some(error),
            Ok(Err(error)) => return Err(error),
            Err(_elapsed) => None,
        };
        let found = DB::find_row(connection, server, self.name, self.kind);
        match bounds::answer::<DB, _>(ANSWER_LIMIT, found).await {
            Ok(Some(row)) => return Ok(row),
            Err(failure) if !failure.is_busy() => return Err(failure.into_error(ACTION, Some(self.name))),
            _ => {}
        }
        match error {
            Some(error) => Err(error),
            None => ensured.await.map(|(row, _)| row),
        }
    }

    /// Looks once more for the row that could not be locked, and makes none: the transaction may have locked the place where it belongs.
    /// Whether it is still the one that was meant.
    async fn is_same_row(&self, claim: &mut RowClaim) -> Result<bool, Error> {
        if DB::ROW_IS_MADE_IN_TRANSACTION {
            return Ok(true);
        }
        self.locks.known_rows().remove(self.name);
        let before = KnownRow { id: claim.row.id, created: claim.created };
        let row = self.look().await?.map_or(NO_ROW, |row| known(&row));
        (claim.row.id, claim.created) = (row.id, row.created);
        Ok(row == before)
    }

    async fn find_lease(
        &self,
        connection: &mut DB::Connection,
        server: &Server,
        may_wait: &mut impl FnMut(Option<&Failure>) -> bool,
    ) -> Result<Option<KnownRow>, Error> {
        let outside = bounds::answer::<DB, _>(ANSWER_LIMIT, DB::waits_outside(connection)).await;
        if outside.map_err(|failure| failure.into_error(ACTION, Some(self.name)))? {
            return self.wait_for_lease(connection, server, may_wait).await;
        }
        Ok(Some(NO_ROW))
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
            return Ok(Step::Stalled(failure));
        }
        Err(failure.into_error(ACTION, Some(self.name)))
    }

    /// Waits, outside of the transaction, until no lease holds the lock and the last one is ruled out. Answers the row's id; `None`
    /// as in `lock`.
    async fn wait_for_lease(
        &self,
        connection: &mut DB::Connection,
        server: &Server,
        may_wait: &mut impl FnMut(Option<&Failure>) -> bool,
    ) -> Result<Option<KnownRow>, Error> {
        let mut was_settled = false;
        loop {
            let row = if DB::ROW_IS_MADE_IN_TRANSACTION {
                match self.look().await? {
                    Some(row) => row,
                    None => return Ok(Some(NO_ROW)),
                }
            } else {
                self.ensure_row_for(connection, server).await?
            };
            if row.kind != Kind::Insert {
                let name = self.name.to_string();
                return Err(Error::WrongKind { name, wanted: self.kind, found: row.kind });
            }
            if row.is_settled() || (DB::SETTLES_IN_TRANSACTION && row.is_free()) {
                return Ok(Some(known(&row)));
            }
            let is_over = row.is_free() || row.notice_is_due();
            if is_over && !was_settled {
                match self.settle().await {
                    // Perhaps by this very transaction.
                    Err(Error::Database { source, .. }) if DB::SETTLES_IN_TRANSACTION && is_busy(&source) => {
                        return Ok(Some(known(&row)));
                    }
                    settled => settled?,
                }
                was_settled = true;
                continue;
            }
            was_settled = false;
            let remaining = if is_over { SHORT_PAUSE } else { row.remaining() };
            let left = match self.left() {
                Some(left) => left,
                // A try of what is held by nobody goes on until it is settled, or it shows that it can't be.
                None if is_over => SHORTEST_ANSWER.saturating_sub(self.started.elapsed()),
                None => return Ok(None),
            };
            if left.is_zero() {
                return match self.wait {
                    None => Ok(None),
                    Some(_) => Err(self.timed_out(WaitingFor::Lock, Some(row))),
                };
            }
            if !may_wait(None) {
                return Ok(None);
            }
            sleep(jitter(PAUSE).min(remaining).min(left)).await;
        }
    }

    /// The same while a transaction is open. It gives up before the session does: a pooler may have no connection for the session as
    /// long as transactions like this one have them all.
    async fn locate_for_transaction(&self) -> Result<Server, Error> {
        match self.locks.location().found() {
            Some(server) => Ok(server),
            None => self.ask_within(LOCATE_LIMIT, |answer| Request::Locate { answer, anew: false }).await,
        }
    }

    /// Where the table is.
    pub(crate) async fn locate(&self) -> Result<Server, Error> {
        match self.locks.location().found() {
            Some(server) => Ok(server),
            None => self.ask(|answer| Request::Locate { answer, anew: false }).await,
        }
    }

    /// The row, as the session sees it.
    pub(crate) async fn look(&self) -> Result<Option<LockRow>, Error> {
        self.ask(|answer| Request::Look { name: self.name.clone(), answer }).await
    }

    /// Rules out the last holder of a lease that has run out or was released.
    async fn settle(&self) -> Result<(), Error> {
        let name = self.name.clone();
        let limit = self.left().unwrap_or(ANSWER_LIMIT).max(SHORTEST_ANSWER) + LONGEST_NOTICE;
        self.ask_within(limit, |answer| Request::Settle { name, answer }).await
    }

    /// Makes sure that the row is there before the transaction touches it, on a connection of the session: never in the
    /// caller's transaction, where others would wait for it with locks that end in deadlocks. Answers the row and whether it was missing.
    async fn ensure_row(&self) -> Result<(LockRow, bool), Error> {
        self.ask(|answer| Request::EnsureRow { name: self.name.clone(), kind: self.kind, answer }).await
    }

    /// Asks the session, not much longer than the wait, and again while something is in the way that passes.
    async fn ask<T>(&self, request: impl Fn(Answer<T>) -> Request) -> Result<T, Error> {
        loop {
            let limit = self.left().unwrap_or(ANSWER_LIMIT).max(SHORTEST_ANSWER);
            let answer = self.ask_within(limit, &request).await;
            let left = self.left().unwrap_or_else(|| SHORTEST_ANSWER.saturating_sub(self.started.elapsed()));
            match answer {
                Err(error @ Error::Database { .. }) if error.is_retryable() && !left.is_zero() => {
                    tracing::debug!(lock = %self.name, %error, "asked again");
                }
                answer => return answer,
            }
            sleep(jitter(PAUSE).min(left)).await;
        }
    }

    async fn ask_within<T>(
        &self,
        limit: Duration,
        request: impl FnOnce(Answer<T>) -> Request,
    ) -> Result<T, Error> {
        match timeout(limit, self.locks.session().ask(request)).await {
            Ok(answer) => answer,
            Err(_elapsed) => {
                Err(Failure::no_answer::<DB>(self.started.elapsed()).into_error(ACTION, Some(self.name)))
            }
        }
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

    fn wrong_kind(&self) -> Error {
        let found = if self.kind == Kind::Row { Kind::Insert } else { Kind::Row };
        Error::WrongKind { name: self.name.to_string(), wanted: self.kind, found }
    }

    /// The transaction can only be rolled back.
    async fn stale(&self, connection: &mut DB::Connection) -> Error {
        bounds::doom::<DB>(connection).await;
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

/// The row that is to be locked, as far as it is known.
pub(super) struct Found {
    server: Server,
    row: KnownRow,
}

/// Where the transaction makes it.
const NO_ROW: KnownRow = KnownRow { id: 0, created: 0 };

const fn known(row: &LockRow) -> KnownRow {
    KnownRow { id: row.id, created: row.created }
}

/// What came of one statement.
enum Step {
    Done(RowAttempt),
    /// Something keeps the table or the database as a whole from being written. The transaction is as usable as before.
    Stalled(Failure),
}
