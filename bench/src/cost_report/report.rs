//! The cost report as text.

use std::fmt::Write;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};

use super::{Churn, CostReport, HeldLeases, OperationCost};
use crate::contender::System;
use crate::report::time;
use crate::statistics::TableSize;
use crate::summary::to_f64;

impl CostReport {
    /// Appends a table for each scenario. Each row begins with the name of the database.
    pub(crate) fn write<'a>(&self, text: &mut String, name: impl Fn(System) -> &'a str) {
        let mut write = |title: &str, head: &[&str], rows: Vec<(System, Vec<String>)>| {
            if !rows.is_empty() {
                let _ = writeln!(text, "\n{title}\n{}", table(head, rows, &name));
            }
        };
        write(
            "E: the cost of holding leases in one process",
            &[
                "leases",
                "acquired in",
                "held for",
                "round trips/tick",
                "commits/tick",
                "log bytes/s",
                "processor",
                "memory/lease",
                "connections",
                "lost",
            ],
            self.leases.iter().map(|(system, held)| (*system, row_of_leases(held))).collect(),
        );
        write(
            "F: acquire and release the same names repeatedly",
            &[
                "names",
                "pairs",
                "p50 first sixth",
                "last",
                "p99 first sixth",
                "last",
                "growth of p50",
                "table before",
                "after",
                "indexes before",
                "after",
                "dead before",
                "after",
                "HOT",
            ],
            self.churn.iter().map(|(system, churn)| (*system, row_of_churn(churn))).collect(),
        );
        write(
            "G: the cost of each operation",
            &["operation", "times", "round trips", "commits", "log bytes"],
            self.costs.iter().map(|(system, cost)| (*system, row_of_costs(cost))).collect(),
        );
        for failure in &self.failures {
            let _ = writeln!(text, "  FAILED: {failure}");
        }
    }
}

fn table<'a>(head: &[&str], rows: Vec<(System, Vec<String>)>, name: &impl Fn(System) -> &'a str) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header([""].iter().chain(head));
    for (system, row) in rows {
        table.add_row([name(system).to_owned()].into_iter().chain(row));
    }
    for number in 2..=head.len() {
        if let Some(column) = table.column_mut(number) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn row_of_leases(held: &HeldLeases) -> Vec<String> {
    let ticks = held.ticks();
    vec![
        held.leases.to_string(),
        format!("{:.1} s", held.acquired_in_seconds),
        format!("{:.0} s", held.seconds),
        or_dash(held.round_trips.map(|trips| format!("{:.1}", to_f64(trips) / ticks))),
        format!("{:.1}", to_f64(held.commits) / ticks),
        format!("{:.0}", to_f64(held.log_bytes) / held.seconds),
        format!("{:.2} %", held.processor_percent),
        format!("{:.0} B", held.bytes_per_lease),
        or_dash(held.connections.map(|connections| connections.to_string())),
        held.lost.to_string(),
    ]
}

fn row_of_churn(churn: &Churn) -> Vec<String> {
    let Churn { first, last, before, after, .. } = churn;
    let mut row = vec![churn.names.to_string(), churn.pairs.to_string()];
    row.extend([first.p50, last.p50, first.p99, last.p99].map(time));
    row.push(format!("{:.2}", churn.growth()));
    let kibibytes = |bytes: u64| format!("{} KiB", bytes / 1024);
    row.extend([before.table_bytes, after.table_bytes, before.index_bytes, after.index_bytes].map(kibibytes));
    let dead = |size: &TableSize| or_dash(size.dead.map(|dead| dead.to_string()));
    row.extend([dead(before), dead(after)]);
    row.push(or_dash(churn.hot_percent().map(|percent| format!("{percent:.0} %"))));
    row
}

fn row_of_costs(cost: &OperationCost) -> Vec<String> {
    vec![
        cost.operation.clone(),
        cost.times.to_string(),
        or_dash(cost.round_trips.map(|trips| format!("{trips:.2}"))),
        format!("{:.2}", cost.commits),
        format!("{:.0}", cost.log_bytes),
    ]
}

fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "-".to_owned())
}
