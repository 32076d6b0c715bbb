//! Worlds: the locks, what they protect, the processes, and one run of their actors.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use lock_db::{Kind, Lease, Locks};
use lock_tests::{Backend, Random, TestDatabase};
use sqlx::Pool;
use tokio::sync::Mutex;
use tokio::time::timeout;

use super::ledger::{Ledger, Tally, Violation};
use super::schedule::Schedule;
use crate::snapshots::level::{Level, let_writers_commit_beside_readers};

/// After which a world is taken to hang.
const PATIENCE: Duration = Duration::from_mins(1);

/// A lock, and what it protects: a counter, and rounds with at most one order each.
#[derive(Debug, Clone)]
pub struct Name {
    pub text: String,
    pub kind: Kind,
    pub counter: i64,
}

impl Name {
    pub fn rounds(&self) -> [i64; 2] {
        [self.counter * 2, self.counter * 2 + 1]
    }
}

/// What excludes the actors from one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    LockDb,
    /// `SELECT … FOR UPDATE`, in transactions that have read something before.
    ByHand,
}

#[derive(Debug)]
pub struct World {
    pub seed: u64,
    pub lock: Lock,
    /// In the order in which they are taken.
    pub names: Vec<Name>,
    pub levels: Vec<Level>,
    /// Whether holders are late: their leases expire, and they try to commit all the same.
    pub has_late_holders: bool,
}

impl World {
    pub fn random<T: TestDatabase>(seed: u64, number: i64, lock: Lock) -> Self {
        let mut random = Random(!seed);
        let has_late_holders = random.below(2) == 0;
        // Late are holders of leases only.
        let kinds: &[Kind] = if has_late_holders {
            &[Kind::Insert, Kind::Insert, Kind::Row]
        } else {
            &[Kind::Insert, Kind::Row]
        };
        let names = (0..random.pick(&[1, 1, 2]))
            .map(|index| {
                let kind = random.pick(kinds);
                let text = match random.below(4) {
                    0 => format!("{index} of world {number}"),
                    _ => usual_name(index, kind),
                };
                Name { text, kind, counter: number * 2 + index }
            })
            .collect();
        let mut levels = Level::all::<T>().to_vec();
        // It reads what a late holder has written and can't commit.
        levels.retain(|level| !(has_late_holders && *level == Level::ReadUncommitted));
        if random.below(2) == 0 {
            levels.retain(|level| !level.has_a_snapshot_for_each_statement());
        }
        if lock == Lock::ByHand {
            levels = vec![Level::RepeatableRead];
        }
        Self { seed, lock, names, levels, has_late_holders }
    }
}

/// A name that many worlds use.
fn usual_name(index: i64, kind: Kind) -> String {
    format!("{index}: {kind}")
}

/// A process of its own, as far as locks are concerned.
pub struct Member<DB: Backend> {
    pub locks: Locks<DB>,
    pub pool: Pool<DB>,
}

/// The processes, which all worlds of a case have in common.
pub struct Crew<DB: Backend> {
    transactions: [Member<DB>; 2],
    holders: [Member<DB>; 2],
    /// Sees what is committed.
    observer: Mutex<DB::Connection>,
}

impl<DB: Backend> Crew<DB> {
    pub async fn new<T: TestDatabase<Database = DB>>(database: &T) -> Self {
        let_writers_commit_beside_readers(database).await;
        database.run("CREATE TABLE counters (id BIGINT PRIMARY KEY, n BIGINT NOT NULL)").await;
        let orders = "CREATE TABLE orders (round BIGINT, customer BIGINT, PRIMARY KEY (round, customer))";
        database.run(orders).await;
        database.run("CREATE TABLE locks_by_hand (id BIGINT PRIMARY KEY)").await;
        let locks = database.locks().await;
        for index in [0, 1] {
            let name = usual_name(index, Kind::Insert);
            locks.insert_lock(name).acquire().await.unwrap().release().await.unwrap();
            let name = usual_name(index, Kind::Row);
            locks.row_lock(name).acquire().await.unwrap().commit().await.unwrap();
        }
        let member = async || {
            let pool = database.pool(1).await;
            Member { locks: Locks::new(pool.clone()), pool }
        };
        Self {
            transactions: [member().await, member().await],
            holders: [member().await, member().await],
            observer: Mutex::new(database.connection().await),
        }
    }
}

/// One run of a world.
pub struct Stage<'a, T: TestDatabase> {
    pub database: &'a T,
    pub world: &'a World,
    pub ledger: Ledger,
    /// Of dead processes, as it were: they are not released before the end.
    pub kept: RefCell<Vec<Lease<T::Database>>>,
    crew: &'a Crew<T::Database>,
    customers: Cell<i64>,
}

impl<'a, T: TestDatabase> Stage<'a, T> {
    /// Runs it, and compares what the actors were told with what is there. Fails, with its schedule, if `must_hold`.
    pub async fn play(
        database: &'a T,
        crew: &'a Crew<T::Database>,
        world: &'a World,
        must_hold: bool,
    ) -> (Tally, Vec<Violation>) {
        for name in &world.names {
            database.run(&format!("INSERT INTO counters VALUES ({}, 0)", name.counter)).await;
            database.run(&format!("INSERT INTO locks_by_hand VALUES ({})", name.counter)).await;
        }
        let (ledger, kept, customers) = (Ledger::default(), RefCell::default(), Cell::new(0));
        let stage = Self { database, world, ledger, kept, crew, customers };
        let schedule = Schedule::new(4);
        let has_ended = timeout(PATIENCE, stage.act(&schedule)).await.is_ok();
        if has_ended {
            stage.ledger.check(database, world).await;
        }
        let violations = stage.ledger.violations.take();
        let is_right = has_ended && violations.is_empty();
        assert!(
            is_right || !must_hold,
            "LOCK_DB_TEST_SEED={}, {}: {}\n{world:?}\n{}\n{}",
            world.seed,
            T::NAME,
            if has_ended { "violations" } else { "it hangs" },
            schedule.log(),
            violations.iter().map(|violation| format!("=> {violation:?}")).collect::<Vec<_>>().join("\n"),
        );
        stage.ledger.count(|tally| tally.worlds = 1);
        (stage.ledger.tally.take(), violations)
    }

    async fn act(&self, schedule: &Schedule) {
        let mut random = Random(self.world.seed);
        let names = ["T1", "T2", "H1", "H2"];
        let actors: Vec<_> = (0..)
            .zip(names)
            .map(|(index, name)| schedule.actor(index, name, Random(random.next())))
            .collect();
        let [first, second, third, fourth] =
            <[_; 4]>::try_from(actors).unwrap_or_else(|_| unreachable!("there are four"));
        let Crew { transactions: [t1, t2], holders: [h1, h2], .. } = self.crew;
        if self.world.lock == Lock::ByHand {
            tokio::join!(
                schedule.direct(&mut random),
                self.transactions(first, t1),
                self.transactions(second, t2),
                self.transactions(third, h1),
                self.transactions(fourth, h2),
            );
        } else {
            tokio::join!(
                schedule.direct(&mut random),
                self.transactions(first, t1),
                self.transactions(second, t2),
                self.holders(third, h1),
                self.holders(fourth, h2),
            );
        }
    }

    /// A number that no other order has.
    pub fn next_customer(&self) -> i64 {
        self.customers.update(|customer| customer + 1);
        self.customers.get()
    }

    /// The same question to the database, outside of all transactions.
    pub async fn committed(&self, sql: &str) -> Option<i64> {
        let mut observer = self.crew.observer.lock().await;
        T::Database::find_number(&mut observer, sql).await.unwrap()
    }
}
