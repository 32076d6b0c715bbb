//! The server sessions of connections that were given up.
//!
//! A server does not notice at once that a client no longer waits for an answer. While something
//! blocks the server, each connection that is given up would leave a session there. After the block
//! ends, that session would carry out its statement later than statements that were sent after it.
//! So the next connection ends it first, and sends nothing else until it is gone.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::database::Failure;
use crate::database::{Fault, LockDatabase};

/// How long a connection with other work waits for a session to end, and the pauses between two
/// checks.
const PATIENCE: Duration = Duration::from_millis(500);
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// The time between two attempts to end sessions when there is no other request.
const SHORTEST_REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(30);
/// The number of remembered sessions is capped. Each of them connected, and then fell silent before
/// it had ended the earlier ones.
const MOST: usize = 16;

/// Sessions by their numbers: see [`LockDatabase::prepare`].
#[derive(Debug, Default)]
pub(super) struct Earlier {
    /// The session of the current connection, or of the last one.
    current: Option<i64>,
    given_up: Vec<i64>,
    attempts: u32,
}

impl Earlier {
    /// Whether a session may still be carrying out its last statement.
    pub(super) fn is_some(&self) -> bool {
        !self.given_up.is_empty()
    }

    /// Returns the number of a new session. The connection before was lost.
    pub(super) fn next(&mut self) -> i64 {
        let number = any_number();
        self.continue_with(number);
        number
    }

    /// The session of the current connection.
    pub(super) fn current(&self) -> Option<i64> {
        self.current
    }

    /// The connection before was lost. `number` is the session of the current one.
    pub(super) fn continue_with(&mut self, number: i64) {
        self.mark_given_up();
        self.current = Some(number);
    }

    /// The connection was closed while nothing was in progress on it.
    pub(super) fn mark_closed(&mut self) {
        self.current = None;
    }

    /// The connection is gone, perhaps in the middle of a statement.
    pub(super) fn mark_given_up(&mut self) {
        self.given_up.extend(self.current.take());
        if self.given_up.len() > MOST {
            self.given_up.remove(0);
        }
    }

    /// The pause before the next attempt to end the sessions, if there is no other request. `None`:
    /// there are none.
    pub(super) fn pause(&self) -> Option<Duration> {
        let pause = SHORTEST_REST * 2_u32.saturating_pow(self.attempts.min(5));
        self.is_some().then_some(pause.min(LONGEST_REST))
    }

    /// No session was ended: the pause to the next attempt grows.
    pub(super) fn remain(&mut self) {
        self.attempts += 1;
    }

    /// Ends the sessions. `false`: one is still there.
    pub(super) async fn end<DB: LockDatabase>(
        &mut self,
        connection: &mut DB::Connection,
    ) -> Result<bool, Failure> {
        let (started, mut pause) = (Instant::now(), SHORTEST_PAUSE);
        while let Some(&number) = self.given_up.last() {
            match DB::end_session(connection, number).await.map_err(Failure::new::<DB>) {
                Ok(false) if started.elapsed() < PATIENCE => {
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    continue;
                }
                Ok(false) => return Ok(false),
                Ok(true) => {}
                Err(failure) => match failure.fault {
                    Fault::Disconnected => return Err(failure),
                    Fault::Passing | Fault::Busy => return Ok(false),
                    // The session may have another role than the current connection.
                    _ => tracing::debug!(error = %failure, "a session that was given up can't be ended"),
                },
            }
            self.given_up.pop();
        }
        self.attempts = 0;
        Ok(true)
    }
}

/// A random number for a new session.
pub(super) fn any_number() -> i64 {
    let number = getrandom::u64().unwrap_or_default() >> 1;
    i64::try_from(number).unwrap_or_default()
}
