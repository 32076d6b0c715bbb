//! Watching a lease from tasks that do not hold it.

use std::sync::{Arc, Weak};

use tokio::select;
use tokio::sync::watch;

use crate::error::Loss;
use crate::session::{LeaseHandle, LeaseState};

/// Observes whether a lease is held, without holding it. For the child tasks of a holder, from
/// [`Lease::watch`](crate::Lease::watch).
///
/// Cloning is cheap. A watch keeps neither the lock nor the connections of its `Locks`.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let locks = lock_db::testing::locks().await?;
/// let lease = locks.insert_lock("report:daily").acquire().await?;
/// let watch = lease.watch();
/// let child = tokio::spawn(async move {
///     watch.lost().await;
///     watch.loss()
/// });
/// lease.release().await?;
/// assert_eq!(child.await?, Some(lock_db::Loss::Released));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct LeaseWatch {
    state: Arc<LeaseState>,
    handle: Weak<LeaseHandle>,
    /// How the holder ended.
    ended: watch::Receiver<Option<Loss>>,
}

impl LeaseWatch {
    pub(super) fn new(handle: &Arc<LeaseHandle>) -> Self {
        Self { state: Arc::clone(&handle.lease), handle: Arc::downgrade(handle), ended: handle.ended() }
    }

    /// Whether the lease is held, as [`Lease::is_held`](crate::Lease::is_held). It is `false` once
    /// the lease was released.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.loss().is_none()
    }

    /// How the lease was lost. `None` while it is held; [`Loss::Released`] after a release.
    #[must_use]
    pub fn loss(&self) -> Option<Loss> {
        let ended = *self.ended.borrow();
        ended.or_else(|| {
            // The state is that of the next holder once the handle is gone.
            let is_gone = self.handle.strong_count() == 0;
            if is_gone { Some(Loss::Released) } else { self.state.loss() }
        })
    }

    /// Resolves when the lease is lost or released.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time, and this may be called any number of times.
    pub async fn lost(&self) {
        let mut ended = self.ended.clone();
        select! {
            biased;
            // An error says that the handle is gone.
            _ended = ended.wait_for(Option::is_some) => {}
            _loss = self.state.lost() => {}
        }
    }
}
