//! The first uses of a name by several callers at once. Creating its row must not stop the session,
//! which handles all locks of a process.

use std::sync::Arc;
use std::sync::atomic::AtomicI64;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use lock_db::{Error, Kind, Locks};
use lock_tests::{Backend, Direction, Proxy, TestDatabase, TestServer, eventually};
use sqlx::Connection;
use tokio::task::JoinSet;

/// A statement on a private connection is given up after five seconds, and InnoDB gives up a locked
/// row after one.
const STANDSTILL: Duration = Duration::from_millis(3500);
const PATIENCE: Duration = Duration::from_mins(1);
const NAMES: usize = 60;

lock_tests::cases! {
    on every server:
    an_uncommitted_row_delays_no_other_name,
    two_new_names_in_one_transaction_get_their_locks,
    a_new_name_costs_as_many_messages_as_a_known_one,
    many_new_names_cost_as_many_messages_as_known_ones,
    one_uncommitted_row_among_new_names_delays_none_of_them,
    open_transactions_of_neighbours_are_not_in_the_way;

    on every database:
    the_row_is_made_with_the_grant,
    each_new_name_among_others_gets_its_own_answer,
    two_processes_make_the_same_rows,
    a_row_that_was_deleted_is_made_again,
    names_that_exist_use_up_no_numbers,
}

/// Another transaction creates the row, and makes no progress.
async fn an_uncommitted_row_delays_no_other_name<T: TestServer>(database: &T) {
    let (locks, pool) = (database.locks().await, database.pool(2).await);
    let mut maker = pool.begin().await.unwrap();
    let sql = "INSERT INTO distributed_lock (lock_name, lock_kind) VALUES ('new', 'row')";
    <T::Database as Backend>::run(&mut maker, sql).await.unwrap();

    let waiting = tokio::spawn(locks.row_lock("new").acquire());
    if T::NAME == "postgres" {
        eventually(PATIENCE, async || database.activity().await.waiting > 0).await;
    }
    let started = Instant::now();
    locks.insert_lock("other").acquire().await.unwrap().release().await.unwrap();
    assert!(started.elapsed() < STANDSTILL, "the session stood still for {:?}", started.elapsed());
    maker.commit().await.unwrap();
    waiting.await.unwrap().unwrap().rollback().await.unwrap();
}

/// A holder of the first lock needs the session for the second one, while others create the row of
/// the first one.
async fn two_new_names_in_one_transaction_get_their_locks<T: TestServer>(database: &T) {
    let (locks, pool) = (database.locks().await, Arc::new(database.pool(20).await));
    let started = Instant::now();
    let mut clicks = JoinSet::new();
    for click in 0..200 {
        let (locks, pool) = (locks.clone(), Arc::clone(&pool));
        clicks.spawn(async move {
            let mut connection = pool.acquire().await.unwrap();
            if T::NAME != "postgres" {
                // As PostgreSQL begins them: after a wait for the second lock, the snapshot is new.
                let sql = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED";
                <T::Database as Backend>::run(&mut connection, sql).await.unwrap();
            }
            loop {
                let mut tx = connection.begin().await.unwrap();
                let user = locks.row_lock(format!("user:{}", click / 5)).acquire_in(&mut tx).await;
                let stock = match user {
                    Ok(_) => locks.row_lock("stock").acquire_in(&mut tx).await,
                    refused => refused,
                };
                match stock {
                    Ok(_) => return tx.commit().await.unwrap(),
                    // The row was being created.
                    Err(Error::Serialization { .. }) => tx.rollback().await.unwrap(),
                    Err(error) => panic!("{error}"),
                }
            }
        });
    }
    while let Some(click) = clicks.join_next().await {
        click.unwrap();
    }
    assert!(started.elapsed() < 3 * STANDSTILL, "it took {:?}", started.elapsed());
}

/// A `Locks` whose private connection is behind a proxy, is open, and has prepared its statements
/// for one name and for many.
async fn warm<T: TestServer>(database: &T, proxy: &Proxy) -> Locks<T::Database> {
    drop(database.locks().await);
    let locks = Locks::new(lock_tests::pool::<T::Database>(&database.url_by(proxy.address()), 2).await);
    // So that requests of one moment travel together.
    proxy.delay(Direction::ToServer, Duration::from_millis(5));
    for round in 0..2 {
        for _ in 0..2 {
            locks.insert_lock(format!("warm {round}")).acquire().await.unwrap().release().await.unwrap();
            pairs(&locks, &format!("warm {round}"), 100).await;
        }
    }
    locks
}

/// Acquires and releases many names at the same time.
async fn pairs<DB: Backend>(locks: &Locks<DB>, prefix: &str, count: usize) {
    let mut tasks = JoinSet::new();
    for number in 0..count {
        let lock = locks.insert_lock(format!("{prefix} {number}")).wait(PATIENCE);
        tasks.spawn(async move { lock.acquire().await?.release().await });
    }
    for pair in tasks.join_all().await {
        pair.unwrap();
    }
}

async fn messages<F: Future>(proxy: &Proxy, work: F) -> usize {
    let before = proxy.reads(Direction::ToServer);
    work.await;
    proxy.reads(Direction::ToServer) - before
}

async fn a_new_name_costs_as_many_messages_as_a_known_one<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let locks = warm(database, &proxy).await;
    let pair = async || locks.insert_lock("new").acquire().await.unwrap().release().await.unwrap();
    let new = messages(&proxy, pair()).await;
    let known = messages(&proxy, pair()).await;
    assert!(new <= known, "{new} messages for a new name, {known} for a known one");
}

async fn many_new_names_cost_as_many_messages_as_known_ones<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let locks = warm(database, &proxy).await;
    for (what, prefix) in [("new", "many"), ("known", "many"), ("new", "others")] {
        let sent = messages(&proxy, pairs(&locks, prefix, 100)).await;
        assert!(sent < 25, "{sent} messages for 100 {what} names");
    }
}

/// The rows of the others are made without it.
async fn one_uncommitted_row_among_new_names_delays_none_of_them<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let (locks, pool) = (warm(database, &proxy).await, database.pool(1).await);
    let mut maker = pool.begin().await.unwrap();
    let sql = "INSERT INTO distributed_lock (lock_name) VALUES ('many 7')";
    <T::Database as Backend>::run(&mut maker, sql).await.unwrap();

    let started = Instant::now();
    let mut tasks = JoinSet::new();
    for number in 0..100 {
        let lock = locks.insert_lock(format!("many {number}")).wait(PATIENCE);
        tasks.spawn(async move { (number, lock.acquire().await.unwrap()) });
    }
    let mut leases = Vec::new();
    while leases.len() < 99 {
        leases.push(tasks.join_next().await.unwrap().unwrap());
    }
    assert!(started.elapsed() < STANDSTILL, "it took {:?}", started.elapsed());
    assert!(leases.iter().all(|(number, _)| *number != 7), "it was granted beside an open transaction");
    maker.commit().await.unwrap();
    leases.push(tasks.join_next().await.unwrap().unwrap());
    for (_, lease) in leases {
        lease.release().await.unwrap();
    }
}

/// Their locks must not reach the gaps in which new rows belong.
async fn open_transactions_of_neighbours_are_not_in_the_way<T: TestServer>(database: &T) {
    let (locks, pool) = (database.locks().await, database.pool(4).await);
    for name in ["b", "d", "f"] {
        locks.insert_lock(name).acquire().await.unwrap().release().await.unwrap();
    }
    locks.row_lock("h").acquire().await.unwrap().commit().await.unwrap();
    let guarding = locks.insert_lock("b").acquire().await.unwrap();
    let guarded = guarding.begin().await.unwrap();
    let (mut verified, mut kept) = (pool.begin().await.unwrap(), pool.begin().await.unwrap());
    let verifying = locks.insert_lock("d").acquire().await.unwrap();
    verifying.verify_in(&mut verified).await.unwrap();
    locks.insert_lock("f").acquire_in(&mut kept).await.unwrap();
    let row = locks.row_lock("h").acquire().await.unwrap();

    let started = Instant::now();
    for process in 0..2 {
        let locks = Locks::new(database.pool(2).await);
        pairs(&locks, &format!("a{process}"), 20).await;
        for name in ["a", "c", "e", "g", "i"] {
            let new = format!("{name}{process}");
            locks.insert_lock(&new).try_acquire().await.unwrap().expect("it is new").release().await.unwrap();
        }
        assert!(locks.insert_lock("d").try_acquire().await.unwrap().is_none());
    }
    assert!(started.elapsed() < STANDSTILL, "it took {:?}", started.elapsed());
    guarded.commit().await.unwrap();
    verified.commit().await.unwrap();
    kept.commit().await.unwrap();
    row.rollback().await.unwrap();
}

async fn the_row_is_made_with_the_grant<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let before = locks.insert_lock("before").acquire().await.unwrap();
    let label = Locks::builder(locks.pool().clone()).label("it's me: é").build();
    let lease = label.insert_lock("new").ttl(Duration::from_secs(20)).acquire().await.unwrap();
    assert!(lease.fencing_token() > before.fencing_token());
    let info = locks.info("new").await.unwrap().expect("its row");
    assert_eq!((info.fencing_token, info.kind), (lease.fencing_token(), Kind::Insert));
    assert!(info.held_until.is_some() && info.owner.contains("it's me: é"), "{info:?}");
    let left = database.number("SELECT ttl_micros FROM distributed_lock WHERE lock_name = 'new'").await;
    assert_eq!(left, 20_000_000);
    // It is renewed, guards, and is released like any other.
    let mut transaction = lease.begin().await.unwrap();
    <T::Database as Backend>::run(&mut transaction, "SELECT 1").await.unwrap();
    lease.commit_and_release(transaction).await.unwrap();
    let again = locks.insert_lock("new").try_acquire().await.unwrap().expect("it was released");
    assert!(again.fencing_token() > info.fencing_token);
}

/// A process asks for many names at once that it has never seen.
async fn each_new_name_among_others_gets_its_own_answer<T: TestDatabase>(database: &T) {
    let other = database.locks().await;
    let held = other.insert_lock("held").acquire().await.unwrap();
    other.row_lock("row").acquire().await.unwrap().commit().await.unwrap();
    let free = other.insert_lock("free").acquire().await.unwrap();
    let token = free.fencing_token();
    free.release().await.unwrap();

    let locks = Locks::new(database.pool(4).await);
    let mut tasks = JoinSet::new();
    for name in ["new 1", "held", "row", "free", "new 2", "new 3"] {
        let lock = locks.insert_lock(name);
        tasks.spawn(async move { (name, lock.try_acquire().await) });
    }
    for (name, answer) in tasks.join_all().await {
        match name {
            "held" => assert!(matches!(answer, Ok(None)), "{answer:?}"),
            "row" => assert!(matches!(answer, Err(Error::WrongKind { .. })), "{answer:?}"),
            "free" => assert!(answer.unwrap().unwrap().fencing_token() > token),
            _ => assert!(matches!(answer, Ok(Some(_))), "{name}: {answer:?}"),
        }
    }
    held.release().await.unwrap();
    assert_eq!(database.number("SELECT COUNT(*) FROM distributed_lock").await, 6);
}

/// In different orders, at the same time.
async fn two_processes_make_the_same_rows<T: TestDatabase>(database: &T) {
    drop(database.locks().await);
    let inside: Arc<Vec<AtomicI64>> = Arc::new((0..NAMES).map(|_| AtomicI64::new(0)).collect());
    let mut tasks = JoinSet::new();
    for process in 0..3 {
        let locks = Locks::new(database.pool(2).await);
        for step in 0..NAMES {
            // Each process begins elsewhere and goes another way.
            let number = (process * 17 + step * [1, 7, 11][process]) % NAMES;
            let (locks, inside) = (locks.clone(), Arc::clone(&inside));
            tasks.spawn(async move {
                let lease = locks.insert_lock(format!("{number}")).wait(PATIENCE).acquire().await.unwrap();
                let before = inside[number].swap(lease.fencing_token(), SeqCst);
                assert!(before < lease.fencing_token(), "{before}, {lease:?}");
                tokio::task::yield_now().await;
                assert_eq!(inside[number].load(SeqCst), lease.fencing_token());
                lease.release().await.unwrap();
            });
        }
    }
    while let Some(pair) = tasks.join_next().await {
        pair.unwrap();
    }
    assert_eq!(database.number("SELECT COUNT(*) FROM distributed_lock").await, NAMES as i64);
}

/// The process has seen the row, and does not look for it.
async fn a_row_that_was_deleted_is_made_again<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let mut last = 0;
    for round in 0..4 {
        let lease = locks.insert_lock("a").acquire().await.unwrap();
        assert!(lease.fencing_token() > last, "{last}, {lease:?}");
        last = lease.fencing_token();
        lease.release().await.unwrap();
        if round < 2 {
            database.run("DELETE FROM distributed_lock").await;
        }
    }
    // Several at once: some rows are gone.
    pairs(&locks, "b", 20).await;
    database.run("DELETE FROM distributed_lock WHERE lock_name LIKE 'b 1%'").await;
    pairs(&locks, "b", 20).await;
    assert_eq!(database.number("SELECT COUNT(*) FROM distributed_lock").await, 21);
}

/// A process that has not seen a name looks for it, again and again while others hold it.
async fn names_that_exist_use_up_no_numbers<T: TestDatabase>(database: &T) {
    let other = database.locks().await;
    let _held = other.insert_lock("held").acquire().await.unwrap();
    other.insert_lock("free").acquire().await.unwrap().release().await.unwrap();
    let last = "SELECT MAX(id) FROM distributed_lock";
    let before = database.number(last).await;
    for _ in 0..5 {
        let locks = Locks::new(database.pool(2).await);
        for _ in 0..3 {
            assert!(locks.insert_lock("held").try_acquire().await.unwrap().is_none());
            let free = locks.insert_lock("free").wait(PATIENCE);
            free.acquire().await.unwrap().release().await.unwrap();
            let both = tokio::join!(
                locks.insert_lock("held").try_acquire(),
                locks.insert_lock("free").wait(PATIENCE).acquire(),
            );
            both.1.unwrap().release().await.unwrap();
        }
    }
    other.insert_lock("new").acquire().await.unwrap().release().await.unwrap();
    assert_eq!(database.number(last).await, before + 1);
}
