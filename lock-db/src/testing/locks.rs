//! A `Locks` for one test, in a database of its own.

use std::borrow::Borrow;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use sqlx::pool::PoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Pool, SqlitePool};

use crate::database::LockDatabase;
use crate::runtime::Runtime;
use crate::{Error, Locks};

/// Enough for the few tasks of a test; the locks have two connections of their own besides.
const CONNECTIONS: u32 = 8;
/// What a test waits in vain for it had better say soon: shorter than the patience of whoever runs the tests.
const PATIENCE: Duration = Duration::from_secs(5);

/// The locks of one test, and the pool of the database that they are in. From [`locks`].
///
/// It is used as the [`Locks<Sqlite>`](Locks) that it derefs to; `clone()` gives such a one, for a service that wants its
/// own. The database is removed when this and all those clones are gone; a pool alone does not keep it.
#[derive(Debug)]
#[must_use = "the database is removed as soon as this and all clones of its `Locks` are dropped"]
pub struct TestLocks {
    locks: Locks<sqlx::Sqlite>,
}

/// An embedded SQLite database for one test, with `distributed_lock` in it, and nobody else's: tests that run side by side
/// each have their own. Nothing has to be installed, started or removed.
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
/// The database is a file without any sync to disk, in a folder of its own under the temporary folder: as fast as
/// memory, and unlike SQLite's databases in memory it is the same for all connections, with a writer that others can wait
/// for and whom readers don't have to.
///
/// Whatever waits here (for a lock, a connection, the writer) gives up after five seconds instead of thirty, unless it says
/// otherwise, so that a test that hangs soon says why.
///
/// # Errors
///
/// [`Error::Database`] when there can't be a file.
///
/// # Cancel safety
///
/// May be dropped at any time.
pub async fn locks() -> Result<TestLocks, Error> {
    let folder = tempfile::Builder::new()
        .prefix("lock-db-testing-")
        .tempdir()
        .map_err(|error| failed("make a temporary folder for a test", sqlx::Error::Io(error)))?;
    let options = SqliteConnectOptions::new()
        .filename(folder.path().join("test.db"))
        .create_if_missing(true)
        // Readers and the writer don't keep each other waiting, as on a server.
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Off)
        .busy_timeout(PATIENCE);
    let pool = SqlitePoolOptions::new().max_connections(CONNECTIONS).acquire_timeout(PATIENCE);
    // The clock of the test may be paused, and jump over that limit.
    let connecting = Runtime::current()?.spawn(pool.connect_with(options));
    let connected = connecting.await.unwrap_or(Err(sqlx::Error::WorkerCrashed));
    let pool = connected.map_err(|error| failed("make a temporary database for a test", error))?;
    let folder = Arc::new(Folder(Some(folder)));
    let locks = Locks::builder(pool).label("test").default_wait(PATIENCE).keeping(folder).build();
    locks.migrate().await?;
    Ok(TestLocks { locks })
}

/// The locks of one test on a pool of its own, for tests beside `#[sqlx::test]`, which makes a database for each: on
/// PostgreSQL, MySQL, MariaDB and SQLite. The table is made, and waits give up after five seconds, as with [`locks`].
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
/// It ends with its pool: when that is closed, as `#[sqlx::test]` does after the test, what is still held is released, leases
/// count as lost, and its private connections are closed, so that the database can be dropped. So clones that outlive
/// the test, in tasks or in a `static`, are in nobody's way. The private connections are made with the pool's options for
/// connecting, and without its hooks.
///
/// # Errors
///
/// As [`Locks::migrate`]; [`Error::InvalidOption`] outside of a tokio runtime.
///
/// # Cancel safety
///
/// May be dropped at any time.
pub async fn locks_on<DB: LockDatabase>(pool: impl Borrow<Pool<DB>>) -> Result<Locks<DB>, Error> {
    let pool: &Pool<DB> = pool.borrow();
    // All pools of `#[sqlx::test]` share the permits of one, of which a session would keep two for the whole test.
    let private = PoolOptions::new().min_connections(0).idle_timeout(None).max_lifetime(None);
    let private = private.connect_lazy_with((*pool.connect_options()).clone());
    let locks = Locks::builder(pool.clone()).private(private).label("test").default_wait(PATIENCE).build();
    let (weak, closed) = (locks.downgrade(), pool.close_event());
    drop(Runtime::current()?.spawn(async move {
        closed.await;
        if let Some(locks) = weak.upgrade() {
            locks.close().await;
        }
    }));
    locks.migrate().await?;
    Ok(locks)
}

impl TestLocks {
    /// The pool of the database: for the tables of the service, and for what it does with them.
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

/// Removed when the last `Locks` of its database is dropped. Connections that are being closed just then write to files
/// that nobody finds any more.
struct Folder(Option<tempfile::TempDir>);

impl Drop for Folder {
    fn drop(&mut self) {
        let Some(folder) = self.0.take() else { return };
        let path = folder.path().to_owned();
        match folder.close() {
            // A connection has removed one of its files meanwhile: once more.
            Err(_) if path.exists() => drop(std::fs::remove_dir_all(path)),
            _ => {}
        }
    }
}

fn failed(action: &'static str, source: sqlx::Error) -> Error {
    Error::Database { action, name: None, within: None, source }
}
