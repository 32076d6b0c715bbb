//! Locks among real processes, which exclude one another, are killed, are stopped for too long, and
//! all migrate at once.

use std::time::{Duration, Instant};

use lock_db::{Error, Locks};
use lock_tests::{Backend, Direction, Parent, Process, TestDatabase, TestServer, eventually, pool};
use sqlx::pool::PoolOptions;
use tokio::time::{sleep, timeout};

lock_tests::cases! {
    on every database:
    four_processes_exclude_one_another_by_a_lease,
    four_processes_exclude_one_another_by_a_row_lock,
    a_lease_is_free_within_its_ttl_after_a_kill,
    a_row_lock_is_free_immediately_after_a_kill,
    a_holder_that_was_stopped_for_too_long_has_lost_its_lease,
    sixteen_processes_migrate_at_once,
    a_migration_killed_at_a_random_time_is_completed_later;

    on every server:
    a_migration_killed_at_any_message_is_completed_later,
}

lock_tests::child_roles! { increment_under_leases, increment_under_row_locks, hold_a_lease, hold_a_row_lock, migrate }

const PATIENCE: Duration = Duration::from_mins(1);
const PROCESSES: i64 = 4;

// -------------------------------------------------------------------------------- mutual exclusion

async fn make_counter<T: TestDatabase>(database: &T) -> Locks<T::Database> {
    database.run("CREATE TABLE counter (id BIGINT PRIMARY KEY, n BIGINT NOT NULL)").await;
    database.run("CREATE TABLE grants (n BIGINT NOT NULL, token BIGINT NOT NULL)").await;
    database.run("INSERT INTO counter VALUES (1, 0)").await;
    database.locks().await
}

/// Read, add, write: loses updates without a lock. Returns the new number.
async fn increment<DB: Backend>(connection: &mut DB::Connection) -> i64 {
    let n = DB::find_number(connection, "SELECT n FROM counter WHERE id = 1").await.unwrap().unwrap() + 1;
    tokio::task::yield_now().await;
    DB::run(connection, &format!("UPDATE counter SET n = {n} WHERE id = 1")).await.unwrap();
    n
}

/// Increments as often as the first argument says, and records the fencing token of each grant.
async fn increment_under_leases<DB: Backend>(mut parent: Parent) {
    let pool = pool::<DB>(parent.url(), 1).await;
    let locks = Locks::new(pool.clone());
    locks.check().await.unwrap();
    parent.say("ready");
    parent.hear().await.unwrap();
    for _ in 0..parent.argument(0).parse().unwrap() {
        let lease = locks.insert_lock("counter").wait(PATIENCE).acquire().await.unwrap();
        let mut connection = pool.acquire().await.unwrap();
        let n = increment::<DB>(&mut connection).await;
        let token = lease.fencing_token();
        DB::run(&mut connection, &format!("INSERT INTO grants VALUES ({n}, {token})")).await.unwrap();
        lease.release().await.unwrap();
    }
    parent.say("done");
}

/// Increments as often as the first argument says, in business transactions.
async fn increment_under_row_locks<DB: Backend>(mut parent: Parent) {
    let pool = pool::<DB>(parent.url(), 1).await;
    let locks = Locks::new(pool.clone());
    locks.check().await.unwrap();
    parent.say("ready");
    parent.hear().await.unwrap();
    for _ in 0..parent.argument(0).parse().unwrap() {
        loop {
            let mut transaction = pool.begin().await.unwrap();
            match locks.row_lock("counter").wait(PATIENCE).acquire_in(&mut transaction).await {
                Ok(_) => {
                    increment::<DB>(&mut transaction).await;
                    break transaction.commit().await.unwrap();
                }
                Err(error) => {
                    assert!(
                        matches!(error, Error::Deadlock { .. } | Error::Serialization { .. }),
                        "{error:?}"
                    );
                    transaction.rollback().await.unwrap();
                }
            }
        }
    }
    parent.say("done");
}

async fn count_in_four_processes<T: TestDatabase>(database: &T, role: &str, rounds: i64) {
    let mut children: Vec<Process> =
        (0..PROCESSES).map(|_| Process::spawn(role, database.url(), [rounds.to_string()])).collect();
    for child in &mut children {
        child.expect("ready").await;
    }
    for child in &mut children {
        child.say("go");
    }
    for child in &mut children {
        child.expect("done").await;
    }
    assert_eq!(database.number("SELECT n FROM counter").await, PROCESSES * rounds, "updates were lost");
}

async fn four_processes_exclude_one_another_by_a_lease<T: TestDatabase>(database: &T) {
    const ROUNDS: i64 = 10;
    make_counter(database).await;
    count_in_four_processes(database, "increment_under_leases", ROUNDS).await;

    let mut connection = database.connection().await;
    let tokens = T::Database::numbers(&mut connection, "SELECT token FROM grants ORDER BY n").await.unwrap();
    assert_eq!(i64::try_from(tokens.len()).unwrap(), PROCESSES * ROUNDS);
    assert!(tokens.is_sorted_by(|earlier, later| earlier < later), "in the order of grants: {tokens:?}");
}

async fn four_processes_exclude_one_another_by_a_row_lock<T: TestDatabase>(database: &T) {
    make_counter(database).await;
    count_in_four_processes(database, "increment_under_row_locks", 15).await;
}

// ---------------------------------------------------------------------- killed and stopped holders

/// Holds a lease with a TTL of as many milliseconds as the first argument says, and answers
/// questions about it.
async fn hold_a_lease<DB: Backend>(mut parent: Parent) {
    let locks = Locks::new(pool::<DB>(parent.url(), 1).await);
    let ttl = Duration::from_millis(parent.argument(0).parse().unwrap());
    let lease = locks.insert_lock("a").ttl(ttl).acquire().await.unwrap();
    parent.say(lease.fencing_token());
    while let Some(question) = parent.hear().await {
        match question.as_str() {
            "held?" => parent.say(lease.is_held()),
            "lost?" => {
                lease.lost().await;
                parent.say("lost");
            }
            "release" => break,
            _ => panic!("{question}"),
        }
    }
    match lease.release().await {
        Ok(()) => parent.say("released"),
        Err(Error::Lost { .. }) => parent.say("was lost"),
        Err(error) => parent.say(error),
    }
}

/// Holds a row lock in a transaction that has written something.
async fn hold_a_row_lock<DB: Backend>(mut parent: Parent) {
    let locks = Locks::new(pool::<DB>(parent.url(), 1).await);
    let mut guard = locks.row_lock("a").acquire().await.unwrap();
    increment::<DB>(&mut guard).await;
    parent.say("held");
    parent.hear().await;
}

async fn a_lease_is_free_within_its_ttl_after_a_kill<T: TestDatabase>(database: &T) {
    const TTL: Duration = Duration::from_millis(1200);
    const MARGIN: Duration = Duration::from_secs(5);
    let locks = database.locks().await;
    let mut holder = Process::spawn("hold_a_lease", database.url(), [TTL.as_millis().to_string()]);
    let token: i64 = holder.hear().await.parse().unwrap();
    let waiting = tokio::spawn(locks.insert_lock("a").wait(PATIENCE).acquire());
    assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_none());
    assert!(!waiting.is_finished());
    holder.kill();
    let killed = Instant::now();
    let lease = waiting.await.unwrap().unwrap();
    assert!(killed.elapsed() < TTL + MARGIN, "free only after {:?}", killed.elapsed());
    assert!(lease.fencing_token() > token);
    lease.release().await.unwrap();
}

async fn a_row_lock_is_free_immediately_after_a_kill<T: TestDatabase>(database: &T) {
    const AT_ONCE: Duration = Duration::from_secs(5);
    let locks = make_counter(database).await;
    let mut holder = Process::spawn("hold_a_row_lock", database.url(), [""]);
    holder.expect("held").await;
    let waiting = tokio::spawn(locks.row_lock("a").wait(PATIENCE).acquire());
    if T::NAME != "sqlite" {
        eventually(PATIENCE, async || database.activity().await.waiting > 0).await;
    }
    assert!(!waiting.is_finished());
    holder.kill();
    let killed = Instant::now();
    let guard = waiting.await.unwrap().unwrap();
    assert!(killed.elapsed() < AT_ONCE, "free only after {:?}", killed.elapsed());
    guard.rollback().await.unwrap();
    assert_eq!(database.number("SELECT n FROM counter").await, 0, "it never committed");
}

async fn a_holder_that_was_stopped_for_too_long_has_lost_its_lease<T: TestDatabase>(database: &T) {
    const ROW: &str = "SELECT secret_key FROM distributed_lock WHERE lock_name = 'a'";
    const TOKEN: &str = "SELECT fencing_token FROM distributed_lock WHERE lock_name = 'a'";
    const DEADLINE: &str = "SELECT CAST(expire_time AS CHAR(40)) FROM distributed_lock WHERE lock_name = 'a'";
    let locks = database.locks().await;
    let mut first = Process::spawn("hold_a_lease", database.url(), ["1000"]);
    let token: i64 = first.hear().await.parse().unwrap();
    // Right after a renewal. In the middle of one it would keep a lock of the database itself.
    let deadline = database.text(DEADLINE).await;
    eventually(PATIENCE, async || database.text(DEADLINE).await != deadline).await;
    first.stop();

    let ttl = Duration::from_mins(10);
    let second = locks.insert_lock("a").ttl(ttl).wait(PATIENCE).acquire().await.unwrap();
    assert!(second.fencing_token() > token);
    let deadline = database.text(DEADLINE).await;
    first.resume();
    first.say("held?");
    first.expect("false").await;
    first.say("lost?");
    first.expect("lost").await;
    first.say("release");
    first.expect("was lost").await;

    assert!(second.is_held());
    assert_eq!(database.text(ROW).await, second.secret_key());
    assert_eq!(database.number(TOKEN).await, second.fencing_token());
    assert_eq!(database.text(DEADLINE).await, deadline, "neither renewed nor released");
    second.release().await.unwrap();
}

// -------------------------------------------------------------------------------------- migrations

/// Migrates when it is told to. Has connected before, so that only the migration is left to do.
async fn migrate<DB: Backend>(mut parent: Parent) {
    let locks = Locks::new(PoolOptions::<DB>::new().connect_lazy(parent.url()).unwrap());
    let _connected = locks.check().await;
    parent.say("ready");
    parent.hear().await.unwrap();
    match locks.migrate().await {
        Ok(()) => parent.say("done"),
        Err(error) => parent.say(error),
    }
    // Waits for the order: if it ended by itself, it would not be killed.
    parent.hear().await;
}

async fn sixteen_processes_migrate_at_once<T: TestDatabase>(database: &T) {
    let mut children: Vec<Process> =
        (0..16).map(|_| Process::spawn("migrate", database.url(), [""])).collect();
    for child in &mut children {
        child.expect("ready").await;
    }
    for child in &mut children {
        child.say("go");
    }
    for child in &mut children {
        child.expect("done").await;
    }
    let locks = Locks::new(database.pool(1).await);
    locks.check().await.unwrap();
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
}

/// Whatever a migration was doing when its process was killed, the next one finds nothing locked
/// and creates the table.
async fn make_up_for_migration<T: TestDatabase>(database: &T) {
    const SOON: Duration = Duration::from_secs(10);
    let locks = Locks::new(database.pool(1).await);
    timeout(SOON, locks.migrate()).await.expect("the killed migration has left a lock").unwrap();
    locks.check().await.unwrap();
    locks.close().await;
    database.run("DROP TABLE distributed_lock").await;
    database.run("DROP TABLE _lock_db_migrations").await;
}

async fn a_migration_killed_at_a_random_time_is_completed_later<T: TestDatabase>(database: &T) {
    for moment in 0..6 {
        let mut child = Process::spawn("migrate", database.url(), [""]);
        child.expect("ready").await;
        child.say("go");
        sleep(moment * Duration::from_millis(1)).await;
        child.kill();
        make_up_for_migration(database).await;
    }
}

async fn a_migration_killed_at_any_message_is_completed_later<T: TestServer>(database: &T) {
    const DELAY: Duration = Duration::from_millis(10);
    let mut has_ended = false;
    for moment in (1..).step_by(3) {
        let proxy = database.proxy();
        let messages = || proxy.reads(Direction::ToServer) + proxy.reads(Direction::ToClient);
        let mut child = Process::spawn("migrate", &database.url_by(proxy.address()), [""]);
        child.expect("ready").await;
        proxy.delay(Direction::ToServer, DELAY);
        proxy.delay(Direction::ToClient, DELAY);
        let last = messages() + moment;
        child.say("go");
        tokio::select! {
            said = child.hear() => {
                assert_eq!(said, "done");
                has_ended = true;
            }
            () = async { while messages() < last { sleep(Duration::from_millis(1)).await } } => {}
        }
        child.kill();
        make_up_for_migration(database).await;
        if has_ended {
            break;
        }
        assert!(moment < 100, "the migration never ends");
    }
}
