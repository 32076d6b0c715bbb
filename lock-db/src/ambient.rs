//! The `Locks` that annotated functions find without being handed one: of the task, else of the process.

mod body_polls;
#[path = "ambient/lease.rs"]
mod lease;
mod shared_transaction;

use std::any::Any;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use self::shared_transaction::SharedTransaction;
use crate::__private::Asked;
use crate::database::LockDatabase;
use crate::insert::{Hold, LeaseOptions};
use crate::reentry::{self, Entered, Held, Inside, Lock};
use crate::runtime::Runtime;
use crate::{Error, Lease, Locks};

pub use self::lease::AmbientLease;
pub(crate) use self::shared_transaction::RowCall;

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
    fn any_row<'a>(&'a self, asked: Asked<'a>) -> BoxFuture<'a, Result<RowCall, Error>>;

    fn as_any(&self) -> &dyn Any;

    fn database(&self) -> &'static str;

    #[cfg(feature = "testing")]
    fn instance(&self) -> reentry::Instance;
}

impl<DB: LockDatabase> AnyLocks for Locks<DB> {
    fn any_lease<'a>(&'a self, asked: Asked<'a>) -> BoxFuture<'a, Result<(AmbientLease, Inside), Error>> {
        Box::pin(async move {
            let (lease, inside) = self.annotated_lease(asked).await?;
            Ok((AmbientLease { lease: Box::new(lease) }, inside))
        })
    }

    fn any_row<'a>(&'a self, asked: Asked<'a>) -> BoxFuture<'a, Result<RowCall, Error>> {
        Box::pin(self.annotated_row(asked))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn database(&self) -> &'static str {
        DB::NAME
    }

    #[cfg(feature = "testing")]
    fn instance(&self) -> reentry::Instance {
        self.instance()
    }
}

/// The ambient `Locks` of the calling task, if there is one.
pub(crate) fn current() -> Option<Arc<dyn AnyLocks>> {
    SCOPED.try_with(Arc::clone).ok().or_else(|| INSTALLED.get().cloned())
}

/// Which `Locks` the calling task is in the scope of.
#[cfg(feature = "testing")]
pub(crate) fn scoped() -> Option<reentry::Instance> {
    SCOPED.try_with(|locks| locks.instance()).ok()
}

/// What annotated functions take.
impl<DB: LockDatabase> Locks<DB> {
    pub(crate) async fn annotated_lease(&self, asked: Asked<'_>) -> Result<(Lease<DB>, Inside), Error> {
        let lock = self.reentry_key(asked.name)?;
        let Asked { ttl, at_least, at_most, .. } = asked;
        let options = LeaseOptions { ttl, at_least, at_most, fair: None };
        options.check(self.default_ttl())?;
        let patience = asked.patience(self.default_wait())?;
        let entered = if let Some(entered) = self.nested::<Hold>(&lock, asked, patience).await? {
            entered.held.keep_for(at_least);
            entered
        } else {
            let hold = self.hold(asked.name, &options, patience).await?;
            // Whoever waits is answered with a lease or an error; nothing comes of a session that ends.
            let none = || if patience.is_some() { Error::Closed } else { asked.taken_elsewhere() };
            taken(lock, hold.ok_or_else(none)?, asked)
        };
        Ok((Lease::new(entered.held, self.clone()), entered.inside))
    }

    async fn annotated_row(&self, asked: Asked<'_>) -> Result<RowCall, Error> {
        let lock = self.reentry_key(asked.name)?;
        let patience = asked.patience(self.default_wait())?;
        if let Some(entered) = self.nested(&lock, asked, patience).await? {
            return Ok(RowCall::inner(entered));
        }
        let runtime = Runtime::current()?;
        let request = self.row_lock(asked.name);
        #[cfg_attr(not(feature = "testing"), allow(unused_mut))]
        let mut guard = if let Some(wait) = patience {
            request.wait(wait).acquire().await?
        } else {
            request.try_acquire().await?.ok_or_else(|| asked.taken_elsewhere())?
        };
        #[cfg(feature = "testing")]
        guard.is_of_function();
        let (shared, outcome) = SharedTransaction::new(guard, runtime);
        Ok(RowCall::outermost(taken(lock, shared, asked), outcome))
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
