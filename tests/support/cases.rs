//! The cases of the suites. [`cases!`](crate::cases) registers them, on each kind of database.

use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};

use crate::TestDatabase;
use crate::output::Output;

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

/// Registers the cases of a module: defines its function `cases`, which the module above calls.
/// Used once in a module. A case that is not registered is unused code, and so is a module.
///
/// ```ignore
/// lock_tests::cases! {
///     on every database:
///     one_holder_among_64_tasks,
///     survives_a_blocked_runtime (current_thread);
///
///     on every server:
///     survives_a_cut_connection;
///
///     on postgres:
///     notifies_the_next_process;
///
///     without a database:
///     types_cross_threads,
///     a_paused_clock_does_not_matter (paused);
///
///     in modules: journals, long_writes;
/// }
/// ```
///
/// | section | a case is | its name |
/// |---|---|---|
/// | `on every database` | `async fn case<T: TestDatabase>(database: &T)` | `suite::case::postgres` and so on |
/// | `on every server`: all but SQLite | `async fn case<T: TestServer>(database: &T)` | the same |
/// | `on postgres`, `on mariadb`, `on mysql`, `on sqlite` | the same, or with this type of database | the same |
/// | `on galera` | `async fn case(cluster: &GaleraCluster)` | `suite::case` |
/// | `without a database` | `fn case()` | `suite::case` |
///
/// A case with a database runs on a runtime with two worker threads, or on one thread with
/// `(current_thread)`. A case without a database is an `async fn` with `(current_thread)`,
/// `(two_workers)` or `(paused)`, whose clock is paused.
///
/// A case whose server is not configured is reported as ignored.
#[macro_export]
macro_rules! cases {
    ($($sections:tt)*) => {
        /// The cases of this module and of those in it.
        pub(crate) fn cases() -> ::std::vec::Vec<$crate::Case> {
            let mut cases = ::std::vec::Vec::new();
            $crate::__sections!(cases $($sections)*);
            cases
        }
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __sections {
    ($cases:ident) => {};
    ($cases:ident on every database: $($case:ident $(($runtime:ident))?),* $(,)? $(; $($rest:tt)*)?) => {
        $($crate::__on!($cases PostgresServer MariaDbServer MySqlServer SqliteFile: $case ($($runtime)?));)*
        $crate::__sections!($cases $($($rest)*)?);
    };
    ($cases:ident on every server: $($case:ident $(($runtime:ident))?),* $(,)? $(; $($rest:tt)*)?) => {
        $($crate::__on!($cases PostgresServer MariaDbServer MySqlServer: $case ($($runtime)?));)*
        $crate::__sections!($cases $($($rest)*)?);
    };
    ($cases:ident on postgres: $($case:ident $(($runtime:ident))?),* $(,)? $(; $($rest:tt)*)?) => {
        $($crate::__on!($cases PostgresServer: $case ($($runtime)?));)*
        $crate::__sections!($cases $($($rest)*)?);
    };
    ($cases:ident on mariadb: $($case:ident $(($runtime:ident))?),* $(,)? $(; $($rest:tt)*)?) => {
        $($crate::__on!($cases MariaDbServer: $case ($($runtime)?));)*
        $crate::__sections!($cases $($($rest)*)?);
    };
    ($cases:ident on mysql: $($case:ident $(($runtime:ident))?),* $(,)? $(; $($rest:tt)*)?) => {
        $($crate::__on!($cases MySqlServer: $case ($($runtime)?));)*
        $crate::__sections!($cases $($($rest)*)?);
    };
    ($cases:ident on sqlite: $($case:ident $(($runtime:ident))?),* $(,)? $(; $($rest:tt)*)?) => {
        $($crate::__on!($cases SqliteFile: $case ($($runtime)?));)*
        $crate::__sections!($cases $($($rest)*)?);
    };
    ($cases:ident on galera: $($case:ident),* $(,)? $(; $($rest:tt)*)?) => {
        $($crate::__on!($cases GaleraCluster: $case ());)*
        $crate::__sections!($cases $($($rest)*)?);
    };
    ($cases:ident without a database: $($case:ident $(($runtime:ident))?),* $(,)? $(; $($rest:tt)*)?) => {
        $($crate::__without_database!($cases $case $($runtime)?);)*
        $crate::__sections!($cases $($($rest)*)?);
    };
    ($cases:ident in modules: $($module:ident),* $(,)? $(; $($rest:tt)*)?) => {
        $($cases.extend($module::cases());)*
        $crate::__sections!($cases $($($rest)*)?);
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __on {
    ($cases:ident $($database:ident)*: $case:ident $runtime:tt) => {
        $($cases.push($crate::Case::on(
            module_path!(),
            stringify!($case),
            $crate::__runtime! $runtime,
            async |database: &$crate::$database| $case(database).await,
        ));)*
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __without_database {
    ($cases:ident $case:ident) => {
        $cases.push($crate::Case::new(module_path!(), stringify!($case), $case));
    };
    ($cases:ident $case:ident $runtime:ident) => {
        $cases.push($crate::Case::new(module_path!(), stringify!($case), || {
            $crate::run_future($crate::__runtime!($runtime), $case());
        }));
    };
}

#[doc(hidden)]
#[macro_export]
macro_rules! __runtime {
    () => {
        $crate::CaseRuntime::TwoWorkers
    };
    (two_workers) => {
        $crate::CaseRuntime::TwoWorkers
    };
    (current_thread) => {
        $crate::CaseRuntime::CurrentThread
    };
    (paused) => {
        $crate::CaseRuntime::Paused
    };
}

/// A case of a suite, perhaps on one of the databases.
pub struct Case {
    pub(crate) name: String,
    pub(crate) run: Box<dyn FnOnce() + Send>,
}

impl Case {
    /// A case without a database.
    pub fn new(module_path: &str, case: &str, run: impl FnOnce() + Send + 'static) -> Self {
        Self { name: format!("{}::{case}", suite(module_path)), run: Box::new(run) }
    }

    /// A case on a new database of one kind.
    pub fn on<T: TestDatabase>(
        module_path: &str,
        case: &str,
        runtime: CaseRuntime,
        run: impl AsyncFnOnce(&T) + Send + 'static,
    ) -> Self {
        let name = match T::NAME {
            "galera" => case.to_owned(),
            database => format!("{case}::{database}"),
        };
        Self::new(module_path, &name, move || run_case(runtime, run))
    }
}

impl std::fmt::Debug for Case {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Case").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The suite is the module below the test binary, or the binary itself if it has no modules.
fn suite(module_path: &str) -> &str {
    module_path.split_once("::").map_or(module_path, |(_binary, suite)| suite)
}

/// The runtime of a case.
#[derive(Debug, Clone, Copy)]
pub enum CaseRuntime {
    TwoWorkers,
    CurrentThread,
    /// On one thread, with a clock that is paused.
    Paused,
}

impl CaseRuntime {
    fn start(self) -> Runtime {
        let mut builder = match self {
            Self::TwoWorkers => Builder::new_multi_thread(),
            Self::CurrentThread | Self::Paused => Builder::new_current_thread(),
        };
        if matches!(self, Self::Paused) {
            builder.start_paused(true);
        }
        let output = Output::of_this_thread();
        builder.on_thread_start(move || Output::attach(output.clone()));
        builder.worker_threads(2).enable_all().build().expect("starts a runtime")
    }
}

/// Why a case was not run. The payload of an unwinding that is not a panic.
pub(crate) struct Ignored(pub(crate) String);

/// Ends the case, which is then reported as ignored. Called by the case itself, not by a task.
pub fn ignore(reason: impl Display) -> ! {
    resume_unwind(Box::new(Ignored(reason.to_string())))
}

/// Runs a case on a new database. The database is dropped last, however the case ends.
pub fn run_case<T: TestDatabase>(runtime: CaseRuntime, case: impl AsyncFnOnce(&T)) {
    let runtime = runtime.start();
    let database = runtime.block_on(T::create());
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

/// Runs a case without a database.
pub fn run_future(runtime: CaseRuntime, case: impl Future<Output = ()>) {
    runtime.start().block_on(case);
}
