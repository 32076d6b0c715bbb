//! The settings of a `Locks`.

use std::time::Duration;

use sqlx::Pool;

use super::Locks;
use crate::context::Context;
#[cfg(feature = "testing")]
use crate::context::Kept;
use crate::database::LockDatabase;
use crate::options::{HandOffLimits, Settings, WarnAfter};

/// Settings of a [`Locks`], from [`Locks::builder`].
///
/// A value that can't work is refused with
/// [`Error::InvalidOption`](crate::Error::InvalidOption), by [`Locks::check`] and by each request
/// for a lock that needs the setting.
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
    pub(super) fn new(pool: Pool<DB>) -> Self {
        Self {
            pool,
            settings: Settings::default(),
            #[cfg(feature = "testing")]
            kept: None,
            #[cfg(feature = "testing")]
            private: None,
        }
    }

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
    /// ends after `holders` holders, or when `time` has passed since the database granted the lock.
    /// Then the lock is released, and the request that has waited longest gets it, in whichever
    /// process it is. If no other process was waiting at the time of the grant, there are four
    /// times as many holders.
    ///
    /// Larger values cost less and let other processes wait longer. With one holder each request asks
    /// the database. Between 1 and 4096 holders are possible.
    ///
    /// Default: 64 holders, 50 ms.
    pub fn hand_off(mut self, holders: u32, time: Duration) -> Self {
        self.settings.hand_off = HandOffLimits { holders, time };
        self
    }

    /// Sets after how long a lock that is still held is reported. `None` turns the reports off.
    ///
    /// A report is a WARN of the crate `tracing` with the name, the owner, the time of the grant
    /// and the fencing token. It is repeated each time twice as much time has passed.
    ///
    /// The reports reveal work that hangs and guards that are never dropped, which keep a lock as
    /// long as their process lives. Two kinds of lock are not reported: leases with an
    /// [`at_most`](crate::InsertLock::at_most), because they end by themselves, and locks in
    /// transactions of the caller, because only the database knows how long they last.
    ///
    /// Between one second and 365 days are possible. Default: ten times the TTL of a lease, but at
    /// least 30 seconds; five minutes for a row lock.
    pub fn warn_after(mut self, time: impl Into<Option<Duration>>) -> Self {
        self.settings.warn_after = time.into().map_or(WarnAfter::Never, WarnAfter::After);
        self
    }

    /// Sets after how long the rows of unused names are removed from the table. `None`: never.
    ///
    /// A name leaves a row behind. Without this, names with a number in them (`order:{id}`) would
    /// leave a row each. A process that uses locks looks for rows that were not used for this long,
    /// and removes them, in small parts and one process at a time. A row goes within 15 seconds of
    /// its being due, or within a tenth of the time if that is longer. The first search of a process
    /// begins after half an hour to an hour, or earlier if `time` is short. Processes that end
    /// before that can call [`Locks::prune`].
    ///
    /// Only rows whose names have the [prefix](Self::name_prefix) of this `Locks` are removed. Locks
    /// that are held or waited for stay, and fencing tokens do not come back. On MySQL and MariaDB
    /// the newest row of the table stays, too. The right to delete rows is needed. Without it, one
    /// warning is logged, and the rows stay.
    ///
    /// `time` has to be longer than any transaction that takes locks. A transaction in REPEATABLE
    /// READ is refused if a holder has committed since its snapshot, and the row is what shows
    /// that.
    ///
    /// Between one second and 365 days are possible. Default: 30 days.
    pub fn prune_after(mut self, time: impl Into<Option<Duration>>) -> Self {
        self.settings.prune_after = time.into();
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
