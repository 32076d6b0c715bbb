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
use crate::__private::{Ask, Taken, TakingLock};
use crate::database::LockDatabase;
use crate::error::INSTALL;
use crate::insert::{Hold, LeaseOptions};
use crate::reentry::{self, Entered, Held, Lock};
use crate::runtime::Runtime;
use crate::{Error, Lease, Locks};

pub use self::lease::AmbientLease;
use self::lease::AnyLease;
pub(crate) use self::shared_transaction::RowCall;

static INSTALLED: OnceLock<Arc<dyn AnyLocks>> = OnceLock::new();

tokio::task_local! {
    static SCOPED: Arc<dyn AnyLocks>;
}

pub(crate) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Locks of whatever database.
pub(crate) trait AnyLocks: Send + Sync {
    /// An insert lock, entered again if the caller is inside of it.
    fn lease(self: Arc<Self>, ask: Box<Ask>) -> TakingLock;

    /// A row lock in a transaction of its own, entered again if the caller is inside of it.
    fn row(self: Arc<Self>, ask: Box<Ask>) -> TakingLock;

    /// What the body of an annotated function sees of a hold.
    fn lease_of(&self, hold: Arc<Hold>) -> Box<dyn AnyLease>;

    fn as_any(&self) -> &dyn Any;

    fn database(&self) -> &'static str;

    #[cfg(feature = "testing")]
    fn instance(&self) -> reentry::Instance;
}

impl<DB: LockDatabase> AnyLocks for Locks<DB> {
    fn lease(self: Arc<Self>, ask: Box<Ask>) -> TakingLock {
        Box::pin(async move { Ok(ask.or_skipped(self.annotated_lease(&ask).await)?.map(Taken::lease)) })
    }

    fn row(self: Arc<Self>, ask: Box<Ask>) -> TakingLock {
        Box::pin(async move { Ok(ask.or_skipped(self.annotated_row(&ask).await)?.map(Taken::Row)) })
    }

    fn lease_of(&self, hold: Arc<Hold>) -> Box<dyn AnyLease> {
        Box::new(Lease::new(hold, self.clone()))
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
    async fn annotated_lease(&self, ask: &Ask) -> Result<Entered<Hold>, Error> {
        let lock = self.reentry_key(&ask.name)?;
        let &Ask { ttl, at_least, at_most, .. } = ask;
        let options = LeaseOptions { ttl, at_least, at_most, fair: None };
        options.check(self.default_ttl())?;
        let patience = ask.patience(self.default_wait())?;
        if let Some(entered) = self.nested::<Hold>(&lock, ask, patience).await? {
            entered.held.keep_for(at_least);
            return Ok(entered);
        }
        let hold = self.hold(&ask.name, &options, patience).await?;
        // Whoever waits is answered with a lease or an error; nothing comes of a session that ends.
        let none = || if patience.is_some() { Error::Closed } else { ask.taken_elsewhere() };
        Ok(taken(lock, hold.ok_or_else(none)?, ask))
    }

    async fn annotated_row(&self, ask: &Ask) -> Result<RowCall, Error> {
        let lock = self.reentry_key(&ask.name)?;
        let patience = ask.patience(self.default_wait())?;
        if let Some(entered) = self.nested(&lock, ask, patience).await? {
            return Ok(RowCall::inner(entered));
        }
        let runtime = Runtime::current()?;
        let request = self.row_lock(&*ask.name);
        #[cfg_attr(not(feature = "testing"), allow(unused_mut))]
        let mut guard = if let Some(wait) = patience {
            request.wait(wait).acquire().await?
        } else {
            request.try_acquire().await?.ok_or_else(|| ask.taken_elsewhere())?
        };
        #[cfg(feature = "testing")]
        guard.is_of_function();
        let (shared, outcome) = SharedTransaction::new(guard, runtime);
        Ok(RowCall::outermost(taken(lock, shared, ask), outcome))
    }

    /// Enters the lock again that the caller is inside of, unless the function does not want that.
    async fn nested<H: Held>(
        &self,
        lock: &Lock,
        ask: &Ask,
        patience: Option<Duration>,
    ) -> Result<Option<Entered<H>>, Error> {
        if ask.is_reentrant {
            return reentry::enter(lock, patience.unwrap_or_default()).await;
        }
        reentry::refuse_nested(lock).map(|()| None)
    }
}

fn taken<H: Held>(lock: Lock, held: H, ask: &Ask) -> Entered<H> {
    let held = Arc::new(held);
    if ask.is_reentrant { Entered::first(lock, held) } else { Entered::only(lock, held) }
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
            option: INSTALL,
            value: INSTALLED.get().map_or(DB::NAME, |installed| installed.database()).into(),
            reason: "for a second database write `locks = …` in the attribute, or run its calls inside `locks.scope(..)`",
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
