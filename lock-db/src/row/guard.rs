//! The guard of a row lock that has a transaction of its own.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use sqlx::Transaction;
use tokio::runtime::Handle;

use crate::Error;
use crate::database::LockDatabase;
use crate::error::{Failure, Loss};

/// A row lock that is held by a transaction of its own, to which this derefs: `&mut *guard` runs statements in it.
///
/// [`commit`](Self::commit) or [`rollback`](Self::rollback) end the transaction and with it the lock. Dropping the guard
/// rolls back in the background.
#[must_use = "the lock is released as soon as the guard is dropped"]
#[clippy::has_significant_drop]
pub struct RowGuard<DB: LockDatabase> {
    /// Taken only by what consumes or drops the guard.
    transaction: Option<Transaction<'static, DB>>,
    name: Arc<str>,
    fencing_token: i64,
    /// sqlx rolls a dropped transaction back in a task, and panics where there is no runtime to run it.
    runtime: Handle,
}

impl<DB: LockDatabase> RowGuard<DB> {
    pub(super) fn new(
        transaction: Transaction<'static, DB>,
        name: Arc<str>,
        fencing_token: i64,
        runtime: Handle,
    ) -> Self {
        Self { transaction: Some(transaction), name, fencing_token, runtime }
    }

    /// The name of the lock.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Commits the transaction, which frees the lock.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when the transaction is not the one any more in which the lock was taken, or an earlier error has
    /// doomed it: then nothing of it is kept. [`Error::Database`] when the commit failed, or when the connection broke on
    /// the way: whether it was committed is then unknown.
    ///
    /// # Cancel safety
    ///
    /// The commit goes on when the future is dropped; only the answer is lost.
    pub async fn commit(mut self) -> Result<(), Error> {
        let Some(mut transaction) = self.transaction.take() else {
            return Ok(());
        };
        let (name, fencing_token) = (Arc::clone(&self.name), self.fencing_token);
        let ended = in_task(&self.runtime, Arc::clone(&self.name), async move {
            // PostgreSQL answers the COMMIT of a failed transaction without an error, and InnoDB lets statements after a
            // deadlock through one by one: what tells is whether our own write is still there.
            let lost = || Error::Lost { name: name.to_string(), reason: Loss::TransactionEnded };
            if !matches!(DB::still_locked(&mut transaction, &name, fencing_token).await, Ok(true)) {
                DB::reopen(&mut transaction).await;
                let _ = transaction.rollback().await;
                return Err(lost());
            }
            transaction
                .commit()
                .await
                .map_err(|error| Failure::new::<DB>(error).into_error("commit the transaction", Some(&name)))
        });
        drop(self);
        ended.await
    }

    /// Rolls the transaction back, which frees the lock.
    ///
    /// # Errors
    ///
    /// [`Error::Database`] when the connection broke, which rolls back too.
    ///
    /// # Cancel safety
    ///
    /// The rollback goes on when the future is dropped; only the answer is lost.
    pub async fn rollback(mut self) -> Result<(), Error> {
        let Some(transaction) = self.transaction.take() else {
            return Ok(());
        };
        let name = Arc::clone(&self.name);
        let ended = in_task(&self.runtime, Arc::clone(&self.name), async move {
            transaction.rollback().await.map_err(|error| {
                Failure::new::<DB>(error).into_error("roll back the transaction", Some(&name))
            })
        });
        drop(self);
        ended.await
    }
}

/// The end of a transaction must not be cut in half by a future that is dropped.
fn in_task(
    runtime: &Handle,
    name: Arc<str>,
    end: impl Future<Output = Result<(), Error>> + Send + 'static,
) -> impl Future<Output = Result<(), Error>> + Send + 'static {
    let task = runtime.spawn(end);
    async move {
        task.await.unwrap_or_else(|_runtime_shut_down| {
            Err(Error::Lost { name: name.to_string(), reason: Loss::TransactionEnded })
        })
    }
}

impl<DB: LockDatabase> Deref for RowGuard<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &Self::Target {
        match &self.transaction {
            Some(transaction) => transaction,
            None => unreachable!("the guard is consumed by what takes its transaction"),
        }
    }
}

impl<DB: LockDatabase> DerefMut for RowGuard<DB> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        match &mut self.transaction {
            Some(transaction) => transaction,
            None => unreachable!("the guard is consumed by what takes its transaction"),
        }
    }
}

impl<DB: LockDatabase> Drop for RowGuard<DB> {
    fn drop(&mut self) {
        if let Some(transaction) = self.transaction.take() {
            let _entered = self.runtime.enter();
            drop(transaction);
        }
    }
}

impl<DB: LockDatabase> std::fmt::Debug for RowGuard<DB> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("RowGuard").field("name", &self.name).finish_non_exhaustive()
    }
}
