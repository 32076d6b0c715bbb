//! G: the cost of each operation in the database. It is counted, not timed.

use std::time::Duration;

use lock_db::{Lease, Locks};
use serde::{Deserialize, Serialize};
use sqlx::Pool;
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::{CostMeasurement, LONG_TTL, end, locks, proxy};
use crate::proxy::Proxy;
use crate::statistics::{DatabaseStatistics, StatisticsReader, Written};
use crate::summary::to_f64;

const CALLERS: u32 = 64;
const RENEWED: u32 = 500;
/// A lease with this TTL is renewed every second.
const SHORT_TTL: Duration = Duration::from_secs(3);
const RENEWAL_TICKS: u32 = 10;

/// The average cost of one operation.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct OperationCost {
    pub(crate) operation: String,
    pub(crate) times: u32,
    /// `None`: there is no network.
    pub(crate) round_trips: Option<f64>,
    pub(crate) commits: f64,
    pub(crate) log_bytes: f64,
}

/// The locks and pool of one process, and what counts their work.
struct Counted<DB: DatabaseStatistics> {
    statistics: StatisticsReader<DB>,
    proxy: Option<Proxy>,
    locks: Locks<DB>,
    pool: Pool<DB>,
    prefix: String,
    costs: Vec<OperationCost>,
}

pub(super) async fn measure<DB: DatabaseStatistics>(
    measurement: &CostMeasurement,
) -> anyhow::Result<Vec<OperationCost>> {
    let statistics = StatisticsReader::<DB>::start(&measurement.url).await?;
    let proxy = proxy::<DB>(&measurement.url)?;
    let options = DB::for_measuring(DB::options(&measurement.url)?, proxy.as_ref().map(|proxy| proxy.port));
    let (locks, pool) = locks::<DB>(options).await?;
    let prefix = measurement.prefix.clone();
    let mut counted = Counted { statistics, proxy, locks, pool, prefix, costs: Vec::new() };
    // The first round only opens connections and prepares statements.
    let repeats = measurement.sizes.repeats;
    for times in [20, repeats] {
        counted.costs.clear();
        counted.one_caller(times).await?;
        counted.in_transactions(times).await?;
    }
    counted.many_callers(repeats / 10).await?;
    counted.renewal().await?;
    counted.between_processes(Duration::from_millis(200), (repeats / 50).max(1)).await?;
    counted.between_processes(Duration::from_secs(5), 2).await?;
    end(counted.locks, counted.pool).await?;
    Ok(counted.costs)
}

impl<DB: DatabaseStatistics> Counted<DB> {
    async fn read(&mut self) -> anyhow::Result<(u64, Written)> {
        let round_trips = self.proxy.as_ref().map_or(0, Proxy::round_trips);
        Ok((round_trips, self.statistics.written().await?))
    }

    async fn measure<T>(
        &mut self,
        operation: impl Into<String>,
        times: u32,
        work: impl Future<Output = anyhow::Result<T>>,
    ) -> anyhow::Result<T> {
        let (round_trips, before) = self.read().await?;
        let done = work.await?;
        let (round_trips_after, after) = self.read().await?;
        let each = |count: u64| to_f64(count) / f64::from(times);
        self.costs.push(OperationCost {
            operation: operation.into(),
            times,
            round_trips: self.proxy.as_ref().map(|_proxy| each(round_trips_after - round_trips)),
            commits: each(after.commits - before.commits),
            log_bytes: each(after.bytes - before.bytes),
        });
        Ok(done)
    }

    fn names(&self, kind: &str, count: u32) -> Vec<String> {
        (0..count).map(|number| format!("{}:{kind}:{count}:{number}", self.prefix)).collect()
    }

    /// One caller, free names.
    async fn one_caller(&mut self, times: u32) -> anyhow::Result<()> {
        let (locks, names) = (self.locks.clone(), self.names("lease", times));
        let leases = self.measure("acquire, first use of the name", times, acquire(&locks, &names)).await?;
        release(leases).await?;
        let leases = self.measure("acquire", times, acquire(&locks, &names)).await?;
        self.measure("release", times, release(leases)).await?;
        let leases = acquire(&locks, &names).await?;
        let guarded = async {
            for lease in &leases {
                lease.begin().await?.commit().await?;
            }
            Ok(())
        };
        self.measure("lease.begin, commit", times, guarded).await?;
        let released = async {
            for lease in leases {
                let transaction = lease.begin().await?;
                lease.commit_and_release(transaction).await?;
            }
            Ok(())
        };
        self.measure("lease.begin, commit_and_release", times, released).await
    }

    async fn in_transactions(&mut self, times: u32) -> anyhow::Result<()> {
        let (locks, pool) = (self.locks.clone(), self.pool.clone());
        let (rows, leases) = (self.names("row", times), self.names("lease", times));
        let first = async {
            for name in &rows {
                locks.row_lock(name).acquire().await?.commit().await?;
            }
            Ok(())
        };
        self.measure("row lock, first use of the name, commit", times, first).await?;
        let own = async {
            for name in &rows {
                locks.row_lock(name).acquire().await?.commit().await?;
            }
            Ok(())
        };
        self.measure("row lock, commit", times, own).await?;
        let bare = async {
            for _ in 0..times {
                pool.begin().await?.commit().await?;
            }
            Ok(())
        };
        self.measure("your transaction: BEGIN, COMMIT", times, bare).await?;
        let with_row = async {
            for name in &rows {
                let mut transaction = pool.begin().await?;
                locks.row_lock(name).acquire_in(&mut transaction).await?;
                transaction.commit().await?;
            }
            Ok(())
        };
        self.measure("the same with row_lock.acquire_in", times, with_row).await?;
        let with_lease = async {
            for name in &leases {
                let mut transaction = pool.begin().await?;
                locks.insert_lock(name).acquire_in(&mut transaction).await?;
                transaction.commit().await?;
            }
            Ok(())
        };
        self.measure("the same with insert_lock.acquire_in", times, with_lease).await
    }

    /// Many callers at once, which share statements and hand leases to each other.
    async fn many_callers(&mut self, rounds: u32) -> anyhow::Result<()> {
        let rounds = rounds.max(1);
        let one = vec![format!("{}:one", self.prefix); CALLERS as usize];
        for (names, on) in [(one, "one name"), (self.names("own", CALLERS), "names of their own")] {
            let operation = format!("acquire, release; {CALLERS} callers on {on}");
            let locks = self.locks.clone();
            self.measure(operation, CALLERS * rounds, async move {
                let mut tasks = JoinSet::new();
                for name in names {
                    let locks = locks.clone();
                    tasks.spawn(async move {
                        for _ in 0..rounds {
                            locks.insert_lock(&name).ttl(LONG_TTL).acquire().await?.release().await?;
                        }
                        Ok::<_, lock_db::Error>(())
                    });
                }
                while let Some(ended) = tasks.join_next().await {
                    ended??;
                }
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    async fn renewal(&mut self) -> anyhow::Result<()> {
        let locks = self.locks.clone();
        let mut tasks = JoinSet::new();
        for name in self.names("renewed", RENEWED) {
            let lock = locks.insert_lock(name).ttl(SHORT_TTL);
            // All at once: leases that are due at about the same time are renewed together.
            tasks.spawn(lock.acquire());
        }
        let mut leases = Vec::new();
        while let Some(ended) = tasks.join_next().await {
            leases.push(ended??);
        }
        // Until the leases are renewed together.
        sleep(SHORT_TTL).await;
        let operation = format!("renewal of {RENEWED} leases");
        let work = async {
            sleep(SHORT_TTL / 3 * RENEWAL_TICKS).await;
            Ok(())
        };
        self.measure(operation, RENEWAL_TICKS, work).await?;
        release(leases).await
    }

    /// From the first attempt of a waiter to its grant, including the release of the holder.
    async fn between_processes(&mut self, wait: Duration, times: u32) -> anyhow::Result<()> {
        // Another `Locks`. For the database this is another process.
        let (others, pool) = {
            let port = self.proxy.as_ref().map(|proxy| proxy.port);
            let options = (*self.pool.connect_options()).clone();
            locks::<DB>(DB::for_measuring(options, port)).await?
        };
        let name = format!("{}:between", self.prefix);
        others.insert_lock(&name).ttl(LONG_TTL).acquire().await?.release().await?;
        let mut sum = OperationCost {
            operation: format!("another process waits {} s, release, grant", wait.as_secs_f64()),
            times,
            round_trips: None,
            commits: 0.0,
            log_bytes: 0.0,
        };
        // The first round only prepares the statements.
        for number in 0..=times {
            let lease = self.locks.insert_lock(&name).ttl(LONG_TTL).acquire().await?;
            let waiting = others.insert_lock(&name).ttl(LONG_TTL).acquire();
            let granted = self
                .measure("", times, async {
                    let (granted, released) = tokio::join!(waiting, async {
                        sleep(wait).await;
                        lease.release().await
                    });
                    released?;
                    Ok(granted?)
                })
                .await?;
            granted.release().await?;
            if let (Some(one), 1..) = (self.costs.pop(), number) {
                sum.round_trips = one.round_trips.map(|trips| trips + sum.round_trips.unwrap_or_default());
                sum.commits += one.commits;
                sum.log_bytes += one.log_bytes;
            }
        }
        self.costs.push(sum);
        end(others, pool).await
    }
}

async fn acquire<DB: DatabaseStatistics>(
    locks: &Locks<DB>,
    names: &[String],
) -> anyhow::Result<Vec<Lease<DB>>> {
    let mut leases = Vec::with_capacity(names.len());
    for name in names {
        leases.push(locks.insert_lock(name).ttl(LONG_TTL).acquire().await?);
    }
    Ok(leases)
}

async fn release<DB: DatabaseStatistics>(leases: Vec<Lease<DB>>) -> anyhow::Result<()> {
    for lease in leases {
        lease.release().await?;
    }
    Ok(())
}
