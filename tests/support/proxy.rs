//! A network that can be made slow, silent or dead.

use std::collections::VecDeque;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// A TCP proxy, on 127.0.0.1 by default. It has its own thread, so that a test may block its
/// runtime. Dropping it closes all connections.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    state: Arc<State>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// The direction of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    ToServer,
    ToClient,
}

#[derive(Debug)]
struct State {
    server: (String, u16),
    admission: watch::Sender<Admission>,
    /// Counts the cuts. A connection ends when the count changes.
    cut: watch::Sender<u64>,
    /// Connections with a smaller number transfer nothing.
    stranded: watch::Sender<usize>,
    to_server: Way,
    to_client: Way,
    opened: AtomicUsize,
    open: AtomicUsize,
}

#[derive(Debug)]
struct Way {
    delay: watch::Sender<Duration>,
    paused: watch::Sender<bool>,
    reads: AtomicUsize,
    held: AtomicUsize,
    watched: Mutex<Option<&'static [u8]>>,
    seen: AtomicUsize,
    ends_after: Mutex<Vec<&'static [u8]>>,
}

/// What happens to new connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Admission {
    Pass,
    Refuse,
    Swallow,
}

impl Proxy {
    /// A proxy in front of a server. It passes everything on at once until a method changes that.
    pub fn new(server: (String, u16)) -> Self {
        Self::on(Ipv4Addr::LOCALHOST, server)
    }

    /// The same, on another address of this host.
    pub fn on(address: Ipv4Addr, server: (String, u16)) -> Self {
        let state = Arc::new(State {
            server,
            admission: watch::Sender::new(Admission::Pass),
            cut: watch::Sender::new(0),
            stranded: watch::Sender::new(0),
            to_server: Way::new(),
            to_client: Way::new(),
            opened: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
        });
        let (stop, stopped) = oneshot::channel();
        let (started, start) = std::sync::mpsc::channel();
        let shared = Arc::clone(&state);
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("starts a runtime").block_on(async {
                // Never listens: it reserves the address while the proxy refuses connections.
                let reserved = bind(SocketAddr::from((address, 0))).expect("binds");
                let address = reserved.local_addr().expect("has an address");
                let listener = listen(address).expect("listens");
                started.send(address).expect("the proxy is waited for");
                tokio::select! {
                    () = serve(listener, address, shared) => {}
                    _ = stopped => {}
                }
            });
        });
        let address = start.recv().expect("the proxy starts");
        Self { address, state, stop: Some(stop), thread: Some(thread) }
    }

    /// The address on which it listens. `TestServer::url_by` makes a URL of it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Delays everything that is read from now on. The bandwidth is not limited.
    pub fn delay(&self, direction: Direction, delay: Duration) {
        self.way(direction).delay.send_replace(delay);
    }

    /// Holds everything in this direction, on all connections, until [`resume`](Self::resume).
    pub fn pause(&self, direction: Direction) {
        self.way(direction).paused.send_replace(true);
    }

    /// Releases what was held.
    pub fn resume(&self, direction: Direction) {
        self.way(direction).paused.send_replace(false);
    }

    /// How many bytes are delayed or held at the moment. If a statement's answer is among them, the
    /// server has executed the statement.
    pub fn held(&self, direction: Direction) -> usize {
        self.way(direction).held.load(Ordering::SeqCst)
    }

    /// Holds everything on the existing connections, like a router that has forgotten them. New
    /// connections are not affected.
    pub fn strand(&self) {
        self.state.stranded.send_replace(self.opened());
    }

    /// Releases what [`strand`](Self::strand) holds.
    pub fn rescue(&self) {
        self.state.stranded.send_replace(0);
    }

    /// Ends all connections. What is held is lost.
    pub fn cut(&self) {
        self.state.cut.send_modify(|cuts| *cuts += 1);
    }

    /// Ends the next connection on which these bytes pass, in this order and within one read,
    /// directly behind the last of them.
    pub fn end_after(&self, direction: Direction, marks: &[&'static [u8]]) {
        *self.way(direction).ends_after.lock().expect("no panic") = marks.to_vec();
    }

    /// Counts the reads with these bytes from now on.
    pub fn watch_for(&self, direction: Direction, mark: &'static [u8]) {
        let way = self.way(direction);
        *way.watched.lock().expect("no panic") = Some(mark);
        way.seen.store(0, Ordering::SeqCst);
    }

    /// How many reads had the bytes of [`watch_for`](Self::watch_for). The text of a prepared
    /// statement passes once on each connection.
    pub fn seen(&self, direction: Direction) -> usize {
        self.way(direction).seen.load(Ordering::SeqCst)
    }

    /// Refuses new connections, like a server that is down. Open connections are not affected.
    pub fn refuse(&self) {
        self.state.admission.send_replace(Admission::Refuse);
    }

    /// Accepts new connections, but never answers. Open connections are not affected.
    pub fn swallow(&self) {
        self.state.admission.send_replace(Admission::Swallow);
    }

    /// Lets new connections reach the server again.
    pub fn admit(&self) {
        self.state.admission.send_replace(Admission::Pass);
    }

    /// How many connections were opened, including swallowed ones.
    pub fn opened(&self) -> usize {
        self.state.opened.load(Ordering::SeqCst)
    }

    /// How many connections are open.
    pub fn open(&self) -> usize {
        self.state.open.load(Ordering::SeqCst)
    }

    /// How many reads there were in this direction: about one per message if client and server take
    /// turns.
    pub fn reads(&self, direction: Direction) -> usize {
        self.way(direction).reads.load(Ordering::SeqCst)
    }

    fn way(&self, direction: Direction) -> &Way {
        self.state.way(direction)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl State {
    fn way(&self, direction: Direction) -> &Way {
        match direction {
            Direction::ToServer => &self.to_server,
            Direction::ToClient => &self.to_client,
        }
    }
}

impl Way {
    fn new() -> Self {
        Self {
            delay: watch::Sender::new(Duration::ZERO),
            paused: watch::Sender::new(false),
            reads: AtomicUsize::new(0),
            held: AtomicUsize::new(0),
            watched: Mutex::default(),
            seen: AtomicUsize::new(0),
            ends_after: Mutex::default(),
        }
    }

    fn watch(&self, bytes: &[u8]) {
        let watched = *self.watched.lock().expect("no panic");
        if watched.is_some_and(|mark| bytes.windows(mark.len()).any(|window| window == mark)) {
            self.seen.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// How much of these bytes passes, if the connection ends in them.
    fn end_in(&self, bytes: &[u8]) -> Option<usize> {
        let mut marks = self.ends_after.lock().expect("no panic");
        if marks.is_empty() {
            return None;
        }
        let mut end = 0;
        for mark in &*marks {
            end += bytes[end..].windows(mark.len()).position(|window| window == *mark)? + mark.len();
        }
        marks.clear();
        Some(end)
    }
}

/// A socket that can share its address with a listening one.
fn bind(address: SocketAddr) -> io::Result<TcpSocket> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    Ok(socket)
}

/// A listener that can use the same address again after it was closed.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    bind(address)?.listen(1024)
}

async fn serve(listener: TcpListener, address: SocketAddr, state: Arc<State>) {
    let mut admission = state.admission.subscribe();
    let mut listener = Some(listener);
    let mut connections = JoinSet::new();
    loop {
        let admitted = *admission.borrow_and_update();
        if admitted == Admission::Refuse {
            listener = None;
            drop(admission.changed().await);
            continue;
        }
        let open = listener.get_or_insert_with(|| listen(address).expect("listens again"));
        tokio::select! {
            biased;
            _ = admission.changed() => {}
            Some(_) = connections.join_next() => {}
            accepted = open.accept() => {
                if let Ok((client, _)) = accepted {
                    connections.spawn(connect(client, admitted, Arc::clone(&state)));
                }
            }
        }
    }
}

/// Handles one connection, from its first byte to its end.
async fn connect(client: TcpStream, admitted: Admission, state: Arc<State>) {
    let count = Open::new(&state);
    let mut cut = state.cut.subscribe();
    let pass = async {
        match admitted {
            Admission::Pass => pass(client, &state, count.number).await,
            Admission::Refuse | Admission::Swallow => {
                let mut client = client;
                tokio::io::copy(&mut client, &mut tokio::io::sink()).await.map(drop)
            }
        }
    };
    tokio::select! {
        _ = pass => {}
        _ = cut.changed() => {}
    }
}

async fn pass(client: TcpStream, state: &State, number: usize) -> io::Result<()> {
    let server = TcpStream::connect((state.server.0.as_str(), state.server.1)).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::try_join!(
        pump(from_client, to_server, &state.to_server, &state.stranded, number),
        pump(from_server, to_client, &state.to_client, &state.stranded, number),
    )?;
    Ok(())
}

/// Transfers bytes in one direction. Continues to read while it holds what it has read, as a
/// network does.
async fn pump(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    way: &Way,
    stranded: &watch::Sender<usize>,
    number: usize,
) -> io::Result<()> {
    let mut stranded = stranded.subscribe();
    let mut delay = way.delay.subscribe();
    let mut paused = way.paused.subscribe();
    let mut held = Held { way, pieces: VecDeque::new() };
    let mut buffer = vec![0; 64 * 1024];
    let mut at_end = false;
    loop {
        let due = held.pieces.front().map(|(due, _)| *due);
        if at_end && due.is_none() {
            return to.shutdown().await;
        }
        let is_stranded = number < *stranded.borrow_and_update();
        let is_paused = *paused.borrow_and_update() || is_stranded;
        tokio::select! {
            biased;
            read = from.read(&mut buffer), if !at_end => match read? {
                0 => at_end = true,
                length => {
                    let arrival = Instant::now() + *delay.borrow_and_update();
                    way.watch(&buffer[..length]);
                    let end = way.end_in(&buffer[..length]);
                    at_end = end.is_some();
                    held.push(arrival, buffer[..end.unwrap_or(length)].to_vec());
                }
            },
            _ = paused.changed() => {}
            _ = stranded.changed() => {}
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() && !is_paused => {
                let piece = held.pop();
                to.write_all(&piece).await?;
            }
        }
    }
}

/// Bytes on their way, which are counted.
struct Held<'a> {
    way: &'a Way,
    pieces: VecDeque<(Instant, Vec<u8>)>,
}

impl Held<'_> {
    fn push(&mut self, due: Instant, bytes: Vec<u8>) {
        self.way.reads.fetch_add(1, Ordering::SeqCst);
        self.way.held.fetch_add(bytes.len(), Ordering::SeqCst);
        self.pieces.push_back((due, bytes));
    }

    fn pop(&mut self) -> Vec<u8> {
        let (_, bytes) = self.pieces.pop_front().unwrap_or_else(|| (Instant::now(), Vec::new()));
        self.way.held.fetch_sub(bytes.len(), Ordering::SeqCst);
        bytes
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        while !self.pieces.is_empty() {
            self.pop();
        }
    }
}

struct Open<'a> {
    state: &'a State,
    number: usize,
}

impl<'a> Open<'a> {
    fn new(state: &'a State) -> Self {
        state.open.fetch_add(1, Ordering::SeqCst);
        Self { state, number: state.opened.fetch_add(1, Ordering::SeqCst) }
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.state.open.fetch_sub(1, Ordering::SeqCst);
    }
}
