//! The end of a lane that has the connection.

use std::cell::Cell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::{Connection, Pool};
use tokio::select;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::{Acquired, MIGRATION_LIMIT, Operation, Reply, STATEMENT_LIMIT};
use crate::database::{self, Claim, Fault, Grant, LockDatabase, Return, Standing};
use crate::error::Failure;
use crate::session::calls::Calls;

/// How long nothing listens after a server did not answer: a connection that is left alone in a network that is dead takes
/// long to end.
const DEAF_FOR: Duration = Duration::from_mins(5);
/// How many requests are taken from the queue at once.
const ROUND: usize = 256;

/// What of a round can travel in one statement: each name once.
#[derive(Default)]
struct Exchange {
    returns: Vec<(Return, Reply<Standing>)>,
    claims: Vec<(Claim, Rc<Cell<bool>>, Reply<Acquired>)>,
    names: HashSet<Arc<str>>,
}

impl Exchange {
    /// Answers what does not belong here.
    fn take(&mut self, operation: Operation) -> Option<Operation> {
        match operation {
            Operation::Release(one, at_least, alone, reply) => {
                // Also when it goes alone: what comes for the name after it goes after it.
                let is_first = self.names.insert(Arc::clone(&one.name));
                if alone || !is_first || !at_least.is_zero() {
                    return Some(Operation::Release(one, at_least, alone, reply));
                }
                self.returns.push((one, reply));
                None
            }
            Operation::Acquire(mut claims, begun, reply)
                if claims.len() == 1 && self.names.insert(Arc::clone(&claims[0].name)) =>
            {
                self.claims.extend(claims.pop().map(|claim| (claim, begun, reply)));
                None
            }
            other => Some(other),
        }
    }
}

pub(super) struct Server<DB: LockDatabase> {
    /// Only makes connections, with the options and hooks of the application's pool. None is ever returned to it.
    pool: Pool<DB>,
    connection: Option<Private<DB>>,
    /// Where the connection leads to.
    kind: Rc<Cell<database::Server>>,
    answered: Rc<Cell<Option<Instant>>>,
    calls: Rc<Calls>,
    may_listen: bool,
    deaf_until: Option<Instant>,
}

/// A connection, which may listen.
enum Private<DB: LockDatabase> {
    Plain(DB::Connection),
    Listening(DB::Listening),
}

impl<DB: LockDatabase> Private<DB> {
    async fn connection(&mut self) -> sqlx::Result<&mut DB::Connection> {
        match self {
            Self::Plain(connection) => Ok(connection),
            Self::Listening(listening) => DB::listening_connection(listening).await,
        }
    }
}

impl<DB: LockDatabase> Server<DB> {
    pub(super) fn new(
        pool: Pool<DB>,
        kind: &Rc<Cell<database::Server>>,
        answered: &Rc<Cell<Option<Instant>>>,
        calls: &Rc<Calls>,
        may_listen: bool,
    ) -> Self {
        Self {
            pool,
            connection: None,
            kind: Rc::clone(kind),
            answered: Rc::clone(answered),
            calls: Rc::clone(calls),
            may_listen,
            deaf_until: None,
        }
    }

    pub(super) async fn serve(mut self, mut queue: mpsc::UnboundedReceiver<Operation>) {
        let mut round = Vec::with_capacity(ROUND);
        loop {
            select! {
                biased;
                count = queue.recv_many(&mut round, ROUND) => if count == 0 { break },
                () = self.called() => continue,
            }
            let mut exchange = Exchange::default();
            let mut others = Vec::new();
            for operation in round.drain(..) {
                if !operation.is_forgotten() {
                    others.extend(exchange.take(operation));
                }
            }
            self.exchange(exchange).await;
            for operation in others {
                if !operation.is_forgotten() {
                    self.carry_out(operation).await;
                }
            }
        }
        if let Some(Private::Plain(connection)) = self.connection {
            let _in_time = timeout(Duration::from_secs(1), connection.close()).await;
        }
    }

    /// Passes on what the database calls. Ends never where it doesn't call, and may be dropped at any time.
    async fn called(&mut self) {
        let Some(Private::Listening(listening)) = &mut self.connection else {
            return std::future::pending().await;
        };
        match DB::called(listening).await {
            Ok(id) => self.calls.ring(id),
            Err(_gone) => self.give_up_connection(),
        }
    }

    /// On the connection that renews leases, which is never given up for it.
    async fn listen(&mut self) -> sqlx::Result<()> {
        if self.calls.listener() != 0 {
            return Ok(());
        }
        if self.connection.is_none() {
            self.connection = Some(self.connect().await?);
        }
        if let Some(Private::Listening(listening)) = &mut self.connection {
            DB::listen(listening, self.calls.number()).await?;
            self.calls.begin();
        }
        Ok(())
    }

    fn give_up_connection(&mut self) {
        if self.connection.take().is_some() {
            self.calls.end();
        }
    }

    /// All of it in one statement. When the database refuses that, one by one, so that only those whose fault it is fail.
    async fn exchange(&mut self, exchange: Exchange) {
        let Exchange { returns, claims, .. } = exchange;
        if returns.len() + claims.len() > 1 {
            let given_back: Vec<Return> = returns.iter().map(|(one, _)| one.clone()).collect();
            let claimed: Vec<Claim> = claims.iter().map(|(claim, ..)| claim.clone()).collect();
            for (_, begun, _) in &claims {
                begun.set(true);
            }
            let kind = Rc::clone(&self.kind);
            let answer = self
                .on_connection(STATEMENT_LIMIT, async |connection| {
                    let sent = Instant::now();
                    Ok((DB::exchange(connection, kind.get(), &given_back, &claimed).await?, sent))
                })
                .await;
            match answer {
                Ok((exchanged, sent)) => {
                    for ((_, reply), standing) in returns.into_iter().zip(exchanged.returns) {
                        let _ = reply.send(Ok(standing));
                    }
                    for ((_, _, reply), grant) in claims.into_iter().zip(exchanged.grants) {
                        let _ =
                            reply.send(Ok((grant.map(|grant| vec![grant]), self.kind.get().cluster, sent)));
                    }
                    return;
                }
                Err(failure) if failure.fault == Fault::Disconnected => {
                    for (_, reply) in returns {
                        let _ = reply.send(Err(failure.another::<DB>()));
                    }
                    for (_, _, reply) in claims {
                        let _ = reply.send(Err(failure.another::<DB>()));
                    }
                    return;
                }
                Err(refused) => tracing::debug!(error = %refused.source, "one by one instead"),
            }
        }
        let returns =
            returns.into_iter().map(|(one, reply)| Operation::Release(one, Duration::ZERO, true, reply));
        let claims =
            claims.into_iter().map(|(claim, begun, reply)| Operation::Acquire(vec![claim], begun, reply));
        for operation in returns.chain(claims) {
            self.carry_out(operation).await;
        }
    }

    async fn carry_out(&mut self, operation: Operation) {
        match operation {
            Operation::Acquire(claims, begun, reply) => {
                begun.set(true);
                let kind = Rc::clone(&self.kind);
                let answer = self
                    .on_connection(STATEMENT_LIMIT, async |connection| {
                        let sent = Instant::now();
                        Ok((acquire_all::<DB>(connection, kind.get(), &claims).await?, sent))
                    })
                    .await;
                let cluster = self.kind.get().cluster;
                let _ = reply.send(answer.map(|(grant, sent)| (grant, cluster, sent)));
            }
            Operation::Look(name, reply) => self.answer(reply, async |c| DB::look(c, &name).await).await,
            Operation::Create(name, kind, reply) => {
                self.answer(reply, async |c| DB::create(c, &name, kind).await).await;
            }
            Operation::Listen(reply) => {
                let answer = match timeout(STATEMENT_LIMIT, self.listen()).await {
                    Ok(listening) => listening.map_err(Failure::new::<DB>),
                    Err(_elapsed) => {
                        self.deaf_until = Some(Instant::now() + DEAF_FOR);
                        Err(Failure::no_answer::<DB>(STATEMENT_LIMIT))
                    }
                };
                if matches!(answer, Err(Failure { fault: Fault::Disconnected, .. })) {
                    self.give_up_connection();
                }
                let _ = reply.send(answer);
            }
            Operation::TakeBaton(row, reply) => {
                let answer =
                    self.on_connection(STATEMENT_LIMIT, async |c| DB::take_baton(c, row).await).await;
                if let Err(Ok(true)) = reply.send(answer) {
                    self.give_baton(row).await;
                }
            }
            Operation::GiveBaton(row) => self.give_baton(row).await,
            Operation::Stand(name, place, reply) => {
                self.answer(reply, async |c| DB::stand(c, &name, &place).await).await;
            }
            Operation::SetWaiters(name, before, after, reply) => {
                self.answer(reply, async |c| DB::set_waiters(c, &name, &before, &after).await).await;
            }
            Operation::RemoveWaiter(name, secret, reply) => {
                self.answer(reply, async |c| DB::remove_waiter(c, &name, &secret).await).await;
            }
            Operation::Renew(leases, limit, reply) => {
                let answer = self
                    .on_connection(limit, async |connection| {
                        let sent = Instant::now();
                        Ok((DB::renew(connection, &leases).await?, sent))
                    })
                    .await;
                let _ = reply.send(answer);
            }
            Operation::Release(lease, at_least, _, reply) if at_least.is_zero() => {
                let kind = Rc::clone(&self.kind);
                self.answer(reply, async |c| DB::release(c, kind.get(), &lease).await).await;
            }
            Operation::Release(Return { name, secret, .. }, at_least, _, reply) => {
                self.answer(reply, async |c| DB::release_later(c, &name, &secret, at_least).await).await;
            }
            Operation::Migrate(reply) => {
                let answer = self.on_connection(MIGRATION_LIMIT, async |c| DB::migrate(c).await).await;
                if answer.is_err() {
                    // Whatever it locked goes with the connection.
                    self.connection = None;
                }
                let _ = reply.send(answer);
            }
            Operation::CheckSchema(reply) => {
                let checked = self.on_connection(STATEMENT_LIMIT, async |c| DB::check_schema(c).await).await;
                let answer = checked.and_then(|wrong| match wrong {
                    None => Ok(()),
                    Some(wrong) => Err(Failure::unfit_table::<DB>(wrong)),
                });
                let _ = reply.send(answer);
            }
        }
    }

    /// An answer that nobody waits for any more is dropped.
    async fn answer<T>(
        &mut self,
        reply: Reply<T>,
        operation: impl AsyncFnOnce(&mut DB::Connection) -> sqlx::Result<T>,
    ) {
        let answer = self.on_connection(STATEMENT_LIMIT, operation).await;
        let _ = reply.send(answer);
    }

    /// Without a connection it is not ours any more.
    async fn give_baton(&mut self, row: i64) {
        if self.connection.is_some() {
            let _gone_else =
                self.on_connection(STATEMENT_LIMIT, async |c| DB::give_baton(c, row).await).await;
        }
    }

    /// Runs one operation, and gives the connection up when it is broken or does not answer in time.
    async fn on_connection<T>(
        &mut self,
        limit: Duration,
        operation: impl AsyncFnOnce(&mut DB::Connection) -> sqlx::Result<T>,
    ) -> Result<T, Failure> {
        let kept = self.connection.take();
        let listened = matches!(kept, Some(Private::Listening(_)));
        let running = async {
            let mut connection = match kept {
                Some(connection) => connection,
                None => self.connect().await?,
            };
            let result = operation(connection.connection().await?).await.map_err(Failure::new::<DB>);
            Ok((connection, result))
        };
        let result = match timeout(limit, running).await {
            Ok(Ok((connection, result))) => {
                if !matches!(result, Err(Failure { fault: Fault::Disconnected, .. })) {
                    self.connection = Some(connection);
                    self.answered.set(Some(Instant::now()));
                }
                result
            }
            Ok(Err(not_connected)) => Err(Failure::new::<DB>(not_connected)),
            Err(_elapsed) => {
                self.deaf_until = Some(Instant::now() + DEAF_FOR);
                Err(Failure::no_answer::<DB>(limit))
            }
        };
        if listened && self.connection.is_none() {
            self.calls.end();
        }
        result
    }

    async fn connect(&mut self) -> sqlx::Result<Private<DB>> {
        let is_deaf = self.deaf_until.is_some_and(|until| Instant::now() < until);
        let mut connection = if DB::CALLS && self.may_listen && !is_deaf {
            Private::Listening(DB::connect_listening(&self.pool).await?)
        } else {
            Private::Plain(self.pool.acquire().await?.detach())
        };
        self.kind.set(DB::prepare(connection.connection().await?).await?);
        Ok(connection)
    }
}

/// Takes them all or none: one statement, or one transaction for several.
async fn acquire_all<DB: LockDatabase>(
    connection: &mut DB::Connection,
    kind: database::Server,
    claims: &[Claim],
) -> sqlx::Result<Option<Vec<Grant>>> {
    if let [claim] = claims {
        return Ok(DB::acquire(connection, kind, claim).await?.map(|grant| vec![grant]));
    }
    let grants = acquire_in_transaction::<DB>(connection, kind, claims).await?;
    DB::after_short(connection).await?;
    Ok(grants)
}

async fn acquire_in_transaction<DB: LockDatabase>(
    connection: &mut DB::Connection,
    kind: database::Server,
    claims: &[Claim],
) -> sqlx::Result<Option<Vec<Grant>>> {
    let mut transaction = connection.begin_with(DB::BEGIN_SHORT).await?;
    let mut grants = Vec::with_capacity(claims.len());
    for claim in claims {
        let Some(grant) = DB::acquire(&mut transaction, kind, claim).await? else {
            transaction.rollback().await?;
            return Ok(None);
        };
        grants.push(grant);
    }
    transaction.commit().await?;
    Ok(Some(grants))
}
