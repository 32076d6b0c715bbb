//! The workload of one process: its callers acquire and release locks.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::clock::{after, now, until};
use crate::contender::{Caller, CallerGroup, Job};
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
            hold: job.hold,
            finish_limit: job.contender.finish_limit(),
        };
        tasks.spawn(caller_loop.run(caller, window));
    }
    let mut log = Log::default();
    while let Some(ended) = tasks.join_next().await {
        match ended {
            Ok(of_caller) => log.add(of_caller),
            Err(error) => log.add_error(&error.into(), ""),
        }
    }
    // A hang at the end does not affect the figures.
    let _ended_in_time = timeout(Duration::from_secs(5), group.end).await;
    log
}

struct CallerLoop {
    process: u32,
    number: u32,
    name: String,
    hold: Duration,
    finish_limit: Duration,
}

impl CallerLoop {
    async fn run(self, mut caller: Box<dyn Caller>, window: Window) -> Log {
        let mut log = Log::default();
        let mut requested = now();
        while now() < window.end {
            let limit = until(after(window.end, self.finish_limit));
            let fencing_token = match timeout(limit, caller.acquire()).await {
                Err(_elapsed) => {
                    log.unfinished.push(requested);
                    break;
                }
                Ok(Err(error)) => {
                    log.add_error(&error, &self.name);
                    sleep(PAUSE).await;
                    continue;
                }
                Ok(Ok(token)) => token,
            };
            let granted = now();
            if !self.hold.is_zero() {
                sleep(self.hold).await;
            }
            let releasing = now();
            if let Err(error) = caller.release().await {
                log.add_error(&error, &self.name);
            }
            let released = now();
            let Self { process, number, .. } = self;
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
            requested = now();
        }
        log
    }
}
