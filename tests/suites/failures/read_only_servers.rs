//! Read-only servers: a standby of PostgreSQL, and a primary of MySQL or MariaDB that was demoted.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use lock_db::{Error, Locks};
use lock_tests::{Backend, OwnServer, eventually, free_port, pool};
use rustix::process::{Pid, Signal, kill_process};
use sqlx::{Connection, MySql, Postgres};
use tempfile::TempDir;

lock_tests::cases! {
    without a database:
    a_standby_and_its_promotion_on_postgres (two_workers),
    a_demoted_primary_on_mariadb (two_workers),
    a_demoted_primary_on_mysql (two_workers),
}

const PATIENCE: Duration = Duration::from_mins(1);
/// Shorter than any failover.
const WAIT: Duration = Duration::from_secs(1);

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("server")
}

/// One server of the test's own.
struct Node {
    folder: TempDir,
    port: u16,
    process: Child,
}

impl Node {
    /// The case is ignored if its programs are not installed.
    fn new(kind: &str, standby_of: Option<&Self>) -> Self {
        OwnServer::need(kind);
        let run = |arguments: &[&str]| {
            let mut command = Command::new(script());
            command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            command
        };
        let folder = tempfile::Builder::new().prefix("lock-db-server-").tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let prepared = match standby_of {
            Some(primary) => run(&["standby", path, &primary.port.to_string()]).status(),
            None => run(&["prepare", kind, path]).status(),
        };
        assert!(prepared.unwrap().success());
        let port = free_port();
        let mut command = run(&["exec", kind, path, &port.to_string()]);
        let process =
            command.env("LOCK_DB_TEST_SERVER_OWNER", std::process::id().to_string()).spawn().unwrap();
        Self { folder, port, process }
    }

    async fn answers<DB: Backend>(&self, url: &str) {
        eventually(PATIENCE, async || DB::Connection::connect(url).await.is_ok()).await;
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // PostgreSQL ends immediately on SIGQUIT; the others treat SIGKILL as a crash.
        let is_postgres = self.folder.path().join("data/PG_VERSION").exists();
        let signal = if is_postgres { Signal::QUIT } else { Signal::KILL };
        let _ended = kill_process(Pid::from_child(&self.process), signal);
        let _status = self.process.wait();
    }
}

/// Runs a case on a runtime of its own.
/// Every request to a read-only server reports that, and is retryable: the server may become the
/// primary.
async fn only_reads<DB: Backend>(locks: &Locks<DB>, says: &str, migrates: bool) {
    let asked = Instant::now();
    let mut errors = vec![
        locks.check().await.map(drop).unwrap_err(),
        locks.insert_lock("used").wait(WAIT).acquire().await.map(drop).unwrap_err(),
        locks.insert_lock("new").wait(WAIT).acquire().await.map(drop).unwrap_err(),
        locks.insert_lock("used").try_acquire().await.map(drop).unwrap_err(),
        locks.row_lock("used row").wait(WAIT).acquire().await.map(drop).unwrap_err(),
        locks.row_lock("used row").try_acquire().await.map(drop).unwrap_err(),
    ];
    match locks.migrate().await {
        Ok(()) => assert!(migrates),
        Err(error) => errors.push(error),
    }
    for error in errors {
        assert!(
            matches!(error, Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. })
                && error.is_retryable(),
            "{error:?}"
        );
        assert!(error.to_string().contains(says), "{error}");
    }
    assert!(asked.elapsed() < PATIENCE, "{:?}", asked.elapsed());
}

async fn works_again<DB: Backend>(locks: &Locks<DB>) {
    for name in ["used", "new"] {
        locks.insert_lock(name).wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    }
    locks.row_lock("used row").wait(PATIENCE).acquire().await.unwrap().commit().await.unwrap();
    locks.migrate().await.unwrap();
    locks.check().await.unwrap();
}

async fn use_it<DB: Backend>(locks: &Locks<DB>) {
    locks.migrate().await.unwrap();
    locks.insert_lock("used").acquire().await.unwrap().release().await.unwrap();
    locks.row_lock("used row").acquire().await.unwrap().commit().await.unwrap();
}

async fn a_standby_and_its_promotion_on_postgres() {
    let primary = Node::new("postgres", None);
    let url = |node: &Node| format!("postgres://postgres@127.0.0.1:{}/postgres", node.port);
    primary.answers::<Postgres>(&url(&primary)).await;
    let owner = Locks::new(pool::<Postgres>(&url(&primary), 2).await);
    use_it(&owner).await;
    let standby = Node::new("postgres", Some(&primary));
    standby.answers::<Postgres>(&url(&standby)).await;
    let locks = Locks::new(pool::<Postgres>(&url(&standby), 2).await);
    only_reads(&locks, "standby", false).await;
    owner.close().await;
    drop(primary);
    let mut connection = sqlx::PgConnection::connect(&url(&standby)).await.unwrap();
    Postgres::run(&mut connection, "SELECT pg_promote()").await.unwrap();
    works_again(&locks).await;
    locks.close().await;
}

async fn a_primary_that_is_demoted(kind: &'static str) {
    let server = Node::new(kind, None);
    let root = format!("mysql://root@127.0.0.1:{}/mysql", server.port);
    server.answers::<MySql>(&root).await;
    let mut administrator = sqlx::MySqlConnection::connect(&root).await.unwrap();
    // An account that a read-only server does not allow to write.
    for sql in [
        "CREATE DATABASE app",
        "CREATE USER 'app'@'%' IDENTIFIED BY 'secret'",
        "GRANT ALL ON app.* TO 'app'@'%'",
        "GRANT PROCESS ON *.* TO 'app'@'%'",
    ] {
        MySql::run(&mut administrator, sql).await.unwrap();
    }
    let url = format!("mysql://app:secret@127.0.0.1:{}/app", server.port);
    let locks = Locks::new(pool::<MySql>(&url, 2).await);
    use_it(&locks).await;
    MySql::run(&mut administrator, "SET GLOBAL read_only = 1").await.unwrap();
    only_reads(&locks, "read-only", true).await;
    // With connections opened before and after.
    let other = Locks::new(pool::<MySql>(&url, 2).await);
    only_reads(&other, "read-only", true).await;
    MySql::run(&mut administrator, "SET GLOBAL read_only = 0").await.unwrap();
    works_again(&locks).await;
    works_again(&other).await;
    locks.close().await;
    other.close().await;
}

async fn a_demoted_primary_on_mariadb() {
    a_primary_that_is_demoted("mariadb").await;
}

async fn a_demoted_primary_on_mysql() {
    a_primary_that_is_demoted("mysql").await;
}
