//! The proxy between a client and an echo server.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use super::Proxy;
use super::accuracy::{connect, echo_server, ping};

type Tested = anyhow::Result<()>;

fn proxy(delay: Duration) -> anyhow::Result<Proxy> {
    Proxy::start("127.0.0.1".to_owned(), echo_server()?, delay)
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
