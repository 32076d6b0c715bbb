//! Plots: throughput by number of callers, and the distribution of the waits.

use std::ops::Range;
use std::path::Path;

use anyhow::anyhow;
use plotters::prelude::*;

use crate::report::{Entry, Report};
use crate::scenario::{Kind, Scenario};

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

/// Draws one plot per database and scenario. Every plot also shows the systems that are not
/// databases.
pub(crate) fn draw(report: &Report, scenarios: &[Scenario], folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    let no_database = !report.servers.iter().any(|facts| facts.system.is_database());
    for facts in report.servers.iter().filter(|facts| no_database || facts.system.is_database()) {
        let belongs = |entry: &&Entry| entry.system == facts.system || !entry.system.is_database();
        let entries: Vec<&Entry> = report.results.iter().filter(belongs).collect();
        let name = facts.name.to_lowercase();
        let warning = if report.is_unequal() { " - NOT COMPARABLE: durability differs" } else { "" };
        for (kind, letter) in [(Kind::A, "A"), (Kind::B, "B")] {
            let lines = throughput(report, &entries, kind);
            let title = match kind {
                Kind::A => format!("{}: pairs of acquire and release, free names{warning}", facts.name),
                _ => format!("{}: acquisitions of one name by one process{warning}", facts.name),
            };
            let file = folder.join(format!("throughput-{name}-{letter}.svg"));
            chart(&file, &title, ("callers", "per second"), &lines, |callers| format!("{callers:.0}"))?;
        }
        for scenario in scenarios {
            let lines = waits(report, &entries, *scenario);
            let title = format!("{}: wait, {}{warning}", facts.name, scenario.title());
            let file = folder.join(format!("wait-{name}-{}.svg", scenario.label()));
            chart(&file, &title, ("percentile", "microseconds"), &lines, percentile)?;
        }
    }
    Ok(())
}

fn title(report: &Report, entry: &Entry) -> String {
    let facts = report.facts(entry.system);
    let mut title = entry.contender.title().to_owned();
    if let Some(facts) = facts.filter(|facts| !facts.system.is_database()) {
        title = format!("{}: {title}", facts.name);
    }
    if !entry.contender.writes() {
        title.push_str(" (nothing written)");
    } else if !facts.is_some_and(|facts| facts.durable) {
        title.push_str(" (NOT DURABLE)");
    }
    title
}

fn throughput(report: &Report, entries: &[&Entry], kind: Kind) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    for entry in entries.iter().filter(|entry| entry.scenario.kind == kind) {
        let Some(summary) = &entry.summary else { continue };
        if summary.acquisitions == 0 {
            continue;
        }
        let title = title(report, entry);
        let point = (f64::from(entry.scenario.callers), summary.acquisitions_per_second);
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

fn chart(
    file: &Path,
    title: &str,
    (horizontal, vertical): (&str, &str),
    lines: &[Line],
    label: fn(f64) -> String,
) -> anyhow::Result<()> {
    if lines.iter().all(|line| line.points.is_empty()) {
        return Ok(());
    }
    let (width, height) = (range(lines, |point| point.0), range(lines, |point| point.1));
    let area = SVGBackend::new(file, (SIZE.0.unsigned_abs(), SIZE.1.unsigned_abs())).into_drawing_area();
    let wrong = |error: &dyn std::fmt::Display| anyhow!("drawing {}: {error}", file.display());
    area.fill(&WHITE).map_err(|error| wrong(&error))?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .margin_right(LEGEND)
        .x_label_area_size(40)
        .y_label_area_size(80)
        .build_cartesian_2d(width.log_scale(), (height.start * 0.7..height.end * 1.5).log_scale())
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
