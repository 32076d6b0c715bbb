//! The messages of errors: what was attempted, on which lock, what is known, and what to do.

use std::error::Error as _;
use std::fmt;
use std::time::Duration;

use super::{Action, Error, Loss};
use crate::text::{escaped, in_one_line};
use crate::{Kind, LockInfo};

impl fmt::Display for Error {
    #[expect(clippy::too_many_lines, reason = "one message each")]
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Timeout { name, waited, waiting_for, held_by } => write!(
                out,
                "gave up on lock `{}` after {waited:.3?}, waiting for {waiting_for}{}: try again later, or allow a longer \
                 `wait`",
                escaped(name),
                holder(held_by.as_deref())
            ),
            Self::Lost { name, reason, taken_over_by } => write!(
                out,
                "lock `{}` is lost: {}; stop the work that it protects, and begin anew with a new lock",
                escaped(name),
                lost(*reason, taken_over_by.as_deref())
            ),
            Self::Deadlock { name, .. } => write!(
                out,
                "the database ended the transaction that was locking `{}` to break a deadlock: roll back and run the whole \
                 transaction again; take several locks in one order",
                escaped(name)
            ),
            Self::Serialization { name, .. } => write!(
                out,
                "the transaction began before the last holder of lock `{}` committed and would read old data: roll back and \
                 run the whole transaction again, with the lock as its first statement",
                escaped(name)
            ),
            Self::InvalidName { name, reason } => write!(
                out,
                "`{}` can't be the name of a lock: {reason}; a name has 1 to 255 bytes of UTF-8 without NUL",
                escaped(name)
            ),
            Self::InvalidOption { option, value, reason } => {
                write!(out, "option `{option}` can't be {}: {reason}", escaped(value))
            }
            Self::TtlTooShort { name, ttl, took } => write!(
                out,
                "lock `{}` can't be kept with a `ttl` of {ttl:?}: an answer of the database took {took:.0?}, and a lease needs \
                 twice that and more; allow a longer `ttl`",
                escaped(name)
            ),
            Self::WrongKind { name, wanted, found } => write!(
                out,
                "`{}` is used as {found} and can't be taken as {wanted}: use another name; or, once no program uses the old \
                 kind any more, delete its row from `distributed_lock`",
                escaped(name)
            ),
            Self::Reentry { name, reason } => {
                write!(out, "lock `{}` can't be entered again: {reason}", escaped(name))
            }
            Self::RolledBack { name } => write!(
                out,
                "the transaction of row lock `{}` was rolled back, because another annotated function that shared it returned \
                 an error, panicked, was dropped or was left unfinished: nothing of it was kept; fix that failure, and call the \
                 outermost function again",
                escaped(name)
            ),
            Self::NotInTransaction { name } => write!(
                out,
                "lock `{}` was asked for on a connection that is not in a transaction, where it would end at once: call \
                 `pool.begin()` first (a BEGIN sent as text is not seen)",
                escaped(name)
            ),
            Self::NotInstalled { name, reason } => write!(
                out,
                "lock `{}`: {reason}: call `locks.install()` once in `main`, before the first annotated function; or run the \
                 call inside `locks.scope(..)`, again in each task that it spawns; or write `locks = …` in the attribute",
                escaped(name)
            ),
            Self::AlreadyInstalled { installed } => write!(
                out,
                "`install()` was called already: this process uses its {installed} `Locks`; for a second database write \
                 `locks = …` in the attribute, or run its calls inside `locks.scope(..)`"
            ),
            Self::SchemaMissing { reason, folder, .. } => write!(
                out,
                "{reason}: run `locks.migrate().await` at start, or apply the SQL files of lock-db's folder \
                 `migrations/{folder}` (also in `lock_db::schema`) with your own migration tool"
            ),
            Self::UnsupportedTable { reason } => write!(out, "{reason}; nothing is locked on such a table"),
            Self::ForeignTransaction { name } => write!(
                out,
                "lock `{}` was asked for in a transaction that does not reach the table `distributed_lock` of this `Locks`: \
                 begin it on the pool that the `Locks` was made with, and without a temporary table of that name",
                escaped(name)
            ),
            Self::Closed => {
                out.write_str("this `Locks` is closed: take locks before `close()`, or make a new one")
            }
            Self::CommitUnknown { name, reason, .. } => write!(
                out,
                "could not commit the transaction (lock `{}`): {reason}; whether it was committed is unknown: ask the database \
                 before you run it again",
                escaped(name)
            ),
            Self::Unreachable { action, name, within, silent, reason, .. } => {
                // Otherwise the database was not even asked.
                let asks = action.asks_for_lock() && !silent;
                write!(out, "could not {}: {reason}", tried(*action, name.as_deref(), *within, asks))
            }
            Self::Refused { action, name, within, reason, .. }
            | Self::Database { action, name, within, reason, .. } => {
                write!(out, "could not {}: {reason}", tried(*action, name.as_deref(), *within, false))
            }
        }
    }
}

/// A message with the words of the database.
pub(super) struct Report<'a>(pub(super) &'a Error);

impl fmt::Display for Report<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.0)?;
        match self.0.source() {
            Some(source) => write!(out, ": {}", in_one_line(&source.to_string())),
            None => Ok(()),
        }
    }
}

/// What follows "could not".
fn tried(action: Action, name: Option<&str>, within: Option<Duration>, is_out_of_reach: bool) -> String {
    let within = within.map(|within| format!(" within {within:?}")).unwrap_or_default();
    match (name.map(escaped), action) {
        (Some(name), _) if is_out_of_reach => format!("ask for lock `{name}`{within}"),
        (Some(name), Action::Acquire | Action::Release | Action::TakeOver) => {
            format!("{action} lock `{name}`{within}")
        }
        (Some(name), Action::Verify) => format!("verify lock `{name}`{within}"),
        (Some(name), _) => format!("{action} (lock `{name}`){within}"),
        (None, _) => format!("{action}{within}"),
    }
}

/// Who holds a lock, after the result of the wait for it.
fn holder(info: Option<&LockInfo>) -> String {
    let Some(info) = info else { return String::new() };
    let (owner, since) = (escaped(&info.owner), info.acquired_at);
    let until = info.held_until.map(|until| format!(", until {until} at least")).unwrap_or_default();
    match info {
        LockInfo { finished_at: Some(finished), held_until: Some(until), .. } => {
            format!(" ({owner} finished at {finished}; kept until {until} by `at_least`)")
        }
        LockInfo { is_here: true, kind: Kind::Insert, .. } => format!(
            " (held by this process ({owner}) since {since}{until}; if that is the caller itself, use `run`, `reenter()` or `ReentryContext`)"
        ),
        LockInfo { is_here: true, kind: Kind::Row, .. } => format!(
            " (held by this process ({owner}) since {since}; if that is the caller itself, use `acquire_in` in its transaction, or `ReentryContext`)"
        ),
        LockInfo { held_until: Some(_), .. } => format!(" (held by {owner} since {since}{until})"),
        LockInfo { kind: Kind::Row, .. } => format!(" (held by {owner} since {since})"),
        LockInfo { .. } => String::new(),
    }
}

/// How a lock was lost.
pub(crate) fn lost(reason: Loss, taken_over_by: Option<&LockInfo>) -> String {
    match (reason, taken_over_by) {
        (Loss::TakenOver, Some(by)) => {
            format!("taken over by {} at {}", escaped(&by.owner), by.acquired_at)
        }
        (reason, _) => reason.to_string(),
    }
}
