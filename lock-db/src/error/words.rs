//! The words of errors: what was tried, and why it did not work.

use std::fmt;
use std::io;
use std::time::Duration;

use tokio::runtime::is_rt_shutdown_err;

use crate::database;
use crate::name::{escaped, in_one_line};
use crate::{Kind, LockInfo};

/// What is done, of all that can fail, on the way to a lock.
const ASKING: [&str; 6] =
    ["acquire", "take the row lock", "lock the row", "begin a transaction", "find the table", "make the row"];

/// After "could not".
pub(super) fn tried(
    action: &str,
    name: Option<&str>,
    within: Option<Duration>,
    source: &sqlx::Error,
) -> String {
    let within = within.map(|within| format!(" within {within:?}")).unwrap_or_default();
    match name.map(escaped) {
        // It was not even asked.
        Some(name) if ASKING.contains(&action) && is_out_of_reach(source) => {
            format!("ask for lock `{name}`{within}")
        }
        Some(name) if matches!(action, "acquire" | "release" | "verify the lock" | "take over") => {
            let verb = action.strip_suffix(" the lock").unwrap_or(action);
            format!("{verb} lock `{name}`{within}")
        }
        Some(name) => format!("{action} (lock `{name}`){within}"),
        None => format!("{action}{within}"),
    }
}

/// What sqlx or the database said, in one line. What sqlx puts in front of errors of the network is of no use.
pub(crate) fn cause(source: &sqlx::Error) -> String {
    match source {
        sqlx::Error::Io(error) => format!("{}{}", in_one_line(&error.to_string()), of_runtime(error)),
        sqlx::Error::Protocol(text) => in_one_line(text).to_string(),
        sqlx::Error::Configuration(error) => in_one_line(&error.to_string()).to_string(),
        source if database::is_busy(source) => {
            format!("another transaction keeps the others from writing: {}", in_one_line(&source.to_string()))
        }
        source => in_one_line(&source.to_string()).to_string(),
    }
}

fn of_runtime(error: &io::Error) -> &'static str {
    if is_rt_shutdown_err(error) {
        " (the runtime that made the connection has ended: give each runtime a pool of its own)"
    } else {
        ""
    }
}

/// Why a database can't be had, told once: what is made of it keeps the words.
#[derive(Debug, Clone)]
pub(super) struct OutOfReach(String);

impl fmt::Display for OutOfReach {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for OutOfReach {}

fn is_known(error: &io::Error) -> bool {
    error.get_ref().and_then(|inner| inner.downcast_ref::<OutOfReach>()).is_some()
}

fn is_out_of_reach(source: &sqlx::Error) -> bool {
    matches!(source, sqlx::Error::Io(error) if is_known(error))
}

/// Says of an error of the network which database it is about.
pub(super) fn of_database(database: &str, source: sqlx::Error) -> sqlx::Error {
    // Not of the network: what the application's hook did, and the end of a runtime, which is known by its type.
    if super::hook_failure(&source).is_some()
        || matches!(&source, sqlx::Error::Io(error) if is_rt_shutdown_err(error))
    {
        return source;
    }
    let sqlx::Error::Io(error) = source else { return source };
    let is_ours = error.get_ref().is_some() && error.raw_os_error().is_none();
    let kind = error.kind();
    let says = match kind {
        // In words of ours already: a server that was silent, a table that is locked, a session or a task that has ended, or this.
        io::ErrorKind::TimedOut
        | io::ErrorKind::WouldBlock
        | io::ErrorKind::ResourceBusy
        | io::ErrorKind::ConnectionAborted
            if is_ours =>
        {
            return sqlx::Error::Io(error);
        }
        _ if is_known(&error) => return sqlx::Error::Io(error),
        io::ErrorKind::ConnectionRefused
        | io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::HostUnreachable
        | io::ErrorKind::NetworkUnreachable
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::TimedOut
        | io::ErrorKind::UnexpectedEof => kind.to_string(),
        _ => error.to_string(),
    };
    let text = match kind {
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof => format!("the connection to {database} broke ({says})"),
        _ => format!("{database} can't be reached ({says})"),
    };
    sqlx::Error::Io(io::Error::new(kind, OutOfReach(text)))
}

/// With the same words.
pub(super) fn another(error: &io::Error) -> io::Error {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<OutOfReach>()) {
        Some(known) => io::Error::new(error.kind(), known.clone()),
        None => io::Error::new(error.kind(), error.to_string()),
    }
}

/// Who has a lock, behind what came of the wait for it.
pub(super) fn holder(info: Option<&LockInfo>) -> String {
    let Some(info) = info else { return String::new() };
    let (owner, since) = (escaped(&info.owner), info.acquired_at);
    let until = info.held_until.map(|until| format!(", until {until} at least")).unwrap_or_default();
    match info {
        LockInfo { finished_at: Some(finished), held_until: Some(until), .. } => {
            format!(" ({owner} finished at {finished}; kept until {until} by `at_least`)")
        }
        LockInfo { is_here: true, kind: Kind::Insert, .. } => format!(
            " (held by this process ({owner}) since {since}{until}; if that is the caller itself, use `run`, `reenter()` or `Owner`)"
        ),
        LockInfo { is_here: true, kind: Kind::Row, .. } => format!(
            " (held by this process ({owner}) since {since}; if that is the caller itself, use `acquire_in` in its transaction, or `Owner`)"
        ),
        LockInfo { held_until: Some(_), .. } => format!(" (held by {owner} since {since}{until})"),
        LockInfo { kind: Kind::Row, .. } => format!(" (held by {owner} since {since})"),
        LockInfo { .. } => String::new(),
    }
}

/// How a lock was lost.
pub(crate) fn lost(reason: super::Loss, taken_over_by: Option<&LockInfo>) -> String {
    match (reason, taken_over_by) {
        (super::Loss::TakenOver, Some(by)) => {
            format!("taken over by {} at {}", escaped(&by.owner), by.acquired_at)
        }
        (reason, _) => reason.to_string(),
    }
}
