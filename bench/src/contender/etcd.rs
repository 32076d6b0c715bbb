//! The lock API of etcd. Each caller has a lease of its own, because the lease is the owner. All
//! callers share the connection of the process.

use std::time::Duration;

use anyhow::Context;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use super::{Boxed, Caller, CallerGroup, Job};
use crate::etcd::Etcd;

const TTL_SECONDS: i64 = 30;
const KEEP_ALIVE: Duration = Duration::from_secs(10);

struct EtcdLock {
    etcd: Etcd,
    lease: i64,
    name: Vec<u8>,
    key: Option<Vec<u8>>,
}

impl Caller for EtcdLock {
    fn set_name(&mut self, name: &str) {
        self.name = name.as_bytes().to_vec();
    }

    fn acquire(&mut self) -> Boxed<'_, anyhow::Result<Option<i64>>> {
        Box::pin(async {
            let ownership = self.etcd.lock(&self.name, self.lease).await?;
            self.key = Some(ownership.key);
            Ok(Some(ownership.revision))
        })
    }

    fn release(&mut self) -> Boxed<'_, anyhow::Result<()>> {
        Box::pin(async { self.etcd.unlock(self.key.take().context("not held")?).await })
    }
}

async fn keep_alive(etcd: Etcd, leases: Vec<i64>) {
    let mut interval = interval(KEEP_ALIVE);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        // After an error the next attempt is early enough. If that fails too, the leases end, and
        // the overlaps show it.
        let _kept = etcd.keep_alive(&leases).await;
    }
}

pub(super) async fn connect(job: &Job) -> anyhow::Result<CallerGroup> {
    let etcd = Etcd::connect(&job.url).await?;
    let mut leases = Vec::new();
    let mut callers: Vec<Box<dyn Caller>> = Vec::new();
    for name in &job.names {
        let lease = etcd.grant_lease(TTL_SECONDS).await?;
        leases.push(lease);
        let (etcd, name) = (etcd.clone(), name.clone().into_bytes());
        callers.push(Box::new(EtcdLock { etcd, lease, name, key: None }));
    }
    let keeper = tokio::spawn(keep_alive(etcd.clone(), leases.clone()));
    let end = Box::pin(async move {
        keeper.abort();
        let revoke = |lease| {
            let etcd = etcd.clone();
            async move { etcd.revoke_lease(lease).await }
        };
        let mut revocations: JoinSet<_> = leases.into_iter().map(revoke).collect();
        while revocations.join_next().await.is_some() {}
    });
    Ok(CallerGroup { callers, end })
}
