//! Computes figures from records.

use std::collections::BTreeMap;

use anyhow::Context;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::clock::Moment;
use crate::record::{Log, Record};
use crate::scenario::Names;

/// The measured period.
#[derive(Clone, Copy)]
pub(crate) struct Window {
    pub(crate) begin: Moment,
    pub(crate) end: Moment,
}

/// The figures of one contender in one scenario. Times are in microseconds.
#[derive(Clone, Serialize)]
pub(crate) struct Summary {
    pub(crate) acquisitions: u64,
    pub(crate) acquisitions_per_second: f64,
    /// From the request to the grant. In scenarios D and I from the holder's release to the waiter's
    /// grant.
    pub(crate) wait: Distribution,
    /// From the request to the end of the release.
    pub(crate) pair: Distribution,
    /// Jain's index: 1 if all callers got the lock equally often, 1/n if one caller always got it.
    pub(crate) jain_callers: f64,
    pub(crate) jain_processes: f64,
    /// Callers that never got the lock. In scenarios D and I releases without a grant after them.
    pub(crate) starved: usize,
    /// How often the next holder was another caller.
    pub(crate) holder_changes_per_second: f64,
    /// How often a caller had the lock before the previous holder began to release it. Must be 0,
    /// except for the floor. Not counted if every name is new.
    pub(crate) overlaps: u64,
    /// How often a token was not larger than the previous one. Must be 0. `None`: there are no
    /// tokens.
    pub(crate) tokens_not_grown: Option<u64>,
    pub(crate) errors: BTreeMap<String, u64>,
}

/// Durations in microseconds.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(crate) struct Distribution {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) max: f64,
    /// Pairs of quantile and value, for plots.
    pub(crate) quantiles: Vec<(f64, f64)>,
}

/// The callers of a scenario, and the names that they use.
#[derive(Clone, Copy)]
pub(crate) struct Contention {
    pub(crate) processes: u32,
    pub(crate) callers: u32,
    pub(crate) names: Names,
}

impl Contention {
    /// What stands for the name of a record. `None`: the name occurs only once.
    fn name_of(&self, record: &Record) -> Option<(u32, u32)> {
        match self.names {
            Names::One => Some((0, 0)),
            Names::PerCaller => Some((record.process, record.caller)),
            Names::PerCallerOfEachProcess => Some((0, record.caller)),
            Names::New => None,
        }
    }

    /// The number of acquisitions of each caller, and of each process.
    fn counts(&self, records: &[Record]) -> anyhow::Result<(Vec<u32>, Vec<u32>)> {
        let mut by_caller = vec![0_u32; self.processes as usize * self.callers as usize];
        let mut by_process = vec![0_u32; self.processes as usize];
        for record in records {
            let caller = record.process as usize * self.callers as usize + record.caller as usize;
            *by_caller.get_mut(caller).context("a caller that does not exist")? += 1;
            *by_process.get_mut(record.process as usize).context("a process that does not exist")? += 1;
        }
        Ok((by_caller, by_process))
    }
}

impl Summary {
    pub(crate) fn new(log: Log, contention: &Contention, window: Window) -> anyhow::Result<Self> {
        let Log { mut records, unfinished, errors } = log;
        records.sort_unstable_by_key(|record| record.granted);
        let (overlaps, tokens_not_grown) = check(&records, contention);
        records.retain(|record| (window.begin..window.end).contains(&record.granted));

        // Unfinished requests have waited at least this long. Without them a lock that starves
        // callers would look fast.
        let waits_of_unfinished = unfinished.iter().map(|requested| window.end.saturating_sub(*requested));
        let wait = distribution(
            records.iter().map(|record| record.granted - record.requested).chain(waits_of_unfinished),
        )?;
        let pair = distribution(records.iter().map(|record| record.released - record.requested))?;

        let (by_caller, by_process) = contention.counts(&records)?;
        let changes = if contention.names == Names::One {
            records
                .windows(2)
                .filter(|pair| (pair[0].process, pair[0].caller) != (pair[1].process, pair[1].caller))
                .count()
        } else {
            0
        };
        let seconds = to_f64(window.end - window.begin) / 1e9;
        Ok(Self {
            acquisitions: records.len() as u64,
            acquisitions_per_second: to_f64(records.len() as u64) / seconds,
            wait,
            pair,
            jain_callers: jain(&by_caller),
            jain_processes: jain(&by_process),
            starved: by_caller.iter().filter(|count| **count == 0).count(),
            holder_changes_per_second: to_f64(changes as u64) / seconds,
            overlaps,
            tokens_not_grown,
            errors,
        })
    }

    /// For scenarios D and I: the time from the release in one process to the grant in the other.
    pub(crate) fn of_handovers(log: Log, contention: &Contention, window: Window) -> anyhow::Result<Self> {
        let Log { mut records, errors, .. } = log;
        records.sort_unstable_by_key(|record| record.granted);
        let (overlaps, tokens_not_grown) = check(&records, contention);
        let (by_caller, by_process) = contention.counts(&records)?;
        let mut releases: BTreeMap<u32, Moment> = BTreeMap::new();
        let mut handovers = Vec::new();
        let is_measured = |releasing: Moment| (window.begin..window.end).contains(&releasing);
        for record in &records {
            let previous = releases.insert(record.caller, record.releasing);
            if let Some(releasing) = previous.filter(|releasing| is_measured(*releasing)) {
                handovers.push(record.granted.saturating_sub(releasing));
            }
        }
        let number = handovers.len() as u64;
        // These have taken at least this long.
        let unfinished: Vec<Moment> = releases.into_values().filter(|moment| is_measured(*moment)).collect();
        handovers.extend(unfinished.iter().map(|releasing| window.end - releasing));
        let wait = distribution(handovers.into_iter())?;
        Ok(Self {
            acquisitions: number,
            acquisitions_per_second: to_f64(number) / to_f64(window.end - window.begin) * 1e9,
            pair: wait.clone(),
            wait,
            jain_callers: jain(&by_caller),
            jain_processes: jain(&by_process),
            starved: unfinished.len(),
            holder_changes_per_second: 0.0,
            overlaps,
            tokens_not_grown,
            errors,
        })
    }

    /// Whether no two holders overlapped and all tokens grew.
    pub(crate) fn is_correct(&self) -> bool {
        self.overlaps == 0 && self.tokens_not_grown.unwrap_or_default() == 0
    }
}

/// Counts overlaps, and tokens that did not grow. The records must be sorted by the time of their
/// grant.
fn check(records: &[Record], contention: &Contention) -> (u64, Option<u64>) {
    let mut overlaps = 0;
    let mut not_grown = 0;
    let mut last_of_name: BTreeMap<(u32, u32), (Moment, Option<i64>)> = BTreeMap::new();
    for record in records {
        let Some(name) = contention.name_of(record) else { continue };
        if let Some((releasing, token)) = last_of_name.get(&name) {
            overlaps += u64::from(record.granted < *releasing);
            not_grown += u64::from(record.fencing_token <= *token);
        }
        let until = last_of_name.get(&name).map_or(0, |(until, _)| *until).max(record.releasing);
        last_of_name.insert(name, (until, record.fencing_token));
    }
    let has_tokens = !last_of_name.is_empty() && records.iter().any(|record| record.fencing_token.is_some());
    (overlaps, has_tokens.then_some(not_grown))
}

pub(crate) fn distribution(nanoseconds: impl Iterator<Item = u64>) -> anyhow::Result<Distribution> {
    let mut histogram = Histogram::<u64>::new(3)?;
    for value in nanoseconds {
        histogram.record(value)?;
    }
    Ok(distribution_of(&histogram))
}

/// From a histogram of nanoseconds.
pub(crate) fn distribution_of(histogram: &Histogram<u64>) -> Distribution {
    if histogram.is_empty() {
        return Distribution::default();
    }
    let at = |quantile: f64| to_f64(histogram.value_at_quantile(quantile)) / 1e3;
    // The steps get finer towards the slowest values, as long as there are values between them.
    let mut quantiles: Vec<(f64, f64)> = Vec::new();
    for step in 0_u32..200 {
        let quantile = 1.0 - 10_f64.powf(-f64::from(step) / 20.0);
        quantiles.push((quantile, at(quantile)));
        if (1.0 - quantile) * to_f64(histogram.len()) < 1.0 {
            break;
        }
    }
    Distribution { p50: at(0.5), p99: at(0.99), max: to_f64(histogram.max()) / 1e3, quantiles }
}

/// Jain's index of fairness.
fn jain(counts: &[u32]) -> f64 {
    let sum: f64 = counts.iter().copied().map(f64::from).sum();
    let squares: f64 = counts.iter().copied().map(|count| f64::from(count).powi(2)).sum();
    let number = to_f64(counts.len() as u64);
    if squares > 0.0 { sum * sum / (number * squares) } else { 0.0 }
}

/// Exact, because no count here needs more than 52 bits.
#[expect(clippy::cast_precision_loss, reason = "figures for people")]
pub(crate) fn to_f64(number: u64) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::{Contention, Summary, Window, check, jain};
    use crate::record::{Log, Record};
    use crate::scenario::Names;

    fn contention(names: Names) -> Contention {
        Contention { processes: 2, callers: 3, names }
    }

    fn record(caller: u32, granted: u64, releasing: u64, token: i64) -> Record {
        let released = releasing + 1;
        Record { process: 0, caller, requested: 0, granted, releasing, released, fencing_token: Some(token) }
    }

    #[test]
    fn finds_overlapping_holders() {
        let one = contention(Names::One);
        assert_eq!(check(&[record(0, 10, 20, 1), record(1, 20, 30, 2)], &one), (0, Some(0)));
        assert_eq!(check(&[record(0, 10, 20, 1), record(1, 19, 30, 2)], &one), (1, Some(0)));
        let own = contention(Names::PerCaller);
        assert_eq!(check(&[record(0, 10, 20, 1), record(1, 19, 30, 2)], &own), (0, Some(0)));
        // Also if another holder came and went in between.
        let inside = [record(0, 10, 50, 1), record(1, 20, 30, 2), record(2, 40, 60, 3)];
        assert_eq!(check(&inside, &one), (2, Some(0)));
        // Also if the other holder is in another process.
        let other = Record { process: 1, ..record(0, 19, 30, 2) };
        let per_pair = contention(Names::PerCallerOfEachProcess);
        assert_eq!(check(&[record(0, 10, 20, 1), other], &per_pair), (1, Some(0)));
        assert_eq!(check(&[record(1, 10, 20, 1), other], &per_pair), (0, Some(0)));
    }

    #[test]
    fn finds_tokens_that_do_not_grow() {
        let records = [record(0, 10, 20, 1), record(1, 20, 30, 1)];
        assert_eq!(check(&records, &contention(Names::One)), (0, Some(1)));
        // The tokens of different names do not depend on each other.
        assert_eq!(check(&records, &contention(Names::New)), (0, None));
    }

    #[test]
    fn measures_handovers_of_each_name() {
        let there = |record| Record { process: 1, ..record };
        let records = vec![
            record(0, 1_000, 10_000, 1),
            record(1, 2_000, 20_000, 1),
            there(record(0, 15_000, 30_000, 2)),
            there(record(1, 22_000, 60_000, 2)),
            // This one is late.
            record(0, 80_000, 90_000, 3),
            // The other process is not granted the second name again before the end.
        ];
        let log = Log { records, ..Log::default() };
        let window = Window { begin: 15_000, end: 85_000 };
        let per_pair = contention(Names::PerCallerOfEachProcess);
        let Ok(summary) = Summary::of_handovers(log, &per_pair, window) else {
            panic!("the records are valid")
        };
        // 20 to 22, 30 to 80, and 60 to the end.
        assert_eq!((summary.acquisitions, summary.starved), (2, 1));
        assert!((summary.wait.max - 50.0).abs() < 0.1);
        assert!((summary.wait.p50 - 25.0).abs() < 0.1);
    }

    #[test]
    fn fairness_ranges_from_one_nth_to_one() {
        assert!((jain(&[5, 5, 5]) - 1.0).abs() < 1e-9);
        assert!((jain(&[9, 0, 0]) - 1.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn counts_unfinished_requests() {
        let log = Log { records: vec![record(0, 10, 20, 1)], unfinished: vec![1_000], ..Log::default() };
        let contention = Contention { processes: 1, callers: 2, names: Names::One };
        let Ok(summary) = Summary::new(log, &contention, Window { begin: 0, end: 1_001_000 }) else {
            panic!("the records are valid")
        };
        assert_eq!(summary.starved, 1);
        assert!(summary.wait.max >= 999.0);
        assert_eq!(summary.acquisitions, 1);
    }
}
