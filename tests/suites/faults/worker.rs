//! A worker: a process with a few clients that take locks and do business under them, until it is told to end.

use std::time::Duration;

use lock_db::Locks;
use lock_tests::{Backend, Parent, Random};
use sqlx::Pool;
use sqlx::pool::PoolOptions;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::ALLOCATOR;
use super::broken::{BrokenLocks, Mistake};
use super::client::Client;
use super::subject::Subject;

/// Of each worker: more than its pool has connections. lock-db takes two more.
pub(crate) const CLIENTS: u64 = 4;
pub(crate) const POOL: u32 = 3;

/// For tasks that have something to end.
const PATIENCE: Duration = Duration::from_secs(40);

/// What a worker is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Contract {
    pub(crate) seed: u64,
    /// Different for each process of a run: makes what it writes unique.
    pub(crate) number: u64,
    /// `None`: lock-db.
    pub(crate) mistake: Option<Mistake>,
    pub(crate) ttl: Duration,
}

impl Contract {
    pub(crate) fn to_arguments(self) -> [String; 4] {
        let mistake = self.mistake.map_or_else(String::new, |mistake| format!("{mistake:?}"));
        [self.seed.to_string(), self.number.to_string(), mistake, self.ttl.as_millis().to_string()]
    }

    fn from_arguments(parent: &Parent) -> Self {
        let number = |index| parent.argument(index).parse::<u64>().expect("a number");
        Self {
            seed: number(0),
            number: number(1),
            mistake: Mistake::ALL.into_iter().find(|known| format!("{known:?}") == parent.argument(2)),
            ttl: Duration::from_millis(number(3)),
        }
    }
}

/// The number of a client of a worker; see [`worker_of`].
pub(crate) fn client_number(worker: u64, client: u64) -> u64 {
    worker * 10 + client
}

/// The number of the worker of a client.
pub(crate) fn worker_of(client: u64) -> u64 {
    client / 10
}

/// The role of a child. It hears `starve MILLISECONDS`, which takes all connections of its pool, and `end`. Then it
/// says `idle`, with its tasks before and after, and what it has allocated, and closes when its input does.
pub(crate) async fn worker<DB: Backend>(mut parent: Parent) {
    let contract = Contract::from_arguments(&parent);
    // The database may be away when it begins.
    let pool = PoolOptions::<DB>::new()
        .max_connections(POOL)
        .acquire_timeout(Duration::from_secs(5))
        .connect_lazy(parent.url())
        .unwrap();
    // With settings of its own: they need not be the same in all processes.
    let mut random = Random(!contract.seed);
    let (turns, time) =
        random.pick(&[(64, Duration::from_millis(200)), (1, Duration::ZERO), (1000, Duration::from_secs(3))]);
    let locks = Locks::builder(pool.clone()).fair(random.below(4) > 0).hand_off(turns, time).build();
    let tasks = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    let (tasks_before, memory_before) = (tasks(), memory());

    let (stop, stopped) = watch::channel(false);
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let number = client_number(contract.number, client);
        let subject = match contract.mistake {
            None => Subject::LockDb(locks.clone()),
            Some(mistake) => Subject::Broken(BrokenLocks {
                pool: pool.clone(),
                mistake,
                client: i64::try_from(number).unwrap(),
            }),
        };
        let random = Random(contract.seed ^ number.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let client = Client::new(number, random, subject, locks.clone(), pool.clone(), contract);
        clients.spawn(client.work(stopped.clone()));
    }
    while let Some(order) = parent.hear().await {
        match order.split_once(' ') {
            Some(("starve", millis)) => {
                tokio::spawn(starve(pool.clone(), Duration::from_millis(millis.parse().unwrap())));
            }
            _ => break,
        }
    }
    stop.send_replace(true);
    clients.join_all().await;

    let deadline = Instant::now() + PATIENCE;
    while tasks() > tasks_before && Instant::now() < deadline {
        sleep(Duration::from_millis(20)).await;
    }
    parent.say(format!("idle {tasks_before} {} {memory_before} {}", tasks(), memory()));
    parent.hear().await;
    locks.close().await;
    pool.close().await;
}

/// What is allocated and not given back.
fn memory() -> usize {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated.saturating_sub(stats.bytes_deallocated)
}

async fn starve<DB: Backend>(pool: Pool<DB>, time: Duration) {
    let mut connections = Vec::new();
    let end = Instant::now() + time;
    while let Ok(Ok(connection)) = tokio::time::timeout_at(end, pool.acquire()).await {
        connections.push(connection);
    }
    tokio::time::sleep_until(end).await;
}
