//! The request for an insert lock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Lease;
use crate::context::Context;
use crate::database::LockDatabase;
use crate::in_transaction::{Attempt, HeldInTransaction};
use crate::name::Name;
use crate::options::{self, Settings, Wait};
use crate::reentrancy::{self, Entered};
use crate::session::{LeaseHandle, LeaseRequest};
#[cfg(feature = "testing")]
use crate::test_support;
use crate::text::escaped;
use crate::{Error, Kind};

/// A request for an insert lock, from [`Locks::insert_lock`](crate::Locks::insert_lock). It does
/// nothing until one of its async methods is called.
#[derive(Debug)]
#[must_use = "this only describes a lock; call `acquire`, `try_acquire` or `run`"]
pub struct InsertLock<DB: LockDatabase> {
    context: Arc<Context<DB>>,
    name: String,
    options: LeaseOptions,
    wait: Option<Duration>,
}

/// The options of a request for a lease. `None` stands for the default.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LeaseOptions {
    pub(crate) ttl: Option<Duration>,
    pub(crate) at_least: Duration,
    pub(crate) at_most: Option<Duration>,
    pub(crate) fair: Option<bool>,
}

impl LeaseOptions {
    /// Refuses the options that only a lease can have.
    pub(super) fn refuse_in_transaction(&self) -> Result<(), Error> {
        let (option, value, reason) = match self {
            Self { at_most: Some(at_most), .. } => (
                "at_most",
                at_most,
                "a lock in a transaction ends with it, and nothing here can end your transaction",
            ),
            Self { at_least, .. } if !at_least.is_zero() => {
                ("at_least", at_least, "a lock in a transaction ends with it")
            }
            _ => return Ok(()),
        };
        Err(Error::InvalidOption { option, value: format!("{value:?}"), reason })
    }

    pub(crate) fn check(&self, settings: &Settings) -> Result<(), Error> {
        settings.hand_off.check()?;
        settings.warn_after.check()?;
        options::check_prune_after(settings.prune_after)?;
        options::check_ttl(self.ttl.unwrap_or(settings.default_ttl))?;
        let at_least = options::check_at_least(self.at_least)?;
        options::check_at_most(self.at_most, at_least).map(drop)
    }
}

// A derived impl would require `DB: Clone`.
impl<DB: LockDatabase> Clone for InsertLock<DB> {
    fn clone(&self) -> Self {
        Self { context: Arc::clone(&self.context), name: self.name.clone(), ..*self }
    }
}

impl<DB: LockDatabase> InsertLock<DB> {
    pub(crate) fn new(context: Arc<Context<DB>>, name: &str) -> Self {
        Self::with(context, name.to_owned(), LeaseOptions::default(), None)
    }

    pub(crate) fn with(
        context: Arc<Context<DB>>,
        name: String,
        options: LeaseOptions,
        wait: Option<Duration>,
    ) -> Self {
        Self { context, name, options, wait }
    }

    /// Sets how long the lock outlives a holder that is gone: 50 ms to 365 days.
    ///
    /// The lock is renewed at a third of its TTL as long as the [`Lease`] exists, so the TTL need
    /// not cover the work.
    ///
    /// The network limits how short a TTL can be: an answer of the database that takes more than
    /// half of the TTL is too late. See [`Error::TtlTooShort`].
    ///
    /// Default: that of the [`LocksBuilder`](crate::LocksBuilder), which is 30 seconds unless set.
    pub const fn ttl(mut self, ttl: Duration) -> Self {
        self.options.ttl = Some(ttl);
        self
    }

    /// Sets how long [`acquire`](Self::acquire) and [`run`](Self::run) may wait in total: at most
    /// 365 days. Zero asks once.
    ///
    /// The wait includes earlier callers of this process, the holder, and a database that can't be
    /// reached.
    ///
    /// A database that has not answered at all by then gets up to a second in total, because
    /// without an answer it is unknown whether the lock is held.
    ///
    /// Default: that of the [`LocksBuilder`](crate::LocksBuilder), which is 30 seconds unless set.
    pub const fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Sets for how long after the grant the lock stays taken, even if the work ends earlier. At
    /// most 365 days. Default: zero.
    ///
    /// It is for jobs that several processes start at about the same time: a short run is then not
    /// followed by a second one.
    ///
    /// The holder does not wait for this time. A release that comes earlier writes the end of it
    /// into the row, by the database's clock, and the row has no owner until then. The lock
    /// therefore stays taken even if this process ends. A process that dies *before* the release
    /// has not completed its job: the lock is then free after its TTL, as usual.
    ///
    /// [`Lease::release_in`] and [`Lease::commit_and_release`] also leave the lock to such a
    /// release.
    pub const fn at_least(mut self, at_least: Duration) -> Self {
        self.options.at_least = at_least;
        self
    }

    /// Sets the longest time for which the holder may have the lock: 50 ms to 365 days, and at
    /// least [`at_least`](Self::at_least).
    ///
    /// The time counts from the grant, on the monotonic clock of this process. It limits work that
    /// hangs and guards that are never dropped. Default: no limit. Without a limit, a lease that is
    /// held for unusually long is reported
    /// ([`LocksBuilder::warn_after`](crate::LocksBuilder::warn_after)).
    ///
    /// When the time is over:
    ///
    /// - the lease is lost ([`Lease::lost`], [`Loss::HeldTooLong`](crate::Loss::HeldTooLong));
    /// - the work of [`run`](Self::run) and of an annotated function is dropped at its next
    ///   `.await`;
    /// - the lock is released. If the database can't be reached, the lock is free after one more
    ///   TTL;
    /// - a guarded transaction can't be committed any more once the lock is released.
    ///
    /// The limit stops no thread. Work that blocks its thread, tasks that the work has spawned, and
    /// code that does not check the lease continue without the lock, as after any loss.
    ///
    /// The time starts again for the next holder, also when the lease is handed on within this
    /// process ([`hand_off`](crate::LocksBuilder::hand_off)). A nested call keeps the limit of the
    /// lease that it enters.
    pub const fn at_most(mut self, at_most: Duration) -> Self {
        self.options.at_most = Some(at_most);
        self
    }

    /// Sets whether this request keeps to the order of the waiting processes. Default: that of
    /// [`LocksBuilder::fair`](crate::LocksBuilder::fair).
    ///
    /// Callers of one process get the lock in order in any case.
    pub const fn fair(mut self, fair: bool) -> Self {
        self.options.fair = Some(fair);
        self
    }

    /// Takes the lock, and waits for it if necessary.
    ///
    /// Callers of one process get the lock in the order in which they asked. So do the processes
    /// that wait for it, unless [`fair`](Self::fair) is `false`.
    ///
    /// The lock is not re-entrant here: a caller that already holds it waits for itself until its
    /// wait is over. To enter it again, use [`Lease::reenter`], or [`run`](Self::run) for both
    /// calls.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// # let work = async {};
    /// let lease = locks.insert_lock("report:daily").acquire().await?;
    /// lease.run_until_lost(work).await?;
    /// lease.release().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::Timeout`] when the lock was still held at the end of the wait.
    /// - [`Error::Unreachable`] when the database could not be reached or did not answer until the
    ///   end of the wait. Retryable.
    /// - [`Error::Refused`] at once, when the server refuses until a person changes something: the
    ///   role, the password, a right.
    /// - [`Error::Database`] when the database reports another error: at once if it is permanent,
    ///   otherwise at the end of the wait (with `retryable`). On SQLite, a lock that is free can't
    ///   be taken while another transaction writes. If that lasts until the end of the wait, the
    ///   result is such a retryable error.
    /// - [`Error::TtlTooShort`] when the network is too slow for the TTL.
    /// - [`Error::WrongKind`] when the name is used for row locks, or by a later version of lock-db
    ///   for another kind.
    /// - [`Error::SchemaMissing`] and [`Error::UnsupportedTable`] when the table can't be used.
    /// - [`Error::InvalidName`] and [`Error::InvalidOption`] when the request is not valid. The
    ///   latter includes a setting of the [`LocksBuilder`](crate::LocksBuilder) that can't work.
    /// - [`Error::Closed`] when the `Locks` was closed.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. The request leaves the queue, and a lock that was
    /// granted in the meantime is released.
    pub async fn acquire(self) -> Result<Lease<DB>, Error> {
        let handle = self.context.wait_for_lease(&self.name, &self.options, self.wait).await?;
        Ok(Lease::of_caller(handle, self.context))
    }

    /// Takes the lock if it is free now.
    ///
    /// Returns `None` when the lock is held, also by the caller itself, or when others have a right
    /// to it first.
    ///
    /// This does not wait for a holder. It may take up to a second when the lock is free or its
    /// lease has expired, and it still can't be taken at once.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// match locks.insert_lock("cleanup").try_acquire().await? {
    ///     Some(lease) => {
    ///         // … the work …
    ///         lease.release().await?;
    ///     }
    ///     None => println!("another process does it"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire), without `Timeout`.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. A lock that was granted in the meantime is released.
    pub async fn try_acquire(self) -> Result<Option<Lease<DB>>, Error> {
        let handle = self.context.take_lease(&self.name, &self.options, Wait::Try).await?;
        Ok(handle.map(|handle| Lease::of_caller(handle, self.context)))
    }

    /// Takes the lock in the caller's transaction.
    ///
    /// The transaction holds the lock: no other connection is used, and nothing renews it. Its
    /// commit, its rollback or the end of its connection frees the lock. Leases and other
    /// transactions of the same name wait for that. The TTL has no meaning here.
    ///
    /// This should be the first statement of the transaction. In REPEATABLE READ and above, a
    /// snapshot that is older than the lock is refused.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let mut transaction = locks.pool().begin().await?;
    /// locks.insert_lock("stock").acquire_in(&mut transaction).await?;
    /// // … statements on `&mut *transaction` …
    /// transaction.commit().await?;    // the lock is free from here on
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`RowLock::acquire_in`](crate::RowLock::acquire_in), but [`Error::WrongKind`] when the
    /// name is used for row locks. [`Error::InvalidOption`] also when [`at_least`](Self::at_least)
    /// or [`at_most`](Self::at_most) is set.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the transaction may or may not have the lock: roll it back. More
    /// on that at [`RowLock::acquire_in`](crate::RowLock::acquire_in).
    pub async fn acquire_in(self, transaction: &mut DB::Connection) -> Result<HeldInTransaction, Error> {
        let wait = self.context.settings().wait(self.wait)?;
        // A request that waits gets it or an error.
        self.take_in(transaction, wait).await?.ok_or(Error::Closed)
    }

    /// Takes the lock in the caller's transaction if it is free now. Returns `None` when it is
    /// held. Otherwise as [`acquire_in`](Self::acquire_in).
    ///
    /// # Errors
    ///
    /// As [`acquire_in`](Self::acquire_in), without `Timeout`.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the transaction may or may not have the lock: roll it back.
    pub async fn try_acquire_in(
        self,
        transaction: &mut DB::Connection,
    ) -> Result<Option<HeldInTransaction>, Error> {
        self.take_in(transaction, Wait::Try).await
    }

    async fn take_in(
        self,
        transaction: &mut DB::Connection,
        wait: Wait,
    ) -> Result<Option<HeldInTransaction>, Error> {
        let started = Instant::now();
        let name = self.context.checked_name(&self.name)?;
        self.options.refuse_in_transaction()?;
        let attempt = Attempt { context: &self.context, name: &name, kind: Kind::Insert, wait, started };
        let held = attempt.lock_in(transaction).await?;
        #[cfg(feature = "testing")]
        test_support::note_in_transaction(&self.context, Kind::Insert, &held);
        Ok(held)
    }

    /// Takes the lock, runs `work` under it, and releases the lock, however `work` ends.
    ///
    /// When the lock is lost first, the future of `work` is dropped at its next `.await` and
    /// [`Error::Lost`] is returned. This neither undoes what `work` has done nor stops tasks that
    /// it spawned. If `work` ends while the lock is held, its result is returned unchanged, even if
    /// the release then fails.
    ///
    /// ```no_run
    /// # use lock_db::{Error, LockDatabase, Locks};
    /// # async fn example<DB: LockDatabase>(locks: Locks<DB>) -> Result<(), Error> {
    /// let pages = locks
    ///     .insert_lock("report:daily")
    ///     .run(async |lease| {
    ///         println!("writing with token {}", lease.fencing_token());
    ///         Ok::<_, lock_db::Error>(12)
    ///     })
    ///     .await?;
    /// # let _: i32 = pages;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Re-entrancy
    ///
    /// Inside `work`, calls of `run` and of annotated functions on the same name of the same
    /// `Locks` (or a clone of it) enter the lock again, without asking the database. They get a
    /// handle of the same lease, with its fencing token, its TTL and a larger
    /// [`hold_count`](Lease::hold_count). The lock is released when the last of them has ended.
    ///
    /// Nested calls enter one at a time. Several calls at once, as in `join!`, `select!` or
    /// `buffer_unordered`, queue in memory, for up to their `wait`. Two such calls that wait for
    /// each other inside their work therefore time out.
    ///
    /// The place where a call is first polled decides whether it is nested. A spawned task is not
    /// inside the lock; see [`ReentryContext`](crate::ReentryContext).
    ///
    /// # Errors
    ///
    /// The error of `work`; or, converted into its type, the errors of [`acquire`](Self::acquire),
    /// and:
    ///
    /// - [`Error::Lost`] when the lock was lost before `work` ended.
    /// - [`Error::Reentry`] when the lock can't be entered again.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, `work` is dropped with it and the lock is released in the
    /// background.
    pub async fn run<T, E, F>(self, work: F) -> Result<T, E>
    where
        F: AsyncFnOnce(&Lease<DB>) -> Result<T, E>,
        E: From<Error>,
    {
        let entered = self.context.enter(&self.name, &self.options, self.wait).await?;
        // Dropped after the lease, however this ends.
        let inside = entered.inside;
        let lease = Lease::new(entered.held, self.context);
        let result = inside.scope(lease.run_until_lost(async { work(&lease).await })).await?;
        release_quietly(lease.release().await);
        result
    }
}

/// How insert locks are taken, for all kinds of guards.
impl<DB: LockDatabase> Context<DB> {
    /// Enters the lock again if the caller is inside it, and takes it otherwise.
    pub(crate) async fn enter(
        &self,
        name: &str,
        options: &LeaseOptions,
        wait: Option<Duration>,
    ) -> Result<Entered<LeaseHandle>, Error> {
        let lock = self.reentry_key(name)?;
        options.check(self.settings())?;
        let wait = self.settings().wait(wait)?;
        let limit = wait.limit().unwrap_or_default();
        if let Some(entered) = reentrancy::enter::<LeaseHandle>(&lock, limit).await? {
            entered.held.set_minimum_hold(options.at_least);
            return Ok(entered);
        }
        // A request that waits is answered with a lease or an error.
        let handle = self.take_lease(name, options, wait).await?.ok_or(Error::Closed)?;
        Ok(Entered::first(lock, Arc::new(handle)))
    }

    /// `wait: None` stands for the default.
    async fn wait_for_lease(
        &self,
        name: &str,
        options: &LeaseOptions,
        wait: Option<Duration>,
    ) -> Result<LeaseHandle, Error> {
        let wait = self.settings().wait(wait)?;
        // A request that waits is answered with a lease or an error.
        self.take_lease(name, options, wait).await?.ok_or(Error::Closed)
    }

    pub(crate) async fn take_lease(
        &self,
        name: &str,
        options: &LeaseOptions,
        wait: Wait,
    ) -> Result<Option<LeaseHandle>, Error> {
        let handles = self.take_leases(vec![self.checked_name(name)?], options, wait).await?;
        Ok(handles.and_then(|handles| handles.into_iter().next()))
    }

    /// Takes all of the names, which were checked before, or none.
    pub(super) async fn take_leases(
        &self,
        names: Vec<Name>,
        options: &LeaseOptions,
        wait: Wait,
    ) -> Result<Option<Vec<LeaseHandle>>, Error> {
        let started = Instant::now();
        options.check(self.settings())?;
        let (ttl, fair) = (
            options.ttl.unwrap_or(self.settings().default_ttl),
            options.fair.unwrap_or(self.settings().fair),
        );
        let ask = LeaseRequest { names, ttl, at_most: options.at_most, fair, wait, started };
        let handles = self.session().acquire(ask).await?;
        handles.iter().flatten().for_each(|handle| handle.set_minimum_hold(options.at_least));
        Ok(handles)
    }
}

/// The work is done and its result stands, so a failed release is only logged.
pub(crate) fn release_quietly(released: Result<(), Error>) {
    match released {
        // A loss was reported when it was noticed, and `close` releases everything.
        Ok(()) | Err(Error::Lost { .. } | Error::Closed) => {}
        Err(error) => {
            let lock = escaped(error.name().unwrap_or_default());
            tracing::warn!(%lock, error = %error.report(), "a lock could not be released after its work was done");
        }
    }
}
