//! The lock is free, and the database does not say so: it is away, the table is locked as a whole, or (SQLite) another
//! transaction writes.

use std::time::Duration;

use lock_db::{Kind, Locks};
use lock_tests::{Backend, Direction, Proxy, TestDatabase, TestServer, eventually};
use sqlx::pool::PoolOptions;
use sqlx::{Connection, Pool, Sqlite};
use tokio::task::{JoinHandle, JoinSet};

use super::requests::{Request, Requests, Way, assert_none};

lock_tests::cases! {
    on every server:
    leases_are_not_held_during_an_outage,
    row_locks_are_not_held_during_an_outage,
    locks_in_transactions_are_not_held_during_an_outage,
    locks_of_an_unreachable_database_are_not_held,
    requests_behind_another_caller_learn_what_it_learns,
    locks_in_a_locked_table_are_not_held,
    a_locked_table_is_waited_for_in_a_transaction;

    on sqlite:
    leases_are_not_held_by_another_writer,
    row_locks_are_not_held_by_another_writer,
    locks_in_transactions_are_not_held_by_another_writer,
    another_writer_is_waited_out,
}

const PATIENCE: Duration = Duration::from_secs(20);
const WAITS: [Duration; 4] =
    [Duration::ZERO, Duration::from_millis(1), Duration::from_millis(50), Duration::from_millis(300)];
const SHORT_WAITS: [Duration; 2] = [Duration::ZERO, Duration::from_millis(50)];

fn leases() -> Vec<Request> {
    let is_lease = |request: &Request| matches!(request.way, Way::Lease | Way::Leases | Way::LeaseOrSkip);
    Request::all(&WAITS).into_iter().filter(is_lease).collect()
}

fn row_locks() -> Vec<Request> {
    let is_row_lock = |request: &Request| matches!(request.way, Way::Row | Way::RowOrSkip);
    Request::all(&SHORT_WAITS).into_iter().filter(is_row_lock).collect()
}

fn locks_in_transactions() -> Vec<Request> {
    let is_in_transaction = |request: &Request| request.way.is_in_transaction();
    Request::all(&SHORT_WAITS).into_iter().filter(is_in_transaction).collect()
}

fn name_of(circumstances: &str, request: Request) -> String {
    format!("{circumstances}: {request:?}")
}

/// Every other name has been used before.
async fn use_some<T: TestDatabase>(near: &Locks<T::Database>, requests: &[Request], circumstances: &str) {
    for request in requests.iter().step_by(2) {
        take_and_release::<T>(near, request.way.kind(), &name_of(circumstances, *request)).await;
    }
}

async fn take_and_release<T: TestDatabase>(locks: &Locks<T::Database>, kind: Kind, name: &str) {
    match kind {
        Kind::Row => {
            locks.row_lock(name).wait(PATIENCE).acquire().await.unwrap().commit().await.unwrap();
        }
        _ => locks.insert_lock(name).wait(PATIENCE).acquire().await.unwrap().release().await.unwrap(),
    }
}

/// Nothing is left of what was asked for in vain.
async fn assert_all_free<T: TestDatabase>(
    near: &Locks<T::Database>,
    requests: &[Request],
    circumstances: &str,
) {
    for request in requests {
        take_and_release::<T>(near, request.way.kind(), &name_of(circumstances, *request)).await;
    }
}

// --------------------------------------------------------------------------------------------- out of reach

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outage {
    /// Nothing that is sent arrives, and new connections are not answered.
    Silent,
    /// What is sent arrives, but no answer comes back.
    Dumb,
    /// Connections are reset, and new ones are refused.
    Refused,
    /// Connections are reset, and new ones are not answered.
    Swallowed,
}

impl Outage {
    const ALL: [Self; 4] = [Self::Silent, Self::Dumb, Self::Refused, Self::Swallowed];

    fn begin(self, proxy: &Proxy) {
        match self {
            Self::Silent => {
                proxy.swallow();
                proxy.pause(Direction::ToServer);
                proxy.pause(Direction::ToClient);
            }
            Self::Dumb => proxy.pause(Direction::ToClient),
            Self::Refused => {
                proxy.refuse();
                proxy.cut();
            }
            Self::Swallowed => {
                proxy.swallow();
                proxy.cut();
            }
        }
    }

    fn end(proxy: &Proxy) {
        proxy.admit();
        proxy.resume(Direction::ToServer);
        proxy.resume(Direction::ToClient);
    }
}

/// An application that reaches its database by a proxy.
struct Far<T: TestServer> {
    proxy: Proxy,
    pool: Pool<T::Database>,
    locks: Locks<T::Database>,
}

impl<T: TestServer> Far<T> {
    fn new(database: &T) -> Self {
        let proxy = database.proxy();
        let options = PoolOptions::new().max_connections(40).acquire_timeout(PATIENCE);
        let pool = options.connect_lazy(&database.url_by(proxy.address())).unwrap();
        Self { locks: Locks::new(pool.clone()), proxy, pool }
    }
}

/// A process that has used locks before.
async fn while_the_database_is_away<T: TestServer>(database: &T, requests: &[Request]) {
    let near = database.locks().await;
    let one = async |outage: Outage| {
        let circumstances = format!("{outage:?}");
        let far = Far::new(database);
        use_some::<T>(&near, requests, &circumstances).await;
        take_and_release::<T>(&far.locks, Kind::Insert, "before").await;
        let name = |request| name_of(&circumstances, request);
        let asking = Requests::prepare(&far.locks, &far.pool, requests, name).await;
        outage.begin(&far.proxy);
        let wrong = asking.ask().await.not_unknown(&circumstances);
        far.proxy.cut();
        Outage::end(&far.proxy);
        assert_all_free::<T>(&near, requests, &circumstances).await;
        assert_all_free::<T>(&far.locks, requests, &circumstances).await;
        wrong
    };
    let [silent, dumb, refused, swallowed] = Outage::ALL.map(one);
    let (silent, dumb, refused, swallowed) = tokio::join!(silent, dumb, refused, swallowed);
    assert_none(&[silent, dumb, refused, swallowed].concat());
}

async fn leases_are_not_held_during_an_outage<T: TestServer>(database: &T) {
    while_the_database_is_away(database, &leases()).await;
}

async fn row_locks_are_not_held_during_an_outage<T: TestServer>(database: &T) {
    while_the_database_is_away(database, &row_locks()).await;
}

async fn locks_in_transactions_are_not_held_during_an_outage<T: TestServer>(database: &T) {
    while_the_database_is_away(database, &locks_in_transactions()).await;
}

/// One that has no connection yet.
async fn locks_of_an_unreachable_database_are_not_held<T: TestServer>(database: &T) {
    let near = database.locks().await;
    let requests = [leases(), row_locks()].concat();
    let one = async |outage: Outage| {
        let circumstances = format!("{outage:?}");
        let far = Far::new(database);
        outage.begin(&far.proxy);
        let name = |request| name_of(&circumstances, request);
        let asking = Requests::prepare(&far.locks, &far.pool, &requests, name).await;
        let wrong = asking.ask().await.not_unknown(&circumstances);
        far.proxy.cut();
        Outage::end(&far.proxy);
        assert_all_free::<T>(&near, &requests, &circumstances).await;
        assert_all_free::<T>(&far.locks, &requests, &circumstances).await;
        wrong
    };
    let [silent, dumb, refused, swallowed] = Outage::ALL.map(one);
    let (silent, dumb, refused, swallowed) = tokio::join!(silent, dumb, refused, swallowed);
    assert_none(&[silent, dumb, refused, swallowed].concat());
}

/// All ask for one name, behind a caller with a long wait, who knows no more than they do.
async fn requests_behind_another_caller_learn_what_it_learns<T: TestServer>(database: &T) {
    let near = database.locks().await;
    let mut wrong = Vec::new();
    for outage in [Outage::Silent, Outage::Refused] {
        let (leases, row_locks) = tokio::join!(
            behind_another(database, &near, Kind::Insert, outage),
            behind_another(database, &near, Kind::Row, outage),
        );
        wrong.extend([leases, row_locks].concat());
    }
    assert_none(&wrong);
}

async fn behind_another<T: TestServer>(
    database: &T,
    near: &Locks<T::Database>,
    kind: Kind,
    outage: Outage,
) -> Vec<String> {
    let requests: Vec<Request> = Request::all(&SHORT_WAITS)
        .into_iter()
        .filter(|request| !request.way.is_in_transaction() && request.way.kind() == kind)
        // It goes on for ten seconds.
        .filter(|request| *request != Request { way: Way::Row, wait: None })
        .collect();
    let circumstances = format!("{outage:?}, {kind}");
    let name = || format!("behind another: {circumstances}");
    let far = Far::new(database);
    take_and_release::<T>(&far.locks, kind, &name()).await;
    outage.begin(&far.proxy);
    let first = match kind {
        Kind::Row => {
            let acquiring = far.locks.row_lock(name()).wait(PATIENCE).acquire();
            tokio::spawn(async move { acquiring.await?.rollback().await })
        }
        _ => {
            let acquiring = far.locks.insert_lock(name()).wait(PATIENCE).acquire();
            tokio::spawn(async move { acquiring.await?.release().await })
        }
    };
    tokio::task::yield_now().await;
    let asking = Requests::prepare(&far.locks, &far.pool, &requests, |_| name()).await;
    let wrong = asking.ask().await.not_unknown(&circumstances);
    far.proxy.cut();
    Outage::end(&far.proxy);
    first.await.unwrap().expect("it goes on until the database is back");
    take_and_release::<T>(near, kind, &name()).await;
    wrong
}

// ------------------------------------------------------------------------------- the table locked as a whole

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stall {
    /// Nobody else reads or writes the table: an ALTER, VACUUM FULL, `LOCK TABLES … WRITE`.
    Everything,
    /// Nobody else writes it: CREATE INDEX, `LOCK TABLES … READ`, a backup.
    Writes,
    /// An ALTER waits for a transaction that has read the table, and everybody else for the ALTER.
    AlterBehindReader,
}

impl Stall {
    const ALL: [Self; 3] = [Self::Everything, Self::Writes, Self::AlterBehindReader];
}

/// A session that keeps the others from the table, until it ends.
pub struct Stalling<T: TestServer> {
    session: <T::Database as sqlx::Database>::Connection,
    alter: Option<JoinHandle<()>>,
}

impl<T: TestServer> Stalling<T> {
    pub async fn begin(database: &T, stall: Stall) -> Self {
        let mut session = database.connection().await;
        let sql = match stall {
            Stall::Everything if T::NAME == "postgres" => {
                "BEGIN; LOCK TABLE distributed_lock IN ACCESS EXCLUSIVE MODE"
            }
            Stall::Everything => "LOCK TABLES distributed_lock WRITE",
            Stall::Writes if T::NAME == "postgres" => "BEGIN; LOCK TABLE distributed_lock IN SHARE MODE",
            Stall::Writes => "LOCK TABLES distributed_lock READ",
            Stall::AlterBehindReader => "BEGIN; SELECT COUNT(*) FROM distributed_lock",
        };
        T::Database::run(&mut session, sql).await.unwrap();
        let mut alter = None;
        if stall == Stall::AlterBehindReader {
            let mut altering = database.connection().await;
            alter = Some(tokio::spawn(async move {
                let sql = "ALTER TABLE distributed_lock ADD COLUMN extra INT";
                T::Database::run(&mut altering, sql).await.unwrap();
            }));
            eventually(PATIENCE, async || database.activity().await.waiting > 0).await;
        }
        Self { session, alter }
    }

    pub async fn end(mut self) {
        let sql = if T::NAME == "postgres" { "ROLLBACK" } else { "UNLOCK TABLES; ROLLBACK" };
        T::Database::run(&mut self.session, sql).await.unwrap();
        if let Some(alter) = self.alter {
            alter.await.unwrap();
        }
    }
}

/// For a process that has used the table before, and for one that comes while it is locked. One that waits for long enough gets
/// the lock.
async fn locks_in_a_locked_table_are_not_held<T: TestServer>(database: &T) {
    let (near, pool) = (database.locks().await, database.pool(60).await);
    let locks = Locks::new(pool.clone());
    take_and_release::<T>(&locks, Kind::Insert, "before").await;
    let requests = Request::all(&SHORT_WAITS);
    let long: Vec<Request> = Request::all(&[PATIENCE])
        .into_iter()
        .filter(|request| request.wait.is_some() && !request.way.is_in_transaction())
        .collect();
    let mut wrong = Vec::new();
    for stall in Stall::ALL {
        let circumstances = format!("{stall:?}");
        use_some::<T>(&near, &requests, &circumstances).await;
        let name = |request| name_of(&circumstances, request);
        let asking = Requests::prepare(&locks, &pool, &requests, name).await;
        let waiting = Requests::prepare(&locks, &pool, &long, name).await;
        let new = Locks::new(pool.clone());
        let new_asking = Requests::prepare(&new, &pool, &Request::all(&[Duration::ZERO]), |request| {
            format!("new process, {}", name(request))
        })
        .await;
        let stalling = Stalling::begin(database, stall).await;
        let waiting = tokio::spawn(waiting.ask());
        let (asked, new_asked) = tokio::join!(asking.ask(), new_asking.ask());
        wrong.extend(asked.not_unknown(&circumstances));
        wrong.extend(new_asked.not_unknown(&format!("{circumstances}, a new process")));
        stalling.end().await;
        wrong.extend(waiting.await.unwrap().not_taken(&circumstances));
        assert_all_free::<T>(&near, &requests, &circumstances).await;
        assert_all_free::<T>(&locks, &requests, &circumstances).await;
    }
    assert_none(&wrong);
}

async fn a_locked_table_is_waited_for_in_a_transaction<T: TestServer>(database: &T) {
    let pool = database.pool(60).await;
    let locks = lock_tests::migrated(Locks::new(pool.clone())).await;
    let requests: Vec<Request> = Request::all(&[PATIENCE])
        .into_iter()
        .filter(|request| request.wait.is_some() && request.way.is_in_transaction())
        .collect();
    let mut wrong = Vec::new();
    for stall in Stall::ALL {
        let circumstances = format!("{stall:?}");
        let name = |request| name_of(&circumstances, request);
        let asking = Requests::prepare(&locks, &pool, &requests, name).await;
        let stalling = Stalling::begin(database, stall).await;
        let asked = tokio::spawn(asking.ask());
        // For longer than a statement of ours waits on the server.
        tokio::time::sleep(Duration::from_millis(2500)).await;
        stalling.end().await;
        wrong.extend(asked.await.unwrap().not_taken(&circumstances));
    }
    assert_none(&wrong);
}

// ---------------------------------------------------------------------------------- SQLite: somebody writes

/// It is not known whether that is a holder.
async fn while_another_transaction_writes<T: TestDatabase<Database = Sqlite>>(
    database: &T,
    requests: &[Request],
) {
    database.run("CREATE TABLE work (n INT)").await;
    let mut wrong = Vec::new();
    for journal in ["DELETE", "WAL"] {
        database.run(&format!("PRAGMA journal_mode = {journal}")).await;
        let (near, pool) = (database.locks().await, database.pool(40).await);
        let locks = Locks::new(pool.clone());
        take_and_release::<T>(&locks, Kind::Insert, "before").await;
        use_some::<T>(&near, requests, journal).await;
        let name = |request| name_of(journal, request);
        let asking = Requests::prepare(&locks, &pool, requests, name).await;
        let mut writer = database.connection().await;
        let mut writing = writer.begin_with("BEGIN IMMEDIATE").await.unwrap();
        Sqlite::run(&mut writing, "INSERT INTO work VALUES (1)").await.unwrap();
        wrong.extend(asking.ask().await.not_unknown(journal));
        writing.commit().await.unwrap();
        assert_all_free::<T>(&near, requests, journal).await;
        assert_all_free::<T>(&locks, requests, journal).await;
    }
    assert_none(&wrong);
}

async fn leases_are_not_held_by_another_writer<T: TestDatabase<Database = Sqlite>>(database: &T) {
    while_another_transaction_writes(database, &leases()).await;
}

async fn row_locks_are_not_held_by_another_writer<T: TestDatabase<Database = Sqlite>>(database: &T) {
    while_another_transaction_writes(database, &row_locks()).await;
}

async fn locks_in_transactions_are_not_held_by_another_writer<T: TestDatabase<Database = Sqlite>>(
    database: &T,
) {
    while_another_transaction_writes(database, &locks_in_transactions()).await;
}

/// And with a wait that is long enough, the lock is taken when it ends.
async fn another_writer_is_waited_out<T: TestDatabase<Database = Sqlite>>(database: &T) {
    database.run("CREATE TABLE work (n INT)").await;
    for journal in ["DELETE", "WAL"] {
        database.run(&format!("PRAGMA journal_mode = {journal}")).await;
        let locks = database.locks().await;
        let mut writer = database.connection().await;
        let mut writing = writer.begin_with("BEGIN IMMEDIATE").await.unwrap();
        Sqlite::run(&mut writing, "INSERT INTO work VALUES (1)").await.unwrap();
        let mut asking = JoinSet::new();
        for kind in [Kind::Insert, Kind::Row] {
            let locks = locks.clone();
            asking.spawn(async move { take_and_release::<T>(&locks, kind, &format!("{kind}")).await });
        }
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(asking.try_join_next().is_none());
        writing.commit().await.unwrap();
        asking.join_all().await;
    }
}
