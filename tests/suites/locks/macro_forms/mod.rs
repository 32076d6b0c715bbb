//! Every form of function that `#[distributed_lock]` accepts, in a crate that allows no lint. The
//! generated code must compile there, run under the lock, and be a future that can be spawned.

#![deny(warnings, clippy::all, clippy::pedantic)]
#![deny(unused_qualifications, unused_lifetimes, elided_lifetimes_in_paths, single_use_lifetimes)]
#![allow(clippy::panic, clippy::unwrap_used, clippy::expect_used)]

mod at_least;
mod bodies;
mod contention;
mod futures;
mod guards;
mod methods;
mod names;
mod outcomes;
mod rows;
mod several;

use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use lock_db::{Error, Locks, distributed_lock};
use lock_tests::{SqliteFile, TestDatabase};
use sqlx::Sqlite;

lock_tests::cases! {
    without a database:
    the_body_never_runs_without_the_lock (current_thread),
    a_panic_frees_the_lock (current_thread),
    on_loss_the_body_is_dropped (current_thread);

    in modules: at_least, bodies, contention, futures, guards, methods, names, outcomes, rows, several
}

/// The error type of an application.
#[derive(Debug)]
enum ShopError {
    Lock(Error),
    Number(std::num::ParseIntError),
    SoldOut,
}

impl Display for ShopError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Lock(error) => Display::fmt(error, formatter),
            Self::Number(error) => Display::fmt(error, formatter),
            Self::SoldOut => formatter.write_str("sold out"),
        }
    }
}

impl From<Error> for ShopError {
    fn from(error: Error) -> Self {
        Self::Lock(error)
    }
}

impl From<std::num::ParseIntError> for ShopError {
    fn from(error: std::num::ParseIntError) -> Self {
        Self::Number(error)
    }
}

type Answer<T = i64> = Result<T, ShopError>;

/// Runs a case against a database of its own, as a task: so its future is `Send`. Its locks are
/// also those of the task.
async fn with_locks<F>(case: impl FnOnce(Locks<Sqlite>) -> F)
where
    F: Future<Output = Answer<()>> + Send + 'static,
{
    let database = SqliteFile::create().await;
    let locks = database.locks().await;
    let task = tokio::spawn(locks.scope(case(locks.clone())));
    task.await.expect("the case does not panic").expect("the case succeeds");
    locks.close().await;
}

async fn is_held(locks: &Locks<Sqlite>, name: &str) -> bool {
    let info = locks.info(name).await.expect("the table can be read");
    info.is_some_and(|info| info.held_until.is_some())
}

/// Checks from inside of a body that it runs under the lock.
async fn under(locks: &Locks<Sqlite>, name: &str) {
    assert!(is_held(locks, name).await, "`{name}` is not held");
}

static RUNS: AtomicUsize = AtomicUsize::new(0);

#[distributed_lock("refused:{name}", wait = "0s")]
async fn refused(name: &str) -> Answer<String> {
    RUNS.fetch_add(1, Ordering::Relaxed);
    Ok(name.to_owned())
}

#[distributed_lock("panics")]
async fn panics(fails: bool) -> Answer<bool> {
    assert!(!fails, "on purpose");
    Ok(fails)
}

struct SetOnDrop(Arc<AtomicUsize>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[distributed_lock("never-ends", locks = locks)]
async fn never_ends(locks: Locks<Sqlite>, started: Arc<tokio::sync::Notify>, guard: SetOnDrop) -> Answer<()> {
    under(&locks, "never-ends").await;
    started.notify_one();
    std::future::pending::<()>().await;
    drop(guard);
    Ok(())
}

async fn the_body_never_runs_without_the_lock() {
    with_locks(|locks| async move {
        let lease = locks.insert_lock("refused:a").acquire().await?;
        assert!(matches!(refused("a").await, Err(ShopError::Lock(Error::Timeout { .. }))));
        lease.release().await?;

        let too_long = "x".repeat(300);
        assert!(matches!(refused(&too_long).await, Err(ShopError::Lock(Error::InvalidName { .. }))));
        let outside = tokio::spawn(async { refused("a").await }).await.expect("no panic");
        assert!(matches!(outside, Err(ShopError::Lock(Error::NotInstalled { .. }))));
        assert_eq!(RUNS.load(Ordering::Relaxed), 0);

        refused("a").await?;
        assert_eq!(RUNS.load(Ordering::Relaxed), 1);
        Ok(())
    })
    .await;
}

async fn a_panic_frees_the_lock() {
    with_locks(|locks| async move {
        let failed = tokio::spawn(locks.scope(panics(true))).await;
        assert!(failed.is_err_and(|error| error.is_panic()));
        assert!(!panics(false).await?);
        Ok(())
    })
    .await;
}

async fn on_loss_the_body_is_dropped() {
    with_locks(|locks| async move {
        let (started, dropped) = (Arc::new(tokio::sync::Notify::new()), Arc::new(AtomicUsize::new(0)));
        let guard = SetOnDrop(Arc::clone(&dropped));
        let running = tokio::spawn(never_ends(locks.clone(), Arc::clone(&started), guard));
        started.notified().await;
        assert_eq!(dropped.load(Ordering::Relaxed), 0);
        locks.close().await;
        let lost = running.await.expect("no panic");
        assert!(matches!(lost, Err(ShopError::Lock(Error::Lost { .. }))));
        assert_eq!(dropped.load(Ordering::Relaxed), 1);
        Ok(())
    })
    .await;
}
