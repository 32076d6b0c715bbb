//! The cost report: scenarios E, F and G. They measure lock-db only, in a process of its own. They
//! take longer than the other scenarios, or count instead of measuring time.

mod churn;
mod holding;
mod operations;
mod report;

use std::time::Duration;

use anyhow::Context;
use lock_db::Locks;
use serde::{Deserialize, Serialize};
use sqlx::{MySql, Postgres, Sqlite};
use tokio::time::timeout;

pub(crate) use self::churn::Churn;
pub(crate) use self::holding::HeldLeases;
pub(crate) use self::operations::OperationCost;
use crate::child::{Task, reply};
use crate::contender::System;
use crate::database::{Database, Options, pool_options};
use crate::proxy::Proxy;
use crate::runner::Process;
use crate::scenario::Kind;
use crate::server;
use crate::statistics::DatabaseStatistics;

/// Time for the work of a process before and after the measurement itself.
const MARGIN: Duration = Duration::from_mins(5);
/// The maximum size of a pool, as in sqlx's defaults.
const CONNECTIONS: u32 = 10;
/// A TTL for leases that are not renewed during the measurement.
const LONG_TTL: Duration = Duration::from_hours(1);

/// The sizes of the measurements.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Sizes {
    pub(crate) leases: u32,
    pub(crate) hold: Duration,
    pub(crate) churn: Duration,
    pub(crate) repeats: u32,
}

/// A measurement in one process.
#[derive(Serialize, Deserialize)]
pub(crate) struct CostMeasurement {
    kind: Kind,
    system: System,
    url: String,
    /// The port of the proxy that counts, if there is one.
    port: Option<u16>,
    /// The prefix of all lock names.
    prefix: String,
    sizes: Sizes,
}

/// The results of each database.
#[derive(Default, Serialize)]
pub(crate) struct CostReport {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) leases: Vec<(System, HeldLeases)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) churn: Vec<(System, Churn)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) costs: Vec<(System, OperationCost)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) failures: Vec<String>,
}

impl CostReport {
    /// Whether nothing failed and no lease was lost.
    pub(crate) fn is_correct(&self) -> bool {
        self.failures.is_empty() && self.leases.iter().all(|(_, held)| held.lost == 0)
    }

    /// Runs a measurement on one database and adds its result.
    pub(crate) async fn add(&mut self, kind: Kind, system: System, url: &str, sizes: Sizes) {
        let prefix = format!("{}{kind:?}", server::name_prefix());
        let measurement = CostMeasurement { kind, system, url: url.to_owned(), port: None, prefix, sizes };
        if let Err(error) = self.try_add(measurement).await {
            self.failures.push(format!("{kind:?} {system:?}: {error:#}"));
        }
    }

    async fn try_add(&mut self, mut measurement: CostMeasurement) -> anyhow::Result<()> {
        let (system, sizes) = (measurement.system, measurement.sizes);
        match measurement.kind {
            Kind::E => {
                let proxy = measurement.proxy()?;
                measurement.port = proxy.as_ref().map(|proxy| proxy.port);
                let mut process = Process::start(&Task::Cost(measurement)).await?;
                let _holding: String = process.receive(MARGIN).await?;
                let before = proxy.as_ref().map(Proxy::round_trips);
                let mut held: HeldLeases = process.receive(sizes.hold + MARGIN).await?;
                let after = proxy.as_ref().map(Proxy::round_trips);
                held.round_trips = after.zip(before).map(|(after, before)| after - before);
                held.connections = proxy.as_ref().map(Proxy::connections);
                process.end().await?;
                self.leases.push((system, held));
            }
            Kind::F => {
                let churn: Vec<Churn> = measure(measurement, 2 * sizes.churn).await?;
                self.churn.extend(churn.into_iter().map(|churn| (system, churn)));
            }
            _ => {
                let costs: Vec<OperationCost> = measure(measurement, MARGIN).await?;
                self.costs.extend(costs.into_iter().map(|cost| (system, cost)));
            }
        }
        Ok(())
    }
}

/// Runs a measurement that is expected to take the time `takes`.
async fn measure<T: serde::de::DeserializeOwned>(
    measurement: CostMeasurement,
    takes: Duration,
) -> anyhow::Result<T> {
    let mut process = Process::start(&Task::Cost(measurement)).await?;
    let found = process.receive(takes + MARGIN).await?;
    process.end().await?;
    Ok(found)
}

impl CostMeasurement {
    /// Runs the measurement in this process.
    pub(crate) async fn run(self) -> anyhow::Result<()> {
        match self.system {
            System::Postgres => Box::pin(self.run_on::<Postgres>()).await,
            System::MySql => Box::pin(self.run_on::<MySql>()).await,
            System::Sqlite => Box::pin(self.run_on::<Sqlite>()).await,
            other => anyhow::bail!("lock-db does not lock in {other:?}"),
        }
    }

    async fn run_on<DB: DatabaseStatistics>(self) -> anyhow::Result<()> {
        reply(&"ready")?;
        match self.kind {
            Kind::E => holding::measure::<DB>(&self).await,
            Kind::F => reply(&churn::measure::<DB>(&self).await?),
            _ => reply(&operations::measure::<DB>(&self).await?),
        }
    }

    fn proxy(&self) -> anyhow::Result<Option<Proxy>> {
        match self.system {
            System::Postgres => proxy::<Postgres>(&self.url),
            System::MySql => proxy::<MySql>(&self.url),
            System::Sqlite | System::Redis | System::ZooKeeper | System::Etcd => Ok(None),
        }
    }
}

/// Starts a proxy in front of the server. `None`: there is no network.
fn proxy<DB: DatabaseStatistics>(url: &str) -> anyhow::Result<Option<Proxy>> {
    match DB::address(&DB::options(url)?) {
        Some((host, port)) => Ok(Some(Proxy::start(host, port, Duration::ZERO)?)),
        None => Ok(None),
    }
}

/// A `Locks` and a pool as in a service. But the pool does not ping before each use, because that
/// is no cost of a lock. The ping after each use can't be disabled.
async fn locks<DB: Database>(options: Options<DB>) -> anyhow::Result<(Locks<DB>, sqlx::Pool<DB>)> {
    let pool = pool_options(CONNECTIONS).test_before_acquire(false).connect_with(options).await?;
    let locks = Locks::new(pool.clone());
    locks.check().await?;
    Ok((locks, pool))
}

async fn end<DB: Database>(locks: Locks<DB>, pool: sqlx::Pool<DB>) -> anyhow::Result<()> {
    locks.close().await;
    timeout(Duration::from_secs(10), pool.close()).await.context("a pool does not close")
}
