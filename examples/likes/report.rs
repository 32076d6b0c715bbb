//! The result, as a table for people.

use std::time::Duration;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};

use crate::drive::Outcome;
use crate::service::Protection;
use crate::store::Comment;

/// One load under one protection, and the content of the tables after it.
pub(crate) struct Run {
    pub(crate) protection: Protection,
    pub(crate) requests: u64,
    pub(crate) outcome: Outcome,
    pub(crate) comment: Comment,
}

impl Run {
    /// How many of the likes that have a row are not in the count.
    pub(crate) fn lost_updates(&self) -> i64 {
        self.comment.likes - self.comment.like_count
    }

    /// Whether every request succeeded and was counted.
    pub(crate) fn is_right(&self) -> bool {
        self.lost_updates() == 0
            && self.outcome.failed == 0
            && u64::try_from(self.comment.like_count) == Ok(self.requests)
    }

    fn requests_per_second(&self) -> f64 {
        let requests = u32::try_from(self.requests).unwrap_or(u32::MAX);
        f64::from(requests) / self.outcome.elapsed.as_secs_f64()
    }

    fn latency(&self, quantile: f64) -> String {
        let latency = Duration::from_micros(self.outcome.latencies.value_at_quantile(quantile));
        format!("{:.1} ms", latency.as_secs_f64() * 1000.0)
    }
}

/// One column for each run.
pub(crate) fn table(runs: &[Run]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    let cells = |title: &str, value: &dyn Fn(&Run) -> String| -> Vec<String> {
        std::iter::once(title.to_owned()).chain(runs.iter().map(value)).collect()
    };
    table.set_header(cells("", &|run| run.protection.to_string()));
    let mut line = |title: &str, value: &dyn Fn(&Run) -> String| {
        table.add_row(cells(title, value));
    };
    line("requests", &|run| run.requests.to_string());
    line("rows in the like table", &|run| run.comment.likes.to_string());
    line("count in the comment table", &|run| run.comment.like_count.to_string());
    line("lost updates", &|run| run.lost_updates().to_string());
    line("failed requests", &|run| run.outcome.failed.to_string());
    line("time", &|run| format!("{:.2} s", run.outcome.elapsed.as_secs_f64()));
    line("requests a second", &|run| format!("{:.0}", run.requests_per_second()));
    line("half were answered within (p50)", &|run| run.latency(0.5));
    line("99 of 100 within (p99)", &|run| run.latency(0.99));
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// What the table means, one sentence for each run.
pub(crate) fn verdict(run: &Run) -> String {
    let Run { protection, requests, outcome, comment } = run;
    let result = match run.lost_updates() {
        _ if run.is_right() => format!("all {requests} likes were counted"),
        lost @ 1.. => format!("{lost} of {} likes were lost", comment.likes),
        _ => format!("{} of {requests} likes were counted", comment.like_count),
    };
    let failed = match &outcome.failure {
        None => String::new(),
        Some(failure) => format!("; {} requests failed, one of them with: {failure}", outcome.failed),
    };
    format!("{protection}: {result}{failed}")
}
