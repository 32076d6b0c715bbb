//! Which rows are known to be there, so that a row lock costs no look at a private connection each time.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};

/// Names without number are a pattern of their own (`order:{id}`), so this is bounded.
const MOST: usize = 10_000;

/// Only a hint: a row that was cleaned away meanwhile is found to be missing, and made again.
#[derive(Debug, Default)]
pub(crate) struct KnownRows {
    names: Mutex<HashSet<Arc<str>>>,
}

impl KnownRows {
    pub(super) fn contains(&self, name: &str) -> bool {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).contains(name)
    }

    pub(super) fn remove(&self, name: &str) {
        self.names.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    pub(super) fn insert(&self, name: Arc<str>) {
        let mut names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        if names.len() >= MOST {
            names.clear();
        }
        names.insert(name);
    }
}
