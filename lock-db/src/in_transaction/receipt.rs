//! The receipt for a lock in the caller's own transaction.

use crate::name::Name;
#[cfg(feature = "testing")]
use crate::reentrancy::Instance;

/// States that a lock was taken in a transaction. The lock ends with the transaction: by its
/// commit, its rollback or the end of its connection. Dropping this value changes nothing.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let locks = lock_db::testing::locks().await?;
/// let mut transaction = locks.pool().begin().await?;
/// let held = locks.row_lock("stock:7").acquire_in(&mut transaction).await?;
/// assert_eq!((held.name(), held.hold_count()), ("stock:7", 1));
/// let again = locks.row_lock("stock:7").acquire_in(&mut transaction).await?;
/// assert_eq!(again.hold_count(), 2);
/// transaction.commit().await?;    // the lock is free from here on
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
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

    /// How many times the transaction had taken the lock when this value was returned: 1 for the
    /// first time.
    #[must_use]
    pub fn hold_count(&self) -> usize {
        self.hold_count
    }
}
