//! Carrying the locks that a piece of code runs under into other tasks.

use std::sync::Arc;

use super::scope::Scopes;

/// The locks that the running code may enter again: those whose [`run`](crate::InsertLock::run) or
/// annotated function it is inside of.
///
/// A spawned task starts without any, because it may outlive the holder. It contends for the lock
/// like any other request, and waits for its own parent. A context that is carried over makes the
/// task part of the holder:
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let of_test = lock_db::testing::locks().await?;
/// # let locks = (*of_test).clone();
/// use lock_db::{Error, ReentryContext};
///
/// locks
///     .insert_lock("report:daily")
///     .run(async |_lease| {
///         let inner = locks.insert_lock("report:daily");
///         let part = async move {
///             inner.run(async |lease| Ok::<_, Error>(lease.hold_count())).await
///         };
///         if let Some(context) = ReentryContext::current() {
///             let part = tokio::spawn(context.scope(part));
///             assert!(matches!(part.await, Ok(Ok(2))));
///         }
///         Ok::<_, Error>(())
///     })
///     .await?;
/// # Ok(())
/// # }
/// ```
///
/// The context works as long as the lock is held, and does not prolong it. Afterwards, entering
/// fails with [`Error::Reentry`](crate::Error::Reentry), or with
/// [`Error::Lost`](crate::Error::Lost) when the lock was lost. A call that has entered before holds
/// the lock until it ends, as every nested call does. Calls that enter through the same context
/// enter one at a time.
///
/// A call that enters a row lock (`mode = row`) shares its transaction. The transaction is
/// committed only if all functions that share it return `Ok`. The function that took the lock
/// returns when the calls inside have ended.
///
/// Explicit guards ([`Lease`](crate::Lease), [`RowGuard`](crate::RowGuard)) and locks in a
/// transaction of the caller (`tx = …`) are not part of a context.
#[derive(Clone)]
pub struct ReentryContext {
    scopes: Arc<Scopes>,
}

impl ReentryContext {
    /// The context of the calling code. `None` when the code is inside no lock.
    #[must_use]
    pub fn current() -> Option<Self> {
        Scopes::current().map(|scopes| Self { scopes })
    }

    /// Runs a future under this context, in addition to the locks that the calling code is inside
    /// of, which take precedence. The `Locks` of [`Locks::scope`](crate::Locks::scope) are carried
    /// over separately.
    ///
    /// # Cancel safety
    ///
    /// As that of the future.
    pub fn scope<F: Future>(&self, future: F) -> impl Future<Output = F::Output> + use<F> {
        let carried = Arc::clone(&self.scopes);
        async move {
            let scopes = match Scopes::current() {
                None => carried,
                Some(current) => current.within(&carried),
            };
            scopes.scope(future).await
        }
    }
}

impl std::fmt::Debug for ReentryContext {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("ReentryContext").field(&self.scopes.names().collect::<Vec<_>>()).finish()
    }
}
