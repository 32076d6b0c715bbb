//! Many names at once, over a distant network. Round trips are counted, not time.

use std::sync::Mutex;
use std::time::Duration;

use lock_db::{Error, Locks};
use lock_tests::{Backend, Direction, Proxy, TestDatabase, TestServer, eventually};
use tokio::task::JoinSet;
use tracing::field::Field;
use tracing::{Event, Level, Metadata, Subscriber, span};

lock_tests::cases! {
    on every database:
    many_expired_leases_are_taken_over_together,
    batches_with_overlapping_names_never_deadlock,
    many_long_names_are_acquired_together,
    too_many_names_in_one_batch_are_refused,
    a_batch_with_a_row_that_cannot_be_written_leaves_no_lease;

    on every server:
    many_names_cost_as_many_round_trips_as_a_few,
    a_batch_of_many_names_delays_no_other_caller,
    many_waiting_names_delay_no_other_caller,
    many_guarded_leases_are_released_together,
    a_dropped_batch_releases_its_leases_together,
    one_locked_row_in_a_batch_is_found_immediately,
    one_uncommitted_row_in_a_batch_is_found_immediately,
    a_ttl_shorter_than_the_network_allows_is_reported,
    a_late_grant_is_requested_again,
    a_loss_over_a_slow_network_recommends_a_longer_ttl,
    messages_fit_into_max_allowed_packet,
}

const PATIENCE: Duration = Duration::from_mins(1);
const LONG: Duration = Duration::from_mins(10);
const MANY: usize = 300;
/// The largest cost of a request, however many names it has. A connection may have to be opened,
/// and statements parsed for the first time.
const FEW: usize = 40;

fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|number| format!("{prefix} {number:05}")).collect()
}

/// A `Locks` behind a network. Its private connections are open and know the table.
async fn far<T: TestServer>(database: &T, proxy: &Proxy) -> Locks<T::Database> {
    drop(database.locks().await);
    let locks = Locks::new(lock_tests::pool::<T::Database>(&database.url_by(proxy.address()), 2).await);
    locks.insert_locks(["warm", "warm too"]).ttl(LONG).acquire().await.unwrap().release().await.unwrap();
    locks
}

/// How many messages are sent to the server during some work.
async fn messages<F: Future>(proxy: &Proxy, work: F) -> (usize, F::Output) {
    let before = proxy.reads(Direction::ToServer);
    let output = work.await;
    (proxy.reads(Direction::ToServer) - before, output)
}

async fn many_names_cost_as_many_round_trips_as_a_few<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let locks = far(database, &proxy).await;
    // So that no caller has another request ready while one is in progress.
    proxy.delay(Direction::ToServer, Duration::from_millis(5));
    for what in ["new", "known"] {
        let lock = locks.insert_locks(names("many", MANY)).ttl(LONG).wait(PATIENCE);
        let (taking, leases) = messages(&proxy, lock.acquire()).await;
        let leases = leases.unwrap();
        assert!(taking < FEW, "{taking} messages for {MANY} {what} names");
        assert_eq!(leases.iter().count(), MANY);
        assert!(leases.is_held());
        let (giving, released) = messages(&proxy, leases.release()).await;
        released.unwrap();
        assert!(giving < FEW, "{giving} messages to give {MANY} {what} names back");
    }
    // Each has its own number, which grows.
    let leases = locks.insert_locks(names("many", MANY)).ttl(LONG).wait(PATIENCE).acquire().await.unwrap();
    let before: Vec<i64> = leases.iter().map(lock_db::Lease::fencing_token).collect();
    // Dropped leases are released together as well.
    let (giving, ()) = messages(&proxy, async {
        drop(leases);
        let taken = locks.insert_locks(names("many", MANY)).ttl(LONG).wait(PATIENCE).acquire().await.unwrap();
        assert!(taken.iter().zip(before).all(|(lease, before)| lease.fencing_token() > before));
        taken.release().await.unwrap();
    })
    .await;
    assert!(giving < 3 * FEW, "{giving} messages");
}

/// Another caller of the process, with names of its own.
async fn a_batch_of_many_names_delays_no_other_caller<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let locks = far(database, &proxy).await;
    let other = locks.insert_lock("other").ttl(LONG).wait(PATIENCE);
    other.clone().acquire().await.unwrap().release().await.unwrap();
    proxy.delay(Direction::ToServer, Duration::from_millis(5));
    for what in ["new", "known"] {
        let lock = locks.insert_locks(names("many", MANY)).ttl(LONG).wait(PATIENCE);
        let several = tokio::spawn(async move { lock.acquire().await?.release().await });
        let mut worst = 0;
        loop {
            let (taking, lease) = messages(&proxy, other.clone().acquire()).await;
            worst = worst.max(taking);
            lease.unwrap().release().await.unwrap();
            if several.is_finished() {
                break;
            }
        }
        several.await.unwrap().unwrap();
        // Its own statement, and what was in progress.
        assert!(worst < 15, "{worst} messages for one lock beside {MANY} {what} names");
    }
}

/// Each of them reads from time to time whether its name is free.
async fn many_waiting_names_delay_no_other_caller<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let locks = far(database, &proxy).await;
    let other = locks.insert_lock("other").ttl(LONG).wait(PATIENCE);
    other.clone().acquire().await.unwrap().release().await.unwrap();
    let near = Locks::new(database.pool(2).await);
    let names = names("held", 200);
    let held = near.insert_locks(&names).ttl(LONG).acquire().await.unwrap();
    let mut waiting = JoinSet::new();
    for name in &names {
        // Without queue entries, which each request would write.
        waiting.spawn(locks.insert_lock(name).fair(false).wait(PATIENCE).acquire());
    }
    proxy.delay(Direction::ToServer, Duration::from_millis(5));
    let mut worst = 0;
    for _ in 0..30 {
        let (taking, lease) = messages(&proxy, other.clone().acquire()).await;
        worst = worst.max(taking);
        lease.unwrap().release().await.unwrap();
    }
    assert!(worst < 15, "{worst} messages for one lock beside 200 that wait");
    held.release().await.unwrap();
    while let Some(taken) = waiting.join_next().await {
        taken.unwrap().unwrap().release().await.unwrap();
    }
}

/// Like the leases of a process that died. Each of them is given notice of 1 s.
async fn many_expired_leases_are_taken_over_together<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let names = names("dead", 60);
    locks.insert_locks(&names).acquire().await.unwrap().release().await.unwrap();
    let year = if T::NAME == "sqlite" { "2020-01-01 00:00:00.000000" } else { "2020-01-01 00:00:00" };
    let dies = format!(
        "UPDATE distributed_lock SET expire_time = '{year}', ttl_micros = 5000000, secret_key = 'gone'"
    );
    database.run(&dies).await;
    let taken = locks.insert_locks(&names).wait(Duration::from_secs(20)).acquire().await.unwrap();
    assert!(taken.is_held());
    // They are given notice as well beside one that is held for longer.
    taken.release().await.unwrap();
    database.run(&dies).await;
    let other = Locks::new(database.pool(2).await);
    let first = other.insert_lock("dead 00030").wait(PATIENCE).acquire().await.unwrap();
    let waiting = tokio::spawn(locks.insert_locks(&names).wait(Duration::from_secs(20)).acquire());
    let told = "SELECT COUNT(*) FROM distributed_lock WHERE ttl_micros = 0";
    eventually(PATIENCE, async || database.number(told).await == 59).await;
    first.release().await.unwrap();
    waiting.await.unwrap().unwrap().release().await.unwrap();
}

/// Each wants most of what the other wants, no matter which rows exist, and never gets a deadlock.
async fn batches_with_overlapping_names_never_deadlock<T: TestDatabase>(database: &T) {
    drop(database.locks().await);
    let mut processes = JoinSet::new();
    for process in 0..3 {
        let locks = Locks::new(database.pool(2).await);
        processes.spawn(async move {
            for round in 0..5 {
                // The last rounds create no rows.
                let mut names = names(&format!("round {}", round.min(3)), 60);
                names.rotate_left(process * 7);
                names.truncate(50);
                let leases = locks.insert_locks(names).ttl(LONG).wait(PATIENCE).acquire().await.unwrap();
                leases.release().await.unwrap();
            }
        });
    }
    while let Some(ended) = processes.join_next().await {
        ended.unwrap();
    }
}

/// As many names as may be taken together, and names of the greatest length.
async fn many_long_names_are_acquired_together<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let long: Vec<String> = (0..2000).map(|number| format!("{number:05}{}", "é".repeat(125))).collect();
    for _ in 0..2 {
        let leases = locks.insert_locks(&long).ttl(LONG).wait(PATIENCE).acquire().await.unwrap();
        assert_eq!(leases.iter().count(), long.len());
        let other = Locks::new(database.pool(2).await);
        assert!(other.insert_lock(&long[1999]).try_acquire().await.unwrap().is_none());
        assert!(other.insert_locks(&long).try_acquire().await.unwrap().is_none());
        leases.release().await.unwrap();
    }
}

async fn too_many_names_in_one_batch_are_refused<T: TestDatabase>(database: &T) {
    // There is no table.
    let locks = Locks::new(database.pool(1).await);
    let names = names("many", 10_001);
    let refused = locks.insert_locks(&names).acquire().await.unwrap_err();
    assert!(matches!(refused, Error::InvalidOption { option: "names", .. }), "{refused:?}");
    assert!(refused.to_string().contains("10001 names"), "{refused}");
    let pool = database.pool(1).await;
    let mut transaction = pool.begin().await.unwrap();
    let refused = locks.row_locks(&names).acquire_in(&mut transaction).await.unwrap_err();
    assert!(matches!(refused, Error::InvalidOption { option: "names", .. }), "{refused:?}");
}

/// A trigger keeps one row unchanged.
async fn a_batch_with_a_row_that_cannot_be_written_leaves_no_lease<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let names = names("many", 20);
    locks.insert_locks(&names).acquire().await.unwrap().release().await.unwrap();
    match T::NAME {
        "postgres" => {
            database
                .run(
                    "CREATE FUNCTION leave() RETURNS trigger AS 'BEGIN RETURN NULL; END' LANGUAGE plpgsql;
                    CREATE TRIGGER leave BEFORE UPDATE ON distributed_lock FOR EACH ROW
                    WHEN (NEW.lock_name = 'many 00007') EXECUTE FUNCTION leave()",
                )
                .await;
        }
        "sqlite" => {
            database
                .run(
                    "CREATE TRIGGER leave BEFORE UPDATE ON distributed_lock WHEN NEW.lock_name = 'many 00007'
                    BEGIN SELECT RAISE(IGNORE); END",
                )
                .await;
        }
        _ => {
            database
                .run(
                    "CREATE TRIGGER leave_it BEFORE UPDATE ON distributed_lock FOR EACH ROW
                    SET NEW.secret_key = IF(NEW.lock_name = 'many 00007', OLD.secret_key, NEW.secret_key),
                        NEW.ttl_micros = IF(NEW.lock_name = 'many 00007', OLD.ttl_micros, NEW.ttl_micros),
                        NEW.expire_time = IF(NEW.lock_name = 'many 00007', OLD.expire_time, NEW.expire_time)",
                )
                .await;
        }
    }
    let refused = locks.insert_locks(&names).ttl(LONG).wait(PATIENCE).acquire().await.unwrap_err();
    assert!(!refused.is_retryable(), "{refused:?}");
    let held = "SELECT COUNT(*) FROM distributed_lock WHERE expire_time > '2000-01-01' AND lock_name <> 'many 00007'";
    eventually(PATIENCE, async || database.number(held).await == 0).await;
}

/// PostgreSQL allows the rows of a guarded transaction to be freed immediately, the others after
/// its end.
async fn many_guarded_leases_are_released_together<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let locks = far(database, &proxy).await;
    let leases = locks.insert_locks(names("many", MANY)).ttl(LONG).wait(PATIENCE).acquire().await.unwrap();
    let other = locks.insert_lock("other").ttl(LONG).wait(PATIENCE);
    other.clone().acquire().await.unwrap().release().await.unwrap();
    let pool = database.pool(1).await;
    let mut transaction = pool.begin().await.unwrap();
    leases.verify_in(&mut transaction).await.unwrap();
    proxy.delay(Direction::ToServer, Duration::from_millis(5));
    let releasing = if T::NAME == "postgres" {
        Some(tokio::spawn(leases.release()))
    } else {
        // A caller would wait for 5 s at most.
        drop(leases);
        None
    };
    let mut worst = 0;
    for _ in 0..20 {
        let (taking, lease) = messages(&proxy, other.clone().acquire()).await;
        worst = worst.max(taking);
        lease.unwrap().release().await.unwrap();
    }
    assert!(worst < 15, "{worst} messages for one lock beside {MANY} that are given back");
    if let Some(releasing) = releasing {
        releasing.await.unwrap().unwrap();
    }
    transaction.commit().await.unwrap();
    let near = Locks::new(database.pool(2).await);
    let taken = near.insert_locks(names("many", MANY)).ttl(LONG).wait(PATIENCE).acquire().await.unwrap();
    taken.release().await.unwrap();
}

async fn a_dropped_batch_releases_its_leases_together<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let locks = far(database, &proxy).await;
    let names = names("many", MANY);
    let lock = locks.insert_locks(&names).ttl(LONG).wait(PATIENCE);
    lock.clone().acquire().await.unwrap().release().await.unwrap();
    // It is granted, but no answer arrives.
    proxy.pause(Direction::ToClient);
    let taking = tokio::spawn(lock.acquire());
    eventually(PATIENCE, async || proxy.held(Direction::ToClient) > 0).await;
    taking.abort();
    drop(taking.await);
    let near = Locks::new(database.pool(2).await);
    let (giving, leases) = messages(&proxy, async {
        proxy.resume(Direction::ToClient);
        near.insert_locks(&names).ttl(LONG).wait(PATIENCE).acquire().await
    })
    .await;
    assert!(giving < FEW, "{giving} messages");
    leases.unwrap().release().await.unwrap();
}

/// The transaction sends nothing.
async fn one_locked_row_in_a_batch_is_found_immediately<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let locks = far(database, &proxy).await;
    let names = names("many", MANY);
    let lock = locks.insert_locks(&names).ttl(LONG).wait(PATIENCE);
    lock.clone().acquire().await.unwrap().release().await.unwrap();
    let pool = database.pool(1).await;
    let mut holder = pool.begin().await.unwrap();
    let near = Locks::new(database.pool(2).await);
    near.insert_lock("many 00150").acquire_in(&mut holder).await.unwrap();
    let (trying, tried) = messages(&proxy, lock.clone().try_acquire()).await;
    assert!(tried.unwrap().is_none());
    assert!(trying < FEW, "{trying} messages");
    let waited = lock.clone().wait(Duration::from_millis(100)).acquire().await.unwrap_err();
    assert!(matches!(&waited, Error::Timeout { name, .. } if name == "many 00150"), "{waited:?}");
    let waiting = tokio::spawn(lock.acquire());
    holder.rollback().await.unwrap();
    waiting.await.unwrap().unwrap().release().await.unwrap();
}

/// PostgreSQL creates rows in transactions. The error names the row.
async fn one_uncommitted_row_in_a_batch_is_found_immediately<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let locks = far(database, &proxy).await;
    let names = names("many", MANY);
    let lock = locks.insert_locks(&names).ttl(LONG).wait(PATIENCE);
    let pool = database.pool(1).await;
    let mut holder = pool.begin().await.unwrap();
    let near = Locks::new(database.pool(2).await);
    near.insert_lock("many 00150").acquire_in(&mut holder).await.unwrap();
    let (trying, tried) = messages(&proxy, lock.clone().try_acquire()).await;
    assert!(tried.unwrap().is_none());
    assert!(trying < 3 * FEW, "{trying} messages");
    let waited = lock.clone().wait(Duration::from_millis(500)).acquire().await.unwrap_err();
    assert!(matches!(&waited, Error::Timeout { name, .. } if name == "many 00150"), "{waited:?}");
    let waiting = tokio::spawn(lock.acquire());
    holder.commit().await.unwrap();
    waiting.await.unwrap().unwrap().release().await.unwrap();
}

async fn a_ttl_shorter_than_the_network_allows_is_reported<T: TestServer>(database: &T) {
    const TTL: Duration = Duration::from_millis(100);
    let proxy = database.proxy();
    let locks = far(database, &proxy).await;
    proxy.delay(Direction::ToServer, Duration::from_millis(200));
    let one = locks.insert_lock("one").ttl(TTL);
    let several = locks.insert_locks(["one", "two", "three"]).ttl(TTL);
    let answers = [
        one.clone().wait(PATIENCE).acquire().await.map(drop).unwrap_err(),
        one.clone().try_acquire().await.map(drop).unwrap_err(),
        several.clone().wait(PATIENCE).acquire().await.map(drop).unwrap_err(),
        several.try_acquire().await.map(drop).unwrap_err(),
        one.wait(PATIENCE).run(async |_| Ok::<_, Error>(())).await.unwrap_err(),
    ];
    for error in answers {
        let Error::TtlTooShort { ttl, took, .. } = &error else { panic!("{error:?}") };
        assert!(*ttl == TTL && *took >= Duration::from_millis(200), "{error:?}");
        assert!(!error.is_retryable());
        assert!(error.to_string().contains("allow a longer `ttl`"), "{error}");
        assert!(error.name().is_some());
    }
    // None of them is left.
    let near = Locks::new(database.pool(2).await);
    near.insert_locks(["one", "two", "three"])
        .wait(PATIENCE)
        .acquire()
        .await
        .unwrap()
        .release()
        .await
        .unwrap();
}

/// Its TTL begins anew.
async fn a_late_grant_is_requested_again<T: TestServer>(database: &T) {
    const TTL: Duration = Duration::from_secs(4);
    let proxy = database.proxy();
    let locks = far(database, &proxy).await;
    proxy.delay(Direction::ToClient, TTL / 2 + TTL / 8);
    let one = tokio::spawn(locks.insert_lock("one").ttl(TTL).wait(PATIENCE).acquire());
    let several = tokio::spawn(locks.insert_locks(["two", "three"]).ttl(TTL).wait(PATIENCE).acquire());
    eventually(PATIENCE, async || proxy.held(Direction::ToClient) > 0).await;
    proxy.delay(Direction::ToClient, Duration::ZERO);
    assert!(one.await.unwrap().unwrap().is_held());
    assert!(several.await.unwrap().unwrap().is_held());
}

async fn a_loss_over_a_slow_network_recommends_a_longer_ttl<T: TestServer>(database: &T) {
    const TTL: Duration = Duration::from_secs(1);
    // Another case of this process may have been first.
    let _set_already = tracing::subscriber::set_global_default(Warnings);
    let proxy = database.proxy();
    let locks = far(database, &proxy).await;
    let name = format!("slowly renewed on {}", T::NAME);
    let lease = locks.insert_lock(&name).ttl(TTL).wait(PATIENCE).acquire().await.unwrap();
    proxy.delay(Direction::ToClient, TTL * 7 / 10);
    tokio::time::timeout(PATIENCE, lease.lost()).await.unwrap();
    let is_told = |warning: &String| warning.contains(&name) && warning.contains("allow a longer `ttl`");
    eventually(PATIENCE, async || WARNINGS.lock().unwrap().iter().any(is_told)).await;
}

static WARNINGS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Keeps the warnings for operators.
struct Warnings;

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::WARN
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut fields = String::new();
        event.record(&mut |field: &Field, value: &dyn std::fmt::Debug| {
            fields += &format!("{field} = {value:?}; ");
        });
        WARNINGS.lock().unwrap().push(fields);
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// `max_allowed_packet` may be too small for all renewals of a process, or for all names of a
/// request.
async fn messages_fit_into_max_allowed_packet<T: TestServer>(database: &T) {
    const TTL: Duration = Duration::from_secs(3);
    drop(database.locks().await);
    let locks: Locks<T::Database>;
    if T::NAME == "postgres" {
        locks = Locks::new(database.pool(2).await);
    } else {
        // Connections keep the setting from when they were opened.
        let before = database.number("SELECT @@GLOBAL.max_allowed_packet").await;
        let mut connection = database.connection().await;
        T::Database::run(&mut connection, "SET GLOBAL max_allowed_packet = 16384").await.unwrap();
        let connected = tokio::time::timeout(PATIENCE, async {
            let locks: Locks<T::Database> = Locks::new(database.pool(1).await);
            let _renewed = locks.insert_lock("warm").ttl(Duration::from_millis(600)).acquire().await.unwrap();
            // The pool's connection, both private ones, and this one.
            eventually(PATIENCE, async || database.activity().await.connections >= 4).await;
            locks
        });
        let connected = connected.await;
        let puts_back = format!("SET GLOBAL max_allowed_packet = {before}");
        T::Database::run(&mut connection, &puts_back).await.unwrap();
        locks = connected.unwrap();
    }
    let long: Vec<String> = (0..300).map(|number| format!("{number:05}{}", "n".repeat(250))).collect();
    for _ in 0..2 {
        let leases = locks.insert_locks(&long).ttl(TTL).wait(PATIENCE).acquire().await.unwrap();
        // For as long as it takes to renew all of them, and once more.
        let lost = tokio::time::timeout(3 * TTL / 2, leases.lost()).await;
        assert!(lost.is_err() && leases.is_held(), "they are not renewed");
        let other = Locks::new(database.pool(2).await);
        assert!(other.insert_locks(&long).try_acquire().await.unwrap().is_none());
        leases.release().await.unwrap();
    }
    let mut callers = JoinSet::new();
    for name in &long {
        callers.spawn(locks.insert_lock(name).ttl(LONG).wait(PATIENCE).acquire());
    }
    let leases: Vec<_> = callers.join_all().await.into_iter().map(Result::unwrap).collect();
    let mut releases: JoinSet<_> = leases.into_iter().map(lock_db::Lease::release).collect();
    while let Some(released) = releases.join_next().await {
        released.unwrap().unwrap();
    }
}
