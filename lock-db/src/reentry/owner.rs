//! The owner of the locks that a piece of code runs under, carried by hand.

use std::sync::Arc;

use super::frame::Frames;

/// What the running code may enter again: the locks whose [`run`](crate::InsertLock::run) or annotated function it is
/// inside of.
///
/// A task that is spawned starts with none, because it may well outlive the holder; it contends for the lock like anybody
/// else, and waits for its own parent. An owner that is carried over makes it part of the holder:
///
/// ```no_run
/// # async fn example<DB: lock_db::LockDatabase>(locks: lock_db::Locks<DB>) -> Result<(), lock_db::Error> {
/// use lock_db::{Error, Owner};
///
/// locks
///     .insert_lock("report:daily")
///     .run(async |_lease| {
///         let inner = locks.insert_lock("report:daily");
///         let part = async move { inner.run(async |lease| Ok::<_, Error>(lease.hold_count())).await };
///         if let Some(owner) = Owner::current() {
///             let part = tokio::spawn(owner.scope(part));
///             assert!(matches!(part.await, Ok(Ok(2))));
///         }
///         Ok::<_, Error>(())
///     })
///     .await
/// # }
/// ```
///
/// It works as long as the lock is held, which it does not prolong: afterwards, entering fails with
/// [`Error::Reentry`](crate::Error::Reentry), or [`Error::Lost`](crate::Error::Lost) when the lock was lost. A call that
/// got in before that holds the lock until it ends, as every nested call does. The calls that enter by way of one
/// owner take turns.
///
/// A call that enters a row lock (`mode = row`) shares its transaction: it is committed only if all functions that share
/// it return `Ok`. The function that took the lock returns when the calls inside have ended.
///
/// Explicit guards ([`Lease`](crate::Lease), [`RowGuard`](crate::RowGuard)) and locks in a transaction of the caller
/// (`tx = …`) are not part of it.
#[derive(Clone)]
pub struct Owner {
    frames: Arc<Frames>,
}

impl Owner {
    /// The owner that the calling code runs under. `None` when it is inside of no lock.
    #[must_use]
    pub fn current() -> Option<Self> {
        Frames::current().map(|frames| Self { frames })
    }

    /// Runs a future under this owner, in addition to what it is inside of already, which counts first. The `Locks` of
    /// [`Locks::scope`](crate::Locks::scope) are carried over separately.
    ///
    /// # Cancel safety
    ///
    /// That of the future.
    pub fn scope<F: Future>(&self, future: F) -> impl Future<Output = F::Output> + use<F> {
        let carried = Arc::clone(&self.frames);
        async move {
            let frames = match Frames::current() {
                None => carried,
                Some(current) => current.within(&carried),
            };
            frames.scope(future).await
        }
    }
}

impl std::fmt::Debug for Owner {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Owner").field(&self.frames.names().collect::<Vec<_>>()).finish()
    }
}
