//! The business SQL. The databases differ in their placeholders and in how a key is made; the rest
//! is written once.

use std::str::FromStr;
use std::time::Duration;

use lock_db::LockDatabase;
use sqlx::mysql::MySqlConnectOptions;
use sqlx::pool::PoolOptions;
use sqlx::postgres::PgConnectOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use sqlx::{Connection, MySql, Pool, Postgres, Sqlite};
use tokio::time::timeout;

const CONNECT_LIMIT: Duration = Duration::from_secs(15);

type Options<DB> = <<DB as sqlx::Database>::Connection as Connection>::Options;

/// What the tables say about a comment.
pub(crate) struct Comment {
    /// The count in the comment table.
    pub(crate) like_count: i64,
    /// The number of rows in the like table. Without lost updates both are equal.
    pub(crate) likes: i64,
}

/// A database in which comments can be liked.
pub(crate) trait Store: LockDatabase {
    /// The options for the database of this URL.
    fn options(url: &str) -> sqlx::Result<Options<Self>>;

    /// Reads the count of the comment, adds one, writes it back, and adds a row to the like table.
    /// Returns the new count, or `None` if there is no such comment.
    ///
    /// This is the whole business, with and without a lock. It is wrong by itself: two of these at
    /// the same time read the same count. Each statement commits by itself unless the caller has
    /// begun a transaction.
    fn add_like(
        connection: &mut Self::Connection,
        comment_id: i64,
    ) -> impl Future<Output = sqlx::Result<Option<i64>>> + Send;

    /// Reads a comment. `None` if there is no such comment.
    fn comment(
        connection: &mut Self::Connection,
        comment_id: i64,
    ) -> impl Future<Output = sqlx::Result<Option<Comment>>> + Send;

    /// Creates both tables anew, with one comment without likes.
    fn create_tables(
        connection: &mut Self::Connection,
        comment_id: i64,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Removes both tables.
    fn drop_tables(connection: &mut Self::Connection) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Removes the names of comments from `distributed_lock`.
    fn remove_locks(connection: &mut Self::Connection) -> impl Future<Output = sqlx::Result<()>> + Send;
}

/// A pool with at most this many connections.
pub(crate) async fn connect<DB: Store>(url: &str, connections: u32) -> anyhow::Result<Pool<DB>> {
    let options = DB::options(url)?;
    // The pool would retry for half a minute, and then not tell the cause.
    let connection = timeout(CONNECT_LIMIT, DB::Connection::connect_with(&options)).await??;
    connection.close().await?;
    Ok(PoolOptions::new().max_connections(connections).connect_with(options).await?)
}

macro_rules! store {
    ($database:ty, $options:path, placeholders: $first:literal $second:literal, key: $key:literal) => {
        impl Store for $database {
            fn options(url: &str) -> sqlx::Result<Options<Self>> {
                $options(url)
            }

            async fn add_like(
                connection: &mut Self::Connection,
                comment_id: i64,
            ) -> sqlx::Result<Option<i64>> {
                const READ: &str =
                    concat!("SELECT like_count FROM lock_db_example_comments WHERE id = ", $first);
                const WRITE: &str = concat!(
                    "UPDATE lock_db_example_comments SET like_count = ",
                    $first,
                    " WHERE id = ",
                    $second
                );
                const INSERT: &str =
                    concat!("INSERT INTO lock_db_example_likes (comment_id) VALUES (", $first, ")");

                let count: Option<i64> =
                    sqlx::query_scalar(READ).bind(comment_id).fetch_optional(&mut *connection).await?;
                let Some(count) = count else { return Ok(None) };
                let count = count + 1;
                sqlx::query(WRITE).bind(count).bind(comment_id).execute(&mut *connection).await?;
                sqlx::query(INSERT).bind(comment_id).execute(connection).await?;
                Ok(Some(count))
            }

            async fn comment(
                connection: &mut Self::Connection,
                comment_id: i64,
            ) -> sqlx::Result<Option<Comment>> {
                const READ: &str = concat!(
                    "SELECT like_count, \
                        (SELECT count(*) FROM lock_db_example_likes likes WHERE likes.comment_id = comments.id) \
                     FROM lock_db_example_comments comments WHERE id = ",
                    $first
                );

                let row: Option<(i64, i64)> =
                    sqlx::query_as(READ).bind(comment_id).fetch_optional(connection).await?;
                Ok(row.map(|(like_count, likes)| Comment { like_count, likes }))
            }

            async fn create_tables(connection: &mut Self::Connection, comment_id: i64) -> sqlx::Result<()> {
                const COMMENTS: &str =
                    "CREATE TABLE lock_db_example_comments (id BIGINT PRIMARY KEY, like_count BIGINT NOT NULL)";
                const LIKES: &str =
                    concat!("CREATE TABLE lock_db_example_likes (id ", $key, ", comment_id BIGINT NOT NULL)");
                const COMMENT: &str = concat!(
                    "INSERT INTO lock_db_example_comments (id, like_count) VALUES (",
                    $first,
                    ", 0)"
                );

                Self::drop_tables(connection).await?;
                sqlx::query(COMMENTS).execute(&mut *connection).await?;
                sqlx::query(LIKES).execute(&mut *connection).await?;
                sqlx::query(COMMENT).bind(comment_id).execute(connection).await?;
                Ok(())
            }

            async fn drop_tables(connection: &mut Self::Connection) -> sqlx::Result<()> {
                sqlx::query("DROP TABLE IF EXISTS lock_db_example_likes").execute(&mut *connection).await?;
                sqlx::query("DROP TABLE IF EXISTS lock_db_example_comments").execute(connection).await?;
                Ok(())
            }

            async fn remove_locks(connection: &mut Self::Connection) -> sqlx::Result<()> {
                const DELETE: &str =
                    "DELETE FROM distributed_lock WHERE lock_name LIKE 'lock-db-example:comment:%'";

                sqlx::query(DELETE).execute(connection).await?;
                Ok(())
            }
        }
    };
}

store!(
    Postgres, PgConnectOptions::from_str,
    placeholders: "$1" "$2", key: "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY"
);
store!(
    MySql, MySqlConnectOptions::from_str,
    placeholders: "?" "?", key: "BIGINT AUTO_INCREMENT PRIMARY KEY"
);
store!(
    Sqlite, sqlite_options,
    placeholders: "?" "?", key: "INTEGER PRIMARY KEY"
);

/// The settings of a service: readers don't block the writer, and writers wait for each other.
fn sqlite_options(url: &str) -> sqlx::Result<SqliteConnectOptions> {
    Ok(SqliteConnectOptions::from_str(url)?
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Normal)
        .busy_timeout(Duration::from_secs(30)))
}
