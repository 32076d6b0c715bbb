//! Several names in one transaction.

use std::time::Instant;

use super::{Attempt, HeldInTransaction};
use crate::context::Context;
use crate::database::LockDatabase;
use crate::name::Name;
use crate::options::{MOST_NAMES, Wait};
use crate::{Error, Kind};

/// Checks the names and returns each once, sorted by bytes. All callers take names in this order,
/// so two callers that need the same names never wait for each other in a cycle.
pub(crate) fn in_order<DB: LockDatabase>(
    context: &Context<DB>,
    names: &[String],
) -> Result<Vec<Name>, Error> {
    let mut checked = names.iter().map(|name| context.checked_name(name)).collect::<Result<Vec<_>, _>>()?;
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

/// Locks all names in the transaction, within one wait. `None`: a try, and one of them was not
/// free.
pub(crate) async fn lock_all<DB: LockDatabase>(
    context: &Context<DB>,
    names: &[String],
    kind: Kind,
    wait: Wait,
    transaction: &mut DB::Connection,
) -> Result<Option<Vec<HeldInTransaction>>, Error> {
    let started = Instant::now();
    let _waits = context.session().vitals().wait();
    let names = in_order(context, names)?;
    let attempts = names.iter().map(|name| Attempt { context, name, kind, wait, started });
    // All rows are found before the first is locked. A locked row would block other requests that
    // create the remaining rows.
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
