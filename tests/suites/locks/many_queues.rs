//! A process that waits for many names writes their queues together.

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use lock_db::{Error, Lease, Locks};
use lock_tests::{Direction, MOST_QUEUED, Proxy, Queued, TestDatabase, TestServer, eventually, set_queue};
use sqlx::pool::PoolOptions;
use tokio::task::JoinSet;

lock_tests::cases! {
    on every database:
    queues_of_every_state_are_written_together,
    queues_that_change_meanwhile_are_written_again,
    a_queue_that_cannot_be_written_fails_alone,
    many_expired_leases_get_their_notice_together;

    on every server:
    many_waiters_enqueue_and_leave_in_a_few_messages,
    many_waiters_renew_their_entries_in_a_few_messages,
    many_locks_that_become_free_are_taken_in_a_few_messages,
    the_first_connection_scans_without_a_second_one,
    locked_rows_do_not_delay_the_queues_of_others;

    on sqlite:
    many_locks_are_taken_where_a_hook_refuses_a_second_connection;
}

const PATIENCE: Duration = Duration::from_mins(1);
const LONG: Duration = Duration::from_mins(10);
const MANY: usize = 100;
/// Far fewer messages than names. Requests that do not arrive together are not sent together.
const FEW: usize = 40;

type Waiting<T> = JoinSet<Result<Lease<<T as TestDatabase>::Database>, Error>>;

fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{prefix} {number:03}")).collect()
}

/// One caller for each name.
fn wait_for<T: TestDatabase>(locks: &Locks<T::Database>, names: &[String]) -> Waiting<T> {
    names.iter().map(|name| locks.insert_lock(name).ttl(LONG).wait(PATIENCE).acquire()).collect()
}

async fn release_each<T: TestDatabase>(mut waiting: Waiting<T>) {
    while let Some(taken) = waiting.join_next().await {
        taken.unwrap().unwrap().release().await.unwrap();
    }
}

/// How many names of a prefix have this many entries in their queues.
async fn with_entries<T: TestDatabase>(database: &T, prefix: &str, entries: usize) -> usize {
    let length = "LENGTH(waiters) / 96";
    let sql = format!(
        "SELECT COUNT(*) FROM distributed_lock WHERE lock_name LIKE '{prefix}%' AND {length} = {entries}"
    );
    usize::try_from(database.number(&sql).await).unwrap()
}

/// A `Locks` behind a network, whose connection knows the table.
async fn far<T: TestServer>(database: &T, proxy: &Proxy) -> Locks<T::Database> {
    drop(database.locks().await);
    let locks = Locks::new(lock_tests::pool::<T::Database>(&database.url_by(proxy.address()), 2).await);
    locks.insert_lock("warm").ttl(LONG).acquire().await.unwrap().release().await.unwrap();
    locks
}

async fn many_waiters_enqueue_and_leave_in_a_few_messages<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let far = far(database, &proxy).await;
    let near = database.locks().await;
    let names = names("many", MANY);
    let held = near.insert_locks(&names).ttl(LONG).acquire().await.unwrap();
    proxy.delay(Direction::ToServer, Duration::from_millis(5));
    let before = proxy.reads(Direction::ToServer);
    let mut waiting = wait_for::<T>(&far, &names);
    eventually(PATIENCE, async || with_entries(database, "many", 1).await == MANY).await;
    let sent = proxy.reads(Direction::ToServer) - before;
    assert!(sent < FEW, "{sent} messages to enqueue for {MANY} names");
    let before = proxy.reads(Direction::ToServer);
    waiting.shutdown().await;
    eventually(PATIENCE, async || with_entries(database, "many", 0).await == MANY).await;
    let sent = proxy.reads(Direction::ToServer) - before;
    assert!(sent < FEW, "{sent} messages to leave {MANY} queues");
    held.release().await.unwrap();
}

/// Each name is read several times a second, and its entry is renewed every second.
async fn many_waiters_renew_their_entries_in_a_few_messages<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let far = far(database, &proxy).await;
    let near = database.locks().await;
    let names = names("many", MANY);
    let held = near.insert_locks(&names).ttl(LONG).acquire().await.unwrap();
    proxy.delay(Direction::ToServer, Duration::from_millis(20));
    let waiting = wait_for::<T>(&far, &names);
    eventually(PATIENCE, async || with_entries(database, "many", 1).await == MANY).await;
    let until = "SELECT MIN(SUBSTR(waiters, 47, 13)) FROM distributed_lock WHERE lock_name LIKE 'many%'";
    let first = database.text(until).await;
    let before = proxy.reads(Direction::ToServer);
    eventually(PATIENCE, async || database.text(until).await > first).await;
    let sent = proxy.reads(Direction::ToServer) - before;
    // The network takes 20 ms for each of them, so 100 renewals, one after the other, would take 2 s.
    // The entries would have expired.
    assert!(sent < MANY, "{sent} messages until {MANY} entries were renewed");
    assert_eq!(with_entries(database, "many", 1).await, MANY);
    held.release().await.unwrap();
    release_each::<T>(waiting).await;
}

/// The process is told of all of them at once, by notifications or by a scan.
async fn many_locks_that_become_free_are_taken_in_a_few_messages<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let far = far(database, &proxy).await;
    let near = database.locks().await;
    let names = names("many", MANY);
    let held = near.insert_locks(&names).ttl(LONG).acquire().await.unwrap();
    let mut waiting = wait_for::<T>(&far, &names);
    eventually(PATIENCE, async || with_entries(database, "many", 1).await == MANY).await;
    proxy.delay(Direction::ToServer, Duration::from_millis(5));
    held.release().await.unwrap();
    let before = proxy.reads(Direction::ToServer);
    let mut taken = Vec::new();
    while let Some(lease) = waiting.join_next().await {
        taken.push(lease.unwrap().unwrap());
    }
    let sent = proxy.reads(Direction::ToServer) - before;
    assert!(sent < MANY, "{sent} messages to take {MANY} locks that became free");
    assert_eq!(with_entries(database, "many", 0).await, MANY);
}

/// The server refuses the second connection, or does not answer it. The first one scans then.
async fn the_first_connection_scans_without_a_second_one<T: TestServer>(database: &T) {
    for is_silent in [false, true] {
        let proxy = database.proxy();
        let far = far(database, &proxy).await;
        let near = database.locks().await;
        let names = names("many", MANY);
        let held = near.insert_locks(&names).ttl(LONG).acquire().await.unwrap();
        // The first one and that of the pool.
        eventually(PATIENCE, async || proxy.open() == 2).await;
        if is_silent {
            proxy.swallow();
        } else {
            proxy.refuse();
        }
        proxy.watch_for(Direction::ToServer, scan::<T>());
        let mut waiting = wait_for::<T>(&far, &names);
        eventually(PATIENCE, async || with_entries(database, "many", 1).await == MANY).await;
        eventually(PATIENCE, async || proxy.seen(Direction::ToServer) > 0).await;
        proxy.delay(Direction::ToServer, Duration::from_millis(5));
        let before = proxy.reads(Direction::ToServer);
        held.release().await.unwrap();
        let mut taken = Vec::new();
        while let Some(lease) = waiting.join_next().await {
            taken.push(lease.unwrap().unwrap());
        }
        let sent = proxy.reads(Direction::ToServer) - before;
        assert!(sent < MANY, "silent: {is_silent}: {sent} messages to take {MANY} locks that became free");
        assert_eq!(with_entries(database, "many", 0).await, MANY);
        for lease in taken {
            lease.release().await.unwrap();
        }
    }
}

/// Only a scan has this text.
fn scan<T: TestDatabase>() -> &'static [u8] {
    match T::NAME {
        "postgres" => b"FROM unnest((SELECT $1::bigint[])) AS asked (id) JOIN",
        _ => b"SELECT id, LEFT(waiters, ",
    }
}

/// Some are held, some are free, some have no row, some queues are full, and some have only entries
/// of processes that died.
async fn queues_of_every_state_are_written_together<T: TestDatabase>(database: &T) {
    let (near, locks) = (database.locks().await, database.locks().await);
    let groups = ["held", "full", "dead", "free"].map(|prefix| names(prefix, 12));
    let known: Vec<String> = groups.concat();
    near.insert_locks(&known).acquire().await.unwrap().release().await.unwrap();
    let [held, full, dead, free] = groups;
    let holder = near.insert_locks([&held[..], &full, &dead].concat()).ttl(LONG).acquire().await.unwrap();
    let hour = Duration::from_hours(1);
    let later = SystemTime::now().duration_since(UNIX_EPOCH).unwrap() + Duration::from_secs(3);
    for (full, dead) in full.iter().zip(&dead) {
        let others: Vec<Queued> = (0..MOST_QUEUED)
            .map(|number| {
                let until = u64::try_from(later.as_millis()).unwrap();
                Queued { until, ..Queued::abandoned(1 + number as u128) }
            })
            .collect();
        set_queue(database, full, &others).await;
        let died = Queued::abandoned(7);
        let until = died.until - u64::try_from(hour.as_millis()).unwrap();
        set_queue(database, dead, &[Queued { until, ..died.clone() }, Queued { until, ..died }]).await;
    }
    let new = names("new", 12);
    let waiting = wait_for::<T>(&locks, &[&held[..], &full, &dead].concat());
    let mut at_once = wait_for::<T>(&locks, &[free, new].concat());
    let mut taken = Vec::new();
    while let Some(lease) = at_once.join_next().await {
        taken.push(lease.unwrap().unwrap());
    }
    eventually(PATIENCE, async || with_entries(database, "held", 1).await == 12).await;
    eventually(PATIENCE, async || with_entries(database, "dead", 1).await == 12).await;
    // Those that died expire at last.
    eventually(PATIENCE, async || with_entries(database, "full", 1).await == 12).await;
    holder.release().await.unwrap();
    release_each::<T>(waiting).await;
}

/// Several processes remove the same expired entries and add theirs.
async fn queues_that_change_meanwhile_are_written_again<T: TestDatabase>(database: &T) {
    let near = database.locks().await;
    let names = names("many", 30);
    let holder = near.insert_locks(&names).ttl(LONG).acquire().await.unwrap();
    let died = Queued::abandoned(7);
    for name in &names {
        set_queue(database, name, &[Queued { until: died.until - 3_600_000, ..died.clone() }]).await;
    }
    let mut processes = Vec::new();
    for _ in 0..3 {
        let locks = database.locks().await;
        let waiting = wait_for::<T>(&locks, &names);
        processes.push((locks, waiting));
    }
    eventually(PATIENCE, async || with_entries(database, "many", 3).await == names.len()).await;
    holder.release().await.unwrap();
    let mut all = JoinSet::new();
    for (locks, waiting) in processes {
        all.spawn(async move {
            release_each::<T>(waiting).await;
            drop(locks);
        });
    }
    while let Some(ended) = all.join_next().await {
        ended.unwrap();
    }
    assert_eq!(with_entries(database, "many", 0).await, names.len());
}

/// A trigger refuses the queue of one name.
async fn a_queue_that_cannot_be_written_fails_alone<T: TestDatabase>(database: &T) {
    let (near, locks) = (database.locks().await, database.locks().await);
    let names = names("many", 20);
    let holder = near.insert_locks(&names).ttl(LONG).acquire().await.unwrap();
    let trigger = match T::NAME {
        "postgres" => {
            "CREATE FUNCTION refuse() RETURNS trigger AS 'BEGIN RAISE EXCEPTION ''no''; END' LANGUAGE plpgsql;
            CREATE TRIGGER refuse BEFORE UPDATE ON distributed_lock FOR EACH ROW
            WHEN (NEW.lock_name = 'many 007' AND NEW.waiters <> '') EXECUTE FUNCTION refuse()"
        }
        "sqlite" => {
            "CREATE TRIGGER refuse BEFORE UPDATE ON distributed_lock
            WHEN NEW.lock_name = 'many 007' AND NEW.waiters <> ''
            BEGIN SELECT RAISE(ABORT, 'no'); END"
        }
        _ => {
            "CREATE TRIGGER refuse BEFORE UPDATE ON distributed_lock FOR EACH ROW
            IF NEW.lock_name = 'many 007' AND NEW.waiters <> '' THEN
                SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'no';
            END IF"
        }
    };
    database.run(trigger).await;
    let mut waiting = wait_for::<T>(&locks, &names);
    let refused = waiting.join_next().await.unwrap().unwrap().unwrap_err();
    assert!(
        matches!(&refused, Error::Database { name: Some(name), .. } if name == "many 007"),
        "{refused:?}"
    );
    eventually(PATIENCE, async || with_entries(database, "many", 1).await == names.len() - 1).await;
    holder.release().await.unwrap();
    release_each::<T>(waiting).await;
}

/// Like the leases of a process that died, which another process wants, one caller each.
async fn many_expired_leases_get_their_notice_together<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let names = names("many", 60);
    locks.insert_locks(&names).acquire().await.unwrap().release().await.unwrap();
    let year = if T::NAME == "sqlite" { "2020-01-01 00:00:00.000000" } else { "2020-01-01 00:00:00" };
    database
        .run(&format!(
            "UPDATE distributed_lock SET expire_time = '{year}', ttl_micros = 5000000, secret_key = 'gone'"
        ))
        .await;
    // Some of the callers ask for the same names.
    let lock = locks.insert_locks(&names[20..40]).ttl(LONG).wait(PATIENCE);
    let several = tokio::spawn(async move { lock.acquire().await?.release().await });
    let waiting = wait_for::<T>(&locks, &names);
    // Each notice takes a second, and the callers have no more than a minute.
    release_each::<T>(waiting).await;
    several.await.unwrap().unwrap();
}

async fn locked_rows_do_not_delay_the_queues_of_others<T: TestServer>(database: &T) {
    let (near, locks) = (database.locks().await, database.locks().await);
    let (held, locked) = (names("held", 20), names("lock", 20));
    let all = [&held[..], &locked].concat();
    near.insert_locks(&all).acquire().await.unwrap().release().await.unwrap();
    let holder = near.insert_locks(&held).ttl(LONG).acquire().await.unwrap();
    let pool = database.pool(1).await;
    let mut transaction = pool.begin().await.unwrap();
    near.insert_locks(&locked).acquire_in(&mut transaction).await.unwrap();
    let waiting = wait_for::<T>(&locks, &all);
    eventually(PATIENCE, async || with_entries(database, "held", 1).await == held.len()).await;
    assert_eq!(with_entries(database, "lock", 0).await, locked.len());
    holder.release().await.unwrap();
    transaction.commit().await.unwrap();
    release_each::<T>(waiting).await;
}

/// The hook of the pool accepts only the first connection.
async fn many_locks_are_taken_where_a_hook_refuses_a_second_connection<T: TestDatabase>(database: &T) {
    let near = database.locks().await;
    let made = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&made);
    let options = PoolOptions::<T::Database>::new().after_connect(move |_, _| {
        let is_first = counted.fetch_add(1, SeqCst) == 0;
        let refused = || sqlx::Error::Configuration("one connection is enough".into());
        Box::pin(async move { if is_first { Ok(()) } else { Err(refused()) } })
    });
    let locks = Locks::new(options.connect_lazy(database.url()).unwrap());
    let names = names("many", MANY);
    let held = near.insert_locks(&names).ttl(LONG).acquire().await.unwrap();
    let waiting = wait_for::<T>(&locks, &names);
    eventually(PATIENCE, async || with_entries(database, "many", 1).await == MANY).await;
    eventually(PATIENCE, async || made.load(SeqCst) > 1).await;
    held.release().await.unwrap();
    release_each::<T>(waiting).await;
}
