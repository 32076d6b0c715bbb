//! Counts the round trips and connections to a server.

use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

/// A TCP proxy on loopback. When it is dropped, it stops counting and accepts no new connections.
pub(crate) struct Proxy {
    pub(crate) port: u16,
    counts: Arc<Counts>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Counts {
    round_trips: AtomicU64,
    connections: AtomicU64,
}

impl Proxy {
    pub(crate) async fn start(host: String, port: u16) -> anyhow::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let own_port = listener.local_addr()?.port();
        let counts = Arc::new(Counts::default());
        let shared = Arc::clone(&counts);
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                shared.connections.fetch_add(1, Ordering::SeqCst);
                let (host, counts) = (host.clone(), Arc::clone(&shared));
                // An error closes the connection, and both sides see that.
                tokio::spawn(async move {
                    let _ended = pass(client, host, port, counts).await;
                });
            }
        });
        Ok(Self { port: own_port, counts, task })
    }

    /// The number of round trips. Requests that a client sends before it has an answer count once.
    pub(crate) fn round_trips(&self) -> u64 {
        self.counts.round_trips.load(Ordering::SeqCst)
    }

    /// The number of connections that clients have opened.
    pub(crate) fn connections(&self) -> u64 {
        self.counts.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn pass(client: TcpStream, host: String, port: u16, counts: Arc<Counts>) -> io::Result<()> {
    let server = TcpStream::connect((host.as_str(), port)).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    // A message may arrive in several pieces. The first piece after an answer starts a round trip.
    let answered = AtomicBool::new(true);
    tokio::try_join!(
        pump(from_client, to_server, || {
            if answered.swap(false, Ordering::SeqCst) {
                counts.round_trips.fetch_add(1, Ordering::SeqCst);
            }
        }),
        pump(from_server, to_client, || answered.store(true, Ordering::SeqCst)),
    )?;
    Ok(())
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, seen: impl Fn()) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = from.read(&mut buffer).await?;
        if length == 0 {
            return to.shutdown().await;
        }
        seen();
        to.write_all(&buffer[..length]).await?;
    }
}
