//! A lane: one private connection and the requests that wait for it.
//!
//! The connection belongs to a task of its own, so a caller who gives up never leaves a statement cut in half: it is
//! carried out, and its answer falls on the floor. Requests that wait together are taken together, and those of them that
//! take and give back leases travel in one statement.

mod server;

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Pool;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout_at;

use self::server::Server;
use super::calls::Calls;
use crate::Kind;
use crate::database::{self, Claim, Cluster, Grant, LockDatabase, LockRow, Place, Renewal, Return, Standing};
use crate::error::Failure;
use crate::secret::Secret;

/// How long a server may take for one statement, connecting included. Then the connection is given up.
const STATEMENT_LIMIT: Duration = Duration::from_secs(5);
/// Migrations wait for other processes that migrate.
const MIGRATION_LIMIT: Duration = Duration::from_mins(2);
/// The leases, if all were free; what kind of server granted them; and when the statement was sent, from where on their TTL
/// counts.
type Acquired = (Option<Vec<Grant>>, Cluster, Instant);

type Reply<T> = oneshot::Sender<Result<T, Failure>>;

enum Operation {
    Acquire(Vec<Claim>, Rc<Cell<bool>>, Reply<Acquired>),
    Look(Arc<str>, Reply<Option<LockRow>>),
    Create(Arc<str>, Kind, Reply<()>),
    Stand(Arc<str>, Place, Reply<bool>),
    SetWaiters(Arc<str>, String, String, Reply<bool>),
    RemoveWaiter(Arc<str>, Secret, Reply<()>),
    Listen(Reply<()>),
    TakeBaton(i64, Reply<bool>),
    GiveBaton(i64),
    Renew(Vec<Renewal>, Duration, Reply<(Vec<Standing>, Instant)>),
    /// `true`: in a statement of its own.
    Release(Return, Duration, bool, Reply<Standing>),
    Migrate(Reply<()>),
    CheckSchema(Reply<()>),
}

impl Operation {
    /// Whether nobody waits for the answer any more. A release is carried out all the same.
    fn is_forgotten(&self) -> bool {
        match self {
            Self::Acquire(_, _, reply) => reply.is_closed(),
            Self::Look(_, reply) => reply.is_closed(),
            Self::Stand(_, _, reply) | Self::SetWaiters(_, _, _, reply) | Self::TakeBaton(_, reply) => {
                reply.is_closed()
            }
            Self::Create(_, _, reply) | Self::CheckSchema(reply) | Self::Listen(reply) => reply.is_closed(),
            Self::Renew(_, _, reply) => reply.is_closed(),
            Self::Release(..) | Self::RemoveWaiter(..) | Self::GiveBaton(_) | Self::Migrate(_) => false,
        }
    }
}

/// The way to a lane. Its connection is closed when this is dropped.
#[derive(Debug)]
pub(super) struct Lane {
    operations: mpsc::UnboundedSender<Operation>,
    /// When the server last answered anything.
    answered: Rc<Cell<Option<Instant>>>,
    no_answer: fn(Duration) -> Failure,
    has_batons: bool,
    kind: Rc<Cell<database::Server>>,
}

impl Lane {
    /// Starts a lane on the current `LocalSet`. It connects when it is first needed.
    /// With `may_listen` it is where the database calls.
    pub(super) fn start<DB: LockDatabase>(pool: Pool<DB>, calls: &Rc<Calls>, may_listen: bool) -> Self {
        let (operations, queue) = mpsc::unbounded_channel();
        let answered = Rc::default();
        let kind = Rc::default();
        let server = Server::new(pool, &kind, &answered, calls, may_listen);
        tokio::task::spawn_local(server.serve(queue));
        Self { operations, answered, no_answer: Failure::no_answer::<DB>, has_batons: DB::BATONS, kind }
    }

    /// Takes leases if they are free, all or none. `begun` tells whether the server may have heard of it, also when the
    /// future is dropped.
    pub(super) async fn acquire(
        &self,
        claims: Vec<Claim>,
        begun: &Rc<Cell<bool>>,
    ) -> Result<Acquired, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::Acquire(claims, Rc::clone(begun), reply)).await
    }

    pub(super) async fn look(&self, name: &Arc<str>) -> Result<Option<LockRow>, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::Look(Arc::clone(name), reply)).await
    }

    pub(super) async fn create(&self, name: &Arc<str>, kind: Kind) -> Result<(), Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::Create(Arc::clone(name), kind, reply)).await
    }

    /// Takes a place at the end of the queue of a name.
    pub(super) async fn stand(&self, name: &Arc<str>, place: Place) -> Result<bool, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::Stand(Arc::clone(name), place, reply)).await
    }

    /// Writes the queue of a name, if it is still the one that was read.
    pub(super) async fn set_waiters(
        &self,
        name: &Arc<str>,
        before: &str,
        after: String,
    ) -> Result<bool, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| {
            Operation::SetWaiters(Arc::clone(name), before.to_owned(), after, reply)
        })
        .await
    }

    /// Leaves the queue of a name.
    pub(super) async fn remove_waiter(&self, name: &Arc<str>, secret: &Secret) -> Result<(), Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::RemoveWaiter(Arc::clone(name), secret.clone(), reply))
            .await
    }

    /// Makes sure that the database can call, if it ever does.
    pub(super) async fn listen(&self) -> Result<(), Failure> {
        self.ask(STATEMENT_LIMIT, Operation::Listen).await
    }

    /// Of the server that answered last.
    pub(super) fn cluster(&self) -> Cluster {
        self.kind.get().cluster
    }

    /// Not on a cluster, where a user lock reaches the clients of one node only.
    pub(super) fn has_batons(&self) -> bool {
        self.has_batons && self.cluster() == Cluster::SinglePrimary
    }

    /// Waits for the baton of a row, and keeps everything else waiting meanwhile: a second at most.
    pub(super) async fn take_baton(&self, row: i64) -> Result<bool, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::TakeBaton(row, reply)).await
    }

    /// Gives it to the next one. Without an answer: when the connection is gone, the baton is, too.
    pub(super) fn give_baton(&self, row: i64) {
        let _lane_may_be_gone = self.operations.send(Operation::GiveBaton(row));
    }

    /// Renews leases, in `limit` at most. Also answers when the statement was sent.
    pub(super) async fn renew(
        &self,
        leases: Vec<Renewal>,
        limit: Duration,
    ) -> Result<(Vec<Standing>, Instant), Failure> {
        self.ask(limit, |reply| Operation::Renew(leases, limit, reply)).await
    }

    /// With `at_least` others get the lock when so much time has passed since it was granted, if it has not yet.
    ///
    /// What travels with others is `Busy` also while a transaction is open that the lease guards, or when somebody writes into
    /// the row that very moment; `alone` it is not.
    pub(super) async fn release(
        &self,
        lease: Return,
        at_least: Duration,
        alone: bool,
    ) -> Result<Standing, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::Release(lease, at_least, alone, reply)).await
    }

    pub(super) async fn migrate(&self) -> Result<(), Failure> {
        self.ask(MIGRATION_LIMIT, Operation::Migrate).await
    }

    pub(super) async fn check_schema(&self) -> Result<(), Failure> {
        self.ask(STATEMENT_LIMIT, Operation::CheckSchema).await
    }

    /// The request is in the queue when the future is first polled; requests of one lane are carried out in order.
    /// The limit is one of silence, counted from here: a long queue before a server that answers is carried out to its end,
    /// and who stands in a long queue before a silent one waits no longer than the first.
    async fn ask<T>(
        &self,
        limit: Duration,
        operation: impl FnOnce(Reply<T>) -> Operation,
    ) -> Result<T, Failure> {
        let (reply, mut replied) = oneshot::channel();
        let _lane_may_be_gone = self.operations.send(operation(reply));
        let mut since = Instant::now();
        loop {
            match timeout_at((since + limit).into(), &mut replied).await {
                Ok(Ok(answer)) => return answer,
                Ok(Err(_lane_is_gone)) => return Err((self.no_answer)(limit)),
                Err(_elapsed) => match self.answered.get() {
                    Some(answered) if answered > since => since = answered,
                    _ => return Err((self.no_answer)(limit)),
                },
            }
        }
    }
}
