//! The guard of an insert lock.

use std::sync::Arc;

use super::{GuardedTransaction, LeaseWatch, release_quietly};
use crate::Error;
use crate::context::Context;
use crate::database::LockDatabase;
use crate::dropped_at_once::Watched;
use crate::error::Loss;
use crate::session::LeaseHandle;
#[cfg(feature = "testing")]
use crate::test_support;

/// An insert lock that is held. It is renewed in the background, at a third of its TTL, as long as
/// this guard exists.
///
/// Dropping the guard releases the lock in the background. The drop only sends a message: it never
/// blocks, and it works outside of any runtime. Other processes get the lock a moment later.
/// [`release`](Self::release) waits for the release and reports whether the lock was still held. A
/// lock that could not be released before the process ended is free after its TTL.
///
/// A lease protects *work* as long as it [is held](Self::is_held). A process that is paused for
/// longer than the TTL loses the lease and notices it only afterwards. Other systems can reject its
/// late requests by the [fencing token](Self::fencing_token).
///
/// `is_held` uses the monotonic clock of the operating system. That clock stands still while a
/// machine is suspended.
#[must_use = "bind it to a name (`let _lease = …`); `let _ = …` releases it at once"]
#[clippy::has_significant_drop]
pub struct Lease<DB: LockDatabase> {
    pub(super) handle: Watched<Arc<LeaseHandle>>,
    pub(super) context: Arc<Context<DB>>,
}

impl<DB: LockDatabase> Lease<DB> {
    pub(crate) fn new(handle: Arc<LeaseHandle>, context: Arc<Context<DB>>) -> Self {
        Self { handle: Watched::unwatched(handle), context }
    }

    /// A guard that the caller holds, as opposed to one inside a function of lock-db.
    pub(crate) fn of_caller(handle: LeaseHandle, context: Arc<Context<DB>>) -> Self {
        let handle = Arc::new(handle);
        #[cfg(feature = "testing")]
        test_support::note_open_lease(&context, &handle);
        Self { handle: Watched::new(handle, |handle| handle.name().shown().into()), context }
    }

    /// A guard that is handed out together with others.
    pub(super) fn unwatched(self) -> Self {
        Self::new(self.handle.into_inner(), self.context)
    }

    pub(crate) fn handle(&self) -> &LeaseHandle {
        &self.handle
    }

    pub(super) fn shared_handle(&self) -> &Arc<LeaseHandle> {
        &self.handle
    }

    pub(crate) fn into_handle(self) -> Arc<LeaseHandle> {
        self.handle.into_inner()
    }

    /// The name of the lock.
    #[must_use]
    pub fn name(&self) -> &str {
        self.handle.lease.name().shown()
    }

    /// The fencing token: the number of this grant.
    ///
    /// Every later grant of the same name has a larger number, permanently. A resource that
    /// remembers the largest number it has seen can therefore refuse a holder that was overtaken.
    ///
    /// The first number of a name is near the microseconds since 1970 at which the name was first
    /// used.
    #[must_use]
    pub fn fencing_token(&self) -> i64 {
        self.handle.fencing_token
    }

    /// The secret of this acquisition: 128 random bits as 32 hexadecimal digits, as in the column
    /// `secret_key`.
    ///
    /// Leases that are handed on within a process ([`hand_off`](crate::LocksBuilder::hand_off))
    /// belong to one acquisition and share the secret. The secret is enough to release the lock, so
    /// do not log it.
    #[must_use]
    pub fn secret_key(&self) -> &str {
        self.handle.lease.key.secret.as_str()
    }

    /// Whether the lease is held. Takes no time, because it asks no database.
    ///
    /// The answer follows from what the database last confirmed, and from a deadline on the local
    /// monotonic clock. The deadline counts from before the request for the grant was sent.
    ///
    /// Once `false`, the answer stays `false`. The exception is a lease that was to be released by
    /// a transaction ([`release_in`](Self::release_in),
    /// [`commit_and_release`](Self::commit_and_release)) which was then rolled back.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.handle.lease.loss().is_none()
    }

    /// The number of handles that hold this lock.
    ///
    /// Each [`reenter`](Self::reenter) that is not dropped yet counts as one. So does each nested
    /// call of [`run`](crate::InsertLock::run) or of an annotated function that is still running.
    #[must_use]
    pub fn hold_count(&self) -> usize {
        self.handle.count()
    }

    /// Resolves when the lease is lost: it was not renewed in time, another process has the lock,
    /// or the `Locks` was closed.
    ///
    /// The deadline alone is enough. It also resolves in time when the database does not answer,
    /// and as soon as a blocked runtime runs again.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// # let work = async {};
    /// let lease = locks.insert_lock("report:daily").acquire().await?;
    /// tokio::select! {
    ///     () = lease.lost() => eprintln!("stopped: {:?}", lease.loss()),
    ///     () = work => println!("done"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time, and this may be called any number of times: a loss is
    /// final.
    pub async fn lost(&self) {
        self.handle.lease.lost().await;
    }

    /// How the lease was lost. `None` while it is held.
    #[must_use]
    pub fn loss(&self) -> Option<Loss> {
        self.handle.lease.loss()
    }

    /// Resolves as soon as another caller of this process, or another process, waits for this lock. So
    /// a long job can step down at a point where it may be interrupted. The lock does not change.
    ///
    /// It resolves again at once as long as a request waits. Waiters of this process are noticed at
    /// once, those of other processes within about half a second, for which the row is read twice a
    /// second while this is awaited. Not noticed are those of other processes that are
    /// [not in the queue](crate::LockInfo::waiting). After the lease was lost it may never resolve: see
    /// [`lost`](Self::lost).
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// # async fn next_part() -> bool { false }
    /// let lease = locks.insert_lock("reindex").acquire().await?;
    /// loop {
    ///     tokio::select! {
    ///         biased;
    ///         () = lease.lost() => break,
    ///         () = lease.wanted() => break,
    ///         is_left = next_part() => if !is_left { break },
    ///     }
    /// }
    /// lease.release().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time, and this may be called any number of times.
    pub async fn wanted(&self) {
        self.handle.wanted().await;
    }

    /// Returns a watch, for child tasks of the holder that have to end with the lease.
    #[must_use]
    pub fn watch(&self) -> LeaseWatch {
        LeaseWatch::new(&self.handle)
    }

    /// Runs `work` under the lease. When the lease is lost first, `work` is dropped at its next
    /// `.await`.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let lease = locks.insert_lock("report:daily").acquire().await?;
    /// let pages = lease.run_until_lost(async { 12 }).await?;
    /// assert_eq!(pages, 12);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when the lease is lost before `work` has ended, or was lost while `work`
    /// blocked its thread. A release by `work` itself, with the commit of a transaction, is no
    /// error.
    ///
    /// # Cancel safety
    ///
    /// `work` is dropped with the future. The lease is not released by that.
    pub async fn run_until_lost<F: Future>(&self, work: F) -> Result<F::Output, Error> {
        self.handle.run_until_lost(work).await
    }

    /// Returns another handle to the same lock, without asking the database. The lock is released
    /// when the last handle is gone.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when the lease is no longer held.
    pub fn reenter(&self) -> Result<Self, Error> {
        self.handle.check()?;
        Ok(Self::new(Arc::clone(&self.handle), Arc::clone(&self.context)))
    }

    /// Begins a transaction that commits only while this lease is held. It uses a connection of the
    /// application's pool.
    ///
    /// The transaction begins after the lease was granted, so it sees everything that earlier
    /// holders have committed, at every isolation level. It waits for commits of this lease that
    /// are still running.
    ///
    /// Some statements of MySQL and MariaDB commit implicitly: `CREATE`, `ALTER`, `DROP`,
    /// `TRUNCATE`, `LOCK TABLES`, `START TRANSACTION` and
    /// [others](https://dev.mysql.com/doc/refman/8.4/en/implicit-commit.html). Do not use them in
    /// this transaction: they commit what was written before them, without checking the lease.
    /// [`commit`](GuardedTransaction::commit) then returns [`Error::Lost`] with
    /// [`Loss::TransactionEnded`]. The same happens with a COMMIT or ROLLBACK that is sent as text,
    /// on every database.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// # sqlx::query("CREATE TABLE stock (left_over INTEGER)").execute(locks.pool()).await?;
    /// let lease = locks.insert_lock("stock").acquire().await?;
    /// let mut transaction = lease.begin().await?;
    /// sqlx::query("UPDATE stock SET left_over = left_over - 1").execute(&mut *transaction).await?;
    /// // `Err(Error::Lost)` if another process has the lock by now. Nothing is written then.
    /// transaction.commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::Lost`] when the lease is lost, also while waiting for a connection of the pool.
    ///   Also when an earlier transaction of this lease may still be committed
    ///   ([`Loss::CommitUnknown`]).
    /// - [`Error::Timeout`] when the pool has no connection within its own limit.
    /// - [`Error::Unreachable`] when the database can't be reached, does not answer, or the
    ///   connection breaks.
    /// - [`Error::Refused`] when the server refuses the role, the password or the statement for
    ///   want of a right.
    /// - [`Error::Database`] when the transaction can't be begun for another reason. On SQLite also
    ///   when another connection writes for 30 seconds; then it is retryable.
    /// - [`Error::InvalidOption`] outside of a tokio runtime.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. A transaction that was begun in the meantime is
    /// rolled back.
    pub async fn begin(&self) -> Result<GuardedTransaction<DB>, Error> {
        GuardedTransaction::begin(&self.context, &[&*self.handle]).await
    }

    /// Commits a guarded transaction of this lease and releases the lock with it. Check, release
    /// and commit cost one statement more than the bare commit.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let locks = lock_db::testing::locks().await?;
    /// let lease = locks.insert_lock("stock").acquire().await?;
    /// let transaction = lease.begin().await?;
    /// // … statements on `&mut *transaction` …
    /// lease.commit_and_release(transaction).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// - [`Error::InvalidOption`] when the transaction was begun by another lease. It is rolled
    ///   back.
    /// - Otherwise as [`GuardedTransaction::commit`]. After such an error the lock is released in
    ///   the background if it was still held.
    ///
    /// # Cancel safety
    ///
    /// The commit continues when the future is dropped. Only its result is lost.
    pub async fn commit_and_release(self, transaction: GuardedTransaction<DB>) -> Result<(), Error> {
        commit_and_release(self.into_handle(), transaction).await
    }

    /// Releases the lock and waits until the database has confirmed it. Other processes can take
    /// the lock from then on.
    ///
    /// On a handle that is not the last one, this only gives up the handle. When a caller of the
    /// same process is next ([`hand_off`](crate::LocksBuilder::hand_off)), that caller has the
    /// lease now, and the database is not asked.
    ///
    /// # Errors
    ///
    /// - [`Error::Lost`] when the lease was no longer held, or the `Locks` was closed. The work
    ///   under it may have overlapped with that of another holder.
    /// - [`Error::Unreachable`], [`Error::Refused`] and [`Error::Database`] when the database does
    ///   not confirm the release within five seconds or a TTL. The lock is then free after its TTL
    ///   at the latest.
    ///
    /// # Cancel safety
    ///
    /// The release continues when the future is dropped. Only its result is lost.
    pub async fn release(self) -> Result<(), Error> {
        self.into_handle().give_up().await
    }
}

/// See [`Lease::commit_and_release`].
pub(crate) async fn commit_and_release<DB: LockDatabase>(
    handle: Arc<LeaseHandle>,
    transaction: GuardedTransaction<DB>,
) -> Result<(), Error> {
    if !transaction.is_of(&handle) {
        return Err(Error::InvalidOption {
            option: "transaction",
            value: format!("{transaction:?}"),
            reason: "it was begun by another lease",
        });
    }
    let release = !handle.lease.is_within_minimum_hold();
    transaction.end(release).await?;
    if !release {
        // The transaction is committed, so a failed release is no error of this call.
        release_quietly(handle.give_up().await);
    }
    Ok(())
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
