//! The `Locks` that annotated functions find without being handed one: of the task, else of the process.

use std::any::Any;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::database::LockDatabase;
use crate::insert::Hold;
use crate::row::RowGuard;
use crate::{Error, Locks};

static INSTALLED: OnceLock<Arc<dyn AnyLocks>> = OnceLock::new();

tokio::task_local! {
    static SCOPED: Arc<dyn AnyLocks>;
}

pub(crate) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Locks of whatever database.
pub(crate) trait AnyLocks: Send + Sync {
    fn hold<'a>(
        &'a self,
        name: &'a str,
        ttl: Option<Duration>,
        wait: Option<Duration>,
    ) -> BoxFuture<'a, Result<Hold, Error>>;

    fn lock_row<'a>(
        &'a self,
        name: &'a str,
        wait: Option<Duration>,
    ) -> BoxFuture<'a, Result<Box<dyn AnyRowGuard>, Error>>;

    fn as_any(&self) -> &dyn Any;

    fn database(&self) -> &'static str;
}

/// The guard of a row lock in whatever database.
pub(crate) trait AnyRowGuard: Send {
    fn commit(self: Box<Self>) -> BoxFuture<'static, Result<(), Error>>;
}

impl<DB: LockDatabase> AnyLocks for Locks<DB> {
    fn hold<'a>(
        &'a self,
        name: &'a str,
        ttl: Option<Duration>,
        wait: Option<Duration>,
    ) -> BoxFuture<'a, Result<Hold, Error>> {
        Box::pin(self.hold_waiting(name, ttl, wait))
    }

    fn lock_row<'a>(
        &'a self,
        name: &'a str,
        wait: Option<Duration>,
    ) -> BoxFuture<'a, Result<Box<dyn AnyRowGuard>, Error>> {
        Box::pin(async move {
            let lock = self.row_lock(name).wait(wait.unwrap_or(self.default_wait()));
            Ok(Box::new(lock.acquire().await?) as Box<dyn AnyRowGuard>)
        })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn database(&self) -> &'static str {
        DB::NAME
    }
}

impl<DB: LockDatabase> AnyRowGuard for RowGuard<DB> {
    fn commit(self: Box<Self>) -> BoxFuture<'static, Result<(), Error>> {
        Box::pin((*self).commit())
    }
}

/// The ambient `Locks` of the calling task, if there is one.
pub(crate) fn current() -> Option<Arc<dyn AnyLocks>> {
    SCOPED.try_with(Arc::clone).ok().or_else(|| INSTALLED.get().cloned())
}

impl<DB: LockDatabase> Locks<DB> {
    /// Makes this the `Locks` of the whole process, which functions annotated with `#[distributed_lock]` use when they
    /// name none. Once; a program with several databases writes `locks = …` or uses [`scope`](Self::scope).
    ///
    /// # Errors
    ///
    /// [`Error::InvalidOption`] when there is one already, which stays.
    pub fn install(&self) -> Result<(), Error> {
        INSTALLED.set(Arc::new(self.clone())).map_err(|_| Error::InvalidOption {
            option: "install",
            value: "called twice".into(),
            reason: "the process has its `Locks` already; use `locks.scope(..)` for a task",
        })
    }

    /// Runs a future with this as its ambient `Locks`, whatever is installed for the process. Tasks that it spawns do not
    /// inherit it.
    ///
    /// # Cancel safety
    ///
    /// That of the future.
    pub fn scope<F: Future>(&self, future: F) -> impl Future<Output = F::Output> + use<F, DB> {
        SCOPED.scope(Arc::new(self.clone()), future)
    }
}
