//! The actor of a session: its thread, its state, and the dispatch of requests.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Pool;
use tokio::runtime::Builder;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{sleep, timeout};

use super::connection::Worker;
use super::deadline_timer::DeadlineTimer;
use super::hold_watch::{self, HoldWatch};
use super::lease_state::LeaseState;
use super::local_queue::{LocalQueues, Permit, Reports};
use super::request::Request;
use super::snapshot_watch::{self, SnapshotWatch};
use super::task_tracker::TaskTracker;
use super::wakeup::notify::Notifications;
use super::wakeup::user_lock::{self, UserLock};
use super::{Way, acquire, release, renewal};
use crate::database::Failure;
use crate::database::{
    Cluster, Fault, LeaseKey, Location, LockDatabase, LockRow, QueueEntry, Renewal, reliable_without_notice,
};
use crate::error::Action;
use crate::error::{Loss, lost_how};
use crate::hold_warning::HoldWarning;
use crate::name::Name;
use crate::options::HandOff;
use crate::secret::Secret;
use crate::session::LeaseHandle;
use crate::{Error, Kind};

/// How long an idle thread waits for the next connection to make.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// How long running requests may take after all senders are gone.
const FINISH_LIMIT: Duration = Duration::from_secs(10);
/// How long a read is retried while another transaction blocks it, and the pause between attempts.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(20);
/// A read that took this long was blocked on the server, so it is not retried.
const A_WAIT: Duration = Duration::from_secs(1);
/// How long the session tries to mark a row. An open transaction of the caller waits for it.
const MARK_PATIENCE: Duration = Duration::from_secs(1);
/// How long the report of a loss waits for what has become of the lock.
const READ_LIMIT: Duration = Duration::from_millis(100);
/// The end of a transaction that has released a lease is noticed within this time.
const READ_AFTER: Duration = Duration::from_millis(100);
/// The shortest time between two renewals of a lease whose row another transaction has locked.
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
/// A lease that is held for this long needs the second connection ready.
const IS_HELD_ON: Duration = Duration::from_secs(1);
/// The part of the TTL that a holder relies on. It gives up a little before the database does.
const RELIABLE: (u32, u32) = (9, 10);

/// Starts the thread. It ends after `Close`, or when the sender and all its clones are gone.
pub(super) fn start<DB: LockDatabase>(
    application: &Pool<DB>,
    location: &Arc<Location>,
    hand_off: HandOff,
    owner: &Arc<str>,
    watched: &HoldWatch,
) -> Result<Way, Error> {
    DB::check_options(&application.connect_options(), location.schema().as_deref())?;
    let application = application.clone();
    let (sender, requests) = mpsc::unbounded_channel();
    let weak = sender.downgrade();
    let reports = Reports { owner: Arc::clone(owner), no_answer: Failure::no_answer::<DB> };
    let queues = LocalQueues::new(weak.clone(), hand_off, Secret::generate()?, reports);
    let (location, watched) = (Arc::clone(location), watched.clone());
    let way = Way { requests: sender, queues: Arc::clone(&queues) };
    let runtime = Builder::new_current_thread()
        .enable_all()
        // Connections are made on these threads.
        .thread_name("lock-db")
        .thread_keep_alive(KEEP_ALIVE)
        .build()
        .map_err(no_thread)?;
    std::thread::Builder::new()
        .name("lock-db".into())
        .spawn(move || {
            let local = LocalSet::new();
            runtime.block_on(async {
                local
                    .run_until(async move {
                        let actor = Actor::new(application, &location, weak, queues);
                        serve(&actor, requests, watched).await;
                    })
                    .await;
                let _in_time = timeout(FINISH_LIMIT, local).await;
            });
            // A hook of the application may block a thread forever.
            runtime.shutdown_background();
        })
        .map_err(no_thread)?;
    Ok(way)
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn no_thread(error: std::io::Error) -> Error {
    Error::other(Action::StartSession, None, false, error.to_string())
}

/// Answers requests until all senders are gone or the session is closed. Each request is its own
/// task.
async fn serve(actor: &Rc<Actor>, mut requests: mpsc::UnboundedReceiver<Request>, watched: HoldWatch) {
    spawn_local(renewal::renew(Rc::clone(actor)));
    spawn_local(renewal::watch_deadlines(Rc::clone(actor)));
    spawn_local(snapshot_watch::watch(Rc::clone(actor)));
    spawn_local(renewal::watch_connections(Rc::clone(actor)));
    spawn_local(hold_watch::watch(Rc::clone(actor), watched));
    let queues = Arc::clone(&actor.queues);
    let watching = spawn_local(async move { queues.watch_waits().await });
    while let Some(request) = requests.recv().await {
        let actor = Rc::clone(actor);
        match request {
            Request::Acquire(request) => {
                let busy = actor.tasks.enter();
                drop(spawn_local(async move {
                    acquire::acquire(actor, request).await;
                    drop(busy);
                }));
            }
            Request::Release { lease, answer } => {
                let busy = actor.tasks.enter();
                let given_up = release::give_up(&actor, &lease);
                drop(spawn_local(async move {
                    let released = release::release(&actor, &lease, given_up, answer.is_some()).await;
                    match (answer, released) {
                        (Some(answer), released) => drop(answer.send(released)),
                        // The loss was reported when it was noticed.
                        (None, Ok(()) | Err(Error::Lost { .. } | Error::Closed)) => {}
                        (None, Err(error)) => {
                            tracing::warn!(lock = %lease.name(), error = %error.report(), "a dropped lock could not be released");
                        }
                    }
                    drop(busy);
                }));
            }
            Request::ReleasedIn { lease } => actor.read_after(lease.number),
            Request::Released { lease, call } => {
                actor.lose(lease.number, Loss::Released);
                if let Some(call) = call {
                    actor.worker.call(call);
                }
            }
            Request::Lost { lease } => actor.is_taken_over(&lease),
            Request::HandedOn { until } => actor.over.no_later_than(until),
            Request::Locate { anew, answer } => drop(spawn_local(async move {
                let found = twice(async || actor.worker.locate(anew).await).await;
                let _ = answer.send(found.map_err(|failure| failure.into_error(Action::FindTable, None)));
            })),
            Request::Settle { name, answer } => drop(spawn_local(async move {
                let settled = actor.settle(&name).await;
                let _ =
                    answer.send(settled.map_err(|failure| failure.into_error(Action::TakeOver, Some(&name))));
            })),
            Request::Mark { lease, answer } => drop(spawn_local(async move {
                let _ = answer.send(actor.mark(lease).await);
            })),
            Request::EnsureRow { name, kind, answer } => drop(spawn_local(async move {
                let _ = answer.send(actor.ensure_row(&name, kind).await);
            })),
            Request::Read { name, answer } => drop(spawn_local(async move {
                let row = patiently(async || actor.worker.read(&name).await).await;
                let _ = answer.send(row.map_err(|failure| failure.into_error(Action::ReadRow, Some(&name))));
            })),
            Request::Migrate { answer } => drop(spawn_local(async move {
                // On a cluster other nodes migrate at the same time. Conflicts with their
                // migrations are temporary.
                let migrated = patiently(async || actor.worker.migrate().await).await;
                let migrated = migrated.map_err(|failure| failure.into_error(Action::Migrate, None));
                // The ledger of migrations is not enough: the table itself has to fit.
                let _ = answer.send(match migrated {
                    Ok(()) => actor.fits().await,
                    failed => failed,
                });
            })),
            Request::Answer(answer) => {
                let _caller_may_be_gone = answer.send(());
            }
            Request::Check { answer } => drop(spawn_local(async move {
                let _ = answer.send(actor.check().await);
            })),
            Request::Close { done } => {
                actor.closing.send_replace(true);
                actor.queues.close();
                release::release_all(&actor);
                // This includes guards that were dropped before, and leases that attempts may have
                // got while they were ending.
                let _in_time = timeout(FINISH_LIMIT, actor.tasks.nobody()).await;
                drop(done);
                break;
            }
        }
    }
    actor.closing.send_replace(true);
    watching.abort();
}

/// The state of a session. All of it lives on its own thread.
pub(super) struct Actor {
    /// Serves what callers wait for.
    pub(super) worker: Worker,
    /// Renews leases, and receives notifications.
    pub(super) renewals: Worker,
    /// Notified when a private connection is lost. A different server may answer the next
    /// connection.
    pub(super) lost: Rc<Notify>,
    pub(super) not_written: fn() -> Failure,
    pub(super) notifications: Rc<Notifications>,
    pub(super) user_lock: UserLock,
    pub(super) is_renewing: Cell<bool>,
    /// Whether the renewal connection was opened, or tried, ahead of the first renewal.
    pub(super) connects_ahead: Cell<bool>,
    /// Why the last renewal failed, if it did.
    pub(super) not_renewed: RefCell<Option<String>>,
    misses_second: Cell<bool>,
    /// How long the last renewal took, and the start of the one in progress.
    pub(super) renewal_took: Cell<Duration>,
    pub(super) renewing_since: Cell<Option<Instant>>,
    pub(super) queues: Arc<LocalQueues>,
    /// How many attempts are in progress.
    pub(super) contenders: Cell<u32>,
    pub(super) leases: RefCell<HashMap<u64, HeldLease>>,
    last_number: Cell<u64>,
    /// For guards, which keep the session alive. Weak here, so that the session does not keep
    /// itself alive.
    requests: mpsc::WeakUnboundedSender<Request>,
    /// Wake-ups for the next renewal, and for the next lease that ends.
    pub(super) due: DeadlineTimer,
    pub(super) over: DeadlineTimer,
    pub(super) closing: watch::Sender<bool>,
    /// Tasks that may still have a lease to release.
    pub(super) tasks: TaskTracker,
    pub(super) snapshot_watch: SnapshotWatch,
}

/// A lease that this process holds.
pub(super) struct HeldLease {
    pub(super) state: Arc<LeaseState>,
    pub(super) ttl: Duration,
    pub(super) deadline: Instant,
    pub(super) next_renewal: Instant,
    /// Whether other processes were in the queue when it was granted.
    pub(super) others_wait: bool,
    hold_warning: HoldWarning,
    lost: watch::Sender<Option<Loss>>,
}

impl Actor {
    fn new<DB: LockDatabase>(
        pool: Pool<DB>,
        location: &Arc<Location>,
        requests: mpsc::WeakUnboundedSender<Request>,
        queues: Arc<LocalQueues>,
    ) -> Rc<Self> {
        let (notifications, lost) = (Rc::new(Notifications::new()), Rc::default());
        Rc::new(Self {
            worker: Worker::start(pool.clone(), location, &notifications, false, &lost),
            renewals: Worker::start(pool, location, &notifications, true, &lost),
            lost,
            not_written: Failure::not_written::<DB>,
            notifications,
            user_lock: UserLock::default(),
            is_renewing: Cell::default(),
            connects_ahead: Cell::default(),
            not_renewed: RefCell::default(),
            misses_second: Cell::default(),
            renewal_took: Cell::default(),
            renewing_since: Cell::default(),
            queues,
            contenders: Cell::new(0),
            leases: RefCell::default(),
            last_number: Cell::new(0),
            requests,
            due: DeadlineTimer::default(),
            over: DeadlineTimer::default(),
            closing: watch::Sender::new(false),
            tasks: TaskTracker::default(),
            snapshot_watch: SnapshotWatch::default(),
        })
    }

    /// Resolves when the session ends.
    pub(super) async fn closed(&self) {
        let mut closing = self.closing.subscribe();
        let _ = closing.wait_for(|closing| *closing).await;
    }

    /// Registers a granted lease for renewal and makes its handle. `None`: all senders are gone, so
    /// the lease can have no holder.
    pub(super) fn hold(
        &self,
        granted: Granted,
        at_most: Option<Duration>,
        permit: Permit,
    ) -> Option<LeaseHandle> {
        let requests = self.requests.upgrade()?;
        let Granted { key, tokens, turns, others_wait, ttl, sent } = granted;
        self.snapshot_watch.granted();
        let number = self.last_number.get() + 1;
        self.last_number.set(number);
        let deadline = deadline(sent, ttl);
        let (state, lost) =
            LeaseState::new(number, key, (tokens, turns), ttl, at_most, deadline, Some(permit));
        let held = HeldLease {
            state: Arc::clone(&state),
            ttl,
            deadline,
            next_renewal: sent + ttl / 3,
            others_wait,
            hold_warning: HoldWarning::new(Instant::now()),
            lost,
        };
        self.due.no_later_than(held.next_renewal);
        self.over.no_later_than(held.ends());
        if self.may_connect_ahead() {
            self.due.no_later_than(held.is_held_on());
        }
        self.leases.borrow_mut().insert(number, held);
        self.queues.is_held(&state);
        Some(LeaseHandle::new(state, requests, Arc::clone(&self.queues)))
    }

    /// Ends a lease that is gone: its guard is told, and the next caller of this process gets the
    /// permit.
    pub(super) fn lose(&self, number: u64, loss: Loss) {
        if let Some(held) = self.end(number, loss) {
            user_lock::give(self, held.state.name());
        }
    }

    /// Like `lose`, but the permit stays in the returned lease.
    pub(super) fn end(&self, number: u64, loss: Loss) -> Option<HeldLease> {
        let ended = self.leases.borrow_mut().remove(&number);
        if let Some(held) = &ended {
            self.tell_operator(&held.state, loss);
            if loss == Loss::Released {
                // A caller that is told may take the lock again at once, so the permit is passed on
                // first.
                held.state.pass_permit();
            }
            held.lost.send_replace(Some(loss));
        }
        ended
    }

    /// Whether to open the renewal connection ahead of the first renewal. This is done once, and
    /// only where that connection notices by itself that the server is gone.
    pub(super) fn may_connect_ahead(&self) -> bool {
        !self.connects_ahead.get() && self.renewals.could_notice_loss()
    }

    /// How long the last renewal took, or how long the current one has taken so far, if that is
    /// longer.
    fn renewals_take(&self) -> Duration {
        let so_far = self.renewing_since.get().map(|since| since.elapsed()).unwrap_or_default();
        self.renewal_took.get().max(so_far)
    }

    /// Leases are renewed over the first connection, because the second one can't be opened or does
    /// not answer. Logged once.
    pub(super) fn misses_second(&self, failure: &Failure) {
        if !self.misses_second.replace(true) {
            tracing::warn!(
                error = %failure,
                "the connection for renewals can't be used: leases are renewed over the one for everything else"
            );
        }
    }

    pub(super) fn has_second(&self) {
        if self.misses_second.replace(false) {
            tracing::info!("leases are renewed over a connection of their own again");
        }
    }

    /// Logs the end of a lease, once for each lease, wherever the loss was noticed.
    pub(super) fn tell_operator(&self, lease: &LeaseState, loss: Loss) {
        let (lock, fencing_token) = (lease.name(), lease.last_fencing_token());
        if matches!(loss, Loss::Closed | Loss::Released) {
            tracing::debug!(%lock, fencing_token, "lock ended: {loss}");
            return;
        }
        let not_renewed = self.not_renewed.borrow();
        let error = not_renewed.as_deref().filter(|_| loss == Loss::NotRenewed);
        let (took, ttl) = (self.renewals_take(), lease.key.ttl);
        if loss == Loss::NotRenewed && error.is_none() && took > ttl / 3 {
            let why = "renewals take so long on this network: allow a longer `ttl`";
            tracing::warn!(%lock, fencing_token, ?took, ?ttl, "lock lost: {loss}; {why}");
            return;
        }
        let how = lost_how(loss, lease.taken_over_by());
        tracing::warn!(%lock, fencing_token, error, "lock lost: {how}");
    }

    /// Reads the row of a lease that is no longer ours, to find out what became of it. The report
    /// of the loss waits for that for `LOOK_LIMIT` at most.
    pub(super) async fn find_out(&self, lease: &LeaseState) -> Loss {
        let Ok(Ok(row)) = timeout(READ_LIMIT, self.worker.read(lease.name())).await else {
            return Loss::TakenOver;
        };
        let Some(row) = row else { return Loss::RowDeleted };
        if row.secret_key == lease.key.secret.as_str() {
            return if row.expires == 0 { Loss::ReleasedByHand } else { Loss::TakenOver };
        }
        if row.fencing_token > lease.key.fencing_token {
            lease.is_taken_over_by(Box::new(row.into_info(lease.name())));
        }
        Loss::TakenOver
    }

    /// The row of a lease is no longer ours. The lease counts as lost from now on. Its holder is
    /// told a moment later, with the reason that was found out.
    pub(super) fn is_taken_over(self: &Rc<Self>, lease: &Arc<LeaseState>) {
        if !lease.is_gone() {
            return;
        }
        let (actor, lease) = (Rc::clone(self), Arc::clone(lease));
        drop(spawn_local(async move {
            let loss = actor.find_out(&lease).await;
            actor.lose(lease.number, loss);
        }));
    }

    pub(super) fn shortest_ttl(&self) -> Option<Duration> {
        self.leases.borrow().values().map(|held| held.ttl).min()
    }

    pub(super) fn has_lease(&self, name: &str) -> bool {
        self.leases.borrow().values().any(|held| **held.state.name() == *name)
    }

    /// Starts to listen for notifications, in the background.
    pub(super) fn listen(self: &Rc<Self>) {
        if self.notifications.should_begin() {
            let actor = Rc::clone(self);
            drop(spawn_local(async move {
                if let Err(failure) = actor.renewals.listen().await {
                    tracing::debug!(error = %failure, "nothing calls when a lock is free");
                }
                actor.notifications.was_asked();
            }));
        }
    }

    /// The queue entry of this process, for the queue of any row.
    pub(super) fn queue_entry(&self) -> QueueEntry {
        QueueEntry {
            secret: self.queues.queue_secret().clone(),
            owner: self.queues.owner(),
            listener: self.notifications.listener(),
        }
    }

    /// The transaction that released a lease may have ended, so the watchdog renews it now.
    fn read_after(&self, number: u64) {
        if let Some(held) = self.leases.borrow_mut().get_mut(&number) {
            held.next_renewal = Instant::now();
            self.due.no_later_than(held.next_renewal);
        }
    }

    /// Returns the row, and whether it was missing.
    async fn ensure_row(&self, name: &Name, kind: Kind) -> Result<(LockRow, bool), Error> {
        let failed = |failure: Failure| failure.into_error(Action::MakeRow, Some(name));
        let (mut missing, mut in_the_way) = (false, None);
        loop {
            let row = patiently(async || self.worker.read(name).await).await.map_err(failed)?;
            if let Some(row) = row {
                if row.kind == kind {
                    return Ok((row, missing));
                }
                return Err(Error::WrongKind { name: name.given(), wanted: kind, found: row.kind });
            }
            if missing {
                // A transaction, perhaps the caller's own, has locked the place where the row
                // belongs, or the whole table.
                let stale = || Error::Serialization { name: name.given(), source: None };
                return Err(in_the_way.map_or_else(stale, failed));
            }
            missing = true;
            match twice(async || self.worker.create(name, kind).await).await {
                // Another process may be creating the row: the next read shows it.
                Err(failure) if failure.passes() => in_the_way = Some(failure),
                Err(failure) => return Err(failed(failure)),
                Ok(_) => {}
            }
        }
    }

    /// Makes sure that nothing of the last holder of a lock that is not held any more can be
    /// committed, unless a transaction of that holder is still open.
    async fn settle(&self, name: &Name) -> Result<(), Failure> {
        let Some(row) = twice(async || self.worker.read(name).await).await? else { return Ok(()) };
        if row.notice_is_due() && self.worker.give_notice(std::slice::from_ref(name)).await? > 0 {
            sleep(row.notice()).await;
            self.worker.settle(name).await?;
        } else if row.is_free() && !row.is_settled() {
            self.worker.settle(name).await?;
        }
        Ok(())
    }

    /// Tries again while other transactions have the row locked, such as guarded ones of the same
    /// lease.
    async fn mark(&self, lease: LeaseKey) -> Result<(), Error> {
        let name = lease.row.name.clone();
        let started = Instant::now();
        loop {
            let may_wait = started.elapsed() < MARK_PATIENCE;
            match twice(async || self.worker.mark(lease.clone()).await).await {
                Ok(false) if may_wait => {}
                Err(failure) if may_wait && failure.passes() => {}
                // The lease is not ours any more, or the row is locked for long. The guard of the
                // transaction finds out which.
                Ok(_) => return Ok(()),
                Err(failure) => return Err(failure.into_error(Action::Verify, Some(&name))),
            }
            sleep(PAUSE).await;
        }
    }

    /// Wakes up the next process after a transaction has released a lock.
    pub(super) fn notify_next(self: &Rc<Self>, name: &Name) {
        let (actor, name) = (Rc::clone(self), name.clone());
        drop(spawn_local(async move {
            if let Ok(Some(row)) = actor.worker.read(&name).await
                && row.is_free()
                && let Some(call) = row.first_waiter()
            {
                actor.worker.call(call);
            }
        }));
    }

    /// Checks that the table can be used. It needs no right that a role that only migrates lacks.
    async fn fits(&self) -> Result<(), Error> {
        let found = patiently(async || self.worker.locate(true).await).await;
        found.map(drop).map_err(|failure| failure.into_error(Action::FindTable, None))
    }

    async fn check(&self) -> Result<Vec<String>, Error> {
        let checked = patiently(async || self.worker.check().await).await;
        checked.map_err(|failure| failure.into_error(Action::Check, None))
    }
}

impl Drop for HeldLease {
    fn drop(&mut self) {
        self.state.pass_permit();
    }
}

/// A lease that the database granted.
pub(super) struct Granted {
    pub(super) key: LeaseKey,
    /// The size of the token range: how many fencing tokens its holders have.
    pub(super) tokens: u32,
    /// How many holders may have it, `numbers` at most.
    pub(super) turns: u32,
    pub(super) others_wait: bool,
    pub(super) ttl: Duration,
    /// When the request for it was sent.
    pub(super) sent: Instant,
}

/// Until when the holder may rely on a lease that was requested at `sent`. This is counted from
/// before the request went out, on our own monotonic clock, and is shorter than the TTL that the
/// database counts from later on.
pub(super) fn deadline(sent: Instant, ttl: Duration) -> Instant {
    sent + ttl * RELIABLE.0 / RELIABLE.1
}

impl HeldLease {
    /// When it ends for its holder, if nothing else happens.
    pub(super) fn ends(&self) -> Instant {
        self.state.held_until_at_most().map_or(self.deadline, |until| until.min(self.deadline))
    }

    /// The warning of its present holder.
    pub(super) fn hold_warning(&mut self) -> &mut HoldWarning {
        let since = self.state.held_since();
        if self.hold_warning.since != since {
            self.hold_warning = HoldWarning::new(since);
        }
        &mut self.hold_warning
    }

    pub(super) fn renewal(&self) -> Renewal {
        let LeaseKey { row, secret, fencing_token, .. } = &self.state.key;
        Renewal { id: row.id, secret: secret.clone(), fencing_token: *fencing_token, ttl: self.ttl }
    }

    /// From when on the renewal connection has to be ready.
    pub(super) fn is_held_on(&self) -> Instant {
        let sent = self.next_renewal.checked_sub(self.ttl / 3).unwrap_or(self.next_renewal);
        sent + IS_HELD_ON
    }

    /// The pause before the next attempt, if this one has no result.
    pub(super) fn pause(&self) -> Duration {
        let pause = self.ttl / 12;
        if self.state.is_in_doubt() { pause.min(READ_AFTER) } else { pause }
    }

    /// The row was locked by another transaction when it was read, at `looked` or later, and it
    /// showed no takeover. A process that takes over has to give notice first, so the lease is
    /// valid for that long. This does not hold on a cluster, where the notice may be on another
    /// node.
    pub(super) fn not_renewed(&mut self, read_at: Instant) {
        if self.state.key.server.cluster == Cluster::SinglePrimary {
            let deadline = read_at + reliable_without_notice(self.ttl);
            if deadline > self.deadline && self.state.extend(deadline) {
                self.deadline = deadline;
            }
        }
        let now = Instant::now();
        let left = self.deadline.saturating_duration_since(now);
        // Several attempts fit into the rest, so that one late answer does no harm.
        self.next_renewal = now + self.pause().min((left / 6).max(SHORTEST_PAUSE));
    }

    /// `false`: too late, its holder was already told that it is over.
    pub(super) fn renewed(&mut self, sent: Instant) -> bool {
        self.deadline = self.deadline.max(deadline(sent, self.ttl));
        self.next_renewal = sent + self.ttl / 3;
        self.state.extend(self.deadline)
    }
}

/// Runs an operation, and repeats it once if the connection was gone: the server may have closed it
/// while it was idle. An operation without an answer is not repeated. Every operation of the
/// session can be repeated safely.
pub(super) async fn twice<T>(operation: impl AsyncFn() -> Result<T, Failure>) -> Result<T, Failure> {
    match operation().await {
        Err(failure) if failure.fault == Fault::Disconnected && !failure.is_silence() => operation().await,
        answer => answer,
    }
}

/// Like `twice`, and repeats the operation while it is blocked. On SQLite a commit blocks readers,
/// and on a busy machine for longer than a private connection waits.
async fn patiently<T>(operation: impl AsyncFn() -> Result<T, Failure>) -> Result<T, Failure> {
    let started = Instant::now();
    loop {
        let asked = Instant::now();
        match twice(&operation).await {
            Err(failure) if failure.passes() && started.elapsed() < PATIENCE && asked.elapsed() < A_WAIT => {
                sleep(PAUSE).await;
            }
            answer => return answer,
        }
    }
}
