//! Another table of the same name, and what the cases ask of locks.

use std::time::Duration;

use lock_db::{Error, Kind, LockDatabase, Locks, schema};
use lock_tests::{Backend, TestDatabase};
use sqlx::pool::PoolOptions;
use sqlx::{Connection, Pool, Transaction};

pub const PATIENCE: Duration = Duration::from_secs(20);
/// Of names that the other table has, with the ids that the first names of a new table get.
const ROWS: i64 = 30;

/// A table `distributed_lock` beside that of the locks, which a connection can be made to mean by that name: in a schema
/// on PostgreSQL, in another database of the server on MySQL and MariaDB, a temporary one on SQLite.
pub struct Elsewhere<T: TestDatabase> {
    enter: String,
    /// Dropped with this.
    _other: Option<T>,
}

impl<T: TestDatabase> Elsewhere<T> {
    pub async fn new(database: &T) -> Self {
        let names = (1..ROWS).map(|number| format!("('other:{number}', 'insert')")).collect::<Vec<_>>();
        let fill = format!(
            "INSERT INTO distributed_lock (lock_name, lock_kind) VALUES {}, ('row', 'row')",
            names.join(", ")
        );
        match T::NAME {
            "postgres" => {
                let make = schema::POSTGRES;
                let there = "CREATE SCHEMA elsewhere; SET search_path = elsewhere";
                database.run(&format!("{there}; {make}; {fill}; RESET search_path")).await;
                Self { enter: "SET search_path = elsewhere, public".to_owned(), _other: None }
            }
            "sqlite" => {
                let make = schema::SQLITE.replace("CREATE TABLE IF NOT EXISTS", "CREATE TEMP TABLE");
                Self { enter: format!("{make}; {fill}"), _other: None }
            }
            _ => {
                let other = T::create().await;
                other.run(schema::MYSQL).await;
                other.run(&fill).await;
                let enter = format!("USE {}", other.text("SELECT DATABASE()").await);
                Self { enter, _other: Some(other) }
            }
        }
    }

    /// From now on `distributed_lock` means the other table on this connection.
    pub async fn enter(&self, connection: &mut <T::Database as sqlx::Database>::Connection) {
        T::Database::run(connection, &self.enter).await.unwrap();
        let rows = T::Database::find_number(connection, "SELECT COUNT(*) FROM distributed_lock").await;
        assert_eq!(rows.unwrap(), Some(ROWS), "the connection does not mean the other table");
    }

    /// A pool of connections that are elsewhere from the beginning, those of the locks themselves included.
    pub async fn pool(&self, url: &str) -> Pool<T::Database> {
        let enter = self.enter.clone();
        let options = PoolOptions::new().max_connections(4).acquire_timeout(Duration::from_mins(1));
        let options = options.after_connect(move |connection, _| {
            let enter = enter.clone();
            Box::pin(async move { T::Database::run(connection, &enter).await.map(drop) })
        });
        options.connect(url).await.unwrap()
    }

    /// A pool whose connections are elsewhere when they are used for the second time.
    pub async fn pool_of_used_connections(&self, url: &str) -> Pool<T::Database> {
        let enter = self.enter.replace("CREATE TEMP TABLE", "CREATE TEMP TABLE IF NOT EXISTS");
        let enter = enter.replace("INSERT INTO", "INSERT OR IGNORE INTO");
        let enter = if T::NAME == "sqlite" { enter } else { self.enter.clone() };
        let options = PoolOptions::new().max_connections(2).acquire_timeout(Duration::from_mins(1));
        let options = options.before_acquire(move |connection, _| {
            let enter = enter.clone();
            Box::pin(async move { T::Database::run(connection, &enter).await.map(|_| true) })
        });
        let pool = options.connect(url).await.unwrap();
        let used = (pool.acquire().await.unwrap(), pool.acquire().await.unwrap());
        drop(used);
        pool
    }

    /// Whether the table of this connection is as it was filled.
    pub async fn is_untouched(connection: &mut <T::Database as sqlx::Database>::Connection) -> bool {
        let untouched = "SELECT COUNT(*) FROM distributed_lock
            WHERE secret_key = '' AND fencing_token = 0 AND waiters = '' AND owner = '' AND expire_time < '1971-01-01'";
        let all = T::Database::find_number(connection, "SELECT COUNT(*) FROM distributed_lock").await;
        let untouched = T::Database::find_number(connection, untouched).await;
        all.unwrap() == Some(ROWS) && untouched.unwrap() == Some(ROWS)
    }
}

/// How a lock is asked for in a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    Acquire,
    Try,
    Several,
}

pub const ALL_ASKS: [Ask; 3] = [Ask::Acquire, Ask::Try, Ask::Several];
pub const BOTH_KINDS: [Kind; 2] = [Kind::Insert, Kind::Row];

/// Asks for a lock in a transaction. `false`: it is held.
pub async fn ask_in<DB: LockDatabase>(
    locks: &Locks<DB>,
    kind: Kind,
    name: &str,
    ask: Ask,
    transaction: &mut DB::Connection,
) -> Result<bool, Error> {
    let second = format!("{name} and another");
    if kind == Kind::Row {
        match ask {
            Ask::Acquire => locks.row_lock(name).wait(PATIENCE).acquire_in(transaction).await.map(|_| true),
            Ask::Try => Ok(locks.row_lock(name).try_acquire_in(transaction).await?.is_some()),
            Ask::Several => {
                locks.row_locks([name, &second]).wait(PATIENCE).acquire_in(transaction).await.map(|_| true)
            }
        }
    } else {
        match ask {
            Ask::Acquire => {
                locks.insert_lock(name).wait(PATIENCE).acquire_in(transaction).await.map(|_| true)
            }
            Ask::Try => Ok(locks.insert_lock(name).try_acquire_in(transaction).await?.is_some()),
            Ask::Several => {
                locks.insert_locks([name, &second]).wait(PATIENCE).acquire_in(transaction).await.map(|_| true)
            }
        }
    }
}

/// Whether another process gets a lock; it gives it up again.
pub async fn is_free<DB: LockDatabase>(locks: &Locks<DB>, kind: Kind, name: &str) -> bool {
    let granted = if kind == Kind::Row {
        match locks.row_lock(name).try_acquire().await {
            Ok(Some(guard)) => guard.commit().await.map(|()| true),
            Ok(None) => Ok(false),
            Err(error) => Err(error),
        }
    } else {
        match locks.insert_lock(name).try_acquire().await {
            Ok(Some(lease)) => lease.release().await.map(|()| true),
            Ok(None) => Ok(false),
            Err(error) => Err(error),
        }
    };
    match granted {
        Ok(granted) => granted,
        // A transaction that writes keeps all others out there, and it is not known what it holds.
        Err(error @ (Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. }))
            if DB::NAME == "SQLite" && error.is_retryable() =>
        {
            false
        }
        Err(error) => panic!("{kind:?} {name}: {error:?}"),
    }
}

/// A transaction on a connection that is elsewhere.
pub async fn begin_elsewhere<'connection, T: TestDatabase>(
    elsewhere: &Elsewhere<T>,
    connection: &'connection mut <T::Database as sqlx::Database>::Connection,
) -> Transaction<'connection, T::Database> {
    elsewhere.enter(connection).await;
    connection.begin().await.unwrap()
}
