//! The session of a `Locks`: a thread with its own small runtime and at most two private
//! connections. Every insert lock of the process is taken, renewed and released through it.
//!
//! Nothing here runs on a future that a caller may drop. A starved pool or a blocked runtime of the
//! application costs no lease. A guard that is dropped, on any thread, only has to send a message.

mod acquire;
mod actor;
mod answers;
mod connection;
mod deadline_timer;
mod held_lease;
mod hold_time;
mod hold_watch;
mod known_names;
mod lease_handle;
mod lease_state;
mod local_queue;
mod operate;
mod prune;
mod release;
mod renewal;
mod request;
mod retry;
mod row_requests;
mod snapshot_watch;
mod task_tracker;
mod thread;
mod vitals;
mod wakeup;

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use sqlx::Pool;
use tokio::sync::{mpsc, oneshot, watch};

pub(crate) use self::answers::answer_to;
pub(crate) use self::hold_watch::HoldWatch;
pub(crate) use self::lease_handle::{KeptByTransaction, LeaseHandle};
pub(crate) use self::lease_state::{CommitUnderWay, LeaseState};
pub(crate) use self::local_queue::LocalQueues;
pub(crate) use self::prune::{BY_CALL, BY_ITSELF, Pruning};
use self::request::Acquire;
pub(crate) use self::request::{AnswerSender, Request};
pub(crate) use self::vitals::Vitals;
use crate::Error;
use crate::clock;
use crate::database::{Claim, Location, LockDatabase};
use crate::error::Action;
use crate::name::Name;
use crate::options::{FIRST_ANSWER, HandOffLimits, Wait};
use crate::sync::{Mutex, MutexGuard};

/// How long `close` waits for the last releases.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// The time limit of most requests to the session. A session that is seen to be at work gets more
/// time.
pub(crate) const ASK_LIMIT: Duration = Duration::from_secs(5);

/// A request for several leases together.
#[derive(Debug)]
pub(crate) struct LeaseRequest {
    /// The names, checked, each one once, in the order that all requests use.
    pub(crate) names: Vec<Name>,
    pub(crate) ttl: Duration,
    /// How long the holder may have them.
    pub(crate) at_most: Option<Duration>,
    /// Whether the request uses the queue of other processes.
    pub(crate) fair: bool,
    /// Counted from `started`.
    pub(crate) wait: Wait,
    pub(crate) started: Instant,
}

/// The handle of a session. The first request starts the session. It ends with `close`, or when all
/// senders are gone.
pub(crate) struct Session {
    state: Mutex<SessionState>,
    vitals: Arc<Vitals>,
}

enum SessionState {
    /// Starts the thread.
    Idle(Box<dyn Fn() -> Result<SessionChannel, Error> + Send>),
    Running(SessionChannel),
    /// The sender of this channel is dropped when everything is released.
    Closed(Option<watch::Receiver<()>>),
}

/// The channel to the thread, and the local queues in front of it.
#[derive(Clone)]
struct SessionChannel {
    requests: mpsc::UnboundedSender<Request>,
    queues: Arc<LocalQueues>,
}

impl SessionChannel {
    /// Takes leases, all or none.
    async fn acquire(self, ask: LeaseRequest) -> Result<Option<Vec<LeaseHandle>>, Error> {
        let Self { queues, requests } = self;
        let LeaseRequest { names, ttl, at_most, fair, wait, started } = ask;
        let claims = names.iter().map(|name| {
            let entry = fair.then(|| queues.queue_secret().clone());
            let (secret, owner) = (queues.draw_secret()?, queues.owner());
            Ok(Claim { name: name.clone(), secret, owner, ttl, entry, makes_row: true })
        });
        let claims = claims.collect::<Result<Vec<_>, Error>>()?;
        let (answer, answered) = oneshot::channel();
        let number = queues.number();
        let waiting = PendingAcquire { number, names, queues: &queues, answered };
        queues.enter(Acquire { number, claims, permits: Vec::new(), wait, at_most, started, answer });
        waiting.answer(requests, wait, started).await
    }
}

impl Session {
    /// A session whose private connections are made like those of `pool`, hooks included.
    pub(crate) fn new<DB: LockDatabase>(
        pool: Pool<DB>,
        location: Arc<Location>,
        hand_off: HandOffLimits,
        owner: Arc<str>,
        watched: HoldWatch,
        pruning: Option<Pruning>,
    ) -> Self {
        let vitals = Vitals::new();
        let start = {
            let vitals = Arc::clone(&vitals);
            move || thread::start(&pool, &location, hand_off, &owner, &watched, pruning.as_ref(), &vitals)
        };
        Self { state: Mutex::new(SessionState::Idle(Box::new(start))), vitals }
    }

    /// Takes leases, all or none.
    pub(crate) async fn acquire(&self, ask: LeaseRequest) -> Result<Option<Vec<LeaseHandle>>, Error> {
        let _waits = self.vitals.wait();
        self.channel()?.acquire(ask).await
    }

    /// How it is doing, and who waits.
    pub(crate) fn vitals(&self) -> &Arc<Vitals> {
        &self.vitals
    }

    /// Sends a request and waits for its answer.
    pub(crate) async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Request,
    ) -> Result<T, Error> {
        let (answer, answered) = oneshot::channel();
        let requests = self.channel()?.requests;
        requests.send(request(answer)).map_err(|_| Error::Closed)?;
        let answer =
            answer_to(&requests, answered, ASK_LIMIT, Instant::now(), (Action::AskSession, None)).await;
        answer.unwrap_or(Err(Error::Closed))
    }

    fn channel(&self) -> Result<SessionChannel, Error> {
        let mut state = self.lock();
        match &*state {
            SessionState::Running(channel) => Ok(channel.clone()),
            SessionState::Closed(_) => Err(Error::Closed),
            SessionState::Idle(start) => {
                let channel = start()?;
                *state = SessionState::Running(channel.clone());
                Ok(channel)
            }
        }
    }

    /// Refuses requests from now on, and waits until everything that is held was released.
    pub(crate) async fn close(&self) {
        if let Some(mut closed) = self.begin_to_close() {
            // Leases that could not be released in time expire after their TTL.
            let _in_time = clock::timeout(CLOSE_LIMIT, closed.changed()).await;
        }
    }

    /// All calls wait for the same end, the first and later ones.
    fn begin_to_close(&self) -> Option<watch::Receiver<()>> {
        let mut state = self.lock();
        let closed = match &*state {
            SessionState::Idle(_) => None,
            SessionState::Running(SessionChannel { requests, .. }) => {
                let (done, closed) = watch::channel(());
                let _session_may_be_gone = requests.send(Request::Close { done });
                Some(closed)
            }
            SessionState::Closed(closed) => closed.clone(),
        };
        *state = SessionState::Closed(closed.clone());
        closed
    }

    pub(crate) fn is_closed(&self) -> bool {
        matches!(&*self.lock(), SessionState::Closed(_))
    }

    fn lock(&self) -> MutexGuard<'_, SessionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match &*self.lock() {
            SessionState::Idle(_) => "Session(idle)",
            SessionState::Running(_) => "Session(running)",
            SessionState::Closed(_) => "Session(closed)",
        })
    }
}

/// A caller that waits for its leases. Dropping it leaves the queues. Leases that arrive too late
/// are dropped with the answer, which releases them.
struct PendingAcquire<'a> {
    number: u64,
    names: Vec<Name>,
    queues: &'a LocalQueues,
    answered: oneshot::Receiver<Result<Option<Vec<LeaseHandle>>, Error>>,
}

impl PendingAcquire<'_> {
    /// The session answers when the wait is over. A try is answered soon.
    async fn answer(
        mut self,
        requests: mpsc::UnboundedSender<Request>,
        wait: Wait,
        started: Instant,
    ) -> Result<Option<Vec<LeaseHandle>>, Error> {
        let limit = wait.limit().map_or(ASK_LIMIT, |wait| wait + FIRST_ANSWER);
        let requests = requests.downgrade();
        let action = (acquire::ACTION, self.names.first());
        let answer = answer_to(&requests, &mut self.answered, limit, started, action).await;
        answer.unwrap_or(Err(Error::Closed))
    }
}

impl Drop for PendingAcquire<'_> {
    fn drop(&mut self) {
        self.answered.close();
        self.queues.leave(self.number, &self.names);
    }
}
