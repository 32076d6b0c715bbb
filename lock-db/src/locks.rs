//! `Locks`, the entry point, and its builder.

use std::sync::Arc;
use std::time::Duration;

use sqlx::Pool;

use crate::context::Context;
#[cfg(feature = "testing")]
use crate::context::Kept;
use crate::database::LockDatabase;
use crate::lease::{InsertLock, InsertLocks};
use crate::options::{HandOffLimits, Settings, WarnAfter};
use crate::row_lock::{RowLock, RowLocks};
use crate::session::Request;
use crate::{CheckReport, Error, LockInfo};

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
        LocksBuilder {
            pool,
            settings: Settings::default(),
            #[cfg(feature = "testing")]
            kept: None,
            #[cfg(feature = "testing")]
            private: None,
        }
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
    /// - [`Error::Database`] when a statement fails for another reason.
    /// - [`Error::Database`], or on MySQL and MariaDB [`Error::Unreachable`], when another process
    ///   has been migrating for a minute. Retryable.
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
    /// The report lists what works and could be better. For example, it names the transaction,
    /// replication slot or reader that keeps old row versions alive, which makes hot locks slow.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// for warning in locks.check().await?.warnings() {
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
        let warnings = self.context.session().ask(|answer| Request::Check { answer }).await?;
        Ok(CheckReport { warnings })
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

    /// Reads the row of a name. Returns `None` if the name was never used.
    ///
    /// The result is for dashboards and logs. It is out of date as soon as it is returned, so do
    /// not use it to decide whether work may continue.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let lease = locks.insert_lock("report:daily").acquire().await?;
    /// if let Some(info) = locks.info("report:daily").await? {
    ///     println!("{} is held by {} until {:?}", info.name, info.owner, info.held_until);
    /// }
    /// # drop(lease);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidName`] when the name is not valid.
    /// - [`Error::SchemaMissing`] and [`Error::UnsupportedTable`] when the table can't be used.
    /// - [`Error::Unreachable`], [`Error::Refused`] and [`Error::Database`] when the row can't be
    ///   read.
    /// - [`Error::Closed`] after [`close`](Self::close).
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time.
    pub async fn info(&self, name: impl AsRef<str>) -> Result<Option<LockInfo>, Error> {
        let name = self.context.checked_name(name.as_ref())?;
        let row = self.context.session().ask(|answer| Request::Read { name: name.clone(), answer }).await?;
        Ok(row.map(|row| row.into_info(&name)))
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

/// Settings of a [`Locks`], from [`Locks::builder`].
///
/// A value that can't work is refused with [`Error::InvalidOption`], by [`Locks::check`] and by
/// each request for a lock that needs the setting.
#[derive(Debug)]
#[must_use = "call `build`"]
pub struct LocksBuilder<DB: LockDatabase> {
    pool: Pool<DB>,
    settings: Settings,
    #[cfg(feature = "testing")]
    kept: Option<Kept>,
    #[cfg(feature = "testing")]
    private: Option<Pool<DB>>,
}

// A derived impl would require `DB: Clone`.
impl<DB: LockDatabase> Clone for LocksBuilder<DB> {
    fn clone(&self) -> Self {
        Self {
            pool: self.pool.clone(),
            settings: self.settings.clone(),
            #[cfg(feature = "testing")]
            kept: self.kept.clone(),
            #[cfg(feature = "testing")]
            private: self.private.clone(),
        }
    }
}

impl<DB: LockDatabase> LocksBuilder<DB> {
    /// Sets the label that is shown as part of the owner, beside host and process id. It is usually
    /// the name of the service.
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.settings.label = label.into();
        self
    }

    /// Sets the schema of the table. On MySQL and MariaDB this is a database of the server.
    /// [`migrate`](Locks::migrate) creates a schema that is missing.
    ///
    /// Without this setting the table is found once, where the connections of the pool look first:
    /// by their `search_path`, or in the database of the URL. In either case every statement then
    /// uses the full name of the table. This includes statements in the caller's transactions,
    /// whatever their `search_path` is. On SQLite the only schema is `main`, the file itself.
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.settings.schema = Some(schema.into());
        self
    }

    /// Sets a prefix for all names in the table.
    ///
    /// It separates several services in one database that would otherwise use the same names. The
    /// prefix counts towards the 255 bytes of a name. Callers pass names without it, and names are
    /// reported without it.
    pub fn name_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.settings.name_prefix = prefix.into();
        self
    }

    /// Sets the TTL of insert locks that do not set their own: 50 ms to 365 days. Default: 30
    /// seconds.
    pub fn default_ttl(mut self, ttl: Duration) -> Self {
        self.settings.default_ttl = ttl;
        self
    }

    /// Sets the wait of requests that do not set their own: at most 365 days. Default: 30 seconds.
    pub fn default_wait(mut self, wait: Duration) -> Self {
        self.settings.default_wait = wait;
        self
    }

    /// Sets whether processes that wait for an insert lock get it in the order in which they came.
    /// Default: `true`.
    ///
    /// The queue is kept in the row of the lock. A request that has to wait costs a small write,
    /// and one more each second. Clusters with several primaries have no queue, because these
    /// writes would conflict with those of the holder.
    ///
    /// With `fair(false)` a request skips the queue: it takes the lock when it finds it free, and
    /// may starve.
    pub fn fair(mut self, fair: bool) -> Self {
        self.settings.fair = fair;
        self
    }

    /// Sets for how long an insert lock may stay in this process after a release, while callers of
    /// this process wait for it.
    ///
    /// The lock is handed from one caller to the next in memory, without asking the database. This
    /// ends after `turns` holders, or when `time` has passed since the database granted the lock.
    /// Then the lock is released, and the request that has waited longest gets it, in whichever
    /// process it is. If no other process was waiting at the time of the grant, there are four
    /// times as many turns.
    ///
    /// Larger values cost less and let other processes wait longer. With one turn each holder asks
    /// the database. Between 1 and 4096 turns are possible.
    ///
    /// Default: 64 turns, 50 ms.
    pub fn hand_off(mut self, turns: u32, time: Duration) -> Self {
        self.settings.hand_off = HandOffLimits { turns, time };
        self
    }

    /// Sets after how long a lock that is still held is reported. `None` turns the reports off.
    ///
    /// A report is a WARN of the crate `tracing` with the name, the owner, the time of the grant
    /// and the fencing token. It is repeated each time twice as much time has passed.
    ///
    /// The reports reveal work that hangs and guards that are never dropped, which keep a lock as
    /// long as their process lives. Two kinds of lock are not reported: leases with an
    /// [`at_most`](InsertLock::at_most), because they end by themselves, and locks in transactions
    /// of the caller, because only the database knows how long they last.
    ///
    /// Between one second and 365 days are possible. Default: ten times the TTL of a lease, but at
    /// least 30 seconds; five minutes for a row lock.
    pub fn warn_after(mut self, time: impl Into<Option<Duration>>) -> Self {
        self.settings.warn_after = time.into().map_or(WarnAfter::Never, WarnAfter::After);
        self
    }

    /// Drops `kept` only when the `Locks` and all its clones are gone.
    #[cfg(feature = "testing")]
    pub(crate) fn keeping(mut self, kept: Kept) -> Self {
        self.kept = Some(kept);
        self
    }

    /// Opens the private connections like those of this pool, instead of the pool for transactions.
    #[cfg(feature = "testing")]
    pub(crate) fn private(mut self, pool: Pool<DB>) -> Self {
        self.private = Some(pool);
        self
    }

    /// Builds the `Locks`. Does not connect yet.
    #[must_use]
    pub fn build(self) -> Locks<DB> {
        #[cfg(all(feature = "testing", not(debug_assertions)))]
        crate::test_support::warn_of_optimised_program();
        let private = self.pool.clone();
        #[cfg(feature = "testing")]
        let private = self.private.unwrap_or(private);
        Locks {
            context: Context::new(
                self.pool,
                private,
                self.settings,
                #[cfg(feature = "testing")]
                self.kept,
            ),
        }
    }
}

fn owned(names: impl IntoIterator<Item = impl AsRef<str>>) -> Vec<String> {
    names.into_iter().map(|name| name.as_ref().to_owned()).collect()
}
