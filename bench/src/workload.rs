//! The workload of one process: its callers acquire and release locks.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::clock::{Moment, after, now, until};
use crate::contender::{Boxed, Caller, CallerGroup, Job};
use crate::record::{Log, Record};
use crate::summary::Window;

/// The pause after an error.
const PAUSE: Duration = Duration::from_millis(10);

/// Each caller acquires the lock, holds it and releases it, repeatedly, until the window ends.
pub(crate) async fn run(group: CallerGroup, job: &Job, window: Window) -> Log {
    let mut tasks = JoinSet::new();
    for (number, (caller, name)) in (0..).zip(group.callers.into_iter().zip(&job.names)) {
        let caller_loop = CallerLoop {
            process: job.process,
            number,
            name: name.clone(),
            new_names: job.new_names,
            hold: job.hold,
            finish_limit: job.contender.finish_limit(),
        };
        tasks.spawn(caller_loop.run(caller, window));
    }
    end(tasks, group.end).await
}

/// Collects the records of all callers, and closes what they share.
pub(crate) async fn end(mut tasks: JoinSet<Log>, end: Boxed<'static, ()>) -> Log {
    let mut log = Log::default();
    while let Some(ended) = tasks.join_next().await {
        match ended {
            Ok(of_caller) => log.add(of_caller),
            Err(error) => log.add_error(&error.into(), ""),
        }
    }
    // A hang at the end does not affect the figures.
    let _ended_in_time = timeout(Duration::from_secs(5), end).await;
    log
}

struct CallerLoop {
    process: u32,
    number: u32,
    name: String,
    /// Whether each acquisition has a new name. Then `name` is the prefix of the names.
    new_names: bool,
    hold: Duration,
    finish_limit: Duration,
}

impl CallerLoop {
    async fn run(self, mut caller: Box<dyn Caller>, window: Window) -> Log {
        let Self { process, number, name: own_name, new_names, hold, finish_limit } = self;
        let mut log = Log::default();
        let mut name = own_name.clone();
        let mut acquisitions = 0_u64;
        while now() < window.end {
            if new_names {
                name = format!("{own_name}:{acquisitions}");
                caller.set_name(&name);
                acquisitions += 1;
            }
            let requested = now();
            let request = Request { name: &name, end: window.end, limit: after(window.end, finish_limit) };
            let fencing_token = match request.acquire(caller.as_mut(), &mut log).await {
                Ended::Granted(token) => token,
                Ended::TooLate => {
                    log.unfinished.push(requested);
                    break;
                }
                Ended::Failed => break,
            };
            let granted = now();
            if !hold.is_zero() {
                sleep(hold).await;
            }
            let releasing = now();
            if let Err(error) = caller.release().await {
                log.add_error(&error, &name);
            }
            let released = now();
            log.records.push(Record {
                process,
                caller: number,
                requested,
                granted,
                releasing,
                released,
                fencing_token,
            });
            if granted >= window.end {
                log.unfinished.push(requested);
            }
        }
        log
    }
}

/// How a request ended.
pub(crate) enum Ended {
    /// With a grant, and the fencing token if the contender has one.
    Granted(Option<i64>),
    /// Without a grant until the limit.
    TooLate,
    /// With an error after the end.
    Failed,
}

/// A request for a lock.
pub(crate) struct Request<'a> {
    pub(crate) name: &'a str,
    /// After this moment an error ends the request.
    pub(crate) end: Moment,
    /// At this moment the request is given up.
    pub(crate) limit: Moment,
}

impl Request<'_> {
    /// Acquires the lock. Retries after an error.
    pub(crate) async fn acquire(&self, caller: &mut dyn Caller, log: &mut Log) -> Ended {
        loop {
            match timeout(until(self.limit), caller.acquire()).await {
                Ok(Ok(token)) => return Ended::Granted(token),
                Err(_elapsed) => return Ended::TooLate,
                Ok(Err(error)) => log.add_error(&error, self.name),
            }
            sleep(PAUSE).await;
            if now() >= self.end {
                return Ended::Failed;
            }
        }
    }
}
