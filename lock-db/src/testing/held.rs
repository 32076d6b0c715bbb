//! Asking what the running code is inside of.

use std::sync::Arc;

use crate::in_transaction::HeldInTransaction;
use crate::{Kind, reentry, testing};

tokio::task_local! {
    /// The locks of the annotated functions around the running code that have theirs in a transaction of the caller: those
    /// have no frame, because the database counts for them.
    static IN_TRANSACTIONS: Arc<InTransaction>;
}

/// One of them, and those around it.
struct InTransaction {
    name: String,
    around: Option<Arc<InTransaction>>,
}

/// Runs the body of a function whose lock is in the caller's transaction.
pub(crate) async fn inside_of<F: Future>(held: Option<&HeldInTransaction>, body: F) -> F::Output {
    let Some(held) = held else { return body.await };
    let around = IN_TRANSACTIONS.try_with(Arc::clone).ok();
    let lock = InTransaction { name: held.name().to_owned(), around };
    IN_TRANSACTIONS.scope(Arc::new(lock), body).await
}

/// Asserts that this code runs under the lock of that name: in the body of an annotated function, in the work of
/// [`run`](crate::InsertLock::run), or in what those call.
///
/// ```
/// use lock_db::{distributed_lock, testing};
///
/// #[distributed_lock("account:{id}")]
/// async fn withdraw(id: i64) -> Result<(), lock_db::Error> {
///     write(id).await;
///     Ok(())
/// }
///
/// async fn write(id: i64) {
///     # /*
///     #[cfg(test)]
///     # */
///     testing::assert_held(format!("account:{id}"));
///     // …
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let locks = testing::locks().await?;
/// locks.scope(withdraw(7)).await?;
/// # Ok(())
/// # }
/// ```
///
/// It looks at where this code was called from, and asks no database. So it does not see what is held by a guard
/// ([`Lease`](crate::Lease), [`RowGuard`](crate::RowGuard): ask those), by another task, or by a transaction in which the
/// caller has taken a lock by [`acquire_in`](crate::RowLock::acquire_in); and after a body has ended the transaction
/// that its lock is in (`tx = …`), it does not notice. Which [`Locks`](crate::Locks) the lock is of does not matter.
///
/// # Panics
///
/// When it does not, which is what it is for. The message says which locks this code runs under instead.
#[track_caller]
pub fn assert_held(name: impl AsRef<str>) {
    if let Err(message) = find(name.as_ref()) {
        // An assertion of a test.
        #[allow(clippy::panic)]
        {
            panic!("{message}");
        }
    }
}

/// Fails with a message for people.
fn find(name: &str) -> Result<(), String> {
    let around = reentry::around();
    let in_transactions = IN_TRANSACTIONS.try_with(Arc::clone).ok();
    let in_transactions: Vec<_> =
        std::iter::successors(in_transactions.as_deref(), |lock| lock.around.as_deref()).collect();
    let is_held = around.iter().any(|frame| frame.is_held && frame.name.shown() == name)
        || in_transactions.iter().any(|lock| lock.name == name);
    if is_held {
        return Ok(());
    }

    let mut held: Vec<String> = Vec::new();
    let frames = around.iter().filter(|frame| frame.is_held);
    let frames = frames.map(|frame| format!("`{}` ({})", frame.name, frame.kind));
    let in_transactions = in_transactions
        .iter()
        .map(|lock| format!("`{}` ({} in the caller's transaction)", lock.name, Kind::Row));
    for lock in frames.chain(in_transactions) {
        // A lock that was entered again counts once.
        if !held.contains(&lock) {
            held.push(lock);
        }
    }
    let held = if held.is_empty() { "no lock".to_owned() } else { held.join(", ") };
    let mut message = format!("lock `{name}` is not held here: this code runs under {held}");
    if around.iter().any(|frame| frame.name.shown() == name) {
        message.push_str("; it was inside of it, but that hold was lost or has ended");
    }
    if testing::is_switched_off() {
        message.push_str(
            "; locking is switched off here by `without_locks`, so functions that were called since run without their locks",
        );
    }
    Err(message)
}
