//! Turns the cases of a suite into tests, one for each kind of database.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use tokio::runtime::Builder;

use crate::TestDatabase;

/// Longer than any case takes on a slow machine. A case that takes longer hangs.
const PATIENCE: Duration = Duration::from_mins(3);

/// How long to inject faults (`tests/run --faults`), if longer than in an ordinary run of all
/// tests.
pub fn long_run() -> Option<Duration> {
    let seconds = std::env::var("LOCK_DB_TEST_FAULTS_SECONDS").ok().filter(|seconds| !seconds.is_empty())?;
    Some(Duration::from_secs(seconds.parse().expect("LOCK_DB_TEST_FAULTS_SECONDS is a number")))
}

/// How many random rounds a case runs: the value of `LOCK_DB_TEST_ROUNDS`, or `default`.
pub fn rounds(default: usize) -> usize {
    more_rounds().unwrap_or(default)
}

fn more_rounds() -> Option<usize> {
    let rounds = std::env::var("LOCK_DB_TEST_ROUNDS").ok().filter(|rounds| !rounds.is_empty())?;
    Some(rounds.parse().expect("LOCK_DB_TEST_ROUNDS is a number"))
}

/// Creates a test of each case on each kind of database, named `postgres::case`, `mariadb::case`,
/// `mysql::case` and `sqlite::case`. Used once in a module:
///
/// ```ignore
/// for_each_database! {
///     excludes,
///     survives_a_blocked_runtime (current_thread);
///     on servers:
///     survives_a_cut_connection,
/// }
/// ```
///
/// A case is an `async fn case<T: TestDatabase>(database: &T)` or, below `on servers`, an
/// `async fn case<T: TestServer>(database: &T)`. It runs on a runtime with two worker threads, or
/// on the test's own thread with `(current_thread)`.
#[macro_export]
macro_rules! for_each_database {
    (
        $($case:ident $(($runtime:ident))?),* $(,)?
        $(; on servers: $($on_server:ident $(($server_runtime:ident))?),* $(,)?)?
    ) => {
        $crate::for_each_server!(
            $($case $(($runtime))?,)*
            $($($on_server $(($server_runtime))?,)*)?
        );
        $crate::__tests_on!(sqlite SqliteFile $($case $(($runtime))?),*);
    };
}

/// [`for_each_database!`] without SQLite. A case is an
/// `async fn case<T: TestServer>(database: &T)`.
#[macro_export]
macro_rules! for_each_server {
    ($($case:ident $(($runtime:ident))?),* $(,)?) => {
        $crate::__tests_on!(postgres PostgresServer $($case $(($runtime))?),*);
        $crate::__tests_on!(mariadb MariaDbServer $($case $(($runtime))?),*);
        $crate::__tests_on!(mysql MySqlServer $($case $(($runtime))?),*);
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __tests_on {
    ($module:ident $database:ident $($case:ident $(($runtime:ident))?),*) => {
        mod $module {
            $(
                #[test]
                fn $case() {
                    let case = async |database: &$crate::$database| super::$case(database).await;
                    $crate::run_case($crate::__runtime!($($runtime)?), case);
                }
            )*
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __runtime {
    () => {
        $crate::CaseRuntime::TwoWorkers
    };
    (current_thread) => {
        $crate::CaseRuntime::CurrentThread
    };
}

/// The runtime of a case.
#[derive(Debug, Clone, Copy)]
pub enum CaseRuntime {
    TwoWorkers,
    CurrentThread,
}

/// Runs a case on a new database, if this run has such a server. The database is dropped last,
/// however the case ends.
pub fn run_case<T: TestDatabase>(runtime: CaseRuntime, case: impl AsyncFnOnce(&T)) {
    let mut builder = match runtime {
        CaseRuntime::TwoWorkers => Builder::new_multi_thread(),
        CaseRuntime::CurrentThread => Builder::new_current_thread(),
    };
    let runtime = builder.worker_threads(2).enable_all().build().expect("starts a runtime");
    let Some(database) = runtime.block_on(T::create()) else { return };
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        runtime.block_on(async {
            let rounds = u32::try_from(more_rounds().unwrap_or_default()).unwrap_or(u32::MAX);
            let patience = PATIENCE + long_run().unwrap_or_default() + Duration::from_secs(1) * rounds;
            let in_time = tokio::time::timeout(patience, case(&database)).await;
            assert!(in_time.is_ok(), "the case hangs: it did not end within {patience:?}");
        });
    }));
    runtime.shutdown_timeout(Duration::from_secs(5));
    drop(database);
    if let Err(panic) = outcome {
        resume_unwind(panic);
    }
}
