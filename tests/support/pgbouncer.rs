//! PgBouncer in front of the PostgreSQL server, started by a test for its own use.

use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};
use url::Url;

use crate::servers::is_required;
use crate::{free_port, ignore, note};

/// The name in `LOCK_DB_TEST_REQUIRE`.
const NAME: &str = "pgbouncer";
/// How long it may take to start on a busy machine.
const PATIENCE: Duration = Duration::from_mins(1);

/// How long a client keeps a server connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolMode {
    Transaction,
    Session,
}

impl fmt::Display for PoolMode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Transaction => "transaction",
            Self::Session => "session",
        })
    }
}

/// A PgBouncer between a test and its PostgreSQL database. It ends when it is dropped, or when the
/// test's process ends.
#[derive(Debug)]
pub struct PgBouncer {
    folder: TempDir,
    database: Url,
    port: u16,
    process: Option<Child>,
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("pgbouncer")
}

impl PgBouncer {
    /// Starts a PgBouncer in front of the database with this URL, with at most `pool_size`
    /// connections to the database. It supports prepared statements. If this run has no PgBouncer, the
    /// case is [ignored](crate::ignore), or fails if the run requires one.
    pub async fn start(url: &str, mode: PoolMode, pool_size: u32) -> Self {
        let settings = format!(
            "pool_mode = {mode}\ndefault_pool_size = {pool_size}\nmax_prepared_statements = 200\n\
             ignore_startup_parameters = extra_float_digits\n"
        );
        Self::start_with(url, &settings).await
    }

    /// Starts a PgBouncer with these lines in its configuration, in addition to those with its
    /// addresses.
    pub async fn start_with(url: &str, settings: &str) -> Self {
        let status = Command::new(script()).arg("have").status();
        if !status.expect("runs tests/pgbouncer").success() {
            assert!(!is_required(NAME), "LOCK_DB_TEST_REQUIRE names {NAME}, but there is none here");
            ignore("there is no PgBouncer here; tests/pgbouncer fetches it");
        }
        let folder = tempfile::Builder::new().prefix("lock-db-pgbouncer-").tempdir().expect("makes a folder");
        let database = Url::parse(url).expect("an address");
        let mut pooler = Self { folder, database, port: 0, process: None };
        // Another process may take the port first.
        for _ in 0..5 {
            pooler.port = free_port();
            fs::write(pooler.configuration(), pooler.configured(settings)).expect("writes a file");
            if pooler.try_restart().await {
                return pooler;
            }
        }
        panic!("PgBouncer does not start: {}", pooler.log());
    }

    /// The URL of the test's database through this pooler.
    pub fn url(&self) -> String {
        let mut url = self.database.clone();
        url.set_host(Some("127.0.0.1")).expect("the URL has a host");
        url.set_port(Some(self.port)).expect("the URL has a host");
        url.into()
    }

    /// The folder with its configuration and its log.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Kills it (SIGKILL), and all connections through it. Returns when it is dead.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().expect("kills PgBouncer");
            process.wait().expect("waits for PgBouncer");
        }
    }

    /// Starts it on the same port after [`kill`](Self::kill). Returns when it accepts connections.
    pub async fn restart(&mut self) {
        assert!(self.try_restart().await, "PgBouncer does not start: {}", self.log());
    }

    async fn try_restart(&mut self) -> bool {
        self.kill();
        let log = File::options().append(true).create(true).open(self.folder.path().join("log"));
        let log = log.expect("opens the log");
        let mut command = Command::new(script());
        command.arg("exec").arg(self.configuration());
        command.env("LOCK_DB_TEST_SERVER_OWNER", std::process::id().to_string());
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("opens the log")).stderr(log);
        let process = self.process.insert(command.spawn().expect("starts PgBouncer"));

        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            let answers = TcpStream::connect(("127.0.0.1", self.port)).await.is_ok();
            // The process that answers may be another one.
            if process.try_wait().expect("asks for PgBouncer's state").is_some() {
                self.process = None;
                return false;
            }
            if answers {
                return true;
            }
            sleep(Duration::from_millis(10)).await;
        }
        false
    }

    fn configuration(&self) -> PathBuf {
        self.folder.path().join("pgbouncer.ini")
    }

    fn configured(&self, settings: &str) -> String {
        let host = self.database.host_str().expect("the URL names a host");
        let server_port = self.database.port().unwrap_or(5432);
        let user = self.database.username();
        let password = self
            .database
            .password()
            .map_or_else(String::new, |password| format!(" password='{}'", password.replace('\'', "''")));
        let port = self.port;
        format!(
            "[databases]\n* = host={host} port={server_port} user={user}{password}\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
             auth_type = any\nmax_client_conn = 400\n{settings}"
        )
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        if std::thread::panicking() {
            note(format_args!("PgBouncer: {}", self.log()));
        }
        self.kill();
    }
}
