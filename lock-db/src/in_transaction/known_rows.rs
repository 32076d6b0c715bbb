//! Which rows are known to be there, so that a row lock costs no look at a private connection each time.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::name::Name;

/// Names without number are a pattern of their own (`order:{id}`), so this is bounded.
const MOST: usize = 10_000;

/// Only a hint: a row that was cleaned away meanwhile is found to be missing, and made again.
#[derive(Debug, Default)]
pub(crate) struct KnownRows {
    ids: Mutex<HashMap<Name, i64>>,
}

impl KnownRows {
    /// The id of a name's row.
    pub(super) fn get(&self, name: &str) -> Option<i64> {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied()
    }

    pub(super) fn remove(&self, name: &str) {
        self.ids.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    pub(super) fn insert(&self, name: Name, id: i64) {
        let mut ids = self.ids.lock().unwrap_or_else(PoisonError::into_inner);
        if ids.len() >= MOST {
            ids.clear();
        }
        ids.insert(name, id);
    }
}
