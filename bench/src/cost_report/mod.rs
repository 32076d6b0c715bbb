//! Studies: measurements that take longer than a scenario, or count instead of time. They run lock-db
//! alone, in a process of its own.

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
use crate::statistics::DatabaseStatistics;

/// For what a process does before and after the measurement itself.
const SPARE: Duration = Duration::from_mins(5);
/// The size of a pool by sqlx's default.
const CONNECTIONS: u32 = 10;
/// Longer than any measurement, so nothing is renewed in between.
const LONG: Duration = Duration::from_hours(1);

/// The sizes of the studies.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Sizes {
    pub(crate) leases: u32,
    pub(crate) hold: Duration,
    pub(crate) churn: Duration,
    pub(crate) repeats: u32,
}

/// A measurement for one process.
#[derive(Serialize, Deserialize)]
pub(crate) struct CostMeasurement {
    kind: Kind,
    system: System,
    url: String,
    /// Of the proxy that counts.
    port: Option<u16>,
    /// Of all names.
    prefix: String,
    sizes: Sizes,
}

/// The results, one for each database.
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

    /// Runs a measurement on one database.
    pub(crate) async fn add(&mut self, kind: Kind, system: System, url: &str, sizes: Sizes) {
        let prefix = format!("lock-bench:{}:{kind:?}", std::process::id());
        let measurement = CostMeasurement { kind, system, url: url.to_owned(), port: None, prefix, sizes };
        if let Err(error) = self.try_add(measurement).await {
            self.failures.push(format!("{kind:?} {system:?}: {error:#}"));
        }
    }

    async fn try_add(&mut self, mut measurement: CostMeasurement) -> anyhow::Result<()> {
        let (system, sizes) = (measurement.system, measurement.sizes);
        match measurement.kind {
            Kind::E => {
                let proxy = measurement.proxy().await?;
                measurement.port = proxy.as_ref().map(|proxy| proxy.port);
                let mut process = Process::start(&Task::Cost(measurement)).await?;
                let _holding: String = process.receive(SPARE).await?;
                let before = proxy.as_ref().map(Proxy::round_trips);
                let mut held: HeldLeases = process.receive(sizes.hold + SPARE).await?;
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
                let costs: Vec<OperationCost> = measure(measurement, SPARE).await?;
                self.costs.extend(costs.into_iter().map(|cost| (system, cost)));
            }
        }
        Ok(())
    }
}

async fn measure<T: serde::de::DeserializeOwned>(
    measurement: CostMeasurement,
    takes: Duration,
) -> anyhow::Result<T> {
    let mut process = Process::start(&Task::Cost(measurement)).await?;
    let found = process.receive(takes + SPARE).await?;
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

    async fn proxy(&self) -> anyhow::Result<Option<Proxy>> {
        match self.system {
            System::Postgres => proxy::<Postgres>(&self.url).await,
            System::MySql => proxy::<MySql>(&self.url).await,
            System::Sqlite | System::Redis | System::ZooKeeper | System::Etcd => Ok(None),
        }
    }
}

/// A proxy in front of a server.
async fn proxy<DB: DatabaseStatistics>(url: &str) -> anyhow::Result<Option<Proxy>> {
    match DB::address(&DB::options(url)?) {
        Some((host, port)) => Ok(Some(Proxy::start(host, port).await?)),
        None => Ok(None),
    }
}

/// The pool of a service, but without the ping of sqlx's pools before each use, which is no cost of
/// a lock. The ping after each use can't be switched off.
async fn locks<DB: Database>(options: Options<DB>) -> anyhow::Result<(Locks<DB>, sqlx::Pool<DB>)> {
    let pool = pool_options(CONNECTIONS).test_before_acquire(false).connect_with(options).await?;
    let locks = Locks::new(pool.clone());
    locks.check().await?;
    Ok((locks, pool))
}

async fn end<DB: Database>(locks: Locks<DB>, pool: sqlx::Pool<DB>) -> anyhow::Result<()> {
    locks.close().await;
    timeout(Duration::from_secs(10), pool.close()).await.context("a pool that does not close")
}
