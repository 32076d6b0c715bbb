//! Locks under faults: real workers on real servers, whose processes, networks and servers fail by
//! a seeded schedule, and a checker of what they have recorded. docs/testing.md explains the
//! purpose.
//!
//! A failed run prints its seed. With `LOCK_DB_TEST_SEED` set to it, the same faults are injected
//! at the same moments.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::alloc::System;
use std::fs::File;
use std::io::Write;
use std::time::Duration;

use lock_tests::{
    MariaDbKind, MySqlKind, Network, OwnServer, PostgresKind, Proxy, Random, Server, ServerKind,
    TestDatabase, TestServer, ignore, long_run, note, seed,
};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use tokio::time::{Instant, timeout};

use self::broken::Mistake;
use self::checker::Violation;
use self::crew::Way;
use self::nemesis::{Fault, OF_CLOCKS, OF_NETWORKS, OF_PARTITIONS, OF_PROCESSES, OF_SERVERS};
use self::report::Report;
use self::run::{PLACES, Plan, run, run_and_check};
use self::worker::worker;

mod answered;
mod broken;
mod checker;
mod client;
mod crew;
mod events;
mod history;
mod nemesis;
mod report;
mod run;
mod subject;
mod worker;

lock_tests::cases! {
    on every database:
    processes_fail;

    on every server:
    networks_fail,
    processes_and_networks_fail,
    networks_are_parted,
    handwritten_lock_without_a_mistake_passes,
    handwritten_release_without_the_secret_is_found,
    handwritten_expiry_by_the_clients_clock_is_found,
    handwritten_guard_without_a_row_lock_is_found;

    without a database:
    servers_fail_on_postgres,
    servers_fail_on_mariadb,
    servers_fail_on_mysql,
    clocks_move_on_postgres,
    clocks_move_on_mariadb,
    clocks_move_on_mysql,
    answered_grants_survive_postgres,
    answered_grants_survive_mariadb,
    answered_grants_survive_mysql;

    in modules: checker, events
}

lock_tests::child_roles! { worker }

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Of all leases. Short, so that it often passes.
const TTL: Duration = Duration::from_millis(600);
/// How long faults are injected in a round.
const LENGTH: Duration = Duration::from_millis(1500);
/// The same for a long run.
const LONG_LENGTH: Duration = Duration::from_secs(20);
/// How long a run may take, in addition to the time of a long run.
const PATIENCE: Duration = Duration::from_mins(4);

/// One round. A long run has as many as fit into its time, some with all faults mixed, some with a
/// single one.
async fn rounds(what: &str, faults: &[Fault], mut round: impl AsyncFnMut(Plan<'_>) -> Report) {
    let (started, time) = (Instant::now(), long_run());
    let mut seeds = Random(seed());
    // The first seed is the given one, so that a single round can be repeated.
    let mut seed = seeds.0;
    let mut total = Report::default();
    loop {
        let mut choice = Random(!seed);
        let alone = [choice.pick(faults)];
        let is_alone = time.is_some() && choice.below(2) == 0;
        let plan = Plan {
            seed,
            faults: if is_alone { &alone } else { faults },
            length: if time.is_some() { LONG_LENGTH } else { LENGTH },
            mistake: None,
        };
        total.add(round(plan).await);
        if std::env::var_os("LOCK_DB_TEST_SEED").is_some() || started.elapsed() >= time.unwrap_or_default() {
            break;
        }
        seed = seeds.next();
    }
    report(&format!("{what}: {total}"));
}

/// Also into the file that `tests/run --faults` shows at the end.
fn report(line: &str) {
    note(line);
    if let Some(path) = std::env::var_os("LOCK_DB_TEST_FAULTS_REPORT") {
        let mut file = File::options().append(true).create(true).open(path).expect("opens the report");
        writeln!(file, "{line}").expect("writes the report");
    }
}

async fn processes_fail<T: TestDatabase>(_: &T) {
    rounds(&format!("{}, processes", T::NAME), OF_PROCESSES, async |plan| {
        let database = T::create().await;
        let ways =
            (0..PLACES).map(|_| Way { url: database.url().to_owned(), proxy: None, network: None }).collect();
        run(&database, ways, None, plan).await
    })
    .await;
}

fn ways_through_proxies<T: TestServer>(database: &T) -> Vec<Way> {
    let way = |_| {
        let proxy = database.proxy();
        Way { url: database.url_by(proxy.address()), proxy: Some(proxy), network: None }
    };
    (0..PLACES).map(way).collect()
}

async fn networks_fail<T: TestServer>(_: &T) {
    rounds(&format!("{}, networks", T::NAME), OF_NETWORKS, async |plan| {
        let database = T::create().await;
        run(&database, ways_through_proxies(&database), None, plan).await
    })
    .await;
}

async fn processes_and_networks_fail<T: TestServer>(_: &T) {
    let faults = [OF_PROCESSES, OF_NETWORKS].concat();
    rounds(&format!("{}, processes and networks", T::NAME), &faults, async |plan| {
        let database = T::create().await;
        run(&database, ways_through_proxies(&database), None, plan).await
    })
    .await;
}

async fn networks_are_parted<T: TestServer>(_: &T) {
    if let Err(reason) = Network::new() {
        ignore(format_args!("networks can't be parted: {reason}"));
    }
    rounds(&format!("{}, partitions", T::NAME), OF_PARTITIONS, async |plan| {
        let database = T::create().await;
        let way = |_| {
            let network = Network::new().expect("as before");
            let proxy = Proxy::on(network.outside(), database.address());
            Way { url: database.url_by(proxy.address()), proxy: Some(proxy), network: Some(network) }
        };
        run(&database, (0..PLACES).map(way).collect(), None, plan).await
    })
    .await;
}

// --------------------------------------------------------------------------- a server of one's own

fn servers_fail_on_postgres() {
    on_own_server::<PostgresKind>(OF_SERVERS);
}

fn servers_fail_on_mariadb() {
    on_own_server::<MariaDbKind>(OF_SERVERS);
}

fn servers_fail_on_mysql() {
    on_own_server::<MySqlKind>(OF_SERVERS);
}

fn clocks_move_on_postgres() {
    on_own_server::<PostgresKind>(OF_CLOCKS);
}

fn clocks_move_on_mariadb() {
    on_own_server::<MariaDbKind>(OF_CLOCKS);
}

fn clocks_move_on_mysql() {
    on_own_server::<MySqlKind>(OF_CLOCKS);
}

fn answered_grants_survive_postgres() {
    answered::on_own_server::<PostgresKind>();
}

fn answered_grants_survive_mariadb() {
    answered::on_own_server::<MariaDbKind>();
}

fn answered_grants_survive_mysql() {
    answered::on_own_server::<MySqlKind>();
}

fn on_own_server<K: ServerKind>(faults: &[Fault]) {
    let moves_clock = faults.iter().any(|fault| fault.moves_clock());
    OwnServer::need(K::NAME);
    if moves_clock {
        OwnServer::need("clock");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let mut server = OwnServer::new(K::NAME, moves_clock).await;
        let what = format!("{}, {}", K::NAME, if moves_clock { "its clock" } else { "its server" });
        let all_rounds = rounds(&what, faults, async |plan| {
            server.is_back::<K::Database>().await;
            let database = Server::<K>::create_at(server.url()).await;
            if moves_clock {
                assert_clock_moves(&database, &server).await;
            }
            run(&database, ways_through_proxies(&database), Some(&mut server), plan).await
        });
        let patience = PATIENCE + long_run().unwrap_or_default();
        timeout(patience, all_rounds)
            .await
            .unwrap_or_else(|_| panic!("it hangs: no end within {patience:?}"));
    });
}

/// Otherwise a run with its clock would show nothing.
async fn assert_clock_moves<K: ServerKind>(database: &Server<K>, server: &OwnServer) {
    const HOUR: i64 = 3600;
    let now = match K::NAME {
        "postgres" => "SELECT extract(epoch FROM clock_timestamp())::BIGINT",
        _ => "SELECT TIMESTAMPDIFF(SECOND, '1970-01-01', UTC_TIMESTAMP(6))",
    };
    let true_time = database.number(now).await;
    server.set_clock(HOUR);
    let wrong_time = database.number(now).await;
    server.set_clock(0);
    assert!(wrong_time - true_time > HOUR / 2, "the server's clock does not move");
}

// ------------------------------------------------------------------------------ what must be found

/// The same work with the same checks, on a handwritten lock.
async fn by_hand<T: TestServer>(mistake: Mistake) -> Vec<Violation> {
    const ROUNDS: u64 = 12;
    let mut seeds = Random(seed());
    for _ in 0..ROUNDS {
        let database = T::create().await;
        let plan = Plan {
            seed: seeds.next(),
            faults: &[Fault::Stop, Fault::StopAtCommit],
            length: LENGTH,
            mistake: Some(mistake),
        };
        let (violations, _) = run_and_check(&database, ways_through_proxies(&database), None, plan).await;
        if mistake == Mistake::None || !violations.is_empty() {
            return violations;
        }
    }
    panic!("{mistake:?} was not found");
}

async fn handwritten_lock_without_a_mistake_passes<T: TestServer>(_: &T) {
    assert_eq!(by_hand::<T>(Mistake::None).await, []);
}

async fn handwritten_release_without_the_secret_is_found<T: TestServer>(_: &T) {
    by_hand::<T>(Mistake::ReleaseWithoutSecret).await;
}

async fn handwritten_expiry_by_the_clients_clock_is_found<T: TestServer>(_: &T) {
    let violations = by_hand::<T>(Mistake::ExpiryByTheClientsClock).await;
    assert!(violations.iter().any(|found| matches!(found, Violation::HeldByTwo { .. })), "{violations:#?}");
}

async fn handwritten_guard_without_a_row_lock_is_found<T: TestServer>(_: &T) {
    let violations = by_hand::<T>(Mistake::GuardWithoutRowLock).await;
    let is_it =
        |found: &Violation| matches!(found, Violation::LostUpdate { .. } | Violation::LateCommit { .. });
    assert!(violations.iter().any(is_it), "{violations:#?}");
}

fn main() -> std::process::ExitCode {
    lock_tests::run([cases()], [roles()])
}
