//! What operators ask of a `Locks`.

use super::Locks;
use crate::database::LockDatabase;
use crate::session::Request;
use crate::{Error, Health, LockInfo};

impl<DB: LockDatabase> Locks<DB> {
    /// Reads the lock of a name: who holds it, and who waits. Returns `None` if the name was never
    /// used. On PostgreSQL and SQLite that includes a name whose first transaction has not ended.
    ///
    /// For a row lock, the server is asked which transaction has the row locked: see
    /// [`LockInfo::row_holder`].
    ///
    /// The result is for dashboards and logs. It is out of date as soon as it is returned, so do
    /// not use it to decide whether work may continue.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let lease = locks.insert_lock("report:daily").acquire().await?;
    /// if let Some(info) = locks.info("report:daily").await? {
    ///     println!("{} is held by {} until {:?}", info.name, info.owner, info.held_until);
    ///     println!("{} processes wait for it", info.waiting.len());
    /// }
    /// # drop(lease);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidName`] when the name is not valid.
    /// - [`Error::SchemaMissing`] and [`Error::UnsupportedTable`] when the table can't be used.
    /// - [`Error::Unreachable`], [`Error::Refused`] and [`Error::Database`] when the row can't be
    ///   read.
    /// - [`Error::Closed`] after [`close`](Self::close).
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time.
    pub async fn info(&self, name: impl AsRef<str>) -> Result<Option<LockInfo>, Error> {
        let name = self.context().checked_name(name.as_ref())?;
        self.context().session().ask(|answer| Request::Info { name, answer }).await
    }

    /// Ends a lease by force, from any process, if its present grant has this number. Returns whether it
    /// had.
    ///
    /// The number is that of [`LockInfo::fencing_token`], so a lock that was granted again meanwhile is
    /// not touched. `false` also for a lock that is free and for a name that was never used. A lock that
    /// is kept after its holder has released it ([`at_least`](crate::InsertLock::at_least)) is freed, too.
    ///
    /// The lock is free at once. The old holder is told ([`Loss::ForceReleased`](crate::Loss)) with its
    /// next renewal, a third of its TTL later at most, and at once if it belongs to this `Locks`. Until
    /// then it may go on with work outside of this database, beside the next holder: end its process
    /// first if you can. In this database, a transaction that it
    /// [guards](crate::Lease::begin) is refused from now on.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let lease = locks.insert_lock("report:daily").acquire().await?;
    /// if let Some(info) = locks.info("report:daily").await? {
    ///     assert!(locks.force_release("report:daily", info.fencing_token).await?);
    /// }
    /// assert_eq!(lease.loss(), Some(lock_db::Loss::ForceReleased));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidName`] when the name is not valid.
    /// - [`Error::WrongKind`] when the name is used for row locks. A row lock ends with its transaction:
    ///   end the session that [`info`](Self::info) names.
    /// - [`Error::Database`], retryable, when another transaction has the row locked, such as one that
    ///   is guarded by the lease and about to be committed.
    /// - [`Error::SchemaMissing`] and [`Error::UnsupportedTable`] when the table can't be used.
    /// - [`Error::Unreachable`], [`Error::Refused`] and [`Error::Database`] when the row can't be read or
    ///   written.
    /// - [`Error::Closed`] after [`close`](Self::close).
    ///
    /// # Cancel safety
    ///
    /// The release may still be carried out when the future is dropped.
    pub async fn force_release(&self, name: impl AsRef<str>, fencing_token: i64) -> Result<bool, Error> {
        let name = self.context().checked_name(name.as_ref())?;
        let release = |answer| Request::ForceRelease { name, fencing_token, answer };
        self.context().session().ask(release).await
    }

    /// How this `Locks` is doing, for a readiness probe. Takes no time, because it does not ask the database.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let lease = locks.insert_lock("report:daily").acquire().await?;
    /// let health = locks.health();
    /// assert!(health.connected && health.held == 1 && health.waiting == 0);
    /// # drop(lease);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn health(&self) -> Health {
        let mut health = self.context().session().vitals().health();
        // Its connections are about to be closed.
        health.connected &= !self.is_closed();
        health
    }
}
