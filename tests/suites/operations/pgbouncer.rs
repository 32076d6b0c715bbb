//! Locks behind PgBouncer. In transaction mode every transaction may run on another server
//! connection, and other applications use the same ones.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use lock_db::{Error, Locks};
use lock_tests::{
    Backend, Parent, PgBouncer, PoolMode, PostgresServer, Process, TestDatabase, connection, eventually,
    migrated, note, pool,
};
use sqlx::postgres::PgListener;
use sqlx::{Connection, PgConnection, PgPool, PgTransaction, Postgres};
use tokio::task::JoinSet;
use tokio::time::timeout;

lock_tests::cases! {
    on postgres:
    a_pooler_ends_with_the_process_that_started_it,
    the_schema_is_made_through_a_pooler,
    another_application_on_the_pool_is_not_disturbed,
    no_session_state_stays_on_a_server_connection,
    transactions_on_all_server_connections_lock_new_names,
    transactions_on_all_server_connections_take_new_leases,
    transactions_on_all_server_connections_lock_several_new_names,
    transactions_on_all_server_connections_lock_names_of_another_process,
    transactions_on_all_server_connections_wait_for_one_row_lock,
    transactions_on_all_server_connections_wait_for_one_lease,
    more_transactions_than_server_connections_lock_new_names,
    the_next_waiter_is_notified_in_session_mode,
    no_update_is_lost_when_the_pooler_restarts,
}

lock_tests::child_roles! { start_a_pooler }

const PATIENCE: Duration = Duration::from_mins(1);
const LONG: Duration = Duration::from_mins(10);
/// The time that an acquire may wait.
const WAIT: Duration = Duration::from_secs(30);
/// Well below the wait, and far more than a free lock takes on a busy machine.
const SOON: Duration = Duration::from_secs(10);
/// Server connections of the pooler.
const SERVER_CONNECTIONS: u32 = 4;

async fn in_transaction_mode(database: &PostgresServer) -> PgBouncer {
    PgBouncer::start(database.url(), PoolMode::Transaction, SERVER_CONNECTIONS).await
}

/// A `Locks` on a pool of its own, through the pooler, as another process has.
async fn locks_through(pooler: &PgBouncer) -> Locks<Postgres> {
    migrated(Locks::new(pool(&pooler.url(), 2).await)).await
}

// ------------------------------------------------------------------------------------- the harness

async fn start_a_pooler<DB: Backend>(mut parent: Parent) {
    let pooler = PgBouncer::start(parent.url(), PoolMode::Session, 1).await;
    connection::<DB>(&pooler.url()).await.close().await.unwrap();
    parent.say(pooler.url());
    parent.say(pooler.folder().display());
    parent.hear().await;
}

/// Also when that process is killed.
async fn a_pooler_ends_with_the_process_that_started_it(database: &PostgresServer) {
    let own = in_transaction_mode(database).await;
    let mut child = Process::spawn("start_a_pooler", database.url(), [""; 0]);
    let (url, folder) = (child.hear().await, child.hear().await);
    assert_ne!(url, own.url());
    PgConnection::connect(&url).await.unwrap().close().await.unwrap();
    child.kill();
    eventually(PATIENCE, async || PgConnection::connect(&url).await.is_err()).await;
    std::fs::remove_dir_all(folder).unwrap();
    PgConnection::connect(&own.url()).await.unwrap().close().await.unwrap();
}

// -------------------------------------------------------------------------------------- the schema

async fn the_schema_is_made_through_a_pooler(database: &PostgresServer) {
    let pooler = in_transaction_mode(database).await;
    let mut migrating = JoinSet::new();
    for _ in 0..2 * SERVER_CONNECTIONS {
        let locks = Locks::new(pool::<Postgres>(&pooler.url(), 1).await);
        migrating.spawn(async move {
            locks.migrate().await?;
            locks.check().await.map(drop)
        });
    }
    migrating.join_all().await.into_iter().collect::<Result<Vec<()>, Error>>().unwrap();
    assert_eq!(database.advisory_locks().await, 0);
}

// ------------------------------------------------------------------------------ other applications

/// A lock that goes from one process to the other and back. Returns when each has had it `rounds`
/// times.
async fn take_turns(processes: &[Locks<Postgres>; 2], rounds: usize) {
    let mut taking = JoinSet::new();
    for locks in processes.clone() {
        taking.spawn(async move {
            for _ in 0..rounds {
                let lease = locks.insert_lock("turn").wait(PATIENCE).acquire().await.unwrap();
                lease.begin().await.unwrap().commit().await.unwrap();
                lease.release().await.unwrap();
            }
        });
    }
    taking.join_all().await;
}

/// An application without lock-db inserts and commits until `ended`. Returns which of its calls
/// failed, and why.
async fn insert_until(pool: PgPool, ended: Arc<AtomicBool>) -> Vec<String> {
    let mut failures = Vec::new();
    while !ended.load(Ordering::Relaxed) {
        let inserted = async {
            let mut transaction = pool.begin().await?;
            sqlx::query("INSERT INTO orders (number) VALUES ($1)")
                .bind(7_i64)
                .execute(&mut *transaction)
                .await?;
            transaction.commit().await
        };
        if let Err(error) = inserted.await {
            failures.push(error.to_string());
        }
    }
    failures
}

/// A notification that reaches a client which never requested one is a protocol violation for its
/// driver.
async fn another_application_on_the_pool_is_not_disturbed(database: &PostgresServer) {
    const CLIENTS: u32 = 4;
    let pooler = in_transaction_mode(database).await;
    database.run("CREATE TABLE orders (id BIGSERIAL PRIMARY KEY, number BIGINT)").await;
    let processes = [locks_through(&pooler).await, locks_through(&pooler).await];
    let application = pool::<Postgres>(&pooler.url(), CLIENTS).await;
    let ended = Arc::new(AtomicBool::new(false));
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(insert_until(application.clone(), Arc::clone(&ended)));
    }
    take_turns(&processes, 150).await;
    ended.store(true, Ordering::Relaxed);
    let failures: Vec<String> = clients.join_all().await.into_iter().flatten().collect();
    assert!(database.number("SELECT count(*) FROM orders").await > 0);
    assert!(failures.is_empty(), "{} calls failed, the first one: {}", failures.len(), failures[0]);
}

/// A transaction on every server connection at once: no other client gets one before they end.
async fn on_all_server_connections(pooler: &PgBouncer) -> Vec<PgTransaction<'static>> {
    let pool = pool::<Postgres>(&pooler.url(), SERVER_CONNECTIONS).await;
    let mut transactions = Vec::new();
    let mut backends = HashSet::new();
    for _ in 0..SERVER_CONNECTIONS {
        let mut transaction = pool.begin().await.unwrap();
        backends.insert(Postgres::find_number(&mut transaction, "SELECT pg_backend_pid()").await.unwrap());
        transactions.push(transaction);
    }
    assert_eq!(backends.len(), SERVER_CONNECTIONS as usize, "each has a server connection of its own");
    transactions
}

/// The state of a session that outlives its transactions. The pooler sets some settings for its
/// clients itself.
const SESSION_STATE: &str = "SELECT string_agg(found, ', ') FROM (
    SELECT 'LISTEN ' || pg_listening_channels() AS found
    UNION ALL SELECT 'SET ' || name || ' = ' || setting FROM pg_settings
        WHERE source = 'session' AND context <> 'internal' AND name NOT IN ('client_encoding', 'DateStyle', 'TimeZone',
            'IntervalStyle', 'standard_conforming_strings', 'application_name', 'search_path')
    UNION ALL SELECT locktype || ' lock ' || objid FROM pg_locks
        WHERE pid = pg_backend_pid() AND locktype = 'advisory'
    UNION ALL SELECT 'temporary table ' || relname FROM pg_class WHERE relnamespace = pg_my_temp_schema()) AS state";

async fn no_session_state_stays_on_a_server_connection(database: &PostgresServer) {
    let pooler = in_transaction_mode(database).await;
    let processes = [locks_through(&pooler).await, locks_through(&pooler).await];
    take_turns(&processes, 10).await;
    for locks in &processes {
        let several = locks.insert_locks(["a", "b"]).wait(WAIT).acquire().await.unwrap();
        several.release().await.unwrap();
        locks.row_lock("row").acquire().await.unwrap().commit().await.unwrap();
        let lease = locks.insert_lock("try").try_acquire().await.unwrap();
        // Dropped, it would be released a moment later, and the other process may try before that.
        lease.expect("it is free").release().await.unwrap();
        locks.info("a").await.unwrap();
    }
    // Also while one process waits for the other.
    let held = processes[0].insert_lock("turn").ttl(LONG).acquire().await.unwrap();
    let waiting = tokio::spawn(processes[1].insert_lock("turn").wait(PATIENCE).acquire());
    let waits = "SELECT count(*) FROM distributed_lock WHERE lock_name = 'turn' AND waiters <> ''";
    eventually(PATIENCE, async || database.number(waits).await == 1).await;
    let mut left = Vec::new();
    let mut transactions = on_all_server_connections(&pooler).await;
    for transaction in &mut transactions {
        left.extend(Postgres::find_text(transaction, SESSION_STATE).await.unwrap());
    }
    for transaction in transactions {
        transaction.rollback().await.unwrap();
    }
    held.release().await.unwrap();
    waiting.await.unwrap().unwrap().release().await.unwrap();
    assert!(left.is_empty(), "{left:?}");
}

// ---------------------------------------------------------- transactions that have all connections

/// Every server connection is in a transaction of the application, so no further connection is
/// available to these.
async fn in_all_transactions(
    database: &PostgresServer,
    lock: impl AsyncFn(&Locks<Postgres>, &mut PgConnection, u32) -> Result<(), Error>,
) {
    let pooler = in_transaction_mode(database).await;
    let locks = locks_through(&pooler).await;
    for round in 0..3 {
        let mut transactions = on_all_server_connections(&pooler).await;
        for (number, transaction) in (0..).zip(&mut transactions) {
            let new = round * SERVER_CONNECTIONS + number;
            let locked = timeout(SOON, lock(&locks, transaction, new)).await;
            locked.unwrap_or_else(|_| panic!("not within {SOON:?}")).unwrap();
        }
        for transaction in transactions {
            transaction.commit().await.unwrap();
        }
    }
}

async fn transactions_on_all_server_connections_lock_new_names(database: &PostgresServer) {
    in_all_transactions(database, async |locks, transaction, new| {
        locks.row_lock(format!("order:{new}")).wait(WAIT).acquire_in(transaction).await.map(drop)
    })
    .await;
}

async fn transactions_on_all_server_connections_take_new_leases(database: &PostgresServer) {
    in_all_transactions(database, async |locks, transaction, new| {
        locks.insert_lock(format!("order:{new}")).wait(WAIT).acquire_in(transaction).await.map(drop)
    })
    .await;
}

async fn transactions_on_all_server_connections_lock_several_new_names(database: &PostgresServer) {
    in_all_transactions(database, async |locks, transaction, new| {
        let names = [format!("order:{new}"), format!("invoice:{new}")];
        locks.row_locks(names).wait(WAIT).acquire_in(transaction).await.map(drop)
    })
    .await;
}

/// Their rows exist, but this process has not seen them.
async fn transactions_on_all_server_connections_lock_names_of_another_process(database: &PostgresServer) {
    let other = database.locks().await;
    for number in 0..3 * SERVER_CONNECTIONS {
        other.row_lock(format!("order:{number}")).acquire().await.unwrap().rollback().await.unwrap();
    }
    transactions_on_all_server_connections_lock_new_names(database).await;
}

/// One has the lock, and the others wait for it in the database.
async fn pass_on_in_all_transactions(
    database: &PostgresServer,
    lock: impl AsyncFn(&Locks<Postgres>, &mut PgConnection) -> Result<(), Error>,
) {
    let pooler = in_transaction_mode(database).await;
    let locks = locks_through(&pooler).await;
    // The name is no longer new.
    let mut first = pool::<Postgres>(&pooler.url(), 1).await.begin().await.unwrap();
    lock(&locks, &mut first).await.unwrap();
    first.commit().await.unwrap();
    let mut transactions = on_all_server_connections(&pooler).await;
    let mut holder = transactions.pop().unwrap();
    timeout(SOON, lock(&locks, &mut holder)).await.expect("the first one is not soon").unwrap();
    let waiters = transactions.len();
    let all_wait = async {
        eventually(SOON, async || database.activity().await.waiting == waiters).await;
        holder.commit().await.unwrap();
    };
    let all_have_it = join_all(transactions.into_iter().map(async |mut transaction| {
        lock(&locks, &mut transaction).await.unwrap();
        transaction.commit().await.unwrap();
    }));
    let all = async { tokio::join!(all_wait, all_have_it) };
    timeout(2 * SOON, all).await.expect("not soon after they began to wait");
}

async fn transactions_on_all_server_connections_wait_for_one_row_lock(database: &PostgresServer) {
    pass_on_in_all_transactions(database, async |locks, transaction| {
        locks.row_lock("order").wait(WAIT).acquire_in(transaction).await.map(drop)
    })
    .await;
}

async fn transactions_on_all_server_connections_wait_for_one_lease(database: &PostgresServer) {
    pass_on_in_all_transactions(database, async |locks, transaction| {
        locks.insert_lock("order").wait(WAIT).acquire_in(transaction).await.map(drop)
    })
    .await;
}

async fn more_transactions_than_server_connections_lock_new_names(database: &PostgresServer) {
    const TASKS: u32 = 2 * SERVER_CONNECTIONS;
    const ROUNDS: u32 = 20;
    let pooler = in_transaction_mode(database).await;
    let business = pool::<Postgres>(&pooler.url(), TASKS).await;
    let locks = migrated(Locks::new(business.clone())).await;
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (business, locks) = (business.clone(), locks.clone());
        tasks.spawn(async move {
            for round in 0..ROUNDS {
                let mut transaction = business.begin().await.unwrap();
                let name = format!("order:{task}:{round}");
                let taken = async {
                    if round % 2 == 0 {
                        locks.row_lock(name).wait(WAIT).acquire_in(&mut transaction).await
                    } else {
                        locks.insert_lock(name).wait(WAIT).acquire_in(&mut transaction).await
                    }
                };
                timeout(SOON, taken).await.unwrap_or_else(|_| panic!("not within {SOON:?}")).unwrap();
                transaction.commit().await.unwrap();
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
}

// ------------------------------------------------------------------------------------ session mode

/// In session mode a client has its server connection for itself.
async fn the_next_waiter_is_notified_in_session_mode(database: &PostgresServer) {
    let pooler = PgBouncer::start(database.url(), PoolMode::Session, 20).await;
    let processes = [locks_through(&pooler).await, locks_through(&pooler).await];
    let held = processes[0].insert_lock("turn").ttl(LONG).acquire().await.unwrap();
    let waiting = tokio::spawn(processes[1].insert_lock("turn").ttl(LONG).wait(PATIENCE).acquire());
    let listening = "SELECT substring(query FROM 'lock_db_([0-9a-f]+)') FROM pg_stat_activity
        WHERE datname = current_database() AND pid <> pg_backend_pid() AND query LIKE 'LISTEN %'";
    eventually(PATIENCE, async || database.find_text(listening).await.is_some()).await;
    let listener_id = database.text(listening).await;
    let queued = format!(
        "SELECT count(*) FROM distributed_lock WHERE lock_name = 'turn' AND position('{listener_id}' IN waiters) > 0"
    );
    eventually(PATIENCE, async || database.number(&queued).await == 1).await;
    let mut listener = PgListener::connect(database.url()).await.unwrap();
    listener.listen(&format!("lock_db_{listener_id}")).await.unwrap();
    held.release().await.unwrap();
    timeout(PATIENCE, listener.recv()).await.expect("no notification").unwrap();
    waiting.await.unwrap().unwrap().release().await.unwrap();
    take_turns(&processes, 20).await;
}

// ---------------------------------------------------------------------------------------- workload

#[derive(Debug, Clone, Copy)]
enum Kind {
    Lease,
    Guarded,
    SeveralLeases,
    RowLock,
    RowLockInTransaction,
    SeveralRowLocks,
}

const KINDS: [Kind; 6] = [
    Kind::Lease,
    Kind::Guarded,
    Kind::SeveralLeases,
    Kind::RowLock,
    Kind::RowLockInTransaction,
    Kind::SeveralRowLocks,
];

/// How an increment of a counter ended.
enum Step {
    Done,
    /// It certainly failed.
    NotDone(String),
    /// The answer to its commit is missing.
    Unknown,
}

/// Of all workers of one kind.
#[derive(Default)]
struct Count {
    done: AtomicI64,
    unknown: AtomicI64,
    failed: AtomicI64,
    is_inside: AtomicBool,
}

/// Reads, adds and writes: loses updates without a lock.
async fn increment(connection: &mut PgConnection, kind: Kind) -> sqlx::Result<()> {
    let id = kind as i32;
    let n: i64 = sqlx::query_scalar("SELECT n FROM counter WHERE id = $1")
        .bind(id)
        .fetch_one(&mut *connection)
        .await?;
    sqlx::query("UPDATE counter SET n = $2 WHERE id = $1").bind(id).bind(n + 1).execute(connection).await?;
    Ok(())
}

fn outcome<E>(committed: Result<(), E>) -> Step {
    committed.map_or(Step::Unknown, |()| Step::Done)
}

async fn step(kind: Kind, locks: &Locks<Postgres>, pool: &PgPool, count: &Count) -> Result<Step, Error> {
    const TTL: Duration = Duration::from_secs(10);
    let name = format!("{kind:?}");
    let names = [format!("{name}:1"), format!("{name}:2")];
    match kind {
        Kind::Lease => {
            let lease = locks.insert_lock(name).ttl(TTL).wait(PATIENCE).acquire().await?;
            // All workers are in this process; they don't need the database to see one another.
            assert!(!count.is_inside.swap(true, Ordering::SeqCst), "two holders");
            tokio::task::yield_now().await;
            count.is_inside.store(false, Ordering::SeqCst);
            lease.release().await?;
            Ok(Step::Done)
        }
        Kind::Guarded => {
            let lease = locks.insert_lock(name).ttl(TTL).wait(PATIENCE).acquire().await?;
            let mut transaction = lease.begin().await?;
            if let Err(error) = increment(&mut transaction, kind).await {
                return Ok(Step::NotDone(error.to_string()));
            }
            let step = outcome(transaction.commit().await);
            let _released_or_lost = lease.release().await;
            Ok(step)
        }
        Kind::SeveralLeases => {
            let leases = locks.insert_locks(names).ttl(TTL).wait(PATIENCE).acquire().await?;
            let mut transaction = match pool.begin().await {
                Ok(transaction) => transaction,
                Err(error) => return Ok(Step::NotDone(error.to_string())),
            };
            if let Err(error) = increment(&mut transaction, kind).await {
                return Ok(Step::NotDone(error.to_string()));
            }
            leases.verify_in(&mut transaction).await?;
            let step = outcome(transaction.commit().await);
            let _released_or_lost = leases.release().await;
            Ok(step)
        }
        Kind::RowLock => {
            let mut guard = locks.row_lock(name).wait(PATIENCE).acquire().await?;
            if let Err(error) = increment(&mut guard, kind).await {
                return Ok(Step::NotDone(error.to_string()));
            }
            Ok(outcome(guard.commit().await))
        }
        Kind::RowLockInTransaction | Kind::SeveralRowLocks => {
            let mut transaction = match pool.begin().await {
                Ok(transaction) => transaction,
                Err(error) => return Ok(Step::NotDone(error.to_string())),
            };
            if matches!(kind, Kind::SeveralRowLocks) {
                locks.row_locks(names).wait(PATIENCE).acquire_in(&mut transaction).await?;
            } else {
                locks.row_lock(name).wait(PATIENCE).acquire_in(&mut transaction).await?;
            }
            if let Err(error) = increment(&mut transaction, kind).await {
                return Ok(Step::NotDone(error.to_string()));
            }
            Ok(outcome(transaction.commit().await))
        }
    }
}

async fn work(
    kind: Kind,
    locks: Locks<Postgres>,
    pool: PgPool,
    counts: Arc<Vec<Count>>,
    ended: Arc<AtomicBool>,
) {
    let count = &counts[kind as usize];
    while !ended.load(Ordering::Relaxed) {
        let counter = match step(kind, &locks, &pool, count).await {
            Ok(Step::Done) => &count.done,
            Ok(Step::Unknown) => &count.unknown,
            Ok(Step::NotDone(error)) => {
                note(format_args!("{kind:?}: {error}"));
                &count.failed
            }
            Err(error) => {
                note(format_args!("{kind:?}: {error}"));
                &count.failed
            }
        };
        counter.fetch_add(1, Ordering::SeqCst);
        tokio::task::yield_now().await;
    }
}

/// Waits until each kind has been done this many more times.
async fn go_on(counts: &[Count], times: i64) {
    let done = |count: &Count| count.done.load(Ordering::SeqCst);
    let goals: Vec<i64> = counts.iter().map(|count| done(count) + times).collect();
    eventually(PATIENCE, async || counts.iter().zip(&goals).all(|(count, goal)| done(count) >= *goal)).await;
}

async fn no_update_is_lost_when_the_pooler_restarts(database: &PostgresServer) {
    const TIMES: i64 = 20;
    let mut pooler = in_transaction_mode(database).await;
    database.run("CREATE TABLE counter (id INT PRIMARY KEY, n BIGINT NOT NULL)").await;
    database.run("INSERT INTO counter SELECT id, 0 FROM generate_series(0, 5) AS id").await;
    let counts: Arc<Vec<Count>> = Arc::new(KINDS.iter().map(|_| Count::default()).collect());
    let ended = Arc::new(AtomicBool::new(false));
    let mut processes = Vec::new();
    for _ in 0..2 {
        let pool = pool::<Postgres>(&pooler.url(), 6).await;
        let locks = migrated(Locks::new(pool.clone())).await;
        // Other cases test the first use of a name.
        for kind in KINDS {
            assert!(matches!(step(kind, &locks, &pool, &counts[kind as usize]).await, Ok(Step::Done)));
            counts[kind as usize].done.fetch_add(1, Ordering::SeqCst);
        }
        processes.push((pool, locks));
    }
    let mut workers = JoinSet::new();
    for (pool, locks) in processes {
        for kind in KINDS {
            workers.spawn(work(kind, locks.clone(), pool.clone(), Arc::clone(&counts), Arc::clone(&ended)));
        }
    }
    go_on(&counts, TIMES).await;
    for (kind, count) in KINDS.iter().zip(counts.iter()) {
        assert_eq!(count.failed.load(Ordering::SeqCst), 0, "{kind:?}");
        assert_eq!(count.unknown.load(Ordering::SeqCst), 0, "{kind:?}");
    }
    for _ in 0..2 {
        pooler.kill();
        pooler.restart().await;
        go_on(&counts, TIMES).await;
    }
    ended.store(true, Ordering::Relaxed);
    while let Some(worker) = workers.join_next().await {
        worker.unwrap();
    }
    for (kind, count) in KINDS.iter().zip(counts.iter()) {
        if matches!(kind, Kind::Lease) {
            continue; // It writes nothing.
        }
        let n = database.number(&format!("SELECT n FROM counter WHERE id = {}", *kind as i32)).await;
        let (done, unknown) = (count.done.load(Ordering::SeqCst), count.unknown.load(Ordering::SeqCst));
        assert!((done..=done + unknown).contains(&n), "{kind:?}: {n}, but {done} done and {unknown} unknown");
    }
}
