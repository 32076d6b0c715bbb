//! The state of a session: its connections, and the leases that this process holds.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sqlx::Pool;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::connection::Worker;
use super::deadline_timer::DeadlineTimer;
use super::held_lease::{Granted, HeldLease, deadline};
use super::known_names::KnownNames;
use super::lease_state::LeaseState;
use super::local_queue::{LocalQueues, Permit};
use super::request::Request;
use super::snapshot_watch::SnapshotWatch;
use super::task_tracker::TaskTracker;
use super::vitals::Vitals;
use super::wakeup::notify::Notifications;
use super::wakeup::scan::Scan;
use super::wakeup::user_lock::{self, UserLock};
use crate::database::{Failure, Location, LockDatabase, QueueEntry};
use crate::error::{Loss, lost_how};
use crate::hold_warning::HoldWarning;
use crate::session::{LeaseHandle, SessionChannel};

/// How long a holder that has to stop waits for what has become of its lock, and how long one that has
/// stopped by itself.
const BEFORE_THE_REPORT: Duration = Duration::from_millis(300);
pub(super) const READ_LIMIT: Duration = Duration::from_secs(1);

/// The state of a session. All of it lives on its own thread.
pub(super) struct Actor {
    /// Serves what callers wait for.
    pub(super) worker: Worker,
    /// Renews leases, and receives notifications.
    pub(super) renewals: Worker,
    /// Notified when a private connection is lost. A different server may answer the next
    /// connection.
    pub(super) lost: Rc<Notify>,
    pub(super) vitals: Arc<Vitals>,
    pub(super) not_written: fn() -> Failure,
    pub(super) notifications: Rc<Notifications>,
    pub(super) user_lock: UserLock,
    pub(super) scan: Scan,
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
    /// Names whose rows this process has seen.
    pub(super) known_names: KnownNames,
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

impl Actor {
    pub(super) fn new<DB: LockDatabase>(
        pool: Pool<DB>,
        location: &Arc<Location>,
        requests: mpsc::WeakUnboundedSender<Request>,
        queues: Arc<LocalQueues>,
        vitals: Arc<Vitals>,
    ) -> Rc<Self> {
        let (notifications, lost) = (Rc::new(Notifications::new()), Rc::default());
        let watched = (&lost, &vitals);
        let renewals = Worker::start(pool.clone(), location, &notifications, None, watched);
        Rc::new(Self {
            worker: Worker::start(pool, location, &notifications, Some(&renewals), watched),
            renewals,
            lost,
            vitals,
            not_written: Failure::not_written::<DB>,
            notifications,
            user_lock: UserLock::default(),
            scan: Scan::default(),
            is_renewing: Cell::default(),
            connects_ahead: Cell::default(),
            not_renewed: RefCell::default(),
            misses_second: Cell::default(),
            renewal_took: Cell::default(),
            renewing_since: Cell::default(),
            queues,
            contenders: Cell::new(0),
            known_names: KnownNames::default(),
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

    /// For requests of the session itself. `None`: all senders are gone.
    pub(super) fn channel(&self) -> Option<SessionChannel> {
        Some(SessionChannel { requests: self.requests.upgrade()?, queues: Arc::clone(&self.queues) })
    }

    /// Whether only one lease, of the session itself, keeps the session.
    pub(super) fn is_forgotten(&self) -> bool {
        self.requests.strong_count() <= 1
    }

    /// Registers a granted lease for renewal and makes its handle. `None`: all senders are gone, so
    /// the lease can have no holder.
    pub(super) fn register(
        &self,
        granted: Granted,
        at_most: Option<Duration>,
        permit: Permit,
    ) -> Option<LeaseHandle> {
        let requests = self.requests.upgrade()?;
        let Granted { key, tokens, holders, others_wait, ttl, sent } = granted;
        self.snapshot_watch.granted();
        let number = self.last_number.get() + 1;
        self.last_number.set(number);
        let deadline = deadline(sent, ttl);
        let (state, lost) =
            LeaseState::new(number, key, (tokens, holders), ttl, at_most, deadline, Some(permit));
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
            self.due.no_later_than(held.second_needed_from());
        }
        let mut leases = self.leases.borrow_mut();
        leases.insert(number, held);
        self.vitals.set_held(leases.len());
        drop(leases);
        self.queues.set_lease(&state);
        Some(LeaseHandle::new(state, requests, Arc::clone(&self.queues)))
    }

    /// Ends a lease that is gone: its guard is told, and the next caller of this process gets the
    /// permit.
    pub(super) fn lose(&self, number: u64, loss: Loss) {
        if let Some(held) = self.end(number, loss) {
            user_lock::give(self, held.state.name());
        }
    }

    /// Removes a lease, which is not renewed any more.
    pub(super) fn forget(&self, number: u64) -> Option<HeldLease> {
        let mut leases = self.leases.borrow_mut();
        let removed = leases.remove(&number);
        self.vitals.set_held(leases.len());
        removed
    }

    /// Like `lose`, but the permit stays in the returned lease.
    pub(super) fn end(&self, number: u64, loss: Loss) -> Option<HeldLease> {
        let ended = self.forget(number);
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
    pub(super) fn report_missing_second(&self, failure: &Failure) {
        if !self.misses_second.replace(true) {
            tracing::warn!(
                error = %failure,
                "the connection for renewals can't be used: leases are renewed over the one for everything else"
            );
        }
    }

    pub(super) fn report_second_again(&self) {
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

    /// Reads the row of a lease that is no longer ours, to find out what became of it, within `limit`.
    pub(super) async fn find_out(&self, lease: &LeaseState, limit: Duration) -> Loss {
        let Ok(Ok(row)) = timeout(limit, self.worker.read(lease.name())).await else {
            return Loss::TakenOver;
        };
        let Some(row) = row else { return Loss::RowDeleted };
        let loss = row.loss_of(&lease.key);
        if row.has_new_holder(&lease.key) {
            lease.set_new_holder(Box::new(row.into_info(lease.name())));
        }
        loss
    }

    /// The row of a lease is no longer ours. The lease counts as lost from now on. Its holder is
    /// told a moment later, with the reason that was found out.
    pub(super) fn report_takeover(self: &Rc<Self>, lease: &Arc<LeaseState>) {
        if !lease.mark_gone() {
            return;
        }
        let (actor, lease) = (Rc::clone(self), Arc::clone(lease));
        drop(spawn_local(async move {
            let loss = actor.find_out(&lease, BEFORE_THE_REPORT).await;
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
                actor.notifications.mark_asked();
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
    pub(super) fn read_after(&self, number: u64) {
        if let Some(held) = self.leases.borrow_mut().get_mut(&number) {
            held.next_renewal = Instant::now();
            self.due.no_later_than(held.next_renewal);
        }
    }
}
