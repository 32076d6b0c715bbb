//! A lease in a transaction of the caller: checked, or released with its commit.

use std::time::Duration;

use sqlx::Connection;

use super::Lease;
use crate::Error;
use crate::bounds::{self, ANSWER_LIMIT};
use crate::clock::timeout;
use crate::database::{Failure, Fault, Guarded, LockDatabase};
use crate::error::{Action, Loss, WaitingFor};
use crate::session::{KeptByTransaction, LeaseHandle, Request};

/// How long the database is asked whether a lease is lost that a transaction did not find.
const CONFIRM_LIMIT: Duration = Duration::from_secs(1);

impl<DB: LockDatabase> Lease<DB> {
    /// Checks, in a transaction of the caller, that the lease is held, and keeps other requests
    /// from taking the lock until the transaction ends.
    ///
    /// This is best the last statement before the commit. From here to the end of the transaction
    /// the lease can't be renewed on MySQL and MariaDB, and no other connection can write on
    /// SQLite.
    ///
    /// The transaction must be in the database of the lock, and must begin after the lease was
    /// granted. An earlier one may have read data that another holder has changed since, and is
    /// refused.
    ///
    /// On PostgreSQL the server ends the transaction when it is idle for longer than the TTL from
    /// here on (`idle_in_transaction_session_timeout`, for this transaction only). A host that
    /// vanishes therefore does not block the lock. MySQL and MariaDB have no such limit for one
    /// transaction: the lock stays taken until the server notices that the connection is gone.
    /// [`begin`](Self::begin) has no such gap.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let lease = locks.insert_lock("stock").acquire().await?;
    /// let mut transaction = locks.pool().begin().await?;
    /// // … statements on `&mut *transaction` …
    /// lease.verify_in(&mut transaction).await?;
    /// transaction.commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// After these the transaction can't be committed and must be rolled back:
    ///
    /// - [`Error::Lost`] when another process has the lock, when the transaction has already ended,
    ///   or when an earlier transaction of the lease may still be committed
    ///   ([`Loss::CommitUnknown`]).
    /// - [`Error::Serialization`] when the transaction sees the database as it was before the lease
    ///   was granted. A lease that was handed on within this process
    ///   ([`hand_off`](crate::LocksBuilder::hand_off)) is refused once, in REPEATABLE READ and
    ///   above, even if the transaction began after it. Also when the database ended the
    ///   transaction for a conflict.
    /// - [`Error::Deadlock`] when the database ended the transaction to break a deadlock.
    ///
    /// The others leave the decision to the caller:
    ///
    /// - [`Error::NotInTransaction`] when the connection is not in a transaction that sqlx began.
    /// - [`Error::ForeignTransaction`] when the transaction does not reach the table of this
    ///   `Locks`.
    /// - [`Error::Timeout`] when another transaction keeps the row locked.
    /// - [`Error::Unreachable`], [`Error::Refused`] and [`Error::Database`] when the statement
    ///   fails. It is then unknown whether the lease is held.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, roll the transaction back: it is unknown whether the lease was
    /// held.
    pub async fn verify_in(&self, transaction: &mut DB::Connection) -> Result<(), Error> {
        self.ask_in(transaction, false).await
    }

    /// Releases the lock together with the commit of the caller's transaction.
    ///
    /// Other processes get the lock exactly when the transaction commits. When it is rolled back,
    /// the lock is not released and the lease continues. This includes what
    /// [`verify_in`](Self::verify_in) does.
    ///
    /// Until the transaction has ended, its outcome is unknown and [`is_held`](Self::is_held) is
    /// `false`. The transaction should end within the TTL.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let lease = locks.insert_lock("stock").acquire().await?;
    /// let mut transaction = locks.pool().begin().await?;
    /// // … statements on `&mut *transaction` …
    /// lease.release_in(&mut transaction).await?;
    /// transaction.commit().await?;    // the lock is free from here on
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// As [`verify_in`](Self::verify_in). In REPEATABLE READ and above on PostgreSQL, also
    /// [`Error::Serialization`] when the lease was renewed, or another process began to wait for
    /// it, since the first statement of the transaction.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, roll the transaction back.
    pub async fn release_in(&self, transaction: &mut DB::Connection) -> Result<(), Error> {
        self.refuse_without_transaction(transaction)?;
        if self.handle.lease.is_within_minimum_hold() {
            // Not free with the commit, but released with the last handle, as without a transaction.
            return self.ask_in(transaction, false).await;
        }
        // Until the end of the call, or until the future is dropped.
        let _in_doubt = LeaseHandle::doubt(KeptByTransaction::new(&self.handle));
        self.ask_in(transaction, true).await
    }

    async fn ask_in(&self, transaction: &mut DB::Connection, release: bool) -> Result<(), Error> {
        self.refuse_without_transaction(transaction)?;
        if let Err(refused) = self.handle.refuse_after_unknown_commit().and(self.handle.refuse_after_loss()) {
            bounds::doom::<DB>(transaction).await;
            return Err(refused);
        }
        // The caller ends the transaction, and how it ends is not known here.
        self.handle.lease.mark_verified();
        let key = &self.handle.marked_key().await?;
        let name = &key.row.name;
        let limit = DB::GUARD_LIMIT + ANSWER_LIMIT;
        match bounds::answer::<DB, _>(limit, DB::guard(transaction, key, release)).await {
            Ok(Guarded::Ours | Guarded::Committed { .. }) => Ok(()),
            Ok(found @ (Guarded::NotOurs | Guarded::Elsewhere)) => {
                let is_foreign = found == Guarded::Elsewhere || self.ask_whether_foreign(transaction).await;
                if !is_foreign {
                    bounds::doom::<DB>(transaction).await;
                }
                let is_still_ours = self.ask_whether_ours().await;
                if is_foreign && matches!(is_still_ours, Ok(true)) {
                    return Err(Error::ForeignTransaction { name: name.given() });
                }
                bounds::doom::<DB>(transaction).await;
                if is_still_ours? {
                    return Err(Error::Serialization { name: name.given(), source: None });
                }
                self.handle.mark_lost();
                Err(self.handle.taken_over_error().await)
            }
            Ok(Guarded::Stale) => {
                bounds::doom::<DB>(transaction).await;
                Err(Error::Serialization { name: name.given(), source: None })
            }
            Ok(Guarded::Ended) => {
                bounds::doom::<DB>(transaction).await;
                Err(self.handle.lost_error(Loss::TransactionEnded))
            }
            Err(failure) => {
                if failure.fault == Fault::TableMissing && matches!(self.ask_whether_ours().await, Ok(true)) {
                    return Err(Error::ForeignTransaction { name: name.given() });
                }
                if failure.ends_transaction() {
                    bounds::doom::<DB>(transaction).await;
                }
                if failure.fault == Fault::Busy {
                    return Err(Error::Timeout {
                        name: name.given(),
                        waited: DB::GUARD_LIMIT,
                        waiting_for: WaitingFor::Lock,
                        held_by: None,
                    });
                }
                Err(failure.into_error(Action::Verify, Some(name)))
            }
        }
    }

    async fn ask_whether_foreign(&self, transaction: &mut DB::Connection) -> bool {
        let is_here = DB::is_here(transaction, &self.handle.lease.key.server);
        matches!(bounds::answer::<DB, _>(ANSWER_LIMIT, is_here).await, Ok(false))
    }

    /// Whether the row still belongs to this lease, as other connections see it. The caller's
    /// transaction may see an older state. An error is no answer: the lease then continues.
    async fn ask_whether_ours(&self) -> Result<bool, Error> {
        let key = &self.handle.lease.key;
        let name = key.row.name.clone();
        let asked = self.context.session().ask(|answer| Request::Read { name, answer });
        let Ok(row) = timeout(CONFIRM_LIMIT, asked).await else {
            let failure = Failure::no_answer::<DB>(CONFIRM_LIMIT);
            return Err(failure.into_error(Action::Verify, Some(&key.row.name)));
        };
        Ok(row?.is_some_and(|row| row.is_of(&key.secret, key.fencing_token)))
    }

    fn refuse_without_transaction(&self, connection: &mut DB::Connection) -> Result<(), Error> {
        if connection.is_in_transaction() {
            return Ok(());
        }
        Err(Error::NotInTransaction { name: self.name().to_owned() })
    }
}
