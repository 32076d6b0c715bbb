//! Waiting for the session, which has bounds of its own; and for no longer when its thread does not run.

use std::io;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};

use super::request::Request;
use crate::Error;
use crate::backstop::timeout_at;
use crate::clock::timeout;
use crate::name::Name;

/// How long the thread may take to say that it runs, on a machine that is very busy.
const SIGN_OF_LIFE: Duration = Duration::from_secs(1);

/// The way to a session, which may keep it running or not.
pub(crate) trait Way {
    /// `false`: the session is gone.
    fn send(&self, request: Request) -> bool;
}

impl Way for mpsc::UnboundedSender<Request> {
    fn send(&self, request: Request) -> bool {
        Self::send(self, request).is_ok()
    }
}

impl Way for mpsc::WeakUnboundedSender<Request> {
    fn send(&self, request: Request) -> bool {
        self.upgrade().is_some_and(|requests| requests.send(request).is_ok())
    }
}

/// Waits for the answer to a request. When it has not come `limit` after the start, and again each time that this has passed, the session's thread is
/// asked whether it runs at all: it may be stopped by a debugger, or blocked by something that it calls, such as a subscriber of
/// `tracing`. `None`: the session is gone.
pub(crate) async fn answer_to<T>(
    session: &impl Way,
    answered: impl Future<Output = Result<Result<T, Error>, oneshot::error::RecvError>>,
    limit: Duration,
    started: Instant,
    (action, name): (&'static str, Option<&Name>),
) -> Option<Result<T, Error>> {
    let mut answered = std::pin::pin!(answered);
    let mut deadline = started + limit;
    loop {
        if let Ok(answer) = timeout_at(deadline, &mut answered).await {
            return answer.ok();
        }
        let (runs, is_running) = oneshot::channel();
        if session.send(Request::Answer(runs)) && timeout(SIGN_OF_LIFE, is_running).await.is_err() {
            let message = format!(
                "the thread of this `Locks` has not run for {SIGN_OF_LIFE:?}: it is stopped or blocked"
            );
            let source = sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, message));
            return Some(Err(Error::Database { action, name: name.map(Name::given), within: None, source }));
        }
        deadline = Instant::now() + limit;
    }
}
