//! Finds the row of a lock for a transaction, before the transaction touches the table. The session
//! does it, on its own connections.

use std::time::Duration;

use super::attempt::{ACTION, Attempt, PAUSE, SHORT_PAUSE, SHORTEST_ANSWER};
use crate::bounds::{self, ANSWER_LIMIT};
use crate::clock::{sleep, timeout};
use crate::context::RowId;
use crate::database::Failure;
use crate::database::{Fault, LockDatabase, LockRow, RowClaim, Server};

use crate::error::{Action, WaitingFor};
use crate::jitter::jitter;
use crate::options::Wait;
use crate::session::{AnswerSender, Request};
use crate::{Error, Kind};

/// How long the session may look for the table while a transaction of the caller is open.
const LOCATE_LIMIT: Duration = Duration::from_secs(3);
/// The longest time that a takeover gives notice.
const LONGEST_NOTICE: Duration = Duration::from_secs(1);
/// How long the session may look for the table before the caller's transaction looks for it.
const FIND_LIMIT: Duration = Duration::from_millis(500);
/// How long the session has for its first answer while a transaction is open. Longer than a private
/// connection waits for the table.
const SESSION_LIMIT: Duration = Duration::from_secs(3);
/// The same for a try.
const TRY_LIMIT: Duration = Duration::from_secs(3);

/// The row to lock, as far as it is known.
pub(crate) struct FoundRow {
    pub(super) server: Server,
    pub(super) row: RowId,
}

/// Where the transaction creates the row.
const NO_ROW: RowId = RowId { id: 0, created: 0 };

const fn known(row: &LockRow) -> RowId {
    RowId { id: row.id, created: row.created }
}

impl<DB: LockDatabase> Attempt<'_, DB> {
    /// Finds the row, and waits until no lease holds it, where that has to happen outside of the
    /// transaction. Returns the row's id, or zero where none is needed. `None` as for
    /// [`find_in_own`](Self::find_in_own).
    pub(super) async fn find(
        &self,
        connection: &mut DB::Connection,
        is_own: bool,
        may_wait: &mut impl FnMut(Option<&Failure>) -> bool,
    ) -> Result<Option<FoundRow>, Error> {
        if self.context.session().is_closed() {
            return Err(Error::Closed);
        }
        let server = self.locate_for_transaction(connection).await?;
        let found = match self.kind {
            Kind::Row => self.find_row(connection, &server, is_own).await.map(Some),
            Kind::Insert | Kind::Unknown => self.find_lease(connection, &server, may_wait).await,
        };
        match found {
            Ok(row) => Ok(row.map(|row| FoundRow { server, row })),
            // The transaction itself keeps the row from being created.
            Err(Error::Serialization { .. }) => {
                let error = self.stale(connection).await;
                // The next transaction then finds the row.
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
    ) -> Result<RowId, Error> {
        if DB::ROW_IS_MADE_IN_TRANSACTION {
            return Ok(NO_ROW);
        }
        if let Some(row) = self.context.row_ids().get(self.name) {
            return Ok(row);
        }
        if !is_own {
            return Ok(known(&self.ensure_row_for(connection, server).await?));
        }
        self.make_row().await
    }

    /// Finds or makes the row before a transaction of lock-db begins, where the session has to do it.
    /// So a connection of the pool does not wait for that. Asks once: the caller knows how to go on after
    /// an error.
    pub(crate) async fn prepare_row(&self) -> Result<(), Error> {
        if DB::ROW_IS_MADE_IN_TRANSACTION || self.context.row_ids().get(self.name).is_some() {
            return Ok(());
        }
        let limit = self.left().unwrap_or(TRY_LIMIT).max(SHORTEST_ANSWER);
        let row = self.ask_within(limit, self.ensure()).await;
        let row = known(&row.map_err(|error| error.about(self.name.shown()))?);
        self.context.row_ids().insert(self.name.clone(), row);
        Ok(())
    }

    async fn make_row(&self) -> Result<RowId, Error> {
        let row = known(&self.ensure_row().await?);
        self.context.row_ids().insert(self.name.clone(), row);
        Ok(row)
    }

    fn ensure(&self) -> impl Fn(AnswerSender<LockRow>) -> Request {
        let (name, kind) = (self.name.clone(), self.kind);
        move |answer| Request::EnsureRow { name: name.clone(), kind, instead_of: None, answer }
    }

    /// Finds the row of a name for a caller's transaction. That transaction may have locks already,
    /// and an `ALTER TABLE` that waits for it keeps private connections from the table. In that
    /// case the transaction reads the row itself.
    async fn ensure_row_for(
        &self,
        connection: &mut DB::Connection,
        server: &Server,
    ) -> Result<LockRow, Error> {
        let ensured = self.ask_for(connection, |answer| Request::EnsureRow {
            name: self.name.clone(),
            kind: self.kind,
            instead_of: None,
            answer,
        });
        let error = match ensured.await {
            Ok(row) => {
                self.context.row_ids().insert(self.name.clone(), known(&row));
                return Ok(row);
            }
            Err(error) if error.passes() => error,
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

    /// Reads the row again that could not be locked, without creating it: the transaction may have
    /// locked the gap where it belongs. Returns whether it is still the same row.
    pub(super) async fn read_row_again(
        &self,
        connection: &mut DB::Connection,
        claim: &mut RowClaim,
    ) -> Result<bool, Error> {
        if DB::ROW_IS_MADE_IN_TRANSACTION {
            return Ok(true);
        }
        self.context.row_ids().forget_all();
        let before = RowId { id: claim.row.id, created: claim.created };
        let row = self.look_for(connection).await?.map_or(NO_ROW, |row| known(&row));
        (claim.row.id, claim.created) = (row.id, row.created);
        Ok(row == before)
    }

    /// Finds the row that replaces the one that could not be locked, and creates it if there is
    /// none. Returns whether it is still the same row.
    ///
    /// In REPEATABLE READ the transaction has locked the gap where the row was. If that gap may be
    /// the place of new rows, none is created, and the result is `Serialization`.
    pub(super) async fn find_row_instead(
        &self,
        connection: &mut DB::Connection,
        claim: &mut RowClaim,
    ) -> Result<bool, Error> {
        if DB::ROW_IS_MADE_IN_TRANSACTION {
            return Ok(true);
        }
        self.context.row_ids().forget_all();
        let before = RowId { id: claim.row.id, created: claim.created };
        let ensured = self.ask_for(connection, |answer| Request::EnsureRow {
            name: self.name.clone(),
            kind: self.kind,
            instead_of: Some(before.id),
            answer,
        });
        match ensured.await {
            Ok(row) => {
                let row = known(&row);
                self.context.row_ids().insert(self.name.clone(), row);
                (claim.row.id, claim.created) = (row.id, row.created);
                Ok(row == before)
            }
            Err(error) if error.passes() => {
                Err(Error::Serialization { name: self.name.given(), source: None })
            }
            Err(error) => Err(error),
        }
    }

    pub(super) async fn find_lease(
        &self,
        connection: &mut DB::Connection,
        server: &Server,
        may_wait: &mut impl FnMut(Option<&Failure>) -> bool,
    ) -> Result<Option<RowId>, Error> {
        let outside = bounds::answer::<DB, _>(ANSWER_LIMIT, DB::waits_outside(connection)).await;
        if outside.map_err(|failure| failure.into_error(ACTION, Some(self.name)))? {
            return self.wait_for_lease(connection, server, may_wait).await;
        }
        Ok(Some(NO_ROW))
    }

    /// Waits outside of the transaction until no lease holds the lock and its last holder is ruled
    /// out. Returns the row's id. `None` as for [`find_in_own`](Self::find_in_own).
    async fn wait_for_lease(
        &self,
        connection: &mut DB::Connection,
        server: &Server,
        may_wait: &mut impl FnMut(Option<&Failure>) -> bool,
    ) -> Result<Option<RowId>, Error> {
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
                    // This transaction itself may have the row locked.
                    Err(Error::Database { source, .. })
                        if DB::SETTLES_IN_TRANSACTION && DB::classify(&source) == Fault::Busy =>
                    {
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
                // A try of a lock without a holder continues until the lock is settled or until it
                // is clear that it can't be.
                None if is_over => SHORTEST_ANSWER.saturating_sub(self.started.elapsed()),
                None => return Ok(None),
            };
            if left.is_zero() {
                return match self.wait {
                    Wait::Try => Ok(None),
                    Wait::Within(_) => Err(self.timed_out(WaitingFor::Lock, Some(Box::new(self.info(row))))),
                };
            }
            if !may_wait(None) {
                return Ok(None);
            }
            sleep(jitter(PAUSE).min(remaining).min(left)).await;
        }
    }

    /// [`locate`](Self::locate) while a transaction is open. If such transactions have all
    /// connections of a pooler, the session may get none. So this transaction looks for the table
    /// itself where that gives the same result, and the limit is shorter than the session's own.
    async fn locate_for_transaction(&self, connection: &mut DB::Connection) -> Result<Server, Error> {
        if let Some(server) = self.context.location().found() {
            return Ok(server);
        }
        let located = self.ask_within(LOCATE_LIMIT, |answer| Request::Locate { answer, anew: false });
        let mut located = std::pin::pin!(located);
        if let Ok(located) = timeout(FIND_LIMIT, &mut located).await {
            return located;
        }
        let schema = self.context.location().schema();
        let found = DB::find_only_table(connection, self.context.pool(), schema.as_deref());
        match bounds::answer::<DB, _>(ANSWER_LIMIT, found).await {
            Ok(Some(server)) => Ok(server),
            Ok(None) => located.await,
            Err(failure) => Err(failure.into_error(Action::FindTable, Some(self.name))),
        }
    }

    /// Returns where the table is.
    pub(crate) async fn locate(&self) -> Result<Server, Error> {
        match self.context.location().found() {
            Some(server) => Ok(server),
            None => self.ask(|answer| Request::Locate { answer, anew: false }).await,
        }
    }

    /// Reads the row on a connection of the session.
    pub(crate) async fn read(&self) -> Result<Option<LockRow>, Error> {
        self.ask(|answer| Request::Read { name: self.name.clone(), answer }).await
    }

    /// [`read`](Self::read) while a transaction is open.
    async fn look_for(&self, connection: &mut DB::Connection) -> Result<Option<LockRow>, Error> {
        self.ask_for(connection, |answer| Request::Read { name: self.name.clone(), answer }).await
    }

    /// Rules out the last holder of a lease that has expired or was released.
    pub(super) async fn settle(&self) -> Result<(), Error> {
        let name = self.name.clone();
        let limit = self.left().unwrap_or(TRY_LIMIT).clamp(SHORTEST_ANSWER, SESSION_LIMIT) + LONGEST_NOTICE;
        self.ask_within(limit, |answer| Request::Settle { name, answer }).await
    }

    /// [`settle`](Self::settle) while a transaction is open that is to continue.
    pub(super) async fn settle_for(&self, connection: &mut DB::Connection) -> Result<(), Error> {
        let settled = self.settle().await;
        self.unless_in_the_way(connection, settled, async || self.settle().await).await
    }

    /// [`ask`](Self::ask) for a caller's transaction. If the transaction may be what keeps the
    /// session from the table, it does not ask again. The error makes its owner roll it back.
    pub(super) async fn ask_for<T>(
        &self,
        connection: &mut DB::Connection,
        request: impl Fn(AnswerSender<T>) -> Request,
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
            Err(error) if error.passes() => {
                let used = bounds::answer::<DB, _>(ANSWER_LIMIT, DB::has_used_table(connection)).await;
                if matches!(used, Ok(false)) { again().await } else { Err(error) }
            }
            answer => answer,
        }
    }

    /// Makes sure that the row exists before the transaction touches it. This uses a connection of
    /// the session and never the caller's transaction, because others would wait for that with
    /// locks that end in deadlocks. Returns the row.
    async fn ensure_row(&self) -> Result<LockRow, Error> {
        self.ask(self.ensure()).await
    }

    /// Asks the session, for about as long as the wait. Asks again after an error that passes.
    pub(super) async fn ask<T>(&self, request: impl Fn(AnswerSender<T>) -> Request) -> Result<T, Error> {
        let mut told = None;
        loop {
            let limit = self.left().unwrap_or(TRY_LIMIT);
            let limit = if told.is_none() { limit.max(SHORTEST_ANSWER) } else { limit };
            let answer = match (self.ask_within(limit, &request).await, told.take()) {
                // The earlier error says more than a missing answer.
                (Err(error), Some(told)) if error.is_silence() => Err(told),
                (answer, _) => answer,
            };
            let left = self.left().unwrap_or_else(|| SHORTEST_ANSWER.saturating_sub(self.started.elapsed()));
            match answer {
                Err(error) if error.passes() && !left.is_zero() => {
                    tracing::debug!(lock = %self.name, error = %error.report(), "asked again");
                    told = Some(error);
                }
                answer => {
                    let within = self.wait.limit().filter(|_| left.is_zero());
                    return answer.map_err(|error| error.about(self.name.shown()).within(within));
                }
            }
            sleep(jitter(PAUSE).min(left)).await;
        }
    }

    async fn ask_within<T>(
        &self,
        limit: Duration,
        request: impl FnOnce(AnswerSender<T>) -> Request,
    ) -> Result<T, Error> {
        match timeout(limit, self.context.session().ask(request)).await {
            Ok(answer) => answer,
            Err(_elapsed) => {
                Err(Failure::no_answer::<DB>(self.started.elapsed()).into_error(ACTION, Some(self.name)))
            }
        }
    }
}
