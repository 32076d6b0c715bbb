//! The thread of a session: what it keeps, and who answers which request.

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

use super::alarm::Alarm;
use super::baton::{self, Baton};
use super::busy::Busy;
use super::calls::Calls;
use super::lane::Lane;
use super::lease_state::LeaseState;
use super::long_holds::{self, Watched};
use super::old_snapshots::{self, OldSnapshots};
use super::queues::{HandOff, Queues, Reports, Turn};
use super::request::Request;
use super::{Way, acquire, release, renewal};
use crate::database::{
    Cluster, Fault, LeaseKey, Location, LockDatabase, LockRow, Place, Renewal, reliable_without_notice,
};
use crate::error::{Failure, Loss, lost_how};
use crate::insert::Hold;
use crate::long_hold::LongHold;
use crate::name::Name;
use crate::secret::Secret;
use crate::{Error, Kind};

/// How long a thread waits for the next connection to make.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// How long requests under way may take when everybody is gone.
const FINISH_LIMIT: Duration = Duration::from_secs(10);
/// How long a plain read is tried while somebody is in the way, and how often.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(20);
/// What took so long has waited on the server.
const A_WAIT: Duration = Duration::from_secs(1);
/// For a statement on a private connection that an open transaction of the caller waits for.
const MARK_PATIENCE: Duration = Duration::from_secs(1);
/// How long the news of a loss waits for what has become of the lock.
const LOOK_LIMIT: Duration = Duration::from_millis(100);
/// How soon the end of a transaction that has released a lease is noticed.
const LOOK_AFTER: Duration = Duration::from_millis(100);
/// Between two renewals of a lease whose row is locked by another transaction.
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
/// A lease that is held for so long needs the second connection at hand.
const IS_HELD_ON: Duration = Duration::from_secs(1);
/// The part of the TTL on which a holder relies: it gives up a little before the database does.
const RELIABLE: (u32, u32) = (9, 10);

/// Starts the thread. It ends after `Close`, or when the sender and all its clones are gone.
pub(super) fn start<DB: LockDatabase>(
    application: &Pool<DB>,
    location: &Arc<Location>,
    hand_off: HandOff,
    owner: &Arc<str>,
    watched: &Watched,
) -> Result<Way, Error> {
    DB::check_options(&application.connect_options(), location.schema().as_deref())?;
    let application = application.clone();
    let (sender, requests) = mpsc::unbounded_channel();
    let weak = sender.downgrade();
    let reports = Reports { owner: Arc::clone(owner), no_answer: Failure::no_answer::<DB> };
    let queues = Queues::new(weak.clone(), hand_off, Secret::generate()?, reports);
    let (location, watched) = (Arc::clone(location), watched.clone());
    let way = Way { requests: sender, queues: Arc::clone(&queues) };
    let runtime = Builder::new_current_thread()
        .enable_all()
        // Of the threads on which connections are made.
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
                        let core = Core::new(application, &location, weak, queues);
                        serve(&core, requests, watched).await;
                    })
                    .await;
                let _in_time = timeout(FINISH_LIMIT, local).await;
            });
            // A hook of the application may block a thread for ever.
            runtime.shutdown_background();
        })
        .map_err(no_thread)?;
    Ok(way)
}

fn no_thread(error: std::io::Error) -> Error {
    Error::Database {
        action: "start the thread that keeps the locks",
        name: None,
        within: None,
        source: sqlx::Error::Io(error),
    }
}

/// Answers requests until everybody is gone or the session is closed. Each is a task of its own.
async fn serve(core: &Rc<Core>, mut requests: mpsc::UnboundedReceiver<Request>, watched: Watched) {
    spawn_local(renewal::renew(Rc::clone(core)));
    spawn_local(renewal::watch_deadlines(Rc::clone(core)));
    spawn_local(old_snapshots::watch(Rc::clone(core)));
    spawn_local(renewal::watch_connections(Rc::clone(core)));
    spawn_local(long_holds::watch(Rc::clone(core), watched));
    let queues = Arc::clone(&core.queues);
    let watching = spawn_local(async move { queues.watch_waits().await });
    while let Some(request) = requests.recv().await {
        let core = Rc::clone(core);
        match request {
            Request::Acquire(request) => {
                let busy = core.busy.enter();
                drop(spawn_local(async move {
                    acquire::acquire(core, request).await;
                    drop(busy);
                }));
            }
            Request::Release { lease, answer } => {
                let busy = core.busy.enter();
                let given_up = release::give_up(&core, &lease);
                drop(spawn_local(async move {
                    let released = release::release(&core, &lease, given_up, answer.is_some()).await;
                    match (answer, released) {
                        (Some(answer), released) => drop(answer.send(released)),
                        // A loss was told when it was noticed.
                        (None, Ok(()) | Err(Error::Lost { .. } | Error::Closed)) => {}
                        (None, Err(error)) => {
                            tracing::warn!(lock = %lease.name(), %error, "a dropped lock could not be released");
                        }
                    }
                    drop(busy);
                }));
            }
            Request::ReleasedIn { lease } => core.look_after(lease.number),
            Request::Released { lease, call } => {
                core.lose(lease.number, Loss::Released);
                if let Some(call) = call {
                    core.lane.call(call);
                }
            }
            Request::Lost { lease } => core.is_taken_over(&lease),
            Request::HandedOn { until } => core.over.no_later_than(until),
            Request::Locate { anew, answer } => drop(spawn_local(async move {
                let found = twice(async || core.lane.locate(anew).await).await;
                let _ = answer.send(found.map_err(|failure| failure.into_error("find the table", None)));
            })),
            Request::Settle { name, answer } => drop(spawn_local(async move {
                let settled = core.settle(&name).await;
                let _ = answer.send(settled.map_err(|failure| failure.into_error("take over", Some(&name))));
            })),
            Request::Mark { lease, answer } => drop(spawn_local(async move {
                let _ = answer.send(core.mark(lease).await);
            })),
            Request::EnsureRow { name, kind, answer } => drop(spawn_local(async move {
                let _ = answer.send(core.ensure_row(&name, kind).await);
            })),
            Request::Look { name, answer } => drop(spawn_local(async move {
                let row = patiently(async || core.lane.look(&name).await).await;
                let _ = answer.send(row.map_err(|failure| failure.into_error("read the row", Some(&name))));
            })),
            Request::Migrate { answer } => drop(spawn_local(async move {
                // On a cluster other nodes migrate at the same time: what a migration meets of theirs passes.
                let migrated = patiently(async || core.lane.migrate().await).await;
                let migrated =
                    migrated.map_err(|failure| failure.into_error("create `distributed_lock`", None));
                // Whatever the ledger says, it is the table that has to fit.
                let _ = answer.send(match migrated {
                    Ok(()) => core.fits().await,
                    failed => failed,
                });
            })),
            Request::Answer(answer) => {
                let _caller_may_be_gone = answer.send(());
            }
            Request::Check { answer } => drop(spawn_local(async move {
                let _ = answer.send(core.check().await);
            })),
            Request::Close { done } => {
                core.closing.send_replace(true);
                core.queues.close();
                release::release_all(&core);
                // Those that were dropped before, and what attempts that end now may have got, are given back as well.
                let _in_time = timeout(FINISH_LIMIT, core.busy.nobody()).await;
                drop(done);
                break;
            }
        }
    }
    core.closing.send_replace(true);
    watching.abort();
}

/// What a session keeps. All of it lives on its own thread.
pub(super) struct Core {
    /// For what callers wait for.
    pub(super) lane: Lane,
    /// For renewals, and where the database calls.
    pub(super) renewals: Lane,
    /// A private connection was lost: what stood behind it may have become another server.
    pub(super) lost: Rc<Notify>,
    pub(super) not_written: fn() -> Failure,
    pub(super) calls: Rc<Calls>,
    pub(super) baton: Baton,
    pub(super) is_renewing: Cell<bool>,
    /// Whether the connection for renewals was made, or tried, before the first of them.
    pub(super) connects_ahead: Cell<bool>,
    /// Why the last renewal failed, if it did.
    pub(super) not_renewed: RefCell<Option<String>>,
    misses_second: Cell<bool>,
    /// How long the last renewal took, and since when one is under way.
    pub(super) renewal_took: Cell<Duration>,
    pub(super) renewing_since: Cell<Option<Instant>>,
    pub(super) queues: Arc<Queues>,
    /// How many attempts are under way.
    pub(super) contenders: Cell<u32>,
    pub(super) leases: RefCell<HashMap<u64, Held>>,
    last_number: Cell<u64>,
    /// For guards, which keep the session alive; weak, so that the session doesn't.
    requests: mpsc::WeakUnboundedSender<Request>,
    /// When a lease is due for renewal, and when one is over.
    pub(super) due: Alarm,
    pub(super) over: Alarm,
    pub(super) closing: watch::Sender<bool>,
    /// Who may still have something to give back.
    pub(super) busy: Busy,
    pub(super) old_snapshots: OldSnapshots,
}

/// A lease that this process holds.
pub(super) struct Held {
    pub(super) state: Arc<LeaseState>,
    pub(super) ttl: Duration,
    pub(super) deadline: Instant,
    pub(super) next_renewal: Instant,
    /// Whether other processes stood in the queue at the grant.
    pub(super) others_wait: bool,
    long_hold: LongHold,
    lost: watch::Sender<Option<Loss>>,
}

impl Core {
    fn new<DB: LockDatabase>(
        pool: Pool<DB>,
        location: &Arc<Location>,
        requests: mpsc::WeakUnboundedSender<Request>,
        queues: Arc<Queues>,
    ) -> Rc<Self> {
        let (calls, lost) = (Rc::new(Calls::new()), Rc::default());
        Rc::new(Self {
            lane: Lane::start(pool.clone(), location, &calls, false, &lost),
            renewals: Lane::start(pool, location, &calls, true, &lost),
            lost,
            not_written: Failure::not_written::<DB>,
            calls,
            baton: Baton::default(),
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
            due: Alarm::default(),
            over: Alarm::default(),
            closing: watch::Sender::new(false),
            busy: Busy::default(),
            old_snapshots: OldSnapshots::default(),
        })
    }

    /// Resolves when the session ends.
    pub(super) async fn closed(&self) {
        let mut closing = self.closing.subscribe();
        let _ = closing.wait_for(|closing| *closing).await;
    }

    /// Takes a granted lease into the renewal and makes its guard. `None`: nobody is left who could hold it.
    pub(super) fn hold(&self, granted: Granted, at_most: Option<Duration>, turn: Turn) -> Option<Hold> {
        let requests = self.requests.upgrade()?;
        let Granted { key, numbers, turns, others_wait, ttl, sent } = granted;
        self.old_snapshots.granted();
        let number = self.last_number.get() + 1;
        self.last_number.set(number);
        let deadline = deadline(sent, ttl);
        let (state, lost) =
            LeaseState::new(number, key, (numbers, turns), ttl, at_most, deadline, Some(turn));
        let held = Held {
            state: Arc::clone(&state),
            ttl,
            deadline,
            next_renewal: sent + ttl / 3,
            others_wait,
            long_hold: LongHold::new(Instant::now()),
            lost,
        };
        self.due.no_later_than(held.next_renewal);
        self.over.no_later_than(held.ends());
        if self.may_connect_ahead() {
            self.due.no_later_than(held.is_held_on());
        }
        self.leases.borrow_mut().insert(number, held);
        self.queues.is_held(&state);
        Some(Hold::new(state, requests, Arc::clone(&self.queues)))
    }

    /// A lease that is gone: its guard is told, and the next caller of this process gets its turn.
    pub(super) fn lose(&self, number: u64, loss: Loss) {
        if let Some(held) = self.end(number, loss) {
            baton::give(self, held.state.name());
        }
    }

    /// As `lose`, but the turn stays in what this answers.
    pub(super) fn end(&self, number: u64, loss: Loss) -> Option<Held> {
        let ended = self.leases.borrow_mut().remove(&number);
        if let Some(held) = &ended {
            self.tell_operator(&held.state, loss);
            if loss == Loss::Released {
                // Whoever is told may take it again at once.
                held.state.pass_turn();
            }
            held.lost.send_replace(Some(loss));
        }
        ended
    }

    /// Whether the connection for renewals is made ahead of them: once, and only where it notices by itself that the server has gone.
    pub(super) fn may_connect_ahead(&self) -> bool {
        !self.connects_ahead.get() && self.renewals.could_notice_loss()
    }

    /// As long as the last one took, or the one that is under way has taken so far.
    fn renewals_take(&self) -> Duration {
        let so_far = self.renewing_since.get().map(|since| since.elapsed()).unwrap_or_default();
        self.renewal_took.get().max(so_far)
    }

    /// Leases are renewed by the first connection, because the second can't be had or does not answer. Said once.
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

    /// Once for each lease, wherever its loss was noticed.
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

    /// What became of a lease that is not ours any more, by a look at its row. The news of the loss does not wait for it longer than that.
    pub(super) async fn find_out(&self, lease: &LeaseState) -> Loss {
        let Ok(Ok(row)) = timeout(LOOK_LIMIT, self.lane.look(lease.name())).await else {
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

    /// A lease whose row is not ours any more. It counts as lost from now on; who waits for that is told in a moment, with what is found out.
    pub(super) fn is_taken_over(self: &Rc<Self>, lease: &Arc<LeaseState>) {
        if !lease.is_gone() {
            return;
        }
        let (core, lease) = (Rc::clone(self), Arc::clone(lease));
        drop(spawn_local(async move {
            let loss = core.find_out(&lease).await;
            core.lose(lease.number, loss);
        }));
    }

    pub(super) fn shortest_ttl(&self) -> Option<Duration> {
        self.leases.borrow().values().map(|held| held.ttl).min()
    }

    pub(super) fn has_lease(&self, name: &str) -> bool {
        self.leases.borrow().values().any(|held| **held.state.name() == *name)
    }

    /// Sees to it that the database calls, some time soon, for those who wait.
    pub(super) fn listen(self: &Rc<Self>) {
        if self.calls.should_begin() {
            let core = Rc::clone(self);
            drop(spawn_local(async move {
                if let Err(failure) = core.renewals.listen().await {
                    tracing::debug!(error = %failure, "nothing calls when a lock is free");
                }
                core.calls.was_asked();
            }));
        }
    }

    /// A place for the queue of some row.
    pub(super) fn place(&self) -> Place {
        Place { secret: self.queues.place().clone(), listener: self.calls.listener() }
    }

    /// The transaction that released a lease may have ended: the watchdog looks.
    fn look_after(&self, number: u64) {
        if let Some(held) = self.leases.borrow_mut().get_mut(&number) {
            held.next_renewal = Instant::now();
            self.due.no_later_than(held.next_renewal);
        }
    }

    /// Answers the row, and whether it was missing.
    async fn ensure_row(&self, name: &Name, kind: Kind) -> Result<(LockRow, bool), Error> {
        let failed = |failure: Failure| failure.into_error("make the row", Some(name));
        let (mut missing, mut in_the_way) = (false, None);
        loop {
            let row = patiently(async || self.lane.look(name).await).await.map_err(failed)?;
            if let Some(row) = row {
                if row.kind == kind {
                    return Ok((row, missing));
                }
                return Err(Error::WrongKind { name: name.given(), wanted: kind, found: row.kind });
            }
            if missing {
                // Some transaction, perhaps the caller's own, has locked the place where the row belongs, or the whole table.
                let stale = || Error::Serialization { name: name.given(), source: None };
                return Err(in_the_way.map_or_else(stale, failed));
            }
            missing = true;
            match twice(async || self.lane.create(name, kind).await).await {
                // In the way of another process that makes it, perhaps: the next look tells.
                Err(failure) if failure.passes() => in_the_way = Some(failure),
                Err(failure) => return Err(failed(failure)),
                Ok(_) => {}
            }
        }
    }

    /// Sees to it that nothing of the last holder of a lock that is not held any more can be committed, unless a transaction of that
    /// holder is still open.
    async fn settle(&self, name: &Name) -> Result<(), Failure> {
        let Some(row) = twice(async || self.lane.look(name).await).await? else { return Ok(()) };
        if row.notice_is_due() && self.lane.give_notice(std::slice::from_ref(name)).await? > 0 {
            sleep(row.notice()).await;
            self.lane.settle(name).await?;
        } else if row.is_free() && !row.is_settled() {
            self.lane.settle(name).await?;
        }
        Ok(())
    }

    /// While other transactions have the row locked, guarded ones of the same lease say, it is tried again.
    async fn mark(&self, lease: LeaseKey) -> Result<(), Error> {
        let name = lease.row.name.clone();
        let started = Instant::now();
        loop {
            let may_wait = started.elapsed() < MARK_PATIENCE;
            match twice(async || self.lane.mark(lease.clone()).await).await {
                Ok(false) if may_wait => {}
                Err(failure) if may_wait && failure.passes() => {}
                // It is not ours any more, or locked for long: what the guard finds tells.
                Ok(_) => return Ok(()),
                Err(failure) => return Err(failure.into_error("verify the lock", Some(&name))),
            }
            sleep(PAUSE).await;
        }
    }

    /// Wakes up the process that is next, after a transaction has released a lock.
    pub(super) fn call_next(self: &Rc<Self>, name: &Name) {
        let (core, name) = (Rc::clone(self), name.clone());
        drop(spawn_local(async move {
            if let Ok(Some(row)) = core.lane.look(&name).await
                && row.is_free()
                && let Some(call) = row.first_waiter()
            {
                core.lane.call(call);
            }
        }));
    }

    /// Not by what a role that only migrates has no right to.
    async fn fits(&self) -> Result<(), Error> {
        let found = patiently(async || self.lane.locate(true).await).await;
        found.map(drop).map_err(|failure| failure.into_error("find the table `distributed_lock`", None))
    }

    async fn check(&self) -> Result<Vec<String>, Error> {
        let checked = patiently(async || self.lane.check().await).await;
        checked.map_err(|failure| failure.into_error("check the table `distributed_lock`", None))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.state.pass_turn();
    }
}

/// A lease that the database granted.
pub(super) struct Granted {
    pub(super) key: LeaseKey,
    /// How many fencing tokens there are for its holders.
    pub(super) numbers: u32,
    /// How many holders may have it, of those.
    pub(super) turns: u32,
    pub(super) others_wait: bool,
    pub(super) ttl: Duration,
    /// When the request for it was sent.
    pub(super) sent: Instant,
}

/// Until when the holder may rely on a lease that was asked for at `sent`: counted from before the request went out,
/// on our own monotonic clock, and less than what the database counts from later on.
pub(super) fn deadline(sent: Instant, ttl: Duration) -> Instant {
    sent + ttl * RELIABLE.0 / RELIABLE.1
}

impl Held {
    /// When it is over for its holder, if nothing else happens.
    pub(super) fn ends(&self) -> Instant {
        self.state.held_until_at_most().map_or(self.deadline, |until| until.min(self.deadline))
    }

    /// Of its present holder.
    pub(super) fn long_hold(&mut self) -> &mut LongHold {
        let since = self.state.held_since();
        if self.long_hold.since != since {
            self.long_hold = LongHold::new(since);
        }
        &mut self.long_hold
    }

    pub(super) fn renewal(&self) -> Renewal {
        let LeaseKey { row, secret, fencing_token, .. } = &self.state.key;
        Renewal { id: row.id, secret: secret.clone(), fencing_token: *fencing_token, ttl: self.ttl }
    }

    /// From when on the connection for renewals is to be there.
    pub(super) fn is_held_on(&self) -> Instant {
        let sent = self.next_renewal.checked_sub(self.ttl / 3).unwrap_or(self.next_renewal);
        sent + IS_HELD_ON
    }

    /// How long after now it is looked after again, if nothing comes of this time.
    pub(super) fn pause(&self) -> Duration {
        let pause = self.ttl / 12;
        if self.state.is_in_doubt() { pause.min(LOOK_AFTER) } else { pause }
    }

    /// The row was locked by another transaction when it was looked at, not before `looked`, and told of no takeover. One would have to give notice
    /// first, so the lease is good for that long; on a cluster the notice may be on another node.
    pub(super) fn not_renewed(&mut self, looked: Instant) {
        if self.state.key.server.cluster == Cluster::SinglePrimary {
            let deadline = looked + reliable_without_notice(self.ttl);
            if deadline > self.deadline && self.state.extend(deadline) {
                self.deadline = deadline;
            }
        }
        let now = Instant::now();
        let left = self.deadline.saturating_duration_since(now);
        // Several times, so that one answer that is late costs nothing.
        self.next_renewal = now + self.pause().min((left / 6).max(SHORTEST_PAUSE));
    }

    /// `false`: too late, its holder was told already that it is over.
    pub(super) fn renewed(&mut self, sent: Instant) -> bool {
        self.deadline = self.deadline.max(deadline(sent, self.ttl));
        self.next_renewal = sent + self.ttl / 3;
        self.state.extend(self.deadline)
    }
}

/// Once more when the connection was gone: the server may have closed it while it was idle. Not after a silence. For
/// what can be asked twice without harm, which is everything.
pub(super) async fn twice<T>(operation: impl AsyncFn() -> Result<T, Failure>) -> Result<T, Failure> {
    match operation().await {
        Err(failure) if failure.fault == Fault::Disconnected && !failure.is_silence() => operation().await,
        answer => answer,
    }
}

/// `twice`, and again as long as somebody is in the way: on SQLite a commit keeps readers out, and on a busy machine for
/// longer than a private connection waits.
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
