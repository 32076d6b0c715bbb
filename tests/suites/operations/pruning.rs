//! Rows that were not used for long are removed, and nothing else is.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use lock_db::{AnyLocks, Error, Locks};
use lock_tests::{
    Backend, Queued, Random, TestDatabase, TestServer, eventually, migrated, queue_of, set_queue,
};
use sqlx::Pool;
use sqlx::pool::PoolOptions;
use tokio::task::JoinSet;

lock_tests::cases! {
    on every database:
    only_unused_rows_go,
    only_names_with_the_prefix_go,
    a_queue_of_dead_processes_is_emptied,
    tokens_grow_after_the_row_was_removed,
    removed_names_are_locked_again_in_every_way,
    one_call_at_a_time,
    a_call_that_is_dropped_leaves_no_lease,
    close_ends_a_call,
    a_session_prunes_by_itself,
    one_process_prunes_in_each_interval,
    locks_go_on_meanwhile,
    options_are_checked_before_any_sql;

    on every server:
    rows_that_others_have_locked_stay,
    a_try_waits_for_the_end_of_a_removal,
    names_are_made_beside_removed_rows,
    a_transaction_finds_the_row_of_another_process_again;

    on sqlite:
    another_writer_delays_a_call,
}

const PATIENCE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_hours(24);
/// The shortest time that is allowed.
const SECOND: Duration = Duration::from_secs(1);

/// The row with the largest id, which stays on MySQL and MariaDB.
const NEWEST: &str = "newest";

async fn use_once<DB: Backend>(locks: &Locks<DB>, name: &str) {
    locks.insert_lock(name).acquire().await.unwrap().release().await.unwrap();
}

async fn use_row<DB: Backend>(locks: &Locks<DB>, name: &str) {
    locks.row_lock(name).acquire().await.unwrap().commit().await.unwrap();
}

/// Makes rows look as if they were last used in 2020.
async fn age<T: TestDatabase>(database: &T, names: &str) {
    database
        .run(&format!(
            "UPDATE distributed_lock SET create_time = '2020-01-01 00:00:00.000000',
                acquire_time = '2020-01-01 00:00:00.000000', fencing_token = 1577836800000000
            WHERE {names}"
        ))
        .await;
}

async fn names<T: TestDatabase>(database: &T) -> Vec<String> {
    let count = database.number("SELECT COUNT(*) FROM distributed_lock").await;
    let mut names = Vec::new();
    for position in 0..count {
        let name = match T::NAME {
            "mariadb" | "mysql" => "CONVERT(lock_name USING utf8mb4)",
            _ => "lock_name",
        };
        let sql = format!("SELECT {name} FROM distributed_lock ORDER BY lock_name LIMIT 1 OFFSET {position}");
        names.extend(database.find_text(&sql).await);
    }
    names.retain(|name| !name.contains("lock_db."));
    names
}

/// Rows `old:0` to `old:{count - 1}`, last used in 2020.
async fn insert_old<T: TestDatabase>(database: &T, count: usize) {
    let numbers: Vec<usize> = (0..count).collect();
    for part in numbers.chunks(1000) {
        let time = "'2020-01-01 00:00:00.000000'";
        let rows: Vec<String> = part.iter().map(|n| format!("('old:{n}', {time}, {time})")).collect();
        let rows = rows.join(",");
        database
            .run(&format!(
                "INSERT INTO distributed_lock (lock_name, create_time, acquire_time) VALUES {rows}"
            ))
            .await;
    }
}

async fn old_rows<T: TestDatabase>(database: &T) -> i64 {
    database.number("SELECT COUNT(*) FROM distributed_lock WHERE lock_name LIKE 'old:%'").await
}

async fn only_unused_rows_go<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    for name in ["lease", "expired", "ahead", "unknown", "queue", "created", "acquired"] {
        use_once(&locks, name).await;
    }
    use_row(&locks, "row").await;
    let held = locks.insert_lock("held").acquire().await.unwrap();
    age(database, "lock_name <> 'held'").await;
    // A holder that died, and one whose lease ended a moment ago.
    let set = async |name: &str, what: &str| {
        database.run(&format!("UPDATE distributed_lock SET {what} WHERE lock_name = '{name}'")).await;
    };
    set("expired", "expire_time = '2020-01-02 00:00:00.000000', ttl_micros = 30000000").await;
    set("held", "acquire_time = '2020-01-01 00:00:00.000000', create_time = '2020-01-01 00:00:00.000000'")
        .await;
    // The clock of the server was once ahead.
    set("ahead", "fencing_token = 4102444800000000").await;
    set("unknown", "lock_kind = 'later'").await;
    let now = match T::NAME {
        "postgres" => "clock_timestamp()",
        "sqlite" => "strftime('%Y-%m-%d %H:%M:%f000', 'now')",
        _ => "UTC_TIMESTAMP(6)",
    };
    set("created", &format!("create_time = {now}")).await;
    set("acquired", &format!("acquire_time = {now}")).await;
    use_once(&locks, NEWEST).await;
    set_queue(database, "queue", &[Queued::abandoned(7)]).await;
    assert_eq!(locks.prune(DAY).await.unwrap(), 3, "{:?}", names(database).await);
    assert_eq!(
        names(database).await,
        ["acquired", "ahead", "created", "held", NEWEST, "queue", "unknown"],
        "`lease`, `row` and `expired` are gone"
    );
    assert_eq!(locks.prune(DAY).await.unwrap(), 0);
    assert!(held.is_held());
    held.release().await.unwrap();
}

async fn only_names_with_the_prefix_go<T: TestDatabase>(database: &T) {
    let all = database.locks().await;
    let of = async |prefix: &str| {
        let pool = database.pool(2).await;
        AnyLocks::from(Locks::builder(pool).name_prefix(prefix).build())
    };
    for name in ["a%:1", "a%:2", "ab:1", "A%:1", "ä%:1"] {
        use_once(&all, name).await;
    }
    use_once(&all, NEWEST).await;
    age(database, "lock_name <> 'newest'").await;
    assert_eq!(of("a%:").await.prune(DAY).await.unwrap(), 2);
    assert_eq!(names(database).await, ["A%:1", "ab:1", NEWEST, "ä%:1"]);
    assert_eq!(of("ä%:").await.prune(DAY).await.unwrap(), 1);
    assert_eq!(all.prune(DAY).await.unwrap(), 2, "without a prefix: all names");
    let longest = of(&"p".repeat(250)).await;
    assert!(matches!(longest.prune(DAY).await, Err(Error::InvalidName { .. })));
}

async fn a_queue_of_dead_processes_is_emptied<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    use_once(&locks, "queue").await;
    use_once(&locks, NEWEST).await;
    age(database, "lock_name = 'queue'").await;
    set_queue(database, "queue", &[Queued::abandoned(7), Queued::abandoned(8)]).await;
    assert_eq!(locks.prune(DAY).await.unwrap(), 0, "its entries are valid");
    assert_eq!(queue_of(database, "queue").await.len(), 2);
    eventually(PATIENCE, async || locks.prune(DAY).await.unwrap() == 1).await;
    assert_eq!(names(database).await, [NEWEST]);
}

async fn tokens_grow_after_the_row_was_removed<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let mut last = 0;
    for round in 0..3 {
        let lease = locks.insert_lock("lease").acquire().await.unwrap();
        assert!(lease.fencing_token() > last);
        last = lease.fencing_token();
        lease.release().await.unwrap();
        use_once(&locks, &format!("{NEWEST} {round}")).await;
        eventually(PATIENCE, async || {
            locks.prune(SECOND).await.unwrap();
            locks.info("lease").await.unwrap().is_none()
        })
        .await;
    }
}

/// Every way to take a lock of this name, one after the other.
async fn use_in_every_way<DB: Backend>(locks: &Locks<DB>, pool: &Pool<DB>, way: usize) -> Result<(), Error> {
    match way {
        0 => locks.insert_lock("lease").acquire().await?.release().await,
        1 => {
            let tried = locks.insert_lock("lease").try_acquire().await?;
            let Some(lease) = tried else { panic!("it is free: {:?}", locks.info("lease").await) };
            lease.release().await
        }
        2 => locks.insert_locks(["lease", "lease 2"]).acquire().await?.release().await,
        3 => locks.row_lock("row").acquire().await?.commit().await,
        4 => locks.row_lock("row").try_acquire().await?.expect("it is free").commit().await,
        5 => locks.row_locks(["row", "row 2"]).acquire().await?.commit().await,
        _ => {
            let mut tx = pool.begin().await.unwrap();
            match way {
                6 => drop(locks.row_lock("row").acquire_in(&mut tx).await?),
                7 => drop(locks.row_locks(["row", "row 2"]).acquire_in(&mut tx).await?),
                _ => drop(locks.insert_lock("lease").acquire_in(&mut tx).await?),
            }
            tx.commit().await.unwrap();
            Ok(())
        }
    }
}

const WAYS: usize = 9;

/// The names are known to the process, with the ids of their rows.
async fn removed_names_are_locked_again_in_every_way<T: TestDatabase>(database: &T) {
    let (locks, others, pool) = (database.locks().await, database.locks().await, database.pool(2).await);
    for (pruner, by) in [(&locks, "itself"), (&others, "another")] {
        for way in 0..WAYS {
            use_in_every_way(&locks, &pool, way).await.unwrap();
            use_once(&others, &format!("{NEWEST} {by} {way}")).await;
            age(database, "lock_name NOT LIKE 'newest%' AND lock_name NOT LIKE 'lock%'").await;
            assert!(pruner.prune(DAY).await.unwrap() > 0, "{way}");
            use_in_every_way(&locks, &pool, way).await.unwrap_or_else(|error| panic!("{way}: {error:?}"));
        }
    }
}

/// In both isolation levels, and after the transaction has read something, too.
async fn a_transaction_finds_the_row_of_another_process_again<T: TestServer>(database: &T) {
    let (locks, others, pool) = (database.locks().await, database.locks().await, database.pool(1).await);
    for level in ["READ COMMITTED", "REPEATABLE READ"] {
        for reads_first in [false, true] {
            use_row(&locks, "row").await;
            use_once(&locks, &format!("{NEWEST} {level} {reads_first}")).await;
            age(database, "lock_name = 'row'").await;
            assert_eq!(others.prune(DAY).await.unwrap(), 1);
            let mut connection = pool.acquire().await.unwrap();
            let begin = match T::NAME {
                "postgres" => format!("BEGIN ISOLATION LEVEL {level}"),
                _ => format!("SET SESSION TRANSACTION ISOLATION LEVEL {level}"),
            };
            let mut tx = if T::NAME == "postgres" {
                sqlx::Connection::begin_with(&mut *connection, sqlx::AssertSqlSafe(begin)).await.unwrap()
            } else {
                T::Database::run(&mut connection, &begin).await.unwrap();
                sqlx::Connection::begin(&mut *connection).await.unwrap()
            };
            if reads_first {
                T::Database::find_number(&mut tx, "SELECT COUNT(*) FROM distributed_lock").await.unwrap();
            }
            locks.row_lock("row").acquire_in(&mut tx).await.unwrap_or_else(|error| {
                panic!("{level}, {reads_first}: {error:?}");
            });
            // A new name is made meanwhile: no gap is locked where it belongs.
            let started = Instant::now();
            use_once(&others, &format!("new {level} {reads_first}")).await;
            assert!(started.elapsed() < SECOND, "{level}, {reads_first}: {:?}", started.elapsed());
            tx.commit().await.unwrap();
        }
    }
}

async fn one_call_at_a_time<T: TestDatabase>(database: &T) {
    let (locks, pool) = (database.locks().await, database.pool(2).await);
    let hasty = Locks::builder(pool).default_wait(Duration::from_millis(50)).build();
    let pruning = locks.insert_lock("lock_db.prune").acquire().await.unwrap();
    let Err(Error::Timeout { held_by: Some(held_by), .. }) = hasty.prune(DAY).await else {
        panic!("another call prunes")
    };
    assert_eq!(held_by.owner, locks.owner());
    pruning.release().await.unwrap();
    assert_eq!(hasty.prune(DAY).await.unwrap(), 0);
    // Calls that wait for one another.
    insert_old(database, 300).await;
    use_once(&locks, NEWEST).await;
    let (one, other) = tokio::join!(locks.prune(DAY), locks.prune(DAY));
    assert_eq!(one.unwrap() + other.unwrap(), 300);
}

async fn a_call_that_is_dropped_leaves_no_lease<T: TestDatabase>(database: &T) {
    let (locks, others) = (database.locks().await, database.locks().await);
    insert_old(database, 10_000).await;
    use_once(&locks, NEWEST).await;
    let pruning = tokio::spawn({
        let locks = locks.clone();
        async move { locks.prune(DAY).await }
    });
    eventually(PATIENCE, async || old_rows(database).await < 10_000).await;
    pruning.abort();
    let left = old_rows(database).await;
    assert!(left > 0, "it was dropped too late to show anything");
    eventually(PATIENCE, async || {
        let info = others.info("lock_db.prune").await.unwrap().unwrap();
        info.held_until.is_none()
    })
    .await;
    others.prune(DAY).await.unwrap();
    assert_eq!(old_rows(database).await, 0);
}

async fn close_ends_a_call<T: TestDatabase>(database: &T) {
    let (locks, others) = (database.locks().await, database.locks().await);
    insert_old(database, 10_000).await;
    use_once(&locks, NEWEST).await;
    let pruning = tokio::spawn({
        let locks = locks.clone();
        async move { locks.prune(DAY).await }
    });
    eventually(PATIENCE, async || old_rows(database).await < 10_000).await;
    let started = Instant::now();
    locks.close().await;
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    assert!(matches!(pruning.await.unwrap(), Err(Error::Closed)));
    assert!(old_rows(database).await > 0);
    assert!(others.info("lock_db.prune").await.unwrap().unwrap().held_until.is_none());
}

/// In the order of the shortest setting, and not with `None`.
async fn a_session_prunes_by_itself<T: TestDatabase>(database: &T) {
    let of = async |prefix: &str, prune_after: Option<Duration>| {
        let pool = database.pool(2).await;
        Locks::builder(pool).name_prefix(prefix).prune_after(prune_after).build()
    };
    let (sooner, later) = (of("sooner:", Some(SECOND)).await, of("later:", Some(DAY)).await);
    let never = of("never:", None).await;
    let all = [migrated(sooner).await, later, never];
    for locks in &all {
        use_once(locks, "lease").await;
        use_row(locks, "row").await;
    }
    age(database, "lock_name LIKE 'never:%'").await;
    use_once(&all[1], NEWEST).await;
    let still = ["later:lease", "later:newest", "later:row", "never:lease", "never:row"];
    eventually(PATIENCE, async || names(database).await == still).await;
    assert!(all[0].info("lock_db.prune_after").await.unwrap().is_some());
    assert!(all[2].info("lock_db.prune_after").await.unwrap().is_none());
    for locks in &all {
        locks.close().await;
    }
}

/// Three processes, of which the first one to prune leaves nothing to do for the others.
async fn one_process_prunes_in_each_interval<T: TestDatabase>(database: &T) {
    let first = database.locks().await;
    let (token, started) = (Arc::new(Mutex::new(0)), Instant::now());
    let mut all = Vec::new();
    for _ in 0..3 {
        let locks = Locks::builder(database.pool(2).await).prune_after(SECOND).build();
        use_once(&locks, "lease").await;
        all.push(locks);
    }
    let mut walks = 0;
    let mut last = None;
    while walks < 2 {
        assert!(started.elapsed() < PATIENCE, "{walks} walks");
        tokio::time::sleep(Duration::from_millis(50)).await;
        let Some(info) = first.info("lock_db.prune_after").await.unwrap() else { continue };
        if info.fencing_token > *token.lock().unwrap() {
            // Half of an interval of 15 s, less what a busy machine takes.
            if let Some(last) = last.replace(Instant::now()) {
                let since = last.elapsed();
                assert!(since > Duration::from_secs(6), "the next walk began {since:?} after the last");
            }
            *token.lock().unwrap() = info.fencing_token;
            walks += 1;
        }
    }
}

/// What the holders of the locks in `locks_go_on_meanwhile` have seen.
#[derive(Default)]
struct Seen {
    held: AtomicBool,
    last: Mutex<i64>,
}

/// Several processes lock names in every way, some often and some seldom, while another one removes
/// each row that was not used for a second.
async fn locks_go_on_meanwhile<T: TestDatabase>(database: &T) {
    const NAMES: usize = 60;
    const LASTS: Duration = Duration::from_secs(8);
    let seed = lock_tests::seed();
    let seen: Arc<HashMap<usize, Seen>> = Arc::new((0..NAMES).map(|n| (n, Seen::default())).collect());
    let (until, used) = (Instant::now() + LASTS, Arc::new(AtomicUsize::new(0)));
    let mut users = JoinSet::new();
    for user in 0..6 {
        let (locks, pool) = (database.locks().await, database.pool(2).await);
        let (seen, used, mut random) = (Arc::clone(&seen), Arc::clone(&used), Random(seed + user));
        users.spawn(async move {
            while Instant::now() < until {
                let name = random.below(NAMES);
                let enter = || assert!(!seen[&name].held.swap(true, Ordering::SeqCst), "two holders: {name}");
                let leave = || seen[&name].held.store(false, Ordering::SeqCst);
                match name % 3 {
                    0 => {
                        let lease = locks.insert_lock(format!("lease:{name}")).acquire().await.unwrap();
                        enter();
                        let token = lease.fencing_token();
                        let last = std::mem::replace(&mut *seen[&name].last.lock().unwrap(), token);
                        assert!(token > last, "{name}: {token} after {last}");
                        leave();
                        lease.release().await.unwrap();
                    }
                    1 => {
                        let guard = locks.row_lock(format!("row:{name}")).acquire().await.unwrap();
                        enter();
                        leave();
                        guard.commit().await.unwrap();
                    }
                    _ => loop {
                        let mut tx = pool.begin().await.unwrap();
                        match locks.row_lock(format!("row:{name}")).acquire_in(&mut tx).await {
                            Ok(_) => {
                                enter();
                                leave();
                                tx.commit().await.unwrap();
                                break;
                            }
                            // As ever with two transactions that use one lock.
                            Err(Error::Serialization { .. }) => tx.rollback().await.unwrap(),
                            Err(error) if T::NAME == "sqlite" && error.is_retryable() => {
                                tx.rollback().await.unwrap();
                            }
                            Err(error) => panic!("{name}: {error:?}"),
                        }
                    },
                }
                used.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(random.millis(0, 100)).await;
            }
        });
    }
    let pruner = database.locks().await;
    let mut removed = 0;
    while Instant::now() < until {
        removed += pruner.prune(SECOND).await.unwrap();
    }
    while let Some(user) = users.join_next().await {
        user.unwrap();
    }
    assert!(removed > 0, "no row was removed");
    assert!(used.load(Ordering::SeqCst) > 20);
}

async fn options_are_checked_before_any_sql<T: TestDatabase>(_database: &T) {
    let nowhere = match T::NAME {
        "postgres" => "postgres://127.0.0.1:1/nowhere",
        "sqlite" => "sqlite:/nowhere/at/all",
        _ => "mysql://127.0.0.1:1/nowhere",
    };
    let pool = || PoolOptions::<T::Database>::new().connect_lazy(nowhere).unwrap();
    let is_refused = |answer: Result<u64, Error>, wanted: &str| {
        assert!(
            matches!(&answer, Err(Error::InvalidOption { option, .. }) if *option == wanted),
            "{answer:?}"
        );
    };
    let locks = Locks::new(pool());
    for wrong in [Duration::ZERO, Duration::from_millis(999), DAY * 366, Duration::MAX] {
        is_refused(locks.prune(wrong).await, "older_than");
        let locks = Locks::builder(pool()).prune_after(wrong).build();
        is_refused(locks.check().await.map(|_| 0), "prune_after");
        is_refused(locks.insert_lock("a").acquire().await.map(|_| 0), "prune_after");
        is_refused(locks.row_lock("a").acquire().await.map(|_| 0), "prune_after");
        is_refused(locks.prune(DAY).await, "prune_after");
    }
}

async fn rows_that_others_have_locked_stay<T: TestServer>(database: &T) {
    let (locks, pool) = (database.locks().await, database.pool(2).await);
    for name in ["row", "guarded", "lease", "other"] {
        if name == "row" { use_row(&locks, name).await } else { use_once(&locks, name).await }
    }
    use_once(&locks, NEWEST).await;
    age(database, "lock_name <> 'newest'").await;
    let (mut by_row, mut by_lease) = (pool.begin().await.unwrap(), pool.begin().await.unwrap());
    locks.row_lock("row").acquire_in(&mut by_row).await.unwrap();
    locks.insert_lock("lease").acquire_in(&mut by_lease).await.unwrap();
    let mut guard = database.connection().await;
    let share = "SELECT id FROM distributed_lock WHERE lock_name = 'guarded' FOR SHARE";
    let share =
        if T::NAME == "mariadb" { share.replace("FOR SHARE", "LOCK IN SHARE MODE") } else { share.into() };
    let begin = if T::NAME == "postgres" { "BEGIN" } else { "START TRANSACTION" };
    T::Database::run(&mut guard, begin).await.unwrap();
    T::Database::find_number(&mut guard, &share).await.unwrap();
    let started = Instant::now();
    assert_eq!(locks.prune(DAY).await.unwrap(), 1);
    assert!(started.elapsed() < SECOND, "it waited for {:?}", started.elapsed());
    assert_eq!(names(database).await, ["guarded", "lease", NEWEST, "row"]);
    by_row.commit().await.unwrap();
    by_lease.rollback().await.unwrap();
    T::Database::run(&mut guard, "ROLLBACK").await.unwrap();
    assert_eq!(locks.prune(DAY).await.unwrap(), 2, "`row` was used a moment ago");
}

/// The removal is one of a slow server. On a busy machine it may take longer than the try waits.
async fn a_try_waits_for_the_end_of_a_removal<T: TestServer>(database: &T) {
    let locks = database.locks().await;
    eventually(PATIENCE, async || {
        use_once(&locks, "lease").await;
        age(database, "lock_name = 'lease'").await;
        use_once(&locks, NEWEST).await;
        let mut removal = database.connection().await;
        let begin = if T::NAME == "postgres" { "BEGIN" } else { "START TRANSACTION" };
        T::Database::run(&mut removal, begin).await.unwrap();
        T::Database::run(&mut removal, "DELETE FROM distributed_lock WHERE lock_name = 'lease'")
            .await
            .unwrap();
        let (tried, removed) = tokio::join!(locks.insert_lock("lease").try_acquire(), async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            T::Database::run(&mut removal, "COMMIT").await
        });
        removed.unwrap();
        tried.unwrap().is_some()
    })
    .await;
}

/// The same names, and those next to them in the index, are made by two processes while their rows
/// are removed.
async fn names_are_made_beside_removed_rows<T: TestServer>(database: &T) {
    let pruner = database.locks().await;
    for round in 0..8 {
        let mut users = JoinSet::new();
        for process in 0..2 {
            let locks = database.locks().await;
            users.spawn(async move {
                let mut names = JoinSet::new();
                for number in 0..60 {
                    let locks = locks.clone();
                    names.spawn(async move {
                        use_once(&locks, &format!("name:{number}")).await;
                        use_once(&locks, &format!("name:{number}:{round}:{process}")).await;
                        use_row(&locks, &format!("name:{number}:row")).await;
                    });
                }
                while let Some(used) = names.join_next().await {
                    used.unwrap();
                }
            });
        }
        while !users.is_empty() {
            let pruned = async { pruner.prune(DAY).await.unwrap() };
            tokio::select! {
                _ = pruned => {}
                used = users.join_next() => used.unwrap().unwrap(),
            }
        }
        age(database, "lock_name LIKE 'name:%'").await;
        use_once(&pruner, NEWEST).await;
    }
    assert!(pruner.prune(DAY).await.unwrap() > 0);
}

async fn another_writer_delays_a_call<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    insert_old(database, 10).await;
    let mut writer = database.connection().await;
    T::Database::run(&mut writer, "BEGIN IMMEDIATE").await.unwrap();
    let pruning = tokio::spawn({
        let locks = locks.clone();
        async move { locks.prune(DAY).await }
    });
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!pruning.is_finished());
    T::Database::run(&mut writer, "COMMIT").await.unwrap();
    assert_eq!(pruning.await.unwrap().unwrap(), 10);
}
