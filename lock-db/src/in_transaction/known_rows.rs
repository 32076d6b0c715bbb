//! Which rows are known to be there, so that a row lock costs no look at a private connection each time.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::name::Name;

/// Names without number are a pattern of their own (`order:{id}`), so this is bounded.
const MOST: usize = 10_000;

/// Only a hint: a row that was cleaned away meanwhile is found to be missing, and made again.
#[derive(Debug, Default)]
pub(crate) struct KnownRows {
    rows: Mutex<HashMap<Name, KnownRow>>,
}

/// What tells a row from any other, also from one in a database of the same name on another server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KnownRow {
    pub(super) id: i64,
    /// In microseconds since 1970.
    pub(super) created: i64,
}

impl KnownRows {
    pub(super) fn get(&self, name: &str) -> Option<KnownRow> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied()
    }

    pub(super) fn forget(&self, name: &str) {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner).remove(name);
    }

    /// When a row turned out not to be there any more: the table may be another one, and then no row is. Else each name would cost a
    /// transaction to find that out.
    pub(super) fn forget_all(&self) {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    pub(super) fn insert(&self, name: Name, row: KnownRow) {
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        if rows.len() >= MOST {
            rows.clear();
        }
        rows.insert(name, row);
    }
}
