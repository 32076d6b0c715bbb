//! Waits for answers of the session. The session has time limits of its own, so a caller gives up
//! early only if the session's thread does not run.

use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::request::Request;
use crate::Error;
use crate::backstop::timeout_at;
use crate::clock::timeout;
use crate::error::Action;
use crate::name::Name;

/// How long the thread may take to show that it runs, on a very busy machine.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// A channel to a session, which may keep the session running or not.
pub(crate) trait RequestSender {
    /// `false`: the session is gone.
    fn send(&self, request: Request) -> bool;
}

impl RequestSender for mpsc::UnboundedSender<Request> {
    fn send(&self, request: Request) -> bool {
        Self::send(self, request).is_ok()
    }
}

impl RequestSender for mpsc::WeakUnboundedSender<Request> {
    fn send(&self, request: Request) -> bool {
        self.upgrade().is_some_and(|requests| requests.send(request).is_ok())
    }
}

/// Waits for the answer to a request. If it has not arrived `limit` after the start, and again each
/// time that `limit` has passed, this checks whether the session's thread runs at all. The thread
/// may be stopped by a debugger, or blocked by something that it calls, such as a `tracing`
/// subscriber. `None`: the session is gone.
pub(crate) async fn answer_to<T>(
    session: &impl RequestSender,
    answered: impl Future<Output = Result<Result<T, Error>, oneshot::error::RecvError>>,
    limit: Duration,
    started: Instant,
    (action, name): (Action, Option<&Name>),
) -> Option<Result<T, Error>> {
    let mut answered = std::pin::pin!(answered);
    let mut deadline = started + limit;
    loop {
        if let Ok(answer) = timeout_at(deadline, &mut answered).await {
            return answer.ok();
        }
        let (runs, is_running) = oneshot::channel();
        if !session.send(Request::Ping(runs)) {
            // Its thread has ended, perhaps right after it answered.
            let last = timeout(SIGN_OF_LIFE, &mut answered).await;
            return last.ok().and_then(Result::ok);
        }
        if timeout(SIGN_OF_LIFE, is_running).await.is_err() {
            let message = format!(
                "the thread of this `Locks` has not run for {SIGN_OF_LIFE:?}: it is stopped or blocked"
            );
            let name = name.map(Name::given);
            return Some(Err(Error::other(action, name, true, message)));
        }
        deadline = Instant::now() + limit;
    }
}
