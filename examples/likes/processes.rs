//! Service processes: this program in another role. They end with the process that started them.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use lock_db::Locks;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::service::{self, Protection};
use crate::store::{self, Store};

const START_LIMIT: Duration = Duration::from_mins(1);
/// For the requests in progress, which may wait 30 seconds for a lock.
const STOP_LIMIT: Duration = Duration::from_secs(40);

/// Services in processes of their own, each with its own pool, locks and port.
pub(crate) struct Services {
    processes: Vec<Process>,
}

struct Process {
    child: Child,
    address: SocketAddr,
}

impl Services {
    pub(crate) async fn start(protection: Protection, count: u32, url: &str) -> anyhow::Result<Self> {
        let mut processes = Vec::new();
        for _ in 0..count {
            processes.push(Process::start(protection, connections(count), url).await?);
        }
        Ok(Self { processes })
    }

    pub(crate) fn addresses(&self) -> Vec<SocketAddr> {
        self.processes.iter().map(|process| process.address).collect()
    }

    /// Lets the services finish their requests and release their locks.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        for process in &mut self.processes {
            drop(process.child.stdin.take());
        }
        for process in &mut self.processes {
            let ended = timeout(STOP_LIMIT + Duration::from_secs(5), process.child.wait()).await;
            let status = ended.context("a service process does not stop")??;
            ensure!(status.success(), "a service process ended with {status}");
        }
        Ok(())
    }
}

/// The pool size of each of this many services: 20, or fewer, so that together they use about half
/// of the connections that a PostgreSQL server allows by default.
fn connections(processes: u32) -> u32 {
    (48 / processes).clamp(3, 20)
}

impl Process {
    async fn start(protection: Protection, connections: u32, url: &str) -> anyhow::Result<Self> {
        let program = std::env::current_exe().context("finding this program's own file")?;
        let protection = protection.to_possible_value().context("naming the protection")?;
        let mut child = Command::new(program)
            .arg(format!("--role-service={}", protection.get_name()))
            .arg(format!("--role-connections={connections}"))
            // Not as an argument: all users of the machine can read those, and the URL may contain
            // a password.
            .env("DATABASE_URL", url)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("starting a service process")?;
        let Some(output) = child.stdout.take() else { bail!("a service process has no output") };
        let mut line = String::new();
        timeout(START_LIMIT, BufReader::new(output).read_line(&mut line))
            .await
            .context("a service process did not start in time")?
            .context("reading the address of a service process")?;
        let address = line.trim().parse().context("a service process did not start")?;
        Ok(Self { child, address })
    }
}

/// The other role: serves on a free port and prints the port. Stops when the parent closes the
/// input or has ended, or when this process is `interrupted` itself.
pub(crate) async fn serve_for_parent<DB: Store>(
    url: &str,
    protection: Protection,
    connections: u32,
    interrupted: JoinHandle<std::io::Result<()>>,
) -> anyhow::Result<()> {
    let parent_is_done = parent_is_done()?;
    let stop = async {
        tokio::select! {
            () = parent_is_done => {}
            _ = interrupted => {}
        }
    };
    let pool =
        store::connect::<DB>(url, connections).await.context("connecting a service to the database")?;
    let locks = Locks::builder(pool.clone()).label("likes example").build();
    locks.check().await?;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.context("opening a port")?;
    // Connections wait in the listener until it is served.
    writeln!(std::io::stdout(), "{}", listener.local_addr()?).context("telling the address")?;
    service::serve(pool, locks, protection, listener, stop).await
}

/// Resolves when the standard input ends, which also happens when the parent dies for any reason.
/// Reads on a thread of its own, which ends the process if it does not stop.
fn parent_is_done() -> anyhow::Result<impl Future<Output = ()>> {
    let (sender, receiver) = oneshot::channel();
    let wait = move || {
        let _ended_or_broken = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        let _ = sender.send(());
        std::thread::sleep(STOP_LIMIT);
        std::process::exit(1);
    };
    std::thread::Builder::new().name("parent".into()).spawn(wait).context("starting a thread")?;
    Ok(async {
        let _ = receiver.await;
    })
}
