//! F: acquires and releases the same names repeatedly, to see whether anything grows.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use tokio::time::sleep;

use super::{CostMeasurement, LONG_TTL, end, locks};
use crate::clock::{after, nanoseconds, now};
use crate::statistics::{DatabaseStatistics, StatisticsReader, TableSize};
use crate::summary::{Distribution, distribution, to_f64};

const MANY_NAMES: u32 = 10_000;
const PARTS: u64 = 6;
/// The statistics of a connection are visible shortly after it has ended.
const SETTLED: Duration = Duration::from_millis(1500);

/// The result of acquiring and releasing for a while, one pair after the other.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Churn {
    pub(crate) names: u32,
    pub(crate) pairs: u64,
    /// The time of a pair of acquire and release in the first sixth.
    pub(crate) first: Distribution,
    /// The same in the last sixth.
    pub(crate) last: Distribution,
    pub(crate) before: TableSize,
    pub(crate) after: TableSize,
}

pub(super) async fn measure<DB: DatabaseStatistics>(
    measurement: &CostMeasurement,
) -> anyhow::Result<Vec<Churn>> {
    Ok(vec![on_names::<DB>(measurement, 1).await?, on_names::<DB>(measurement, MANY_NAMES).await?])
}

async fn on_names<DB: DatabaseStatistics>(
    measurement: &CostMeasurement,
    count: u32,
) -> anyhow::Result<Churn> {
    let mut statistics = StatisticsReader::<DB>::start(&measurement.url).await?;
    let names: Vec<String> =
        (0..count).map(|number| format!("{}:{count}:{number}", measurement.prefix)).collect();
    make_rows::<DB>(measurement, &names).await?;
    sleep(SETTLED).await;
    let before = statistics.table_size().await?;

    let (locks, pool) = locks::<DB>(DB::options(&measurement.url)?).await?;
    let (begin, duration) = (now(), measurement.sizes.churn);
    let part = (nanoseconds(duration) / PARTS).max(1);
    let (mut first, mut last, mut pairs) = (Vec::new(), Vec::new(), 0);
    for name in names.iter().cycle() {
        let requested = now();
        if requested >= after(begin, duration) {
            break;
        }
        locks.insert_lock(name).ttl(LONG_TTL).acquire().await?.release().await?;
        let took = now() - requested;
        pairs += 1;
        match (requested - begin) / part {
            0 => first.push(took),
            number if number >= PARTS - 1 => last.push(took),
            _ => {}
        }
    }
    end(locks, pool).await?;
    sleep(SETTLED).await;
    let after = statistics.table_size().await?;
    let (first, last) = (distribution(first.into_iter())?, distribution(last.into_iter())?);
    Ok(Churn { names: count, pairs, first, last, before, after })
}

/// Creates the rows with many tasks at once. The first use of a name is not measured.
async fn make_rows<DB: DatabaseStatistics>(
    measurement: &CostMeasurement,
    names: &[String],
) -> anyhow::Result<()> {
    const AT_ONCE: usize = 256;

    let (locks, pool) = locks::<DB>(DB::options(&measurement.url)?).await?;
    let mut tasks = JoinSet::new();
    for names in names.chunks(names.len().div_ceil(AT_ONCE)) {
        let (locks, names) = (locks.clone(), names.to_owned());
        tasks.spawn(async move {
            for name in names {
                locks.insert_lock(name).wait(Duration::from_mins(2)).acquire().await?.release().await?;
            }
            Ok::<_, lock_db::Error>(())
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    end(locks, pool).await
}

impl Churn {
    /// The median of the last sixth divided by the median of the first sixth.
    pub(crate) fn growth(&self) -> f64 {
        if self.first.p50 > 0.0 { self.last.p50 / self.first.p50 } else { 0.0 }
    }

    /// The share of updates that did not change the indexes, in percent.
    pub(crate) fn hot_percent(&self) -> Option<f64> {
        let updates = self.after.updates? - self.before.updates?;
        let hot = self.after.hot_updates? - self.before.hot_updates?;
        (updates > 0).then(|| 100.0 * to_f64(hot) / to_f64(updates))
    }
}
