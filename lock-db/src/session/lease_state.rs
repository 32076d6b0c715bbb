//! What the session and the guard of a lease share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::error::Loss;
use crate::secret::Secret;

/// A lease as its guard sees it.
#[derive(Debug)]
pub(crate) struct LeaseState {
    pub(super) key: u64,
    pub(crate) name: Arc<str>,
    pub(crate) secret: Secret,
    pub(crate) fencing_token: i64,
    deadline: Deadline,
    lost: watch::Receiver<Option<Loss>>,
}

impl LeaseState {
    /// The sender stays with the session: if its thread ever dies, the lease counts as lost.
    pub(super) fn new(
        key: u64,
        name: Arc<str>,
        secret: Secret,
        fencing_token: i64,
        deadline: Instant,
    ) -> (Arc<Self>, watch::Sender<Option<Loss>>) {
        let (sender, lost) = watch::channel(None);
        let state = Self { key, name, secret, fencing_token, deadline: Deadline::new(deadline), lost };
        (Arc::new(state), sender)
    }

    pub(super) fn extend(&self, deadline: Instant) {
        self.deadline.extend(deadline);
    }

    /// `None` while the lease is held. A loss that the session has not noticed yet is seen by the clock.
    pub(crate) fn loss(&self) -> Option<Loss> {
        let noticed = *self.lost.borrow();
        match noticed {
            None if self.lost.has_changed().is_err() || self.deadline.is_past() => Some(Loss::NotRenewed),
            noticed => noticed,
        }
    }

    /// Where a loss is told, without keeping anything.
    pub(crate) fn loss_told(&self) -> watch::Receiver<Option<Loss>> {
        self.lost.clone()
    }

    /// Resolves when the lease is gone.
    pub(crate) async fn lost(&self) -> Loss {
        let mut lost = self.lost.clone();
        match lost.wait_for(Option::is_some).await {
            Ok(loss) => loss.unwrap_or(Loss::NotRenewed),
            Err(_session_is_gone) => Loss::NotRenewed,
        }
    }
}

/// A moment that may move forward, read and written without a lock.
#[derive(Debug)]
struct Deadline {
    origin: Instant,
    micros: AtomicU64,
}

impl Deadline {
    fn new(deadline: Instant) -> Self {
        Self { origin: deadline, micros: AtomicU64::new(0) }
    }

    fn extend(&self, deadline: Instant) {
        let later = deadline.saturating_duration_since(self.origin).as_micros();
        self.micros.fetch_max(u64::try_from(later).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn is_past(&self) -> bool {
        Instant::now() >= self.origin + Duration::from_micros(self.micros.load(Ordering::Relaxed))
    }
}
