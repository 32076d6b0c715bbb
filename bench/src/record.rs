//! The records of the measured processes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::clock::Moment;

/// One acquisition. The lock is held at least from `granted` to `releasing`. So if two records of
/// one name overlap, there were two holders at once.
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

/// The serialized form. It is short, because there are many records.
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

/// The records of a process.
#[derive(Default, Serialize, Deserialize)]
pub(crate) struct Log {
    pub(crate) records: Vec<Record>,
    /// The request times of callers that did not have the lock at the end.
    pub(crate) unfinished: Vec<Moment>,
    /// The number of times that each error occurred.
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

    /// Counts an error. The text is stored without the name of the lock. Otherwise the same error
    /// with different names would be counted as different errors.
    pub(crate) fn add_error(&mut self, error: &anyhow::Error, name: &str) {
        let error = format!("{error:#}").replace(name, "…");
        let error = error.chars().take(200).collect();
        *self.errors.entry(error).or_default() += 1;
    }
}
