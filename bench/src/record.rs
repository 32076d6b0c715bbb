//! What the measured processes record.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::clock::Moment;

/// One acquisition. The time between `granted` and `releasing` lies within the time that the lock
/// is held. So two overlapping records for one name mean two holders at once.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(from = "Row", into = "Row")]
pub(crate) struct Record {
    pub(crate) process: u32,
    pub(crate) caller: u32,
    pub(crate) requested: Moment,
    pub(crate) granted: Moment,
    pub(crate) releasing: Moment,
    pub(crate) released: Moment,
    pub(crate) fencing_token: Option<i64>,
}

/// Short, because there are many.
type Row = (u32, u32, Moment, Moment, Moment, Moment, Option<i64>);

impl From<Row> for Record {
    fn from((process, caller, requested, granted, releasing, released, fencing_token): Row) -> Self {
        Self { process, caller, requested, granted, releasing, released, fencing_token }
    }
}

impl From<Record> for Row {
    fn from(record: Record) -> Self {
        let Record { process, caller, requested, granted, releasing, released, fencing_token } = record;
        (process, caller, requested, granted, releasing, released, fencing_token)
    }
}

/// All records of a process.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Log {
    pub(crate) records: Vec<Record>,
    /// When those callers requested that had not got the lock when the time was over.
    pub(crate) unfinished: Vec<Moment>,
    /// The errors, and how often each occurred.
    pub(crate) errors: BTreeMap<String, u64>,
}

impl Log {
    pub(crate) fn add(&mut self, other: Self) {
        self.records.extend(other.records);
        self.unfinished.extend(other.unfinished);
        for (error, count) in other.errors {
            *self.errors.entry(error).or_default() += count;
        }
    }

    /// Names of locks differ from run to run. Without this one error would be counted as many.
    pub(crate) fn add_error(&mut self, error: &anyhow::Error, name: &str) {
        let error = format!("{error:#}").replace(name, "…");
        let error = error.chars().take(200).collect();
        *self.errors.entry(error).or_default() += 1;
    }
}
