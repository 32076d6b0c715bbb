//! Studies: measurements that take longer than a scene, or count instead of time. They run lock-db
//! alone, in a process of its own.

mod churn;
mod costs;
mod leases;
mod report;

use std::time::Duration;

use anyhow::Context;
use lock_db::Locks;
use serde::{Deserialize, Serialize};
use sqlx::{MySql, Postgres, Sqlite};
use tokio::time::timeout;

pub(crate) use self::churn::Churn;
pub(crate) use self::costs::Cost;
pub(crate) use self::leases::Held;
use crate::child::{Task, answer};
use crate::contender::System;
use crate::database::{Database, Options, pool_options};
use crate::meter::Metered;
use crate::play::Process;
use crate::proxy::Proxy;
use crate::scene::Kind;

/// For what a process does before and after the study itself.
const SPARE: Duration = Duration::from_mins(5);
/// The size of a pool by sqlx's default.
const CONNECTIONS: u32 = 10;
/// Longer than any study, so nothing is renewed in between.
const LONG: Duration = Duration::from_hours(1);

/// The sizes of the studies.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Sizes {
    pub(crate) leases: u32,
    pub(crate) hold: Duration,
    pub(crate) churn: Duration,
    pub(crate) repeats: u32,
}

/// A study for one process.
#[derive(Serialize, Deserialize)]
pub(crate) struct Study {
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
pub(crate) struct Findings {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) leases: Vec<(System, Held)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) churn: Vec<(System, Churn)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) costs: Vec<(System, Cost)>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) failures: Vec<String>,
}

impl Findings {
    /// Whether nothing failed and no lease was lost.
    pub(crate) fn are_right(&self) -> bool {
        self.failures.is_empty() && self.leases.iter().all(|(_, held)| held.lost == 0)
    }

    /// Runs a study on one database.
    pub(crate) async fn add(&mut self, kind: Kind, system: System, url: &str, sizes: Sizes) {
        let prefix = format!("lock-bench:{}:{kind:?}", std::process::id());
        let study = Study { kind, system, url: url.to_owned(), port: None, prefix, sizes };
        if let Err(error) = self.try_add(study).await {
            self.failures.push(format!("{kind:?} {system:?}: {error:#}"));
        }
    }

    async fn try_add(&mut self, mut study: Study) -> anyhow::Result<()> {
        let (system, sizes) = (study.system, study.sizes);
        match study.kind {
            Kind::E => {
                let proxy = study.proxy().await?;
                study.port = proxy.as_ref().map(|proxy| proxy.port);
                let mut process = Process::start(&Task::Study(study)).await?;
                let _holding: String = process.hear(SPARE).await?;
                let before = proxy.as_ref().map(Proxy::round_trips);
                let mut held: Held = process.hear(sizes.hold + SPARE).await?;
                let after = proxy.as_ref().map(Proxy::round_trips);
                held.round_trips = after.zip(before).map(|(after, before)| after - before);
                held.connections = proxy.as_ref().map(Proxy::connections);
                process.end().await?;
                self.leases.push((system, held));
            }
            Kind::F => {
                let churn: Vec<Churn> = look(study, 2 * sizes.churn).await?;
                self.churn.extend(churn.into_iter().map(|churn| (system, churn)));
            }
            _ => {
                let costs: Vec<Cost> = look(study, SPARE).await?;
                self.costs.extend(costs.into_iter().map(|cost| (system, cost)));
            }
        }
        Ok(())
    }
}

async fn look<T: serde::de::DeserializeOwned>(study: Study, takes: Duration) -> anyhow::Result<T> {
    let mut process = Process::start(&Task::Study(study)).await?;
    let found = process.hear(takes + SPARE).await?;
    process.end().await?;
    Ok(found)
}

impl Study {
    /// Runs the study in this process.
    pub(crate) async fn carry_out(self) -> anyhow::Result<()> {
        match self.system {
            System::Postgres => Box::pin(self.on::<Postgres>()).await,
            System::MySql => Box::pin(self.on::<MySql>()).await,
            System::Sqlite => Box::pin(self.on::<Sqlite>()).await,
            other => anyhow::bail!("lock-db does not lock in {other:?}"),
        }
    }

    async fn on<DB: Metered>(self) -> anyhow::Result<()> {
        answer(&"ready")?;
        match self.kind {
            Kind::E => leases::hold::<DB>(&self).await,
            Kind::F => answer(&churn::churn::<DB>(&self).await?),
            _ => answer(&costs::count::<DB>(&self).await?),
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
async fn proxy<DB: Metered>(url: &str) -> anyhow::Result<Option<Proxy>> {
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

/// Without loss, for averages.
#[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
fn real(number: u64) -> f64 {
    number as f64
}
