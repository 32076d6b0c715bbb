//! The receipt for a row lock on the caller's own transaction.

use std::sync::Arc;

/// Says that the row lock was taken. It ends with the transaction, by commit, rollback or death: dropping this changes
/// nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldRow {
    name: Arc<str>,
}

impl HeldRow {
    pub(super) fn new(name: Arc<str>) -> Self {
        Self { name }
    }

    /// The name of the lock.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}
