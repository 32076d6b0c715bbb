//! The handle that keeps a lease. Its owners in this process are lock guards and guarded
//! transactions.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::select;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use super::{ASK_LIMIT, LeaseState, LocalQueues, Request, answer_to};
use crate::clock;
use crate::database::{LeaseKey, Notification};
use crate::error::Action;
use crate::error::Loss;
use crate::jitter::jitter;
use crate::name::Name;
use crate::reentrancy::Held;
use crate::sync::{AtomicBool, AtomicUsize};
use crate::{Error, Kind};

/// How long the error for a loss waits for what has become of the lock.
const READ_LIMIT: Duration = Duration::from_secs(1);
/// The time between two looks at the queue of other processes, for a holder that would step down.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Keeps a lease. The last owner of this releases the lease.
pub(crate) struct LeaseHandle {
    pub(crate) lease: Arc<LeaseState>,
    pub(crate) fencing_token: i64,
    /// The waiters of this process.
    queues: Arc<LocalQueues>,
    /// Also keeps the session alive.
    session: mpsc::UnboundedSender<Request>,
    released: AtomicBool,
    /// For those who watch it; made by the first of them.
    watched: OnceLock<watch::Sender<Option<Loss>>>,
    /// See [`LeaseKey::mark`], and whether the row has the mark.
    mark: i64,
    is_marked: AtomicBool,
    /// How many of its owners are guarded transactions. They do not count as handles.
    transactions: AtomicUsize,
}

impl LeaseHandle {
    /// The first handle of a lease.
    pub(crate) fn new(
        lease: Arc<LeaseState>,
        session: mpsc::UnboundedSender<Request>,
        queues: Arc<LocalQueues>,
    ) -> Self {
        let fencing_token = lease.last_fencing_token();
        Self {
            lease,
            fencing_token,
            queues,
            session,
            released: AtomicBool::new(false),
            watched: OnceLock::new(),
            mark: 0,
            is_marked: AtomicBool::new(true),
            transactions: AtomicUsize::new(0),
        }
    }

    /// How many of its owners are handles, not guarded transactions.
    pub(crate) fn count(self: &Arc<Self>) -> usize {
        Arc::strong_count(self).saturating_sub(self.transactions.load(Ordering::SeqCst))
    }

    /// See [`LeaseState::may_be_handed_on`].
    pub(crate) fn may_be_handed_on(&self, now: Instant, time: Duration) -> bool {
        self.lease.may_be_handed_on(now, time)
    }

    /// The handle for the next holder of the same lease.
    pub(crate) fn successor(&self) -> Self {
        let fencing_token = self.lease.next_fencing_token();
        Self {
            lease: Arc::clone(&self.lease),
            fencing_token,
            queues: Arc::clone(&self.queues),
            session: self.session.clone(),
            released: AtomicBool::new(false),
            watched: OnceLock::new(),
            // More than what its predecessors have written, and not its own number, which counts as that
            // of the present grant.
            mark: fencing_token - 1,
            is_marked: AtomicBool::new(false),
            transactions: AtomicUsize::new(0),
        }
    }

    /// Returns the key for guarding a transaction that the caller has begun. A lease that was
    /// handed on has left no trace in its row, so an older snapshot could not be detected. So the
    /// session marks the row first. All transactions that begin after that see the mark, and so
    /// does this one, if it has no snapshot yet.
    pub(crate) async fn marked_key(&self) -> Result<LeaseKey, Error> {
        let key = LeaseKey { mark: self.mark, ..self.lease.key.clone() };
        if !self.is_marked.load(Ordering::SeqCst) {
            // Otherwise the transaction would be refused each time that the lease is handed on.
            self.queues.stop_hand_on(self.name());
            let (answer, answered) = oneshot::channel();
            let request = Request::Mark { lease: key.clone(), answer };
            self.session.send(request).map_err(|_| self.lost_error(Loss::Closed))?;
            self.answer(answered, Action::Verify).await?;
            self.is_marked.store(true, Ordering::SeqCst);
        }
        Ok(key)
    }

    /// Tells how this handle ended. `None` while it holds the lease.
    pub(crate) fn ended(&self) -> watch::Receiver<Option<Loss>> {
        self.watched.get_or_init(|| watch::Sender::new(None)).subscribe()
    }

    /// The state belongs to the next holder after a hand-over, so the end is noted before it.
    fn tell_watchers(&self) {
        let Some(watched) = self.watched.get() else { return };
        watched.send_if_modified(|ended| {
            let is_news = ended.is_none();
            if is_news {
                *ended = Some(self.lease.loss().unwrap_or(Loss::Released));
            }
            is_news
        });
    }

    /// Drops this handle without a release, because another one holds the lease.
    pub(crate) fn forget(self) {
        self.released.store(true, Ordering::SeqCst);
    }

    pub(crate) fn name(&self) -> &Name {
        &self.lease.key.row.name
    }

    /// Resolves while another caller of this process, or another process, waits for the lease.
    pub(crate) async fn wanted(&self) {
        select! {
            () = self.wanted_here() => {}
            () = self.wanted_elsewhere() => {}
        }
    }

    async fn wanted_here(&self) {
        loop {
            let arrival = self.queues.arrival();
            if self.queues.has_waiters(self.name()) {
                return;
            }
            arrival.await;
        }
    }

    async fn wanted_elsewhere(&self) {
        while !self.is_wanted_elsewhere().await {
            clock::sleep(jitter(LOOK_AGAIN)).await;
        }
    }

    async fn is_wanted_elsewhere(&self) -> bool {
        let (answer, answered) = oneshot::channel();
        let name = self.name().clone();
        let _session_may_be_gone = self.session.send(Request::IsWanted { name, answer });
        answered.await.is_ok_and(|is_wanted| is_wanted.unwrap_or(false))
    }

    pub(crate) fn ttl(&self) -> Duration {
        self.lease.ttl
    }

    /// See [`InsertLock::at_least`](crate::InsertLock::at_least).
    pub(crate) fn set_minimum_hold(&self, at_least: Duration) {
        self.lease.set_minimum_hold(at_least);
    }

    /// Fails if the lease is lost.
    pub(crate) fn check(&self) -> Result<(), Error> {
        self.lease.loss().map_or(Ok(()), |reason| Err(self.lost_error(reason)))
    }

    /// See [`Loss::CommitUnknown`].
    pub(crate) fn refuse_after_unknown_commit(&self) -> Result<(), Error> {
        if self.lease.has_unknown_commit() { Err(self.lost_error(Loss::CommitUnknown)) } else { Ok(()) }
    }

    /// A loss that the database has decided is final. A deadline that has passed is not such a
    /// loss: only the database can tell whether another process has the lock now.
    pub(crate) fn refuse_after_loss(&self) -> Result<(), Error> {
        match self.lease.reported_loss() {
            Some(
                reason @ (Loss::TakenOver
                | Loss::ReleasedByHand
                | Loss::ForceReleased
                | Loss::RowDeleted
                | Loss::HeldTooLong
                | Loss::Released),
            ) => Err(self.lost_error(reason)),
            _ => Ok(()),
        }
    }

    pub(crate) fn lost_error(&self, reason: Loss) -> Error {
        self.lease.lost_error(reason)
    }

    /// The error for a lease that the database has reported as not ours. It waits a moment to find
    /// out the new holder, and whether the lease was ended by force.
    pub(crate) async fn taken_over_error(&self) -> Error {
        let (answer, answered) = oneshot::channel();
        let name = self.name().clone();
        let _session_may_be_gone = self.session.send(Request::Read { name, answer });
        let mut reason = Loss::TakenOver;
        if let Ok(Ok(Ok(Some(row)))) = timeout(READ_LIMIT, answered).await {
            if row.loss_of(&self.lease.key) == Loss::ForceReleased {
                reason = Loss::ForceReleased;
                self.lease.report_loss(reason);
            }
            if row.has_new_holder(&self.lease.key) {
                self.lease.set_new_holder(Box::new(row.into_info(self.name())));
            }
        }
        self.lost_error(reason)
    }

    /// Gives up one handle. The last one releases the lease.
    pub(crate) async fn give_up(self: Arc<Self>) -> Result<(), Error> {
        self.begin_to_give_up()?.end().await
    }

    /// Like `give_up`, in two steps, so that several leases are released together.
    pub(crate) fn begin_to_give_up(self: Arc<Self>) -> Result<ReleaseUnderWay, Error> {
        if Arc::strong_count(&self) > 1 {
            self.check()?;
        }
        Arc::into_inner(self).map_or(Ok(ReleaseUnderWay(None)), Self::begin_release)
    }

    /// Runs work under the lease. If the lease is lost first, the work is dropped at its current
    /// `.await`. It is not dropped if the work itself has released the lease, with the commit of a
    /// transaction.
    pub(crate) async fn run_until_lost<F: Future>(&self, work: F) -> Result<F::Output, Error> {
        let mut work = std::pin::pin!(work);
        let output = select! {
            biased;
            output = &mut work => output,
            reason = self.lease.lost() => match reason {
                Loss::Released => work.await,
                reason => return Err(self.lost_error(reason)),
            },
        };
        match self.lease.loss() {
            None | Some(Loss::Released) => Ok(output),
            // Work that blocked the runtime, or was paused together with it, may finish after the
            // lease has ended.
            Some(reason) => Err(self.lost_error(reason)),
        }
    }

    /// Releases the lease as its last owner.
    pub(crate) async fn release(self) -> Result<(), Error> {
        self.begin_release()?.end().await
    }

    fn begin_release(self) -> Result<ReleaseUnderWay, Error> {
        self.tell_watchers();
        if self.released.swap(true, Ordering::SeqCst) || self.queues.hand_on(&self) {
            return Ok(ReleaseUnderWay(None));
        }
        if self.was_taken_back() {
            return Err(self.lost_error(Loss::HeldTooLong));
        }
        let (answer, answered) = oneshot::channel();
        let request = Request::Release { lease: Arc::clone(&self.lease), answer: Some(answer) };
        self.session.send(request).map_err(|_| self.lost_error(Loss::Closed))?;
        Ok(ReleaseUnderWay(Some((self, answered))))
    }

    async fn answer(
        &self,
        answered: oneshot::Receiver<Result<(), Error>>,
        action: Action,
    ) -> Result<(), Error> {
        let about = (action, Some(self.name()));
        let answer = answer_to(&self.session, answered, ASK_LIMIT, Instant::now(), about).await;
        answer.unwrap_or_else(|| Err(self.lost_error(Loss::Closed)))
    }

    /// The session has released it already, or is about to.
    fn was_taken_back(&self) -> bool {
        self.lease.reported_loss() == Some(Loss::HeldTooLong)
    }

    /// The database has reported that the lease is gone. This holder is told at once, and so is
    /// everything that waits for the loss.
    pub(crate) fn mark_lost(&self) {
        self.lease.report_loss(Loss::TakenOver);
        let _session_may_be_gone = self.session.send(Request::Lost { lease: Arc::clone(&self.lease) });
    }

    /// From now on it is unknown whether a transaction has released the lease, until the database
    /// tells. The watchdog asks as soon as this is dropped.
    pub(crate) fn doubt(handle: KeptByTransaction) -> InDoubt {
        handle.lease.begin_doubt();
        InDoubt(handle)
    }

    /// A transaction that has committed released it.
    pub(crate) fn mark_released(&self, notification: Option<Notification>) {
        self.released.store(true, Ordering::SeqCst);
        // The order matters: the next caller's request has to reach the session after the end of
        // this lease.
        let _session_may_be_gone =
            self.session.send(Request::Released { lease: Arc::clone(&self.lease), notification });
        self.lease.pass_permit();
    }
}

/// A handle that is given up. If it was the last one, the release is in progress.
pub(crate) struct ReleaseUnderWay(Option<(LeaseHandle, oneshot::Receiver<Result<(), Error>>)>);

impl ReleaseUnderWay {
    pub(crate) async fn end(self) -> Result<(), Error> {
        match self.0 {
            Some((handle, answered)) => handle.answer(answered, Action::Release).await,
            None => Ok(()),
        }
    }
}

/// A statement that releases the lease with its transaction is in progress.
pub(crate) struct InDoubt(KeptByTransaction);

impl Drop for InDoubt {
    fn drop(&mut self) {
        self.0.lease.let_doubt_settle();
        let _session_may_be_gone =
            self.0.session.send(Request::ReleasedIn { lease: Arc::clone(&self.0.lease) });
    }
}

impl Held for LeaseHandle {
    const KIND: Kind = Kind::Insert;

    fn check(&self) -> Result<(), Error> {
        Self::check(self)
    }

    fn loss(&self) -> Option<watch::Receiver<Option<Loss>>> {
        Some(self.lease.loss_reports())
    }
}

/// The share that a guarded transaction has in a lease. It keeps the lock from other holders until
/// the transaction has ended.
pub(crate) struct KeptByTransaction(Arc<LeaseHandle>);

impl KeptByTransaction {
    pub(crate) fn new(handle: &Arc<LeaseHandle>) -> Self {
        handle.transactions.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(handle))
    }

    pub(crate) fn is(&self, handle: &Arc<LeaseHandle>) -> bool {
        Arc::ptr_eq(&self.0, handle)
    }
}

impl Clone for KeptByTransaction {
    fn clone(&self) -> Self {
        Self::new(&self.0)
    }
}

impl std::ops::Deref for KeptByTransaction {
    type Target = LeaseHandle;

    fn deref(&self) -> &LeaseHandle {
        &self.0
    }
}

impl Drop for KeptByTransaction {
    fn drop(&mut self) {
        self.0.transactions.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for LeaseHandle {
    fn drop(&mut self) {
        self.tell_watchers();
        if !self.released.load(Ordering::SeqCst) && !self.queues.hand_on(self) && !self.was_taken_back() {
            // Fails only if the session is gone, which has released the lease.
            let _ = self.session.send(Request::Release { lease: Arc::clone(&self.lease), answer: None });
        }
    }
}
