//! The operations of a connection worker: one step on the connection each.

use std::cell::Cell;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sqlx::Connection as _;

use super::groups::Groups;
use super::life::SILENCE;
use super::worker::WorkerLoop;
use super::{Acquired, MIGRATION_LIMIT, OnRow, OnRows, Operation, Reply, STATEMENT_LIMIT};
use crate::database::{
    Claim, Cluster, Failure, Grant, LeaseStatus, ListPage, LockDatabase, Notification, OldSnapshots,
    ReleaseClaim, Server, StepError,
};
use crate::name::Name;
use crate::{CheckReport, CommitGuard, Finding, FindingKind};

/// How far the clocks of the server and of this machine may differ.
const MOST_APART: Duration = Duration::from_secs(5);

impl<DB: LockDatabase> WorkerLoop<DB> {
    pub(super) async fn carry_out(&mut self, operation: Operation) {
        match operation {
            Operation::Acquire(claims, begun, reply) => self.acquire(&claims, &begun, reply).await,
            Operation::Connect(limit, reply) => {
                let answer = self.on_bare_connection(limit, SILENCE, async |_| Ok(())).await;
                let _ = reply.send(answer);
            }
            Operation::Locate(anew, reply) => {
                if anew {
                    self.forget_table();
                }
                self.answer(reply, async |_, server| Ok(server.clone())).await;
            }
            Operation::OnRow(name, operation) => self.on_row(&name, operation).await,
            Operation::OnRows(names, operation) => self.on_rows(&names, operation).await,
            Operation::NextInLine(ids, secret, reply) => {
                self.answer(reply, async |c, server| DB::next_in_line(c, server, &ids, &secret).await).await;
            }
            Operation::Mark(lease, reply) => {
                self.answer(reply, async |c, _| DB::mark(c, &lease).await).await;
            }
            Operation::Flush(flush) => self.flush(vec![flush]).await,
            Operation::Listen(reply) => self.listen_in_time(reply).await,
            Operation::Notification(notification) => self.notify(&[notification]).await,
            Operation::TakeUserLock(row, reply) => self.take_user_lock(row, reply).await,
            Operation::ReleaseUserLock(row) => self.release_user_lock(row).await,
            Operation::Renew(leases, limit, reply) => {
                let answer = self
                    .on_connection(limit, async |connection, server| {
                        let sent = Instant::now();
                        Ok((DB::renew(connection, server, &leases).await?, sent))
                    })
                    .await;
                let _ = reply.send(answer);
            }
            Operation::Release(lease, at_least, reply) if at_least.is_zero() => {
                self.release(&lease, reply).await;
            }
            Operation::Release(ReleaseClaim { name, secret, .. }, at_least, reply) => {
                self.answer(reply, async |c, server| {
                    DB::release_later(c, server, &name, &secret, at_least).await
                })
                .await;
            }
            Operation::Migrate(reply) => self.migrate(reply).await,
            Operation::Check(prunes, reply) => self.check(prunes, reply).await,
            Operation::List(page, reply) => {
                self.answer(reply, async |c, server| {
                    let end = DB::end_of_part(c, server, &page).await?;
                    let page = ListPage { end: end.clone(), ..page };
                    Ok((DB::list(c, server, &page).await?, end))
                })
                .await;
            }
            Operation::RowHolders(ids, reply) => {
                self.answer(reply, async |c, server| DB::row_holders(c, server, &ids).await).await;
            }
            Operation::ForceRelease(name, row, reply) => {
                self.answer(reply, async |c, server| DB::force_release(c, server, &name, &row).await).await;
            }
            Operation::ReadPart(scope, after, reply) => {
                self.answer(reply, async |c, server| DB::read_part(c, server, &scope, after).await).await;
            }
            Operation::RemoveRows(scope, ids, reply) => {
                self.answer(reply, async |c, server| DB::remove_rows(c, server, &scope, &ids).await).await;
            }
            Operation::OldSnapshots(reply) => {
                self.answer(reply, async |c, server| old_snapshots::<DB>(c, server).await).await;
            }
        }
    }

    async fn acquire(&mut self, claims: &[Claim], begun: &Cell<bool>, reply: Reply<Acquired>) {
        let answer = self
            .on_connection(STATEMENT_LIMIT, async |connection, server| {
                let sent = Instant::now();
                if reply.is_closed() {
                    return Ok((None, server.clone(), sent));
                }
                begun.set(true);
                let grants = acquire_all::<DB>(connection, server, claims).await?;
                Ok((grants, server.clone(), sent))
            })
            .await;
        let _ = reply.send(answer);
    }

    async fn release(&mut self, lease: &ReleaseClaim, reply: Reply<LeaseStatus>) {
        let answer =
            self.on_connection(STATEMENT_LIMIT, async |c, server| DB::release(c, server, lease).await).await;
        let notification = answer.as_ref().ok().and_then(|released| released.notification);
        let _ = reply.send(answer.map(|released| released.status));
        self.notify(notification.as_slice()).await;
    }

    async fn migrate(&mut self, reply: Reply<()>) {
        // A migration has no time limit that would reveal a dropped connection, so the connection
        // is checked first.
        if self.connection.is_some() {
            let ping = async |c: &mut DB::Connection| c.ping().await.map_err(Failure::new::<DB>);
            let _another_is_made = self.on_bare_connection(STATEMENT_LIMIT, SILENCE, ping).await;
        }
        let schema = self.location.schema();
        let answer = self
            .on_bare_connection(MIGRATION_LIMIT, MIGRATION_LIMIT, async |c| {
                DB::migrate(c, schema.as_deref()).await.map_err(Failure::new::<DB>)
            })
            .await;
        if answer.is_err()
            && let Some(connection) = self.connection.take()
        {
            // Its session keeps what the migration has locked until it ends, and the server may not
            // notice at once that the connection is closed. So the next connection ends the session.
            self.leave(&connection);
        }
        let _ = reply.send(answer);
    }

    async fn check(&mut self, prunes: bool, reply: Reply<CheckReport>) {
        self.forget_table();
        self.answer(reply, async |c, server| {
            let mut findings = DB::check(c, server).await?;
            if prunes && let Some(lacks) = DB::lacks_right_to_delete(c, server).await? {
                findings.push(Finding::new(FindingKind::MissingRight, lacks));
            }
            let OldSnapshots { found, unseen } = old_snapshots::<DB>(c, server).await?;
            findings.extend(found.map(|found| Finding::new(FindingKind::OldSnapshot, found)));
            findings.extend(unseen.map(|unseen| Finding::new(FindingKind::MissingRight, unseen)));
            findings.extend(clock_differs::<DB>(c).await?);
            let guard = match server.cluster {
                _ if !DB::IS_REMOTE => CommitGuard::WholeDatabase,
                Cluster::SinglePrimary => CommitGuard::RowLock,
                Cluster::MultiPrimary => CommitGuard::Write,
            };
            Ok(CheckReport::new(DB::describe(c, server).await?, guard, findings))
        })
        .await;
    }

    /// The next operation finds the table anew.
    fn forget_table(&mut self) {
        if let Some(connection) = &mut self.connection {
            connection.server = None;
        }
    }

    pub(super) async fn on_row(&mut self, name: &Name, operation: OnRow) {
        match operation {
            OnRow::Read(reply) => {
                self.answer(reply, async |c, server| DB::read(c, server, name).await).await;
            }
            OnRow::Create(kind, reply) => {
                self.answer(reply, async |c, server| DB::create(c, server, name, kind).await).await;
            }
            OnRow::Ensure(kind, reply) => {
                let names = std::slice::from_ref(name);
                self.answer(reply, async |c, server| {
                    let rows = DB::ensure_all(c, server, names, kind).await?;
                    Ok(rows.into_iter().next().flatten())
                })
                .await;
            }
            OnRow::Probe(reply) => {
                self.answer(reply, async |c, server| DB::probe(c, server, name).await).await;
            }
            // They come in groups, which may have one member.
            other => {
                let mut groups = Groups::default();
                groups.take(Operation::OnRow(name.clone(), other));
                self.send_groups(groups).await;
            }
        }
    }

    async fn on_rows(&mut self, names: &[Name], operation: OnRows) {
        match operation {
            OnRows::Read(reply) => {
                self.answer(reply, async |c, server| DB::read_all(c, server, names).await).await;
            }
            OnRows::Create(kind, reply) => {
                self.answer(reply, async |c, server| DB::create_all(c, server, names, kind).await).await;
            }
            OnRows::GiveNotice(reply) => self.give_notice(vec![(names.to_vec(), reply)]).await,
            OnRows::Unlocked(reply) => {
                self.answer(reply, async |c, server| DB::unlocked(c, server, names).await).await;
            }
        }
    }

    /// Runs an operation and sends its result. The result is discarded if the caller has gone.
    async fn answer<T>(
        &mut self,
        reply: Reply<T>,
        operation: impl AsyncFnOnce(&mut DB::Connection, &Server) -> Result<T, StepError>,
    ) {
        let answer = self.on_connection(STATEMENT_LIMIT, operation).await;
        let _ = reply.send(answer);
    }

    /// Sends notifications after the rows were freed. Nothing depends on their success.
    pub(super) async fn notify(&mut self, notifications: &[Notification]) {
        if notifications.is_empty() || self.connection.is_none() {
            return;
        }
        let notified = self
            .on_bare_connection(STATEMENT_LIMIT, SILENCE, async |c| {
                DB::notify(c, notifications).await.map_err(Failure::new::<DB>)
            })
            .await;
        if let Err(failure) = notified {
            tracing::debug!(error = %failure, "the next process was not woken up: it looks by itself");
        }
    }

    async fn take_user_lock(&mut self, row: i64, reply: Reply<bool>) {
        let answer = self
            .on_table(STATEMENT_LIMIT, STATEMENT_LIMIT, async |c, server| {
                DB::take_user_lock(c, server, row).await
            })
            .await;
        if let Err(Ok(true)) = reply.send(answer) {
            self.release_user_lock(row).await;
        }
    }

    /// Without a connection the user lock is not ours any more.
    async fn release_user_lock(&mut self, row: i64) {
        if self.connection.is_some() {
            let _gone_else = self
                .on_connection(STATEMENT_LIMIT, async |c, server| DB::release_user_lock(c, server, row).await)
                .await;
        }
    }
}

/// Takes all leases or none.
async fn acquire_all<DB: LockDatabase>(
    connection: &mut DB::Connection,
    server: &Server,
    claims: &[Claim],
) -> Result<Option<Vec<Grant>>, StepError> {
    if let [claim] = claims {
        return Ok(DB::acquire(connection, server, claim).await?.map(|grant| vec![grant]));
    }
    let grants = DB::acquire_all(connection, server, claims).await?;
    let (mut all, mut undone) = (Vec::with_capacity(claims.len()), Vec::new());
    for (grant, Claim { name, secret, .. }) in grants.into_iter().zip(claims) {
        if let Some(grant) = grant {
            all.push(grant);
            undone.push(ReleaseClaim { name: name.clone(), secret: secret.clone(), entry: None });
        }
    }
    if all.len() == claims.len() {
        return Ok(Some(all));
    }
    if !undone.is_empty() {
        // A trigger may keep one of them from being written. Release the others. Without an answer
        // they may still be ours.
        let released_now = DB::batch(connection, server, &undone, &[], false).await;
        released_now.map_err(StepError::outcome_unknown)?;
    }
    Ok(None)
}

/// Looks for old snapshots and records the result, which decides how later statements are written.
async fn old_snapshots<DB: LockDatabase>(
    connection: &mut DB::Connection,
    server: &Server,
) -> Result<OldSnapshots, StepError> {
    let seen = DB::old_snapshots(connection, server).await?;
    server.table.set_old_versions(seen.found.is_some());
    Ok(seen)
}

/// Compares the clock of the server with that of this machine. Locks depend on the server's alone, but
/// what people read beside each other does not.
async fn clock_differs<DB: LockDatabase>(
    connection: &mut DB::Connection,
) -> Result<Option<Finding>, StepError> {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let before = now();
    let server = DB::time(connection).await?;
    let after = now();
    let server = Duration::from_micros(u64::try_from(server).unwrap_or(0));
    let apart = before.saturating_sub(server).max(server.saturating_sub(after));
    let text = || {
        let which = if server > after { "ahead of" } else { "behind" };
        format!(
            "the clock of the database is {} s {which} that of this machine: times of locks can't be compared with those of logs, \
             and tokens that are made from the clock may jump when it is corrected; let both follow NTP",
            apart.as_secs()
        )
    };
    Ok((apart > MOST_APART).then(|| Finding::new(FindingKind::Clock, text())))
}
