//! A cache of rows that are known to exist, so that a row lock need not read the row on a private
//! connection each time.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::name::Name;

/// Lock names are unbounded (`order:{id}`), so the cache is capped.
const MOST: usize = 10_000;

/// An entry is only a hint: a row that was cleaned up since is found to be missing, and is created
/// again.
#[derive(Debug, Default)]
pub(crate) struct RowIds {
    rows: Mutex<HashMap<Name, RowId>>,
}

/// Identifies a row, also among rows of a database with the same name on another server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowId {
    pub(crate) id: i64,
    /// In microseconds since 1970.
    pub(crate) created: i64,
}

impl RowIds {
    pub(crate) fn get(&self, name: &str) -> Option<RowId> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied()
    }

    pub(crate) fn forget(&self, name: &str) {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    /// Called when a row turns out to be missing. The table may be another one, and then no row of
    /// the cache exists. Otherwise each name would cost a transaction to find that out.
    pub(crate) fn forget_all(&self) {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    pub(crate) fn insert(&self, name: Name, row: RowId) {
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        if rows.len() >= MOST {
            rows.clear();
        }
        rows.insert(name, row);
    }
}
