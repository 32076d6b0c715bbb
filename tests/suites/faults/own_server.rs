//! A server of the test's own, which may be killed, and whose clock may be moved.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use lock_tests::{Backend, eventually, free_port};
use rustix::process::{Pid, Signal, kill_process};
use sqlx::Connection;
use tempfile::TempDir;
use url::Url;

/// How long it takes to start on a busy machine.
const PATIENCE: Duration = Duration::from_mins(2);

pub(crate) struct OwnServer {
    kind: &'static str,
    folder: TempDir,
    port: u16,
    process: Option<Child>,
    moves_clock: bool,
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("server")
}

impl OwnServer {
    /// Whether there are the programs for it; `clock` is the one that moves clocks.
    pub(crate) fn can_have(kind: &str) -> bool {
        let status = Command::new(script()).args(["have", kind]).status();
        let can = status.expect("runs tests/server").success();
        if !can {
            // Past what the test harness catches.
            drop(writeln!(std::io::stderr(), "lock-tests: NOT TESTED: faults of a server without {kind}"));
        }
        can
    }

    /// With empty data.
    pub(crate) async fn new(kind: &'static str, moves_clock: bool) -> Self {
        let folder = tempfile::Builder::new().prefix("lock-db-server-").tempdir().expect("makes a folder");
        let mut server = Self { kind, folder, port: free_port(), process: None, moves_clock };
        let prepared = server.command("prepare").arg(server.folder.path()).status();
        assert!(prepared.expect("runs tests/server").success(), "{}", server.log());
        server.set_clock(0);
        server.start();
        server
    }

    pub(crate) fn url(&self) -> Url {
        let output = self.command("url").arg(self.port.to_string()).stdout(Stdio::piped()).output();
        let url = String::from_utf8(output.expect("runs tests/server").stdout).expect("an address");
        Url::parse(url.trim()).expect("an address")
    }

    fn command(&self, what: &str) -> Command {
        let log = File::options().append(true).create(true).open(self.folder.path().join("log"));
        let log = log.expect("opens the log");
        let mut command = Command::new(script());
        command.args([what, self.kind]).stdin(Stdio::null());
        command.stdout(log.try_clone().expect("opens the log")).stderr(log);
        command
    }

    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// With the data that is there. It takes a while until it [is back](Self::is_back).
    pub(crate) fn start(&mut self) {
        if self.process.is_some() {
            return;
        }
        let mut command = self.command("exec");
        command.arg(self.folder.path()).arg(self.port.to_string());
        command.env("LOCK_DB_TEST_SERVER_OWNER", std::process::id().to_string());
        command.env("LOCK_DB_TEST_SERVER_IS_KILLED", "1");
        if self.moves_clock {
            command.env("LOCK_DB_TEST_SERVER_CLOCK", self.clock());
        }
        self.process = Some(command.spawn().expect("starts a server"));
    }

    pub(crate) async fn is_back<DB: Backend>(&self) {
        let url = self.url();
        eventually(PATIENCE, async || DB::Connection::connect(url.as_str()).await.is_ok()).await;
    }

    /// kill -9, of all its processes at once: on PostgreSQL there is one for each connection.
    pub(crate) fn kill(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        let id = process.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        process.kill().expect("kills the server");
        let children: Vec<Pid> =
            children.split_whitespace().filter_map(|child| Pid::from_raw(child.parse().ok()?)).collect();
        for child in &children {
            // It may have ended by itself.
            let _killed = kill_process(*child, Signal::KILL);
        }
        process.wait().expect("waits for the server");
    }

    fn clock(&self) -> PathBuf {
        self.folder.path().join("clock")
    }

    /// How many seconds its clock is ahead of the true one.
    pub(crate) fn set_clock(&self, seconds: i64) {
        // In one piece: it is read at any time.
        let new = self.folder.path().join("clock.new");
        fs::write(&new, format!("{seconds:+}\n")).expect("writes the clock");
        fs::rename(new, self.clock()).expect("writes the clock");
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        if std::thread::panicking() {
            eprintln!("{}: {}", self.kind, self.log());
        }
        // PostgreSQL ends at once with it, and takes its shared memory along. The others know it as a crash.
        let signal = if self.kind == "postgres" { Signal::QUIT } else { Signal::KILL };
        let _ended = kill_process(Pid::from_child(&process), signal);
        let _status = process.wait();
    }
}
