//! Switches off the locks of annotated functions.

#[cfg(feature = "testing-without-locks")]
use std::panic::Location;
use std::time::Duration;

use crate::text::escaped;
use crate::{Error, name, options};

/// Allows it in an optimised build.
const ALLOWED: &str = "LOCK_DB_ALLOW_WITHOUT_LOCKS";

tokio::task_local! {
    static SWITCHED_OFF: ();
}

/// Runs a future in which annotated functions run **without their locks**. This is for unit tests
/// of what a function does, if the lock is not under test and no database is available.
///
/// ```
/// use lock_db::{distributed_lock, testing};
///
/// #[distributed_lock("greeting:{name}")]
/// async fn greet(name: &str) -> Result<String, lock_db::Error> {
///     Ok(format!("Hello {name}"))
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), lock_db::Error> {
/// let greeting = testing::without_locks(greet("Ada")).await?;
/// assert_eq!(greeting, "Hello Ada");
/// # Ok(())
/// # }
/// ```
///
/// This call logs a `tracing` warning with its location. Every function that runs without its lock
/// logs one with the name of the lock.
///
/// Details:
///
/// - No [`Locks`](crate::Locks) is needed, not even an installed one. Names and durations are still
///   checked.
/// - With `tx = …` the transaction is not used.
/// - A function that binds its lease (`lease = …`) does not run: a [`Lease`](crate::Lease) proves
///   that a lock is held, and there is none without a lock. The function returns
///   [`Error::InvalidOption`]. Test it with [`locks`](crate::testing::locks()).
/// - Code that is not annotated still takes its locks: `insert_lock(..)`, `run`, `row_lock(..)`.
/// - Tasks that the future spawns are not included. What counts is where a call is first polled, as
///   with [`Locks::scope`](crate::Locks::scope).
///
/// It exists only with the cargo feature `testing-without-locks`, for `[dev-dependencies]`: see [the
/// module](crate::testing#keeping-it-out-of-production). A build without debug assertions, such as one to be shipped, refuses every
/// annotated function in here with [`Error::InvalidOption`], unless the environment has
/// `LOCK_DB_ALLOW_WITHOUT_LOCKS=1`.
///
/// # Cancel safety
///
/// The same as that of `future`.
#[cfg(feature = "testing-without-locks")]
#[track_caller]
pub fn without_locks<F: Future>(future: F) -> impl Future<Output = F::Output> + use<F> {
    let place = Location::caller();
    async move {
        tracing::warn!(%place, "`lock_db::testing::without_locks`: annotated functions run WITHOUT their locks in here");
        SWITCHED_OFF.scope((), future).await
    }
}

pub(crate) fn is_switched_off() -> bool {
    SWITCHED_OFF.try_with(|()| ()).is_ok()
}

/// Called before every annotated function: whether it runs without its lock. Rejects the arguments
/// that would be rejected with a lock.
pub(crate) fn runs_without_lock(
    lock: &str,
    ttl: Option<Duration>,
    wait: Option<Duration>,
) -> Result<bool, Error> {
    if !is_switched_off() {
        return Ok(false);
    }
    if !cfg!(debug_assertions) && std::env::var_os(ALLOWED).is_none_or(|value| value != "1") {
        return Err(Error::InvalidOption {
            option: "without_locks",
            value: "in an optimised build".into(),
            reason: "set LOCK_DB_ALLOW_WITHOUT_LOCKS=1 in the environment of such a test",
        });
    }
    name::check("", lock)?;
    ttl.map(options::check_ttl).transpose()?;
    wait.map(options::check_wait).transpose()?;
    tracing::warn!(
        lock = %escaped(lock),
        "running WITHOUT this lock: `lock_db::testing::without_locks` has switched locking off"
    );
    Ok(true)
}

/// The error for a function that binds its lease.
pub(crate) fn no_lease(lock: &str) -> Error {
    Error::InvalidOption {
        option: "lease",
        value: format!("bound for lock `{}` inside of `lock_db::testing::without_locks`", escaped(lock)),
        reason: "there is no lease without its lock; test this function with `lock_db::testing::locks()`",
    }
}

/// Warns once: this program is built as if for release, and can switch off its locks.
#[cfg(not(debug_assertions))]
pub(crate) fn warn_of_optimised_program() {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| {
        tracing::warn!(
            "lock-db was built with its feature `testing`, which can switch locking off and is for tests only"
        );
    });
}
