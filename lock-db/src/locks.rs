//! `Locks`: what a service keeps.

use std::sync::Arc;
use std::time::Duration;

use sqlx::Pool;

use crate::database::{Location, LockDatabase};
use crate::in_transaction::{Counts, KnownRows};
use crate::insert::{InsertLock, InsertLocks};
use crate::limits::{DEFAULT_HAND_OFF, DEFAULT_TTL, DEFAULT_WAIT, MOST_TURNS, SHORTEST_WARNING};
use crate::long_hold::WarnAfter;
use crate::name::Name;
use crate::reentry::{Instance, Lock};
use crate::row::{RowLock, RowLocks, RowQueues};
use crate::session::{HandOff, Request, Session, Watched};
use crate::{CheckReport, Error, LockInfo, name};

/// The locks of a database. Cheap to clone; make one for each pool and keep it as long as the program runs.
///
/// It uses at most two connections of its own, however many locks are held through it, made like those of the pool
/// (same options, same hooks). They and their thread start with the first use.
pub struct Locks<DB: LockDatabase> {
    shared: Arc<Shared<DB>>,
}

struct Shared<DB: LockDatabase> {
    pool: Pool<DB>,
    session: Session,
    location: Arc<Location>,
    name_prefix: Arc<str>,
    owner: Arc<str>,
    default_ttl: Duration,
    default_wait: Duration,
    fair: bool,
    known_rows: KnownRows,
    counts: Arc<Counts>,
    row_queues: RowQueues,
    instance: Instance,
    /// What has to be there as long as this is.
    #[cfg(feature = "testing")]
    _kept: Option<Kept>,
}

#[cfg(feature = "testing")]
type Kept = Arc<dyn std::any::Any + Send + Sync>;

impl<DB: LockDatabase> Locks<DB> {
    /// Locks in the database of this pool, with the default settings. Connects to nothing yet.
    #[must_use]
    pub fn new(pool: Pool<DB>) -> Self {
        Self::builder(pool).build()
    }

    /// For settings of your own.
    pub fn builder(pool: Pool<DB>) -> LocksBuilder<DB> {
        LocksBuilder {
            pool,
            label: String::new(),
            schema: None,
            name_prefix: String::new(),
            default_ttl: DEFAULT_TTL,
            default_wait: DEFAULT_WAIT,
            hand_off: DEFAULT_HAND_OFF,
            warn_after: WarnAfter::TimesTtl,
            fair: true,
            #[cfg(feature = "testing")]
            kept: None,
            #[cfg(feature = "testing")]
            private: None,
        }
    }

    /// Creates the table `distributed_lock` if it is missing, and brings it up to date. Any number of processes may call
    /// this at the same time. Which migrations were applied is noted in `_lock_db_migrations`; sqlx's own table
    /// `_sqlx_migrations` is not touched.
    ///
    /// When all is applied it only reads, so that a role may call it that can only use the table. On PostgreSQL it moves the sequence of
    /// the ids forward when that is behind the rows, if the role may: as after a switch to a logical replica.
    ///
    /// # Errors
    ///
    /// [`Error::Database`] when a statement fails, the right to create tables is missing, or another process has been
    /// migrating for a minute; [`Error::UnsupportedTable`] and [`Error::SchemaMissing`] as in [`check`](Self::check). Nothing is left locked.
    ///
    /// # Cancel safety
    ///
    /// The migration goes on when the future is dropped; only the answer is lost.
    pub async fn migrate(&self) -> Result<(), Error> {
        self.session().ask(|answer| Request::Migrate { answer }).await
    }

    /// Checks that the table is there and as this version of lock-db needs it: for the start of a service, above all one that applies
    /// the migrations by other means. It makes a row, locks and writes it, and rolls that back. The report says what works and could be
    /// better, among it whose transaction, replication slot or reader keeps the old versions of rows, which makes hot locks slow.
    ///
    /// # Errors
    ///
    /// [`Error::SchemaMissing`] when it is not there or lacks a column; [`Error::UnsupportedTable`] when it can't keep locks as it is:
    /// partitioned or inherited, a view or foreign, without its unique index, under rules or row level security, in another
    /// storage engine than InnoDB; [`Error::Database`] when a right is missing (which one it says), the database may only be read, the
    /// sequence of the ids is behind the rows, or the database can't be asked.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn check(&self) -> Result<CheckReport, Error> {
        let warnings = self.session().ask(|answer| Request::Check { answer }).await?;
        Ok(CheckReport { warnings })
    }

    /// A lock that is a lease: held by a row of the table without any connection, renewed in the background, free after
    /// its TTL when its holder is gone. For jobs, for work longer than one transaction, and behind PgBouncer.
    ///
    /// The name is compared byte by byte, has 1 to 255 bytes of UTF-8, and is used with this kind of lock only.
    pub fn insert_lock(&self, name: impl AsRef<str>) -> InsertLock<DB> {
        InsertLock::new(self.clone(), name.as_ref())
    }

    /// A lock that is a locked row: held by a transaction, which may be the caller's own, and free when that ends. For
    /// short critical sections inside one transaction.
    ///
    /// The name is compared byte by byte, has 1 to 255 bytes of UTF-8, and is used with this kind of lock only.
    pub fn row_lock(&self, name: impl AsRef<str>) -> RowLock<DB> {
        RowLock::new(self.clone(), name.as_ref())
    }

    /// Several insert locks at once: all or none.
    pub fn insert_locks(&self, names: impl IntoIterator<Item = impl AsRef<str>>) -> InsertLocks<DB> {
        InsertLocks::new(self.clone(), owned(names))
    }

    /// Several row locks in one transaction, taken in one order.
    pub fn row_locks(&self, names: impl IntoIterator<Item = impl AsRef<str>>) -> RowLocks<DB> {
        RowLocks::new(self.clone(), owned(names))
    }

    /// What the table says about a name: for a dashboard or a log, not to decide by. `None` if it was never used.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidName`], [`Error::SchemaMissing`], [`Error::Closed`], [`Error::Database`].
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time.
    pub async fn info(&self, name: impl AsRef<str>) -> Result<Option<LockInfo>, Error> {
        let name = self.checked_name(name.as_ref())?;
        let row = self.session().ask(|answer| Request::Look { name: name.clone(), answer }).await?;
        Ok(row.map(|row| row.into_info(&name)))
    }

    /// Releases every insert lock that is still held through this `Locks` and its clones, and refuses all further use. A
    /// lease that is open somewhere counts as lost. Row locks that are held go on until their transactions end.
    ///
    /// Call it when a service shuts down, after its last request: what is not released then stays taken until its TTL is
    /// over. Returns within ten seconds, whatever the database does.
    ///
    /// # Cancel safety
    ///
    /// The releases go on when the future is dropped.
    pub async fn close(&self) {
        self.session().close().await;
    }

    pub(crate) fn session(&self) -> &Session {
        &self.shared.session
    }

    /// A name as it stands in the table.
    pub(crate) fn checked_name(&self, name: &str) -> Result<Name, Error> {
        name::check(&self.shared.name_prefix, name)
    }

    pub(crate) fn location(&self) -> &Location {
        &self.shared.location
    }

    pub(crate) fn pool(&self) -> &Pool<DB> {
        &self.shared.pool
    }

    #[cfg(feature = "testing")]
    pub(crate) fn instance(&self) -> Instance {
        self.shared.instance
    }

    #[cfg(feature = "testing")]
    pub(crate) fn downgrade(&self) -> WeakLocks<DB> {
        WeakLocks(Arc::downgrade(&self.shared))
    }

    pub(crate) fn owner(&self) -> &Arc<str> {
        &self.shared.owner
    }

    pub(crate) fn default_ttl(&self) -> Duration {
        self.shared.default_ttl
    }

    pub(crate) fn default_wait(&self) -> Duration {
        self.shared.default_wait
    }

    pub(crate) fn is_fair(&self) -> bool {
        self.shared.fair
    }

    pub(crate) fn known_rows(&self) -> &KnownRows {
        &self.shared.known_rows
    }

    pub(crate) fn row_queues(&self) -> &RowQueues {
        &self.shared.row_queues
    }

    pub(crate) fn counts(&self) -> &Arc<Counts> {
        &self.shared.counts
    }

    /// By what calls on this `Locks` find each other.
    pub(crate) fn reentry_key(&self, name: &str) -> Result<Lock, Error> {
        Ok(Lock { locks: self.shared.instance, name: self.checked_name(name)? })
    }
}

/// Does not keep it.
#[cfg(feature = "testing")]
pub(crate) struct WeakLocks<DB: LockDatabase>(std::sync::Weak<Shared<DB>>);

#[cfg(feature = "testing")]
impl<DB: LockDatabase> WeakLocks<DB> {
    pub(crate) fn upgrade(&self) -> Option<Locks<DB>> {
        self.0.upgrade().map(|shared| Locks { shared })
    }
}

impl<DB: LockDatabase> Clone for Locks<DB> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<DB: LockDatabase> std::fmt::Debug for Locks<DB> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Locks")
            .field("database", &DB::NAME)
            .field("owner", &self.shared.owner)
            .field("session", &self.shared.session)
            .finish_non_exhaustive()
    }
}

/// Settings of a [`Locks`]. Values that can't work are refused by the first lock that meets them.
#[derive(Debug)]
#[must_use = "call `build`"]
pub struct LocksBuilder<DB: LockDatabase> {
    pool: Pool<DB>,
    label: String,
    schema: Option<String>,
    name_prefix: String,
    default_ttl: Duration,
    default_wait: Duration,
    hand_off: HandOff,
    warn_after: WarnAfter,
    fair: bool,
    #[cfg(feature = "testing")]
    kept: Option<Kept>,
    #[cfg(feature = "testing")]
    private: Option<Pool<DB>>,
}

// Derived, it would ask for a database type that can be cloned.
impl<DB: LockDatabase> Clone for LocksBuilder<DB> {
    fn clone(&self) -> Self {
        Self {
            pool: self.pool.clone(),
            label: self.label.clone(),
            schema: self.schema.clone(),
            name_prefix: self.name_prefix.clone(),
            default_ttl: self.default_ttl,
            default_wait: self.default_wait,
            hand_off: self.hand_off,
            warn_after: self.warn_after,
            fair: self.fair,
            #[cfg(feature = "testing")]
            kept: self.kept.clone(),
            #[cfg(feature = "testing")]
            private: self.private.clone(),
        }
    }
}

impl<DB: LockDatabase> LocksBuilder<DB> {
    /// What people see as the owner, beside host and process id: the name of the service, say.
    pub fn label(mut self, label: impl Into<String>) -> Self {
        self.label = label.into();
        self
    }

    /// In which schema the table is; on MySQL and MariaDB, in which database of the server. [`migrate`](Locks::migrate) makes a
    /// schema that is missing.
    ///
    /// Without this the table is found once, where the connections of the pool look first (`search_path`, the database of the
    /// URL). In either case every statement names it in full from then on, also those in your own transactions, whatever their
    /// `search_path` is. On SQLite there is only `main`, the file itself.
    pub fn schema(mut self, schema: impl Into<String>) -> Self {
        self.schema = Some(schema.into());
        self
    }

    /// What stands in front of all names in the table: for several services in one database that must not mean the same lock by the same
    /// name. It counts for the 255 bytes that a name may have. Names are given without it, and told without it.
    pub fn name_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.name_prefix = prefix.into();
        self
    }

    /// For insert locks that say nothing of their own: 50 ms to 365 days. Default: 30 seconds.
    pub fn default_ttl(mut self, ttl: Duration) -> Self {
        self.default_ttl = ttl;
        self
    }

    /// For locks that say nothing of their own: at most 365 days. Default: 30 seconds.
    pub fn default_wait(mut self, wait: Duration) -> Self {
        self.default_wait = wait;
        self
    }

    /// Whether processes that wait for an insert lock get it in the order in which they came. Default: yes.
    ///
    /// The queue is kept in the lock's row, so a caller that has to wait costs a small write, and one more each second; on
    /// clusters with several primaries there is none, for those writes would be in the way of the holder. With `fair(false)` a
    /// request skips the queue: it takes the lock when it finds it free, and may starve.
    pub fn fair(mut self, fair: bool) -> Self {
        self.fair = fair;
        self
    }

    /// How long an insert lock that is released stays in this process while callers of this process wait for it: it goes
    /// from one to the next in memory, without asking the database, for at most so many `turns` and so much `time` since
    /// the database granted it. Then it is released, and whoever waits longest has it next, in whichever process. If no
    /// other process waited for it at the grant, there are four times as many turns.
    ///
    /// More of it costs less and lets other processes wait longer. One turn means that each holder asks the database; more
    /// than 4 096 turns count as so many. Default: 64 turns, 50 ms.
    pub fn hand_off(mut self, turns: u32, time: Duration) -> Self {
        self.hand_off = HandOff { turns: turns.clamp(1, MOST_TURNS), time };
        self
    }

    /// After how long a lock that is still held is warned of, once and then each time that twice as much has passed: a WARN of the
    /// crate `tracing` with the name, the owner, since when, and the fencing token. `None`: never.
    ///
    /// It is for work that hangs and guards that are never dropped, which keep a lock as long as their process lives. Leases
    /// with an [`at_most`](InsertLock::at_most) have an end, and are not warned of; nor are locks in transactions of the
    /// caller, of which only the database knows how long they last.
    ///
    /// One second at least. Default: ten times the TTL of a lease, 30 seconds at least; five minutes for a row lock.
    pub fn warn_after(mut self, time: impl Into<Option<Duration>>) -> Self {
        self.warn_after =
            time.into().map_or(WarnAfter::Never, |time| WarnAfter::After(time.max(SHORTEST_WARNING)));
        self
    }

    /// Drops this only when the `Locks` and all its clones are gone.
    #[cfg(feature = "testing")]
    pub(crate) fn keeping(mut self, kept: Kept) -> Self {
        self.kept = Some(kept);
        self
    }

    /// Makes private connections like those of this pool, rather than of the one for transactions.
    #[cfg(feature = "testing")]
    pub(crate) fn private(mut self, pool: Pool<DB>) -> Self {
        self.private = Some(pool);
        self
    }

    /// The `Locks`. Connects to nothing yet.
    #[must_use]
    pub fn build(self) -> Locks<DB> {
        #[cfg(all(feature = "testing", not(debug_assertions)))]
        crate::testing::warn_of_optimised_program();
        let Self {
            pool,
            label,
            schema,
            name_prefix,
            default_ttl,
            default_wait,
            hand_off,
            warn_after,
            fair,
            ..
        } = self;
        let (location, owner) =
            (Arc::new(Location::new(schema, DB::keeps_statements(&pool.connect_options()))), owner(&label));
        let private = pool.clone();
        #[cfg(feature = "testing")]
        let private = self.private.unwrap_or(private);
        let row_queues = RowQueues::new(pool.options().get_max_connections());
        let watched = Watched { warn_after, turns: Arc::clone(&row_queues.turns) };
        let shared = Shared {
            session: Session::new(private, Arc::clone(&location), hand_off, Arc::clone(&owner), watched),
            location,
            name_prefix: name_prefix.into(),
            owner,
            default_ttl,
            default_wait,
            fair,
            known_rows: KnownRows::default(),
            counts: Arc::default(),
            row_queues,
            pool,
            instance: Instance::new(),
            #[cfg(feature = "testing")]
            _kept: self.kept,
        };
        Locks { shared: Arc::new(shared) }
    }
}

fn owned(names: impl IntoIterator<Item = impl AsRef<str>>) -> Vec<String> {
    names.into_iter().map(|name| name.as_ref().to_owned()).collect()
}

/// Host, process id and label, within the 255 characters of the column.
fn owner(label: &str) -> Arc<str> {
    const LONGEST: usize = 255;
    let host = hostname::get().unwrap_or_default();
    let mut owner = format!("{}/{}", host.to_string_lossy(), std::process::id());
    if !label.is_empty() {
        owner.push('/');
        owner.push_str(label);
    }
    // PostgreSQL can't store NUL.
    owner.chars().filter(|character| *character != '\0').take(LONGEST).collect::<String>().into()
}

#[cfg(test)]
mod tests {
    use super::owner;

    #[test]
    fn an_owner_fits_its_column() {
        assert!(owner("billing").ends_with(&format!("/{}/billing", std::process::id())));
        assert_eq!(owner(&"ü".repeat(300)).chars().count(), 255);
        assert!(!owner("a\0b").contains('\0'));
    }
}
