//! Real processes that can be stopped, continued and killed: the test's own program, started again
//! in a role.
//!
//! A suite declares its roles with [`child_roles!`](crate::child_roles), and [`run`](crate::run)
//! knows them. Parent and child exchange lines of text over the child's standard input and output.

use std::env;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::pin::Pin;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::Network;

const ROLE: &str = "LOCK_TESTS_ROLE";
const URL: &str = "LOCK_TESTS_URL";
const ARGUMENTS: &str = "LOCK_TESTS_ARGUMENTS";
const SEPARATOR: char = '\u{1f}';

/// Prefix of each line that the child sends, to distinguish it from other output.
const MARK: &str = "\u{1e}child: ";

/// How long a child may take to send a line that is waited for.
const PATIENCE: Duration = Duration::from_mins(1);

/// Declares the roles that [`Process::spawn`] can start: defines the function `roles` of a module.
/// Each is an `async fn role<DB: Backend>(parent: Parent)`, where `DB` follows from the URL that the
/// process was given. The names of roles are unique in a test binary.
#[macro_export]
macro_rules! child_roles {
    ($($role:ident),* $(,)?) => {
        /// What a child process of this suite can be.
        pub(crate) fn roles() -> ::std::vec::Vec<$crate::Role> {
            ::std::vec![$($crate::Role {
                name: stringify!($role),
                postgres: |parent| Box::pin($role::<::sqlx::Postgres>(parent)),
                mysql: |parent| Box::pin($role::<::sqlx::MySql>(parent)),
                sqlite: |parent| Box::pin($role::<::sqlx::Sqlite>(parent)),
            }),*]
        }
    };
}

type RoleOn = fn(Parent) -> Pin<Box<dyn Future<Output = ()>>>;

/// A role, for each kind of database.
#[derive(Debug, Clone, Copy)]
pub struct Role {
    pub name: &'static str,
    pub postgres: RoleOn,
    pub mysql: RoleOn,
    pub sqlite: RoleOn,
}

/// A child process. Dropping it kills it, even if it is stopped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    input: Option<ChildStdin>,
    lines: UnboundedReceiver<String>,
}

impl Process {
    /// Starts this program again, in a role.
    pub fn spawn<A: AsRef<str>>(role: &str, url: &str, arguments: impl IntoIterator<Item = A>) -> Self {
        Self::spawn_in(None, role, url, arguments)
    }

    /// The same, in a separate network.
    pub fn spawn_in<A: AsRef<str>>(
        network: Option<&Network>,
        role: &str,
        url: &str,
        arguments: impl IntoIterator<Item = A>,
    ) -> Self {
        let arguments: Vec<String> =
            arguments.into_iter().map(|argument| argument.as_ref().to_owned()).collect();
        let program = env::current_exe().expect("knows its own program");
        let mut command = match network.map(Network::enter) {
            None => Command::new(program),
            Some([enter, namespace, end]) => {
                let mut command = Command::new(enter);
                command.args([namespace, end]).arg(program);
                command
            }
        };
        let mut child = command
            .env(ROLE, role)
            .env(URL, url)
            .env(ARGUMENTS, arguments.join(SEPARATOR.encode_utf8(&mut [0; 4])))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("starts a child process");

        let output = child.stdout.take().expect("the output is piped");
        let (say, lines) = unbounded_channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if let Some((_, line)) = line.split_once(MARK)
                    && say.send(line.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        Self { input: child.stdin.take(), child, lines }
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a line to the child.
    pub fn say(&mut self, line: &str) {
        let input = self.input.as_mut().expect("the input is piped");
        writeln!(input, "{line}").expect("the child listens");
    }

    /// Returns the next line from the child. Panics when the child ends or sends nothing for a
    /// minute.
    pub async fn hear(&mut self) -> String {
        let line = tokio::time::timeout(PATIENCE, self.lines.recv())
            .await
            .unwrap_or_else(|_| panic!("the child process said nothing for {PATIENCE:?}"));
        line.unwrap_or_else(|| panic!("the child process ended: {:?}", self.child.wait()))
    }

    /// Returns a line that the child has already sent, if there is one. Panics if the child has
    /// ended.
    pub fn overhear(&mut self) -> Option<String> {
        match self.lines.try_recv() {
            Ok(line) => Some(line),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => panic!("the child process ended: {:?}", self.child.wait()),
        }
    }

    /// [Kills](Self::kill) the child and returns the lines that were not read yet. The last line
    /// may be truncated.
    pub async fn kill_and_hear(&mut self) -> Vec<String> {
        self.kill();
        let mut lines = Vec::new();
        while let Some(line) = self.lines.recv().await {
            lines.push(line);
        }
        lines
    }

    /// Waits for a line, which must be this one.
    pub async fn expect(&mut self, line: &str) {
        assert_eq!(self.hear().await, line);
    }

    /// Kills it (SIGKILL), so that it can do nothing more. Returns when it is dead.
    pub fn kill(&mut self) -> ExitStatus {
        self.child.kill().expect("kills the child process");
        self.child.wait().expect("waits for the child process")
    }

    /// Stops it (SIGSTOP), like a long pause: its clocks continue. Returns when it is stopped.
    pub fn stop(&self) {
        kill_process(self.pid(), Signal::STOP).expect("stops the child process");
        waitid(WaitId::Pid(self.pid()), WaitIdOptions::STOPPED).expect("waits for the child process to stop");
    }

    /// Continues it after [`stop`](Self::stop).
    pub fn resume(&self) {
        kill_process(self.pid(), Signal::CONT).expect("continues the child process");
    }

    /// Closes its input, which tells the child to end, and waits for its end.
    pub async fn wait(mut self) -> ExitStatus {
        drop(self.input.take());
        let deadline = tokio::time::Instant::now() + PATIENCE;
        // The output ends with the process.
        while let Some(_line) = tokio::time::timeout_at(deadline, self.lines.recv())
            .await
            .unwrap_or_else(|_| panic!("the child process did not end within {PATIENCE:?}"))
        {}
        self.child.wait().expect("waits for the child process")
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// The parent process, as its child sees it.
#[derive(Debug)]
pub struct Parent {
    url: String,
    arguments: Vec<String>,
    lines: UnboundedReceiver<String>,
}

impl Parent {
    /// The URL of the database.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// An argument given to [`Process::spawn`].
    pub fn argument(&self, index: usize) -> &str {
        self.arguments.get(index).unwrap_or_else(|| panic!("no argument {index}"))
    }

    /// Sends a line to the parent.
    pub fn say(&self, line: impl std::fmt::Display) {
        say_to_parent(line);
    }

    /// Returns the next line from the parent; `None` when the child should end.
    pub async fn hear(&mut self) -> Option<String> {
        self.lines.recv().await
    }

    fn from_environment(role: &OsStr) -> Self {
        let url = env::var(URL).unwrap_or_else(|_| panic!("{URL} is not set for {}", role.display()));
        let arguments = env::var(ARGUMENTS).unwrap_or_default();
        let arguments = arguments.split(SEPARATOR).map(str::to_owned).collect();
        let (say, lines) = unbounded_channel();
        thread::spawn(move || {
            for line in std::io::stdin().lines().map_while(Result::ok) {
                if say.send(line).is_err() {
                    return;
                }
            }
            drop(say);
            // A child must not continue after its parent has gone, or if it ignores the request to
            // end.
            thread::sleep(PATIENCE);
            std::process::exit(1);
        });
        Self { url, arguments, lines }
    }
}

/// Sends a line to the parent, from anywhere in a child. The line is flushed when this returns.
pub fn say_to_parent(line: impl std::fmt::Display) {
    let mut output = std::io::stdout().lock();
    writeln!(output, "\n{MARK}{line}").and_then(|()| output.flush()).expect("the parent listens");
}

/// Runs the role that this process was started for. Returns `false` if the process is not a child.
pub(crate) fn become_child(roles: &[Role]) -> bool {
    let Some(name) = env::var_os(ROLE) else { return false };
    let mut of_this_name = roles.iter().filter(|role| name == role.name);
    let role =
        of_this_name.next().unwrap_or_else(|| panic!("this test binary has no role {}", name.display()));
    assert!(of_this_name.next().is_none(), "two roles are called {}", name.display());
    let parent = Parent::from_environment(&name);
    let role = match parent.url().split(':').next() {
        Some("postgres" | "postgresql") => role.postgres,
        Some("mysql" | "mariadb") => role.mysql,
        Some("sqlite") => role.sqlite,
        scheme => panic!("no database has the scheme {scheme:?}"),
    };
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    runtime.worker_threads(2).enable_all().build().expect("starts a runtime").block_on(role(parent));
    true
}
