//! What a suite can do with a database, whatever its kind.

use std::future::Future;
use std::time::Duration;

use lock_db::{Error, LockDatabase, Locks};
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::pool::PoolOptions;
use sqlx::{AssertSqlSafe, Connection, MySql, Pool, Postgres, Row, Sqlite};

/// An empty database of one kind for one test. Dropping it drops it on the server too.
pub trait TestDatabase: Sized + Send + Sync + 'static {
    type Database: Backend;

    /// The name in `LOCK_DB_TEST_REQUIRE` and in the names of tests.
    const NAME: &'static str;

    /// Creates a database. If this run has no such server, the case is [ignored](crate::ignore), or
    /// fails if the run requires one.
    fn create() -> impl Future<Output = Self> + Send;

    fn url(&self) -> &str;

    /// The connections to this database and what they are doing, without those of the harness
    /// itself.
    fn activity(&self) -> impl Future<Output = Activity> + Send;

    /// How many of lock-db's advisory locks are held: of its migrations, and on MySQL and MariaDB
    /// its user locks of rows.
    fn advisory_locks(&self) -> impl Future<Output = usize> + Send {
        std::future::ready(0)
    }

    /// Reopens the harness's own connection, after the server was away.
    fn reconnect(&self) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }

    /// Runs statements on a connection of the harness.
    fn run(&self, sql: &str) -> impl Future<Output = u64> + Send;

    /// The first column of the first row, read on a connection of the harness. `None`: no row, or
    /// NULL.
    fn find_number(&self, sql: &str) -> impl Future<Output = Option<i64>> + Send;

    /// The first column of the first row, read on a connection of the harness. `None`: no row, or
    /// NULL.
    fn find_text(&self, sql: &str) -> impl Future<Output = Option<String>> + Send;

    /// [`find_number`](Self::find_number), which panics if there is none.
    fn number(&self, sql: &str) -> impl Future<Output = i64> + Send {
        async move { self.find_number(sql).await.unwrap_or_else(|| panic!("no number: {sql}")) }
    }

    /// [`find_text`](Self::find_text), which panics if there is none.
    fn text(&self, sql: &str) -> impl Future<Output = String> + Send {
        async move { self.find_text(sql).await.unwrap_or_else(|| panic!("no text: {sql}")) }
    }

    fn pool(&self, max_connections: u32) -> impl Future<Output = Pool<Self::Database>> + Send {
        async move { pool(self.url(), max_connections).await }
    }

    fn connection(&self) -> impl Future<Output = <Self::Database as sqlx::Database>::Connection> + Send {
        async { connection::<Self::Database>(self.url()).await }
    }

    /// Locks with their own pool. The table is created.
    fn locks(&self) -> impl Future<Output = Locks<Self::Database>> + Send {
        async { migrated(Locks::new(self.pool(8).await)).await }
    }
}

/// A database behind a network.
pub trait TestServer: TestDatabase {
    /// Host and port.
    fn address(&self) -> (String, u16);

    /// The URL of the same database by another address, usually that of a [`Proxy`](crate::Proxy).
    fn url_by(&self, address: std::net::SocketAddr) -> String;

    /// Ends every connection to this database except the harness's own, on the server, as an
    /// administrator would.
    fn end_connections(&self) -> impl Future<Output = ()> + Send;

    /// A proxy in front of the server. [`url_by`](Self::url_by) returns the URL through it.
    fn proxy(&self) -> crate::Proxy {
        crate::Proxy::new(self.address())
    }
}

/// What is happening in a database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activity {
    /// Open connections. On SQLite, only those of this process; a closed one may be counted while
    /// another connection is busy.
    pub connections: usize,
    /// Open transactions, including running statements. On MySQL and MariaDB, only those that have
    /// accessed a table. On SQLite, one if the write lock is held.
    pub transactions: usize,
    /// Connections that wait for a lock of the server. Always 0 on SQLite, where the client waits.
    pub waiting: usize,
}

/// Executes SQL as text, in the same way on every driver: without placeholders, prepared statements
/// or type checks.
pub trait Backend: LockDatabase {
    /// Runs statements. Returns the number of rows that they changed.
    fn run(connection: &mut Self::Connection, sql: &str) -> impl Future<Output = sqlx::Result<u64>> + Send;

    /// The first column of the first row. `None`: no row, or NULL.
    fn find_number(
        connection: &mut Self::Connection,
        sql: &str,
    ) -> impl Future<Output = sqlx::Result<Option<i64>>> + Send;

    /// The first column of the first row. `None`: no row, or NULL.
    fn find_text(
        connection: &mut Self::Connection,
        sql: &str,
    ) -> impl Future<Output = sqlx::Result<Option<String>>> + Send;

    /// The first column of all rows.
    fn numbers(
        connection: &mut Self::Connection,
        sql: &str,
    ) -> impl Future<Output = sqlx::Result<Vec<i64>>> + Send;

    /// Applies migrations as a program or sqlx-cli does.
    fn apply(
        connection: &mut Self::Connection,
        migrations: &Migrator,
    ) -> impl Future<Output = Result<(), MigrateError>> + Send;
}

macro_rules! backend {
    ($($database:ty)*) => {$(
        impl Backend for $database {
            async fn run(connection: &mut Self::Connection, sql: &str) -> sqlx::Result<u64> {
                let result = sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await?;
                Ok(result.rows_affected())
            }

            async fn find_number(connection: &mut Self::Connection, sql: &str) -> sqlx::Result<Option<i64>> {
                match sqlx::raw_sql(AssertSqlSafe(sql)).fetch_optional(connection).await? {
                    Some(row) => row.try_get_unchecked(0),
                    None => Ok(None),
                }
            }

            async fn find_text(connection: &mut Self::Connection, sql: &str) -> sqlx::Result<Option<String>> {
                match sqlx::raw_sql(AssertSqlSafe(sql)).fetch_optional(connection).await? {
                    Some(row) => row.try_get_unchecked(0),
                    None => Ok(None),
                }
            }

            async fn numbers(connection: &mut Self::Connection, sql: &str) -> sqlx::Result<Vec<i64>> {
                let rows = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await?;
                rows.iter().map(|row| row.try_get_unchecked(0)).collect()
            }

            async fn apply(
                connection: &mut Self::Connection,
                migrations: &Migrator,
            ) -> Result<(), MigrateError> {
                migrations.run_direct(None, connection, false).await
            }
        }
    )*};
}

backend!(Postgres MySql Sqlite);

/// A connection to the test's database.
pub async fn connection<DB: Backend>(url: &str) -> DB::Connection {
    DB::Connection::connect(url).await.expect("connects to the test's database")
}

/// A pool like an application's, but with a long timeout, because the machine may be busy with
/// other tests.
pub async fn pool<DB: Backend>(url: &str, max_connections: u32) -> Pool<DB> {
    PoolOptions::new()
        .max_connections(max_connections)
        .acquire_timeout(Duration::from_mins(1))
        .connect(url)
        .await
        .expect("connects to the test's database")
}

/// The same locks, with the table created.
pub async fn migrated<DB: Backend>(locks: Locks<DB>) -> Locks<DB> {
    locks.migrate().await.expect("makes the table");
    locks
}

/// Whether the result of a try says that the lock is taken. On SQLite, a transaction that has the
/// lock looks like any other that writes, except in its own process.
#[track_caller]
pub fn is_taken<T: TestDatabase, G>(answer: Result<Option<G>, Error>) -> bool {
    match answer {
        Ok(granted) => granted.is_none(),
        Err(error @ (Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. }))
            if T::NAME == "sqlite" && error.is_retryable() =>
        {
            true
        }
        Err(error) => panic!("{error:?}"),
    }
}
