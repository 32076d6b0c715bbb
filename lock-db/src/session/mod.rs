//! The session of a `Locks`: a thread with a small runtime of its own and at most two private connections, through
//! which every insert lock of the process is taken, renewed and released.
//!
//! So nothing here runs on a future that a caller may drop, a starved pool or a blocked runtime of the application
//! costs no lease, and a guard that is dropped anywhere only has to send a message.

mod acquire;
mod alarm;
mod busy;
mod core;
mod lane;
mod lease_state;
mod release;
mod renewal;
mod request;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::Pool;
use tokio::sync::{mpsc, oneshot, watch};

pub(crate) use self::lease_state::LeaseState;
pub(crate) use self::request::{Acquire, Answer, Request};
use crate::Error;
use crate::database::LockDatabase;

/// How long `close` waits for the last releases.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// The way to a session: started by the first request, ended by `close` or when nobody can send any more.
pub(crate) struct Session {
    state: Mutex<State>,
}

enum State {
    /// What starts the thread.
    Idle(Box<dyn Fn() -> Result<mpsc::UnboundedSender<Request>, Error> + Send>),
    Running(mpsc::UnboundedSender<Request>),
    /// The other end of what is dropped when all is released.
    Closed(Option<watch::Receiver<()>>),
}

impl Session {
    /// A session whose private connections are made like those of `pool`, hooks included.
    pub(crate) fn new<DB: LockDatabase>(pool: Pool<DB>) -> Self {
        Self { state: Mutex::new(State::Idle(Box::new(move || core::start(&pool)))) }
    }

    /// Sends a request and waits for its answer.
    pub(crate) async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Request,
    ) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        self.sender()?.send(request(answer)).map_err(|_| Error::Closed)?;
        answered.await.unwrap_or(Err(Error::Closed))
    }

    fn sender(&self) -> Result<mpsc::UnboundedSender<Request>, Error> {
        let mut state = self.lock();
        match &*state {
            State::Running(sender) => Ok(sender.clone()),
            State::Closed(_) => Err(Error::Closed),
            State::Idle(start) => {
                let sender = start()?;
                *state = State::Running(sender.clone());
                Ok(sender)
            }
        }
    }

    /// Refuses requests from now on, and waits until what is held was released.
    pub(crate) async fn close(&self) {
        if let Some(mut closed) = self.begin_to_close() {
            // Whatever could not be released by then is free after its TTL.
            let _in_time = tokio::time::timeout(CLOSE_LIMIT, closed.changed()).await;
        }
    }

    /// Whoever calls it first or later waits for the same end.
    fn begin_to_close(&self) -> Option<watch::Receiver<()>> {
        let mut state = self.lock();
        let closed = match &*state {
            State::Idle(_) => None,
            State::Running(sender) => {
                let (done, closed) = watch::channel(());
                let _session_may_be_gone = sender.send(Request::Close { done });
                Some(closed)
            }
            State::Closed(closed) => closed.clone(),
        };
        *state = State::Closed(closed.clone());
        closed
    }

    pub(crate) fn is_closed(&self) -> bool {
        matches!(&*self.lock(), State::Closed(_))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match &*self.lock() {
            State::Idle(_) => "Session(idle)",
            State::Running(_) => "Session(running)",
            State::Closed(_) => "Session(closed)",
        })
    }
}
