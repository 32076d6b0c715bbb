//! Asking what the running code is inside of.

use std::sync::Arc;

use super::guards::{self, Guard};
use crate::database::LockDatabase;
use crate::in_transaction::HeldInTransaction;
use crate::name::escaped;
use crate::reentry::Instance;
use crate::{Kind, Locks, ambient, reentry, testing};

tokio::task_local! {
    /// The locks of the annotated functions around the running code that have theirs in a transaction of the caller: those
    /// have no frame, because the database counts for them.
    static IN_TRANSACTIONS: Arc<InTransaction>;
}

/// One of them, and those around it.
struct InTransaction {
    locks: Instance,
    name: String,
    around: Option<Arc<InTransaction>>,
}

/// Runs the body of a function whose lock is in the caller's transaction.
pub(crate) async fn inside_of<F: Future>(held: Option<&HeldInTransaction>, body: F) -> F::Output {
    let Some(held) = held else { return body.await };
    let around = IN_TRANSACTIONS.try_with(Arc::clone).ok();
    let lock = InTransaction { locks: held.locks, name: held.name().to_owned(), around };
    IN_TRANSACTIONS.scope(Arc::new(lock), body).await
}

/// Asserts that this code runs under the lock of that name: in the body of an annotated function, in the work of
/// [`run`](crate::InsertLock::run), in what those call, or while the test has an open guard of it.
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
/// **Bodies** show by where this code was called from: those of another task don't count. After a body has ended the
/// transaction that its lock is in (`tx = …`), that is not noticed.
///
/// **Guards** that were taken by hand ([`Lease`](crate::Lease), [`RowGuard`](crate::RowGuard)) can be moved to any task, so
/// each that is open in this *test* counts, whichever of its tasks has it. The test is the tokio runtime on which the guard was
/// taken: `#[tokio::test]` and `#[sqlx::test]` make one for each. So two tasks of a test, one with a guard and one that has
/// forgotten it, look alike. Inside of [`Locks::scope`] only guards of that `Locks` count; elsewhere those of any, see
/// [`assert_held_by`]. Inside of [`without_locks`](super::without_locks) only those count that were taken in there.
///
/// **Locks in the caller's transaction** ([`acquire_in`](crate::RowLock::acquire_in)) end with a transaction that lock-db does
/// not see the end of. So the database is asked, by a try on another connection, for a quarter of a second at most. What it
/// does not answer in this time counts as held, and so does a lock that another process has taken since.
///
/// # Panics
///
/// When it does not, which is what it is for. The message says which locks this code runs under instead.
#[track_caller]
pub fn assert_held(name: impl AsRef<str>) {
    panic_with(find(name.as_ref(), None));
}

/// As [`assert_held`], by this `Locks` or a clone of it: another one, such as stands for another process in a test, does not
/// count.
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
/// As [`assert_held`].
#[track_caller]
pub fn assert_held_by<DB: LockDatabase>(locks: &Locks<DB>, name: impl AsRef<str>) {
    panic_with(find(name.as_ref(), Some(locks.instance())));
}

#[track_caller]
fn panic_with(found: Result<(), String>) {
    if let Err(message) = found {
        // An assertion of a test.
        #[allow(clippy::panic)]
        {
            panic!("{message}");
        }
    }
}

/// Fails with a message for people. `locks`: only this one counts.
fn find(name: &str, locks: Option<Instance>) -> Result<(), String> {
    let counts = |of: Instance| locks.is_none_or(|locks| locks == of);
    let around = reentry::around();
    let in_transactions = IN_TRANSACTIONS.try_with(Arc::clone).ok();
    let in_transactions: Vec<_> =
        std::iter::successors(in_transactions.as_deref(), |lock| lock.around.as_deref()).collect();
    let is_held =
        around.iter().any(|frame| frame.is_held && counts(frame.locks) && frame.name.shown() == name)
            || in_transactions.iter().any(|lock| counts(lock.locks) && lock.name == name);
    if is_held {
        return Ok(());
    }
    let own = locks.or_else(ambient::scoped);
    let guards = guards::of_this_test();
    let is_own = |guard: &Guard| own.is_none_or(|own| own == guard.locks);
    if guards.iter().any(|guard| is_own(guard) && guard.name.shown() == name && guard.is_held()) {
        return Ok(());
    }

    let mut held: Vec<String> = Vec::new();
    let frames = around.iter().filter(|frame| frame.is_held);
    let frames = frames.map(|frame| format!("`{}` ({})", frame.name, frame.kind));
    let in_transactions = in_transactions
        .iter()
        .map(|lock| format!("`{}` ({} in the caller's transaction)", escaped(&lock.name), Kind::Row));
    for lock in frames.chain(in_transactions) {
        // A lock that was entered again counts once.
        if !held.contains(&lock) {
            held.push(lock);
        }
    }
    let held = if held.is_empty() { "no lock".to_owned() } else { held.join(", ") };
    let mut message = format!("lock `{}` is not held here: this code runs under {held}", escaped(name));
    // Those in transactions may have ended.
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
