//! Asking for an insert lock.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Hold, Lease};
use crate::database::LockDatabase;
use crate::in_transaction::{Attempt, HeldInTransaction};
use crate::name::{Name, escaped};
use crate::reentry::{self, Entered};
use crate::session::Ask;
use crate::{Error, Kind, Locks, limits};

/// A request for an insert lock, from [`Locks::insert_lock`]. Nothing happens before one of its async methods is
/// called.
#[derive(Debug)]
#[must_use = "this only describes a lock; call `acquire`, `try_acquire` or `run`"]
pub struct InsertLock<DB: LockDatabase> {
    locks: Locks<DB>,
    name: String,
    options: LeaseOptions,
    wait: Option<Duration>,
}

/// What a lease is asked for with. `None` stands for the defaults.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct LeaseOptions {
    pub(crate) ttl: Option<Duration>,
    pub(crate) at_least: Duration,
    pub(crate) at_most: Option<Duration>,
    pub(crate) fair: Option<bool>,
}

impl LeaseOptions {
    /// What only a lease can do.
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

    pub(crate) fn check(&self, default_ttl: Duration) -> Result<(), Error> {
        limits::check_ttl(self.ttl.unwrap_or(default_ttl))?;
        let at_least = limits::check_at_least(self.at_least)?;
        limits::check_at_most(self.at_most, at_least).map(drop)
    }
}

// Derived, it would ask for a database type that can be cloned.
impl<DB: LockDatabase> Clone for InsertLock<DB> {
    fn clone(&self) -> Self {
        Self { locks: self.locks.clone(), name: self.name.clone(), ..*self }
    }
}

impl<DB: LockDatabase> InsertLock<DB> {
    pub(crate) fn new(locks: Locks<DB>, name: &str) -> Self {
        Self { locks, name: name.to_owned(), options: LeaseOptions::default(), wait: None }
    }

    /// How long the lock outlives a holder that is gone: 50 ms to 365 days. It is renewed at a third of it as long as the
    /// [`Lease`] exists, so it need not cover the work.
    ///
    /// The network has to meet it: an answer of the database that takes more than half of it is too late. See
    /// [`Error::TtlTooShort`].
    ///
    /// Default: what the [`LocksBuilder`](crate::LocksBuilder) says, else 30 seconds.
    pub const fn ttl(mut self, ttl: Duration) -> Self {
        self.options.ttl = Some(ttl);
        self
    }

    /// How long [`acquire`](Self::acquire) and [`run`](Self::run) may wait, all in all: for callers of this process that
    /// came before, for the holder, and for a database that is away. At most 365 days; zero asks once.
    ///
    /// A database that has not answered anything by then gets up to a second in all, because without its answer it is not
    /// known whether the lock is held.
    ///
    /// Default: what the [`LocksBuilder`](crate::LocksBuilder) says, else 30 seconds.
    pub const fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// For how long after the start nobody else gets the lock, even if the work ends before: for jobs that several processes
    /// start at about the same time, so that a short run is not followed by a second one. At most 365 days. Default: zero.
    ///
    /// Nobody waits for it. A release that comes earlier writes the moment, by the database's clock, into the row, which
    /// has no owner until then; so it holds whatever becomes of this process. A process that dies *before* the release
    /// has not done its job: then the lock is free after its TTL, as ever. [`Lease::release_in`] and
    /// [`Lease::commit_and_release`] leave the lock to be released that way as well.
    pub const fn at_least(mut self, at_least: Duration) -> Self {
        self.options.at_least = at_least;
        self
    }

    /// For how long the holder may have the lock, counted from the grant on the monotonic clock of this process: against work
    /// that hangs, and guards that are never dropped. 50 ms to 365 days, and no less than [`at_least`](Self::at_least).
    /// Default: no limit; then a lease that is held for unusually long is warned of
    /// ([`LocksBuilder::warn_after`](crate::LocksBuilder::warn_after)).
    ///
    /// When the time is over, the holder is told ([`Lease::lost`], [`Loss::HeldTooLong`](crate::Loss::HeldTooLong)), the
    /// work of [`run`](Self::run) and of an annotated function is dropped at its next await, and the lock is released. So
    /// it is free then; after a TTL more if the database can't be reached. A guarded transaction can't be committed any
    /// more once the lock is released.
    ///
    /// It stops no thread: work that blocks its thread, tasks that it has spawned and code that does not look at the lease
    /// go on without the lock, as after any loss. The next holder has the time anew, and so has each that gets the lease
    /// by hand ([`hand_off`](crate::LocksBuilder::hand_off)). A nested call keeps to the time of the lease that is there.
    pub const fn at_most(mut self, at_most: Duration) -> Self {
        self.options.at_most = Some(at_most);
        self
    }

    /// Whether this request keeps to the order of the processes that wait; see [`LocksBuilder::fair`](crate::LocksBuilder::fair),
    /// which says what is usual. Callers of one process keep to theirs in any case.
    pub const fn fair(mut self, fair: bool) -> Self {
        self.options.fair = Some(fair);
        self
    }

    /// Takes the lock, waiting for it if need be. Callers of one process get it in the order in which they asked, and so do the
    /// processes that wait for it, unless [`fair`](Self::fair) says otherwise.
    ///
    /// Not re-entrant: a caller that holds the lock already waits for itself, until its wait is over. To go on under a lease
    /// use [`Lease::reenter`], or [`run`](Self::run) for both calls.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] when the wait was over first and the lock was seen to be held; [`Error::WrongKind`] when the
    /// name is used for row locks; [`Error::Database`] when the database was silent, away or stalled until the wait was
    /// over (retryable), or at once when it refuses for good; [`Error::TtlTooShort`] when the network is too slow for the
    /// `ttl`; [`Error::SchemaMissing`], [`Error::UnsupportedTable`],
    /// [`Error::Closed`], [`Error::InvalidName`], [`Error::InvalidOption`].
    ///
    /// SQLite: while another transaction writes, a lock that looks free can't be taken. When that lasts until the wait is
    /// over, it is a retryable [`Error::Database`].
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time: the place in the queue is given up, and a lock that was granted meanwhile is released.
    pub async fn acquire(self) -> Result<Lease<DB>, Error> {
        let hold = self.locks.hold_waiting(&self.name, &self.options, self.wait).await?;
        Ok(Lease::of_caller(hold, self.locks))
    }

    /// Takes the lock if it is free now. `None` when it was seen to be held, by the caller too, or when others are to have
    /// it first.
    ///
    /// It does not wait for a holder. It may take up to a second when the lock is free, or its lease has expired, and still
    /// can't be had at once.
    ///
    /// # Errors
    ///
    /// As [`acquire`](Self::acquire), without `Timeout`.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time: a lock that was granted meanwhile is released.
    pub async fn try_acquire(self) -> Result<Option<Lease<DB>>, Error> {
        let hold = self.locks.hold(&self.name, &self.options, None).await?;
        Ok(hold.map(|hold| Lease::of_caller(hold, self.locks)))
    }

    /// Takes the lock in the caller's transaction: no other connection holds it, nothing renews it, and the commit, rollback
    /// or death of the transaction frees it. Leases and other transactions of the name wait for that. It should be the first
    /// statement there (in REPEATABLE READ and above a snapshot from before the lock is refused). The TTL has no meaning here.
    ///
    /// # Errors
    ///
    /// As [`RowLock::acquire_in`](crate::RowLock::acquire_in).
    ///
    /// # Cancel safety
    ///
    /// As [`RowLock::acquire_in`](crate::RowLock::acquire_in).
    pub async fn acquire_in(self, transaction: &mut DB::Connection) -> Result<HeldInTransaction, Error> {
        let wait = limits::check_wait(self.wait.unwrap_or(self.locks.default_wait()))?;
        #[cfg(feature = "testing")]
        let locks = self.locks.clone();
        // A caller that waits gets it or an error.
        let held = self.take_in(transaction, Some(wait)).await?.ok_or(Error::Closed)?;
        #[cfg(feature = "testing")]
        locks.are_in_transaction(Kind::Insert, [&held]);
        Ok(held)
    }

    /// As [`acquire_in`](Self::acquire_in), without waiting for the holder: `None` when somebody has it.
    ///
    /// # Errors
    ///
    /// As [`acquire_in`](Self::acquire_in), without `Timeout`.
    ///
    /// # Cancel safety
    ///
    /// As [`acquire_in`](Self::acquire_in).
    pub async fn try_acquire_in(
        self,
        transaction: &mut DB::Connection,
    ) -> Result<Option<HeldInTransaction>, Error> {
        #[cfg(feature = "testing")]
        let locks = self.locks.clone();
        let held = self.take_in(transaction, None).await?;
        #[cfg(feature = "testing")]
        locks.are_in_transaction(Kind::Insert, &held);
        Ok(held)
    }

    async fn take_in(
        self,
        transaction: &mut DB::Connection,
        wait: Option<Duration>,
    ) -> Result<Option<HeldInTransaction>, Error> {
        let started = Instant::now();
        let name = self.locks.checked_name(&self.name)?;
        self.options.refuse_in_transaction()?;
        let attempt = Attempt { locks: &self.locks, name: &name, kind: Kind::Insert, wait, started };
        attempt.lock_in(transaction).await
    }

    /// Takes the lock, runs `work` under it, and releases it, whatever comes of the work.
    ///
    /// When the lock is lost on the way, the future of `work` is dropped at its next await and [`Error::Lost`] comes
    /// back. That does not undo what it has done, nor stop tasks that it spawned. The result of work that ended while the
    /// lock was held is returned as it is, even if the release then fails.
    ///
    /// ```no_run
    /// # async fn example<DB: lock_db::LockDatabase>(locks: lock_db::Locks<DB>) -> Result<(), lock_db::Error> {
    /// let pages = locks
    ///     .insert_lock("report:daily")
    ///     .run(async |lease| {
    ///         println!("writing with number {}", lease.fencing_token());
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
    /// Inside of the work, `run` and annotated functions on the same name of the same `Locks` (or a clone of it) enter the
    /// lock again, without asking the database: they get a handle of the same lease, with its fencing token, its TTL and a
    /// larger [`hold_count`](Lease::hold_count). The lock is released when the last of them has ended.
    ///
    /// They enter one at a time: several calls at once, as in `join!`, `select!` or `buffer_unordered`, queue for it in
    /// memory, and `wait` is how long. So two calls of which each waits for the other in its work time out.
    ///
    /// What counts is where a call is first polled. A task that is spawned is not inside; see [`Owner`](crate::Owner).
    ///
    /// # Errors
    ///
    /// The error of the work; or, turned into its type, those of [`acquire`](Self::acquire), [`Error::Lost`] and
    /// [`Error::Reentry`].
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, the work is dropped with it and the lock is released in the background.
    pub async fn run<T, E, F>(self, work: F) -> Result<T, E>
    where
        F: AsyncFnOnce(&Lease<DB>) -> Result<T, E>,
        E: From<Error>,
    {
        let entered = self.locks.enter(&self.name, &self.options, self.wait).await?;
        // Dropped after the lease, however this ends.
        let inside = entered.inside;
        let lease = Lease::new(entered.held, self.locks);
        let result = inside.scope(lease.run_until_lost(async { work(&lease).await })).await?;
        release_quietly(lease.release().await);
        result
    }
}

/// What insert locks are taken by, whatever their guards look like.
impl<DB: LockDatabase> Locks<DB> {
    /// Enters the lock again that the caller is inside of, else takes it.
    pub(crate) async fn enter(
        &self,
        name: &str,
        options: &LeaseOptions,
        wait: Option<Duration>,
    ) -> Result<Entered<Hold>, Error> {
        let lock = self.reentry_key(name)?;
        options.check(self.default_ttl())?;
        let wait = limits::check_wait(wait.unwrap_or(self.default_wait()))?;
        if let Some(entered) = reentry::enter::<Hold>(&lock, wait).await? {
            entered.held.keep_for(options.at_least);
            return Ok(entered);
        }
        let hold = self.hold_waiting(name, options, Some(wait)).await?;
        Ok(Entered::first(lock, Arc::new(hold)))
    }

    /// `wait: None` stands for the default.
    async fn hold_waiting(
        &self,
        name: &str,
        options: &LeaseOptions,
        wait: Option<Duration>,
    ) -> Result<Hold, Error> {
        let wait = limits::check_wait(wait.unwrap_or(self.default_wait()))?;
        // Whoever waits is answered with a lease or an error; nothing comes of a session that ends.
        self.hold(name, options, Some(wait)).await?.ok_or(Error::Closed)
    }

    /// `wait: None` is a try.
    pub(crate) async fn hold(
        &self,
        name: &str,
        options: &LeaseOptions,
        wait: Option<Duration>,
    ) -> Result<Option<Hold>, Error> {
        let holds = self.hold_all(vec![self.checked_name(name)?], options, wait).await?;
        Ok(holds.and_then(|holds| holds.into_iter().next()))
    }

    /// Names that were checked, all or none of them.
    pub(super) async fn hold_all(
        &self,
        names: Vec<Name>,
        options: &LeaseOptions,
        wait: Option<Duration>,
    ) -> Result<Option<Vec<Hold>>, Error> {
        let started = Instant::now();
        options.check(self.default_ttl())?;
        let (ttl, fair) = (options.ttl.unwrap_or(self.default_ttl()), options.fair.unwrap_or(self.is_fair()));
        let ask = Ask { names, ttl, at_most: options.at_most, fair, wait, started };
        let holds = self.session().acquire(ask).await?;
        holds.iter().flatten().for_each(|hold| hold.keep_for(options.at_least));
        Ok(holds)
    }
}

/// The work is done and stands, so a release that fails is only told to the operator.
pub(crate) fn release_quietly(released: Result<(), Error>) {
    match released {
        // A loss was told when it was noticed, and `close` releases everything.
        Ok(()) | Err(Error::Lost { .. } | Error::Closed) => {}
        Err(error) => {
            let lock = escaped(error.name().unwrap_or_default());
            tracing::warn!(%lock, %error, "a lock could not be released after its work was done");
        }
    }
}
