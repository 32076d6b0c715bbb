//! How accurate the delay is on this machine, measured with an echo server (`--measure-proxy`).

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::Proxy;

const CLIENTS: [u32; 2] = [1, 12];
/// In each direction. `None`: without the proxy.
const DELAYS: [Option<Duration>; 4] =
    [None, Some(Duration::ZERO), Some(Duration::from_micros(500)), Some(Duration::from_millis(2))];
const REQUESTS: u32 = 2000;

/// Prints the figures of each number of connections with each delay.
pub(crate) fn measure() -> anyhow::Result<()> {
    for clients in CLIENTS {
        for delay in DELAYS {
            measure_one(clients, delay)?;
        }
    }
    Ok(())
}

fn measure_one(clients: u32, delay: Option<Duration>) -> anyhow::Result<()> {
    let server = echo_server()?;
    let proxy = delay.map(|delay| Proxy::start("127.0.0.1".to_owned(), server, delay)).transpose()?;
    let port = proxy.as_ref().map_or(server, |proxy| proxy.port);
    let begin = Instant::now();
    let threads: Vec<_> = (0..clients).map(|_client| thread::spawn(move || round_trips(port))).collect();
    let mut round_trips = Histogram::<u64>::new(3)?;
    for thread in threads {
        for took in thread.join().unwrap_or_else(|_panic| anyhow::bail!("a client panicked"))? {
            round_trips.record(u64::try_from(took.as_nanos())?)?;
        }
    }
    let number = f64::from(REQUESTS * clients);
    let per_second = number / begin.elapsed().as_secs_f64();
    let (mut late, mut used) = (Histogram::<u64>::new(3)?, Duration::ZERO);
    if let Some(proxy) = &proxy {
        proxy.add_lateness_to(&mut late)?;
        used = proxy.processor_time();
    }
    println!(
        "{clients} connections, {delay:?} each way: round trip {:?} (p50, p99), late {:?}, \
         {per_second:.0} a second, {:.1} us of processor time each",
        percentiles(&round_trips),
        percentiles(&late),
        used.as_secs_f64() * 1e6 / number,
    );
    Ok(())
}

/// The times of the requests of one client.
fn round_trips(port: u16) -> anyhow::Result<Vec<Duration>> {
    let stream = connect(port)?;
    (0..REQUESTS).map(|_| ping(&stream, &[7; 200])).collect()
}

fn percentiles(histogram: &Histogram<u64>) -> [Duration; 2] {
    [0.5, 0.99].map(|quantile| Duration::from_nanos(histogram.value_at_quantile(quantile)))
}

/// A server that sends back what it receives, until each client ends.
pub(super) fn echo_server() -> anyhow::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            thread::spawn(move || {
                client.set_nodelay(true)?;
                std::io::copy(&mut &client, &mut &client)?;
                client.shutdown(Shutdown::Write)
            });
        }
    });
    Ok(port)
}

pub(super) fn connect(port: u16) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    Ok(stream)
}

/// Sends a message, and returns how long its echo took.
pub(super) fn ping(mut stream: &TcpStream, message: &[u8]) -> anyhow::Result<Duration> {
    let mut answer = vec![0; message.len()];
    let begin = Instant::now();
    stream.write_all(message)?;
    stream.read_exact(&mut answer)?;
    anyhow::ensure!(answer == message, "another answer");
    Ok(begin.elapsed())
}
