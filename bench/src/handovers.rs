//! Scenarios D and I: two processes pass locks to each other. Each caller shares its name with one
//! caller of the other process.
//!
//! One of the two callers holds the lock, and the other one waits for it. The holder releases the
//! lock when the other one has waited for some time. When the other one has the lock, they swap
//! roles. For this, each process tells the other one which of its callers were granted their locks,
//! over a connection between them. The connection does not go through the server, so it does not
//! affect the lock.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::clock::{Moment, after, now, until};
use crate::contender::{Caller, CallerGroup, Job};
use crate::record::{Log, Record};
use crate::summary::Window;
use crate::workload::{self, Ended, Request};

/// How long a caller waits before the holder releases the lock, in microseconds: long enough for
/// the polling of the contenders to slow down. The time is random. Otherwise each release would
/// have the same distance to the next poll.
const WAITING: std::ops::Range<u64> = 50_000..250_000;
/// How long it may take to acquire all locks before the warm-up.
pub(crate) const HOLD_LIMIT: Duration = Duration::from_mins(1);
/// How long callers wait for their lock after the end of the measurement.
const FINISH_LIMIT: Duration = Duration::from_secs(10);

/// The connection to the other process.
pub(crate) struct Peer {
    connection: TcpStream,
}

impl Peer {
    pub(crate) async fn listen() -> anyhow::Result<(TcpListener, u16)> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        Ok((listener, port))
    }

    pub(crate) async fn accept(listener: TcpListener) -> anyhow::Result<Self> {
        Self::new(listener.accept().await?.0)
    }

    pub(crate) async fn connect(port: u16) -> anyhow::Result<Self> {
        Self::new(TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await?)
    }

    fn new(connection: TcpStream) -> anyhow::Result<Self> {
        connection.set_nodelay(true)?;
        Ok(Self { connection })
    }
}

/// A lock that a caller holds.
pub(crate) struct Grant {
    requested: Moment,
    granted: Moment,
    fencing_token: Option<i64>,
}

/// Acquires the locks of all callers. So the measurement does not include the first use of a name.
pub(crate) async fn hold(callers: &mut Vec<Box<dyn Caller>>, job: &Job) -> anyhow::Result<Vec<Grant>> {
    let limit = after(now(), HOLD_LIMIT);
    let mut tasks = JoinSet::new();
    for (number, (mut caller, name)) in callers.drain(..).zip(job.names.clone()).enumerate() {
        tasks.spawn(async move {
            let (mut log, requested) = (Log::default(), now());
            let request = Request { name: &name, end: limit, limit };
            let Ended::Granted(fencing_token) = request.acquire(caller.as_mut(), &mut log).await else {
                anyhow::bail!("a free lock is not granted: {:?}", log.errors);
            };
            Ok((number, caller, Grant { requested, granted: now(), fencing_token }))
        });
    }
    let mut held = Vec::new();
    while let Some(ended) = tasks.join_next().await {
        held.push(ended??);
    }
    held.sort_unstable_by_key(|(number, ..)| *number);
    let mut grants = Vec::new();
    for (_, caller, grant) in held {
        callers.push(caller);
        grants.push(grant);
    }
    Ok(grants)
}

/// Passes the locks to the other process and back until the window ends. `held` is empty, or has
/// the grants of all callers.
pub(crate) async fn run(group: CallerGroup, job: &Job, window: Window, peer: Peer, held: Vec<Grant>) -> Log {
    let held = held.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
    let (incoming, outgoing) = peer.connection.into_split();
    let granted_there: Arc<[Notify]> = job.names.iter().map(|_name| Notify::new()).collect();
    let (granted_here, to_send) = unbounded_channel();
    let receiver = tokio::spawn(receive(incoming, Arc::clone(&granted_there)));
    let sender = tokio::spawn(send(outgoing, to_send));
    let mut tasks = JoinSet::new();
    for (number, ((caller, name), held)) in (0..).zip(group.callers.into_iter().zip(&job.names).zip(held)) {
        let caller_loop = CallerLoop {
            process: job.process,
            number,
            name: name.clone(),
            finish_limit: job.contender.finish_limit().max(FINISH_LIMIT),
            granted_here: granted_here.clone(),
            granted_there: Arc::clone(&granted_there),
        };
        tasks.spawn(caller_loop.run(caller, window, held));
    }
    drop(granted_here);
    let mut log = workload::end(tasks, group.end).await;
    for task in [sender, receiver] {
        // The other process ends the connection when its callers have ended.
        match timeout(until(after(window.end, Duration::from_mins(1))), task).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => log.add_error(&error, ""),
            Ok(Err(error)) => log.add_error(&error.into(), ""),
            Err(error) => log.add_error(&error.into(), ""),
        }
    }
    log
}

async fn receive(mut incoming: OwnedReadHalf, granted_there: Arc<[Notify]>) -> anyhow::Result<()> {
    loop {
        let number = match incoming.read_u32().await {
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
            number => number?,
        };
        granted_there.get(number as usize).context("a caller that does not exist")?.notify_one();
    }
}

async fn send(mut outgoing: OwnedWriteHalf, mut granted: UnboundedReceiver<u32>) -> anyhow::Result<()> {
    while let Some(number) = granted.recv().await {
        outgoing.write_u32(number).await?;
    }
    Ok(outgoing.shutdown().await?)
}

struct CallerLoop {
    process: u32,
    number: u32,
    name: String,
    finish_limit: Duration,
    granted_here: UnboundedSender<u32>,
    granted_there: Arc<[Notify]>,
}

impl CallerLoop {
    async fn run(self, mut caller: Box<dyn Caller>, window: Window, mut held: Option<Grant>) -> Log {
        let mut log = Log::default();
        loop {
            let grant = match held.take() {
                Some(grant) => Some(grant),
                None => self.acquire(caller.as_mut(), window, &mut log).await,
            };
            let Some(Grant { requested, granted, fencing_token }) = grant else { return log };
            // An error means that the other process has ended. The limit handles that.
            let _sent = self.granted_here.send(self.number);
            if granted < window.end {
                sleep(Duration::from_micros(fastrand::u64(WAITING))).await;
            }
            let releasing = now();
            if let Err(error) = caller.release().await {
                log.add_error(&error, &self.name);
            }
            log.records.push(Record {
                process: self.process,
                caller: self.number,
                requested,
                granted,
                releasing,
                released: now(),
                fencing_token,
            });
            if granted >= window.end {
                return log;
            }
        }
    }

    /// Requests the lock when the other process has it. `None`: not before the end.
    async fn acquire(&self, caller: &mut dyn Caller, window: Window, log: &mut Log) -> Option<Grant> {
        let limit = after(window.end, self.finish_limit);
        let granted_there = self.granted_there[self.number as usize].notified();
        if timeout(until(limit), granted_there).await.is_err() || now() >= window.end {
            return None;
        }
        let requested = now();
        let request = Request { name: &self.name, end: window.end, limit };
        let Ended::Granted(fencing_token) = request.acquire(caller, log).await else { return None };
        Some(Grant { requested, granted: now(), fencing_token })
    }
}
