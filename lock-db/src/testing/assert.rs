//! Assertions about the locks that the running code is inside of.

use std::sync::Arc;

use crate::database::LockDatabase;
use crate::in_transaction::HeldInTransaction;
use crate::reentrancy::Instance;
use crate::test_support::{self, OpenGuard};
use crate::text::escaped;
use crate::{Kind, Locks, global, reentrancy};

tokio::task_local! {
    /// The locks in transactions of the caller that belong to the annotated functions around the
    /// running code. They have no scope, because the database counts them.
    static IN_TRANSACTIONS: Arc<InTransaction>;
}

/// One of these locks, and those around it.
struct InTransaction {
    locks: Instance,
    name: String,
    enclosing: Option<Arc<InTransaction>>,
}

/// Runs the body of a function whose lock is in the caller's transaction.
pub(crate) async fn inside_of<F: Future>(held: Option<&HeldInTransaction>, body: F) -> F::Output {
    let Some(held) = held else { return body.await };
    let enclosing = IN_TRANSACTIONS.try_with(Arc::clone).ok();
    let lock = InTransaction { locks: held.locks, name: held.name().to_owned(), enclosing };
    IN_TRANSACTIONS.scope(Arc::new(lock), body).await
}

/// Asserts that this code runs under the lock of that name: in the body of an annotated function,
/// in the work of [`run`](crate::InsertLock::run), in what those call, or while the test has an
/// open guard of the lock.
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
/// **Bodies** count only if this code was called from them. Bodies in other tasks do not count. If
/// a body has ended the transaction that its lock is in (`tx = …`), this is not noticed.
///
/// **Guards** that were taken explicitly ([`Lease`](crate::Lease), [`RowGuard`](crate::RowGuard))
/// can be moved to any task. Every guard that is open in this *test* therefore counts, whichever of
/// its tasks has it. The test is the tokio runtime on which the guard was taken: `#[tokio::test]`
/// and `#[sqlx::test]` create one for each test. Two tasks of a test, one with a guard and one
/// without, can't be told apart. Inside [`Locks::scope`] only guards of that `Locks` count.
/// Elsewhere guards of any `Locks` count, see [`assert_held_by`]. Inside
/// [`without_locks`](super::without_locks) only guards that were taken there count.
///
/// **Locks in the caller's transaction** ([`acquire_in`](crate::RowLock::acquire_in)) end with a
/// transaction whose end lock-db does not see. The database is therefore asked, by a try on another
/// connection, for at most a quarter of a second. A lock for which it does not answer in time
/// counts as held, and so does a lock that another process has taken since.
///
/// # Panics
///
/// When the lock is not held. The message lists the locks that this code runs under instead.
#[track_caller]
pub fn assert_held(name: impl AsRef<str>) {
    panic_with(find(name.as_ref(), None));
}

/// Asserts that this code runs under the lock of that name, taken through this `Locks` or a clone
/// of it. Locks of another `Locks`, which may stand for another process in a test, do not count.
/// Otherwise as [`assert_held`].
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use lock_db::testing;
///
/// let locks = testing::locks().await?;
/// let lease = locks.insert_lock("order:1").acquire().await?;
/// testing::assert_held_by(&locks, "order:1");
/// # drop(lease);
/// # Ok(())
/// # }
/// ```
///
/// # Panics
///
/// When the lock is not held through this `Locks`.
#[track_caller]
pub fn assert_held_by<DB: LockDatabase>(locks: &Locks<DB>, name: impl AsRef<str>) {
    panic_with(find(name.as_ref(), Some(locks.context().instance())));
}

#[track_caller]
fn panic_with(found: Result<(), String>) {
    if let Err(message) = found {
        // It is an assertion of a test.
        #[allow(clippy::panic)]
        {
            panic!("{message}");
        }
    }
}

/// Fails with a message for people. `locks`: only locks of this instance count.
fn find(name: &str, locks: Option<Instance>) -> Result<(), String> {
    let counts = |of: Instance| locks.is_none_or(|locks| locks == of);
    let enclosing = reentrancy::enclosing();
    let in_transactions = IN_TRANSACTIONS.try_with(Arc::clone).ok();
    let in_transactions: Vec<_> =
        std::iter::successors(in_transactions.as_deref(), |lock| lock.enclosing.as_deref()).collect();
    let is_held =
        enclosing.iter().any(|scope| scope.is_held && counts(scope.locks) && scope.name.shown() == name)
            || in_transactions.iter().any(|lock| counts(lock.locks) && lock.name == name);
    if is_held {
        return Ok(());
    }
    let own = locks.or_else(global::scoped);
    let guards = test_support::of_this_test();
    let is_own = |guard: &OpenGuard| own.is_none_or(|own| own == guard.locks);
    if guards.iter().any(|guard| is_own(guard) && guard.name.shown() == name && guard.is_held()) {
        return Ok(());
    }

    let mut held: Vec<String> = Vec::new();
    let scopes = enclosing.iter().filter(|scope| scope.is_held);
    let scopes = scopes.map(|scope| format!("`{}` ({})", scope.name, scope.kind));
    let in_transactions = in_transactions
        .iter()
        .map(|lock| format!("`{}` ({} in the caller's transaction)", escaped(&lock.name), Kind::Row));
    for lock in scopes.chain(in_transactions) {
        // A lock that was entered again counts once.
        if !held.contains(&lock) {
            held.push(lock);
        }
    }
    let held = if held.is_empty() { "no lock".to_owned() } else { held.join(", ") };
    let mut message = format!("lock `{}` is not held here: this code runs under {held}", escaped(name));
    // The transactions of the others may have ended.
    let open = guards.iter().filter(|guard| !guard.is_in_transaction());
    let open: Vec<_> = open
        .map(|guard| {
            let of_another = if is_own(guard) { "" } else { " of another `Locks`" };
            format!("`{}` ({}{of_another})", guard.name, guard.kind)
        })
        .collect();
    if !open.is_empty() {
        message.push_str("; the test has guards of ");
        message.push_str(&open.join(", "));
    }
    if enclosing.iter().any(|scope| scope.name.shown() == name) {
        message.push_str("; it was inside of it, but that hold was lost or has ended");
    }
    if test_support::is_switched_off() {
        message.push_str(
            "; locking is switched off here by `without_locks`, so functions that were called since run without their locks",
        );
    }
    Err(message)
}
