//! What the commands print.

use std::io::{self, Write};
use std::time::Duration;

use comfy_table::{Table, presets};
use lock_db::chrono::{DateTime, SecondsFormat, Utc};

/// Prints a line. A reader that has closed the pipe is no error.
pub(crate) fn line(text: &str) -> io::Result<()> {
    quiet_if_closed(writeln!(io::stdout(), "{text}"))
}

/// A reader such as `head` closes the pipe early.
fn quiet_if_closed(printed: io::Result<()>) -> io::Result<()> {
    match printed {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}

pub(crate) fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}

/// Text of others on a terminal: control characters are escaped.
pub(crate) fn shown(text: &str) -> String {
    text.chars()
        .flat_map(|one| {
            let escaped = one.is_control().then(|| one.escape_debug());
            let plain = (!one.is_control()).then_some(one);
            escaped.into_iter().flatten().chain(plain)
        })
        .collect()
}

pub(crate) fn time(moment: DateTime<Utc>) -> String {
    moment.to_rfc3339_opts(SecondsFormat::Secs, true)
}

/// A duration for people: in seconds, or in milliseconds below one.
pub(crate) fn duration(time: Duration) -> String {
    let unit = if time < Duration::from_secs(1) { Duration::from_millis(1) } else { Duration::from_secs(1) };
    let beyond = time.as_nanos() % unit.as_nanos();
    let rounded = time.saturating_sub(Duration::from_nanos(u64::try_from(beyond).unwrap_or(0)));
    humantime::format_duration(rounded).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_others_forges_no_line() {
        assert_eq!(shown("a\nb\u{1b}[31mä"), "a\\nb\\u{1b}[31mä");
    }

    #[test]
    fn durations_are_rounded() {
        assert_eq!(duration(Duration::from_millis(61_900)), "1m 1s");
        assert_eq!(duration(Duration::from_micros(1_500)), "1ms");
    }
}
