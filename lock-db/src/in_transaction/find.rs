//! Finding the row of a lock for a transaction, before the transaction touches the table: by the session, which has connections of its own.

use std::time::Duration;

use super::attempt::{ACTION, Attempt, PAUSE, SHORT_PAUSE, SHORTEST_ANSWER};
use super::known_rows::KnownRow;
use crate::bounds::{self, ANSWER_LIMIT};
use crate::clock::{sleep, timeout};
use crate::database::{LockDatabase, LockRow, RowClaim, Server, is_busy};
use crate::error::{Failure, WaitingFor};
use crate::jitter::jitter;
use crate::session::{Answer, Request};
use crate::{Error, Kind};

/// How long the table may be looked for while a transaction of the caller is open.
const LOCATE_LIMIT: Duration = Duration::from_secs(3);
/// How long a takeover gives notice, and no longer.
const LONGEST_NOTICE: Duration = Duration::from_secs(1);
/// How long the session may look for the table before the caller's transaction looks itself.
const FIND_LIMIT: Duration = Duration::from_millis(500);
/// How long the session has for the first answer to an open transaction: longer than a private connection waits for the table.
const SESSION_LIMIT: Duration = Duration::from_secs(3);
/// How long a try asks it.
const TRY_LIMIT: Duration = Duration::from_secs(3);

/// The row that is to be locked, as far as it is known.
pub(super) struct Found {
    pub(super) server: Server,
    pub(super) row: KnownRow,
}

/// Where the transaction makes it.
const NO_ROW: KnownRow = KnownRow { id: 0, created: 0 };

const fn known(row: &LockRow) -> KnownRow {
    KnownRow { id: row.id, created: row.created }
}

impl<DB: LockDatabase> Attempt<'_, DB> {
    /// Finds the row, and waits until no lease holds it, where that has to be done outside of the transaction. Answers the row's id, or
    /// zero where that is not needed. `None` as in `lock`.
    pub(super) async fn find(
        &self,
        connection: &mut DB::Connection,
        is_own: bool,
        may_wait: &mut impl FnMut(Option<&Failure>) -> bool,
    ) -> Result<Option<Found>, Error> {
        if self.locks.session().is_closed() {
            return Err(Error::Closed);
        }
        let server = self.locate_for_transaction(connection).await?;
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
    /// connections from the table. Then the transaction looks itself.
    async fn ensure_row_for(
        &self,
        connection: &mut DB::Connection,
        server: &Server,
    ) -> Result<LockRow, Error> {
        let ensured = self.ask_for(connection, |answer| Request::EnsureRow {
            name: self.name.clone(),
            kind: self.kind,
            answer,
        });
        let error = match ensured.await {
            Ok((row, _)) => {
                self.locks.known_rows().insert(self.name.clone(), known(&row));
                return Ok(row);
            }
            Err(error @ Error::Database { .. }) if error.is_retryable() => error,
            Err(error) => return Err(error),
        };
        let has_used_table = bounds::answer::<DB, _>(ANSWER_LIMIT, DB::has_used_table(connection)).await;
        if matches!(has_used_table, Ok(true)) {
            let found = DB::find_row(connection, server, self.name);
            // A lease that is held is not waited for: its holder can't reach the table either.
            if let Ok(Some(row)) = bounds::answer::<DB, _>(ANSWER_LIMIT, found).await
                && (row.kind != Kind::Insert || row.is_settled())
            {
                return Ok(row);
            }
        }
        Err(error)
    }

    /// Looks once more for the row that could not be locked, and makes none: the transaction may have locked the place where it belongs.
    /// Whether it is still the one that was meant.
    pub(super) async fn is_same_row(
        &self,
        connection: &mut DB::Connection,
        claim: &mut RowClaim,
    ) -> Result<bool, Error> {
        if DB::ROW_IS_MADE_IN_TRANSACTION {
            return Ok(true);
        }
        self.locks.known_rows().forget_all();
        let before = KnownRow { id: claim.row.id, created: claim.created };
        let row = self.look_for(connection).await?.map_or(NO_ROW, |row| known(&row));
        (claim.row.id, claim.created) = (row.id, row.created);
        Ok(row == before)
    }

    pub(super) async fn find_lease(
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
                match self.look_for(connection).await? {
                    Some(row) => row,
                    None => return Ok(Some(NO_ROW)),
                }
            } else {
                self.ensure_row_for(connection, server).await?
            };
            if row.kind != Kind::Insert {
                let name = self.name.given();
                return Err(Error::WrongKind { name, wanted: self.kind, found: row.kind });
            }
            if row.is_settled() || (DB::SETTLES_IN_TRANSACTION && row.is_free()) {
                return Ok(Some(known(&row)));
            }
            let is_over = row.is_free() || row.notice_is_due();
            if is_over && !was_settled {
                match self.settle_for(connection).await {
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
                    Some(_) => Err(self.timed_out(WaitingFor::Lock, Some(Box::new(self.info(row))))),
                };
            }
            if !may_wait(None) {
                return Ok(None);
            }
            sleep(jitter(PAUSE).min(remaining).min(left)).await;
        }
    }

    /// The same while a transaction is open. A pooler may have no connection for the session as long as transactions like this one have
    /// them all: so this one looks itself where that comes to the same, and gives up before the session does.
    async fn locate_for_transaction(&self, connection: &mut DB::Connection) -> Result<Server, Error> {
        if let Some(server) = self.locks.location().found() {
            return Ok(server);
        }
        let located = self.ask_within(LOCATE_LIMIT, |answer| Request::Locate { answer, anew: false });
        let mut located = std::pin::pin!(located);
        if let Ok(located) = timeout(FIND_LIMIT, &mut located).await {
            return located;
        }
        let schema = self.locks.location().schema();
        let found = DB::find_only_table(connection, self.locks.pool(), schema.as_deref());
        match bounds::answer::<DB, _>(ANSWER_LIMIT, found).await {
            Ok(Some(server)) => Ok(server),
            Ok(None) => located.await,
            Err(failure) => Err(failure.into_error("find the table", Some(self.name))),
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

    /// The same for a transaction that is open.
    async fn look_for(&self, connection: &mut DB::Connection) -> Result<Option<LockRow>, Error> {
        self.ask_for(connection, |answer| Request::Look { name: self.name.clone(), answer }).await
    }

    /// Rules out the last holder of a lease that has run out or was released.
    pub(super) async fn settle(&self) -> Result<(), Error> {
        let name = self.name.clone();
        let limit = self.left().unwrap_or(TRY_LIMIT).clamp(SHORTEST_ANSWER, SESSION_LIMIT) + LONGEST_NOTICE;
        self.ask_within(limit, |answer| Request::Settle { name, answer }).await
    }

    /// The same for a transaction that is open and is to go on.
    pub(super) async fn settle_for(&self, connection: &mut DB::Connection) -> Result<(), Error> {
        let settled = self.settle().await;
        self.unless_in_the_way(connection, settled, async || self.settle().await).await
    }

    /// As `ask`, for a transaction of the caller: when it may be what keeps the session from the table, it does not ask again, so that its
    /// owner rolls it back.
    pub(super) async fn ask_for<T>(
        &self,
        connection: &mut DB::Connection,
        request: impl Fn(Answer<T>) -> Request,
    ) -> Result<T, Error> {
        let limit = self.left().unwrap_or(TRY_LIMIT).clamp(SHORTEST_ANSWER, SESSION_LIMIT);
        let answer = self.ask_within(limit, &request).await;
        self.unless_in_the_way(connection, answer, async || self.ask(&request).await).await
    }

    async fn unless_in_the_way<T>(
        &self,
        connection: &mut DB::Connection,
        answer: Result<T, Error>,
        again: impl AsyncFnOnce() -> Result<T, Error>,
    ) -> Result<T, Error> {
        match answer {
            Err(error @ Error::Database { .. }) if error.is_retryable() => {
                let used = bounds::answer::<DB, _>(ANSWER_LIMIT, DB::has_used_table(connection)).await;
                if matches!(used, Ok(false)) { again().await } else { Err(error) }
            }
            answer => answer,
        }
    }

    /// Makes sure that the row is there before the transaction touches it, on a connection of the session: never in the
    /// caller's transaction, where others would wait for it with locks that end in deadlocks. Answers the row and whether it was missing.
    async fn ensure_row(&self) -> Result<(LockRow, bool), Error> {
        self.ask(|answer| Request::EnsureRow { name: self.name.clone(), kind: self.kind, answer }).await
    }

    /// Asks the session, not much longer than the wait, and again while something is in the way that passes.
    pub(super) async fn ask<T>(&self, request: impl Fn(Answer<T>) -> Request) -> Result<T, Error> {
        let mut told = None;
        loop {
            let limit = self.left().unwrap_or(TRY_LIMIT);
            let limit = if told.is_none() { limit.max(SHORTEST_ANSWER) } else { limit };
            let answer = match (self.ask_within(limit, &request).await, told.take()) {
                // What was told before says more than a silence.
                (Err(Error::Database { source, .. }), Some(told)) if Failure::is_silent(&source) => Err(told),
                (answer, _) => answer,
            };
            let left = self.left().unwrap_or_else(|| SHORTEST_ANSWER.saturating_sub(self.started.elapsed()));
            match answer {
                Err(error @ Error::Database { .. }) if error.is_retryable() && !left.is_zero() => {
                    tracing::debug!(lock = %self.name, %error, "asked again");
                    told = Some(error);
                }
                answer => {
                    let within = self.wait.filter(|_| left.is_zero());
                    return answer.map_err(|error| error.about(self.name).within(within));
                }
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
}
