//! The results, as text and as JSON.

use std::fmt::Write;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;

use crate::contender::{Contender, System};
use crate::cost_report::CostReport;
use crate::machine::Machine;
use crate::network::{Accuracy, Delay};
use crate::ratios::Ratios;
use crate::scenario::{Kind, Names, Scenario};
use crate::server::Facts;
use crate::summary::Summary;

/// All results of a run.
#[derive(Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) servers: Vec<Facts>,
    pub(crate) seconds: f64,
    pub(crate) warm_up_seconds: f64,
    pub(crate) hold_seconds: f64,
    pub(crate) connections_per_process: u32,
    /// How accurate the delays of the network were. Empty: the callers connected to the servers
    /// directly.
    pub(crate) accuracy: Vec<Accuracy>,
    pub(crate) results: Vec<Entry>,
    pub(crate) ratios: Vec<Ratios>,
    #[serde(flatten)]
    pub(crate) costs: CostReport,
}

/// The result of one contender in one scenario.
#[derive(Serialize)]
pub(crate) struct Entry {
    pub(crate) scenario: Scenario,
    pub(crate) label: String,
    pub(crate) system: System,
    /// The delay of the network in each direction.
    #[serde(rename = "delay_seconds")]
    pub(crate) delay: Delay,
    pub(crate) contender: Contender,
    /// Acquisitions per second of each round, in order. In scenarios D and I the median of the
    /// wake-ups in microseconds.
    pub(crate) rounds: Vec<f64>,
    /// The median round. `None`: all rounds failed.
    pub(crate) summary: Option<Summary>,
    pub(crate) failure: Option<String>,
    /// How much of one core the proxy used that delays, at most. Near 1 the proxy was the limit.
    pub(crate) proxy_share: f64,
}

impl Entry {
    /// Whether the lock was exclusive and its tokens grew, as far as the records show.
    pub(crate) fn is_correct(&self) -> bool {
        !self.contender.is_a_lock() || self.summary.as_ref().is_some_and(Summary::is_correct)
    }
}

/// Returns the figure of each round, and the median round.
pub(crate) fn median_round(scenario: Scenario, mut rounds: Vec<Summary>) -> (Vec<f64>, Option<Summary>) {
    let figure = |summary: &Summary| match scenario.kind {
        kind if kind.is_wake_up() => summary.wait.p50,
        _ => summary.acquisitions_per_second,
    };
    let figures = rounds.iter().map(figure).collect();
    rounds.sort_by(|one, other| figure(one).total_cmp(&figure(other)));
    let middle = rounds.len().saturating_sub(1) / 2;
    (figures, rounds.into_iter().nth(middle))
}

impl Report {
    pub(crate) fn facts(&self, system: System) -> Option<&Facts> {
        self.servers.iter().find(|facts| facts.system == system)
    }

    fn name(&self, system: System) -> &str {
        self.facts(system).map_or("", |facts| &facts.name)
    }

    /// Whether the delay of the network belongs into the tables.
    pub(crate) fn has_delays(&self) -> bool {
        !self.accuracy.is_empty()
    }

    /// The report as text.
    pub(crate) fn text(&self, scenarios: &[Scenario]) -> String {
        let mut text = self.head();
        for scenario in scenarios {
            let _ = writeln!(text, "\n{}: {}\n{}", scenario.label(), scenario.title(), self.table(*scenario));
            self.write_errors(&mut text, *scenario);
        }
        if let Some(table) = Ratios::table(&self.ratios, |system| self.name(system)) {
            let _ = writeln!(text, "\nRatios in this run\n{table}");
        }
        self.costs.write(&mut text, |system| self.name(system));
        text
    }

    fn head(&self) -> String {
        let Machine { cores, processor, kernel, load_before, load_after, stolen, .. } = &self.machine;
        let mut text = format!(
            "{cores} cores ({processor}), {kernel}; load {load_before} before, {load_after} after, {:.1} % stolen by other machines\n\
             {} s per scenario after {} s of warm-up, lock held for {} s, pools of {} connections\n",
            stolen * 100.0,
            self.seconds,
            self.warm_up_seconds,
            self.hold_seconds,
            self.connections_per_process,
        );
        self.write_network(&mut text);
        for Facts { name, version, settings, durable, .. } in &self.servers {
            let settings: Vec<String> =
                settings.iter().map(|(setting, value)| format!("{setting}={value}")).collect();
            let verdict = if *durable { "a commit is on disk" } else { "NOT DURABLE: A COMMIT MAY BE LOST" };
            let _ = writeln!(text, "{name} {version}: {} ({verdict})", settings.join(", "));
        }
        if self.is_unequal() {
            text.push_str(UNEQUAL);
        }
        text
    }

    fn write_network(&self, text: &mut String) {
        if !self.has_delays() {
            text.push_str("network: no delay\n");
            return;
        }
        for Accuracy { delay, late } in &self.accuracy {
            let (delay, late, rarely) = (delay.text(), time(late.p50), time(late.p99));
            let _ = writeln!(text, "network: {delay} each way, and {late} (p50) or {rarely} (p99) more");
        }
        let share = self.results.iter().map(|entry| entry.proxy_share).fold(0.0, f64::max);
        let _ = writeln!(text, "network: the proxy that delays used up to {:.0} % of a core", share * 100.0);
    }

    /// Whether only some of the systems have a commit on disk when they answer.
    pub(crate) fn is_unequal(&self) -> bool {
        are_unequal(&self.servers)
    }

    fn durability(&self, entry: &Entry) -> &'static str {
        let durable = self.facts(entry.system).is_some_and(|facts| facts.durable);
        match (entry.contender.writes(entry.system), durable) {
            (false, _) => "nothing written",
            (true, true) => "on disk",
            (true, false) => "NOT DURABLE",
        }
    }

    fn table(&self, scenario: Scenario) -> Table {
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED);
        let head: &[&str] = match scenario.kind {
            Kind::A | Kind::H => &["", "", "pairs/s", "acquire p50", "p99", "max", "pair p50", "p99"],
            Kind::D | Kind::I => {
                &["", "", "handovers", "per second", "wake-up p50", "p99", "max", "without a grant"]
            }
            _ => &[
                "",
                "",
                "acquired/s",
                "holder changes/s",
                "wait p50",
                "p99",
                "max",
                "Jain",
                "Jain processes",
                "starved",
            ],
        };
        let mut header: Vec<&str> = head.to_vec();
        header.extend(["overlaps", "tokens", "errors", "durability"]);
        if self.has_delays() {
            header.insert(2, "each way");
        }
        let columns = header.len();
        table.set_header(header);
        for entry in self.results.iter().filter(|entry| entry.label == scenario.label()) {
            table.add_row(self.row(scenario, entry, columns));
        }
        for number in 2..columns {
            if let Some(column) = table.column_mut(number) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table
    }

    fn row(&self, scenario: Scenario, entry: &Entry, columns: usize) -> Vec<String> {
        let mut row = vec![self.name(entry.system).to_owned(), entry.contender.title().to_owned()];
        if self.has_delays() {
            row.push(entry.delay.text());
        }
        let Some(summary) = &entry.summary else {
            row.push("FAILED".to_owned());
            row.resize(columns, String::new());
            return row;
        };
        let wait = &summary.wait;
        match scenario.kind {
            Kind::A | Kind::H => row.extend([
                count(summary.acquisitions_per_second),
                time(wait.p50),
                time(wait.p99),
                time(wait.max),
                time(summary.pair.p50),
                time(summary.pair.p99),
            ]),
            Kind::D | Kind::I => {
                row.extend([
                    summary.acquisitions.to_string(),
                    count(summary.acquisitions_per_second),
                    time(wait.p50),
                    time(wait.p99),
                    time(wait.max),
                    summary.starved.to_string(),
                ]);
            }
            _ => row.extend([
                count(summary.acquisitions_per_second),
                count(summary.holder_changes_per_second),
                time(wait.p50),
                time(wait.p99),
                time(wait.max),
                format!("{:.3}", summary.jain_callers),
                format!("{:.3}", summary.jain_processes),
                summary.starved.to_string(),
            ]),
        }
        let is_checked = entry.contender.is_a_lock() && scenario.names() != Names::New;
        row.push(if is_checked { summary.overlaps.to_string() } else { "-".to_owned() });
        row.push(match summary.tokens_not_grown {
            _ if !is_checked => "-".to_owned(),
            None => "none".to_owned(),
            Some(0) => "grow".to_owned(),
            Some(number) => format!("{number} DID NOT GROW"),
        });
        row.push(summary.errors.values().sum::<u64>().to_string());
        row.push(self.durability(entry).to_owned());
        row
    }

    fn write_errors(&self, text: &mut String, scenario: Scenario) {
        for entry in self.results.iter().filter(|entry| entry.label == scenario.label()) {
            let mut of = format!("{:?} {}", entry.system, entry.contender.title());
            if self.has_delays() {
                let _ = write!(of, " {}", entry.delay.text());
            }
            if let Some(failure) = &entry.failure {
                let _ = writeln!(text, "  {of} failed: {failure}");
            }
            for (error, count) in entry.summary.iter().flat_map(|summary| &summary.errors) {
                let _ = writeln!(text, "  {of}: {count} x {error}");
            }
        }
    }
}

pub(crate) const UNEQUAL: &str = "\
    !!! NOT COMPARABLE: some of these systems have a commit on disk when they answer, and others may lose it.\n\
    !!! The figures compare these settings, not the locks.\n";

pub(crate) fn are_unequal(servers: &[Facts]) -> bool {
    servers.iter().any(|facts| facts.durable) && servers.iter().any(|facts| !facts.durable)
}

fn count(number: f64) -> String {
    if number < 100.0 { format!("{number:.1}") } else { format!("{number:.0}") }
}

/// Formats microseconds in a readable unit.
pub(crate) fn time(microseconds: f64) -> String {
    match microseconds {
        ..1_000.0 => format!("{microseconds:.0} us"),
        ..100_000.0 => format!("{:.1} ms", microseconds / 1e3),
        ..1_000_000.0 => format!("{:.0} ms", microseconds / 1e3),
        _ => format!("{:.1} s", microseconds / 1e6),
    }
}
