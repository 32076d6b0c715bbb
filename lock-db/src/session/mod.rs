//! The session of a `Locks`: a thread with a small runtime of its own and at most two private connections, through
//! which every insert lock of the process is taken, renewed and released.
//!
//! So nothing here runs on a future that a caller may drop, a starved pool or a blocked runtime of the application
//! costs no lease, and a guard that is dropped anywhere only has to send a message.

mod acquire;
mod alarm;
mod answers;
mod baton;
mod busy;
mod calls;
mod core;
mod hold_time;
mod lane;
mod lease_state;
mod long_holds;
mod old_snapshots;
mod queues;
mod release;
mod renewal;
mod request;

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use sqlx::Pool;
use tokio::sync::{mpsc, oneshot, watch};

pub(crate) use self::answers::answer_to;
pub(crate) use self::lease_state::LeaseState;
pub(crate) use self::long_holds::Watched;
pub(crate) use self::queues::{HandOff, Queues};
use self::request::Acquire;
pub(crate) use self::request::{Answer, Request};
use crate::Error;
use crate::clock;
use crate::database::{Claim, Location, LockDatabase};
use crate::insert::Hold;
use crate::limits::FIRST_ANSWER;
use crate::name::Name;
use crate::sync::{Mutex, MutexGuard};

/// How long `close` waits for the last releases.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// How long the session has for most of what it is asked, unless it is seen to be at work.
pub(crate) const ASK_LIMIT: Duration = Duration::from_secs(5);

/// Leases that are asked for together.
#[derive(Debug)]
pub(crate) struct Ask {
    /// Checked, each one once, and in the order in which everybody takes them.
    pub(crate) names: Vec<Name>,
    pub(crate) ttl: Duration,
    /// For how long the holder may have them.
    pub(crate) at_most: Option<Duration>,
    /// Whether the queues of other processes count.
    pub(crate) fair: bool,
    /// Counted from `started`. `None`: a try.
    pub(crate) wait: Option<Duration>,
    pub(crate) started: Instant,
}

/// The way to a session: started by the first request, ended by `close` or when nobody can send any more.
pub(crate) struct Session {
    state: Mutex<State>,
}

enum State {
    /// What starts the thread.
    Idle(Box<dyn Fn() -> Result<Way, Error> + Send>),
    Running(Way),
    /// The other end of what is dropped when all is released.
    Closed(Option<watch::Receiver<()>>),
}

/// To the thread, and to the queues before it.
#[derive(Clone)]
struct Way {
    requests: mpsc::UnboundedSender<Request>,
    queues: Arc<Queues>,
}

impl Session {
    /// A session whose private connections are made like those of `pool`, hooks included.
    pub(crate) fn new<DB: LockDatabase>(
        pool: Pool<DB>,
        location: Arc<Location>,
        hand_off: HandOff,
        owner: Arc<str>,
        watched: Watched,
    ) -> Self {
        let start = move || core::start(&pool, &location, hand_off, &owner, &watched);
        Self { state: Mutex::new(State::Idle(Box::new(start))) }
    }

    /// Takes leases, all or none.
    pub(crate) async fn acquire(&self, ask: Ask) -> Result<Option<Vec<Hold>>, Error> {
        let Way { queues, requests } = self.way()?;
        let Ask { names, ttl, at_most, fair, wait, started } = ask;
        let claims = names.iter().map(|name| {
            let place = fair.then(|| queues.place().clone());
            let (secret, owner) = (queues.draw_secret()?, queues.owner());
            Ok(Claim { name: name.clone(), secret, owner, ttl, place })
        });
        let claims = claims.collect::<Result<Vec<_>, Error>>()?;
        let (answer, answered) = oneshot::channel();
        let number = queues.number();
        let waiting = Waiting { number, names, queues: &queues, answered };
        queues.enter(Acquire { number, claims, turns: Vec::new(), wait, at_most, started, answer });
        waiting.answer(requests, wait, started).await
    }

    /// Sends a request and waits for its answer.
    pub(crate) async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Request,
    ) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        let requests = self.way()?.requests;
        requests.send(request(answer)).map_err(|_| Error::Closed)?;
        let answer = answer_to(&requests, answered, ASK_LIMIT, Instant::now(), ("get an answer", None)).await;
        answer.unwrap_or(Err(Error::Closed))
    }

    fn way(&self) -> Result<Way, Error> {
        let mut state = self.lock();
        match &*state {
            State::Running(way) => Ok(way.clone()),
            State::Closed(_) => Err(Error::Closed),
            State::Idle(start) => {
                let way = start()?;
                *state = State::Running(way.clone());
                Ok(way)
            }
        }
    }

    /// Refuses requests from now on, and waits until what is held was released.
    pub(crate) async fn close(&self) {
        if let Some(mut closed) = self.begin_to_close() {
            // Whatever could not be released by then is free after its TTL.
            let _in_time = clock::timeout(CLOSE_LIMIT, closed.changed()).await;
        }
    }

    /// Whoever calls it first or later waits for the same end.
    fn begin_to_close(&self) -> Option<watch::Receiver<()>> {
        let mut state = self.lock();
        let closed = match &*state {
            State::Idle(_) => None,
            State::Running(Way { requests, .. }) => {
                let (done, closed) = watch::channel(());
                let _session_may_be_gone = requests.send(Request::Close { done });
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

/// A caller that waits for its leases. Dropping it leaves the queues; leases that came too late are dropped with the
/// answer, and so released.
struct Waiting<'a> {
    number: u64,
    names: Vec<Name>,
    queues: &'a Queues,
    answered: oneshot::Receiver<Result<Option<Vec<Hold>>, Error>>,
}

impl Waiting<'_> {
    /// The session answers when the wait is over, and a try soon.
    async fn answer(
        mut self,
        requests: mpsc::UnboundedSender<Request>,
        wait: Option<Duration>,
        started: Instant,
    ) -> Result<Option<Vec<Hold>>, Error> {
        let limit = wait.map_or(ASK_LIMIT, |wait| wait + FIRST_ANSWER);
        let requests = requests.downgrade();
        let action = (acquire::ACTION, self.names.first());
        let answer = answer_to(&requests, &mut self.answered, limit, started, action).await;
        answer.unwrap_or(Err(Error::Closed))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.answered.close();
        self.queues.leave(self.number, &self.names);
    }
}
