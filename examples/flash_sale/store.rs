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

/// The content of the tables after a sale.
pub(crate) struct Books {
    pub(crate) orders: i64,
    /// Of the user with the most orders.
    pub(crate) most_orders_of_a_user: i64,
    /// Of each segment.
    pub(crate) left_over: Vec<i64>,
}

/// A database that vouchers can be sold from.
///
/// Neither table has a constraint that limits a sale: no CHECK, no unique user. The locks do that.
pub(crate) trait Store: LockDatabase {
    /// The options for the database of this URL.
    fn options(url: &str) -> sqlx::Result<Options<Self>>;

    /// Sets every new connection to READ COMMITTED. A transaction here takes two locks, one after
    /// the other. Under REPEATABLE READ, InnoDB's default, it would read after its wait for the
    /// second lock the data from when it got the first one. lock-db refuses to continue then
    /// ([`lock_db::Error::Serialization`]).
    fn on_connect(connection: &mut Self::Connection) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Whether the user has an order.
    fn has_order(
        connection: &mut Self::Connection,
        user_id: i64,
    ) -> impl Future<Output = sqlx::Result<bool>> + Send;

    /// The segments that have vouchers left, in order.
    fn segments_with_stock(
        connection: &mut Self::Connection,
    ) -> impl Future<Output = sqlx::Result<Vec<i64>>> + Send;

    /// How many vouchers the segment has left.
    fn left_over(
        connection: &mut Self::Connection,
        segment: i64,
    ) -> impl Future<Output = sqlx::Result<i64>> + Send;

    /// Takes one voucher from the segment and inserts the order of the user.
    fn take_one(
        connection: &mut Self::Connection,
        user_id: i64,
        segment: i64,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Reads the result of a sale.
    fn books(connection: &mut Self::Connection) -> impl Future<Output = sqlx::Result<Books>> + Send;

    /// Creates both tables anew, with this stock in each segment.
    fn create_tables(
        connection: &mut Self::Connection,
        stock: &[i64],
    ) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Removes both tables.
    fn drop_tables(connection: &mut Self::Connection) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Removes the names of users and segments from `distributed_lock`.
    fn remove_locks(connection: &mut Self::Connection) -> impl Future<Output = sqlx::Result<()>> + Send;
}

/// A pool with at most this many connections.
pub(crate) async fn connect<DB: Store>(url: &str, connections: u32) -> anyhow::Result<Pool<DB>> {
    let options = DB::options(url)?;
    // The pool would retry for half a minute, and then not tell the cause.
    let connection = timeout(CONNECT_LIMIT, DB::Connection::connect_with(&options)).await??;
    connection.close().await?;
    let pool = PoolOptions::<DB>::new().max_connections(connections);
    Ok(pool.after_connect(|connection, _| Box::pin(DB::on_connect(connection))).connect_with(options).await?)
}

macro_rules! store {
    (
        $database:ty, $options:path, placeholders: $first:literal $second:literal, key: $key:literal,
        on connect: $on_connect:literal
    ) => {
        impl Store for $database {
            fn options(url: &str) -> sqlx::Result<Options<Self>> {
                $options(url)
            }

            async fn on_connect(connection: &mut Self::Connection) -> sqlx::Result<()> {
                sqlx::raw_sql($on_connect).execute(connection).await.map(drop)
            }

            async fn has_order(connection: &mut Self::Connection, user_id: i64) -> sqlx::Result<bool> {
                const READ: &str =
                    concat!("SELECT count(*) FROM lock_db_example_orders WHERE user_id = ", $first);

                let orders: i64 = sqlx::query_scalar(READ).bind(user_id).fetch_one(connection).await?;
                Ok(orders > 0)
            }

            async fn segments_with_stock(connection: &mut Self::Connection) -> sqlx::Result<Vec<i64>> {
                const READ: &str =
                    "SELECT segment FROM lock_db_example_stock WHERE left_over > 0 ORDER BY segment";

                sqlx::query_scalar(READ).fetch_all(connection).await
            }

            async fn left_over(connection: &mut Self::Connection, segment: i64) -> sqlx::Result<i64> {
                const READ: &str =
                    concat!("SELECT left_over FROM lock_db_example_stock WHERE segment = ", $first);

                sqlx::query_scalar(READ).bind(segment).fetch_one(connection).await
            }

            async fn take_one(
                connection: &mut Self::Connection,
                user_id: i64,
                segment: i64,
            ) -> sqlx::Result<()> {
                const TAKE: &str = concat!(
                    "UPDATE lock_db_example_stock SET left_over = left_over - 1 WHERE segment = ",
                    $first
                );
                const ORDER: &str = concat!(
                    "INSERT INTO lock_db_example_orders (user_id, segment) VALUES (",
                    $first,
                    ", ",
                    $second,
                    ")"
                );

                sqlx::query(TAKE).bind(segment).execute(&mut *connection).await?;
                sqlx::query(ORDER).bind(user_id).bind(segment).execute(connection).await?;
                Ok(())
            }

            async fn books(connection: &mut Self::Connection) -> sqlx::Result<Books> {
                const ORDERS: &str = "SELECT count(*) FROM lock_db_example_orders";
                const MOST: &str = "SELECT count(*) FROM lock_db_example_orders \
                                    GROUP BY user_id ORDER BY count(*) DESC LIMIT 1";
                const STOCK: &str = "SELECT left_over FROM lock_db_example_stock ORDER BY segment";

                let most: Option<i64> = sqlx::query_scalar(MOST).fetch_optional(&mut *connection).await?;
                Ok(Books {
                    orders: sqlx::query_scalar(ORDERS).fetch_one(&mut *connection).await?,
                    most_orders_of_a_user: most.unwrap_or(0),
                    left_over: sqlx::query_scalar(STOCK).fetch_all(connection).await?,
                })
            }

            async fn create_tables(connection: &mut Self::Connection, stock: &[i64]) -> sqlx::Result<()> {
                const STOCK: &str = "CREATE TABLE lock_db_example_stock \
                                     (segment BIGINT PRIMARY KEY, left_over BIGINT NOT NULL)";
                const ORDERS: &str = concat!(
                    "CREATE TABLE lock_db_example_orders (id ",
                    $key,
                    ", user_id BIGINT NOT NULL, segment BIGINT NOT NULL)"
                );
                const INDEX: &str =
                    "CREATE INDEX lock_db_example_orders_user ON lock_db_example_orders (user_id)";
                const SEGMENT: &str = concat!(
                    "INSERT INTO lock_db_example_stock (segment, left_over) VALUES (",
                    $first,
                    ", ",
                    $second,
                    ")"
                );

                Self::drop_tables(connection).await?;
                for statement in [STOCK, ORDERS, INDEX] {
                    sqlx::query(statement).execute(&mut *connection).await?;
                }
                for (segment, left_over) in (0_i64..).zip(stock) {
                    sqlx::query(SEGMENT).bind(segment).bind(left_over).execute(&mut *connection).await?;
                }
                Ok(())
            }

            async fn drop_tables(connection: &mut Self::Connection) -> sqlx::Result<()> {
                sqlx::query("DROP TABLE IF EXISTS lock_db_example_orders").execute(&mut *connection).await?;
                sqlx::query("DROP TABLE IF EXISTS lock_db_example_stock").execute(connection).await?;
                Ok(())
            }

            async fn remove_locks(connection: &mut Self::Connection) -> sqlx::Result<()> {
                const DELETE: &str =
                    "DELETE FROM distributed_lock WHERE lock_name LIKE 'lock-db-example:sale:%'";

                sqlx::query(DELETE).execute(connection).await?;
                Ok(())
            }
        }
    };
}

store!(
    Postgres, PgConnectOptions::from_str,
    placeholders: "$1" "$2", key: "BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    on connect: "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED"
);
store!(
    MySql, MySqlConnectOptions::from_str,
    placeholders: "?" "?", key: "BIGINT AUTO_INCREMENT PRIMARY KEY",
    on connect: "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED"
);
store!(
    Sqlite, sqlite_options,
    placeholders: "?" "?", key: "INTEGER PRIMARY KEY",
    on connect: ""
);

/// The settings of a service: readers don't block the writer, and writers wait for each other.
fn sqlite_options(url: &str) -> sqlx::Result<SqliteConnectOptions> {
    Ok(SqliteConnectOptions::from_str(url)?
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Normal)
        .busy_timeout(Duration::from_secs(30)))
}
