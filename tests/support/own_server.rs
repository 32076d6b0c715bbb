//! A server for one test, which may be killed, and whose clock may be moved.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use sqlx::Connection;
use tempfile::TempDir;
use url::Url;

use crate::{Backend, eventually, free_port, ignore, note};

/// How long it may take to start on a busy machine.
const PATIENCE: Duration = Duration::from_mins(2);

#[derive(Debug)]
pub struct OwnServer {
    kind: &'static str,
    options: &'static str,
    folder: TempDir,
    port: u16,
    process: Option<Child>,
    moves_clock: bool,
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("server")
}

impl OwnServer {
    /// Whether the programs for it are installed. The kind `clock` is the program that moves
    /// clocks.
    pub fn can_have(kind: &str) -> bool {
        let status = Command::new(script()).args(["have", kind]).status();
        status.expect("runs tests/server").success()
    }

    /// Ignores the case if the programs for such a server are not installed.
    pub fn need(kind: &str) {
        if !Self::can_have(kind) {
            ignore(format_args!(
                "the programs for a {kind} of its own are not installed; tests/run installs them"
            ));
        }
    }

    /// Creates a server with empty data.
    pub async fn new(kind: &'static str, moves_clock: bool) -> Self {
        Self::make(kind, moves_clock, "").await
    }

    /// The same, with these options for the server's program.
    pub async fn with_options(kind: &'static str, options: &'static str) -> Self {
        Self::make(kind, false, options).await
    }

    async fn make(kind: &'static str, moves_clock: bool, options: &'static str) -> Self {
        let folder = tempfile::Builder::new().prefix("lock-db-server-").tempdir().expect("makes a folder");
        let mut server = Self { kind, options, folder, port: free_port(), process: None, moves_clock };
        let prepared = server.command("prepare").arg(server.folder.path()).status();
        assert!(prepared.expect("runs tests/server").success(), "{}", server.log());
        server.set_clock(0);
        server.start();
        server
    }

    pub fn url(&self) -> Url {
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

    /// Starts it with the existing data. It takes a while until it [is back](Self::is_back).
    pub fn start(&mut self) {
        if self.process.is_some() {
            return;
        }
        let mut command = self.command("exec");
        command.arg(self.folder.path()).arg(self.port.to_string());
        command.env("LOCK_DB_TEST_SERVER_OWNER", std::process::id().to_string());
        command.env("LOCK_DB_TEST_SERVER_IS_KILLED", "1");
        command.env("LOCK_DB_TEST_SERVER_OPTIONS", self.options);
        if self.moves_clock {
            command.env("LOCK_DB_TEST_SERVER_CLOCK", self.clock());
        }
        self.process = Some(command.spawn().expect("starts a server"));
    }

    pub async fn is_back<DB: Backend>(&self) {
        let url = self.url();
        eventually(PATIENCE, async || DB::Connection::connect(url.as_str()).await.is_ok()).await;
    }

    /// Kills all its processes (kill -9).
    pub fn kill(&mut self) {
        let Some(mut process) = self.process.take() else { return };
        let children = children(&process);
        process.kill().expect("kills the server");
        for child in &children {
            // It may have ended by itself.
            let _killed = kill_process(*child, Signal::KILL);
        }
        process.wait().expect("waits for the server");
    }

    /// Stops all its processes: the server answers nothing and closes no connection.
    pub fn freeze(&self) {
        let Some(process) = &self.process else { return };
        kill_process(Pid::from_child(process), Signal::STOP).expect("stops the server");
        for child in children(process) {
            let _ended_else = kill_process(child, Signal::STOP);
        }
    }

    /// Continues all its processes.
    pub fn thaw(&self) {
        let Some(process) = &self.process else { return };
        for child in children(process) {
            let _ended_else = kill_process(child, Signal::CONT);
        }
        let _ended_else = kill_process(Pid::from_child(process), Signal::CONT);
    }

    fn clock(&self) -> PathBuf {
        self.folder.path().join("clock")
    }

    /// Sets how many seconds its clock is ahead of the true time.
    pub fn set_clock(&self, seconds: i64) {
        // Replaces the file in one step, because it may be read at any time.
        let new = self.folder.path().join("clock.new");
        fs::write(&new, format!("{seconds:+}\n")).expect("writes the clock");
        fs::rename(new, self.clock()).expect("writes the clock");
    }
}

/// PostgreSQL has one child process per connection.
fn children(process: &Child) -> Vec<Pid> {
    let id = process.id();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
    children.split_whitespace().filter_map(|child| Pid::from_raw(child.parse().ok()?)).collect()
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        self.thaw();
        let Some(mut process) = self.process.take() else { return };
        if std::thread::panicking() {
            note(format_args!("{}: {}", self.kind, self.log()));
        }
        // PostgreSQL ends immediately, and removes its shared memory. For the others this is like a
        // crash.
        let signal = if self.kind == "postgres" { Signal::QUIT } else { Signal::KILL };
        let _ended = kill_process(Pid::from_child(&process), signal);
        let _status = process.wait();
    }
}
