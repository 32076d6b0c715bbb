//! A `Locks` for one test, in a database of its own.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};

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
    let pool = SqlitePoolOptions::new()
        .max_connections(CONNECTIONS)
        .acquire_timeout(PATIENCE)
        .connect_with(options)
        .await
        .map_err(|error| failed("make a temporary database for a test", error))?;
    let folder = Arc::new(Folder(Some(folder)));
    let locks = Locks::builder(pool).label("test").default_wait(PATIENCE).keeping(folder).build();
    locks.migrate().await?;
    Ok(TestLocks { locks })
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
    Error::Database { action, name: None, source }
}
