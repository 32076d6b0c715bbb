//! How often a transaction holds a lock.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use crate::secret::Secret;

/// Transactions end without a word to us, so this is bounded.
const MOST: usize = 10_000;

/// The database itself lets a transaction lock a row again; this only counts. A row that carries a secret of ours which
/// others can't see yet is one that the same transaction has locked before.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// By the secret that was written last.
    counts: Mutex<HashMap<String, usize>>,
}

impl Counts {
    /// Whether this process wrote that secret, in a transaction that may be open still.
    pub(super) fn knows(&self, secret: &str) -> bool {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner).contains_key(secret)
    }

    /// Notes that `secret` replaced the secret `before`, which the same transaction had written if it is `again`.
    pub(crate) fn enter(&self, secret: &Secret, before: &str, again: bool) -> usize {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        // Kept, for a rollback to a savepoint may bring that secret back.
        let last = counts.get(before).copied().filter(|_| again).unwrap_or(0);
        if counts.len() >= MOST {
            counts.clear();
        }
        counts.insert(secret.as_str().to_owned(), last + 1);
        last + 1
    }

    /// Notes that a transaction of our own has written `secret`, as long as the answer is kept.
    pub(crate) fn enter_own(self: &Arc<Self>, secret: Secret, before: &str) -> Counted {
        self.enter(&secret, before, false);
        Counted { secret, counts: Arc::clone(self) }
    }
}

/// In a transaction whose end is known.
pub(crate) struct Counted {
    secret: Secret,
    counts: Arc<Counts>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.counts.counts.lock().unwrap_or_else(PoisonError::into_inner).remove(self.secret.as_str());
    }
}
