//! Many callers at once: waiters don't keep others from locks that are free.

use std::task::Poll;
use std::time::Duration;

use lock_db::{Error, Locks};
use lock_tests::{Backend, Direction, TestDatabase, TestServer, eventually};
use tokio::task::JoinSet;

lock_tests::cases! {
    on every database:
    waiters_for_a_row_leave_connections_to_its_holder,
    every_close_waits_for_the_releases,
    requests_of_one_batch_fail_one_by_one;

    on every server:
    waiters_for_rows_of_other_processes_leave_half_of_the_pool,
    a_free_row_is_noticed_by_a_request_that_may_not_wait_in_the_database,
    waiters_for_names_that_transactions_hold_delay_no_other_name,
    a_long_queue_of_statements_is_not_taken_for_a_silent_server,
    waiting_requests_are_sent_as_one_batch,
    a_released_lease_may_be_taken_immediately,
    another_writer_delays_requests_only_briefly,
    a_batch_releases_a_lease_that_guards_an_open_transaction,
}

const PATIENCE: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_mins(10);

/// The body of each holder needs a second connection of the same small pool.
async fn waiters_for_a_row_leave_connections_to_its_holder<T: TestDatabase>(database: &T) {
    database.run("CREATE TABLE counter (n BIGINT)").await;
    database.run("INSERT INTO counter VALUES (7)").await;
    let pool = database.pool(3).await;
    let locks = lock_tests::migrated(Locks::new(pool.clone())).await;
    let mut callers = JoinSet::new();
    for _ in 0..20 {
        let (locks, pool) = (locks.clone(), pool.clone());
        callers.spawn(async move {
            let held = locks.row_lock("a").wait(PATIENCE).acquire().await?;
            let mut connection = pool.acquire().await.unwrap();
            let read = T::Database::find_number(&mut connection, "SELECT n FROM counter").await;
            assert_eq!(read.unwrap(), Some(7));
            held.commit().await
        });
    }
    callers.join_all().await.into_iter().collect::<Result<Vec<_>, Error>>().unwrap();
}

async fn waiters_for_rows_of_other_processes_leave_half_of_the_pool<T: TestServer>(database: &T) {
    let other = database.locks().await;
    let mut held = Vec::new();
    for number in 0..6 {
        held.push(other.row_lock(number.to_string()).acquire().await.unwrap());
    }
    let pool = database.pool(4).await;
    let locks = Locks::new(pool.clone());
    let mut waiting = JoinSet::new();
    for number in 0..6 {
        waiting.spawn(locks.row_lock(number.to_string()).wait(PATIENCE).acquire());
    }
    // Both requests that may wait in the database do.
    eventually(PATIENCE, async || database.activity().await.waiting == 2).await;
    for _ in 0..3 {
        // There is a connection for the lock, and one for the other work of its holder.
        let free = locks.row_lock("free").wait(PATIENCE).acquire().await.unwrap();
        drop(pool.acquire().await.unwrap());
        free.commit().await.unwrap();
    }
    // A request that may not wait in the database also gets its lock when it is free.
    let held_for_long = held.split_off(5);
    drop(held);
    for _ in 0..5 {
        waiting.join_next().await.unwrap().unwrap().unwrap().rollback().await.unwrap();
    }
    assert!(waiting.try_join_next().is_none());
    drop(held_for_long);
    // And all of them get their lock in the end.
    while let Some(taken) = waiting.join_next().await {
        taken.unwrap().unwrap().rollback().await.unwrap();
    }
}

/// All requests that may wait in the database do, and for long.
async fn a_free_row_is_noticed_by_a_request_that_may_not_wait_in_the_database<T: TestServer>(database: &T) {
    let other = database.locks().await;
    let long = other.row_lock("long").acquire().await.unwrap();
    let short = other.row_lock("short").acquire().await.unwrap();
    let locks = Locks::new(database.pool(2).await);
    let waiting = tokio::spawn(locks.row_lock("long").wait(PATIENCE).acquire());
    eventually(PATIENCE, async || database.activity().await.waiting == 1).await;
    let taking = tokio::spawn(locks.row_lock("short").wait(PATIENCE).acquire());
    short.rollback().await.unwrap();
    taking.await.unwrap().unwrap().rollback().await.unwrap();
    assert!(!waiting.is_finished());
    long.rollback().await.unwrap();
    waiting.await.unwrap().unwrap().rollback().await.unwrap();
}

/// Their rows look free, but are locked.
async fn waiters_for_names_that_transactions_hold_delay_no_other_name<T: TestServer>(database: &T) {
    let names: Vec<String> = (0..8).map(|number| number.to_string()).collect();
    let (locks, other) = (database.locks().await, database.locks().await);
    let mut holder = database.pool(1).await.begin().await.unwrap();
    other.insert_locks(&names).acquire_in(&mut holder).await.unwrap();
    let mut waiting = JoinSet::new();
    for name in &names {
        waiting.spawn(locks.insert_lock(name).wait(PATIENCE).acquire());
    }
    // While they wait, other requests get locks that are free, and release them.
    for number in 0..50 {
        let free = locks.insert_lock(format!("free {number}")).wait(Duration::from_secs(3)).acquire().await;
        free.unwrap().release().await.unwrap();
    }
    let ended = waiting.try_join_next();
    assert!(ended.is_none(), "{ended:?}");
    // They also learn that a row is locked when it is their own.
    let lease = locks.insert_lock("own").ttl(LONG).acquire().await.unwrap();
    let mut verified = database.pool(1).await.begin().await.unwrap();
    lease.verify_in(&mut verified).await.unwrap();
    let releasing = tokio::spawn(lease.release());
    locks.insert_lock("free").wait(Duration::from_secs(3)).acquire().await.unwrap().release().await.unwrap();
    verified.rollback().await.unwrap();
    releasing.await.unwrap().unwrap();

    holder.rollback().await.unwrap();
    while let Some(taken) = waiting.join_next().await {
        taken.unwrap().unwrap().release().await.unwrap();
    }
}

/// More work than the server does in five seconds, after which a silent server is given up.
async fn a_long_queue_of_statements_is_not_taken_for_a_silent_server<T: TestServer>(database: &T) {
    const CALLERS: usize = 60;
    drop(database.locks().await);
    let proxy = database.proxy();
    let pool = lock_tests::pool::<T::Database>(&database.url_by(proxy.address()), 2).await;
    let locks = Locks::new(pool);
    locks.check().await.unwrap();
    proxy.delay(Direction::ToServer, Duration::from_millis(15));
    let mut callers = JoinSet::new();
    for number in 0..CALLERS {
        // Two names at once: such requests are sent one by one.
        let names = [format!("{number} a"), format!("{number} b")];
        let lock = locks.insert_locks(names).ttl(LONG).wait(Duration::from_mins(1));
        callers.spawn(async move { lock.acquire().await?.release().await });
    }
    callers.join_all().await.into_iter().collect::<Result<Vec<_>, Error>>().unwrap();
    assert_eq!(
        database.number("SELECT COUNT(*) FROM distributed_lock WHERE expire_time > '2001-01-01'").await,
        0
    );
}

async fn every_close_waits_for_the_releases<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let names = (0..100).map(|number| number.to_string());
    let leases = locks.insert_locks(names).ttl(LONG).wait(PATIENCE).acquire().await.unwrap();
    let closing = |locks: Locks<T::Database>| async move { locks.close().await };
    let mut first = std::pin::pin!(closing(locks.clone()));
    // The first call gives up when it has just begun.
    let _begun = std::future::poll_fn(|context| Poll::Ready(first.as_mut().poll(context))).await;
    let both = tokio::join!(closing(locks.clone()), closing(locks.clone()));
    let ((), ()) = both;
    let held = "SELECT COUNT(*) FROM distributed_lock WHERE expire_time > '2001-01-01 00:00:00'";
    assert_eq!(database.number(held).await, 0);
    drop(leases);
}

/// Requests that wait together are sent in one statement, which the database refuses as a whole.
async fn requests_of_one_batch_fail_one_by_one<T: TestDatabase>(database: &T) {
    const CALLERS: usize = 50;
    let locks = database.locks().await;
    let refuse = match T::NAME {
        "postgres" => {
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
                $$ BEGIN IF NEW.lock_name = 'refused' THEN RAISE 'refused'; END IF; RETURN NEW; END $$;
            CREATE TRIGGER refusing BEFORE UPDATE ON distributed_lock FOR EACH ROW EXECUTE FUNCTION refuse()"
        }
        "sqlite" => {
            "CREATE TRIGGER refusing BEFORE UPDATE ON distributed_lock WHEN NEW.lock_name = 'refused'
            BEGIN SELECT RAISE(ABORT, 'refused'); END"
        }
        _ => {
            "CREATE TRIGGER refusing BEFORE UPDATE ON distributed_lock FOR EACH ROW
            BEGIN IF NEW.lock_name = 'refused' THEN SIGNAL SQLSTATE '45000'; END IF; END"
        }
    };
    database.run(refuse).await;
    for round in 0..3 {
        let mut callers = JoinSet::new();
        for number in 0..CALLERS {
            let name = if number % 10 == 5 { "refused".to_owned() } else { format!("name {number}") };
            let lock = locks.insert_lock(&name).wait(PATIENCE);
            callers.spawn(async move {
                let taken = match lock.acquire().await {
                    Ok(lease) => lease.release().await,
                    Err(error) => Err(error),
                };
                (name, taken)
            });
        }
        for (name, taken) in callers.join_all().await {
            match taken {
                Ok(()) => assert_ne!(name, "refused", "round {round}"),
                Err(error) => {
                    assert!(
                        matches!(
                            error,
                            Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. }
                        ),
                        "{error:?}"
                    );
                    assert_eq!(name, "refused", "round {round}: {error}");
                }
            }
        }
    }
}

async fn waiting_requests_are_sent_as_one_batch<T: TestServer>(database: &T) {
    const CALLERS: usize = 200;
    drop(database.locks().await);
    let proxy = database.proxy();
    let pool = lock_tests::pool::<T::Database>(&database.url_by(proxy.address()), 2).await;
    let locks = Locks::new(pool);
    let rounds = async || {
        let mut callers = JoinSet::new();
        for number in 0..CALLERS {
            let lock = locks.insert_lock(number.to_string()).ttl(LONG).wait(PATIENCE);
            callers.spawn(async move { lock.acquire().await?.release().await });
        }
        callers.join_all().await.into_iter().collect::<Result<Vec<_>, Error>>().unwrap();
    };
    // The first round creates their rows.
    rounds().await;
    proxy.delay(Direction::ToServer, Duration::from_millis(5));
    let before = proxy.reads(Direction::ToServer);
    rounds().await;
    let messages = proxy.reads(Direction::ToServer) - before;
    assert!(messages < CALLERS / 4, "{messages} messages for {CALLERS} callers");
}

/// Another client takes every free lock immediately. A release must not mistake that for the loss
/// of its own lease.
async fn a_released_lease_may_be_taken_immediately<T: TestServer>(database: &T) {
    const TAKE_ALL: &str = "
        UPDATE distributed_lock SET secret_key = 'taken', expire_time = '2037-01-01 00:00:00'
        WHERE expire_time < '1971-01-01 00:00:00' AND secret_key <> ''";
    let locks = database.locks().await;
    let pool = database.pool(1).await;
    let taking = tokio::spawn(async move {
        let mut connection = pool.acquire().await.unwrap();
        loop {
            // The victim of a deadlock takes nothing this time.
            let _taken = T::Database::run(&mut connection, TAKE_ALL).await;
        }
    });
    for round in 0..20 {
        let mut held = Vec::new();
        for number in 0..50 {
            let lock = locks.insert_lock(format!("{round} {number}")).ttl(LONG).wait(PATIENCE);
            held.push(lock.acquire().await.unwrap());
        }
        let mut releases: JoinSet<_> = held.into_iter().map(lock_db::Lease::release).collect();
        while let Some(released) = releases.join_next().await {
            released.unwrap().unwrap();
        }
    }
    taking.abort();
}

/// Another client writes between the snapshot of a statement and its locks, and ends.
async fn another_writer_delays_requests_only_briefly<T: TestServer>(database: &T) {
    const CALLERS: usize = 20;
    let locks = database.locks().await;
    let pool = database.pool(2).await;
    let mut writing = JoinSet::new();
    for rest in 0..2 {
        let pool = pool.clone();
        let write = format!(
            "UPDATE distributed_lock SET create_time = create_time + INTERVAL '1' SECOND WHERE id % 2 = {rest}"
        );
        writing.spawn(async move {
            let mut connection = pool.acquire().await.unwrap();
            loop {
                // The victim of a deadlock writes nothing this time.
                let _written = T::Database::run(&mut connection, &write).await;
            }
        });
    }
    let mut callers = JoinSet::new();
    for number in 0..CALLERS {
        let locks = locks.clone();
        callers.spawn(async move {
            let mut last = 0;
            for _ in 0..20 {
                let lease = locks.insert_lock(number.to_string()).ttl(LONG).wait(PATIENCE).acquire().await?;
                assert!(lease.fencing_token() > last);
                last = lease.fencing_token();
                lease.release().await?;
            }
            Ok::<_, Error>(())
        });
    }
    callers.join_all().await.into_iter().collect::<Result<Vec<_>, Error>>().unwrap();
    writing.abort_all();
}

/// A release in a batch that finds the row locked is sent alone immediately. On InnoDB it waits for
/// the transaction in any case.
async fn a_batch_releases_a_lease_that_guards_an_open_transaction<T: TestServer>(database: &T) {
    if T::NAME != "postgres" {
        return;
    }
    drop(database.locks().await);
    let proxy = database.proxy();
    let locks = Locks::new(lock_tests::pool::<T::Database>(&database.url_by(proxy.address()), 2).await);
    let pool = database.pool(5).await;
    let take = |name: String| locks.insert_lock(name).ttl(LONG).wait(PATIENCE).acquire();
    let (mut held, mut guarded) = (Vec::new(), Vec::new());
    for number in 0..10 {
        held.push(take(format!("held {number}")).await.unwrap());
        take(format!("free {number}")).await.unwrap().release().await.unwrap();
    }
    for lease in held.iter().step_by(2) {
        let mut transaction = pool.begin().await.unwrap();
        lease.verify_in(&mut transaction).await.unwrap();
        guarded.push(transaction);
    }
    // So that they are sent together with other requests, again and again.
    proxy.delay(Direction::ToServer, Duration::from_millis(5));
    let mut others = JoinSet::new();
    for number in 0..20 {
        let locks = locks.clone();
        others.spawn(async move {
            loop {
                let lock = locks.insert_lock(format!("free {number}")).ttl(LONG).wait(PATIENCE);
                lock.acquire().await.unwrap().release().await.unwrap();
            }
        });
    }
    let mut releases: JoinSet<_> = held.into_iter().map(lock_db::Lease::release).collect();
    while let Some(released) = releases.join_next().await {
        released.unwrap().unwrap();
    }
    others.abort_all();
    for transaction in guarded {
        transaction.commit().await.unwrap();
    }
}
