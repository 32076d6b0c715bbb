//! A lane: one private connection and the requests that wait for it.
//!
//! The connection belongs to a task of its own, so a caller who gives up never leaves a statement cut in half: it is
//! carried out, and its result is discarded. Requests that wait together are taken together, and those of them that
//! take and give back leases travel in one statement.

mod connection;
mod connector;
mod earlier;
mod server;

use std::cell::Cell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Pool;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::timeout_at;

use self::connector::WaitsForHook;
use self::server::Worker;
use super::calls::Calls;
use crate::Kind;
use crate::database::{
    Call, Claim, Cluster, Grant, LeaseKey, Location, LockDatabase, LockRow, OldSnapshots, Place, Probe,
    Renewal, Renewed, Return, Server, Standing,
};
use crate::error::Failure;
use crate::name::Name;
use crate::secret::Secret;

/// How long a server may take for one statement, connecting included. Then the connection is given up.
const STATEMENT_LIMIT: Duration = Duration::from_secs(5);
/// Migrations wait for other processes that migrate.
const MIGRATION_LIMIT: Duration = Duration::from_mins(2);
/// How many names are looked at in one statement, so that others come in between.
const TOGETHER: usize = 1000;
/// The leases, if all were free; what kind of server granted them; and when the statement was sent, from where on their TTL
/// counts.
type Acquired = (Option<Vec<Grant>>, Server, Instant);

type Reply<T> = oneshot::Sender<Result<T, Failure>>;

enum Operation {
    Acquire(Vec<Claim>, Rc<Cell<bool>>, Reply<Acquired>),
    Connect(Duration, Reply<()>),
    Locate(bool, Reply<Server>),
    OnRow(Name, OnRow),
    OnRows(Vec<Name>, OnRows),
    Mark(LeaseKey, Reply<bool>),
    Listen(Reply<()>),
    Call(Call),
    TakeBaton(i64, Reply<bool>),
    GiveBaton(i64),
    Renew(Vec<Renewal>, Duration, Reply<(Renewed, Instant)>),
    Release(Return, Duration, Reply<Standing>),
    Migrate(Reply<()>),
    Check(Reply<Vec<String>>),
    OldSnapshots(Reply<OldSnapshots>),
}

/// What is asked about one row, or done to it, in a statement of its own.
enum OnRow {
    Look(Reply<Option<LockRow>>),
    Create(Kind, Reply<bool>),
    Settle(Reply<bool>),
    Probe(Reply<Probe>),
    Stand(Place, Reply<bool>),
    SetWaiters(String, String, Reply<bool>),
    RemoveWaiter(Secret, Reply<()>),
}

/// The same for several rows.
enum OnRows {
    Look(Reply<Vec<Option<LockRow>>>),
    Create(Kind, Reply<bool>),
    GiveNotice(Reply<u64>),
    Unlocked(Reply<HashSet<String>>),
}

impl OnRows {
    fn is_forgotten(&self) -> bool {
        match self {
            Self::Look(reply) => reply.is_closed(),
            Self::Create(_, reply) => reply.is_closed(),
            Self::GiveNotice(reply) => reply.is_closed(),
            Self::Unlocked(reply) => reply.is_closed(),
        }
    }
}

impl OnRow {
    fn is_forgotten(&self) -> bool {
        match self {
            Self::Look(reply) => reply.is_closed(),
            Self::Probe(reply) => reply.is_closed(),
            Self::Create(_, reply)
            | Self::Settle(reply)
            | Self::Stand(_, reply)
            | Self::SetWaiters(_, _, reply) => reply.is_closed(),
            Self::RemoveWaiter(..) => false,
        }
    }
}

impl Operation {
    /// Whether nobody waits for the answer any more. A release is carried out all the same.
    fn is_forgotten(&self) -> bool {
        match self {
            Self::Acquire(_, _, reply) => reply.is_closed(),
            Self::Locate(_, reply) => reply.is_closed(),
            Self::OnRow(_, operation) => operation.is_forgotten(),
            Self::OnRows(_, operation) => operation.is_forgotten(),
            Self::TakeBaton(_, reply) | Self::Mark(_, reply) => reply.is_closed(),
            Self::Connect(_, reply) | Self::Listen(reply) => reply.is_closed(),
            Self::Check(reply) => reply.is_closed(),
            Self::OldSnapshots(reply) => reply.is_closed(),
            Self::Renew(_, _, reply) => reply.is_closed(),
            Self::Release(..) | Self::GiveBaton(_) | Self::Call(_) | Self::Migrate(_) => false,
        }
    }
}

/// The way to a lane. Its connection is closed when this is dropped.
#[derive(Debug)]
pub(super) struct Lane {
    operations: mpsc::UnboundedSender<Operation>,
    /// When the server last answered anything.
    answered: Rc<Cell<Option<Instant>>>,
    waits_for_hook: WaitsForHook,
    no_answer: fn(&WaitsForHook, Duration) -> Failure,
    has_batons: bool,
    notices_loss: bool,
    location: Arc<Location>,
}

impl Lane {
    /// Starts a lane on the current `LocalSet`. It connects when it is first needed.
    /// With `may_listen` it is where the database calls. `lost` is notified when a connection was lost.
    pub(super) fn start<DB: LockDatabase>(
        application: Pool<DB>,
        location: &Arc<Location>,
        calls: &Rc<Calls>,
        may_listen: bool,
        lost: &Rc<Notify>,
    ) -> Self {
        let (operations, queue) = mpsc::unbounded_channel();
        let answered = Rc::default();
        let waits_for_hook = WaitsForHook::default();
        let worker = Worker::new(application, location, &answered, calls, may_listen, lost, &waits_for_hook);
        tokio::task::spawn_local(worker.serve(queue));
        Self {
            operations,
            answered,
            waits_for_hook,
            no_answer: connector::no_answer::<DB>,
            has_batons: DB::BATONS,
            notices_loss: DB::CALLS && may_listen,
            location: Arc::clone(location),
        }
    }

    /// Whether a connection would tell when it is lost, and there has been none yet.
    pub(super) fn could_notice_loss(&self) -> bool {
        self.notices_loss && self.answered.get().is_none()
    }

    /// A failure for a wait that ends while the server owes an answer.
    pub(super) fn no_answer(&self, waited: Duration) -> Failure {
        (self.no_answer)(&self.waits_for_hook, waited)
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

    /// Makes the connection, if that was not done yet, in `limit` at most.
    pub(super) async fn connect(&self, limit: Duration) -> Result<(), Failure> {
        self.ask(limit, |reply| Operation::Connect(limit, reply)).await
    }

    /// Finds the table, if that was not done yet, or `anew`.
    pub(super) async fn locate(&self, anew: bool) -> Result<Server, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::Locate(anew, reply)).await
    }

    pub(super) async fn look(&self, name: &Name) -> Result<Option<LockRow>, Failure> {
        self.on_row(name, OnRow::Look).await
    }

    /// `false`: an open transaction has made the row.
    pub(super) async fn create(&self, name: &Name, kind: Kind) -> Result<bool, Failure> {
        self.on_row(name, |reply| OnRow::Create(kind, reply)).await
    }

    /// `look` for several names, in order.
    pub(super) async fn look_all(&self, names: &[Name]) -> Result<Vec<Option<LockRow>>, Failure> {
        let mut rows = Vec::with_capacity(names.len());
        for names in names.chunks(TOGETHER) {
            rows.extend(self.on_rows(names, OnRows::Look).await?);
        }
        Ok(rows)
    }

    /// `create` for several names. Answers one whose row an open transaction has made.
    pub(super) async fn create_all(&self, names: &[Name], kind: Kind) -> Result<Option<Name>, Failure> {
        for names in names.chunks(TOGETHER) {
            let create = async |names| self.on_rows(names, |reply| OnRows::Create(kind, reply)).await;
            while !create(names).await? {
                // Which one it is shows where the names are fewer.
                let mut kept = names;
                while kept.len() > 1 {
                    let (first, others) = kept.split_at(kept.len() / 2);
                    kept = if create(first).await? { others } else { first };
                }
                if let [name] = kept
                    && !create(kept).await?
                {
                    return Ok(Some(name.clone()));
                }
            }
        }
        Ok(None)
    }

    /// Gives notice to the holders of leases that have run out. Answers how many of them were told.
    pub(super) async fn give_notice(&self, names: &[Name]) -> Result<u64, Failure> {
        let mut given = 0;
        for names in names.chunks(TOGETHER) {
            given += self.on_rows(names, OnRows::GiveNotice).await?;
        }
        Ok(given)
    }

    /// Those of several names whose rows no other transaction has locked.
    pub(super) async fn unlocked(&self, names: &[Name]) -> Result<HashSet<String>, Failure> {
        let mut unlocked = HashSet::with_capacity(names.len());
        for names in names.chunks(TOGETHER) {
            unlocked.extend(self.on_rows(names, OnRows::Unlocked).await?);
        }
        Ok(unlocked)
    }

    /// Makes sure that nothing of the last holder of a free lock can be committed any more.
    pub(super) async fn settle(&self, name: &Name) -> Result<bool, Failure> {
        self.on_row(name, OnRow::Settle).await
    }

    /// Whether another transaction has the row locked.
    pub(super) async fn probe(&self, name: &Name) -> Result<Probe, Failure> {
        self.on_row(name, OnRow::Probe).await
    }

    /// Makes the row tell that its lease went from hand to hand.
    pub(super) async fn mark(&self, lease: LeaseKey) -> Result<bool, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::Mark(lease, reply)).await
    }

    /// Takes a place at the end of the queue of a name.
    pub(super) async fn stand(&self, name: &Name, place: Place) -> Result<bool, Failure> {
        self.on_row(name, |reply| OnRow::Stand(place, reply)).await
    }

    /// Writes the queue of a name, if it is still the one that was read.
    pub(super) async fn set_waiters(
        &self,
        name: &Name,
        before: &str,
        after: String,
    ) -> Result<bool, Failure> {
        self.on_row(name, |reply| OnRow::SetWaiters(before.to_owned(), after, reply)).await
    }

    /// Leaves the queue of a name.
    pub(super) async fn remove_waiter(&self, name: &Name, secret: &Secret) -> Result<(), Failure> {
        self.on_row(name, |reply| OnRow::RemoveWaiter(secret.clone(), reply)).await
    }

    /// Makes sure that the database can call, if it ever does.
    pub(super) async fn listen(&self) -> Result<(), Failure> {
        self.ask(STATEMENT_LIMIT, Operation::Listen).await
    }

    /// Wakes up a process that waits for a row. Without an answer: it would look by itself.
    pub(super) fn call(&self, call: Call) {
        let _lane_may_be_gone = self.operations.send(Operation::Call(call));
    }

    /// Of the server that answered last.
    pub(super) fn cluster(&self) -> Cluster {
        self.location.found().map_or(Cluster::SinglePrimary, |server| server.cluster)
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
    ) -> Result<(Renewed, Instant), Failure> {
        self.ask(limit, |reply| Operation::Renew(leases, limit, reply)).await
    }

    /// With `at_least` others get the lock when so much time has passed since it was granted, if it has not yet.
    ///
    /// What travels with others may be `Busy` also when another process writes into the row that very moment.
    pub(super) async fn release(&self, lease: Return, at_least: Duration) -> Result<Standing, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::Release(lease, at_least, reply)).await
    }

    pub(super) async fn migrate(&self) -> Result<(), Failure> {
        self.ask(MIGRATION_LIMIT, Operation::Migrate).await
    }

    /// Finds the table anew, and answers what could be better.
    pub(super) async fn check(&self) -> Result<Vec<String>, Failure> {
        self.ask(STATEMENT_LIMIT, Operation::Check).await
    }

    pub(super) async fn old_snapshots(&self) -> Result<OldSnapshots, Failure> {
        self.ask(STATEMENT_LIMIT, Operation::OldSnapshots).await
    }

    async fn on_row<T>(&self, name: &Name, operation: impl FnOnce(Reply<T>) -> OnRow) -> Result<T, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::OnRow(name.clone(), operation(reply))).await
    }

    async fn on_rows<T>(
        &self,
        names: &[Name],
        operation: impl FnOnce(Reply<T>) -> OnRows,
    ) -> Result<T, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::OnRows(names.to_vec(), operation(reply))).await
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
                Ok(Err(_lane_is_gone)) => return Err((self.no_answer)(&self.waits_for_hook, limit)),
                Err(_elapsed) => match self.answered.get() {
                    Some(answered) if answered > since => since = answered,
                    _ => return Err((self.no_answer)(&self.waits_for_hook, limit)),
                },
            }
        }
    }
}
