//! Plots: throughput by number of callers, and the distribution of the waits.

use std::ops::Range;
use std::path::Path;

use anyhow::anyhow;
use plotters::coord::ranged1d::{AsRangedCoord, ValueFormatter};
use plotters::prelude::*;

use crate::network::Delay;
use crate::report::{Entry, Report};
use crate::scenario::{Kind, Scenario};
use crate::server::Facts;
use crate::summary::Summary;

const SIZE: (i32, i32) = (1180, 600);
/// The width of the legend to the right of the chart.
const LEGEND: i32 = 260;
const COLOURS: [RGBColor; 10] = [
    RGBColor(213, 94, 0),
    RGBColor(0, 114, 178),
    RGBColor(120, 120, 120),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
    RGBColor(148, 0, 60),
    RGBColor(150, 120, 20),
];

struct Line {
    title: String,
    points: Vec<(f64, f64)>,
}

/// Draws one plot per database, scenario and delay, and plots over the delay. Every plot also shows
/// the systems that are not databases.
pub(crate) fn draw(report: &Report, scenarios: &[Scenario], folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    let no_database = !report.servers.iter().any(|facts| facts.system.is_database());
    for facts in report.servers.iter().filter(|facts| no_database || facts.system.is_database()) {
        let is_own = |entry: &&Entry| entry.system == facts.system;
        let delays = delays(report.results.iter().filter(is_own));
        for delay in &delays {
            // SQLite has no delay, and is compared with the others on loopback.
            let of_others = Delay(Some(delay.0.unwrap_or_default()));
            let belongs = |entry: &&Entry| {
                let is_other = !entry.system.is_database() && entry.delay == of_others;
                is_other || (is_own(entry) && entry.delay == *delay)
            };
            let entries: Vec<&Entry> = report.results.iter().filter(belongs).collect();
            draw_delay(report, scenarios, facts, &entries, *delay, folder)?;
        }
        if delays.len() > 1 {
            let belongs = |entry: &&Entry| is_own(entry) || !entry.system.is_database();
            let entries: Vec<&Entry> = report.results.iter().filter(belongs).collect();
            draw_network(report, scenarios, facts, &entries, folder)?;
        }
    }
    Ok(())
}

const WARNING: &str = " - NOT COMPARABLE: durability differs";

/// The plots of one delay.
fn draw_delay(
    report: &Report,
    scenarios: &[Scenario],
    facts: &Facts,
    entries: &[&Entry],
    delay: Delay,
    folder: &Path,
) -> anyhow::Result<()> {
    let name = facts.name.to_lowercase();
    let (mut remark, mut suffix) = (String::new(), String::new());
    if delay.0.is_some_and(|delay| !delay.is_zero()) {
        remark = format!(", {} each way", delay.text());
        suffix = format!("-{}", delay.text().replace(' ', ""));
    }
    if report.is_unequal() {
        remark.push_str(WARNING);
    }
    for kind in [Kind::A, Kind::B, Kind::H] {
        let lines = throughput(report, entries, kind);
        let shows = match kind {
            Kind::A => "pairs of acquire and release, free names",
            Kind::H => "pairs of acquire and release, every name is new",
            _ => "acquisitions of one name by one process",
        };
        let title = format!("{}: {shows}{remark}", facts.name);
        let file = folder.join(format!("throughput-{name}-{kind:?}{suffix}.svg"));
        let width = range(&lines, |point| point.0).log_scale();
        chart(&file, &title, ("callers", "per second"), width, &lines, |callers| format!("{callers:.0}"))?;
    }
    for scenario in scenarios {
        let lines = waits(report, entries, *scenario);
        let title = format!("{}: wait, {}{remark}", facts.name, scenario.title());
        let file = folder.join(format!("wait-{name}-{}{suffix}.svg", scenario.label()));
        let width = range(&lines, |point| point.0).log_scale();
        chart(&file, &title, ("percentile", "microseconds"), width, &lines, percentile)?;
    }
    Ok(())
}

/// The plots over the delay, for 64 callers: pairs per second, and the median time of a pair.
fn draw_network(
    report: &Report,
    scenarios: &[Scenario],
    facts: &Facts,
    entries: &[&Entry],
    folder: &Path,
) -> anyhow::Result<()> {
    type Figure = (&'static str, &'static str, &'static str, fn(&Summary) -> f64);
    const FIGURES: [Figure; 2] = [
        ("pairs", "pairs of acquire and release", "per second", |summary| summary.acquisitions_per_second),
        ("time", "time of a pair", "microseconds (median)", |summary| summary.pair.p50),
    ];

    let warning = if report.is_unequal() { WARNING } else { "" };
    let is_drawn = |scenario: &&Scenario| scenario.kind.is_uncontended() && scenario.callers == 64;
    for scenario in scenarios.iter().filter(is_drawn) {
        let of_scenario = entries.iter().filter(|entry| entry.label == scenario.label());
        let of_scenario: Vec<&Entry> = of_scenario.copied().collect();
        for (suffix, shows, unit, figure) in FIGURES {
            let over = |entry: &Entry| Some(2e3 * entry.delay.0?.as_secs_f64());
            let lines = lines(report, &of_scenario, over, figure);
            let title = format!("{}: {shows}, {}{warning}", facts.name, scenario.title());
            let name = facts.name.to_lowercase();
            let file = folder.join(format!("network-{name}-{}-{suffix}.svg", scenario.label()));
            let width = 0.0..range(&lines, |point| point.0).end;
            let horizontal = "round-trip time of the network in milliseconds, in addition to loopback";
            chart(&file, &title, (horizontal, unit), width, &lines, |time| format!("{time:.1}"))?;
        }
    }
    Ok(())
}

fn delays<'a>(entries: impl Iterator<Item = &'a Entry>) -> Vec<Delay> {
    let mut delays = Vec::new();
    for entry in entries {
        if !delays.contains(&entry.delay) {
            delays.push(entry.delay);
        }
    }
    delays
}

fn title(report: &Report, entry: &Entry) -> String {
    let facts = report.facts(entry.system);
    let mut title = entry.contender.title().to_owned();
    if let Some(facts) = facts.filter(|facts| !facts.system.is_database()) {
        title = format!("{}: {title}", facts.name);
    }
    if !entry.contender.writes(entry.system) {
        title.push_str(" (nothing written)");
    } else if !facts.is_some_and(|facts| facts.durable) {
        title.push_str(" (NOT DURABLE)");
    }
    title
}

fn throughput(report: &Report, entries: &[&Entry], kind: Kind) -> Vec<Line> {
    let entries: Vec<&Entry> = entries.iter().copied().filter(|entry| entry.scenario.kind == kind).collect();
    let callers = |entry: &Entry| Some(f64::from(entry.scenario.callers));
    lines(report, &entries, callers, |summary| summary.acquisitions_per_second)
}

/// One line per contender. Each entry is a point.
fn lines(
    report: &Report,
    entries: &[&Entry],
    horizontal: impl Fn(&Entry) -> Option<f64>,
    vertical: fn(&Summary) -> f64,
) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for entry in entries {
        let (Some(summary), Some(position)) = (&entry.summary, horizontal(entry)) else { continue };
        if summary.acquisitions == 0 {
            continue;
        }
        let title = title(report, entry);
        let point = (position, vertical(summary));
        match lines.iter_mut().find(|line| line.title == title) {
            Some(line) => line.points.push(point),
            None => lines.push(Line { title, points: vec![point] }),
        }
    }
    lines
}

/// Waits over `1 / (1 - quantile)`. The scale of the chart is logarithmic.
fn waits(report: &Report, entries: &[&Entry], scenario: Scenario) -> Vec<Line> {
    let mut lines = Vec::new();
    for entry in entries.iter().filter(|entry| entry.label == scenario.label()) {
        let Some(summary) = &entry.summary else { continue };
        let points = summary.wait.quantiles.iter().map(|(quantile, value)| (1.0 / (1.0 - quantile), *value));
        lines.push(Line { title: title(report, entry), points: points.collect() });
    }
    lines
}

fn percentile(rest: f64) -> String {
    let percent = 100.0 - 100.0 / rest;
    format!("{percent:.6}").trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn range(lines: &[Line], coordinate: fn(&(f64, f64)) -> f64) -> Range<f64> {
    let values = || lines.iter().flat_map(|line| &line.points).map(coordinate).filter(|value| *value > 0.0);
    let smallest = values().fold(f64::INFINITY, f64::min);
    let largest = values().fold(0.0, f64::max);
    smallest..largest.max(smallest * 1.01)
}

fn chart<X>(
    file: &Path,
    title: &str,
    (horizontal, vertical): (&str, &str),
    width: X,
    lines: &[Line],
    label: fn(f64) -> String,
) -> anyhow::Result<()>
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: ValueFormatter<f64>,
{
    if lines.iter().all(|line| line.points.is_empty()) {
        return Ok(());
    }
    let height = range(lines, |point| point.1);
    let area = SVGBackend::new(file, (SIZE.0.unsigned_abs(), SIZE.1.unsigned_abs())).into_drawing_area();
    let wrong = |error: &dyn std::fmt::Display| anyhow!("drawing {}: {error}", file.display());
    area.fill(&WHITE).map_err(|error| wrong(&error))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .margin_right(LEGEND)
        .x_label_area_size(40)
        .y_label_area_size(80)
        .build_cartesian_2d(width, (height.start * 0.7..height.end * 1.5).log_scale())
        .map_err(|error| wrong(&error))?;
    chart
        .configure_mesh()
        .x_desc(horizontal)
        .y_desc(vertical)
        .x_label_formatter(&|value| label(*value))
        .y_label_formatter(&|value| if *value < 1.0 { format!("{value:.2}") } else { format!("{value:.0}") })
        .light_line_style(RGBColor(235, 235, 235))
        .draw()
        .map_err(|error| wrong(&error))?;
    for (number, (line, colour)) in (0..).zip(lines.iter().zip(COLOURS.iter().cycle())) {
        let style = colour.stroke_width(2);
        let points = line.points.iter().copied().filter(|point| point.1 > 0.0);
        chart.draw_series(LineSeries::new(points, style).point_size(2)).map_err(|error| wrong(&error))?;
        // To the right of the chart. The legend of plotters would cover the lines.
        let (left, middle) = (SIZE.0 - LEGEND + 12, 60 + 22 * number);
        let sample = PathElement::new([(left, middle), (left + 18, middle)], style);
        area.draw(&sample).map_err(|error| wrong(&error))?;
        let text = Text::new(line.title.as_str(), (left + 24, middle - 7), ("sans-serif", 12));
        area.draw(&text).map_err(|error| wrong(&error))?;
    }
    area.present().map_err(|error| wrong(&error))
}
