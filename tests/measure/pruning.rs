//! Measures how long it takes to remove a million unused rows, what acquires take meanwhile, and
//! what becomes of the size of the table. docs/performance.md has the figures.
//!
//! ```sh
//! cargo run --release -p lock-tests --example measure_pruning              # a million rows
//! cargo run --release -p lock-tests --example measure_pruning -- 100000
//! ```
//!
//! It uses SQLite, and the servers of `LOCK_DB_TEST_POSTGRES_URL`, `LOCK_DB_TEST_MARIADB_URL` and
//! `LOCK_DB_TEST_MYSQL_URL`, as `tests/run --servers-only` prints them. Each gets a database of its
//! own, which is dropped at the end.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lock_db::Locks;
use lock_tests::{Backend, MariaDbServer, MySqlServer, PostgresServer, SqliteFile, TestDatabase};
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

const DAY: Duration = Duration::from_hours(24);
const ROWS_IN_A_STATEMENT: usize = 5_000;
const BASELINE: Duration = Duration::from_secs(10);
/// Each caller uses its names in turn.
const NAMES: usize = 64;

fn main() {
    let rows = std::env::args().nth(1).map_or(1_000_000, |rows| rows.parse().expect("a number of rows"));
    println!("{rows} rows\n");
    measure_on::<SqliteFile>(rows);
    let is_there = |server: &str| std::env::var(format!("LOCK_DB_TEST_{server}_URL")).is_ok();
    if is_there("POSTGRES") {
        measure_on::<PostgresServer>(rows);
    }
    if is_there("MARIADB") {
        measure_on::<MariaDbServer>(rows);
    }
    if is_there("MYSQL") {
        measure_on::<MySqlServer>(rows);
    }
}

fn measure_on<T: TestDatabase>(rows: usize) {
    let runtime = Runtime::new().expect("starts a runtime");
    let database = runtime.block_on(T::create());
    runtime.block_on(measure(&database, rows));
    runtime.shutdown_timeout(Duration::from_secs(5));
    // Drops it on the server, too.
    drop(database);
}

async fn measure<T: TestDatabase>(database: &T, rows: usize) {
    if T::NAME == "sqlite" {
        database.find_text("PRAGMA journal_mode = WAL").await;
    }
    let (locks, other) = (database.locks().await, database.locks().await);
    let started = Instant::now();
    insert_old(database, rows).await;
    println!("{}: inserted in {:.1?}, {}", T::NAME, started.elapsed(), size(database).await);

    let callers = [call(&locks, "same"), call(&other, "other")];
    tokio::time::sleep(BASELINE).await;
    for caller in callers {
        println!("  before, {}", caller.end().await);
    }

    let callers = [call(&locks, "same"), call(&other, "other")];
    let started = Instant::now();
    let removed = locks.prune(DAY).await.expect("prunes");
    println!("  removed {removed} rows in {:.1?}", started.elapsed());
    for caller in callers {
        println!("  meanwhile, {}", caller.end().await);
    }
    let started = Instant::now();
    assert_eq!(locks.prune(DAY).await.expect("prunes"), 0);
    println!("  a walk through what is left: {:.1?}; {}", started.elapsed(), size(database).await);
    for tidy in tidy_up::<T>() {
        database.run(tidy).await;
        println!("  after {tidy}: {}", size(database).await);
    }
}

/// Names of 26 bytes that were used once.
async fn insert_old<T: TestDatabase>(database: &T, rows: usize) {
    let time = "'2020-01-01 00:00:00.000000'";
    let numbers: Vec<usize> = (0..rows).collect();
    for part in numbers.chunks(ROWS_IN_A_STATEMENT) {
        let values: Vec<String> = part
            .iter()
            .map(|number| {
                let token = 1_577_836_800_000_000_i64;
                format!("('customer-order:{number:011}', '{number:032x}', 'host/1', {token}, {time}, {time})")
            })
            .collect();
        let columns = "lock_name, secret_key, owner, fencing_token, create_time, acquire_time";
        let values = values.join(",");
        database.run(&format!("INSERT INTO distributed_lock ({columns}) VALUES {values}")).await;
    }
}

struct Caller {
    ends: Arc<AtomicBool>,
    times: JoinHandle<Vec<Duration>>,
    locks: &'static str,
}

/// Acquires and releases known names, one after the other.
fn call<DB: Backend>(locks: &Locks<DB>, of: &'static str) -> Caller {
    let (locks, ends) = (locks.clone(), Arc::new(AtomicBool::new(false)));
    let is_over = Arc::clone(&ends);
    let times = tokio::spawn(async move {
        let mut times = Vec::new();
        for number in 0.. {
            if is_over.load(Ordering::Relaxed) {
                break;
            }
            let name = format!("known:{of}:{}", number % NAMES);
            let started = Instant::now();
            let lease = locks.insert_lock(name).acquire().await.expect("acquires");
            times.push(started.elapsed());
            lease.release().await.expect("releases");
        }
        times
    });
    Caller { ends, times, locks: of }
}

impl Caller {
    async fn end(self) -> String {
        self.ends.store(true, Ordering::Relaxed);
        let mut times = self.times.await.expect("calls");
        // The first round makes the rows.
        times.drain(..NAMES.min(times.len() / 2));
        times.sort_unstable();
        let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
        format!(
            "{} `Locks`: {} acquires, median {:.2?}, p99 {:.2?}, slowest {:.2?}",
            self.locks,
            times.len(),
            at(0.5),
            at(0.99),
            at(1.0)
        )
    }
}

async fn size<T: TestDatabase>(database: &T) -> String {
    let bytes = match T::NAME {
        "postgres" => database.number("SELECT pg_total_relation_size('distributed_lock')").await,
        "sqlite" => {
            database.number("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size").await
        }
        server => {
            let spaces = if server == "mysql" { "INNODB_TABLESPACES" } else { "INNODB_SYS_TABLESPACES" };
            let sql = format!(
                "SELECT CAST(file_size AS SIGNED) FROM information_schema.{spaces}
                WHERE name = CONCAT(DATABASE(), '/distributed_lock')"
            );
            database.number(&sql).await
        }
    };
    format!("{} MB", bytes / 1_000_000)
}

fn tidy_up<T: TestDatabase>() -> &'static [&'static str] {
    match T::NAME {
        "postgres" => &["VACUUM distributed_lock", "VACUUM FULL distributed_lock"],
        "sqlite" => &["VACUUM"],
        _ => &["OPTIMIZE TABLE distributed_lock"],
    }
}
