//! The sessions of connections that were given up.
//!
//! A server does not notice at once that nobody waits for an answer any more. While something keeps it from answering, each connection
//! that is given up would leave a session there, and what that one carries out when the stall is over would come after what was asked
//! later. So the next connection ends it first, and sends nothing else until it is gone.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use crate::database::{Fault, LockDatabase};

/// How long an end is waited for, on a connection that has other things to do; and the pauses between two looks.
const PATIENCE: Duration = Duration::from_millis(500);
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);
/// Between two attempts to end what nothing else is sent for.
const SHORTEST_REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(30);
/// More of them are not known: each was connected, and then silent before it had ended those before.
const MOST: usize = 16;

/// By their numbers: see [`LockDatabase::prepare`].
#[derive(Debug, Default)]
pub(super) struct Earlier {
    /// Of the connection that is there, or was there last.
    current: Option<i64>,
    given_up: Vec<i64>,
    attempts: u32,
}

impl Earlier {
    /// Whether a session may still be doing what it was last asked for.
    pub(super) fn is_some(&self) -> bool {
        !self.given_up.is_empty()
    }

    /// The number of a new session. The one before was lost.
    pub(super) fn next(&mut self) -> i64 {
        let number = any_number();
        self.goes_on_with(number);
        number
    }

    /// Of the connection that is there.
    pub(super) fn current(&self) -> Option<i64> {
        self.current
    }

    /// The connection before was lost; this is the number of the present one.
    pub(super) fn goes_on_with(&mut self, number: i64) {
        self.is_given_up();
        self.current = Some(number);
    }

    /// The connection was closed while nothing was under way on it.
    pub(super) fn is_closed(&mut self) {
        self.current = None;
    }

    /// The connection is gone, perhaps in the middle of a statement.
    pub(super) fn is_given_up(&mut self) {
        self.given_up.extend(self.current.take());
        if self.given_up.len() > MOST {
            self.given_up.remove(0);
        }
    }

    /// Before the next attempt to end them, if nothing else is asked for. `None`: there is none.
    pub(super) fn pause(&self) -> Option<Duration> {
        let pause = SHORTEST_REST * 2_u32.saturating_pow(self.attempts.min(5));
        self.is_some().then_some(pause.min(LONGEST_REST))
    }

    /// None of them was ended: that is tried less and less often.
    pub(super) fn remain(&mut self) {
        self.attempts += 1;
    }

    /// Ends them. `false`: one is still there.
    pub(super) async fn end<DB: LockDatabase>(
        &mut self,
        connection: &mut DB::Connection,
    ) -> sqlx::Result<bool> {
        let (started, mut pause) = (Instant::now(), SHORTEST_PAUSE);
        while let Some(&number) = self.given_up.last() {
            match DB::end_session(connection, number).await {
                Ok(false) if started.elapsed() < PATIENCE => {
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    continue;
                }
                Ok(false) => return Ok(false),
                Ok(true) => {}
                Err(error) => match DB::classify(&error) {
                    Fault::Disconnected => return Err(error),
                    Fault::Passing | Fault::Busy => return Ok(false),
                    // Of another role than now, say.
                    _ => tracing::debug!(%error, "a session that was given up can't be ended"),
                },
            }
            self.given_up.pop();
        }
        self.attempts = 0;
        Ok(true)
    }
}

/// For a new session.
pub(super) fn any_number() -> i64 {
    let number = getrandom::u64().unwrap_or_default() >> 1;
    i64::try_from(number).unwrap_or_default()
}
