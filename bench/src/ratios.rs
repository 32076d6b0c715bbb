//! Ratios between figures of one run. They depend less on the machine than the figures.

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;

use crate::contender::{Contender, System};
use crate::network::Delay;
use crate::report::Entry;
use crate::summary::Summary;

/// The ratios of one contender. `None`: one of the two figures is not in the run.
#[derive(Serialize)]
pub(crate) struct Ratios {
    pub(crate) system: System,
    #[serde(rename = "delay_seconds")]
    pub(crate) delay: Delay,
    pub(crate) contender: Contender,
    /// New names and known names, one caller: the median time of a pair.
    h1_of_a1_pair_time: Option<f64>,
    /// New names and known names: pairs per second.
    h8_of_a8: Option<f64>,
    h64_of_a64: Option<f64>,
    /// This contender and another one of the same database, new names: pairs per second.
    h64_of_insert_delete: Option<f64>,
    h64_of_for_update: Option<f64>,
    /// This contender and Redis with a fencing token, known names: pairs per second.
    a1_of_redis: Option<f64>,
    a64_of_redis: Option<f64>,
}

type Column = (&'static str, fn(&Ratios) -> Option<f64>);

const COLUMNS: [Column; 7] = [
    ("pair time H1 : A1", |ratios| ratios.h1_of_a1_pair_time),
    ("pairs/s H8 : A8", |ratios| ratios.h8_of_a8),
    ("H64 : A64", |ratios| ratios.h64_of_a64),
    ("H64 : INSERT/DELETE", |ratios| ratios.h64_of_insert_delete),
    ("H64 : FOR UPDATE", |ratios| ratios.h64_of_for_update),
    ("A1 : Redis INCR", |ratios| ratios.a1_of_redis),
    ("A64 : Redis INCR", |ratios| ratios.a64_of_redis),
];

impl Ratios {
    /// The ratios of each contender that has some.
    pub(crate) fn of(entries: &[Entry]) -> Vec<Self> {
        let mut found: Vec<Self> = Vec::new();
        for Entry { system, delay, contender, .. } in entries {
            let is_new =
                |known: &Self| (known.system, known.delay, known.contender) != (*system, *delay, *contender);
            if found.iter().all(is_new) {
                found.push(Self::of_contender(entries, *system, *delay, *contender));
            }
        }
        found.retain(|ratios| COLUMNS.iter().any(|(_, ratio)| ratio(ratios).is_some()));
        found
    }

    fn of_contender(entries: &[Entry], system: System, delay: Delay, contender: Contender) -> Self {
        let figure = |label: &str, system, contender, figure: fn(&Summary) -> f64| {
            let is_wanted = |entry: &&Entry| {
                (entry.label.as_str(), entry.system, entry.delay, entry.contender)
                    == (label, system, delay, contender)
            };
            let summary = entries.iter().find(is_wanted)?.summary.as_ref()?;
            Some(figure(summary)).filter(|figure| *figure > 0.0)
        };
        let own = |label| figure(label, system, contender, |summary| summary.acquisitions_per_second);
        let own_time = |label| figure(label, system, contender, |summary| summary.pair.p50);
        let of_other = |label, other_system, other| {
            let is_other = (other_system, other) != (system, contender);
            let other = figure(label, other_system, other, |summary| summary.acquisitions_per_second);
            ratio(own(label), other).filter(|_ratio| is_other)
        };
        Self {
            system,
            delay,
            contender,
            h1_of_a1_pair_time: ratio(own_time("H1"), own_time("A1")),
            h8_of_a8: ratio(own("H8"), own("A8")),
            h64_of_a64: ratio(own("H64"), own("A64")),
            h64_of_insert_delete: of_other("H64", system, Contender::Naive),
            h64_of_for_update: of_other("H64", system, Contender::ForUpdate),
            a1_of_redis: of_other("A1", System::Redis, Contender::Token),
            a64_of_redis: of_other("A64", System::Redis, Contender::Token),
        }
    }

    /// `None`: there are no ratios.
    pub(crate) fn table<'a>(all: &[Self], name: impl Fn(System) -> &'a str) -> Option<Table> {
        let has_values = |(_, ratio): &&Column| all.iter().any(|ratios| ratio(ratios).is_some());
        let columns: Vec<&Column> = COLUMNS.iter().filter(has_values).collect();
        if columns.is_empty() {
            return None;
        }
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED);
        table.set_header(["", "", "each way"].into_iter().chain(columns.iter().map(|(title, _)| *title)));
        for ratios in all {
            let mut row = vec![
                name(ratios.system).to_owned(),
                ratios.contender.title().to_owned(),
                ratios.delay.text(),
            ];
            let text = |ratio: f64| format!("{ratio:.2}");
            row.extend(columns.iter().map(|(_, ratio)| ratio(ratios).map_or_else(String::new, text)));
            table.add_row(row);
        }
        for number in 2..columns.len() + 3 {
            if let Some(column) = table.column_mut(number) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        Some(table)
    }
}

fn ratio(one: Option<f64>, other: Option<f64>) -> Option<f64> {
    Some(one? / other?)
}
