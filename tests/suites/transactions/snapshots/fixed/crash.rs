//! Holders that are killed after their commit, so that their leases are never released.

use std::collections::HashMap;
use std::time::Duration;

use futures_util::future::join_all;
use lock_db::{Lease, Locks};
use lock_tests::{Backend, Parent, Process, TestDatabase, pool};
use sqlx::Transaction;
use tokio::sync::watch;
use tokio::time::sleep;

use super::cells::{Cell, Lane, MOMENT, Moment, at_each_level};
use super::holder::{End, Phase, Way, commit_under};
use super::reader::{Ask, CountedWay, Report, Request};

/// Of the leases of processes that are killed.
const TTL: Duration = Duration::from_secs(1);
/// Of leases that must not expire by themselves.
const LONG: Duration = Duration::from_mins(10);
const PATIENCE: Duration = Duration::from_secs(20);

/// Takes leases and commits under them when it is told to. Never releases one.
pub async fn holder_that_is_killed<DB: Backend>(mut parent: Parent) {
    let pool = pool::<DB>(parent.url(), 2).await;
    let locks = Locks::new(pool.clone());
    let ttl = Duration::from_millis(parent.argument(0).parse().unwrap());
    let mut leases: HashMap<i64, Lease<DB>> = HashMap::new();
    parent.say("ready");
    while let Some(line) = parent.hear().await {
        let mut words = line.splitn(3, ' ');
        let (order, id, name) = (words.next().unwrap(), words.next().unwrap(), words.next());
        let id = id.parse().unwrap();
        match (order, name) {
            ("take", Some(name)) => {
                let lease = locks.insert_lock(name).ttl(ttl).wait(PATIENCE).acquire().await.unwrap();
                leases.insert(id, lease);
            }
            ("commit", None) => commit_under(&leases[&id], &pool, Way::GuardedTransaction, id).await,
            _ => panic!("{line}"),
        }
        parent.say("done");
    }
}

struct Child(Process);

impl Child {
    async fn start<T: TestDatabase>(database: &T, ttl: Duration) -> Self {
        let ttl = ttl.as_millis().to_string();
        let mut process = Process::spawn("holder_that_is_killed", database.url(), [ttl]);
        process.expect("ready").await;
        Self(process)
    }

    async fn take(&mut self, request: &Request) {
        self.0.say(&format!("take {} {}", request.id, request.name));
        self.0.expect("done").await;
    }

    async fn commit(&mut self, request: &Request) {
        self.0.say(&format!("commit {}", request.id));
        self.0.expect("done").await;
    }
}

/// Runs all of it at once at each level: they mostly wait for the leases to expire.
pub async fn run_crashes<T: CountedWay>(database: &T, end: End) {
    let mut cells = Vec::new();
    for moment in [Moment::Held, Moment::Later] {
        for ask in [Ask::Acquire, Ask::Try, Ask::Several] {
            cells.push(Cell::new(Way::GuardedTransaction, end, moment, ask));
        }
    }
    // A lease that has expired is not waited for.
    if end != End::LateCommit {
        cells.push(Cell::new(Way::GuardedTransaction, end, Moment::Waiting, Ask::Acquire));
    }
    let connections = u32::try_from(cells.len()).unwrap() + 1;
    at_each_level(database, connections, async |mut lane| {
        lane.prepare(&cells).await;
        let askers = cells.len();
        let requests: Vec<Request> = cells
            .iter()
            .enumerate()
            .map(|(index, cell)| Request { wait: PATIENCE, askers, ..lane.request(index, cell) })
            .collect();
        let reports = crash(&lane, end, &cells, &requests).await;
        for ((cell, request), report) in cells.iter().zip(&requests).zip(reports) {
            lane.judge(cell, request, if end == End::Takeover { 2 } else { 1 }, report).await;
        }
        lane.problems
    })
    .await;
}

async fn crash<T: CountedWay>(
    lane: &Lane<'_, T>,
    end: End,
    cells: &[Cell],
    requests: &[Request],
) -> Vec<Report> {
    let mut child = Child::start(lane.database, if end == End::LateCommit { LONG } else { TTL }).await;
    let mut transactions: Vec<Option<Transaction<'static, T::Database>>> = Vec::new();
    for (cell, request) in cells.iter().zip(requests) {
        let is_early = cell.moment == Moment::Later;
        transactions.push(if is_early { Some(lane.reader.begin(Some(request.id)).await) } else { None });
    }
    for request in requests {
        child.take(request).await;
        if end == End::LateCommit {
            expire(lane.database, &request.name).await;
        }
    }
    for (transaction, request) in transactions.iter_mut().zip(requests) {
        if transaction.is_none() {
            *transaction = Some(lane.reader.begin(Some(request.id)).await);
        }
    }

    let (phase, phases) = watch::channel(Phase::Holding);
    let runs = cells.iter().zip(requests).zip(transactions).map(async |((cell, request), transaction)| {
        if cell.moment != Moment::Waiting {
            phases.clone().wait_for(|phase| *phase == Phase::Ended).await.unwrap();
        }
        lane.reader.run(transaction.unwrap(), request, phases.clone()).await
    });
    let holders = async {
        // The waiting transactions ask first.
        sleep(MOMENT).await;
        for request in requests {
            child.commit(request).await;
        }
        child.0.kill();
        phase.send_replace(Phase::Ending);
        if end == End::Takeover {
            take_over(lane, requests).await;
        }
        phase.send_replace(Phase::Ended);
    };
    tokio::join!(join_all(runs), holders).0
}

async fn take_over<T: CountedWay>(lane: &Lane<'_, T>, requests: &[Request]) {
    for Request { name, id, .. } in requests {
        let lock = lane.holder.locks.insert_lock(name).ttl(LONG).wait(PATIENCE);
        let lease = lock.acquire().await.unwrap();
        commit_under(&lease, &lane.holder.pool, Way::GuardedTransaction, *id).await;
        lease.release().await.unwrap();
    }
}

/// Lets a lease expire, as a pause of its holder would.
async fn expire<T: TestDatabase>(database: &T, name: &str) {
    let past =
        format!("UPDATE distributed_lock SET expire_time = '2001-01-01 00:00:00' WHERE lock_name = '{name}'");
    assert_eq!(database.run(&past).await, 1);
}
