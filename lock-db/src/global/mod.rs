//! The `Locks` that annotated functions find without being handed one: of the task, else of the process.

mod body_polls;
mod held_lock;
mod insert_lock;
mod lease;
mod leases;
mod list;
mod locks;
// The macro's code calls it; nothing of it is public.
#[allow(missing_docs, missing_debug_implementations)]
mod request;
mod shared_transaction;

use std::any::Any;
use std::pin::Pin;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use self::shared_transaction::SharedTransaction;
use crate::database::LockDatabase;
use crate::lease::{InsertLock, InsertLocks, LeaseOptions};
use crate::locks::ListOptions;
use crate::options::Wait;
use crate::reentrancy::{self, Entered, Held, ReentryKey};
use crate::runtime::Runtime;
use crate::session::LeaseHandle;
use crate::{CheckReport, Error, Health, Lease, ListLocks, LockInfo, Locks};

pub(crate) use self::held_lock::{HeldLock, TakingLock};
pub use self::insert_lock::{AnyInsertLock, AnyInsertLocks};
use self::lease::ErasedLease;
pub use self::lease::{AnyLease, IntoLease};
pub use self::leases::AnyLeases;
pub use self::list::AnyListLocks;
pub use self::locks::AnyLocks;
pub use self::request::{CallRequest, ask};
pub(crate) use self::shared_transaction::RowCall;

static INSTALLED: RwLock<Option<Arc<dyn ErasedLocks>>> = RwLock::new(None);

tokio::task_local! {
    static SCOPED: Arc<dyn ErasedLocks>;
}

pub(crate) type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Locks of whatever database.
pub(crate) trait ErasedLocks: Send + Sync {
    /// An insert lock, entered again if the caller is inside of it.
    fn lease(self: Arc<Self>, ask: Box<CallRequest>) -> TakingLock;

    /// A row lock in a transaction of its own, entered again if the caller is inside of it.
    fn row(self: Arc<Self>, ask: Box<CallRequest>) -> TakingLock;

    /// What the body of an annotated function sees of a hold.
    fn lease_of(&self, handle: Arc<LeaseHandle>) -> Box<dyn ErasedLease>;

    /// What an application takes. With `is_try` it does not wait.
    fn take(
        &self,
        name: String,
        options: LeaseOptions,
        wait: Option<Duration>,
        is_try: bool,
    ) -> BoxFuture<'static, Result<Option<AnyLease>, Error>>;

    /// [`take`](Self::take) for several names together.
    fn take_all(
        &self,
        names: Vec<String>,
        options: LeaseOptions,
        wait: Option<Duration>,
        is_try: bool,
    ) -> BoxFuture<'static, Result<Option<AnyLeases>, Error>>;

    /// Enters the lock again if the caller is inside of it, and takes it otherwise.
    fn enter(
        &self,
        name: String,
        options: LeaseOptions,
        wait: Option<Duration>,
    ) -> BoxFuture<'static, Result<Entered<LeaseHandle>, Error>>;

    fn migrate(&self) -> BoxFuture<'_, Result<(), Error>>;

    fn check(&self) -> BoxFuture<'_, Result<CheckReport, Error>>;

    fn info<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<LockInfo>, Error>>;

    fn list(&self, asked: ListOptions) -> BoxFuture<'static, Result<Vec<LockInfo>, Error>>;

    fn force_release<'a>(&'a self, name: &'a str, fencing_token: i64) -> BoxFuture<'a, Result<bool, Error>>;

    fn health(&self) -> Health;

    fn prune(&self, older_than: Duration) -> BoxFuture<'_, Result<u64, Error>>;

    fn owner(&self) -> &str;

    fn is_closed(&self) -> bool;

    fn close(&self) -> BoxFuture<'_, ()>;

    fn as_any(&self) -> &dyn Any;

    fn database(&self) -> &'static str;

    #[cfg(feature = "testing")]
    fn instance(&self) -> reentrancy::Instance;
}

impl<DB: LockDatabase> ErasedLocks for Locks<DB> {
    fn lease(self: Arc<Self>, ask: Box<CallRequest>) -> TakingLock {
        Box::pin(async move { Ok(ask.or_skipped(self.annotated_lease(&ask).await)?.map(HeldLock::lease)) })
    }

    fn row(self: Arc<Self>, ask: Box<CallRequest>) -> TakingLock {
        Box::pin(async move { Ok(ask.or_skipped(self.annotated_row(&ask).await)?.map(HeldLock::Row)) })
    }

    fn lease_of(&self, handle: Arc<LeaseHandle>) -> Box<dyn ErasedLease> {
        Box::new(Lease::new(handle, Arc::clone(self.context())))
    }

    fn take(
        &self,
        name: String,
        options: LeaseOptions,
        wait: Option<Duration>,
        is_try: bool,
    ) -> BoxFuture<'static, Result<Option<AnyLease>, Error>> {
        let request = InsertLock::with(Arc::clone(self.context()), name, options, wait);
        Box::pin(async move {
            if is_try {
                return Ok(request.try_acquire().await?.map(AnyLease::from));
            }
            Ok(Some(request.acquire().await?.into()))
        })
    }

    fn take_all(
        &self,
        names: Vec<String>,
        options: LeaseOptions,
        wait: Option<Duration>,
        is_try: bool,
    ) -> BoxFuture<'static, Result<Option<AnyLeases>, Error>> {
        let request = InsertLocks::with(Arc::clone(self.context()), names, options, wait);
        Box::pin(async move {
            if is_try {
                return Ok(request.try_acquire().await?.map(AnyLeases::from));
            }
            Ok(Some(request.acquire().await?.into()))
        })
    }

    fn enter(
        &self,
        name: String,
        options: LeaseOptions,
        wait: Option<Duration>,
    ) -> BoxFuture<'static, Result<Entered<LeaseHandle>, Error>> {
        let context = Arc::clone(self.context());
        Box::pin(async move { context.enter(&name, &options, wait).await })
    }

    fn migrate(&self) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.migrate())
    }

    fn check(&self) -> BoxFuture<'_, Result<CheckReport, Error>> {
        Box::pin(self.check())
    }

    fn info<'a>(&'a self, name: &'a str) -> BoxFuture<'a, Result<Option<LockInfo>, Error>> {
        Box::pin(self.info(name))
    }

    fn list(&self, asked: ListOptions) -> BoxFuture<'static, Result<Vec<LockInfo>, Error>> {
        ListLocks::new(Arc::clone(self.context()), asked).into_future()
    }

    fn force_release<'a>(&'a self, name: &'a str, fencing_token: i64) -> BoxFuture<'a, Result<bool, Error>> {
        Box::pin(self.force_release(name, fencing_token))
    }

    fn health(&self) -> Health {
        self.health()
    }

    fn prune(&self, older_than: Duration) -> BoxFuture<'_, Result<u64, Error>> {
        Box::pin(self.prune(older_than))
    }

    fn owner(&self) -> &str {
        self.owner()
    }

    fn is_closed(&self) -> bool {
        self.is_closed()
    }

    fn close(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.close())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn database(&self) -> &'static str {
        DB::NAME
    }

    #[cfg(feature = "testing")]
    fn instance(&self) -> reentrancy::Instance {
        self.context().instance()
    }
}

/// Installs it, unless one that is not closed is installed.
fn install(locks: Arc<dyn ErasedLocks>) -> Result<(), Error> {
    let mut installed = INSTALLED.write().unwrap_or_else(PoisonError::into_inner);
    if let Some(before) = &*installed
        && !before.is_closed()
    {
        return Err(Error::AlreadyInstalled { installed: before.database() });
    }
    *installed = Some(locks);
    Ok(())
}

fn installed() -> Option<Arc<dyn ErasedLocks>> {
    INSTALLED.read().unwrap_or_else(PoisonError::into_inner).clone()
}

/// The `Locks` of the calling task, if there is one.
pub(crate) fn current() -> Option<Arc<dyn ErasedLocks>> {
    SCOPED.try_with(Arc::clone).ok().or_else(|| installed())
}

/// Which `Locks` the calling task is in the scope of.
#[cfg(feature = "testing")]
pub(crate) fn scoped() -> Option<reentrancy::Instance> {
    SCOPED.try_with(|locks| locks.instance()).ok()
}

/// What annotated functions take.
impl<DB: LockDatabase> Locks<DB> {
    async fn annotated_lease(&self, ask: &CallRequest) -> Result<Entered<LeaseHandle>, Error> {
        let lock = self.context().reentry_key(&ask.name)?;
        let &CallRequest { ttl, at_least, at_most, .. } = ask;
        let options = LeaseOptions { ttl, at_least, at_most, fair: None };
        options.check(self.context().settings())?;
        let wait = ask.waits(self.context().settings())?;
        if let Some(entered) = self.nested::<LeaseHandle>(&lock, ask, wait).await? {
            entered.held.set_minimum_hold(at_least);
            return Ok(entered);
        }
        let handle = self.context().take_lease(&ask.name, &options, wait).await?;
        // A request that waits gets a lease or an error, unless the session ends.
        let none = || if wait.is_try() { ask.taken_elsewhere() } else { Error::Closed };
        Ok(taken(lock, handle.ok_or_else(none)?, ask))
    }

    async fn annotated_row(&self, ask: &CallRequest) -> Result<RowCall, Error> {
        let lock = self.context().reentry_key(&ask.name)?;
        let wait = ask.waits(self.context().settings())?;
        if let Some(entered) = self.nested(&lock, ask, wait).await? {
            return Ok(RowCall::inner(entered));
        }
        let runtime = Runtime::current()?;
        let request = self.row_lock(&*ask.name);
        #[cfg_attr(not(feature = "testing"), allow(unused_mut))]
        let mut guard = if let Some(limit) = wait.limit() {
            request.wait(limit).acquire().await?
        } else {
            request.try_acquire().await?.ok_or_else(|| ask.taken_elsewhere())?
        };
        #[cfg(feature = "testing")]
        guard.hide();
        let (shared, outcome) = SharedTransaction::new(guard, runtime);
        Ok(RowCall::outermost(taken(lock, shared, ask), outcome))
    }

    /// Enters the lock again that the caller is inside of, unless the function does not want that.
    async fn nested<H: Held>(
        &self,
        lock: &ReentryKey,
        ask: &CallRequest,
        wait: Wait,
    ) -> Result<Option<Entered<H>>, Error> {
        if ask.is_reentrant {
            return reentrancy::enter(lock, wait.limit().unwrap_or_default()).await;
        }
        reentrancy::refuse_nested(lock).map(|()| None)
    }
}

fn taken<H: Held>(lock: ReentryKey, held: H, ask: &CallRequest) -> Entered<H> {
    let held = Arc::new(held);
    if ask.is_reentrant { Entered::first(lock, held) } else { Entered::only(lock, held) }
}

pub(crate) fn not_installed(name: &str, reason: String) -> Error {
    Error::NotInstalled { name: name.to_owned(), reason }
}

impl<DB: LockDatabase> Locks<DB> {
    /// Installs this `Locks` for the whole process. Functions annotated with `#[distributed_lock]`
    /// use it unless they name another one.
    ///
    /// The application calls this once at its start. A library takes a `Locks` as an argument
    /// instead. A program with several databases writes `locks = …` or uses [`scope`](Self::scope).
    /// When the installed `Locks` was [closed](Self::close), another one can be installed.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// use lock_db::{Error, distributed_lock};
    ///
    /// #[distributed_lock("report:daily")]
    /// async fn report() -> Result<(), Error> {
    ///     Ok(())
    /// }
    ///
    /// locks.install()?;
    /// report().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::AlreadyInstalled`] when a `Locks` that is not closed is installed. It stays
    /// installed.
    pub fn install(&self) -> Result<(), Error> {
        install(Arc::new(self.clone()))
    }

    /// Runs a future with this as its ambient `Locks`, whatever is installed for the process. Tasks
    /// that the future spawns do not inherit it.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// use lock_db::{Error, distributed_lock};
    ///
    /// #[distributed_lock("report:daily")]
    /// async fn report() -> Result<u64, Error> {
    ///     Ok(12)
    /// }
    ///
    /// assert_eq!(locks.scope(report()).await?, 12);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// As that of the future.
    pub fn scope<F: Future>(&self, future: F) -> impl Future<Output = F::Output> + use<F, DB> {
        SCOPED.scope(Arc::new(self.clone()), future)
    }
}
