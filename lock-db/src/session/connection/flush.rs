//! Grants that are made durable by the second connection, while the first one goes on.
//!
//! Where many callers ask at once, the first connection commits their grants without waiting for the
//! disk, and carries on. The grants are answered when a small commit on the second connection, begun
//! afterwards, has waited for the disk: it makes everything before it durable. So server and disk
//! work at the same time, and no caller has a grant that a crash could undo.
//!
//! This holds only if nothing was lost between the two commits. A crash of the server ends both
//! sessions. So the second connection must have seen the first one's session, on its own server, and
//! must be in the same session still. Otherwise the answers are errors, and the callers ask again, in
//! the ordinary way.
//!
//! A grant then takes two round trips, and each batch costs another statement. So this
//! is done only where the disk takes longer than half a round trip, and longer than half a
//! millisecond, which is measured now and then.

use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::WeakUnboundedSender;
use tokio::sync::oneshot;
use tokio::task::spawn_local;
use tokio::time::timeout;

use super::life::SILENCE;
use super::worker::WorkerLoop;
use super::{Operation, Reply};
use crate::database::{Failure, LockDatabase, StepError};

/// With fewer claims the second round trip costs more than it saves.
const MANY: usize = 4;
const MEASUREMENTS: usize = 3;
/// A measurement that took longer is not repeated.
const QUICK: Duration = Duration::from_millis(20);
/// If the disk takes less, the further statements cost more time than it.
const WORTHWHILE: Duration = Duration::from_micros(500);
/// How long grants wait for the second connection.
const LIMIT: Duration = Duration::from_secs(1);
/// The time to the next measurement, also after the second connection has failed.
const PAUSE: Duration = Duration::from_secs(30);

/// The way from the first connection to the second.
#[derive(Clone)]
pub(super) struct Flusher {
    operations: WeakUnboundedSender<Operation>,
    state: Rc<Cell<State>>,
}

/// A request to flush what a session has committed.
pub(super) struct Flush {
    session: i64,
    measures: bool,
    reply: Reply<bool>,
}

impl Flush {
    pub(super) fn is_forgotten(&self) -> bool {
        self.reply.is_closed()
    }
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// Until this moment, if any.
    Off(Option<Instant>),
    /// Being measured.
    Asked,
    /// Until this moment.
    Ready(Instant),
}

impl Flusher {
    pub(super) fn new(operations: WeakUnboundedSender<Operation>) -> Self {
        Self { operations, state: Rc::new(Cell::new(State::Off(None))) }
    }

    /// Whether the grants of so many claims are better flushed by the second connection. If that is
    /// not known, it is measured in the background. `session` is that of the first connection.
    pub(super) fn is_ready(&self, claims: usize, session: Option<i64>) -> bool {
        let Some(session) = session.filter(|_| claims >= MANY) else { return false };
        let now = Instant::now();
        match self.state.get() {
            State::Ready(until) if until > now => return true,
            State::Off(Some(until)) if until > now => {}
            State::Asked => {}
            State::Ready(_) | State::Off(_) => {
                self.state.set(State::Asked);
                let flusher = self.clone();
                drop(spawn_local(async move {
                    if let Ok(is_faster) = flusher.ask(session, true).await {
                        let until = Instant::now() + PAUSE;
                        let state = if is_faster { State::Ready(until) } else { State::Off(Some(until)) };
                        flusher.state.set(state);
                    }
                }));
            }
        }
        false
    }

    /// Waits until everything is durable that this session has committed.
    pub(super) async fn flush(&self, session: i64) -> Result<(), StepError> {
        self.ask(session, false).await.map(drop)
    }

    /// With `measures`, returns whether this way is faster.
    async fn ask(&self, session: i64, measures: bool) -> Result<bool, StepError> {
        let (reply, replied) = oneshot::channel();
        let request = Flush { session, measures, reply };
        let sent = self.operations.upgrade().map(|sender| sender.send(Operation::Flush(request)));
        let flushed = match sent {
            Some(Ok(())) => timeout(LIMIT, replied).await.ok().and_then(Result::ok),
            _ => None,
        };
        let why = match flushed {
            Some(Ok(is_faster)) => return Ok(is_faster),
            Some(Err(failure)) => failure.to_string(),
            None => "no answer".to_owned(),
        };
        tracing::debug!(error = why, "grants wait for the disk on the first connection from now on");
        self.state.set(State::Off(Some(Instant::now() + PAUSE)));
        Err(StepError::disconnected("the second connection could not make the grants durable"))
    }
}

impl<DB: LockDatabase> WorkerLoop<DB> {
    /// One flush serves all requests of a round.
    pub(super) async fn flush(&mut self, mut flushes: Vec<Flush>) {
        while let Some(session) = flushes.first().map(|first| first.session) {
            let (together, others): (Vec<_>, Vec<_>) =
                flushes.into_iter().partition(|flush| flush.session == session);
            let measures = together.iter().any(|flush| flush.measures);
            let flushed = self.flush_session(session, measures).await;
            for flush in together {
                let _ = flush.reply.send(flushed.clone());
            }
            flushes = others;
        }
    }

    async fn flush_session(&mut self, session: i64, measures: bool) -> Result<bool, Failure> {
        let seen = self.connection.as_ref().and_then(|connection| connection.seen);
        let seen = seen.filter(|(other, _)| *other == session && !measures);
        let flushed = self.on_bare_connection(LIMIT, SILENCE, async |c| {
            let asked = Instant::now();
            let own = match seen {
                Some((_, own)) => Some(own),
                None => DB::has_session(c, session).await.map_err(Failure::new::<DB>)?,
            };
            let (round_trip, asked) = (asked.elapsed(), Instant::now());
            let now = DB::flush(c).await.map_err(Failure::new::<DB>)?;
            let Some(own) = own.filter(|own| *own == now) else {
                return Err(Failure::new::<DB>(StepError::disconnected("the two connections have not met")));
            };
            let first = Measurement { round_trip, flush: asked.elapsed() };
            let is_faster =
                measures && is_faster::<DB>(c, session, first).await.map_err(Failure::new::<DB>)?;
            Ok(((session, own), is_faster))
        });
        let (seen, is_faster) = flushed.await?;
        if let Some(connection) = &mut self.connection {
            connection.seen = Some(seen);
        }
        Ok(is_faster)
    }
}

struct Measurement {
    round_trip: Duration,
    flush: Duration,
}

impl Measurement {
    fn is_faster(&self) -> bool {
        self.flush.saturating_sub(self.round_trip) > WORTHWHILE.max(self.round_trip / 2)
    }
}

/// Compares the shortest of a few round trips with the shortest of as many flushes. The first
/// measurement may include that the statements were prepared. It is enough if the network or the disk
/// is slow: the connection is not kept busy longer than necessary.
async fn is_faster<DB: LockDatabase>(
    c: &mut DB::Connection,
    session: i64,
    first: Measurement,
) -> Result<bool, StepError> {
    if first.round_trip.max(first.flush) > QUICK {
        return Ok(first.is_faster());
    }
    let mut shortest = first;
    for _ in 0..MEASUREMENTS {
        let asked = Instant::now();
        DB::has_session(c, session).await?;
        shortest.round_trip = shortest.round_trip.min(asked.elapsed());
        let asked = Instant::now();
        DB::flush(c).await?;
        shortest.flush = shortest.flush.min(asked.elapsed());
    }
    Ok(shortest.is_faster())
}
