//! A transaction that lock-db itself begins, on a connection of the application's pool.

use std::ops::{Deref, DerefMut};

use sqlx::{Pool, Transaction};
use tokio::runtime::Handle;

use crate::Error;
use crate::database::{Fault, Guarded, LockDatabase};
use crate::error::{COMMIT, Failure, Loss};

/// An open transaction, and what is kept until it has ended.
///
/// It is [marked](LockDatabase::BEGIN_MARKED): when the server ends it and its owner has not seen that, what is sent next
/// is refused, as far as the database can do that.
///
/// Dropping it rolls back in a task.
pub(crate) struct OwnTransaction<DB: LockDatabase, K: Send + 'static> {
    /// Both are taken only by what consumes or drops this.
    transaction: Option<Transaction<'static, DB>>,
    kept: Option<K>,
    runtime: Handle,
}

impl<DB: LockDatabase, K: Send + 'static> OwnTransaction<DB, K> {
    /// Begins it with one of the statements of the trait.
    ///
    /// To be called in a task: in sqlx 0.9 a `begin` that is dropped midway puts its connection back into the pool with the
    /// transaction open.
    pub(crate) async fn begin(pool: &Pool<DB>, statement: &'static str, kept: K) -> sqlx::Result<Self> {
        let runtime = Handle::current();
        let transaction = pool.begin_with(statement).await?;
        Ok(Self { transaction: Some(transaction), kept: Some(kept), runtime })
    }

    /// Ends it in a task: cut in half, the end would leave the connection in the middle of something. `None`: the runtime
    /// is shutting down.
    pub(crate) fn end<T: Send + 'static, F: Future<Output = T> + Send + 'static>(
        mut self,
        end: impl FnOnce(Transaction<'static, DB>) -> F,
    ) -> impl Future<Output = Option<T>> + Send + 'static {
        let kept = self.kept.take();
        let task = self.transaction.take().map(|transaction| {
            let end = end(transaction);
            self.runtime.spawn(async move {
                let ended = end.await;
                drop(kept);
                ended
            })
        });
        async move { task?.await.ok() }
    }

    /// Rolls it back. A rollback that fails has lost its connection, which rolls back too.
    pub(crate) async fn roll_back(self) -> sqlx::Result<()> {
        self.end(roll_back).await.unwrap_or(Ok(()))
    }
}

/// Rolls a marked transaction back, whatever has become of it, so that its connection is as it was before.
pub(crate) async fn roll_back<DB: LockDatabase>(
    mut transaction: Transaction<'static, DB>,
) -> sqlx::Result<()> {
    let unmarked = DB::unmark(&mut transaction).await;
    DB::reopen(&mut transaction).await;
    let rolled_back = transaction.rollback().await;
    unmarked.and(rolled_back)
}

/// Commits a marked transaction after one of the `commit_…` methods of the trait has looked whether it may.
pub(crate) async fn commit<DB: LockDatabase>(
    transaction: Transaction<'static, DB>,
    checked: sqlx::Result<Guarded>,
    name: &str,
) -> Result<(), Error> {
    let failed = |failure: Failure| failure.into_error(COMMIT, Some(name));
    let error = match checked.map_err(Failure::new::<DB>) {
        Ok(Guarded::Ours) => {
            return transaction.commit().await.map_err(|error| failed(Failure::new::<DB>(error)));
        }
        Ok(Guarded::Committed) => {
            // Whatever becomes of the connection now.
            let _nothing_left = transaction.commit().await;
            return Ok(());
        }
        Ok(Guarded::NotOurs) => Error::Lost { name: name.to_owned(), reason: Loss::TakenOver },
        Ok(Guarded::Ended) => Error::Lost { name: name.to_owned(), reason: Loss::TransactionEnded },
        // Nothing is kept without a COMMIT.
        Err(failure) if failure.fault == Fault::Disconnected && !DB::COMMITS_WITH_CHECK => {
            Error::Lost { name: name.to_owned(), reason: Loss::TransactionEnded }
        }
        Err(failure) => failed(failure),
    };
    let _rolled_back = roll_back(transaction).await;
    Err(error)
}

/// Tasks need a runtime to run on.
pub(crate) fn current_runtime() -> Result<Handle, Error> {
    Handle::try_current().map_err(|_| Error::InvalidOption {
        option: "runtime",
        value: "none".into(),
        reason: "transactions are begun inside a tokio runtime, like everything of sqlx",
    })
}

impl<DB: LockDatabase, K: Send + 'static> Deref for OwnTransaction<DB, K> {
    type Target = DB::Connection;

    fn deref(&self) -> &Self::Target {
        match &self.transaction {
            Some(transaction) => transaction,
            None => unreachable!("it is consumed by what takes its transaction"),
        }
    }
}

impl<DB: LockDatabase, K: Send + 'static> DerefMut for OwnTransaction<DB, K> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        match &mut self.transaction {
            Some(transaction) => transaction,
            None => unreachable!("it is consumed by what takes its transaction"),
        }
    }
}

impl<DB: LockDatabase, K: Send + 'static> Drop for OwnTransaction<DB, K> {
    fn drop(&mut self) {
        if let Some(transaction) = self.transaction.take() {
            // sqlx rolls a dropped transaction back in a task as well, and panics where there is no runtime to run it.
            let (kept, _entered) = (self.kept.take(), self.runtime.enter());
            drop(self.runtime.spawn(async move {
                let _rolled_back = roll_back(transaction).await;
                drop(kept);
            }));
        }
    }
}
