//! What a run comes to.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::history::{History, Outcome};
use super::nemesis::Fault;

#[derive(Debug, Clone, Default)]
pub(crate) struct Report {
    pub(crate) rounds: u64,
    pub(crate) time: Duration,
    /// Everything that clients asked for: locks, commits, releases.
    pub(crate) operations: u64,
    pub(crate) grants: u64,
    pub(crate) committed: u64,
    pub(crate) refused: u64,
    /// Commits whose outcome nobody was told, and how many of them were carried out.
    pub(crate) ambiguous: u64,
    pub(crate) ambiguous_kept: u64,
    /// Holders who were told that they have lost the lock.
    pub(crate) losses: u64,
    pub(crate) faults: BTreeMap<Fault, u64>,
    /// The longest time until somebody else had the lock of a holder that was killed.
    pub(crate) free_again: Duration,
}

impl Report {
    pub(crate) fn count(&mut self, history: &History) {
        let deeds = |outcome| {
            let count = history.deeds.iter().filter(|deed| deed.outcome == outcome).count();
            u64::try_from(count).unwrap()
        };
        self.grants = history.holds.len() as u64;
        self.losses = history.holds.iter().filter(|hold| hold.told.is_some()).count() as u64;
        self.committed = deeds(Outcome::Committed);
        self.refused = deeds(Outcome::Refused);
        self.ambiguous = deeds(Outcome::Unknown);
        let unknown: std::collections::BTreeSet<i64> = history
            .deeds
            .iter()
            .filter(|deed| deed.outcome == Outcome::Unknown)
            .filter_map(|deed| deed.value)
            .collect();
        self.ambiguous_kept = history.kept.iter().filter(|kept| unknown.contains(&kept.value)).count() as u64;
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.rounds += other.rounds;
        self.time += other.time;
        self.operations += other.operations;
        self.grants += other.grants;
        self.committed += other.committed;
        self.refused += other.refused;
        self.ambiguous += other.ambiguous;
        self.ambiguous_kept += other.ambiguous_kept;
        self.losses += other.losses;
        self.free_again = self.free_again.max(other.free_again);
        for (fault, times) in other.faults {
            *self.faults.entry(fault).or_default() += times;
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { rounds, time, operations, grants, committed, refused, losses, .. } = self;
        let Self { ambiguous, ambiguous_kept, faults, free_again, .. } = self;
        let injected: u64 = faults.values().sum();
        write!(
            formatter,
            "{rounds} rounds in {time:.0?}: {operations} operations, {grants} grants, {committed} commits, {refused} \
             refused, {ambiguous} ambiguous ({ambiguous_kept} of them with a write that was kept), {losses} losses \
             noticed, a dead holder's lock free again after {free_again:.2?} at most, no violations; {injected} faults:"
        )?;
        for (fault, times) in faults {
            write!(formatter, " {fault:?} {times}")?;
        }
        Ok(())
    }
}
