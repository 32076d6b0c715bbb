//! The result: the check, and a table for people.

use std::time::Duration;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use hdrhistogram::Histogram;

use crate::drive::Outcome;
use crate::service::Protection;
use crate::store::Books;

/// One sale under one protection, and the content of the tables after it.
pub(crate) struct Run {
    pub(crate) protection: Protection,
    pub(crate) requests: usize,
    pub(crate) stock: i64,
    /// How many should be sold: all, unless there are fewer users.
    pub(crate) expected: i64,
    pub(crate) outcome: Outcome,
    pub(crate) books: Books,
}

impl Run {
    /// What is wrong, one sentence each.
    pub(crate) fn mistakes(&self) -> Vec<String> {
        let Self { stock, expected, outcome, books, .. } = self;
        let left_over: i64 = books.left_over.iter().sum();
        let mut mistakes = Vec::new();
        let mut check = |is_right: bool, mistake: String| {
            if !is_right {
                mistakes.push(mistake);
            }
        };
        check(books.orders == *expected, format!("{} sold instead of {expected}", books.orders));
        check(
            books.left_over.iter().all(|left_over| *left_over >= 0),
            format!("the stock fell to {left_over}"),
        );
        check(
            left_over + books.orders == *stock,
            format!("{left_over} left over and {} sold do not make {stock}", books.orders),
        );
        let most = books.most_orders_of_a_user;
        check(most <= 1, format!("a user has {most} orders"));
        check(
            outcome.confirmed == books.orders,
            format!("{} orders were confirmed, {} were written", outcome.confirmed, books.orders),
        );
        let reason = outcome.failure.as_deref().unwrap_or_default();
        check(outcome.failed == 0, format!("{} requests failed, one of them with: {reason}", outcome.failed));
        mistakes
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
    line("in stock before the sale", &|run| run.stock.to_string());
    line("orders written", &|run| run.books.orders.to_string());
    line("left over in stock", &|run| run.books.left_over.iter().sum::<i64>().to_string());
    line("most orders of one user", &|run| run.books.most_orders_of_a_user.to_string());
    line("refused: has one, sold out", &|run| format!("{}, {}", run.outcome.repeated, run.outcome.sold_out));
    line("failed requests", &|run| run.outcome.failed.to_string());
    line("last one sold after", &|run| milliseconds(run.outcome.sold_within));
    line("orders a second until then", &|run| a_second(run.books.orders, run.outcome.sold_within));
    line("buyers were answered within: p50, p99", &|run| quantiles(&run.outcome.buyers));
    line("all requests took", &|run| milliseconds(run.outcome.elapsed));
    line("requests a second", &|run| {
        a_second(i64::try_from(run.requests).unwrap_or(i64::MAX), run.outcome.elapsed)
    });
    line("requests were answered within: p50, p99", &|run| quantiles(&run.outcome.latencies));
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// What the table means, one sentence for each run.
pub(crate) fn verdict(run: &Run) -> String {
    let mistakes = run.mistakes();
    if mistakes.is_empty() {
        return format!("{}: right, {} sold to as many users", run.protection, run.books.orders);
    }
    format!("{}: WRONG: {}", run.protection, mistakes.join("; "))
}

fn milliseconds(time: Duration) -> String {
    format!("{:.0} ms", time.as_secs_f64() * 1000.0)
}

fn a_second(count: i64, time: Duration) -> String {
    let count = i32::try_from(count).unwrap_or(i32::MAX);
    format!("{:.0}", f64::from(count) / time.as_secs_f64().max(f64::MIN_POSITIVE))
}

fn quantiles(latencies: &Histogram<u64>) -> String {
    let at = |quantile| milliseconds(Duration::from_micros(latencies.value_at_quantile(quantile)));
    format!("{}, {}", at(0.5), at(0.99))
}
