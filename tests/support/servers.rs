//! The servers of this run, which the environment names.

use std::collections::HashSet;
use std::env;
use std::fmt;
use std::hash::{BuildHasher, RandomState};
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use sqlx::{Connection, MySql, MySqlConnection, PgConnection, Postgres};
use tokio::sync::Mutex;
use url::Url;

use crate::{Activity, Backend, TestDatabase, TestServer, ignore};

/// A comma-separated list of the required databases. If one is missing, its cases fail instead of
/// being ignored.
const REQUIRE: &str = "LOCK_DB_TEST_REQUIRE";

/// A kind of server.
pub trait ServerKind: Send + Sync + 'static {
    type Database: ServerDialect;
    const NAME: &'static str;
    /// The environment variable with the URL.
    const VARIABLE: &'static str;
}

#[derive(Debug)]
pub enum PostgresKind {}
#[derive(Debug)]
pub enum MariaDbKind {}
#[derive(Debug)]
pub enum MySqlKind {}
#[derive(Debug)]
pub enum GaleraKind {}

impl ServerKind for PostgresKind {
    type Database = Postgres;
    const NAME: &'static str = "postgres";
    const VARIABLE: &'static str = "LOCK_DB_TEST_POSTGRES_URL";
}

impl ServerKind for MariaDbKind {
    type Database = MySql;
    const NAME: &'static str = "mariadb";
    const VARIABLE: &'static str = "LOCK_DB_TEST_MARIADB_URL";
}

/// MySQL or MariaDB, whichever is available.
impl ServerKind for MySqlKind {
    type Database = MySql;
    const NAME: &'static str = "mysql";
    const VARIABLE: &'static str = "LOCK_DB_TEST_MYSQL_URL";
}

/// Several nodes of one cluster: their URLs, separated by commas.
impl ServerKind for GaleraKind {
    type Database = MySql;
    const NAME: &'static str = "galera";
    const VARIABLE: &'static str = "LOCK_DB_TEST_GALERA_URLS";
}

/// A database for one test on a PostgreSQL server.
pub type PostgresServer = Server<PostgresKind>;
/// A database for one test on a MariaDB server.
pub type MariaDbServer = Server<MariaDbKind>;
/// A database for one test on a MySQL server.
pub type MySqlServer = Server<MySqlKind>;
/// A database for one test on a Galera cluster. The methods of [`TestDatabase`] use the first node.
pub type GaleraCluster = Server<GaleraKind>;

/// A database for one test on a server.
pub struct Server<K: ServerKind> {
    name: String,
    url: Url,
    /// The harness's own connection to the database.
    observer: Mutex<<K::Database as sqlx::Database>::Connection>,
    /// The database from which others are created and dropped.
    administration: Url,
    kind: PhantomData<K>,
}

impl<K: ServerKind> fmt::Debug for Server<K> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Server")
            .field("kind", &K::NAME)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl<K: ServerKind> TestDatabase for Server<K> {
    type Database = K::Database;
    const NAME: &'static str = K::NAME;

    async fn create() -> Self {
        Self::create_at(configured_servers::<K>().swap_remove(0)).await
    }

    fn url(&self) -> &str {
        self.url.as_str()
    }

    async fn activity(&self) -> Activity {
        let mut observer = self.observer.lock().await;
        loop {
            match K::Database::activity(&mut observer).await {
                Err(error) if is_of_another_client(&error) => {}
                activity => return activity.expect("reads the activity of the database"),
            }
        }
    }

    async fn advisory_locks(&self) -> usize {
        let mut observer = self.observer.lock().await;
        let holders = K::Database::numbers(&mut observer, K::Database::ADVISORY_LOCKS).await;
        holders.expect("reads the advisory locks").len()
    }

    async fn reconnect(&self) {
        *self.observer.lock().await = connect::<K::Database>(&self.url).await;
    }

    async fn run(&self, sql: &str) -> u64 {
        let mut observer = self.observer.lock().await;
        K::Database::run(&mut observer, sql).await.unwrap_or_else(|error| panic!("{error}: {sql}"))
    }

    async fn find_number(&self, sql: &str) -> Option<i64> {
        let mut observer = self.observer.lock().await;
        loop {
            match K::Database::find_number(&mut observer, sql).await {
                Err(error) if is_of_another_client(&error) => {}
                number => return number.unwrap_or_else(|error| panic!("{error}: {sql}")),
            }
        }
    }

    async fn find_text(&self, sql: &str) -> Option<String> {
        let mut observer = self.observer.lock().await;
        K::Database::find_text(&mut observer, sql).await.unwrap_or_else(|error| panic!("{error}: {sql}"))
    }
}

impl<K: ServerKind> Server<K> {
    /// Creates a database on the test's own server, given the URL of an existing database.
    pub async fn create_at(administration: Url) -> Self {
        let name = format!("lock_db_test_{:016x}", RandomState::new().hash_one(std::process::id()));
        let mut url = administration.clone();
        url.set_path(&name);

        let mut administrator = connect::<K::Database>(&administration).await;
        let create = format!("CREATE DATABASE {name} {}", K::Database::CREATE_OPTIONS);
        K::Database::run(&mut administrator, &create).await.expect("creates a database for the test");
        drop(administrator.close().await);
        let observer = Mutex::new(connect::<K::Database>(&url).await);
        Self { name, url, observer, administration, kind: PhantomData }
    }
}

impl GaleraCluster {
    /// The URL of the database on each node.
    pub fn urls(&self) -> Vec<String> {
        let mut urls = configured_servers::<GaleraKind>();
        for url in &mut urls {
            url.set_path(&self.name);
        }
        urls.into_iter().map(String::from).collect()
    }
}

impl<K: ServerKind> TestServer for Server<K> {
    fn address(&self) -> (String, u16) {
        let host = self.url.host_str().expect("the URL names a host");
        (host.to_owned(), self.url.port().unwrap_or(K::Database::PORT))
    }

    fn url_by(&self, address: SocketAddr) -> String {
        let mut url = self.url.clone();
        url.set_ip_host(address.ip()).expect("the URL has a host");
        url.set_port(Some(address.port())).expect("the URL has a host");
        url.into()
    }

    async fn end_connections(&self) {
        let mut observer = self.observer.lock().await;
        loop {
            match K::Database::end_connections(&mut observer).await {
                Err(error) if is_of_another_client(&error) => {}
                ended => return ended.expect("ends the connections to the database"),
            }
        }
    }
}

impl<K: ServerKind> Drop for Server<K> {
    fn drop(&mut self) {
        // On a separate thread, because this may be a thread of a runtime that is shutting down.
        let (administration, url, name) = (self.administration.clone(), self.url.clone(), self.name.clone());
        let dropped = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.map_err(sqlx::Error::from)?.block_on(async {
                let dropping = K::Database::drop_database(&administration, &url, &name);
                tokio::time::timeout(Duration::from_secs(30), dropping)
                    .await
                    .map_err(|_| sqlx::Error::Io(std::io::ErrorKind::TimedOut.into()))?
            })
        });
        if let Ok(Err(error)) = dropped.join() {
            eprintln!("lock-tests: the database {} is left on the server: {error}", self.name);
        }
    }
}

/// What differs between the two kinds of server.
pub trait ServerDialect: Backend {
    const PORT: u16;
    const CREATE_OPTIONS: &'static str;
    /// Returns a row for each lock that is held. On MySQL and MariaDB it queries locks by name,
    /// because only one of them lists all locks.
    const ADVISORY_LOCKS: &'static str;

    fn activity(observer: &mut Self::Connection) -> impl Future<Output = sqlx::Result<Activity>> + Send;

    fn end_connections(observer: &mut Self::Connection) -> impl Future<Output = sqlx::Result<()>> + Send;

    /// Drops the database, even if clients are connected.
    fn drop_database(
        administration: &Url,
        url: &Url,
        name: &str,
    ) -> impl Future<Output = sqlx::Result<()>> + Send;
}

impl ServerDialect for Postgres {
    const PORT: u16 = 5432;
    const CREATE_OPTIONS: &'static str = "TEMPLATE template0";
    const ADVISORY_LOCKS: &'static str =
        "SELECT pid FROM pg_locks JOIN pg_database ON pg_database.oid = database
        WHERE locktype = 'advisory' AND datname = current_database()
            AND ((classid::bigint << 32) | objid::bigint) = 30521770275333218";

    async fn activity(observer: &mut PgConnection) -> sqlx::Result<Activity> {
        const OTHERS: &str = "FROM pg_stat_activity
            WHERE datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()";
        let connections = Self::numbers(observer, &format!("SELECT pid {OTHERS}")).await?;
        let transactions =
            Self::numbers(observer, &format!("SELECT pid {OTHERS} AND xact_start IS NOT NULL")).await?;
        let waiting =
            Self::numbers(observer, &format!("SELECT pid {OTHERS} AND wait_event_type = 'Lock'")).await?;
        Ok(Activity {
            connections: connections.len(),
            transactions: transactions.len(),
            waiting: waiting.len(),
        })
    }

    async fn end_connections(observer: &mut PgConnection) -> sqlx::Result<()> {
        let sql = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE datname = current_database() AND pid <> pg_backend_pid()";
        Self::run(observer, sql).await.map(drop)
    }

    async fn drop_database(administration: &Url, _url: &Url, name: &str) -> sqlx::Result<()> {
        let mut administrator = PgConnection::connect(administration.as_str()).await?;
        Self::run(&mut administrator, &format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)")).await?;
        administrator.close().await
    }
}

impl ServerDialect for MySql {
    const PORT: u16 = 3306;
    const CREATE_OPTIONS: &'static str = "";
    const ADVISORY_LOCKS: &'static str = "SELECT id FROM information_schema.processlist
        WHERE id = IS_USED_LOCK(CONCAT('lock_db:', SHA2(DATABASE(), 224)))
        UNION ALL SELECT id FROM distributed_lock
        WHERE IS_USED_LOCK(CONCAT('lock_db:', LEFT(SHA2(DATABASE(), 224), 32), ':', id)) IS NOT NULL";

    /// Does not use `information_schema.innodb_trx`, which would be simpler. It is a copy that is
    /// refreshed only if no client of the server has read it for a tenth of a second.
    async fn activity(observer: &mut MySqlConnection) -> sqlx::Result<Activity> {
        const OTHERS: &str = "FROM information_schema.processlist
            WHERE db = DATABASE() AND id <> CONNECTION_ID()";
        let connections = Self::numbers(observer, &format!("SELECT id {OTHERS}")).await?;
        let waiting_elsewhere =
            format!("SELECT id {OTHERS} AND (state = 'User lock' OR state LIKE 'Waiting for %')");
        let mut waiting: HashSet<i64> =
            Self::numbers(observer, &waiting_elsewhere).await?.into_iter().collect();

        let status = sqlx::raw_sql("SHOW ENGINE INNODB STATUS").fetch_one(observer).await?;
        let status: String = sqlx::Row::try_get_unchecked(&status, 2)?;
        let mut transactions = 0;
        for transaction in status.split("---TRANSACTION").skip(1).filter(|text| text.contains(", ACTIVE")) {
            let Some(connection) = connection_of(transaction).filter(|id| connections.contains(id)) else {
                continue;
            };
            transactions += 1;
            if transaction.contains("LOCK WAIT") {
                waiting.insert(connection);
            }
        }
        Ok(Activity { connections: connections.len(), transactions, waiting: waiting.len() })
    }

    async fn end_connections(observer: &mut MySqlConnection) -> sqlx::Result<()> {
        let sql = "SELECT id FROM information_schema.processlist
            WHERE db = DATABASE() AND id <> CONNECTION_ID()";
        for connection in Self::numbers(observer, sql).await? {
            // The connection may have ended by itself.
            drop(Self::run(observer, &format!("KILL {connection}")).await);
        }
        Ok(())
    }

    /// Ends connections first, because it would otherwise wait for each open transaction that has
    /// read a table of the database.
    async fn drop_database(_administration: &Url, url: &Url, name: &str) -> sqlx::Result<()> {
        let mut administrator = MySqlConnection::connect(url.as_str()).await?;
        Self::run(&mut administrator, "SET lock_wait_timeout = 2").await?;
        loop {
            <Self as ServerDialect>::end_connections(&mut administrator).await?;
            let dropped = Self::run(&mut administrator, &format!("DROP DATABASE IF EXISTS {name}")).await;
            match dropped {
                // ER_LOCK_WAIT_TIMEOUT: a client has connected in between. The caller has a
                // deadline.
                Err(sqlx::Error::Database(error)) if error.message().contains("ock wait timeout") => {}
                other => return other.map(drop),
            }
        }
    }
}

/// MySQL can't read its process list while any client of the server runs a statement with text that
/// the list can't show.
fn is_of_another_client(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(error) if error.message().starts_with("Cannot convert string"))
}

/// The connection of a transaction in `SHOW ENGINE INNODB STATUS`.
fn connection_of(transaction: &str) -> Option<i64> {
    let (_, after) = transaction.split_once("thread id ")?;
    after.split(',').next()?.trim().parse().ok()
}

async fn connect<DB: sqlx::Database>(url: &Url) -> DB::Connection {
    DB::Connection::connect(url.as_str())
        .await
        .unwrap_or_else(|error| panic!("cannot connect to {}: {error}", without_password(url)))
}

fn without_password(url: &Url) -> Url {
    let mut url = url.clone();
    let _ = url.set_password(None);
    url
}

/// More than one URL only for a cluster. The case is ignored if there is none.
fn configured_servers<K: ServerKind>() -> Vec<Url> {
    let urls = env::var(K::VARIABLE).ok().filter(|urls| !urls.is_empty());
    if let Some(urls) = urls {
        let parse = |url: &str| Url::parse(url).unwrap_or_else(|error| panic!("{}: {error}", K::VARIABLE));
        return urls.split(',').map(parse).collect();
    }
    assert!(!is_required(K::NAME), "{REQUIRE} names {}, but {} is not set", K::NAME, K::VARIABLE);
    ignore(format_args!("{} is not set; tests/run starts servers", K::VARIABLE))
}

pub(crate) fn is_required(name: &str) -> bool {
    env::var(REQUIRE).unwrap_or_default().split(',').any(|required| required.trim() == name)
}
