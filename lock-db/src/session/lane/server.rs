//! The end of a lane that has the connection.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::{Connection as _, Pool};
use tokio::select;
use tokio::sync::{Notify, mpsc};
use tokio::task::spawn_local;
use tokio::time::{sleep, sleep_until, timeout};

use super::connector::{CONNECT_LIMIT, Connector, WaitsForHook, no_answer};
use super::earlier::{Earlier, any_number};
use super::{Acquired, MIGRATION_LIMIT, OnRow, OnRows, Operation, Reply, STATEMENT_LIMIT};
use crate::database::{
    Call, Claim, Fault, Found, Grant, Location, LockDatabase, LockRow, OldSnapshots, Return, Server, Standing,
};
use crate::error::Failure;
use crate::jitter::jitter;
use crate::name::Name;
use crate::session::calls::Calls;

/// How long nothing listens after a server did not answer: a connection that is left alone in a network that is dead takes
/// long to end.
const DEAF_FOR: Duration = Duration::from_mins(5);
/// How long a connection that has answered before may be silent before a second one is made. Less than the time for a first answer.
const SILENCE: Duration = Duration::from_millis(700);
/// Or so many times what answers, and connections, have taken lately.
const PACES: u32 = 8;
/// How long a connection may take to end.
const CLOSE_LIMIT: Duration = Duration::from_secs(1);
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
    connector: Connector<DB>,
    connection: Option<Private<DB>>,
    location: Arc<Location>,
    answered: Rc<Cell<Option<Instant>>>,
    calls: Rc<Calls>,
    may_listen: bool,
    deaf_until: Option<Instant>,
    /// How long answers take, lately.
    pace: Duration,
    earlier: Earlier,
    lost: Rc<Notify>,
}

/// A connection, and what it has found out.
struct Private<DB: LockDatabase> {
    way: Way<DB>,
    server: Option<Server>,
    /// When it is to be closed, by the pool's `max_lifetime`.
    retires: Option<Instant>,
    used: Instant,
}

/// A connection, which may listen.
pub(super) enum Way<DB: LockDatabase> {
    Plain(DB::Connection),
    Listening(DB::Listening),
}

impl<DB: LockDatabase> Way<DB> {
    async fn connection(&mut self) -> sqlx::Result<&mut DB::Connection> {
        match self {
            Self::Plain(connection) => Ok(connection),
            Self::Listening(listening) => DB::listening_connection(listening).await,
        }
    }
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

    /// Passes on what the database calls. Never resolves where it doesn't call, and may be dropped at any time.
    async fn called(&mut self) {
        let Some(Private { way: Way::Listening(listening), .. }) = &mut self.connection else {
            return std::future::pending().await;
        };
        match DB::called(listening).await {
            Ok(id) => self.calls.ring(id),
            Err(_gone) => self.give_up_connection(),
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

    /// By the pool's `max_lifetime`, or by its `idle_timeout`, unless others may call.
    fn retires_at(&self) -> Option<Instant> {
        let Private { retires, used, .. } = self.connection.as_ref()?;
        let is_awaited = self.may_listen && self.calls.waits();
        let idle = self.connector.idle_timeout().filter(|_| !is_awaited);
        let idle = idle.and_then(|timeout| used.checked_add(timeout));
        retires.iter().copied().chain(idle).min()
    }

    /// Closes a connection that has become as old as those of the pool may, or with which the pool's options may have changed since. The
    /// next operation makes another one; until it listens again, those who wait look.
    fn retire(&mut self) {
        let Some(Private { way, .. }) = self.connection.take() else { return };
        self.earlier.is_closed();
        if matches!(way, Way::Listening(_)) {
            self.calls.end();
        }
        close(way);
    }

    fn give_up_connection(&mut self) {
        if self.connection.take().is_some() {
            self.calls.end();
            self.lost.notify_one();
        }
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
                    let OldSnapshots { found, unseen } = DB::old_snapshots(c, server).await?;
                    warnings.extend(found.into_iter().chain(unseen));
                    Ok(warnings)
                })
                .await;
            }
            Operation::OldSnapshots(reply) => {
                self.answer(reply, async |c, server| DB::old_snapshots(c, server).await).await;
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

    /// Runs one operation on the table.
    async fn on_connection<T>(
        &mut self,
        limit: Duration,
        operation: impl AsyncFnOnce(&mut DB::Connection, &Server) -> sqlx::Result<T>,
    ) -> Result<T, Failure> {
        self.on_table(limit, SILENCE, operation).await
    }

    /// The same for one that waits on the server.
    async fn on_table<T>(
        &mut self,
        limit: Duration,
        silence: Duration,
        operation: impl AsyncFnOnce(&mut DB::Connection, &Server) -> sqlx::Result<T>,
    ) -> Result<T, Failure> {
        let known = self.connection.as_ref().and_then(|connection| connection.server.clone());
        let location = Arc::clone(&self.location);
        let answer = self
            .on_bare_connection(limit, silence, async move |connection| {
                let server = match known {
                    Some(server) => server,
                    None => find_table::<DB>(connection, &location).await?,
                };
                match operation(connection, &server).await.map_err(Failure::new::<DB>) {
                    Err(failure) if failure.fault == Fault::Disconnected => Err(failure),
                    Err(failure) if DB::lacks_right(&failure.source) => {
                        let checked = DB::check(connection, &server).await.map_err(Failure::new::<DB>);
                        Ok((server, Err(checked.err().unwrap_or(failure))))
                    }
                    answer => Ok((server, answer)),
                }
            })
            .await;
        let (server, answer) = answer?;
        if let Some(connection) = &mut self.connection {
            // A table that was changed or dropped is found anew.
            let is_other = matches!(&answer, Err(failure) if failure.is_about_table());
            connection.server = (!is_other).then_some(server);
        }
        answer
    }

    /// Runs one operation, and gives the connection up when it is broken or does not answer in time.
    ///
    /// One that is silent for longer than `silence` may have been dropped while it was idle, by a network that tells nobody. So a second one
    /// is made; when the server knows of no work on the first, that one counts as broken, and the next attempt has the second at hand.
    async fn on_bare_connection<T>(
        &mut self,
        limit: Duration,
        silence: Duration,
        operation: impl AsyncFnOnce(&mut DB::Connection) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let asked = Instant::now();
        let deadline = asked + limit;
        let kept = self.connection.take();
        let may_be_dropped = DB::IS_REMOTE && kept.is_some();
        let mut connection = if let Some(connection) = kept {
            connection
        } else {
            let limit = limit.min(CONNECT_LIMIT);
            match timeout(limit, self.connect()).await {
                Ok(made) => made?,
                Err(_elapsed) => return Err(self.is_silent(limit)),
            }
        };
        let silence = if may_be_dropped { silence.max(PACES * self.pace) } else { limit };
        let listening = self.is_to_listen();
        let Self { earlier, connector, .. } = self;
        let known = earlier.current();
        let running = async {
            let used = connection.way.connection().await.map_err(Failure::new::<DB>)?;
            if earlier.is_some() && !earlier.end::<DB>(used).await.map_err(Failure::new::<DB>)? {
                return Ok(Err(Failure::session_remains::<DB>()));
            }
            match operation(used).await {
                Err(failure) if failure.fault == Fault::Disconnected => Err(failure),
                result => Ok(result),
            }
        };
        let second = async {
            sleep(silence).await;
            match known {
                Some(known) => in_place_of(connector, listening, known).await,
                None => std::future::pending().await,
            }
        };
        let outcome = select! {
            biased;
            result = running => Outcome::Answer(result),
            (way, number) = second, if silence < limit => Outcome::Second(way, number),
            () = sleep_until(deadline.into()) => Outcome::Silence,
        };
        match outcome {
            Outcome::Answer(Ok(result)) => {
                let now = Instant::now();
                if silence < limit {
                    self.pace = now.duration_since(asked).max(self.pace * 7 / 8);
                }
                connection.used = now;
                self.connection = Some(connection);
                self.answered.set(Some(now));
                result
            }
            Outcome::Answer(Err(broken)) => {
                self.leaves(&connection);
                Err(broken)
            }
            Outcome::Second(way, number) => {
                tracing::debug!("a private connection was dropped without a word: another one is used");
                self.leaves(&connection);
                self.earlier.goes_on_with(number);
                // If it was only far away, more time is left the next time.
                self.pace = self.pace.max(asked.elapsed() / 4);
                self.connection = Some(self.private(way));
                Err(Failure::new::<DB>(sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into())))
            }
            Outcome::Silence => {
                self.leaves(&connection);
                Err(self.is_silent(limit))
            }
        }
    }

    /// A connection that is broken or silent.
    fn leaves(&mut self, connection: &Private<DB>) {
        self.earlier.is_given_up();
        if matches!(connection.way, Way::Listening(_)) {
            self.calls.end();
        }
        self.lost.notify_one();
    }

    fn is_silent(&mut self, limit: Duration) -> Failure {
        self.deaf_until = Some(Instant::now() + DEAF_FOR);
        no_answer::<DB>(self.connector.waits_for_hook(), limit)
    }

    async fn connect(&mut self) -> Result<Private<DB>, Failure> {
        let asked = Instant::now();
        let mut way = self.connector.make(self.is_to_listen()).await?;
        let prepared = async { DB::prepare(way.connection().await?, self.earlier.next()).await };
        prepared.await.map_err(Failure::new::<DB>)?;
        self.pace = self.pace.max(asked.elapsed() / 4);
        Ok(self.private(way))
    }

    fn is_to_listen(&self) -> bool {
        DB::CALLS && self.may_listen && self.deaf_until.is_none_or(|until| until <= Instant::now())
    }

    fn private(&self, way: Way<DB>) -> Private<DB> {
        // Not all of a process at once, and none later than the pool's own would be.
        let age = |lifetime: Duration| lifetime.mul_f64(0.8) + jitter(lifetime / 5);
        let retires =
            self.connector.lifetime().and_then(|lifetime| Instant::now().checked_add(age(lifetime)));
        Private { way, server: None, retires, used: Instant::now() }
    }
}

/// What became of an operation.
enum Outcome<DB: LockDatabase, T> {
    /// `Err`: the connection is broken.
    Answer(Result<Result<T, Failure>, Failure>),
    /// The connection was dropped, and this one is there, with the number of its session.
    Second(Way<DB>, i64),
    Silence,
}

/// Another connection, if the server knows of no work on the first: work there is waited for.
async fn in_place_of<DB: LockDatabase>(
    connector: &mut Connector<DB>,
    listening: bool,
    first: i64,
) -> (Way<DB>, i64) {
    let number = any_number();
    if let Ok(mut way) = connector.make(listening).await {
        let is_idle = async {
            let connection = way.connection().await?;
            DB::prepare(connection, number).await?;
            DB::is_idle(connection, first, number).await
        };
        if is_idle.await.unwrap_or(false) {
            return (way, number);
        }
        close(way);
    }
    std::future::pending().await
}

/// Aside.
fn close<DB: LockDatabase>(way: Way<DB>) {
    if let Way::Plain(connection) = way {
        drop(spawn_local(async move {
            let _in_time = timeout(CLOSE_LIMIT, connection.close()).await;
        }));
    }
}

async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}

async fn find_table<DB: LockDatabase>(
    connection: &mut DB::Connection,
    location: &Location,
) -> Result<Server, Failure> {
    match DB::find_table(connection, location.schema().as_deref()).await.map_err(Failure::new::<DB>)? {
        Found::Table(server) => Ok(location.set(server)),
        Found::Nothing => Err(Failure::table_missing::<DB>()),
        Found::Differs(column) => Err(Failure::table_differs::<DB>(column)),
        Found::Unusable(reason) => Err(Failure::unusable_table::<DB>(reason)),
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
