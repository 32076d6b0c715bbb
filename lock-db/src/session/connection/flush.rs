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
/// How long grants wait for the second connection.
const LIMIT: Duration = Duration::from_secs(1);
/// How long the second connection is not used after it failed.
const PAUSE: Duration = Duration::from_secs(30);

/// The way from the first connection to the second.
#[derive(Clone)]
pub(super) struct Flusher {
    operations: WeakUnboundedSender<Operation>,
    state: Rc<Cell<State>>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// Not tried since this moment.
    Off(Option<Instant>),
    /// Being tried.
    Asked,
    Ready,
}

impl Flusher {
    pub(super) fn new(operations: WeakUnboundedSender<Operation>) -> Self {
        Self { operations, state: Rc::new(Cell::new(State::Off(None))) }
    }

    /// Whether the grants of so many claims can be flushed by the second connection. If that is not
    /// known yet, it is tried in the background. `session` is that of the first connection.
    pub(super) fn is_ready(&self, claims: usize, session: Option<i64>) -> bool {
        let Some(session) = session.filter(|_| claims >= MANY) else { return false };
        match self.state.get() {
            State::Ready => return true,
            State::Off(until) if until.is_none_or(|until| until <= Instant::now()) => {
                self.state.set(State::Asked);
                let flusher = self.clone();
                drop(spawn_local(async move { flusher.flush(session).await }));
            }
            State::Off(_) | State::Asked => {}
        }
        false
    }

    /// Waits until everything is durable that this session has committed.
    pub(super) async fn flush(&self, session: i64) -> Result<(), StepError> {
        let (reply, replied) = oneshot::channel();
        let sent = self.operations.upgrade().map(|sender| sender.send(Operation::Flush(session, reply)));
        let flushed = match sent {
            Some(Ok(())) => timeout(LIMIT, replied).await.ok().and_then(Result::ok),
            _ => None,
        };
        let why = match flushed {
            Some(Ok(())) => {
                self.state.set(State::Ready);
                return Ok(());
            }
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
    pub(super) async fn flush(&mut self, mut flushes: Vec<(i64, Reply<()>)>) {
        while let Some((session, _)) = flushes.first() {
            let session = *session;
            let flushed = self.flush_session(session).await;
            for (_, reply) in flushes.extract_if(.., |(other, _)| *other == session) {
                let _ = reply.send(flushed.clone());
            }
        }
    }

    async fn flush_session(&mut self, session: i64) -> Result<(), Failure> {
        let seen = self.connection.as_ref().and_then(|connection| connection.seen);
        let flushed = self.on_bare_connection(LIMIT, SILENCE, async |c| {
            let own = match seen.filter(|(other, _)| *other == session) {
                Some((_, own)) => Some(own),
                None => DB::has_session(c, session).await.map_err(Failure::new::<DB>)?,
            };
            let now = DB::flush(c).await.map_err(Failure::new::<DB>)?;
            match own.filter(|own| *own == now) {
                Some(own) => Ok((session, own)),
                None => Err(Failure::new::<DB>(StepError::disconnected("the two connections have not met"))),
            }
        });
        let seen = flushed.await?;
        if let Some(connection) = &mut self.connection {
            connection.seen = Some(seen);
        }
        Ok(())
    }
}
