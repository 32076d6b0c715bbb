//! E: the cost of holding many leases in one process.

use std::time::Duration;

use anyhow::Context;
use lock_db::{Lease, Locks};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::{CostMeasurement, end, locks};
use crate::child::reply;
use crate::clock::now;
use crate::database::Database;
use crate::statistics::{DatabaseStatistics, StatisticsReader};
use crate::summary::to_f64;

/// The default of lock-db.
const TTL: Duration = Duration::from_secs(30);
const TASKS: u32 = 256;

/// The cost of holding leases.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct HeldLeases {
    pub(crate) leases: u32,
    pub(crate) ttl_seconds: f64,
    pub(crate) acquired_in_seconds: f64,
    pub(crate) seconds: f64,
    /// Processor time of the process that holds the leases, in percent of one core.
    pub(crate) processor_percent: f64,
    pub(crate) bytes_per_lease: f64,
    /// Round trips while the leases were held. `None`: there is no network.
    pub(crate) round_trips: Option<u64>,
    pub(crate) commits: u64,
    pub(crate) log_bytes: u64,
    /// All connections that were opened, including those of the pool.
    pub(crate) connections: Option<u64>,
    /// The number of leases that ended too early. Must be 0.
    pub(crate) lost: usize,
}

impl HeldLeases {
    /// The number of ticks. Each lease is renewed once per tick, which is a third of the TTL.
    pub(crate) fn ticks(&self) -> f64 {
        self.seconds / (self.ttl_seconds / 3.0)
    }
}

pub(super) async fn measure<DB: DatabaseStatistics>(measurement: &CostMeasurement) -> anyhow::Result<()> {
    let count = measurement.sizes.leases;
    let mut statistics = StatisticsReader::<DB>::start(&measurement.url).await?;
    let options = DB::for_measuring(DB::options(&measurement.url)?, measurement.port);
    let (locks, pool) = locks::<DB>(options).await?;
    // A first round allocates the memory of connections, statements and tasks. It is not counted
    // for the leases.
    drop(acquire(&locks, &format!("{}:before", measurement.prefix), TASKS * 4).await?);
    sleep(Duration::from_secs(1)).await;
    let memory_before = resident_bytes()?;
    let begin = now();
    let leases = acquire(&locks, &measurement.prefix, count).await?;
    let acquired_in_seconds = to_f64(now() - begin) / 1e9;
    let memory = resident_bytes()?.saturating_sub(memory_before);

    reply(&"holding")?;
    let (before, begin, processor) = (statistics.written().await?, now(), processor_seconds());
    sleep(measurement.sizes.hold).await;
    let (processor, seconds) = (processor_seconds() - processor, to_f64(now() - begin) / 1e9);
    let written = statistics.written().await?;
    reply(&HeldLeases {
        leases: count,
        ttl_seconds: TTL.as_secs_f64(),
        acquired_in_seconds,
        seconds,
        processor_percent: 100.0 * processor / seconds,
        bytes_per_lease: to_f64(memory) / f64::from(count),
        round_trips: None,
        commits: written.commits - before.commits,
        log_bytes: written.bytes - before.bytes,
        connections: None,
        lost: leases.iter().filter(|lease| !lease.is_held()).count(),
    })?;
    drop(leases);
    end(locks, pool).await
}

/// Acquires the leases with many tasks at once.
async fn acquire<DB: Database>(
    locks: &Locks<DB>,
    prefix: &str,
    count: u32,
) -> anyhow::Result<Vec<Lease<DB>>> {
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (locks, prefix) = (locks.clone(), prefix.to_owned());
        tasks.spawn(async move {
            let mut leases = Vec::new();
            for number in (task..count).step_by(TASKS as usize) {
                let lock = locks.insert_lock(format!("{prefix}:{number}")).ttl(TTL);
                leases.push(lock.wait(Duration::from_mins(2)).acquire().await?);
            }
            Ok::<_, lock_db::Error>(leases)
        });
    }
    let mut leases = Vec::with_capacity(count as usize);
    while let Some(ended) = tasks.join_next().await {
        leases.extend(ended??);
    }
    Ok(leases)
}

fn processor_seconds() -> f64 {
    Duration::try_from(clock_gettime(ClockId::ProcessCPUTime)).unwrap_or_default().as_secs_f64()
}

fn resident_bytes() -> anyhow::Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(kibibytes.context("the system does not report the memory of a process")?.parse::<u64>()? * 1024)
}
