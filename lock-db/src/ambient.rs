//! The `Locks` that annotated functions find without being handed one: of the task, else of the process.

use std::any::Any;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::__private::Asked;
use crate::database::LockDatabase;
use crate::error::{Loss, NoReentry};
use crate::reentry::{self, Entered, Held, Inside, Lock};
use crate::row::RowGuard;
use crate::{Error, Kind, Lease, Locks, limits};

pub use self::lease::AmbientLease;

#[path = "ambient/lease.rs"]
mod lease;

static INSTALLED: OnceLock<Arc<dyn AnyLocks>> = OnceLock::new();

tokio::task_local! {
    static SCOPED: Arc<dyn AnyLocks>;
}

pub(crate) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Locks of whatever database.
pub(crate) trait AnyLocks: Send + Sync {
    /// An insert lock, entered again if the caller is inside of it.
    fn any_lease<'a>(&'a self, asked: Asked<'a>) -> BoxFuture<'a, Result<(AmbientLease, Inside), Error>>;

    /// A row lock in a transaction of its own, entered again if the caller is inside of it.
    fn any_row<'a>(&'a self, asked: Asked<'a>)
    -> BoxFuture<'a, Result<(Arc<OwnTransaction>, Inside), Error>>;

    fn as_any(&self) -> &dyn Any;

    fn database(&self) -> &'static str;
}

/// A row lock in a transaction that nobody but annotated functions knows of. It ends with the last one that is inside.
pub(crate) struct OwnTransaction {
    /// The mutex is never waited for: it makes a guard shareable that is not, as SQLite's connections are not. Empty as
    /// long as a body works with the guard.
    guard: Mutex<Option<Box<dyn AnyRowGuard>>>,
}

impl OwnTransaction {
    fn new(guard: impl AnyRowGuard + 'static) -> Self {
        Self { guard: Mutex::new(Some(Box::new(guard))) }
    }

    /// The guard, for the body of a function.
    ///
    /// # Errors
    ///
    /// [`Error::Reentry`] when another body works with it.
    pub(crate) fn take<DB: LockDatabase>(&self, name: &str) -> Result<RowGuard<DB>, Error> {
        let in_use = || Error::Reentry { name: name.to_owned(), reason: NoReentry::GuardInUse };
        let guard = self.slot().take().ok_or_else(in_use)?;
        // A frame belongs to one `Locks`, and so to one database.
        let gone = |_| Error::Lost { name: name.to_owned(), reason: Loss::TransactionEnded };
        guard.into_any().downcast::<RowGuard<DB>>().map(|guard| *guard).map_err(gone)
    }

    pub(crate) fn put_back<DB: LockDatabase>(&self, guard: RowGuard<DB>) {
        *self.slot() = Some(Box::new(guard));
    }

    fn slot(&self) -> MutexGuard<'_, Option<Box<dyn AnyRowGuard>>> {
        self.guard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives up one handle. With the last one the transaction ends: it is committed if what its function returned
    /// `stands`, else rolled back.
    ///
    /// # Errors
    ///
    /// As [`RowGuard::commit`].
    pub(crate) async fn give_up(self: Arc<Self>, stands: bool) -> Result<(), Error> {
        let last = Arc::into_inner(self).map(|own| own.guard.into_inner());
        let guard = last.and_then(|guard| guard.unwrap_or_else(PoisonError::into_inner));
        match guard {
            Some(guard) if stands => guard.commit().await,
            Some(guard) => {
                if let Err(error) = guard.rollback().await {
                    // The connection is gone, which rolls back, too; and the function says what went wrong before.
                    tracing::debug!(%error, "rolling back");
                }
                Ok(())
            }
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

    fn rollback(self: Box<Self>) -> BoxFuture<'static, Result<(), Error>>;

    fn into_any(self: Box<Self>) -> Box<dyn Any>;
}

impl<DB: LockDatabase> AnyLocks for Locks<DB> {
    fn any_lease<'a>(&'a self, asked: Asked<'a>) -> BoxFuture<'a, Result<(AmbientLease, Inside), Error>> {
        Box::pin(async move {
            let (lease, inside) = self.annotated_lease(asked).await?;
            Ok((AmbientLease { lease: Box::new(lease) }, inside))
        })
    }

    fn any_row<'a>(
        &'a self,
        asked: Asked<'a>,
    ) -> BoxFuture<'a, Result<(Arc<OwnTransaction>, Inside), Error>> {
        Box::pin(async move {
            let Entered { held, inside } = self.annotated_row(asked).await?;
            Ok((held, inside))
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

    fn rollback(self: Box<Self>) -> BoxFuture<'static, Result<(), Error>> {
        Box::pin((*self).rollback())
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

/// The ambient `Locks` of the calling task, if there is one.
pub(crate) fn current() -> Option<Arc<dyn AnyLocks>> {
    SCOPED.try_with(Arc::clone).ok().or_else(|| INSTALLED.get().cloned())
}

/// What annotated functions take.
impl<DB: LockDatabase> Locks<DB> {
    pub(crate) async fn annotated_lease(&self, asked: Asked<'_>) -> Result<(Lease<DB>, Inside), Error> {
        let lock = self.reentry_key(asked.name)?;
        limits::check_ttl(asked.ttl.unwrap_or(self.default_ttl()))?;
        let at_least = limits::check_at_least(asked.at_least)?;
        let patience = asked.patience(self.default_wait())?;
        let entered = if let Some(entered) = self.nested(&lock, asked, patience).await? {
            entered
        } else {
            let hold = self.hold(asked.name, asked.ttl, patience, None).await?;
            // Whoever waits is answered with a lease or an error; nothing comes of a session that ends.
            let none = || if patience.is_some() { Error::Closed } else { asked.taken_elsewhere() };
            taken(lock, hold.ok_or_else(none)?, asked)
        };
        entered.held.keep_for(at_least);
        Ok((Lease::new(entered.held, self.clone()), entered.inside))
    }

    async fn annotated_row(&self, asked: Asked<'_>) -> Result<Entered<OwnTransaction>, Error> {
        let lock = self.reentry_key(asked.name)?;
        let patience = asked.patience(self.default_wait())?;
        if let Some(entered) = self.nested(&lock, asked, patience).await? {
            return Ok(entered);
        }
        let request = self.row_lock(asked.name);
        let guard = if let Some(wait) = patience {
            request.wait(wait).acquire().await?
        } else {
            request.try_acquire().await?.ok_or_else(|| asked.taken_elsewhere())?
        };
        Ok(taken(lock, OwnTransaction::new(guard), asked))
    }

    /// Enters the lock again that the caller is inside of, unless the function does not want that.
    async fn nested<H: Held>(
        &self,
        lock: &Lock,
        asked: Asked<'_>,
        patience: Option<Duration>,
    ) -> Result<Option<Entered<H>>, Error> {
        if asked.is_reentrant {
            return reentry::enter(lock, patience.unwrap_or_default()).await;
        }
        reentry::refuse_nested(lock).map(|()| None)
    }
}

fn taken<H: Held>(lock: Lock, held: H, asked: Asked<'_>) -> Entered<H> {
    let held = Arc::new(held);
    if asked.is_reentrant { Entered::first(lock, held) } else { Entered::only(lock, held) }
}

pub(crate) fn not_installed(name: &str, reason: String) -> Error {
    Error::NotInstalled { name: name.to_owned(), reason }
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
