//! The end of a lane that has the connection.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::{Connection as _, Pool};
use tokio::select;
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, sleep_until, timeout};

use super::connection::{CLOSE_LIMIT, DEAF_FOR, Private, SILENCE, Way};
use super::connector::{Connector, WaitsForHook};
use super::earlier::Earlier;
use super::{Acquired, MIGRATION_LIMIT, OnRow, OnRows, Operation, Reply, STATEMENT_LIMIT};
use crate::database::{
    Call, Claim, Fault, Grant, Location, LockDatabase, LockRow, OldSnapshots, Return, Server, Standing,
};
use crate::error::Failure;
use crate::name::Name;
use crate::session::calls::Calls;

/// How many requests are taken from the queue at once.
const ROUND: usize = 256;

/// A claim, whether it was sent, and who waits for the answer.
type Asked = (Claim, Rc<Cell<bool>>, Reply<Acquired>);

/// What of a round can travel in one statement: each name once.
#[derive(Default)]
struct Exchange {
    returns: Vec<(Return, Reply<Standing>)>,
    claims: Vec<Asked>,
    names: HashSet<Name>,
}

impl Exchange {
    /// Answers what does not belong here.
    fn take(&mut self, operation: Operation) -> Option<Operation> {
        match operation {
            Operation::Release(one, at_least, reply) => {
                // Also when it goes alone: what comes for the name after it goes after it.
                let is_first = self.names.insert(one.name.clone());
                if !is_first || !at_least.is_zero() {
                    return Some(Operation::Release(one, at_least, reply));
                }
                self.returns.push((one, reply));
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

pub(super) struct Worker<DB: LockDatabase> {
    pub(super) connector: Connector<DB>,
    pub(super) connection: Option<Private<DB>>,
    pub(super) location: Arc<Location>,
    pub(super) answered: Rc<Cell<Option<Instant>>>,
    pub(super) calls: Rc<Calls>,
    pub(super) may_listen: bool,
    pub(super) deaf_until: Option<Instant>,
    /// How long answers take, lately.
    pub(super) pace: Duration,
    pub(super) earlier: Earlier,
    pub(super) lost: Rc<Notify>,
}

impl<DB: LockDatabase> Worker<DB> {
    pub(super) fn new(
        application: Pool<DB>,
        location: &Arc<Location>,
        answered: &Rc<Cell<Option<Instant>>>,
        calls: &Rc<Calls>,
        may_listen: bool,
        lost: &Rc<Notify>,
        waits_for_hook: &WaitsForHook,
    ) -> Self {
        Self {
            connector: Connector::new(application, location, waits_for_hook),
            connection: None,
            location: Arc::clone(location),
            answered: Rc::clone(answered),
            calls: Rc::clone(calls),
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
                () = self.called() => continue,
                () = at(retires), if retires.is_some() => continue,
                () = sleep(rest.unwrap_or_default()), if rest.is_some() => {
                    // What it was doing could be carried out late, and nobody may ask for anything any more.
                    if self.on_bare_connection(STATEMENT_LIMIT, SILENCE, async |_| Ok(())).await.is_err() {
                        self.earlier.remain();
                    }
                    continue;
                }
            }
            let mut exchange = Exchange::default();
            let (mut looks, mut others) = (Vec::new(), Vec::new());
            for operation in round.drain(..) {
                if !operation.is_forgotten() {
                    match exchange.take(operation) {
                        Some(Operation::OnRow(name, OnRow::Look(reply))) => looks.push((name, reply)),
                        other => others.extend(other),
                    }
                }
            }
            self.exchange(exchange).await;
            self.look(looks).await;
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

    /// On the connection that renews leases, which is never given up for it.
    async fn listen(&mut self) -> Result<(), Failure> {
        if self.calls.listener() != 0 {
            return Ok(());
        }
        if self.connection.is_none() {
            self.connection = Some(self.connect().await?);
        }
        if let Some(Private { way: Way::Listening(listening), .. }) = &mut self.connection {
            if DB::listen(listening, self.calls.number()).await.map_err(Failure::new::<DB>)? {
                self.calls.begin();
            } else {
                self.calls.can_not_begin();
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

    /// All of it in one statement. When the database refuses that, one by one, so that only those whose fault it is fail.
    async fn exchange(&mut self, exchange: Exchange) {
        let Exchange { returns, claims, .. } = exchange;
        if returns.len() + claims.len() > 1 {
            let given_back: Vec<Return> = returns.iter().map(|(one, _)| one.clone()).collect();
            let answer = self
                .on_connection(STATEMENT_LIMIT, async |connection, server| {
                    // Those who left while the connection was made know that nothing was sent, and undo nothing.
                    let stays = |(_, (_, _, reply)): &(usize, &Asked)| !reply.is_closed();
                    let (mut asked, mut claimed) = (Vec::new(), Vec::new());
                    for (number, (claim, begun, _)) in claims.iter().enumerate().filter(stays) {
                        begun.set(true);
                        asked.push(number);
                        claimed.push(claim.clone());
                    }
                    let sent = Instant::now();
                    let exchanged = DB::exchange(connection, server, &given_back, &claimed).await?;
                    Ok((exchanged, asked, server.clone(), sent))
                })
                .await;
            match answer {
                Ok((exchanged, asked, server, sent)) => {
                    for ((_, reply), standing) in returns.into_iter().zip(exchanged.returns) {
                        let _ = reply.send(Ok(standing));
                    }
                    let mut granted = asked.into_iter().zip(exchanged.grants).peekable();
                    for (number, (_, _, reply)) in claims.into_iter().enumerate() {
                        let grant =
                            granted.next_if(|(asked, _)| *asked == number).and_then(|(_, grant)| grant);
                        let _ = reply.send(Ok((grant.map(|grant| vec![grant]), server.clone(), sent)));
                    }
                    self.call(&exchanged.calls).await;
                    return;
                }
                // One by one it would be the same for all of them.
                Err(failure) if failure.is_the_same_for_all() => {
                    for (_, reply) in returns {
                        let _ = reply.send(Err(failure.another()));
                    }
                    for (_, _, reply) in claims {
                        let _ = reply.send(Err(failure.another()));
                    }
                    return;
                }
                Err(refused) => tracing::debug!(error = %refused, "one by one instead"),
            }
        }
        let returns = returns.into_iter().map(|(one, reply)| Operation::Release(one, Duration::ZERO, reply));
        let claims =
            claims.into_iter().map(|(claim, begun, reply)| Operation::Acquire(vec![claim], begun, reply));
        for operation in returns.chain(claims) {
            self.carry_out(operation).await;
        }
    }

    /// In one statement. Those who wait for many names look often.
    async fn look(&mut self, mut looks: Vec<(Name, Reply<Option<LockRow>>)>) {
        if looks.len() < 2 {
            for (name, reply) in looks {
                self.on_row(&name, OnRow::Look(reply)).await;
            }
            return;
        }
        looks.sort_by(|(one, _), (other, _)| one.cmp(other));
        let mut names: Vec<Name> = looks.iter().map(|(name, _)| name.clone()).collect();
        names.dedup();
        let rows = self
            .on_connection(STATEMENT_LIMIT, async |c, server| DB::look_all(c, server, &names).await)
            .await;
        let rows = rows.map(|rows| names.iter().zip(rows).collect::<HashMap<_, _>>());
        for (name, reply) in looks {
            let row = match &rows {
                Ok(rows) => Ok(rows.get(&name).cloned().flatten()),
                Err(failure) => Err(failure.another()),
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
            Operation::Call(call) => self.call(&[call]).await,
            Operation::TakeBaton(row, reply) => {
                let answer = self
                    .on_table(STATEMENT_LIMIT, STATEMENT_LIMIT, async |c, server| {
                        DB::take_baton(c, server, row).await
                    })
                    .await;
                if let Err(Ok(true)) = reply.send(answer) {
                    self.give_baton(row).await;
                }
            }
            Operation::GiveBaton(row) => self.give_baton(row).await,
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
                let call = answer.as_ref().ok().and_then(|released| released.call);
                let _ = reply.send(answer.map(|released| released.standing));
                self.call(call.as_slice()).await;
            }
            Operation::Release(Return { name, secret, .. }, at_least, reply) => {
                self.answer(reply, async |c, server| {
                    DB::release_later(c, server, &name, &secret, at_least).await
                })
                .await;
            }
            Operation::Migrate(reply) => {
                // What takes long has no limit by which a connection that was dropped would be noticed.
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
                    // Whatever it locked goes with the connection.
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
            OnRow::Look(reply) => {
                self.answer(reply, async |c, server| DB::look(c, server, name).await).await;
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
            OnRow::Stand(place, reply) => {
                self.answer(reply, async |c, server| DB::stand(c, server, name, &place).await).await;
            }
            OnRow::SetWaiters(before, after, reply) => {
                self.answer(reply, async |c, server| DB::set_waiters(c, server, name, &before, &after).await)
                    .await;
            }
            OnRow::RemoveWaiter(secret, reply) => {
                self.answer(reply, async |c, server| DB::remove_waiter(c, server, name, &secret).await).await;
            }
        }
    }

    async fn on_rows(&mut self, names: &[Name], operation: OnRows) {
        match operation {
            OnRows::Look(reply) => {
                self.answer(reply, async |c, server| DB::look_all(c, server, names).await).await;
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

    /// An answer that nobody waits for any more is dropped.
    async fn answer<T>(
        &mut self,
        reply: Reply<T>,
        operation: impl AsyncFnOnce(&mut DB::Connection, &Server) -> sqlx::Result<T>,
    ) {
        let answer = self.on_connection(STATEMENT_LIMIT, operation).await;
        let _ = reply.send(answer);
    }

    /// After what freed the rows: nothing depends on it.
    async fn call(&mut self, calls: &[Call]) {
        if calls.is_empty() || self.connection.is_none() {
            return;
        }
        let called = self
            .on_bare_connection(STATEMENT_LIMIT, SILENCE, async |c| {
                DB::call(c, calls).await.map_err(Failure::new::<DB>)
            })
            .await;
        if let Err(failure) = called {
            tracing::debug!(error = %failure, "the next process was not woken up: it looks by itself");
        }
    }

    /// Without a connection it is not ours any more.
    async fn give_baton(&mut self, row: i64) {
        if self.connection.is_some() {
            let _gone_else = self
                .on_connection(STATEMENT_LIMIT, async |c, server| DB::give_baton(c, server, row).await)
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

/// Takes them all or none.
async fn acquire_all<DB: LockDatabase>(
    connection: &mut DB::Connection,
    server: &Server,
    claims: &[Claim],
) -> sqlx::Result<Option<Vec<Grant>>> {
    if let [claim] = claims {
        return Ok(DB::acquire(connection, server, claim).await?.map(|grant| vec![grant]));
    }
    let grants = DB::acquire_all(connection, server, claims).await?;
    let (mut all, mut undone) = (Vec::with_capacity(claims.len()), Vec::new());
    for (grant, Claim { name, secret, .. }) in grants.into_iter().zip(claims) {
        if let Some(grant) = grant {
            all.push(grant);
            undone.push(Return { name: name.clone(), secret: secret.clone(), place: None });
        }
    }
    if all.len() == claims.len() {
        return Ok(Some(all));
    }
    if !undone.is_empty() {
        // What a trigger keeps one of them from. Without an answer they may be ours.
        let given_back = DB::exchange(connection, server, &undone, &[]).await;
        given_back.map_err(|error| sqlx::Error::Io(std::io::Error::other(error)))?;
    }
    Ok(None)
}

/// Looks for them, and remembers what was found: statements go by that.
async fn old_snapshots<DB: LockDatabase>(
    connection: &mut DB::Connection,
    server: &Server,
) -> sqlx::Result<OldSnapshots> {
    let seen = DB::old_snapshots(connection, server).await?;
    server.table.set_old_versions(seen.found.is_some());
    Ok(seen)
}
