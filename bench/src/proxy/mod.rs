//! A TCP proxy on loopback. It counts round trips and connections, and delays each direction.
//!
//! One thread serves all connections, and sleeps in `poll` until something arrives or is due. It
//! does not use tokio: tokio's timers are accurate to a millisecond, and the delay within a
//! datacenter is shorter.

pub(crate) mod accuracy;
mod connection;
#[cfg(test)]
mod tests;

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;
use hdrhistogram::Histogram;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use self::connection::Connection;

/// How often the thread reports its processor time, at most.
const PROCESSOR_TIME_INTERVAL: Duration = Duration::from_millis(10);

/// A running proxy. When it is dropped, it closes its connections and accepts no new ones.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What the proxy, its thread and the threads that connect to the server share.
struct Shared {
    host: String,
    port: u16,
    stopping: AtomicBool,
    /// A byte that is written here ends the sleep of the thread.
    waker: UnixStream,
    connections: AtomicU64,
    processor_nanoseconds: AtomicU64,
    meter: Meter,
}

/// What is measured of the traffic.
struct Meter {
    round_trips: AtomicU64,
    /// Nanoseconds from the due time of each chunk to its delivery.
    lateness: Mutex<Histogram<u64>>,
}

impl Proxy {
    /// Starts a proxy in front of a server. Each chunk of bytes is passed on `delay` after it
    /// arrived. This includes the end of a stream.
    pub(crate) fn start(host: String, port: u16, delay: Duration) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("starting a proxy")?;
        listener.set_nonblocking(true)?;
        let own_port = listener.local_addr()?.port();
        let (waker, woken) = UnixStream::pair()?;
        waker.set_nonblocking(true)?;
        woken.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            host,
            port,
            stopping: AtomicBool::new(false),
            waker,
            connections: AtomicU64::new(0),
            processor_nanoseconds: AtomicU64::new(0),
            meter: Meter { round_trips: AtomicU64::new(0), lateness: Mutex::new(Histogram::new(3)?) },
        });
        let (connected, established) = channel();
        let event_loop = EventLoop {
            shared: Arc::clone(&shared),
            delay,
            listener,
            woken,
            connected,
            established,
            connections: Vec::new(),
        };
        let thread = std::thread::Builder::new().name("proxy".to_owned()).spawn(|| event_loop.run())?;
        Ok(Self { port: own_port, shared, thread: Some(thread) })
    }

    /// The number of round trips. Requests that a client sends before it has an answer count once.
    pub(crate) fn round_trips(&self) -> u64 {
        self.shared.meter.round_trips.load(Ordering::SeqCst)
    }

    /// The number of connections that clients have opened.
    pub(crate) fn connections(&self) -> u64 {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// The processor time that the thread has used so far.
    pub(crate) fn processor_time(&self) -> Duration {
        Duration::from_nanos(self.shared.processor_nanoseconds.load(Ordering::SeqCst))
    }

    /// Adds the time from the due time of each chunk to its delivery, in nanoseconds.
    pub(crate) fn add_lateness_to(&self, histogram: &mut Histogram<u64>) -> anyhow::Result<()> {
        let lateness = self.shared.meter.lateness.lock().unwrap_or_else(PoisonError::into_inner);
        histogram.add(&*lateness).context("adding histograms")
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            let _ended = thread.join();
        }
    }
}

impl Shared {
    fn wake(&self) {
        // If the buffer is full, the thread is awake or about to wake up.
        let _written = (&self.waker).write(&[0]);
    }
}

/// The thread of a proxy.
struct EventLoop {
    shared: Arc<Shared>,
    delay: Duration,
    listener: TcpListener,
    /// Readable when the thread has been woken.
    woken: UnixStream,
    connected: Sender<Connection>,
    established: Receiver<Connection>,
    connections: Vec<Connection>,
}

impl EventLoop {
    fn run(mut self) {
        make_punctual();
        let mut buffer = vec![0; 64 * 1024];
        let mut reported = Instant::now();
        while !self.shared.stopping.load(Ordering::SeqCst) {
            // `poll` fails only if the kernel has no memory. Then clients see closed connections.
            let Ok(events) = self.wait() else { break };
            let (general, of_connections) = events.split_at(2);
            if general.iter().any(|events| !events.is_empty()) {
                while matches!((&self.woken).read(&mut buffer), Ok(1..)) {}
                self.accept();
            }
            let mut of_connections = of_connections.iter().copied();
            let (now, delay, meter) = (Instant::now(), self.delay, &self.shared.meter);
            self.connections.retain_mut(|connection| {
                // An error closes the connection, and both sides see that.
                connection.receive(&mut of_connections, &mut buffer, now + delay, meter).is_ok()
                    && connection.send_due(now, meter).is_ok()
                    && !connection.has_ended()
            });
            // These have no events yet.
            self.connections.extend(self.established.try_iter());
            if now - reported >= PROCESSOR_TIME_INTERVAL {
                self.report_processor_time();
                reported = now;
            }
        }
    }

    /// Sleeps until something arrives or is due. Returns the events of the waker, of the listener,
    /// and of each connection.
    fn wait(&self) -> io::Result<Vec<PollFlags>> {
        let mut descriptors =
            vec![PollFd::new(&self.woken, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
        descriptors.extend(self.connections.iter().flat_map(Connection::descriptors));
        let due = self.connections.iter().filter_map(Connection::next_due).min();
        let timeout = due.map(|due| Timespec::try_from(due.saturating_duration_since(Instant::now())));
        match poll(&mut descriptors, timeout.transpose().unwrap_or_default().as_ref()) {
            Ok(_) | Err(Errno::INTR) => Ok(descriptors.iter().map(PollFd::revents).collect()),
            Err(error) => Err(error.into()),
        }
    }

    /// Connects to the server for each new client, in a thread of its own. The server may be slow
    /// to accept, and the other connections must not wait for it.
    fn accept(&self) {
        while let Ok((client, _)) = self.listener.accept() {
            self.shared.connections.fetch_add(1, Ordering::SeqCst);
            let (shared, connected) = (Arc::clone(&self.shared), self.connected.clone());
            std::thread::spawn(move || {
                let server = TcpStream::connect((shared.host.as_str(), shared.port));
                if let Ok(connection) = server.and_then(|server| Connection::new(client, server))
                    && connected.send(connection).is_ok()
                {
                    shared.wake();
                }
            });
        }
    }

    fn report_processor_time(&self) {
        let time = Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default();
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.shared.processor_nanoseconds.store(nanoseconds, Ordering::SeqCst);
    }
}

/// Lets the current thread wake up in time. By default Linux may add 50 µs to each sleep. A busy
/// machine may add milliseconds, unless the thread has a higher priority. A real network needs no
/// processor. Without the right to a higher priority the figures are still correct, but the delay
/// is longer.
#[cfg(target_os = "linux")]
fn make_punctual() {
    let _slack = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
    // On Linux this changes the priority of the thread, not of the process.
    let _priority = rustix::process::setpriority_process(None, -15);
}

#[cfg(not(target_os = "linux"))]
fn make_punctual() {}
