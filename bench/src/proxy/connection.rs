//! One connection through the proxy.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};

use super::Meter;

/// With this many bytes on the way in one direction, the proxy reads no more until some are
/// delivered. More than any contender sends within the delay.
const MAXIMUM: usize = 16 * 1024 * 1024;

pub(super) struct Connection {
    client: TcpStream,
    server: TcpStream,
    to_server: Direction,
    to_client: Direction,
    /// Whether the server has sent something since the client's last bytes. A message may arrive in
    /// several pieces. The first piece after an answer starts a round trip.
    answered: bool,
}

impl Connection {
    pub(super) fn new(client: TcpStream, server: TcpStream) -> io::Result<Self> {
        for stream in [&client, &server] {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
        }
        let (to_server, to_client) = (Direction::default(), Direction::default());
        Ok(Self { client, server, to_server, to_client, answered: true })
    }

    /// What to wait for on the client's side and on the server's side.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = PollFd<'_>> {
        let client = interest(&self.to_server, &self.to_client);
        let server = interest(&self.to_client, &self.to_server);
        let client = client.map(|interest| PollFd::new(&self.client, interest));
        let server = server.map(|interest| PollFd::new(&self.server, interest));
        client.into_iter().chain(server)
    }

    /// When something is due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        [self.to_server.next_due(), self.to_client.next_due()].into_iter().flatten().min()
    }

    /// Reads what has arrived. It will be due at `due`. Takes one item of `events` for each of the
    /// descriptors.
    pub(super) fn receive(
        &mut self,
        events: &mut impl Iterator<Item = PollFlags>,
        buffer: &mut [u8],
        due: Instant,
        meter: &Meter,
    ) -> io::Result<()> {
        let mut events_of =
            |interest: Option<PollFlags>| interest.and_then(|_| events.next()).unwrap_or(PollFlags::empty());
        let client = events_of(interest(&self.to_server, &self.to_client));
        let server = events_of(interest(&self.to_client, &self.to_server));
        if self.to_server.receive(&self.client, client, buffer, due)? && self.answered {
            self.answered = false;
            meter.round_trips.fetch_add(1, Ordering::SeqCst);
        }
        if self.to_client.receive(&self.server, server, buffer, due)? {
            self.answered = true;
        }
        Ok(())
    }

    /// Delivers what is due.
    pub(super) fn send_due(&mut self, now: Instant, meter: &Meter) -> io::Result<()> {
        self.to_server.send_due(&self.server, now, meter)?;
        self.to_client.send_due(&self.client, now, meter)
    }

    /// Whether both directions have ended.
    pub(super) fn has_ended(&self) -> bool {
        self.to_server.is_shut_down && self.to_client.is_shut_down
    }
}

/// `incoming` reads from the side, and `outgoing` writes to it. `None`: both have ended. Then `poll`
/// would report that without end.
fn interest(incoming: &Direction, outgoing: &Direction) -> Option<PollFlags> {
    if incoming.ends_at.is_some() && outgoing.is_shut_down {
        return None;
    }
    let mut interest = PollFlags::empty();
    interest.set(PollFlags::IN, incoming.ends_at.is_none() && incoming.bytes.len() < MAXIMUM);
    interest.set(PollFlags::OUT, outgoing.is_blocked);
    Some(interest)
}

/// The bytes on the way in one direction.
#[derive(Default)]
struct Direction {
    bytes: VecDeque<u8>,
    /// The due time and the length of each chunk, in order.
    chunks: VecDeque<(Instant, usize)>,
    /// When the end of the stream is due. `None`: the sender has not ended it.
    ends_at: Option<Instant>,
    is_shut_down: bool,
    /// Whether the receiver's buffer is full.
    is_blocked: bool,
}

impl Direction {
    fn next_due(&self) -> Option<Instant> {
        if self.is_blocked || self.is_shut_down {
            return None;
        }
        self.chunks.front().map(|(due, _)| *due).or(self.ends_at)
    }

    /// Reads from the sender. Returns whether bytes arrived.
    fn receive(
        &mut self,
        mut from: &TcpStream,
        events: PollFlags,
        buffer: &mut [u8],
        due: Instant,
    ) -> io::Result<bool> {
        let has_failed = events.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL);
        if self.ends_at.is_some() {
            // Nothing can be read any more, so this is an error: the other direction has not ended.
            return if has_failed { Err(ErrorKind::ConnectionReset.into()) } else { Ok(false) };
        }
        if !has_failed && !events.contains(PollFlags::IN) {
            return Ok(false);
        }
        match from.read(buffer) {
            Ok(0) => {
                self.ends_at = Some(due);
                Ok(false)
            }
            Ok(length) => {
                self.chunks.push_back((due, length));
                self.bytes.extend(&buffer[..length]);
                Ok(true)
            }
            Err(error) if is_temporary(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes the chunks that are due, and then the end of the stream if that is due.
    fn send_due(&mut self, mut to: &TcpStream, now: Instant, meter: &Meter) -> io::Result<()> {
        self.is_blocked = false;
        let mut length =
            self.chunks.iter().take_while(|(due, _)| *due <= now).map(|(_, length)| length).sum();
        while length > 0 {
            let (first, second) = self.bytes.as_slices();
            let first = &first[..first.len().min(length)];
            let second = &second[..second.len().min(length - first.len())];
            match to.write_vectored(&[IoSlice::new(first), IoSlice::new(second)]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => {
                    length -= written;
                    self.remove(written, meter);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.is_blocked = true;
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
        }
        let ends_now = self.chunks.is_empty() && self.ends_at.is_some_and(|end| end <= now);
        if ends_now && !self.is_shut_down {
            self.is_shut_down = true;
            to.shutdown(Shutdown::Write)?;
        }
        Ok(())
    }

    /// Removes bytes that were delivered.
    fn remove(&mut self, mut delivered: usize, meter: &Meter) {
        self.bytes.drain(..delivered);
        let now = Instant::now();
        let mut lateness = meter.lateness.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some((due, length)) = self.chunks.front_mut() {
            if *length > delivered {
                *length -= delivered;
                break;
            }
            delivered -= *length;
            let late = u64::try_from(now.saturating_duration_since(*due).as_nanos()).unwrap_or(u64::MAX);
            // The histogram grows, unless there is no memory.
            let _recorded = lateness.record(late);
            self.chunks.pop_front();
        }
    }
}

fn is_temporary(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
