//! The state that the session shares with the guard of a lease.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use chrono::Utc;
use tokio::sync::watch;

use super::hold_time::HoldTime;
use super::local_queue::Permit;
use crate::database::{Cluster, LeaseKey, ReleaseClaim};
use crate::error::Loss;
use crate::name::Name;
use crate::sync::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Mutex, MutexGuard};
use crate::{Error, Holder, Kind, LockInfo};

/// A lease as its guard sees it, and the guards of the holders that it is handed on to.
#[derive(Debug)]
pub(crate) struct LeaseState {
    pub(super) number: u64,
    /// Its fencing token is the last one of the token range.
    pub(crate) key: LeaseKey,
    pub(crate) ttl: Duration,
    /// The size of the token range, and how many of its fencing tokens were used.
    tokens: u32,
    tokens_used: AtomicU32,
    /// How many holders may have it one after the other.
    holders: u32,
    /// Transactions of former holders that may still commit under this lease.
    open_commits: AtomicUsize,
    /// Whether one of them has an outcome that will never be known.
    unknown_commit: AtomicBool,
    /// How many guarded commits are in progress.
    commits_under_way: watch::Sender<usize>,
    doubts: Mutex<Doubts>,
    /// Kept until other callers of this process may ask for the lock. It is here because not only
    /// the session knows when that is.
    permit: Mutex<Option<Permit>>,
    hold_time: HoldTime,
    /// How long after the grant no other holder may get the lock, whenever it is released.
    at_least: Mutex<Duration>,
    deadline: LeaseDeadline,
    lost: watch::Receiver<Option<Loss>>,
    /// The database has reported that the row is not ours any more. The session is finding out what
    /// has become of it.
    gone: AtomicBool,
    taken_over_by: OnceLock<Box<LockInfo>>,
    /// The loss that the database reported in a transaction, before the session has heard of it.
    ended: watch::Sender<Option<Loss>>,
}

impl LeaseState {
    /// Creates the state of a new lease. The sender stays with the session: if its thread dies, the
    /// lease counts as lost.
    pub(super) fn new(
        number: u64,
        key: LeaseKey,
        (tokens, holders): (u32, u32),
        ttl: Duration,
        at_most: Option<Duration>,
        deadline: Instant,
        permit: Option<Permit>,
    ) -> (Arc<Self>, watch::Sender<Option<Loss>>) {
        let (sender, lost) = watch::channel(None);
        let state = Self {
            number,
            key,
            ttl,
            tokens,
            tokens_used: AtomicU32::new(1),
            holders,
            open_commits: AtomicUsize::new(0),
            unknown_commit: AtomicBool::new(false),
            commits_under_way: watch::Sender::new(0),
            doubts: Mutex::default(),
            permit: Mutex::new(permit),
            hold_time: HoldTime::new(Instant::now(), at_most),
            at_least: Mutex::default(),
            deadline: LeaseDeadline::new(deadline),
            lost,
            gone: AtomicBool::new(false),
            taken_over_by: OnceLock::new(),
            ended: watch::Sender::new(None),
        };
        (Arc::new(state), sender)
    }

    pub(crate) fn name(&self) -> &Name {
        &self.key.row.name
    }

    /// The request to release it, without a queue entry.
    pub(super) fn release_claim(&self) -> ReleaseClaim {
        let LeaseKey { row, secret, .. } = &self.key;
        ReleaseClaim { name: row.name.clone(), secret: secret.clone(), entry: None }
    }

    /// Passes the permit to the next caller of this process.
    pub(crate) fn pass_permit(&self) {
        let mut permit = self.permit.lock().unwrap_or_else(PoisonError::into_inner);
        // The permit is dropped under the mutex. A thread that finds it gone can rely on it having
        // been passed on.
        drop(permit.take());
    }

    /// The lock as this process knows it, for callers that wait behind it.
    pub(super) fn info(&self, owner: &str) -> LockInfo {
        let (now, held_for) = (Utc::now(), self.hold_time.since().elapsed());
        let since = now - held_for;
        let (fencing_token, expires_in) = (self.last_fencing_token(), Some(self.deadline.left()));
        let holder = Holder { owner: owner.to_owned(), fencing_token, since, expires_in };
        LockInfo {
            name: self.name().given(),
            kind: Kind::Insert,
            owner: owner.to_owned(),
            fencing_token,
            created_at: since,
            acquired_at: since,
            held_until: Some(now + self.deadline.left()),
            expires_in,
            held_for: Some(held_for),
            finished_at: None,
            holders: vec![holder],
            waiting: Vec::new(),
            row_holder: None,
            is_here: true,
        }
    }

    /// The fencing token of the present holder.
    pub(crate) fn last_fencing_token(&self) -> i64 {
        let used = self.tokens_used.load(Ordering::Acquire);
        self.key.fencing_token - i64::from(self.tokens) + i64::from(used)
    }

    /// Takes a fencing token for the next holder.
    pub(crate) fn next_fencing_token(&self) -> i64 {
        self.tokens_used.fetch_add(1, Ordering::AcqRel);
        self.last_fencing_token()
    }

    /// Whether the lease may be handed on to another holder without asking the database. The
    /// present holder must not be able to do anything more under it, and enough time must be left.
    pub(crate) fn may_be_handed_on(&self, now: Instant, time: Duration) -> bool {
        // On another node the next holder might not see yet what this one has committed.
        self.key.server.cluster == Cluster::SinglePrimary
            && self.tokens_used.load(Ordering::Acquire) < self.holders
            && now.saturating_duration_since(self.hold_time.granted()) < time
            && self.open_commits.load(Ordering::Acquire) == 0
            && self.at_least().is_zero()
            && self.deadline.is_later_than(now + self.ttl / 2)
            && self.loss().is_none()
    }

    /// A transaction is verified under this lease. How it ends will not be reported.
    pub(crate) fn mark_verified(&self) {
        self.open_commits.fetch_add(1, Ordering::AcqRel);
    }

    /// A guarded transaction is about to be committed.
    pub(crate) fn begin_commit(self: &Arc<Self>) -> CommitUnderWay {
        self.open_commits.fetch_add(1, Ordering::AcqRel);
        self.commits_under_way.send_modify(|count| *count += 1);
        CommitUnderWay { lease: Arc::clone(self), may_come: true }
    }

    /// Resolves when no guarded commit is in progress.
    pub(crate) async fn commits_have_ended(&self) {
        let mut under_way = self.commits_under_way.subscribe();
        // Can't fail: the sender is a field of `self`.
        let _ended = under_way.wait_for(|count| *count == 0).await;
    }

    /// Whether a commit has an unknown outcome, and so may still be carried out.
    pub(crate) fn has_unknown_commit(&self) -> bool {
        self.unknown_commit.load(Ordering::Acquire)
    }

    /// `false`: too late, the lease was already seen as over.
    pub(super) fn extend(&self, deadline: Instant) -> bool {
        self.deadline.extend(deadline)
    }

    /// The database has renewed a lease for a request that was sent at `sent`.
    pub(super) fn confirm(&self, sent: Instant) {
        let mut doubts = self.doubts();
        // A renewal that was sent before the release was answered may have been answered before the
        // release was carried out.
        if doubts.under_way == 0 {
            doubts.since.take_if(|since| *since < sent);
        }
    }

    /// A statement that releases the lease with its transaction is about to be sent.
    pub(crate) fn begin_doubt(&self) {
        self.doubts().under_way += 1;
    }

    /// The statement was answered, or its caller has gone. Its transaction may still be open.
    pub(crate) fn let_doubt_settle(&self) {
        let mut doubts = self.doubts();
        doubts.under_way = doubts.under_way.saturating_sub(1);
        doubts.since = Some(Instant::now());
    }

    pub(crate) fn is_in_doubt(&self) -> bool {
        let doubts = self.doubts();
        doubts.under_way > 0 || doubts.since.is_some()
    }

    fn doubts(&self) -> MutexGuard<'_, Doubts> {
        self.doubts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No other holder may get the lock for this long from now on.
    pub(crate) fn set_minimum_hold(&self, at_least: Duration) {
        let at_least =
            if at_least.is_zero() { at_least } else { self.hold_time.granted().elapsed() + at_least };
        let mut kept = self.at_least.lock().unwrap_or_else(PoisonError::into_inner);
        *kept = at_least.max(*kept);
    }

    /// Counted from the grant.
    pub(super) fn at_least(&self) -> Duration {
        *self.at_least.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the minimum hold time is not over yet.
    pub(crate) fn is_within_minimum_hold(&self) -> bool {
        self.hold_time.granted().elapsed() < self.at_least()
    }

    /// The holder is done with it, and has no limit any more. `false`: too late, its time was over.
    pub(super) fn end_hold(&self) -> bool {
        self.hold_time.end()
    }

    /// The next holder has it from `now` on. Returns until when it may have it.
    pub(super) fn begin_next_hold(&self, now: Instant, at_most: Option<Duration>) -> Option<Instant> {
        self.hold_time.begin_anew(now, at_most);
        self.hold_time.until()
    }

    pub(super) fn held_since(&self) -> Instant {
        self.hold_time.since()
    }

    /// Until when the present holder may have it, if there is a limit.
    pub(super) fn held_until_at_most(&self) -> Option<Instant> {
        self.hold_time.until()
    }

    /// Whether the present holder has had it for as long as it may.
    pub(super) fn is_held_too_long(&self) -> bool {
        self.hold_time.is_over()
    }

    /// `None` while the lease is held. By the clock, this also detects a loss that the session has
    /// not noticed yet.
    pub(crate) fn loss(&self) -> Option<Loss> {
        match self.reported_loss() {
            None if self.gone.load(Ordering::Acquire) => Some(Loss::TakenOver),
            None if self.is_held_too_long() => Some(Loss::HeldTooLong),
            None if self.lost.has_changed().is_err() || self.deadline.is_past() => Some(Loss::NotRenewed),
            None if self.is_in_doubt() => Some(Loss::Released),
            noticed => noticed,
        }
    }

    /// The lease is not ours from now on. `false`: this was already known.
    pub(super) fn mark_gone(&self) -> bool {
        !self.gone.swap(true, Ordering::AcqRel)
    }

    /// The first process that was seen to have it counts.
    pub(crate) fn set_new_holder(&self, info: Box<LockInfo>) {
        let _known_already = self.taken_over_by.set(info);
    }

    pub(crate) fn taken_over_by(&self) -> Option<&LockInfo> {
        self.taken_over_by.get().map(|info| &**info)
    }

    /// The error for its holder.
    pub(crate) fn lost_error(&self, reason: Loss) -> Error {
        let taken_over_by = self
            .taken_over_by
            .get()
            .filter(|_| matches!(reason, Loss::TakenOver | Loss::ForceReleased))
            .cloned();
        Error::Lost { name: self.name().given(), reason, taken_over_by }
    }

    /// The loss that was reported, if there is one.
    pub(crate) fn reported_loss(&self) -> Option<Loss> {
        let ended = *self.ended.borrow();
        ended.or_else(|| *self.lost.borrow())
    }

    /// The database has reported that the lease is over. The session notifies those that wait for
    /// this.
    pub(crate) fn report_loss(&self, loss: Loss) {
        // A lease that was taken back keeps that reason: the database then also reports it as not
        // ours.
        if self.reported_loss() != Some(Loss::HeldTooLong) {
            self.ended.send_replace(Some(loss));
        }
    }

    /// A channel on which a loss is reported. It does not keep the lease.
    pub(crate) fn loss_reports(&self) -> watch::Receiver<Option<Loss>> {
        self.lost.clone()
    }

    /// Resolves when the lease is gone.
    pub(crate) async fn lost(&self) -> Loss {
        let (mut lost, mut ended) = (self.lost.clone(), self.ended.subscribe());
        let loss = tokio::select! {
            biased;
            // Can't fail: the sender is a field of `self`.
            ended = ended.wait_for(Option::is_some) => ended.map(|loss| *loss),
            // An error means that the session is gone.
            lost = lost.wait_for(Option::is_some) => lost.map(|loss| *loss),
        };
        loss.ok().flatten().unwrap_or(Loss::NotRenewed)
    }
}

/// A commit whose outcome is not known yet. If this is dropped first, the outcome stays unknown.
#[derive(Debug)]
pub(crate) struct CommitUnderWay {
    lease: Arc<LeaseState>,
    may_come: bool,
}

impl CommitUnderWay {
    /// The commit was carried out.
    pub(crate) fn mark_carried_out(mut self) {
        self.may_come = false;
        self.lease.open_commits.fetch_sub(1, Ordering::AcqRel);
    }

    /// The commit was refused.
    pub(crate) fn mark_refused(mut self) {
        self.may_come = false;
    }
}

impl Drop for CommitUnderWay {
    fn drop(&mut self) {
        if self.may_come {
            self.lease.unknown_commit.store(true, Ordering::Release);
        }
        self.lease.commits_under_way.send_modify(|count| *count = count.saturating_sub(1));
    }
}

/// Whether a transaction has released the lease. This is known when the transaction ends.
#[derive(Debug, Default)]
struct Doubts {
    /// How many statements that release it are in flight.
    under_way: usize,
    /// A renewal that is sent after this moment settles the doubt, if no such statement is in
    /// flight.
    since: Option<Instant>,
}

/// A moment that may move forward until it is seen to have passed. Read and written without a lock.
#[derive(Debug)]
struct LeaseDeadline {
    origin: Instant,
    /// Microseconds after the origin. `PAST` is final, once the deadline was seen as past.
    micros: AtomicU64,
}

const PAST: u64 = u64::MAX;

impl LeaseDeadline {
    fn new(deadline: Instant) -> Self {
        Self { origin: deadline, micros: AtomicU64::new(0) }
    }

    /// `false`: the deadline was already seen as past.
    fn extend(&self, deadline: Instant) -> bool {
        let later = deadline.saturating_duration_since(self.origin).as_micros();
        let later = u64::try_from(later).unwrap_or(PAST - 1);
        let extended = |micros| (micros != PAST).then_some(later.max(micros));
        self.micros.fetch_update(Ordering::AcqRel, Ordering::Acquire, extended).is_ok()
    }

    fn is_later_than(&self, moment: Instant) -> bool {
        match self.micros.load(Ordering::Acquire) {
            PAST => false,
            micros => self.origin + Duration::from_micros(micros) > moment,
        }
    }

    fn left(&self) -> Duration {
        match self.micros.load(Ordering::Acquire) {
            PAST => Duration::ZERO,
            micros => (self.origin + Duration::from_micros(micros)).saturating_duration_since(Instant::now()),
        }
    }

    fn is_past(&self) -> bool {
        let mut micros = self.micros.load(Ordering::Acquire);
        loop {
            if micros == PAST {
                return true;
            }
            if Instant::now() < self.origin + Duration::from_micros(micros) {
                return false;
            }
            match self.micros.compare_exchange(micros, PAST, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return true,
                Err(extended) => micros = extended,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::database::{RowKey, Server};
    use crate::secret::Secret;

    const TTL: Duration = Duration::from_hours(1);

    #[test]
    fn no_answer_settles_a_doubt_while_the_release_is_in_flight() {
        let key = LeaseKey {
            row: RowKey { name: "a".into(), id: 1 },
            secret: Secret::generate().unwrap(),
            fencing_token: 1,
            mark: 0,
            ttl: TTL,
            server: Server::for_tests(),
        };
        let (lease, _lost) = LeaseState::new(1, key, (1, 1), TTL, None, Instant::now() + TTL, None);
        lease.begin_doubt();
        // Sent after the release, and answered before the release was carried out.
        lease.confirm(Instant::now());
        assert_eq!(lease.loss(), Some(Loss::Released));
        let asked_before = Instant::now();
        lease.let_doubt_settle();
        lease.confirm(asked_before);
        assert_eq!(lease.loss(), Some(Loss::Released));
        lease.confirm(Instant::now() + Duration::from_millis(1));
        assert_eq!(lease.loss(), None);
    }

    #[test]
    fn a_deadline_that_was_seen_to_pass_stays_past() {
        let now = Instant::now();
        let deadline = LeaseDeadline::new(now + Duration::from_hours(1));
        assert!(!deadline.is_past());
        assert!(deadline.extend(now + Duration::from_hours(2)));
        assert!(!deadline.is_past());

        let deadline = LeaseDeadline::new(now);
        assert!(deadline.extend(now + Duration::from_hours(1)), "nobody has looked yet");
        assert!(!deadline.is_past());

        let deadline = LeaseDeadline::new(now);
        assert!(deadline.is_past());
        assert!(!deadline.extend(now + Duration::from_hours(1)));
        assert!(deadline.is_past());
    }
}
