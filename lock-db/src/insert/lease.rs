//! The guard of an insert lock.

use std::sync::Arc;

use tokio::select;
use tokio::sync::{mpsc, oneshot, watch};

use crate::database::LockDatabase;
use crate::error::Loss;
use crate::reentry::Held;
use crate::session::{LeaseState, Request};
use crate::{Error, Kind, Locks};

/// An insert lock that is held, and renewed in the background at a third of its TTL as long as this exists.
///
/// Dropping it releases the lock in the background: it only sends a message, so it never blocks, works outside of any
/// runtime, and others get the lock a moment later. [`release`](Self::release) waits for that and says whether the
/// lock was still ours. What could not be released when the process ended is free after its TTL.
///
/// A lease protects *work* as long as it [is held](Self::is_held). Whoever is paused for longer than the TTL has lost it
/// by then, and finds out only afterwards: what such a process still sends to other systems is told apart by the
/// [fencing token](Self::fencing_token).
///
/// The clock behind `is_held` is the operating system's monotonic clock, which stands still while a machine is
/// suspended.
#[must_use = "the lock is released as soon as the lease is dropped"]
#[clippy::has_significant_drop]
pub struct Lease<DB: LockDatabase> {
    hold: Arc<Hold>,
    locks: Locks<DB>,
}

impl<DB: LockDatabase> Lease<DB> {
    pub(super) fn new(hold: Arc<Hold>, locks: Locks<DB>) -> Self {
        Self { hold, locks }
    }

    /// The name of the lock.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.hold.lease.name
    }

    /// The number of this grant. Every later grant of the same name has a larger one, for ever, so a resource that
    /// remembers the largest number it has seen can refuse a holder that was overtaken.
    ///
    /// It begins near the microseconds since 1970 at which the name was first used.
    #[must_use]
    pub fn fencing_token(&self) -> i64 {
        self.hold.lease.fencing_token
    }

    /// The secret of this acquisition: 128 random bits as 32 hexadecimal digits, as it stands in the column
    /// `secret_key`. Who knows it can release the lock, so it belongs in no log.
    #[must_use]
    pub fn secret_key(&self) -> &str {
        self.hold.lease.secret.as_str()
    }

    /// Whether the lock is ours, by what the database last confirmed and a deadline on the local monotonic clock that
    /// counts from before the request for it was sent. Asks nobody and takes no time.
    ///
    /// Once `false` it stays `false`.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.hold.lease.loss().is_none()
    }

    /// How many handles hold this lock: one, and one more for each [`reenter`](Self::reenter) that is not dropped yet and
    /// for each nested call of [`run`](crate::InsertLock::run) or of an annotated function that is inside.
    #[must_use]
    pub fn hold_count(&self) -> usize {
        Arc::strong_count(&self.hold)
    }

    /// Resolves when the lock is lost: it was not renewed in time, somebody else has it, or the `Locks` was closed.
    ///
    /// Resolves by time alone, also when the database does not answer and the application's runtime was blocked.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time, and called as often as you like: a loss is final.
    pub async fn lost(&self) {
        self.hold.lease.lost().await;
    }

    /// Another handle to the same lock, without asking the database. The lock is released when the last one is gone.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when there is nothing left to enter.
    pub fn reenter(&self) -> Result<Self, Error> {
        self.hold.check()?;
        Ok(Self { hold: Arc::clone(&self.hold), locks: self.locks.clone() })
    }

    /// Releases the lock and waits until the database has confirmed it: others can take it from then on. On a handle
    /// that is not the last one this only gives up the handle.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when the lock was not ours any more: what was done under it may have overlapped with somebody
    /// else. [`Error::Database`] when the database confirms nothing for five seconds or a TTL; the lock is then free
    /// after its TTL at the latest.
    ///
    /// # Cancel safety
    ///
    /// The release goes on when the future is dropped; only the answer is lost.
    pub async fn release(self) -> Result<(), Error> {
        self.hold.give_up().await
    }

    pub(super) async fn run_until_lost<F: Future>(&self, work: F) -> Result<F::Output, Error> {
        self.hold.run_until_lost(work).await
    }
}

impl<DB: LockDatabase> std::fmt::Debug for Lease<DB> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Lease")
            .field("name", &self.name())
            .field("fencing_token", &self.fencing_token())
            .field("is_held", &self.is_held())
            .field("hold_count", &self.hold_count())
            .finish_non_exhaustive()
    }
}

/// What keeps a lease: the last owner of this releases it.
pub(crate) struct Hold {
    lease: Arc<LeaseState>,
    /// Also keeps the session alive.
    session: mpsc::UnboundedSender<Request>,
    released: bool,
}

impl Hold {
    pub(crate) fn new(lease: Arc<LeaseState>, session: mpsc::UnboundedSender<Request>) -> Self {
        Self { lease, session, released: false }
    }

    /// Fails when the lease is lost.
    fn check(&self) -> Result<(), Error> {
        match self.lease.loss() {
            None => Ok(()),
            Some(reason) => Err(Error::Lost { name: self.lease.name.to_string(), reason }),
        }
    }

    /// Gives up one handle, and releases with the last one.
    pub(crate) async fn give_up(self: Arc<Self>) -> Result<(), Error> {
        if Arc::strong_count(&self) > 1 {
            self.check()?;
        }
        match Arc::into_inner(self) {
            Some(hold) => hold.release().await,
            None => Ok(()),
        }
    }

    /// Runs work under the lease. When the lease is lost first, the work is dropped where it stands.
    pub(crate) async fn run_until_lost<F: Future>(&self, work: F) -> Result<F::Output, Error> {
        let output = select! {
            biased;
            output = work => output,
            reason = self.lease.lost() => {
                return Err(Error::Lost { name: self.lease.name.to_string(), reason });
            }
        };
        // Work that blocked the runtime, or was paused together with it, may finish after the lease did.
        self.check()?;
        Ok(output)
    }

    async fn release(mut self) -> Result<(), Error> {
        self.released = true;
        let (answer, answered) = oneshot::channel();
        let lease = Arc::clone(&self.lease);
        let gone = || Error::Lost { name: lease.name.to_string(), reason: Loss::Closed };
        let request = Request::Release { lease: Arc::clone(&self.lease), answer: Some(answer) };
        self.session.send(request).map_err(|_| gone())?;
        answered.await.unwrap_or_else(|_| Err(gone()))
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

impl Drop for Hold {
    fn drop(&mut self) {
        if !self.released {
            // Fails only when the session is gone, which has released it.
            let _ = self.session.send(Request::Release { lease: Arc::clone(&self.lease), answer: None });
        }
    }
}
