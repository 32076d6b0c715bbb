//! The receipt for a lock in the caller's own transaction.

use crate::name::Name;
#[cfg(feature = "testing")]
use crate::reentry::Instance;

/// Says that a lock was taken in a transaction. It ends with the transaction, by commit, rollback or death: dropping this
/// changes nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldInTransaction {
    pub(super) name: Name,
    pub(super) hold_count: usize,
    #[cfg(feature = "testing")]
    pub(crate) locks: Instance,
}

impl HeldInTransaction {
    /// The name of the lock.
    #[must_use]
    pub fn name(&self) -> &str {
        self.name.shown()
    }

    #[cfg(feature = "testing")]
    pub(crate) fn name_in_table(&self) -> &Name {
        &self.name
    }

    /// How often the transaction had taken the lock when this was given: 1 for the first time.
    #[must_use]
    pub fn hold_count(&self) -> usize {
        self.hold_count
    }
}
