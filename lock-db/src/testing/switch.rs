//! Switching the locks of annotated functions off.

use std::panic::Location;
use std::time::Duration;

use crate::{Error, limits, name};

tokio::task_local! {
    static SWITCHED_OFF: ();
}

/// Runs a future in which annotated functions run **without their locks**: for the unit test of what a function does, where
/// taking the lock is not what is tested and no database is at hand.
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
/// It is loud: the call itself, and every function that runs without its lock, is a warning of `tracing`, with the name
/// of the lock and the place of this call.
///
/// What it does and does not do:
///
/// - No [`Locks`](crate::Locks) is needed, not even an installed one. Names and durations are checked all the same.
/// - With `tx = …` the transaction is left alone.
/// - A function that binds its lease (`lease = …`) does not run: a [`Lease`](crate::Lease) says that a lock is held, and
///   there is none to be had without one. It returns [`Error::InvalidOption`]; test it with [`locks`](super::locks()).
/// - What is not annotated takes its lock as ever: `insert_lock(..)`, `run`, `row_lock(..)`.
/// - Tasks that the future spawns are not part of it, and what counts is where a call is first polled, as with
///   [`Locks::scope`](crate::Locks::scope).
///
/// It exists only with the cargo feature `testing`, which no program that serves anybody should have: see [the
/// module](super#keeping-it-out-of-production).
///
/// # Cancel safety
///
/// That of the future.
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

/// Asked in front of every annotated function: whether it is to run without its lock. Refuses what would be refused with
/// one.
pub(crate) fn runs_without_lock(
    lock: &str,
    ttl: Option<Duration>,
    wait: Option<Duration>,
) -> Result<bool, Error> {
    if !is_switched_off() {
        return Ok(false);
    }
    name::check("", lock)?;
    ttl.map(limits::check_ttl).transpose()?;
    wait.map(limits::check_wait).transpose()?;
    tracing::warn!(
        lock = %name::escaped(lock),
        "running WITHOUT this lock: `lock_db::testing::without_locks` has switched locking off"
    );
    Ok(true)
}

/// For a function that binds the lease that it runs under.
pub(crate) fn no_lease(lock: &str) -> Error {
    Error::InvalidOption {
        option: "lease",
        value: format!(
            "bound for lock `{}` inside of `lock_db::testing::without_locks`",
            name::escaped(lock)
        ),
        reason: "there is no lease without its lock; test this function with `lock_db::testing::locks()`",
    }
}

/// Once: a program that is built like one to be shipped can switch its locking off.
#[cfg(not(debug_assertions))]
pub(crate) fn warn_of_optimised_program() {
    static SAID: std::sync::Once = std::sync::Once::new();
    SAID.call_once(|| {
        tracing::warn!(
            "lock-db was built with its feature `testing`, which can switch locking off and is for tests only"
        );
    });
}
