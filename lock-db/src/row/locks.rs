//! Asking for several row locks.

use std::time::Duration;

use crate::database::LockDatabase;
use crate::in_transaction::{HeldInTransaction, lock_all};
use crate::{Error, Kind, Locks, limits};

/// A request for several row locks in one transaction, from [`Locks::row_locks`]. Nothing happens before one of its async
/// methods is called.
///
/// They are taken in one order, byte by byte, whatever the order in which they were given, so that two callers who want
/// the same names never wait for each other crosswise. Together with locks that the business statements take, or with
/// locks taken one by one, the database may still have to end one of two transactions: [`Error::Deadlock`].
#[derive(Debug)]
#[must_use = "this only describes locks; call `acquire_in`"]
pub struct RowLocks<DB: LockDatabase> {
    locks: Locks<DB>,
    names: Vec<String>,
    wait: Option<Duration>,
}

// Derived, it would ask for a database type that can be cloned.
impl<DB: LockDatabase> Clone for RowLocks<DB> {
    fn clone(&self) -> Self {
        Self { locks: self.locks.clone(), names: self.names.clone(), wait: self.wait }
    }
}

impl<DB: LockDatabase> RowLocks<DB> {
    pub(crate) fn new(locks: Locks<DB>, names: Vec<String>) -> Self {
        Self { locks, names, wait: None }
    }

    /// How long to wait, for all of them together. As [`RowLock::wait`](crate::RowLock::wait).
    pub const fn wait(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Takes all of them in the caller's transaction, with a statement for each. As
    /// [`RowLock::acquire_in`](crate::RowLock::acquire_in); after an error those that were taken already stay with the transaction until it ends.
    ///
    /// # Errors
    ///
    /// As [`RowLock::acquire_in`](crate::RowLock::acquire_in); [`Error::InvalidOption`] without any name, and with
    /// more than 10 000 of them.
    ///
    /// # Cancel safety
    ///
    /// As [`RowLock::acquire_in`](crate::RowLock::acquire_in).
    pub async fn acquire_in(self, transaction: &mut DB::Connection) -> Result<Vec<HeldInTransaction>, Error> {
        let wait = limits::check_wait(self.wait.unwrap_or(self.locks.default_wait()))?;
        let held = lock_all(&self.locks, &self.names, Kind::Row, Some(wait), transaction).await?;
        #[cfg(feature = "testing")]
        self.locks.are_in_transaction(Kind::Row, held.iter().flatten());
        // Whoever waits gets them all or an error.
        held.ok_or(Error::Closed)
    }

    /// As [`acquire_in`](Self::acquire_in), without waiting: `None` when one of them is held by somebody else. Those that
    /// come before it in the order stay with the transaction.
    ///
    /// # Errors
    ///
    /// As [`acquire_in`](Self::acquire_in), without `Timeout`.
    ///
    /// # Cancel safety
    ///
    /// As [`acquire_in`](Self::acquire_in).
    pub async fn try_acquire_in(
        self,
        transaction: &mut DB::Connection,
    ) -> Result<Option<Vec<HeldInTransaction>>, Error> {
        let held = lock_all(&self.locks, &self.names, Kind::Row, None, transaction).await?;
        #[cfg(feature = "testing")]
        self.locks.are_in_transaction(Kind::Row, held.iter().flatten());
        Ok(held)
    }
}
