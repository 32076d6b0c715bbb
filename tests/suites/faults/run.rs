//! One run: workers at work, faults by a schedule, then peace, and a look at what is left.

use std::fmt::Write;
use std::time::Duration;

use lock_tests::{Backend, OwnServer, TestDatabase, eventually, note};
use sqlx::Connection;
use tokio::time::{Instant, sleep, sleep_until};

use super::TTL;
use super::broken::{self, Mistake};
use super::checker::{Rules, Violation, check};
use super::client::{LEASES, ROW_LOCKS};
use super::crew::{Crew, Death, Idle, Way};
use super::history::{History, Kept, Moment, now};
use super::nemesis::{Fault, Step, schedule};
use super::report::Report;
use super::worker::POOL;

/// For what must happen, however slow the machine is.
const PATIENCE: Duration = Duration::from_secs(30);
const LONG_TTL: Duration = Duration::from_mins(10);
/// How long a server may take to come back.
const START: Duration = Duration::from_mins(2);
/// What a worker may have allocated besides: connections and their statements, rows that it knows.
const MEMORY: u64 = 768 * 1024;
/// How long the workers go on when nothing is wrong any more.
const PEACE: Duration = Duration::from_millis(300);

pub(crate) struct Plan<'a> {
    pub(crate) seed: u64,
    pub(crate) faults: &'a [Fault],
    pub(crate) length: Duration,
    pub(crate) mistake: Option<Mistake>,
}

/// Panics with the seed and the schedule when anything is not as it should be.
pub(crate) async fn run<T: TestDatabase>(
    database: &T,
    ways: Vec<Way>,
    server: Option<&mut OwnServer>,
    plan: Plan<'_>,
) -> Report {
    let (faults, length) = (plan.faults, plan.length);
    let seed = plan.seed;
    let (violations, report) = run_and_check(database, ways, server, plan).await;
    if !violations.is_empty() {
        let mut text = String::new();
        for step in schedule(seed, faults, length, PLACES) {
            writeln!(text, "{step}").unwrap();
        }
        for violation in &violations {
            writeln!(text, "{violation:#?}").unwrap();
        }
        panic!("{} violations with LOCK_DB_TEST_SEED={seed}:\n{text}", violations.len());
    }
    report
}

/// Workers at the same time.
pub(crate) const PLACES: usize = 3;

pub(crate) async fn run_and_check<T: TestDatabase>(
    database: &T,
    ways: Vec<Way>,
    server: Option<&mut OwnServer>,
    plan: Plan<'_>,
) -> (Vec<Violation>, Report) {
    let Plan { seed, faults, length, mistake } = plan;
    note(format_args!("{}: LOCK_DB_TEST_SEED={seed} {length:?} {faults:?}", T::NAME));
    let started = Instant::now();
    prepare(database).await;
    let mut crew = Crew::new(ways, server, seed, mistake);
    inject(&mut crew, &schedule(seed, faults, length, PLACES), length).await;
    eventually(START, async || {
        crew.attend().await;
        <T::Database as sqlx::Database>::Connection::connect(database.url()).await.is_ok()
    })
    .await;
    rest(&mut crew, PEACE).await;
    for Idle { tasks, memory } in crew.end_work().await {
        assert!(
            tasks.1 <= tasks.0,
            "LOCK_DB_TEST_SEED={seed}: {} tasks before, {} afterwards",
            tasks.0,
            tasks.1
        );
        let allowed = memory.0 + MEMORY;
        assert!(
            memory.1 <= allowed,
            "LOCK_DB_TEST_SEED={seed}: {} bytes before, {} afterwards",
            memory.0,
            memory.1
        );
    }

    database.reconnect().await;
    assert_nothing_is_left(database, PLACES * (POOL as usize + 2)).await;
    crew.leave().await;
    assert_nothing_is_left(database, 0).await;
    let free_again = if mistake.is_none() {
        let free = take_all(database).await;
        free_again(&crew, free)
    } else {
        Duration::ZERO
    };
    assert!(free_again < TTL + PATIENCE, "LOCK_DB_TEST_SEED={seed}: free only after {free_again:?}");

    let history = history(database, &mut crew).await;
    let leases_exclude = !faults.iter().any(|fault| fault.moves_clock());
    let violations = check(&history, Rules { leases_exclude });
    let mut report = Report {
        rounds: 1,
        time: started.elapsed(),
        operations: crew.recorder.operations,
        faults: std::mem::take(&mut crew.faults),
        free_again,
        ..Report::default()
    };
    report.count(&history);
    assert!(
        report.grants > 0 && report.committed > 0,
        "LOCK_DB_TEST_SEED={seed}: nothing was done: {report}"
    );
    (violations, report)
}

async fn prepare<T: TestDatabase>(database: &T) {
    database.locks().await.close().await;
    database.run("CREATE TABLE register (name VARCHAR(50) PRIMARY KEY, value BIGINT NOT NULL)").await;
    database
        .run("CREATE TABLE kept (value BIGINT PRIMARY KEY, name VARCHAR(50) NOT NULL, previous BIGINT NOT NULL)")
        .await;
    database.run(broken::TABLE).await;
    for name in LEASES.iter().chain(&ROW_LOCKS) {
        database.run(&format!("INSERT INTO register VALUES ('{name}', 0)")).await;
        database.run(&format!("INSERT INTO broken_lock VALUES ('{name}', 0, 0, 0)")).await;
    }
}

async fn inject(crew: &mut Crew<'_>, schedule: &[Step], length: Duration) {
    let started = Instant::now();
    let mut under_way: Vec<Step> = Vec::new();
    let mut next = schedule.iter().peekable();
    while started.elapsed() < length {
        crew.attend().await;
        let time = started.elapsed();
        let (over, still): (Vec<Step>, Vec<Step>) =
            under_way.into_iter().partition(|step| step.at + step.lasts <= time);
        under_way = still;
        for step in over {
            crew.end(step);
        }
        while let Some(step) = next.next_if(|step| step.at <= time) {
            crew.begin(*step).await;
            under_way.push(*step);
        }
        sleep(Duration::from_millis(1)).await;
    }
    crew.heal(under_way);
}

async fn rest(crew: &mut Crew<'_>, time: Duration) {
    let end = Instant::now() + time;
    while Instant::now() < end {
        crew.attend().await;
        sleep_until(end.min(Instant::now() + Duration::from_millis(5))).await;
    }
}

/// What a fault may leave behind for a while, and must not leave for ever.
async fn assert_nothing_is_left<T: TestDatabase>(database: &T, allowed_connections: usize) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let activity = database.activity().await;
        let advisory_locks = database.advisory_locks().await;
        if activity.connections <= allowed_connections
            && (activity.transactions, activity.waiting, advisory_locks) == (0, 0, 0)
        {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "after {PATIENCE:?} there is still {activity:?}, where {allowed_connections} connections are allowed, \
             and {advisory_locks} advisory locks"
        );
        sleep(Duration::from_millis(50)).await;
    }
}

/// Nobody works any more, so every lock can be had. Answers when that was.
async fn take_all<T: TestDatabase>(database: &T) -> Vec<(String, Moment)> {
    let locks = database.locks().await;
    let mut free = Vec::new();
    for name in LEASES {
        let lease = locks.insert_lock(name).ttl(LONG_TTL).wait(TTL + PATIENCE).acquire().await.unwrap();
        free.push((name.to_owned(), now()));
        lease.release().await.unwrap();
    }
    for name in ROW_LOCKS {
        let guard = locks.row_lock(name).wait(PATIENCE).acquire().await.unwrap();
        free.push((name.to_owned(), now()));
        guard.rollback().await.unwrap();
    }
    locks.close().await;
    free
}

/// The longest time until somebody had the lock of one who had died.
fn free_again(crew: &Crew<'_>, in_the_end: Vec<(String, Moment)>) -> Duration {
    let time = |death: &Death| {
        let grants = crew.recorder.holds.iter().map(|hold| (&hold.name, hold.granted));
        let all = grants.chain(in_the_end.iter().map(|(name, at)| (name, *at)));
        let later = all.filter(|(name, at)| **name == death.name && *at > death.at).map(|(_, at)| at);
        Duration::from_nanos(later.min().expect("it was taken in the end") - death.at)
    };
    crew.deaths.iter().map(time).max().unwrap_or_default()
}

async fn history<T: TestDatabase>(database: &T, crew: &mut Crew<'_>) -> History {
    let mut history = History {
        holds: std::mem::take(&mut crew.recorder.holds),
        deeds: std::mem::take(&mut crew.recorder.deeds),
        ..History::default()
    };
    let mut connection = database.connection().await;
    for name in LEASES.iter().chain(&ROW_LOCKS) {
        let register = (*name).to_owned();
        let value = database.number(&format!("SELECT value FROM register WHERE name = '{name}'")).await;
        history.registers.insert(register.clone(), value);
        let mut column = async |column: &str| {
            let sql = format!("SELECT {column} FROM kept WHERE name = '{name}' ORDER BY value");
            T::Database::numbers(&mut connection, &sql).await.unwrap()
        };
        let (values, previous) = (column("value").await, column("previous").await);
        history.kept.extend(values.into_iter().zip(previous).map(|(value, previous)| Kept {
            register: register.clone(),
            previous,
            value,
        }));
    }
    connection.close().await.unwrap();
    eventually(PATIENCE, async || database.activity().await.connections == 0).await;
    history
}
