//! `Locks`, the entry point.

mod builder;
mod list;
mod operate;

use std::sync::Arc;
use std::time::Duration;

use sqlx::Pool;

pub use self::builder::LocksBuilder;
pub use self::list::ListLocks;
pub(crate) use self::list::ListOptions;
use crate::context::Context;
use crate::database::LockDatabase;
use crate::database::PruneScope;
use crate::lease::{InsertLock, InsertLocks};
use crate::options::check_prune;
use crate::row_lock::{RowLock, RowLocks};
use crate::session::{self, Request};
use crate::{CheckReport, Error};

/// The locks of a database.
///
/// A service creates one `Locks` for each pool and keeps it as long as the program runs. Cloning is
/// cheap: all clones share the same state.
///
/// A `Locks` opens at most two connections of its own, however many locks are held through it. They
/// are opened with the options and hooks of the pool. The connections and the thread that uses them
/// are started on first use.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let for_test = lock_db::testing::locks().await?;
/// # let pool = for_test.pool().clone();
/// use lock_db::Locks;
///
/// let locks = Locks::new(pool);
/// locks.migrate().await?;
///
/// let lease = locks.insert_lock("report:daily").acquire().await?;
/// // … the work …
/// lease.release().await?;
/// locks.close().await;
/// # Ok(())
/// # }
/// ```
pub struct Locks<DB: LockDatabase> {
    context: Arc<Context<DB>>,
}

impl<DB: LockDatabase> Locks<DB> {
    /// Creates a `Locks` for the database of this pool, with the default settings. Does not connect
    /// yet.
    #[must_use]
    pub fn new(pool: Pool<DB>) -> Self {
        Self::builder(pool).build()
    }

    /// Returns a builder, for settings other than the defaults.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let for_test = lock_db::testing::locks().await?;
    /// # let pool = for_test.pool().clone();
    /// use std::time::Duration;
    ///
    /// use lock_db::Locks;
    ///
    /// let locks = Locks::builder(pool)
    ///     .label("billing")
    ///     .name_prefix("billing/")
    ///     .default_wait(Duration::from_secs(5))
    ///     .build();
    /// assert!(locks.owner().contains("billing"));
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder(pool: Pool<DB>) -> LocksBuilder<DB> {
        LocksBuilder::new(pool)
    }

    /// Creates the table `distributed_lock` if it is missing, and brings it up to date.
    ///
    /// Any number of processes may call this at the same time. The applied migrations are recorded
    /// in `_lock_db_migrations`. The table of sqlx, `_sqlx_migrations`, is not touched.
    ///
    /// When all migrations are applied, this only reads, so a role that can only use the table may
    /// call it. On PostgreSQL it also moves the sequence of the ids forward when the sequence is
    /// behind the rows, for example after a switch to a logical replica, and the role has the right
    /// to do so.
    ///
    /// # Errors
    ///
    /// - [`Error::Unreachable`] when the database can't be reached, does not answer, or the
    ///   connection breaks.
    /// - [`Error::Refused`] when the server refuses the role or the password, or the right to
    ///   create tables is missing.
    /// - [`Error::Database`] when a statement fails for another reason. It is retryable when another
    ///   process has been migrating for a minute.
    /// - [`Error::UnsupportedTable`] and [`Error::SchemaMissing`] when the table exists and can't
    ///   be used: see [`check`](Self::check).
    /// - [`Error::Closed`] after [`close`](Self::close).
    ///
    /// No lock is left behind in the database.
    ///
    /// # Cancel safety
    ///
    /// The migration continues when the future is dropped. Only its result is lost.
    pub async fn migrate(&self) -> Result<(), Error> {
        self.context.session().ask(|answer| Request::Migrate { answer }).await
    }

    /// Checks that the table exists and has the form that this version of lock-db needs.
    ///
    /// Call it when a service starts, especially when the migrations are applied by other means. It
    /// inserts a row, locks and writes it, and rolls that back.
    ///
    /// The report names the server and how it holds other holders off while a guarded transaction
    /// commits. It lists what works and could be better: commits that do not wait for the disk or for
    /// standbys, a transaction, replication slot or reader that keeps old row versions alive, which makes
    /// hot locks slow, a clock that is wrong, missing rights.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let report = locks.check().await?;
    /// println!("locks are kept by {}", report.server());
    /// for warning in report.warnings() {
    ///     eprintln!("{warning}");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidOption`] when a setting of the [`LocksBuilder`] has a value that can't
    ///   work.
    /// - [`Error::SchemaMissing`] when the table does not exist or lacks a column.
    /// - [`Error::UnsupportedTable`] when the table can't keep locks in its present form: it is
    ///   partitioned or inherited, it is a view or a foreign table, its unique index is missing, it
    ///   has rules or row level security, or its storage engine is not InnoDB.
    /// - [`Error::Refused`] when a right is missing (the message says which), the database is
    ///   read-only, the server refuses the role or the password, the sequence of the ids is behind
    ///   the rows, or writing a row has no effect (a trigger, for example).
    /// - [`Error::Unreachable`] when the database can't be reached, does not answer, or the
    ///   connection breaks.
    /// - [`Error::Database`] when a statement fails for another reason.
    /// - [`Error::Closed`] after [`close`](Self::close).
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time.
    pub async fn check(&self) -> Result<CheckReport, Error> {
        self.context.settings().check()?;
        let prunes = self.context.settings().prune_after.is_some();
        let check = |answer| Request::Check { prunes, answer };
        self.context.session().ask(check).await
    }

    /// Returns a request for an insert lock, which is a lease.
    ///
    /// A row of the table holds the lock, without any connection. It is renewed in the background.
    /// When its holder is gone, it is free after its TTL. Use it for jobs, for work that takes
    /// longer than one transaction, and behind PgBouncer.
    ///
    /// The name has 1 to 255 bytes of UTF-8 and is compared byte by byte. A name is used with one
    /// kind of lock only.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// use std::time::Duration;
    ///
    /// let lease = locks
    ///     .insert_lock("report:daily")
    ///     .ttl(Duration::from_secs(10))
    ///     .wait(Duration::from_secs(2))
    ///     .acquire()
    ///     .await?;
    /// println!("holds {} with token {}", lease.name(), lease.fencing_token());
    /// lease.release().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn insert_lock(&self, name: impl AsRef<str>) -> InsertLock<DB> {
        InsertLock::new(Arc::clone(&self.context), name.as_ref())
    }

    /// Returns a request for a row lock.
    ///
    /// A transaction holds the lock by locking the row of the name. It may be the caller's own
    /// transaction. The lock is free when the transaction ends. Use it for short critical sections
    /// inside one transaction.
    ///
    /// The name has 1 to 255 bytes of UTF-8 and is compared byte by byte. A name is used with one
    /// kind of lock only.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// // In a transaction of its own.
    /// let guard = locks.row_lock("stock:7").acquire().await?;
    /// guard.commit().await?;
    ///
    /// // In the transaction that does the work.
    /// let mut transaction = locks.pool().begin().await?;
    /// locks.row_lock("stock:7").acquire_in(&mut transaction).await?;
    /// transaction.commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn row_lock(&self, name: impl AsRef<str>) -> RowLock<DB> {
        RowLock::new(Arc::clone(&self.context), name.as_ref())
    }

    /// Returns a request for several insert locks, of which it takes all or none.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let leases = locks.insert_locks(["account:1", "account:2"]).acquire().await?;
    /// leases.release().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn insert_locks(&self, names: impl IntoIterator<Item = impl AsRef<str>>) -> InsertLocks<DB> {
        InsertLocks::new(Arc::clone(&self.context), owned(names))
    }

    /// Returns a request for several row locks in one transaction, its own or the caller's. They are
    /// taken in a fixed order.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let guards = locks.row_locks(["account:1", "account:2"]).acquire().await?;
    /// guards.commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn row_locks(&self, names: impl IntoIterator<Item = impl AsRef<str>>) -> RowLocks<DB> {
        RowLocks::new(Arc::clone(&self.context), owned(names))
    }

    /// Removes the rows of names that were not used for `older_than`, and returns how many it has
    /// removed.
    ///
    /// A `Locks` does this by itself in the background: see
    /// [`LocksBuilder::prune_after`]. Call `prune` from a job of your own, where processes do not
    /// live long enough for that, or to remove rows sooner.
    ///
    /// Only rows whose names have the [prefix](LocksBuilder::name_prefix) of this `Locks` are
    /// removed. Locks that are held or waited for stay, and fencing tokens do not come back. On
    /// MySQL and MariaDB the newest row of the table stays, too.
    ///
    /// `older_than` is between one second and 365 days, and longer than any transaction that takes
    /// locks: see [`LocksBuilder::prune_after`].
    ///
    /// The rows are removed in small parts, with pauses in between, and other requests go on
    /// meanwhile. One call at a time prunes. Another one waits for it, for the
    /// [default wait](LocksBuilder::default_wait).
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// use std::time::Duration;
    ///
    /// let removed = locks.prune(Duration::from_hours(24)).await?;
    /// println!("{removed} names were not used for a day");
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidOption`] when `older_than` is shorter than a second or longer than 365
    ///   days, or a setting of the [`LocksBuilder`] has a value that can't work.
    /// - [`Error::InvalidName`] when the prefix leaves no room for the name `lock_db.prune`.
    /// - [`Error::Timeout`] when another call prunes all the time.
    /// - [`Error::Refused`] when the account may not delete rows, or the database is read-only.
    /// - [`Error::SchemaMissing`] and [`Error::UnsupportedTable`] when the table can't be used.
    /// - [`Error::Unreachable`] and [`Error::Database`] when a statement fails.
    /// - [`Error::Closed`] after [`close`](Self::close), also if that is called meanwhile.
    ///
    /// After an error the rows that are gone stay gone. Another call goes on.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. It stops after the statement that is being carried
    /// out.
    pub async fn prune(&self, older_than: Duration) -> Result<u64, Error> {
        let settings = self.context.settings();
        settings.check()?;
        let older_than = check_prune("older_than", older_than)?;
        let lease = self.context.checked_name(session::BY_CALL)?;
        let scope = PruneScope { prefix: settings.name_prefix.as_str().into(), older_than };
        self.context.session().prune(&lease, scope, settings.wait(None)?).await
    }

    /// Releases every insert lock that is held through this `Locks` and its clones, and refuses all
    /// further use.
    ///
    /// A lease that is still open counts as lost. A row lock that is held continues until its
    /// transaction ends.
    ///
    /// Call it when a service shuts down, after its last request. Insert locks that are not
    /// released then stay taken until their TTL is over. It returns within ten seconds, whatever
    /// the database does.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let lease = locks.insert_lock("report:daily").acquire().await?;
    /// locks.close().await;
    /// assert_eq!(lease.loss(), Some(lock_db::Loss::Closed));
    /// assert!(locks.insert_lock("report:daily").acquire().await.is_err());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// The releases continue when the future is dropped.
    pub async fn close(&self) {
        self.context.session().close().await;
    }

    /// The pool that this `Locks` was created with.
    #[must_use]
    pub fn pool(&self) -> &Pool<DB> {
        self.context.pool()
    }

    /// Host, process id and label. Other processes see this as the owner of the locks that are held
    /// through this `Locks`.
    #[must_use]
    pub fn owner(&self) -> &str {
        self.context.owner()
    }

    /// Whether [`close`](Self::close) was called.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.context.session().is_closed()
    }

    pub(crate) fn context(&self) -> &Arc<Context<DB>> {
        &self.context
    }
}

impl<DB: LockDatabase> Clone for Locks<DB> {
    fn clone(&self) -> Self {
        Self { context: Arc::clone(&self.context) }
    }
}

impl<DB: LockDatabase> std::fmt::Debug for Locks<DB> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Locks")
            .field("database", &DB::NAME)
            .field("owner", &self.owner())
            .field("session", self.context.session())
            .finish_non_exhaustive()
    }
}

fn owned(names: impl IntoIterator<Item = impl AsRef<str>>) -> Vec<String> {
    names.into_iter().map(|name| name.as_ref().to_owned()).collect()
}
