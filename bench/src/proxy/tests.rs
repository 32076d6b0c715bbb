//! The proxy between a client and an echo server.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::Proxy;

type Tested = anyhow::Result<()>;

/// A server that sends back what it receives, until each client ends.
fn echo_server() -> anyhow::Result<u16> {
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

fn connect(port: u16) -> anyhow::Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    Ok(stream)
}

fn proxy(delay: Duration) -> anyhow::Result<Proxy> {
    Proxy::start("127.0.0.1".to_owned(), echo_server()?, delay)
}

fn ping(mut stream: &TcpStream, message: &[u8]) -> anyhow::Result<Duration> {
    let mut answer = vec![0; message.len()];
    let begin = Instant::now();
    stream.write_all(message)?;
    stream.read_exact(&mut answer)?;
    anyhow::ensure!(answer == message, "another answer");
    Ok(begin.elapsed())
}

#[test]
fn passes_all_bytes_in_order_and_then_the_end() -> Tested {
    for delay in [Duration::ZERO, Duration::from_millis(2)] {
        let proxy = proxy(delay)?;
        let clients: Vec<_> = (0..4)
            .map(|seed| {
                let port = proxy.port;
                thread::spawn(move || {
                    let mut random = fastrand::Rng::with_seed(seed);
                    let stream = connect(port)?;
                    let mut sent = vec![0; 8 * 1024 * 1024];
                    random.fill(&mut sent);
                    let mut received = Vec::new();
                    thread::scope(|scope| {
                        let sender = scope.spawn(|| {
                            let mut rest = sent.as_slice();
                            while !rest.is_empty() {
                                let length = random.usize(1..=100_000).min(rest.len());
                                (&stream).write_all(&rest[..length])?;
                                rest = &rest[length..];
                            }
                            stream.shutdown(Shutdown::Write)
                        });
                        (&stream).read_to_end(&mut received)?;
                        sender.join().unwrap_or_else(|_panic| Err(std::io::ErrorKind::Other.into()))
                    })?;
                    anyhow::ensure!(received == sent, "{} bytes, not as sent", received.len());
                    anyhow::Ok(())
                })
            })
            .collect();
        for client in clients {
            client.join().unwrap_or_else(|_panic| anyhow::bail!("the client panicked"))?;
        }
    }
    Ok(())
}

#[test]
fn delays_each_direction_at_least_as_long_as_requested() -> Tested {
    for delay in [Duration::from_micros(500), Duration::from_millis(3)] {
        let proxy = proxy(delay)?;
        let stream = connect(proxy.port)?;
        for number in 0_u32..100 {
            let took = ping(&stream, &number.to_be_bytes())?;
            assert!(took >= 2 * delay, "{took:?} with {delay:?} each way");
        }
    }
    Ok(())
}

/// Chunks travel together: 50 requests that follow each other do not wait for each other.
#[test]
fn delays_chunks_in_parallel() -> Tested {
    const CHUNKS: u32 = 50;

    let delay = Duration::from_millis(200);
    let proxy = proxy(delay)?;
    let stream = connect(proxy.port)?;
    let mut sent = Vec::new();
    let mut received = Vec::new();
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..CHUNKS {
                let mut byte = [0];
                let read = (&stream).read_exact(&mut byte);
                received.push((read.is_ok().then_some(byte[0]), Instant::now()));
            }
        });
        for number in 0..CHUNKS {
            sent.push(Instant::now());
            let _written = (&stream).write_all(&number.to_be_bytes()[3..]);
            thread::sleep(Duration::from_millis(1));
        }
    });
    for (number, (sent, (byte, received))) in (0..).zip(sent.iter().zip(&received)) {
        assert_eq!(*byte, Some(number));
        let took = received.saturating_duration_since(*sent);
        assert!(took >= 2 * delay, "{took:?}");
    }
    // One after the other they would take CHUNKS times as long.
    let took = received.last().map(|(_, last)| last.saturating_duration_since(sent[0]));
    assert!(took.is_some_and(|took| took < CHUNKS / 5 * delay), "{took:?}");
    Ok(())
}

#[test]
fn counts_round_trips_and_connections() -> Tested {
    let proxy = proxy(Duration::ZERO)?;
    for message in [[0; 1].as_slice(), [0; 2].as_slice()] {
        let stream = connect(proxy.port)?;
        for _ in 0..10 {
            ping(&stream, message)?;
        }
    }
    assert_eq!((proxy.connections(), proxy.round_trips()), (2, 20));
    Ok(())
}

#[test]
fn closes_the_connections_when_it_is_dropped() -> Tested {
    let proxy = proxy(Duration::from_millis(1))?;
    let stream = connect(proxy.port)?;
    ping(&stream, b"established")?;
    drop(proxy);
    assert!(!matches!((&stream).read(&mut [0]), Ok(1..)));
    Ok(())
}

/// A client that disappears must not leave the thread awake.
#[test]
fn sleeps_when_nothing_happens() -> Tested {
    let proxy = proxy(Duration::from_millis(1))?;
    let stream = connect(proxy.port)?;
    ping(&stream, b"established")?;
    // Bytes that nobody reads: the client's system answers the next ones with a reset.
    (&stream).write_all(b"unread")?;
    drop(stream);
    thread::sleep(Duration::from_millis(100));
    let before = proxy.processor_time();
    thread::sleep(Duration::from_millis(500));
    ping(&connect(proxy.port)?, b"another")?;
    let used = proxy.processor_time().saturating_sub(before);
    assert!(used < Duration::from_millis(100), "{used:?} of processor time");
    Ok(())
}

/// Prints how accurate the delay is on this machine:
/// `cargo test --release -- --ignored --nocapture accuracy`
#[test]
#[ignore = "prints figures"]
fn accuracy() -> Tested {
    const CALLERS: u32 = 12;
    const REQUESTS: u32 = 2000;

    let percentiles = |histogram: &Histogram<u64>| {
        [0.5, 0.99].map(|quantile| Duration::from_nanos(histogram.value_at_quantile(quantile)))
    };
    for callers in [1, CALLERS] {
        for delay in [None, Some(0), Some(500), Some(2000)] {
            let server = echo_server()?;
            let delay = delay.map(Duration::from_micros);
            let proxy = delay.map(|delay| Proxy::start("127.0.0.1".to_owned(), server, delay)).transpose()?;
            let port = proxy.as_ref().map_or(server, |proxy| proxy.port);
            let begin = Instant::now();
            let threads: Vec<_> = (0..callers)
                .map(|_caller| {
                    thread::spawn(move || {
                        let stream = connect(port)?;
                        (0..REQUESTS).map(|_| ping(&stream, &[7; 200])).collect::<anyhow::Result<Vec<_>>>()
                    })
                })
                .collect();
            let mut round_trips = Histogram::<u64>::new(3)?;
            for thread in threads {
                for took in thread.join().unwrap_or_else(|_panic| anyhow::bail!("a panic"))? {
                    round_trips.record(u64::try_from(took.as_nanos())?)?;
                }
            }
            let number = f64::from(REQUESTS * callers);
            let per_second = number / begin.elapsed().as_secs_f64();
            let mut late = Histogram::<u64>::new(3)?;
            let mut used = Duration::ZERO;
            if let Some(proxy) = &proxy {
                proxy.add_lateness_to(&mut late)?;
                used = proxy.processor_time();
            }
            println!(
                "{callers} connections, {delay:?} each way: round trip {:?} (p50, p99), late {:?}, \
                 {per_second:.0} a second, {:.1} us of processor time each",
                percentiles(&round_trips),
                percentiles(&late),
                used.as_secs_f64() * 1e6 / number,
            );
        }
    }
    Ok(())
}
