//! What keeps a lease, and its owners in this process: handles and guarded transactions.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

use crate::database::{Call, LeaseKey};
use crate::error::Loss;
use crate::name::Name;
use crate::reentry::Held;
use crate::session::{ASK_LIMIT, LeaseState, Queues, Request, answer_to};
use crate::sync::{AtomicBool, AtomicUsize};
use crate::{Error, Kind};

/// How long the news of a loss waits for what has become of the lock.
const LOOK_LIMIT: Duration = Duration::from_millis(100);

/// What keeps a lease: the last owner of this releases it.
pub(crate) struct Hold {
    pub(crate) lease: Arc<LeaseState>,
    pub(crate) fencing_token: i64,
    /// Who waits in this process.
    queues: Arc<Queues>,
    /// Also keeps the session alive.
    session: mpsc::UnboundedSender<Request>,
    released: AtomicBool,
    /// See [`LeaseKey::mark`], and whether the row has it.
    mark: i64,
    is_marked: AtomicBool,
    /// How many of its owners are guarded transactions, which are no handles.
    transactions: AtomicUsize,
}

impl Hold {
    /// The first one of a lease.
    pub(crate) fn new(
        lease: Arc<LeaseState>,
        session: mpsc::UnboundedSender<Request>,
        queues: Arc<Queues>,
    ) -> Self {
        let fencing_token = lease.last_fencing_token();
        Self {
            lease,
            fencing_token,
            queues,
            session,
            released: AtomicBool::new(false),
            mark: 0,
            is_marked: AtomicBool::new(true),
            transactions: AtomicUsize::new(0),
        }
    }

    /// How many of its owners are handles.
    pub(super) fn handles(self: &Arc<Self>) -> usize {
        Arc::strong_count(self).saturating_sub(self.transactions.load(Ordering::SeqCst))
    }

    /// See [`LeaseState::may_be_handed_on`].
    pub(crate) fn may_be_handed_on(&self, now: Instant, time: Duration) -> bool {
        self.lease.may_be_handed_on(now, time)
    }

    /// Of the next holder of the same lease.
    pub(crate) fn successor(&self) -> Self {
        let fencing_token = self.lease.next_fencing_token();
        Self {
            lease: Arc::clone(&self.lease),
            fencing_token,
            queues: Arc::clone(&self.queues),
            session: self.session.clone(),
            released: AtomicBool::new(false),
            mark: fencing_token,
            is_marked: AtomicBool::new(false),
            transactions: AtomicUsize::new(0),
        }
    }

    /// For the guard of a transaction that the caller has begun. A lease that went from hand to hand has left nothing in its row by which a
    /// snapshot could be told that is older than that. So the row is marked by the session, which all transactions see that begin
    /// from then on; this one too, if it has no snapshot yet.
    pub(super) async fn marked_key(&self) -> Result<LeaseKey, Error> {
        let key = LeaseKey { mark: self.mark, ..self.lease.key.clone() };
        if !self.is_marked.load(Ordering::SeqCst) {
            // Else it would be refused each time that it goes from hand to hand.
            self.queues.hand_on_no_more(self.name());
            let (answer, answered) = oneshot::channel();
            let request = Request::Mark { lease: key.clone(), answer };
            self.session.send(request).map_err(|_| self.lost(Loss::Closed))?;
            self.answer(answered, "verify the lock").await?;
            self.is_marked.store(true, Ordering::SeqCst);
        }
        Ok(key)
    }

    /// Another one holds the lease.
    pub(crate) fn forget(self) {
        self.released.store(true, Ordering::SeqCst);
    }

    pub(crate) fn name(&self) -> &Name {
        &self.lease.key.row.name
    }

    pub(crate) fn ttl(&self) -> Duration {
        self.lease.ttl
    }

    /// See [`InsertLock::at_least`](crate::InsertLock::at_least).
    pub(crate) fn keep_for(&self, at_least: Duration) {
        self.lease.keep_for(at_least);
    }

    /// Fails when the lease is lost.
    pub(super) fn check(&self) -> Result<(), Error> {
        self.lease.loss().map_or(Ok(()), |reason| Err(self.lost(reason)))
    }

    /// See [`Loss::CommitUnknown`].
    pub(super) fn refuse_after_unknown_commit(&self) -> Result<(), Error> {
        if self.lease.has_unknown_commit() { Err(self.lost(Loss::CommitUnknown)) } else { Ok(()) }
    }

    /// What the database was said to have decided stays decided. A deadline that has passed is no such thing: it is the database that says
    /// whether another process has the lock by now.
    pub(super) fn refuse_after_loss(&self) -> Result<(), Error> {
        match self.lease.told_loss() {
            Some(
                reason @ (Loss::TakenOver
                | Loss::ReleasedByHand
                | Loss::RowDeleted
                | Loss::HeldTooLong
                | Loss::Released),
            ) => Err(self.lost(reason)),
            _ => Ok(()),
        }
    }

    pub(super) fn lost(&self, reason: Loss) -> Error {
        self.lease.lost_error(reason)
    }

    /// What the database said of the lease is that it is not ours. Who has it is asked for a moment.
    pub(super) async fn taken_over(&self) -> Error {
        let (answer, answered) = oneshot::channel();
        let name = self.name().clone();
        let _session_may_be_gone = self.session.send(Request::Look { name, answer });
        if let Ok(Ok(Ok(Some(row)))) = timeout(LOOK_LIMIT, answered).await
            && row.fencing_token > self.lease.key.fencing_token
        {
            self.lease.is_taken_over_by(Box::new(row.into_info(self.name())));
        }
        self.lost(Loss::TakenOver)
    }

    /// Gives up one handle, and releases with the last one.
    pub(crate) async fn give_up(self: Arc<Self>) -> Result<(), Error> {
        self.begin_to_give_up()?.end().await
    }

    /// The same in two steps, so that several are released together.
    pub(super) fn begin_to_give_up(self: Arc<Self>) -> Result<GivenUp, Error> {
        if Arc::strong_count(&self) > 1 {
            self.check()?;
        }
        Arc::into_inner(self).map_or(Ok(GivenUp(None)), Self::begin_release)
    }

    /// Runs work under the lease. When the lease is lost first, the work is dropped where it stands; not when the work
    /// itself has released it, with the commit of a transaction.
    pub(crate) async fn run_until_lost<F: Future>(&self, work: F) -> Result<F::Output, Error> {
        let mut work = std::pin::pin!(work);
        let output = select! {
            biased;
            output = &mut work => output,
            reason = self.lease.lost() => match reason {
                Loss::Released => work.await,
                reason => return Err(self.lost(reason)),
            },
        };
        match self.lease.loss() {
            None | Some(Loss::Released) => Ok(output),
            // Work that blocked the runtime, or was paused together with it, may finish after the lease did.
            Some(reason) => Err(self.lost(reason)),
        }
    }

    /// As the last owner.
    pub(crate) async fn release(self) -> Result<(), Error> {
        self.begin_release()?.end().await
    }

    fn begin_release(self) -> Result<GivenUp, Error> {
        if self.released.swap(true, Ordering::SeqCst) || self.queues.hand_on(&self) {
            return Ok(GivenUp(None));
        }
        if self.was_taken_back() {
            return Err(self.lost(Loss::HeldTooLong));
        }
        let (answer, answered) = oneshot::channel();
        let request = Request::Release { lease: Arc::clone(&self.lease), answer: Some(answer) };
        self.session.send(request).map_err(|_| self.lost(Loss::Closed))?;
        Ok(GivenUp(Some((self, answered))))
    }

    async fn answer(
        &self,
        answered: oneshot::Receiver<Result<(), Error>>,
        action: &'static str,
    ) -> Result<(), Error> {
        let about = (action, Some(self.name()));
        let answer = answer_to(&self.session, answered, ASK_LIMIT, Instant::now(), about).await;
        answer.unwrap_or_else(|| Err(self.lost(Loss::Closed)))
    }

    /// The session has released it already, or is about to.
    fn was_taken_back(&self) -> bool {
        self.lease.told_loss() == Some(Loss::HeldTooLong)
    }

    /// The database has said that the lease is gone: this holder is told at once, and so is everything that waits for that.
    pub(crate) fn is_lost(&self) {
        self.lease.ends(Loss::TakenOver);
        let _session_may_be_gone = self.session.send(Request::Lost { lease: Arc::clone(&self.lease) });
    }

    /// From now on until the database tells, nobody knows whether a transaction has released it. The watchdog asks as soon
    /// as this is dropped.
    pub(super) fn doubt(hold: KeptByTransaction) -> InDoubt {
        hold.lease.doubt_begins();
        InDoubt(hold)
    }

    /// A transaction that has committed released it.
    pub(crate) fn was_released(&self, call: Option<Call>) {
        self.released.store(true, Ordering::SeqCst);
        // In this order: what the next one asks for comes to the session after the end of this one.
        let _session_may_be_gone =
            self.session.send(Request::Released { lease: Arc::clone(&self.lease), call });
        self.lease.pass_turn();
    }
}

/// A handle that is given up. The release, if there is one, is under way.
pub(super) struct GivenUp(Option<(Hold, oneshot::Receiver<Result<(), Error>>)>);

impl GivenUp {
    pub(super) async fn end(self) -> Result<(), Error> {
        match self.0 {
            Some((hold, answered)) => hold.answer(answered, "release").await,
            None => Ok(()),
        }
    }
}

/// A statement that releases the lease with its transaction is under way.
pub(super) struct InDoubt(KeptByTransaction);

impl Drop for InDoubt {
    fn drop(&mut self) {
        self.0.lease.doubt_can_be_settled();
        let _session_may_be_gone =
            self.0.session.send(Request::ReleasedIn { lease: Arc::clone(&self.0.lease) });
    }
}

impl Held for Hold {
    const KIND: Kind = Kind::Insert;

    fn check(&self) -> Result<(), Error> {
        Self::check(self)
    }

    fn loss(&self) -> Option<watch::Receiver<Option<Loss>>> {
        Some(self.lease.loss_told())
    }
}

/// What a guarded transaction keeps of a lease, so that nobody gets the lock before it has ended.
pub(super) struct KeptByTransaction(Arc<Hold>);

impl KeptByTransaction {
    pub(super) fn new(hold: &Arc<Hold>) -> Self {
        hold.transactions.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(hold))
    }

    pub(super) fn is(&self, hold: &Arc<Hold>) -> bool {
        Arc::ptr_eq(&self.0, hold)
    }
}

impl Clone for KeptByTransaction {
    fn clone(&self) -> Self {
        Self::new(&self.0)
    }
}

impl std::ops::Deref for KeptByTransaction {
    type Target = Hold;

    fn deref(&self) -> &Hold {
        &self.0
    }
}

impl Drop for KeptByTransaction {
    fn drop(&mut self) {
        self.0.transactions.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if !self.released.load(Ordering::SeqCst) && !self.queues.hand_on(self) && !self.was_taken_back() {
            // Fails only when the session is gone, which has released it.
            let _ = self.session.send(Request::Release { lease: Arc::clone(&self.lease), answer: None });
        }
    }
}
