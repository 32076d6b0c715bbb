//! Taking a lease: the turn within the process, then the database, until the caller's wait is over.

use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::time::{sleep, timeout};

use super::core::{Core, Granted, deadline};
use super::release;
use super::request::Acquire;
use super::turns::Turn;
use crate::database::{Claim, Fault, Grant, LeaseKey, LockRow, RowKey};
use crate::error::{Failure, WaitingFor};
use crate::insert::Hold;
use crate::{Error, Kind};

/// The first and the longest pause between two looks at a lock that somebody else holds.
const SHORTEST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// How much longer than the wait an attempt may take that the database leaves without an answer.
const GRACE: Duration = Duration::from_secs(1);

const ACTION: &str = "acquire";

/// Answers an acquire or a try. When the caller has gone, whatever was reached is undone.
pub(super) async fn acquire(core: Rc<Core>, mut request: Acquire) {
    let result = {
        let mut attempt = Attempt::new(&core, &request);
        select! {
            biased;
            () = request.answer.closed() => return,
            () = core.closed() => Err(Error::Closed),
            result = attempt.run_in_time() => result,
        }
    };
    // An answer that comes too late is a dropped guard, which releases.
    let _ = request.answer.send(result);
}

struct Attempt {
    core: Rc<Core>,
    claim: Claim,
    wait: Option<Duration>,
    started: Instant,
    /// Whether a statement was sent whose outcome is not known.
    unsettled: bool,
    last_seen: Option<LockRow>,
    last_failure: Option<Failure>,
}

impl Attempt {
    fn new(core: &Rc<Core>, request: &Acquire) -> Self {
        let claim = Claim {
            name: Arc::clone(&request.name),
            secret: request.secret.clone(),
            owner: Arc::clone(&request.owner),
            ttl: request.ttl,
        };
        let (wait, started) = (request.wait, request.started);
        Self {
            core: Rc::clone(core),
            claim,
            wait,
            started,
            unsettled: false,
            last_seen: None,
            last_failure: None,
        }
    }

    /// Ends soon after the wait is over, also when the database does not answer at all.
    async fn run_in_time(&mut self) -> Result<Option<Hold>, Error> {
        let Some(wait) = self.wait else { return self.run().await };
        let limit = (wait + GRACE).saturating_sub(self.started.elapsed());
        match timeout(limit, self.run()).await {
            Ok(result) => result,
            Err(_elapsed) => Err(self.timed_out()),
        }
    }

    async fn run(&mut self) -> Result<Option<Hold>, Error> {
        let Some(turn) = self.turn().await? else {
            return Ok(None);
        };
        let Some(granted) = self.contend().await? else {
            return Ok(None);
        };
        match self.core.hold(granted, turn) {
            Some(hold) => {
                self.unsettled = false;
                Ok(Some(hold))
            }
            None => Err(Error::Closed),
        }
    }

    /// Waits for the callers of this process that came before.
    async fn turn(&mut self) -> Result<Option<Turn>, Error> {
        let (turns, name) = (&self.core.turns, &self.claim.name);
        if let Some(turn) = turns.try_enter(name) {
            return Ok(Some(turn));
        }
        let Some(left) = self.left() else { return Ok(None) };
        match timeout(left, turns.enter(name)).await {
            Ok(turn) => Ok(Some(turn)),
            Err(_elapsed) => Err(self.timed_out()),
        }
    }

    /// Asks the database until it grants the lease. `None`: a try, and it was not free.
    async fn contend(&mut self) -> Result<Option<Granted>, Error> {
        let mut pause = SHORTEST_PAUSE;
        let mut failures = 0_u32;
        loop {
            let held_for = match self.ask().await {
                Ok(Reply::Granted(granted)) => return Ok(Some(granted)),
                Ok(Reply::HeldFor(remaining)) => {
                    failures = 0;
                    self.last_failure = None;
                    remaining
                }
                Ok(Reply::WrongKind(found)) => {
                    let name = self.claim.name.to_string();
                    return Err(Error::WrongKind { name, wanted: Kind::Insert, found });
                }
                // Acquiring is idempotent on the secret, so an attempt with an unknown outcome is just made again.
                Err(failure) if failure.fault == Fault::Disconnected => {
                    failures += 1;
                    self.last_failure = Some(failure);
                    if failures == 1 {
                        continue;
                    }
                    if self.wait.is_none() {
                        return Err(self.timed_out());
                    }
                    LONGEST_PAUSE
                }
                Err(failure) if failure.is_contention() => SHORTEST_PAUSE,
                Err(failure) => return Err(failure.into_error(ACTION, Some(&self.claim.name))),
            };
            let Some(left) = self.left() else { return Ok(None) };
            if left.is_zero() {
                return Err(self.timed_out());
            }
            // Never later than the holder's deadline, and once more at our own.
            let jittered = jitter(pause);
            let until_free = if held_for.is_zero() { jittered } else { held_for };
            sleep(jittered.min(until_free).min(left)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// One attempt. After the first one it looks before it writes: a plain read costs the database next to nothing.
    async fn ask(&mut self) -> Result<Reply, Failure> {
        let core = Rc::clone(&self.core);
        let name = Arc::clone(&self.claim.name);
        if self.last_seen.is_some()
            && let Some(row) = core.lane.look(&name).await?
            && row.kind == Kind::Insert
            && !row.remaining().is_zero()
        {
            let remaining = row.remaining();
            self.last_seen = Some(row);
            return Ok(Reply::HeldFor(remaining));
        }
        // The second time with the row that the first time made.
        for _ in 0..2 {
            self.unsettled = true;
            let (grant, cluster, sent) = match core.lane.acquire(self.claim.clone()).await {
                Err(failure) if failure.fault != Fault::Disconnected => {
                    self.unsettled = false;
                    return Err(failure);
                }
                answer => answer?,
            };
            if let Some(grant) = grant {
                let Claim { name, secret, ttl, .. } = self.claim.clone();
                let Grant { id, fencing_token } = grant;
                // An answer that took longer than the lease lasts is worth nothing. It goes on to be released.
                if Instant::now() >= deadline(sent, ttl) {
                    return Ok(Reply::HeldFor(Duration::ZERO));
                }
                let key = LeaseKey { row: RowKey { name, id }, secret, cluster };
                return Ok(Reply::Granted(Granted { key, fencing_token, ttl, sent }));
            }
            self.unsettled = false;
            match core.lane.look(&name).await? {
                None => core.lane.create(&name, Kind::Insert).await?,
                Some(row) if row.kind != Kind::Insert => return Ok(Reply::WrongKind(row.kind)),
                Some(row) => {
                    let remaining = row.remaining();
                    self.last_seen = Some(row);
                    return Ok(Reply::HeldFor(remaining));
                }
            }
        }
        Ok(Reply::HeldFor(Duration::ZERO))
    }

    /// What is left of the wait; `None` for a try.
    fn left(&self) -> Option<Duration> {
        self.wait.map(|wait| wait.saturating_sub(self.started.elapsed()))
    }

    /// A database that was away to the end is worth more words than the wait.
    fn timed_out(&mut self) -> Error {
        let name = &self.claim.name;
        if let Some(failure) = self.last_failure.take() {
            return failure.into_error(ACTION, Some(name));
        }
        let held_by = self.last_seen.clone().map(|row| Box::new(row.into_info(name)));
        Error::Timeout {
            name: name.to_string(),
            waited: self.started.elapsed(),
            waiting_for: WaitingFor::Lock,
            held_by,
        }
    }
}

/// However the attempt ends, by an error or because the caller has gone: a lease that it may have got is given back.
impl Drop for Attempt {
    fn drop(&mut self) {
        if self.unsettled {
            release::undo(&self.core, &self.claim);
        }
    }
}

enum Reply {
    Granted(Granted),
    /// Somebody else has it, for so long at least; zero when that is not known.
    HeldFor(Duration),
    /// The name is used as something else.
    WrongKind(Kind),
}

/// Between half of it and all of it, so that waiters do not stay in step.
fn jitter(pause: Duration) -> Duration {
    let share = getrandom::u32().unwrap_or(u32::MAX);
    pause / 2 + (pause / 2).mul_f64(f64::from(share) / f64::from(u32::MAX))
}
