//! Counts how often a transaction holds a lock.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::secret::Secret;

/// Transactions end without notice, so the map is capped.
const MOST: usize = 10_000;

/// The database itself lets a transaction lock a row again; this only counts. A row with a secret
/// of this process that other transactions can't see yet was locked by the same transaction before.
#[derive(Debug, Default)]
pub(crate) struct HoldCounts {
    /// By the secret that was written last.
    counts: Mutex<HashMap<String, usize>>,
}

impl HoldCounts {
    /// Whether this process wrote the secret, in a transaction that may still be open.
    pub(crate) fn knows(&self, secret: &str) -> bool {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).contains_key(secret)
    }

    /// Records that `secret` replaced the secret `before`. With `again`, the same transaction had
    /// written `before`.
    pub(crate) fn enter(&self, secret: &Secret, before: &str, again: bool) -> usize {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        // `before` is kept, because a rollback to a savepoint may bring it back.
        let last = counts.get(before).copied().filter(|_| again).unwrap_or(0);
        if counts.len() >= MOST {
            counts.clear();
        }
        counts.insert(secret.as_str().to_owned(), last + 1);
        last + 1
    }

    /// Records that a transaction of lock-db has written `secret`. The record lasts as long as the
    /// returned value.
    pub(crate) fn enter_own(self: &Arc<Self>, secret: Secret, before: &str) -> Counted {
        self.enter(&secret, before, false);
        Counted { secret, counts: Arc::clone(self) }
    }
}

/// A hold in a transaction whose end is known.
pub(crate) struct Counted {
    secret: Secret,
    counts: Arc<HoldCounts>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.counts.counts.lock().unwrap_or_else(PoisonError::into_inner).remove(self.secret.as_str());
    }
}
