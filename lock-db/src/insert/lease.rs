//! The guard of an insert lock.

use std::sync::Arc;
use std::time::Duration;

use sqlx::Connection;

use super::hold::{GivenUp, Hold, KeptByTransaction};
use super::{GuardedTransaction, release_quietly};
use crate::bounds::{self, ANSWER_LIMIT};
use crate::clock::timeout;
use crate::database::{Fault, Guarded, LockDatabase};
use crate::dropped_at_once::Watched;
use crate::error::{Failure, Loss, WaitingFor};
use crate::session::Request;
use crate::{Error, Locks};

/// How long the database is asked whether a lease is lost that a transaction did not find.
const CONFIRM_LIMIT: Duration = Duration::from_secs(1);

/// An insert lock that is held, and renewed in the background at a third of its TTL as long as this exists.
///
/// Dropping it releases the lock in the background: it only sends a message, so it never blocks, works outside of any
/// runtime, and others get the lock a moment later. [`release`](Self::release) waits for that and says whether the
/// lock was still ours. What could not be released when the process ended is free after its TTL.
///
/// A lease protects *work* as long as it [is held](Self::is_held). Whoever is paused for longer than the TTL has lost it
/// by then, and finds out only afterwards: what such a process still sends to other systems is told apart by the
/// [fencing token](Self::fencing_token).
///
/// The clock behind `is_held` is the operating system's monotonic clock, which stands still while a machine is
/// suspended.
#[must_use = "bind it to a name (`let _lease = …`); `let _ = …` releases it at once"]
#[clippy::has_significant_drop]
pub struct Lease<DB: LockDatabase> {
    hold: Watched<Arc<Hold>>,
    locks: Locks<DB>,
}

impl<DB: LockDatabase> Lease<DB> {
    pub(crate) fn new(hold: Arc<Hold>, locks: Locks<DB>) -> Self {
        Self { hold: Watched::unwatched(hold), locks }
    }

    /// A guard that the caller holds, rather than a function around it.
    pub(crate) fn of_caller(hold: Hold, locks: Locks<DB>) -> Self {
        let hold = Arc::new(hold);
        #[cfg(feature = "testing")]
        locks.lease_is_open(&hold);
        Self { hold: Watched::new(hold, |hold| hold.name().shown().into()), locks }
    }

    /// One of several that are handed out together.
    pub(super) fn unwatched(self) -> Self {
        Self::new(self.hold.into_inner(), self.locks)
    }

    pub(crate) fn into_hold(self) -> Arc<Hold> {
        self.hold.into_inner()
    }

    /// The name of the lock.
    #[must_use]
    pub fn name(&self) -> &str {
        self.hold.lease.name().shown()
    }

    /// The number of this grant. Every later grant of the same name has a larger one, for ever, so a resource that
    /// remembers the largest number it has seen can refuse a holder that was overtaken.
    ///
    /// It begins near the microseconds since 1970 at which the name was first used.
    #[must_use]
    pub fn fencing_token(&self) -> i64 {
        self.hold.fencing_token
    }

    /// The secret of this acquisition: 128 random bits as 32 hexadecimal digits, as it stands in the column
    /// `secret_key`. Leases that go from hand to hand within a process ([`hand_off`](crate::LocksBuilder::hand_off)) are
    /// one acquisition. Who knows it can release the lock, so it belongs in no log.
    #[must_use]
    pub fn secret_key(&self) -> &str {
        self.hold.lease.key.secret.as_str()
    }

    /// Whether the lock is ours, by what the database last confirmed and a deadline on the local monotonic clock that
    /// counts from before the request for it was sent. Asks nobody and takes no time.
    ///
    /// Once `false` it stays `false`, but for a lease that a transaction was to release
    /// ([`release_in`](Self::release_in), [`commit_and_release`](Self::commit_and_release)) and that was rolled back.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.hold.lease.loss().is_none()
    }

    /// How many handles hold this lock: one, and one more for each [`reenter`](Self::reenter) that is not dropped yet and
    /// for each nested call of [`run`](crate::InsertLock::run) or of an annotated function that is inside.
    #[must_use]
    pub fn hold_count(&self) -> usize {
        self.hold.handles()
    }

    /// Resolves when the lock is lost: it was not renewed in time, somebody else has it, or the `Locks` was closed.
    ///
    /// Resolves by time alone, also when the database does not answer and the application's runtime was blocked.
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time, and called as often as you like: a loss is final.
    pub async fn lost(&self) {
        self.hold.lease.lost().await;
    }

    /// Another handle to the same lock, without asking the database. The lock is released when the last one is gone.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when there is nothing left to enter.
    pub fn reenter(&self) -> Result<Self, Error> {
        self.hold.check()?;
        Ok(Self::new(Arc::clone(&self.hold), self.locks.clone()))
    }

    /// Begins a transaction on a connection of the application's pool that commits only while this lease is ours.
    ///
    /// Begun after the lease was granted, it sees everything that earlier holders have committed, at every isolation level.
    /// Commits of this lease that are under way are waited for.
    ///
    /// On MySQL and MariaDB, statements that commit by themselves (`CREATE`, `ALTER`, `DROP`, `TRUNCATE`, `LOCK TABLES`,
    /// `START TRANSACTION` and [others](https://dev.mysql.com/doc/refman/8.4/en/implicit-commit.html)) do not belong in
    /// it: they commit what was written before them, without asking whether the lease is held.
    /// [`commit`](GuardedTransaction::commit) then answers [`Error::Lost`] with [`Loss::TransactionEnded`]. The same goes
    /// for a COMMIT or ROLLBACK that is sent as text, on every database.
    ///
    /// ```no_run
    /// # async fn example(lease: lock_db::Lease<sqlx::Postgres>) -> Result<(), Box<dyn std::error::Error>> {
    /// let mut transaction = lease.begin().await?;
    /// sqlx::query("UPDATE stock SET left_over = left_over - 1").execute(&mut *transaction).await?;
    /// transaction.commit().await?;    // Err(Error::Lost) if somebody else has the lock by now, and nothing is written
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] at once when the lease is lost, when it gets lost while the pool has no connection, or when an earlier
    /// transaction of it may still be committed, for all we know;
    /// [`Error::Timeout`] when the pool gave up first; [`Error::Database`].
    ///
    /// # Cancel safety
    ///
    /// May be dropped at any time: a transaction that was begun meanwhile is rolled back.
    pub async fn begin(&self) -> Result<GuardedTransaction<DB>, Error> {
        GuardedTransaction::begin(&self.locks, &self.hold).await
    }

    /// Makes sure, in a transaction of the caller's own, that the lease is ours, and that nobody else can take it before
    /// the transaction ends. Best the last statement before the commit: on MySQL and MariaDB the lease can't be renewed
    /// from here to there, and on SQLite nobody else can write.
    ///
    /// The transaction must be in the database of the lock, and begun after the lease was granted: else it may
    /// have read what an earlier holder has changed since, and is refused.
    ///
    /// PostgreSQL ends the transaction when it is idle for longer than the TTL from here on
    /// (`idle_in_transaction_session_timeout`, for this transaction only), so that a host that vanishes keeps nobody from
    /// the lock. MySQL and MariaDB have no such limit for one transaction: there the lock is kept until the server finds out
    /// that the connection is gone. [`begin`](Self::begin) has no such gap.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when somebody else has the lock, or when an earlier transaction of the lease may still be committed:
    /// the transaction must be rolled back, and can't be committed any more. [`Error::Serialization`] likewise when
    /// the transaction sees the database as it was before the lease was granted (a lease that came from another caller of this process: the first
    /// time, in REPEATABLE READ and above, also when it does not); and, as [`Error::Deadlock`], when the database
    /// ended the transaction. [`Error::NotInTransaction`], [`Error::Database`].
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, roll the transaction back: nobody knows whether the lease was ours.
    pub async fn verify_in(&self, transaction: &mut DB::Connection) -> Result<(), Error> {
        self.ask_in(transaction, false).await
    }

    /// Releases the lock together with the commit of a transaction: others get it exactly then, and not at all when the
    /// transaction is rolled back, in which case the lease goes on. Includes what [`verify_in`](Self::verify_in) does.
    ///
    /// Until the transaction has ended nobody knows which it is, and [`is_held`](Self::is_held) is `false`. The transaction
    /// should end within the TTL.
    ///
    /// # Errors
    ///
    /// As [`verify_in`](Self::verify_in). In REPEATABLE READ and above on PostgreSQL also [`Error::Serialization`] when the
    /// lease was renewed, or somebody came to wait for it, since the transaction's first statement.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, roll the transaction back.
    pub async fn release_in(&self, transaction: &mut DB::Connection) -> Result<(), Error> {
        self.refuse_without_transaction(transaction)?;
        if self.hold.lease.is_kept() {
            // Not free with the commit, but released with the last handle, as without a transaction.
            return self.ask_in(transaction, false).await;
        }
        // To the end of the call, or of the future that is dropped on the way.
        let _in_doubt = Hold::doubt(KeptByTransaction::new(&self.hold));
        self.ask_in(transaction, true).await
    }

    /// Commits a guarded transaction of this lease and releases the lock with it: check, release and commit cost one
    /// statement more than the bare commit.
    ///
    /// # Errors
    ///
    /// As [`GuardedTransaction::commit`]; then the lock is released in the background, if it was still ours.
    /// [`Error::InvalidOption`] when the transaction is of another lease; it is rolled back.
    ///
    /// # Cancel safety
    ///
    /// The commit goes on when the future is dropped; only the answer is lost.
    pub async fn commit_and_release(self, transaction: GuardedTransaction<DB>) -> Result<(), Error> {
        if !transaction.is_of(&self.hold) {
            return Err(Error::InvalidOption {
                option: "transaction",
                value: format!("{transaction:?}"),
                reason: "it was begun by another lease",
            });
        }
        let release = !self.hold.lease.is_kept();
        transaction.end(release).await?;
        if !release {
            // Committed is committed.
            release_quietly(self.release().await);
        }
        Ok(())
    }

    async fn ask_in(&self, transaction: &mut DB::Connection, release: bool) -> Result<(), Error> {
        self.refuse_without_transaction(transaction)?;
        if let Err(refused) = self.hold.refuse_after_unknown_commit().and(self.hold.refuse_after_loss()) {
            bounds::doom::<DB>(transaction).await;
            return Err(refused);
        }
        // How the caller's transaction ends is not told here.
        self.hold.lease.is_verified();
        let key = &self.hold.marked_key().await?;
        let name = &key.row.name;
        let limit = DB::GUARD_LIMIT + ANSWER_LIMIT;
        match bounds::answer::<DB, _>(limit, DB::guard(transaction, key, release)).await {
            Ok(Guarded::Ours | Guarded::Committed { .. }) => Ok(()),
            Ok(found @ (Guarded::NotOurs | Guarded::Elsewhere)) => {
                let is_foreign = found == Guarded::Elsewhere || self.is_foreign(transaction).await;
                if !is_foreign {
                    bounds::doom::<DB>(transaction).await;
                }
                let is_still_ours = self.is_still_ours().await;
                if is_foreign && matches!(is_still_ours, Ok(true)) {
                    return Err(Error::ForeignTransaction { name: name.given() });
                }
                bounds::doom::<DB>(transaction).await;
                if is_still_ours? {
                    return Err(Error::Serialization { name: name.given(), source: None });
                }
                self.hold.is_lost();
                Err(self.hold.taken_over().await)
            }
            Ok(Guarded::Stale) => {
                bounds::doom::<DB>(transaction).await;
                Err(Error::Serialization { name: name.given(), source: None })
            }
            Ok(Guarded::Ended) => {
                bounds::doom::<DB>(transaction).await;
                Err(self.hold.lost(Loss::TransactionEnded))
            }
            Err(failure) => {
                if failure.fault == Fault::TableMissing && matches!(self.is_still_ours().await, Ok(true)) {
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
                Err(failure.into_error("verify the lock", Some(name)))
            }
        }
    }

    async fn is_foreign(&self, transaction: &mut DB::Connection) -> bool {
        let is_here = DB::is_here(transaction, &self.hold.lease.key.server);
        matches!(bounds::answer::<DB, _>(ANSWER_LIMIT, is_here).await, Ok(false))
    }

    /// Whether the row is ours, as others see it: not the transaction of the caller, which may look at an older table. An error is no
    /// answer: the lease goes on then.
    async fn is_still_ours(&self) -> Result<bool, Error> {
        let key = &self.hold.lease.key;
        let name = key.row.name.clone();
        let asked = self.locks.session().ask(|answer| Request::Look { name, answer });
        let Ok(row) = timeout(CONFIRM_LIMIT, asked).await else {
            let failure = Failure::no_answer::<DB>(CONFIRM_LIMIT);
            return Err(failure.into_error("verify the lock", Some(&key.row.name)));
        };
        Ok(row?.is_some_and(|row| row.is_of(&key.secret, key.fencing_token)))
    }

    fn refuse_without_transaction(&self, connection: &mut DB::Connection) -> Result<(), Error> {
        if connection.is_in_transaction() {
            return Ok(());
        }
        Err(Error::NotInTransaction { name: self.name().to_owned() })
    }

    /// Releases the lock and waits until the database has confirmed it: others can take it from then on. On a handle
    /// that is not the last one this only gives up the handle. When a caller of the same process is next
    /// ([`hand_off`](crate::LocksBuilder::hand_off)), that one has the lease now, and the database is not asked.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when the lock was not ours any more: what was done under it may have overlapped with somebody
    /// else. [`Error::Database`] when the database confirms nothing for five seconds or a TTL; the lock is then free
    /// after its TTL at the latest.
    ///
    /// # Cancel safety
    ///
    /// The release goes on when the future is dropped; only the answer is lost.
    pub async fn release(self) -> Result<(), Error> {
        self.into_hold().give_up().await
    }

    pub(super) fn begin_to_release(self) -> Result<GivenUp, Error> {
        self.into_hold().begin_to_give_up()
    }

    pub(super) async fn run_until_lost<F: Future>(&self, work: F) -> Result<F::Output, Error> {
        self.hold.run_until_lost(work).await
    }
}

impl<DB: LockDatabase> std::fmt::Debug for Lease<DB> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Lease")
            .field("name", &self.name())
            .field("fencing_token", &self.fencing_token())
            .field("is_held", &self.is_held())
            .field("hold_count", &self.hold_count())
            .finish_non_exhaustive()
    }
}
