//! Redis, by the crate rslock, as it comes: a random retry within 200 ms, no fencing token.

use std::time::Duration;

use anyhow::Context;
use rslock::{Lock, LockManager};

use super::{Boxed, Caller, Job, Team};

const TTL: Duration = Duration::from_secs(30);

struct Rslock {
    manager: LockManager,
    name: Vec<u8>,
    lock: Option<Lock>,
}

impl Caller for Rslock {
    fn acquire(&mut self) -> Boxed<'_, anyhow::Result<Option<i64>>> {
        Box::pin(async {
            self.lock = Some(self.manager.acquire_no_guard(self.name.as_slice(), TTL).await?);
            Ok(None)
        })
    }

    fn release(&mut self) -> Boxed<'_, anyhow::Result<()>> {
        Box::pin(async {
            let lock = self.lock.take().context("not held")?;
            self.manager.unlock(&lock).await;
            Ok(())
        })
    }
}

pub(super) async fn team(job: &Job) -> anyhow::Result<Team> {
    // rslock says nothing when it cannot connect: it tries for ever.
    redis::Client::open(job.url.as_str())?.get_multiplexed_async_connection().await?;
    let manager = LockManager::new(vec![job.url.as_str()]);
    let caller = |name: &String| -> Box<dyn Caller> {
        Box::new(Rslock { manager: manager.clone(), name: name.clone().into_bytes(), lock: None })
    };
    let callers = job.names.iter().map(caller).collect();
    Ok(Team { callers, end: Box::pin(async {}) })
}
