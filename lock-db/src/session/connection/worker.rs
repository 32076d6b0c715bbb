//! The loop of a connection worker, which owns the connection.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::{Connection as _, Pool};
use tokio::select;
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, sleep_until, timeout};

use super::connector::{Connector, WaitsForHook};
use super::earlier::Earlier;
use super::life::{CLOSE_LIMIT, DEAF_FOR, Private, SILENCE, Way};
use super::{Acquired, MIGRATION_LIMIT, OnRow, OnRows, Operation, Reply, STATEMENT_LIMIT};
use crate::database::{
    Claim, Fault, Grant, LeaseStatus, Location, LockDatabase, LockRow, Notification, OldSnapshots,
    ReleaseClaim, Server,
};
use crate::database::{Failure, StepError};
use crate::name::Name;
use crate::session::wakeup::notify::Notifications;

/// How many requests are taken from the queue at once.
const ROUND: usize = 256;

/// A claim, whether it was sent, and the channel for its answer.
type Asked = (Claim, Rc<Cell<bool>>, Reply<Acquired>);

/// The requests of a round that go into one statement. Each name occurs once.
#[derive(Default)]
struct Batch {
    releases: Vec<(ReleaseClaim, Reply<LeaseStatus>)>,
    claims: Vec<Asked>,
    names: HashSet<Name>,
}

impl Batch {
    /// Adds an operation to the batch, or returns it if it does not belong there.
    fn take(&mut self, operation: Operation) -> Option<Operation> {
        match operation {
            Operation::Release(one, at_least, reply) => {
                // The name is also marked if the release is sent separately. Later requests for the
                // name then come after it.
                let is_first = self.names.insert(one.name.clone());
                if !is_first || !at_least.is_zero() {
                    return Some(Operation::Release(one, at_least, reply));
                }
                self.releases.push((one, reply));
                None
            }
            Operation::Acquire(mut claims, begun, reply)
                if claims.len() == 1 && self.names.insert(claims[0].name.clone()) =>
            {
                self.claims.extend(claims.pop().map(|claim| (claim, begun, reply)));
                None
            }
            other => Some(other),
        }
    }
}

pub(super) struct WorkerLoop<DB: LockDatabase> {
    pub(super) connector: Connector<DB>,
    pub(super) connection: Option<Private<DB>>,
    pub(super) location: Arc<Location>,
    pub(super) answered: Rc<Cell<Option<Instant>>>,
    pub(super) notifications: Rc<Notifications>,
    pub(super) may_listen: bool,
    pub(super) deaf_until: Option<Instant>,
    /// How long recent answers took.
    pub(super) pace: Duration,
    pub(super) earlier: Earlier,
    pub(super) lost: Rc<Notify>,
}

impl<DB: LockDatabase> WorkerLoop<DB> {
    pub(super) fn new(
        application: Pool<DB>,
        location: &Arc<Location>,
        answered: &Rc<Cell<Option<Instant>>>,
        notifications: &Rc<Notifications>,
        may_listen: bool,
        lost: &Rc<Notify>,
        waits_for_hook: &WaitsForHook,
    ) -> Self {
        Self {
            connector: Connector::new(application, location, waits_for_hook),
            connection: None,
            location: Arc::clone(location),
            answered: Rc::clone(answered),
            notifications: Rc::clone(notifications),
            may_listen,
            deaf_until: None,
            pace: Duration::ZERO,
            earlier: Earlier::default(),
            lost: Rc::clone(lost),
        }
    }

    pub(super) async fn serve(mut self, mut queue: mpsc::UnboundedReceiver<Operation>) {
        let mut round = Vec::with_capacity(ROUND);
        loop {
            let rest = self.earlier.pause();
            let retires = self.retires_at();
            if retires.is_some_and(|at| at <= Instant::now()) {
                self.retire();
                continue;
            }
            select! {
                biased;
                count = queue.recv_many(&mut round, ROUND) => if count == 0 { break },
                () = self.notified() => continue,
                () = at(retires), if retires.is_some() => continue,
                () = sleep(rest.unwrap_or_default()), if rest.is_some() => {
                    // What an earlier session was doing could still be carried out, and there may
                    // be no other request that ends it.
                    if self.on_bare_connection(STATEMENT_LIMIT, SILENCE, async |_| Ok(())).await.is_err() {
                        self.earlier.remain();
                    }
                    continue;
                }
            }
            let mut batch = Batch::default();
            let (mut looks, mut others) = (Vec::new(), Vec::new());
            for operation in round.drain(..) {
                if !operation.is_forgotten() {
                    match batch.take(operation) {
                        Some(Operation::OnRow(name, OnRow::Read(reply))) => looks.push((name, reply)),
                        other => others.extend(other),
                    }
                }
            }
            self.batch(batch).await;
            self.read(looks).await;
            for operation in others {
                if !operation.is_forgotten() {
                    self.carry_out(operation).await;
                }
            }
        }
        if let Some(Private { way: Way::Plain(connection), .. }) = self.connection {
            let _in_time = timeout(CLOSE_LIMIT, connection.close()).await;
        }
    }

    /// Listens on the connection that renews leases. That connection is never given up in order to
    /// listen.
    async fn listen(&mut self) -> Result<(), Failure> {
        if self.notifications.listener() != 0 {
            return Ok(());
        }
        if self.connection.is_none() {
            self.connection = Some(self.connect().await?);
        }
        if let Some(Private { way: Way::Listening(listening), .. }) = &mut self.connection {
            if DB::listen(listening, self.notifications.number()).await.map_err(Failure::new::<DB>)? {
                self.notifications.begin();
            } else {
                self.notifications.can_not_begin();
            }
        }
        Ok(())
    }

    async fn listen_in_time(&mut self, reply: Reply<()>) {
        let answer = match timeout(STATEMENT_LIMIT, self.listen()).await {
            Ok(listening) => listening,
            Err(_elapsed) => {
                self.deaf_until = Some(Instant::now() + DEAF_FOR);
                Err(Failure::no_answer::<DB>(STATEMENT_LIMIT))
            }
        };
        if matches!(answer, Err(Failure { fault: Fault::Disconnected, .. })) {
            self.give_up_connection();
            self.earlier.is_given_up();
        }
        let _ = reply.send(answer);
    }

    /// Sends the batch in one statement. If the database refuses it, the requests are sent one by
    /// one, so that only the faulty ones fail.
    async fn batch(&mut self, batch: Batch) {
        let Batch { releases, claims, .. } = batch;
        if releases.len() + claims.len() > 1 {
            let released_now: Vec<ReleaseClaim> = releases.iter().map(|(one, _)| one.clone()).collect();
            let answer = self
                .on_connection(STATEMENT_LIMIT, async |connection, server| {
                    // Callers that left while the connection was made know that nothing was sent,
                    // and release nothing.
                    let stays = |(_, (_, _, reply)): &(usize, &Asked)| !reply.is_closed();
                    let (mut asked, mut claimed) = (Vec::new(), Vec::new());
                    for (number, (claim, begun, _)) in claims.iter().enumerate().filter(stays) {
                        begun.set(true);
                        asked.push(number);
                        claimed.push(claim.clone());
                    }
                    let sent = Instant::now();
                    let outcome = DB::batch(connection, server, &released_now, &claimed).await?;
                    Ok((outcome, asked, server.clone(), sent))
                })
                .await;
            match answer {
                Ok((outcome, asked, server, sent)) => {
                    for ((_, reply), status) in releases.into_iter().zip(outcome.releases) {
                        let _ = reply.send(Ok(status));
                    }
                    let mut granted = asked.into_iter().zip(outcome.grants).peekable();
                    for (number, (_, _, reply)) in claims.into_iter().enumerate() {
                        let grant =
                            granted.next_if(|(asked, _)| *asked == number).and_then(|(_, grant)| grant);
                        let _ = reply.send(Ok((grant.map(|grant| vec![grant]), server.clone(), sent)));
                    }
                    self.call(&outcome.notifications).await;
                    return;
                }
                // Sent one by one, all of them would fail the same way.
                Err(failure) if failure.is_the_same_for_all() => {
                    for (_, reply) in releases {
                        let _ = reply.send(Err(failure.clone()));
                    }
                    for (_, _, reply) in claims {
                        let _ = reply.send(Err(failure.clone()));
                    }
                    return;
                }
                Err(refused) => tracing::debug!(error = %refused, "one by one instead"),
            }
        }
        let releases =
            releases.into_iter().map(|(one, reply)| Operation::Release(one, Duration::ZERO, reply));
        let claims =
            claims.into_iter().map(|(claim, begun, reply)| Operation::Acquire(vec![claim], begun, reply));
        for operation in releases.chain(claims) {
            self.carry_out(operation).await;
        }
    }

    /// Reads all rows in one statement. A process that waits for many names reads often.
    async fn read(&mut self, mut looks: Vec<(Name, Reply<Option<LockRow>>)>) {
        if looks.len() < 2 {
            for (name, reply) in looks {
                self.on_row(&name, OnRow::Read(reply)).await;
            }
            return;
        }
        looks.sort_by(|(one, _), (other, _)| one.cmp(other));
        let mut names: Vec<Name> = looks.iter().map(|(name, _)| name.clone()).collect();
        names.dedup();
        let rows = self
            .on_connection(STATEMENT_LIMIT, async |c, server| DB::read_all(c, server, &names).await)
            .await;
        let rows = rows.map(|rows| names.iter().zip(rows).collect::<HashMap<_, _>>());
        for (name, reply) in looks {
            let row = match &rows {
                Ok(rows) => Ok(rows.get(&name).cloned().flatten()),
                Err(failure) => Err(failure.clone()),
            };
            let _ = reply.send(row);
        }
    }

    async fn carry_out(&mut self, operation: Operation) {
        match operation {
            Operation::Acquire(claims, begun, reply) => {
                let answer = self
                    .on_connection(STATEMENT_LIMIT, async |connection, server| {
                        let sent = Instant::now();
                        if reply.is_closed() {
                            return Ok((None, server.clone(), sent));
                        }
                        begun.set(true);
                        let grants = acquire_all::<DB>(connection, server, &claims).await?;
                        Ok((grants, server.clone(), sent))
                    })
                    .await;
                let _ = reply.send(answer);
            }
            Operation::Connect(limit, reply) => {
                let answer = self.on_bare_connection(limit, SILENCE, async |_| Ok(())).await;
                let _ = reply.send(answer);
            }
            Operation::Locate(anew, reply) => {
                if let Some(connection) = self.connection.as_mut().filter(|_| anew) {
                    connection.server = None;
                }
                self.answer(reply, async |_, server| Ok(server.clone())).await;
            }
            Operation::OnRow(name, operation) => self.on_row(&name, operation).await,
            Operation::OnRows(names, operation) => self.on_rows(&names, operation).await,
            Operation::Mark(lease, reply) => {
                self.answer(reply, async |c, _| DB::mark(c, &lease).await).await;
            }
            Operation::Listen(reply) => self.listen_in_time(reply).await,
            Operation::Notification(call) => self.call(&[call]).await,
            Operation::TakeUserLock(row, reply) => {
                let answer = self
                    .on_table(STATEMENT_LIMIT, STATEMENT_LIMIT, async |c, server| {
                        DB::take_user_lock(c, server, row).await
                    })
                    .await;
                if let Err(Ok(true)) = reply.send(answer) {
                    self.release_user_lock(row).await;
                }
            }
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
                let answer = self
                    .on_connection(STATEMENT_LIMIT, async |c, server| DB::release(c, server, &lease).await)
                    .await;
                let notification = answer.as_ref().ok().and_then(|released| released.notification);
                let _ = reply.send(answer.map(|released| released.status));
                self.call(notification.as_slice()).await;
            }
            Operation::Release(ReleaseClaim { name, secret, .. }, at_least, reply) => {
                self.answer(reply, async |c, server| {
                    DB::release_later(c, server, &name, &secret, at_least).await
                })
                .await;
            }
            Operation::Migrate(reply) => {
                // A migration has no time limit that would reveal a dropped connection, so the
                // connection is checked first.
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
                if answer.is_err() {
                    // Closing the connection releases everything that the migration has locked.
                    self.connection = None;
                }
                let _ = reply.send(answer);
            }
            Operation::Check(reply) => {
                if let Some(connection) = &mut self.connection {
                    connection.server = None;
                }
                self.answer(reply, async |c, server| {
                    let mut warnings = DB::check(c, server).await?;
                    let OldSnapshots { found, unseen } = old_snapshots::<DB>(c, server).await?;
                    warnings.extend(found.into_iter().chain(unseen));
                    Ok(warnings)
                })
                .await;
            }
            Operation::OldSnapshots(reply) => {
                self.answer(reply, async |c, server| old_snapshots::<DB>(c, server).await).await;
            }
        }
    }

    async fn on_row(&mut self, name: &Name, operation: OnRow) {
        match operation {
            OnRow::Read(reply) => {
                self.answer(reply, async |c, server| DB::read(c, server, name).await).await;
            }
            OnRow::Create(kind, reply) => {
                self.answer(reply, async |c, server| DB::create(c, server, name, kind).await).await;
            }
            OnRow::Settle(reply) => {
                self.answer(reply, async |c, server| DB::settle(c, server, name).await).await;
            }
            OnRow::Probe(reply) => {
                self.answer(reply, async |c, server| DB::probe(c, server, name).await).await;
            }
            OnRow::Enqueue(entry, reply) => {
                self.answer(reply, async |c, server| DB::enqueue(c, server, name, &entry).await).await;
            }
            OnRow::SetWaiters(before, after, reply) => {
                self.answer(reply, async |c, server| DB::set_waiters(c, server, name, &before, &after).await)
                    .await;
            }
            OnRow::RemoveWaiter(secret, reply) => {
                self.answer(reply, async |c, server| DB::dequeue(c, server, name, &secret).await).await;
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
            OnRows::GiveNotice(reply) => {
                self.answer(reply, async |c, server| DB::give_notice(c, server, names).await).await;
            }
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
    async fn call(&mut self, notifications: &[Notification]) {
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

    /// Without a connection the user lock is not ours any more.
    async fn release_user_lock(&mut self, row: i64) {
        if self.connection.is_some() {
            let _gone_else = self
                .on_connection(STATEMENT_LIMIT, async |c, server| DB::release_user_lock(c, server, row).await)
                .await;
        }
    }
}

async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment.into()).await,
        None => std::future::pending().await,
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
        let released_now = DB::batch(connection, server, &undone, &[]).await;
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
