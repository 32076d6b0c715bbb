//! A connection worker: one private connection, and the requests that wait for it.
//!
//! The connection belongs to its own task, so a caller that gives up never interrupts a statement:
//! the statement is carried out and its result is discarded. Requests that wait together are taken
//! together. Those that acquire or release leases are sent as a batch, in one statement.

mod batch;
mod connector;
mod earlier;
mod flush;
mod groups;
mod life;
mod operations;
mod worker;

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Pool;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::timeout_at;

use self::connector::WaitsForHook;
use self::flush::{Flush, Flusher};
use self::worker::WorkerLoop;
use super::vitals::Vitals;
use super::wakeup::notify::Notifications;
use crate::database::Failure;
use crate::database::{
    Claim, Cluster, Grant, LeaseKey, LeaseStatus, ListPage, Location, LockDatabase, LockRow, Notification,
    OldSnapshots, Probe, PruneScope, QueueEntry, ReleaseClaim, Renewal, Renewed, Server, TablePart,
};
use crate::name::Name;
use crate::secret::Secret;
use crate::{CheckReport, Kind, RowHolder};

/// How long a server may take for one statement, connecting included. After that the connection is
/// given up.
const STATEMENT_LIMIT: Duration = Duration::from_secs(5);
/// A migration waits for the migrations of other processes.
const MIGRATION_LIMIT: Duration = Duration::from_mins(2);
/// How many names are read in one statement, so that other requests run in between.
const TOGETHER: usize = 1000;
/// Rows with their names, and the last name that was looked at if there may be more.
type ListedPart = (Vec<(String, LockRow)>, Option<String>);
/// The leases, if all were free; the kind of server that granted them; and when the statement was
/// sent, which is the start of their TTL.
type Acquired = (Option<Vec<Grant>>, Server, Instant);

type Reply<T> = oneshot::Sender<Result<T, Failure>>;

enum Operation {
    Acquire(Vec<Claim>, Rc<Cell<bool>>, Reply<Acquired>),
    Connect(Duration, Reply<()>),
    Locate(bool, Reply<Server>),
    OnRow(Name, OnRow),
    OnRows(Vec<Name>, OnRows),
    Mark(LeaseKey, Reply<bool>),
    Flush(Flush),
    Listen(Reply<()>),
    Notification(Notification),
    TakeUserLock(i64, Reply<bool>),
    ReleaseUserLock(i64),
    Renew(Vec<Renewal>, Duration, Reply<(Renewed, Instant)>),
    Release(ReleaseClaim, Duration, Reply<LeaseStatus>),
    Migrate(Reply<()>),
    Check(bool, Reply<CheckReport>),
    List(ListPage, Reply<ListedPart>),
    RowHolders(Vec<i64>, Reply<HashMap<i64, RowHolder>>),
    ForceRelease(Name, Box<LockRow>, Reply<bool>),
    OldSnapshots(Reply<OldSnapshots>),
    NextInLine(Vec<i64>, Secret, Reply<Vec<i64>>),
    ReadPart(PruneScope, i64, Reply<TablePart>),
    RemoveRows(PruneScope, Vec<i64>, Reply<u64>),
}

/// An operation on one row, in its own statement.
enum OnRow {
    Read(Reply<Option<LockRow>>),
    Create(Kind, Reply<bool>),
    Ensure(Kind, Reply<Option<LockRow>>),
    Settle(Reply<()>),
    Probe(Reply<Probe>),
    Enqueue(QueueEntry, Reply<bool>),
    SetWaiters(String, String, Reply<bool>),
    RemoveWaiter(Secret, Reply<()>),
}

/// An operation on several rows.
enum OnRows {
    Read(Reply<Vec<Option<LockRow>>>),
    Create(Kind, Reply<bool>),
    GiveNotice(Reply<u64>),
    Unlocked(Reply<HashSet<String>>),
}

impl OnRows {
    fn is_forgotten(&self) -> bool {
        match self {
            Self::Read(reply) => reply.is_closed(),
            Self::Create(_, reply) => reply.is_closed(),
            Self::GiveNotice(reply) => reply.is_closed(),
            Self::Unlocked(reply) => reply.is_closed(),
        }
    }
}

impl OnRow {
    fn is_forgotten(&self) -> bool {
        match self {
            Self::Read(reply) | Self::Ensure(_, reply) => reply.is_closed(),
            Self::Probe(reply) => reply.is_closed(),
            Self::Settle(reply) => reply.is_closed(),
            Self::Create(_, reply) | Self::Enqueue(_, reply) | Self::SetWaiters(_, _, reply) => {
                reply.is_closed()
            }
            Self::RemoveWaiter(..) => false,
        }
    }
}

impl Operation {
    /// Whether the caller has gone. A release is carried out in any case.
    fn is_forgotten(&self) -> bool {
        match self {
            Self::Acquire(_, _, reply) => reply.is_closed(),
            Self::Locate(_, reply) => reply.is_closed(),
            Self::OnRow(_, operation) => operation.is_forgotten(),
            Self::OnRows(_, operation) => operation.is_forgotten(),
            Self::TakeUserLock(_, reply) | Self::Mark(_, reply) | Self::ForceRelease(_, _, reply) => {
                reply.is_closed()
            }
            Self::Connect(_, reply) | Self::Listen(reply) => reply.is_closed(),
            Self::Flush(flush) => flush.is_forgotten(),
            Self::Check(_, reply) => reply.is_closed(),
            Self::List(_, reply) => reply.is_closed(),
            Self::RowHolders(_, reply) => reply.is_closed(),
            Self::ReadPart(_, _, reply) => reply.is_closed(),
            Self::RemoveRows(_, _, reply) => reply.is_closed(),
            Self::OldSnapshots(reply) => reply.is_closed(),
            Self::Renew(_, _, reply) => reply.is_closed(),
            Self::NextInLine(_, _, reply) => reply.is_closed(),
            Self::Release(..) | Self::ReleaseUserLock(_) | Self::Notification(_) | Self::Migrate(_) => false,
        }
    }
}

/// The handle of a connection worker. Its connection is closed when this is dropped.
#[derive(Debug)]
pub(super) struct Worker {
    operations: mpsc::UnboundedSender<Operation>,
    /// When the server last answered anything.
    answered: Rc<Cell<Option<Instant>>>,
    waits_for_hook: WaitsForHook,
    no_answer: fn(&WaitsForHook, Duration) -> Failure,
    has_user_locks: bool,
    notices_loss: bool,
    removed_at_once: usize,
    location: Arc<Location>,
}

impl Worker {
    /// Starts a connection worker on the current `LocalSet`. It connects when it is first needed.
    /// Without `flushed_by` it is the second one, which receives notifications and flushes what the
    /// first one commits. `lost` is notified when a connection is lost.
    pub(super) fn start<DB: LockDatabase>(
        application: Pool<DB>,
        location: &Arc<Location>,
        notifications: &Rc<Notifications>,
        flushed_by: Option<&Self>,
        (lost, vitals): (&Rc<Notify>, &Arc<Vitals>),
    ) -> Self {
        let may_listen = flushed_by.is_none();
        let flusher = flushed_by.map(|second| Flusher::new(second.operations.downgrade()));
        let (operations, queue) = mpsc::unbounded_channel();
        let answered = Rc::default();
        let waits_for_hook = WaitsForHook::default();
        let worker_loop = WorkerLoop::new(
            application,
            location,
            &answered,
            notifications,
            (lost, vitals),
            &waits_for_hook,
            flusher,
        );
        tokio::task::spawn_local(worker_loop.serve(queue));
        Self {
            operations,
            answered,
            waits_for_hook,
            no_answer: connector::no_answer::<DB>,
            has_user_locks: DB::USER_LOCKS,
            notices_loss: DB::NOTIFIES && may_listen,
            removed_at_once: DB::REMOVED_AT_ONCE,
            location: Arc::clone(location),
        }
    }

    /// Whether a connection would notice that it is lost, and there has been none yet.
    pub(super) fn could_notice_loss(&self) -> bool {
        self.notices_loss && self.answered.get().is_none()
    }

    /// The failure for a wait that ends before the server has answered.
    pub(super) fn no_answer(&self, waited: Duration) -> Failure {
        (self.no_answer)(&self.waits_for_hook, waited)
    }

    /// Takes leases if they are free, all or none. `begun` tells whether the server may have
    /// received the statement, even if the future is dropped.
    pub(super) async fn acquire(
        &self,
        claims: Vec<Claim>,
        begun: &Rc<Cell<bool>>,
    ) -> Result<Acquired, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::Acquire(claims, Rc::clone(begun), reply)).await
    }

    /// Opens the connection unless it is open, within `limit`.
    pub(super) async fn connect(&self, limit: Duration) -> Result<(), Failure> {
        self.ask(limit, |reply| Operation::Connect(limit, reply)).await
    }

    /// Locates the table if it is not known yet, or in any case with `anew`.
    pub(super) async fn locate(&self, anew: bool) -> Result<Server, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::Locate(anew, reply)).await
    }

    pub(super) async fn read(&self, name: &Name) -> Result<Option<LockRow>, Failure> {
        self.on_row(name, OnRow::Read).await
    }

    /// `false`: an open transaction has created the row.
    pub(super) async fn create(&self, name: &Name, kind: Kind) -> Result<bool, Failure> {
        self.on_row(name, |reply| OnRow::Create(kind, reply)).await
    }

    /// Reads the row, and creates it if it is missing. `None`: an open transaction has created it.
    pub(super) async fn ensure(&self, name: &Name, kind: Kind) -> Result<Option<LockRow>, Failure> {
        self.on_row(name, |reply| OnRow::Ensure(kind, reply)).await
    }

    /// `read` for several names, in order.
    pub(super) async fn read_all(&self, names: &[Name]) -> Result<Vec<Option<LockRow>>, Failure> {
        let mut rows = Vec::with_capacity(names.len());
        for names in names.chunks(TOGETHER) {
            rows.extend(self.on_rows(names, OnRows::Read).await?);
        }
        Ok(rows)
    }

    /// `create` for several names. Returns one whose row an open transaction has created, if there
    /// is any.
    pub(super) async fn create_all(&self, names: &[Name], kind: Kind) -> Result<Option<Name>, Failure> {
        for names in names.chunks(TOGETHER) {
            let create = async |names| self.on_rows(names, |reply| OnRows::Create(kind, reply)).await;
            while !create(names).await? {
                // Find out which name it is by bisection.
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

    /// Gives notice to the holders of leases that have expired. Returns how many were notified.
    pub(super) async fn give_notice(&self, names: &[Name]) -> Result<u64, Failure> {
        let mut given = 0;
        for names in names.chunks(TOGETHER) {
            given += self.on_rows(names, OnRows::GiveNotice).await?;
        }
        Ok(given)
    }

    /// Returns those of several names whose rows no other transaction has locked.
    pub(super) async fn unlocked(&self, names: &[Name]) -> Result<HashSet<String>, Failure> {
        let mut unlocked = HashSet::with_capacity(names.len());
        for names in names.chunks(TOGETHER) {
            unlocked.extend(self.on_rows(names, OnRows::Unlocked).await?);
        }
        Ok(unlocked)
    }

    /// Returns the ids of those rows whose lock is free, and whose queue begins with the entry of
    /// this secret.
    pub(super) async fn next_in_line(&self, ids: &[i64], secret: &Secret) -> Result<Vec<i64>, Failure> {
        let mut free = Vec::new();
        for ids in ids.chunks(TOGETHER) {
            let ask = |reply| Operation::NextInLine(ids.to_vec(), secret.clone(), reply);
            free.extend(self.ask(STATEMENT_LIMIT, ask).await?);
        }
        Ok(free)
    }

    /// Makes sure that nothing of the last holder of a free lock can be committed any more, unless
    /// its row is locked.
    pub(super) async fn settle(&self, name: &Name) -> Result<(), Failure> {
        self.on_row(name, OnRow::Settle).await
    }

    /// Whether another transaction has the row locked.
    pub(super) async fn probe(&self, name: &Name) -> Result<Probe, Failure> {
        self.on_row(name, OnRow::Probe).await
    }

    /// Writes into the row that its lease was handed on.
    pub(super) async fn mark(&self, lease: LeaseKey) -> Result<bool, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::Mark(lease, reply)).await
    }

    /// Adds an entry at the end of the queue of a name, or extends the one that is there.
    pub(super) async fn enqueue(&self, name: &Name, entry: QueueEntry) -> Result<bool, Failure> {
        self.on_row(name, |reply| OnRow::Enqueue(entry, reply)).await
    }

    /// Writes the queue of a name, unless it has changed since it was read.
    pub(super) async fn set_waiters(
        &self,
        name: &Name,
        before: &str,
        after: String,
    ) -> Result<bool, Failure> {
        self.on_row(name, |reply| OnRow::SetWaiters(before.to_owned(), after, reply)).await
    }

    /// Removes an entry from the queue of a name.
    pub(super) async fn dequeue(&self, name: &Name, secret: &Secret) -> Result<(), Failure> {
        self.on_row(name, |reply| OnRow::RemoveWaiter(secret.clone(), reply)).await
    }

    /// Makes sure that the connection listens for notifications, on databases that have them.
    pub(super) async fn listen(&self) -> Result<(), Failure> {
        self.ask(STATEMENT_LIMIT, Operation::Listen).await
    }

    /// Wakes up a process that waits for a row. The result is not awaited: without the notification
    /// the process polls.
    pub(super) fn notify(&self, notification: Notification) {
        let _worker_may_be_gone = self.operations.send(Operation::Notification(notification));
    }

    /// The cluster of the server that answered last.
    pub(super) fn cluster(&self) -> Cluster {
        self.location.found().map_or(Cluster::SinglePrimary, |server| server.cluster)
    }

    /// Whether user locks can be used. On a cluster they can't: a user lock is known to the clients
    /// of one node only.
    pub(super) fn has_user_locks(&self) -> bool {
        self.has_user_locks && self.cluster() == Cluster::SinglePrimary
    }

    /// Waits for the user lock of a row, for one second at most. Everything else on this connection
    /// waits meanwhile.
    pub(super) async fn take_user_lock(&self, row: i64) -> Result<bool, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::TakeUserLock(row, reply)).await
    }

    /// Releases the user lock to the next waiter. The result is not awaited: if the connection is
    /// gone, so is the user lock.
    pub(super) fn release_user_lock(&self, row: i64) {
        let _worker_may_be_gone = self.operations.send(Operation::ReleaseUserLock(row));
    }

    /// Renews leases, within `limit`. Also returns when the statement was sent.
    pub(super) async fn renew(
        &self,
        leases: Vec<Renewal>,
        limit: Duration,
    ) -> Result<(Renewed, Instant), Failure> {
        self.ask(limit, |reply| Operation::Renew(leases, limit, reply)).await
    }

    /// Releases a lease. With `at_least` others get the lock only when that time has passed since
    /// the grant.
    ///
    /// A release in a batch may also be `Busy` because another process is writing into the row at
    /// that moment.
    pub(super) async fn release(
        &self,
        lease: ReleaseClaim,
        at_least: Duration,
    ) -> Result<LeaseStatus, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::Release(lease, at_least, reply)).await
    }

    pub(super) async fn migrate(&self) -> Result<(), Failure> {
        self.ask(MIGRATION_LIMIT, Operation::Migrate).await
    }

    /// Returns a page of locks with their whole names, and the end of the part of the table that was
    /// read.
    pub(super) async fn list(&self, page: ListPage) -> Result<ListedPart, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::List(page, reply)).await
    }

    /// Returns who has these rows of row locks locked. Ids that are missing in the result are not
    /// locked.
    pub(super) async fn row_holders(&self, ids: Vec<i64>) -> Result<HashMap<i64, RowHolder>, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::RowHolders(ids, reply)).await
    }

    /// Frees the lease of a row, if it has not changed since it was read.
    pub(super) async fn force_release(&self, name: &Name, row: LockRow) -> Result<bool, Failure> {
        let release = |reply| Operation::ForceRelease(name.clone(), Box::new(row), reply);
        self.ask(STATEMENT_LIMIT, release).await
    }

    /// Locates the table again, and reports on it and its server. With `prunes` also if rows can't be
    /// deleted.
    pub(super) async fn check(&self, prunes: bool) -> Result<CheckReport, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::Check(prunes, reply)).await
    }

    pub(super) async fn old_snapshots(&self) -> Result<OldSnapshots, Failure> {
        self.ask(STATEMENT_LIMIT, Operation::OldSnapshots).await
    }

    /// Reads the rows behind this id, and which of them may be removed.
    pub(super) async fn read_part(&self, scope: PruneScope, after: i64) -> Result<TablePart, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::ReadPart(scope, after, reply)).await
    }

    /// Removes those of these rows that are still unused.
    pub(super) async fn remove_rows(&self, scope: PruneScope, ids: Vec<i64>) -> Result<u64, Failure> {
        self.ask(STATEMENT_LIMIT, |reply| Operation::RemoveRows(scope, ids, reply)).await
    }

    /// How many rows one statement removes at most.
    pub(super) fn removed_at_once(&self) -> usize {
        self.removed_at_once
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

    /// Sends an operation to the worker and waits for the answer. The request is queued when the
    /// future is first polled, and the requests of one worker are carried out in order.
    ///
    /// The limit is one of silence, counted from here. A long queue for a server that answers is
    /// carried out to its end. In a long queue for a silent server, the last request waits no
    /// longer than the first.
    async fn ask<T>(
        &self,
        limit: Duration,
        operation: impl FnOnce(Reply<T>) -> Operation,
    ) -> Result<T, Failure> {
        let (reply, mut replied) = oneshot::channel();
        let _worker_may_be_gone = self.operations.send(operation(reply));
        let mut since = Instant::now();
        loop {
            match timeout_at((since + limit).into(), &mut replied).await {
                Ok(Ok(answer)) => return answer,
                Ok(Err(_worker_is_gone)) => return Err((self.no_answer)(&self.waits_for_hook, limit)),
                Err(_elapsed) => match self.answered.get() {
                    Some(answered) if answered > since => since = answered,
                    _ => return Err((self.no_answer)(&self.waits_for_hook, limit)),
                },
            }
        }
    }
}
