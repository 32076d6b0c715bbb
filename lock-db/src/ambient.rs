//! The `Locks` that annotated functions find without being handed one: of the task, else of the process.

use std::any::Any;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::database::LockDatabase;
use crate::error::Loss;
use crate::insert::Hold;
use crate::reentry::{self, Entered, Held};
use crate::row::RowGuard;
use crate::{Error, Kind, Locks, limits};

static INSTALLED: OnceLock<Arc<dyn AnyLocks>> = OnceLock::new();

tokio::task_local! {
    static SCOPED: Arc<dyn AnyLocks>;
}

pub(crate) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Locks of whatever database.
pub(crate) trait AnyLocks: Send + Sync {
    /// An insert lock, entered again if the caller is inside of it.
    fn lease<'a>(
        &'a self,
        name: &'a str,
        ttl: Option<Duration>,
        wait: Option<Duration>,
    ) -> BoxFuture<'a, Result<Entered<Hold>, Error>>;

    /// A row lock in a transaction of its own, entered again if the caller is inside of it.
    fn row<'a>(
        &'a self,
        name: &'a str,
        wait: Option<Duration>,
    ) -> BoxFuture<'a, Result<Entered<OwnTransaction>, Error>>;

    fn as_any(&self) -> &dyn Any;

    fn database(&self) -> &'static str;
}

/// A row lock in a transaction that nobody but annotated functions knows of. It ends with the last one that is inside.
pub(crate) struct OwnTransaction {
    /// Never locked: it makes a guard shareable that is not, as SQLite's connections are not.
    guard: Mutex<Box<dyn AnyRowGuard>>,
}

impl OwnTransaction {
    /// Gives up one handle, and commits with the last one.
    ///
    /// # Errors
    ///
    /// As [`RowGuard::commit`].
    pub(crate) async fn give_up(self: Arc<Self>) -> Result<(), Error> {
        match Arc::into_inner(self) {
            Some(last) => last.guard.into_inner().unwrap_or_else(PoisonError::into_inner).commit().await,
            None => Ok(()),
        }
    }
}

impl Held for OwnTransaction {
    const KIND: Kind = Kind::Row;

    /// That the transaction is gone shows when it is committed.
    fn check(&self) -> Result<(), Error> {
        Ok(())
    }

    fn loss(&self) -> Option<watch::Receiver<Option<Loss>>> {
        None
    }
}

/// The guard of a row lock in whatever database.
pub(crate) trait AnyRowGuard: Send {
    fn commit(self: Box<Self>) -> BoxFuture<'static, Result<(), Error>>;
}

impl<DB: LockDatabase> AnyLocks for Locks<DB> {
    fn lease<'a>(
        &'a self,
        name: &'a str,
        ttl: Option<Duration>,
        wait: Option<Duration>,
    ) -> BoxFuture<'a, Result<Entered<Hold>, Error>> {
        Box::pin(self.enter(name, ttl, wait))
    }

    fn row<'a>(
        &'a self,
        name: &'a str,
        wait: Option<Duration>,
    ) -> BoxFuture<'a, Result<Entered<OwnTransaction>, Error>> {
        Box::pin(async move {
            let lock = self.reentry_key(name)?;
            let wait = limits::check_wait(wait.unwrap_or(self.default_wait()))?;
            if let Some(entered) = reentry::enter(&lock, wait).await? {
                return Ok(entered);
            }
            let guard = self.row_lock(name).wait(wait).acquire().await?;
            Ok(Entered::first(lock, Arc::new(OwnTransaction { guard: Mutex::new(Box::new(guard)) })))
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
