//! The SQL of the other ways to lock. The databases differ in their placeholders, their types, and
//! in how they insert a row unless it exists.

use std::str::FromStr;
use std::time::Duration;

use lock_db::LockDatabase;
use sqlx::mysql::MySqlConnectOptions;
use sqlx::pool::PoolOptions;
use sqlx::postgres::PgConnectOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{Connection, MySql, Pool, Postgres, QueryBuilder, Sqlite};

/// One row per caller, for the contenders that need rows that exist: the maximum number of callers
/// in the scenarios that include them.
const ROWS: i64 = 64;
/// How many names one statement removes.
const BATCH: i64 = 1000;

pub(crate) type Options<DB> = <<DB as sqlx::Database>::Connection as Connection>::Options;

/// A database with the tables of the contenders that are not lock-db. Each statement is a
/// transaction of its own.
pub(crate) trait Database: LockDatabase {
    fn options(url: &str) -> sqlx::Result<Options<Self>>;

    /// Removes the tables and creates them again.
    fn create_tables(connection: &mut Self::Connection) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Removes the tables, and the rows of this benchmark in `distributed_lock`. The rows are
    /// removed in batches by primary key. One statement for all would lock the rows of other names
    /// for as long as it runs.
    fn remove_tables(connection: &mut Self::Connection) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// For the floor: updates one row.
    fn touch(connection: &mut Self::Connection, row: i64) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// For the row lock without lock-db: locks one row until the end of the transaction.
    fn select_for_update(
        connection: &mut Self::Connection,
        row: i64,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// For the naive lock: inserts the row. Returns whether it did not exist before.
    fn insert(
        connection: &mut Self::Connection,
        name: &str,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send;

    /// For the naive lock: deletes the row. Returns whether it existed.
    fn delete(
        connection: &mut Self::Connection,
        name: &str,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send;

    /// For the row with an expiry: creates an expired row unless one exists.
    fn create_row(
        connection: &mut Self::Connection,
        name: &str,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send;

    /// For the row with an expiry: acquires the row if it has expired. Returns whether it had.
    fn acquire_row(
        connection: &mut Self::Connection,
        owner: &str,
        name: &str,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send;

    /// For the row with an expiry: releases the row. Returns whether it belonged to `owner`.
    fn release_row(
        connection: &mut Self::Connection,
        owner: &str,
        name: &str,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send;
}

/// A pool with sqlx's defaults, except for its size and its timeout. The timeout is longer than any
/// scenario.
pub(crate) async fn pool<DB: Database>(url: &str, connections: u32) -> sqlx::Result<Pool<DB>> {
    pool_options(connections).connect_with(DB::options(url)?).await
}

pub(crate) fn pool_options<DB: Database>(connections: u32) -> PoolOptions<DB> {
    PoolOptions::new().max_connections(connections).acquire_timeout(Duration::from_mins(5))
}

/// Implements [`Database`] from the parts in which the databases differ. The statements use the
/// first placeholder before the second one, because the placeholders of MySQL have no number.
macro_rules! database {
    (
        $database:ty, $options:path, $first:literal, $second:literal,
        text: $text:literal, insert: $insert:literal, conflict: $conflict:literal, time: $time:literal,
        now: $now:literal, later: $later:literal, past: $past:literal, suffix: $suffix:literal,
        for_update: $for_update:literal
    ) => {
        impl Database for $database {
            fn options(url: &str) -> sqlx::Result<Options<Self>> {
                $options(url)
            }

            async fn create_tables(connection: &mut Self::Connection) -> sqlx::Result<()> {
                const FLOOR: &str = concat!(
                    "CREATE TABLE lock_bench_floor (id BIGINT PRIMARY KEY, count BIGINT NOT NULL)",
                    $suffix
                );
                const ROW: &str = concat!("CREATE TABLE lock_bench_row (id BIGINT PRIMARY KEY)", $suffix);
                const NAIVE: &str =
                    concat!("CREATE TABLE lock_bench_naive (lock_name ", $text, " PRIMARY KEY)", $suffix);
                const POLL: &str = concat!(
                    "CREATE TABLE lock_bench_poll (lock_name ",
                    $text,
                    " PRIMARY KEY, owner ",
                    $text,
                    " NOT NULL, expires_at ",
                    $time,
                    " NOT NULL)",
                    $suffix
                );
                const ROWS_TO_INSERT: [&str; 2] = [
                    concat!("INSERT INTO lock_bench_floor VALUES (", $first, ", 0)"),
                    concat!("INSERT INTO lock_bench_row VALUES (", $first, ")"),
                ];

                Self::remove_tables(connection).await?;
                for table in [FLOOR, ROW, NAIVE, POLL] {
                    sqlx::query(table).execute(&mut *connection).await?;
                }
                for row in 1..=ROWS {
                    for insert in ROWS_TO_INSERT {
                        sqlx::query(insert).bind(row).execute(&mut *connection).await?;
                    }
                }
                Ok(())
            }

            async fn remove_tables(connection: &mut Self::Connection) -> sqlx::Result<()> {
                const TABLES: [&str; 4] = [
                    "DROP TABLE IF EXISTS lock_bench_floor",
                    "DROP TABLE IF EXISTS lock_bench_row",
                    "DROP TABLE IF EXISTS lock_bench_naive",
                    "DROP TABLE IF EXISTS lock_bench_poll",
                ];
                const NAMES: &str = concat!(
                    "SELECT id FROM distributed_lock WHERE id > ",
                    $first,
                    " AND lock_name LIKE 'lock-bench:%' ORDER BY id LIMIT ",
                    $second
                );

                for table in TABLES {
                    sqlx::query(table).execute(&mut *connection).await?;
                }
                let mut last = 0;
                loop {
                    let names = sqlx::query_scalar(NAMES).bind(last).bind(BATCH);
                    let ids: Vec<i64> = names.fetch_all(&mut *connection).await?;
                    let Some(last_of_batch) = ids.last() else { return Ok(()) };
                    last = *last_of_batch;
                    let mut delete = QueryBuilder::<Self>::new("DELETE FROM distributed_lock WHERE id IN ");
                    delete.push_tuples(&ids, |mut row, id| {
                        row.push_bind(*id);
                    });
                    delete.build().execute(&mut *connection).await?;
                }
            }

            async fn touch(connection: &mut Self::Connection, row: i64) -> sqlx::Result<()> {
                const TOUCH: &str =
                    concat!("UPDATE lock_bench_floor SET count = count + 1 WHERE id = ", $first);
                sqlx::query(TOUCH).bind(row).execute(connection).await?;
                Ok(())
            }

            async fn select_for_update(connection: &mut Self::Connection, row: i64) -> sqlx::Result<()> {
                const LOCK: &str = concat!("SELECT id FROM lock_bench_row WHERE id = ", $first, $for_update);
                let _id: i64 = sqlx::query_scalar(LOCK).bind(row).fetch_one(connection).await?;
                Ok(())
            }

            async fn insert(connection: &mut Self::Connection, name: &str) -> sqlx::Result<bool> {
                const INSERT: &str =
                    concat!($insert, " INTO lock_bench_naive VALUES (", $first, ")", $conflict);
                let done = sqlx::query(INSERT).bind(name).execute(connection).await?;
                Ok(done.rows_affected() == 1)
            }

            async fn delete(connection: &mut Self::Connection, name: &str) -> sqlx::Result<bool> {
                const DELETE: &str = concat!("DELETE FROM lock_bench_naive WHERE lock_name = ", $first);
                let done = sqlx::query(DELETE).bind(name).execute(connection).await?;
                Ok(done.rows_affected() == 1)
            }

            async fn create_row(connection: &mut Self::Connection, name: &str) -> sqlx::Result<bool> {
                const CREATE: &str = concat!(
                    $insert,
                    " INTO lock_bench_poll VALUES (",
                    $first,
                    ", '', ",
                    $past,
                    ")",
                    $conflict
                );
                let done = sqlx::query(CREATE).bind(name).execute(connection).await?;
                Ok(done.rows_affected() == 1)
            }

            async fn acquire_row(
                connection: &mut Self::Connection,
                owner: &str,
                name: &str,
            ) -> sqlx::Result<bool> {
                const ACQUIRE: &str = concat!(
                    "UPDATE lock_bench_poll SET owner = ",
                    $first,
                    ", expires_at = ",
                    $later,
                    " WHERE lock_name = ",
                    $second,
                    " AND expires_at <= ",
                    $now
                );
                let done = sqlx::query(ACQUIRE).bind(owner).bind(name).execute(connection).await?;
                Ok(done.rows_affected() == 1)
            }

            async fn release_row(
                connection: &mut Self::Connection,
                owner: &str,
                name: &str,
            ) -> sqlx::Result<bool> {
                const RELEASE: &str = concat!(
                    "UPDATE lock_bench_poll SET expires_at = ",
                    $past,
                    " WHERE owner = ",
                    $first,
                    " AND lock_name = ",
                    $second
                );
                let done = sqlx::query(RELEASE).bind(owner).bind(name).execute(connection).await?;
                Ok(done.rows_affected() == 1)
            }
        }
    };
}

database!(
    Postgres, PgConnectOptions::from_str, "$1", "$2",
    text: "TEXT", insert: "INSERT", conflict: " ON CONFLICT DO NOTHING", time: "TIMESTAMPTZ",
    now: "clock_timestamp()", later: "clock_timestamp() + INTERVAL '30 s'", past: "to_timestamp(0)", suffix: "",
    for_update: " FOR UPDATE"
);
database!(
    MySql, MySqlConnectOptions::from_str, "?", "?",
    text: "VARCHAR(100)", insert: "INSERT IGNORE", conflict: "", time: "DATETIME(6)",
    now: "NOW(6)", later: "NOW(6) + INTERVAL 30 SECOND", past: "'1970-01-02 00:00:00'",
    suffix: " ENGINE = InnoDB", for_update: " FOR UPDATE"
);
database!(
    Sqlite, sqlite_options, "?1", "?2",
    text: "TEXT", insert: "INSERT", conflict: " ON CONFLICT DO NOTHING", time: "REAL",
    now: "unixepoch('subsec')", later: "unixepoch('subsec') + 30", past: "0", suffix: "", for_update: ""
);

/// FULL makes SQLite as durable as the servers: with NORMAL the last commits could be lost. It is
/// also the default of sqlx in WAL mode.
fn sqlite_options(url: &str) -> sqlx::Result<SqliteConnectOptions> {
    Ok(SqliteConnectOptions::from_str(url)?
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(Duration::from_secs(30)))
}
