//! Several names in one transaction.

use std::time::{Duration, Instant};

use super::{Attempt, HeldInTransaction};
use crate::database::LockDatabase;
use crate::limits::MOST_NAMES;
use crate::name::Name;
use crate::{Error, Kind, Locks};

/// The names, checked, each once, in the order in which everybody takes them: byte by byte. Two callers who want the same
/// ones then never wait for each other crosswise.
pub(crate) fn in_order<DB: LockDatabase>(locks: &Locks<DB>, names: &[String]) -> Result<Vec<Name>, Error> {
    let mut checked = names.iter().map(|name| locks.checked_name(name)).collect::<Result<Vec<_>, _>>()?;
    checked.sort_unstable();
    checked.dedup();
    if checked.is_empty() {
        return Err(Error::InvalidOption {
            option: "names",
            value: "empty".into(),
            reason: "there is nothing to lock",
        });
    }
    if checked.len() > MOST_NAMES {
        return Err(Error::InvalidOption {
            option: "names",
            value: format!("{} names", checked.len()),
            reason: "10 000 are the most that are taken together",
        });
    }
    Ok(checked)
}

/// Locks all of them in the transaction, within one wait. `None`: a try, and one of them was not free.
pub(crate) async fn lock_all<DB: LockDatabase>(
    locks: &Locks<DB>,
    names: &[String],
    kind: Kind,
    wait: Option<Duration>,
    transaction: &mut DB::Connection,
) -> Result<Option<Vec<HeldInTransaction>>, Error> {
    let started = Instant::now();
    let names = in_order(locks, names)?;
    let attempts = names.iter().map(|name| Attempt { locks, name, kind, wait, started });
    // All of them are found before the first is locked, which is in the way of whoever makes the others' rows.
    let mut found = Vec::with_capacity(names.len());
    for attempt in attempts {
        match attempt.find_in(transaction).await? {
            Some(row) => found.push((attempt, row)),
            None => return Ok(None),
        }
    }
    let mut held = Vec::with_capacity(names.len());
    for (attempt, row) in found {
        match attempt.lock_found(transaction, row).await? {
            Some(locked) => held.push(locked),
            None => return Ok(None),
        }
    }
    Ok(Some(held))
}
