//! Removes rows that were not used for long: by a task of the session, and for `Locks::prune`.
//!
//! A walk reads the table in parts, by the primary key, and removes what is unused in each part. It
//! uses the renewal connection, so no acquire waits for it, and pauses after each statement. Each
//! statement is a transaction of its own.

use std::rc::Rc;
use std::time::{Duration, Instant};

use tokio::select;
use tokio::time::sleep;

use super::actor::Actor;
use super::connection::Worker;
use super::retry::{patiently, twice};
use super::{LeaseRequest, Request, Session};
use crate::Error;
use crate::clock;
use crate::database::{ExpiredQueue, Failure, Fault, PruneScope};
use crate::error::Action;
use crate::jitter::jitter;
use crate::name::{self, Name};
use crate::options::{DEFAULT_TTL, LONGEST, Wait};

/// The name of the lease of the task: one process prunes at a time. Its row shows who did last.
pub(crate) const BY_ITSELF: &str = "lock_db.prune_after";
/// The name of the lease of [`Locks::prune`](crate::Locks::prune). It is another one because the
/// task may take hours, for rows that are older.
pub(crate) const BY_CALL: &str = "lock_db.prune";

/// How much later than it is due a row may be removed: this part of the time that it has to be
/// unused, and not less than `SHORTEST_INTERVAL`.
const SHARE: u32 = 10;
const SHORTEST_INTERVAL: Duration = Duration::from_secs(15);
/// The first walk of a process begins within this time. Services are restarted more often than
/// every `prune_after / SHARE`.
const START_WITHIN: Duration = Duration::from_hours(1);

/// The pause after each statement of the task.
const PAUSE: Duration = Duration::from_secs(1);
/// The pause after each statement of a call is as long as the statement took, within these bounds.
/// On SQLite that includes the wait for other writers.
const SHORTEST_PAUSE: Duration = Duration::from_millis(5);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// After a failure that may pass, the task pauses for about this long. It ends the walk if that
/// many statements in a row fail.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(10);
const MOST_FAILURES: u32 = 5;

/// What the task of a session does.
#[derive(Debug, Clone)]
pub(crate) struct Pruning {
    pub(crate) lease: Name,
    pub(crate) scope: PruneScope,
}

impl Pruning {
    /// The time between the beginnings of two walks, which jitter shortens by up to half.
    fn interval(&self) -> Duration {
        (self.scope.older_than / SHARE).max(SHORTEST_INTERVAL)
    }
}

/// A walk through the table.
#[derive(Debug)]
pub(crate) struct Walk {
    /// The rows up to this id were read.
    after: i64,
    /// Rows that were found to be unused, and not removed yet.
    unused: Vec<i64>,
    queues: Vec<ExpiredQueue>,
    removed: u64,
    is_over: bool,
}

impl Walk {
    fn new() -> Self {
        Self { after: i64::MIN, unused: Vec::new(), queues: Vec::new(), removed: 0, is_over: false }
    }
}

/// The lease of a pruner. It ends with the walk, so it counts as limited: no report says that it is
/// held for long.
fn lease(name: &Name, wait: Wait) -> LeaseRequest {
    LeaseRequest {
        names: vec![name.clone()],
        ttl: DEFAULT_TTL,
        at_most: Some(LONGEST),
        fair: true,
        wait,
        started: Instant::now(),
    }
}

impl Session {
    /// Removes all rows of the scope while it has the lease of this name. Dropping the future ends
    /// the walk after the statement that is being carried out.
    pub(crate) async fn prune(&self, name: &Name, scope: PruneScope, wait: Wait) -> Result<u64, Error> {
        let lease = self.acquire(lease(name, wait)).await?;
        let mut walk = Walk::new();
        while !walk.is_over {
            let asked = Instant::now();
            let scope = scope.clone();
            walk = self.ask(|answer| Request::Prune { scope, walk, answer }).await?;
            clock::sleep(asked.elapsed().clamp(SHORTEST_PAUSE, LONGEST_PAUSE)).await;
        }
        for lease in lease.into_iter().flatten() {
            // If it is lost, another process has it.
            let _lost = lease.release().await;
        }
        Ok(walk.removed)
    }
}

impl Actor {
    /// One statement of a walk that a caller waits for.
    pub(super) async fn prune(&self, scope: &PruneScope, walk: Walk) -> Result<Walk, Error> {
        let mut walk = walk;
        let made = self.step(scope, &mut walk, true).await;
        made.map_err(|failure| failure.into_error(Action::Prune, None))?;
        Ok(walk)
    }

    async fn step(&self, scope: &PruneScope, walk: &mut Walk, is_patient: bool) -> Result<(), Failure> {
        if let Some(queue) = walk.queues.pop() {
            let ExpiredQueue { id, name, waiters } = queue;
            let Ok(name) = name::check("", &name) else { return Ok(()) };
            let emptied = async |worker: &Worker| worker.set_waiters(&name, &waiters, String::new()).await;
            if self.on_either(is_patient, emptied).await? {
                walk.unused.push(id);
            }
        } else if walk.unused.is_empty() {
            let after = walk.after;
            let part = async |worker: &Worker| worker.read_part(scope.clone(), after).await;
            let part = self.on_either(is_patient, part).await?;
            walk.is_over = part.last.is_none();
            walk.after = part.last.unwrap_or(after);
            (walk.unused, walk.queues) = (part.unused, part.queues);
        } else {
            let kept = walk.unused.len().saturating_sub(self.renewals.removed_at_once());
            let ids = walk.unused.get(kept..).unwrap_or_default();
            let removed = async |worker: &Worker| worker.remove_rows(scope.clone(), ids.to_vec()).await;
            walk.removed += self.on_either(is_patient, removed).await?;
            walk.unused.truncate(kept);
        }
        Ok(())
    }

    /// Uses the renewal connection, or the other one if it can't be had.
    async fn on_either<T>(
        &self,
        is_patient: bool,
        operation: impl AsyncFn(&Worker) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let asked = async || match twice(async || operation(&self.renewals).await).await {
            Err(failure) if failure.fault == Fault::Disconnected => {
                twice(async || operation(&self.worker).await).await
            }
            answer => answer,
        };
        if is_patient { patiently(asked).await } else { asked().await }
    }
}

/// What comes of an attempt to prune.
enum Round {
    /// All of the table was read, or the session is not needed any more.
    Done,
    /// Another process prunes, or began to prune so long ago.
    ByOther(Duration),
    Failed(Failure),
    /// The table can't be used at present.
    NotNow,
}

/// Prunes from time to time, as long as the session runs. A session with `prune_after(None)` never
/// does.
pub(super) async fn watch(actor: Rc<Actor>, pruning: Option<Pruning>) {
    let Some(pruning) = pruning else { return };
    let interval = pruning.interval();
    let mut pause = jitter(interval.min(START_WITHIN));
    loop {
        select! {
            () = actor.closed() => return,
            () = sleep(pause) => {}
        }
        let started = Instant::now();
        let round = select! {
            () = actor.closed() => return,
            round = round(&actor, &pruning) => round,
        };
        pause = jitter(interval);
        match round {
            Round::Done => pause = pause.saturating_sub(started.elapsed()),
            Round::ByOther(since) => pause = pause.saturating_sub(since),
            Round::NotNow => {}
            Round::Failed(failure) if failure.fault == Fault::Refused => {
                tracing::warn!(
                    error = %failure,
                    "rows that were not used for long can't be removed, and stay in `distributed_lock`: grant DELETE on it, \
                     or set `LocksBuilder::prune_after(None)`"
                );
                return;
            }
            Round::Failed(failure) => {
                tracing::debug!(error = %failure, "rows that were not used for long were not removed yet");
            }
        }
    }
}

async fn round(actor: &Rc<Actor>, pruning: &Pruning) -> Round {
    let Pruning { lease: name, scope } = pruning;
    let Ok(row) = twice(async || actor.worker.read(name).await).await else { return Round::NotNow };
    // One walk in each interval is enough for all processes.
    if let Some(row) = row
        && let Ok(since) = u64::try_from(row.now().saturating_sub(row.acquired)).map(Duration::from_micros)
        && row.fencing_token > 0
        && since < pruning.interval() / 2
    {
        return Round::ByOther(since);
    }
    let Some(session) = actor.channel() else { return Round::Done };
    let Ok(taken) = session.acquire(lease(name, Wait::Try)).await else { return Round::NotNow };
    // Released when it is dropped.
    let Some([lease]) = taken.as_deref() else { return Round::ByOther(Duration::ZERO) };
    let (mut walk, mut failures) = (Walk::new(), 0);
    while !walk.is_over && !actor.is_forgotten() && lease.lease.loss().is_none() {
        let mut pause = PAUSE;
        match actor.step(scope, &mut walk, false).await {
            Ok(()) => failures = 0,
            Err(failure) if failure.passes() && failures < MOST_FAILURES => {
                failures += 1;
                pause = jitter(PAUSE_AFTER_FAILURE);
            }
            Err(failure) => return Round::Failed(failure),
        }
        sleep(pause).await;
    }
    tracing::debug!(rows = walk.removed, "rows that were not used for long were removed");
    Round::Done
}
