//! A `Locks` for one test, in a database of its own.

use std::borrow::Borrow;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use sqlx::pool::PoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Pool, SqlitePool};

use crate::database::LockDatabase;
use crate::error::Action;
use crate::runtime::Runtime;
use crate::{Error, Locks};

/// Enough for the few tasks of a test. The `Locks` has two connections of its own besides.
const CONNECTIONS: u32 = 8;
/// A test that waits in vain should fail soon, before the person or tool that runs it gives up.
const PATIENCE: Duration = Duration::from_secs(5);

/// The locks of one test, with the pool of their database. From [`locks`].
///
/// It derefs to a [`Locks<Sqlite>`](Locks), and is used like one. `clone()` returns a
/// `Locks<Sqlite>`, for a service that needs its own. The database is removed when this and all
/// those clones are dropped. The pool alone does not keep it.
#[derive(Debug)]
#[must_use = "the database is removed as soon as this and all clones of its `Locks` are dropped"]
pub struct TestLocks {
    locks: Locks<sqlx::Sqlite>,
}

/// Creates an embedded SQLite database for one test, with the table `distributed_lock`.
///
/// Each call creates a database of its own, so tests that run in parallel do not share locks.
/// Nothing has to be installed, started or removed.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let locks = lock_db::testing::locks().await?;
/// sqlx::query("CREATE TABLE orders (id INTEGER PRIMARY KEY)").execute(locks.pool()).await?;
///
/// let lease = locks.insert_lock("order:1").acquire().await?;
/// assert!(locks.insert_lock("order:1").try_acquire().await?.is_none());
/// # drop(lease);
/// # Ok(())
/// # }
/// ```
///
/// The database is a file that is never synced to disk, in its own folder inside the temporary
/// folder. It is as fast as a database in memory. Unlike SQLite's databases in memory, it is shared
/// by all connections, other connections can wait for its writer, and readers do not have to wait.
///
/// A request that waits (for a lock, a connection, the writer) gives up after five seconds instead
/// of thirty, unless it sets its own wait. A test that hangs therefore fails soon.
///
/// # Errors
///
/// - [`Error::Database`] when the file can't be created or opened.
/// - [`Error::InvalidOption`] outside of a tokio runtime.
/// - Otherwise as [`Locks::migrate`].
///
/// # Cancel safety
///
/// The future may be dropped at any time.
pub async fn locks() -> Result<TestLocks, Error> {
    let folder =
        tempfile::Builder::new().prefix("lock-db-testing-").tempdir().map_err(|error| failed(&error))?;
    let options = SqliteConnectOptions::new()
        .filename(folder.path().join("test.db"))
        .create_if_missing(true)
        // Readers and the writer do not wait for each other, as on a server.
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Off)
        .busy_timeout(PATIENCE);
    let pool = SqlitePoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(PATIENCE);
    // The clock of the test may be paused, and could skip past that limit.
    let connecting = Runtime::current()?.spawn(pool.connect_with(options));
    let connected = connecting.await.unwrap_or(Err(sqlx::Error::WorkerCrashed));
    let pool = connected.map_err(|error| failed(&error))?;
    let folder = Arc::new(Folder(Some(folder)));
    let locks = Locks::builder(pool).label("test").default_wait(PATIENCE).keeping(folder).build();
    locks.migrate().await?;
    Ok(TestLocks { locks })
}

/// Creates the locks of one test on the pool of that test, for use with `#[sqlx::test]`, which
/// creates a database for each test: on PostgreSQL, MySQL, MariaDB and SQLite. The table is
/// created, and waits give up after five seconds, as with [`locks`].
///
#[cfg_attr(feature = "postgres", doc = "```no_run")]
#[cfg_attr(not(feature = "postgres"), doc = "```ignore")]
/// use lock_db::testing;
/// use sqlx::PgPool;
///
/// # /*
/// #[sqlx::test]
/// # */
/// async fn orders_are_counted(pool: PgPool) -> Result<(), Box<dyn std::error::Error>> {
///     let locks = testing::locks_on(&pool).await?;
///     let lease = locks.insert_lock("order:1").acquire().await?;
///     let mut transaction = lease.begin().await?;
///     sqlx::query("INSERT INTO orders VALUES (1)").execute(&mut *transaction).await?;
///     transaction.commit().await?;
///     Ok(())
/// }
/// ```
///
/// The locks end with the pool. `#[sqlx::test]` closes it after the test. Then all held locks are
/// released, leases count as lost, and the private connections are closed, so that the database can
/// be dropped. Clones that outlive the test, in tasks or in a `static`, do not prevent this. The
/// private connections are opened with the connect options of the pool, and without its hooks.
///
/// # Errors
///
/// As [`Locks::migrate`]. [`Error::InvalidOption`] outside of a tokio runtime.
///
/// # Cancel safety
///
/// The future may be dropped at any time.
pub async fn locks_on<DB: LockDatabase>(pool: impl Borrow<Pool<DB>>) -> Result<Locks<DB>, Error> {
    let pool: &Pool<DB> = pool.borrow();
    // All pools of `#[sqlx::test]` share the permits of one. A session would keep two of them for
    // the whole test.
    let private = PoolOptions::new().min_connections(0).idle_timeout(None).max_lifetime(None);
    let private = private.connect_lazy_with((*pool.connect_options()).clone());
    let locks = Locks::builder(pool.clone()).private(private).label("test").default_wait(PATIENCE).build();
    let (weak, closed) = (Arc::downgrade(locks.context()), pool.close_event());
    drop(Runtime::current()?.spawn(async move {
        closed.await;
        if let Some(context) = weak.upgrade() {
            context.session().close().await;
        }
    }));
    locks.migrate().await?;
    Ok(locks)
}

impl TestLocks {
    /// The pool of the database, for the tables and statements of the service.
    #[must_use]
    pub fn pool(&self) -> &SqlitePool {
        self.locks.pool()
    }
}

impl Deref for TestLocks {
    type Target = Locks<sqlx::Sqlite>;

    fn deref(&self) -> &Self::Target {
        &self.locks
    }
}

/// Removed when the last `Locks` of its database is dropped. Connections that are closing at that
/// moment write to files that are already unlinked.
struct Folder(Option<tempfile::TempDir>);

impl Drop for Folder {
    fn drop(&mut self) {
        let Some(folder) = self.0.take() else { return };
        let path = folder.path().to_owned();
        match folder.close() {
            // A connection has removed one of its files in the meantime: try once more.
            Err(_) if path.exists() => drop(std::fs::remove_dir_all(path)),
            _ => {}
        }
    }
}

fn failed(error: &dyn std::error::Error) -> Error {
    Error::other(Action::PrepareTest, None, false, error.to_string())
}
