//! `lock_db::testing`: the `Locks` of a test, the assertion, and the switch.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lock_db::testing::{self, TestLocks, assert_held, assert_held_by, without_locks};
use lock_db::{Error, Locks, ReentryContext, distributed_lock};
use sqlx::{Sqlite, SqlitePool, Transaction};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber, span};

lock_tests::cases! {
    without a database:
    each_test_has_a_database_of_its_own (current_thread),
    the_database_is_the_same_for_all_connections (two_workers),
    readers_do_not_wait_for_a_transaction (current_thread),
    a_test_that_waits_for_itself_ends (current_thread),
    the_database_goes_with_the_last_handle (current_thread),
    nothing_is_left_behind_by_a_runtime_that_ends,
    bodies_are_under_their_locks (current_thread),
    bodies_in_a_transaction_are_under_their_locks (current_thread),
    tasks_are_not_under_the_locks_of_their_parents (current_thread),
    a_lost_lock_is_not_held (current_thread),
    open_guards_are_held (current_thread),
    a_lost_guard_is_not_held (current_thread),
    locks_in_open_transactions_are_held (current_thread),
    assert_held_by_tells_two_locks_apart (current_thread),
    a_paused_clock_does_not_matter (paused),
    without_locks_nothing_is_locked (current_thread),
    the_switch_ends_with_its_scope (current_thread),
    without_locks_bad_input_is_refused_all_the_same (current_thread),
    without_locks_there_is_no_lease (current_thread),
    every_function_without_its_lock_is_in_the_log (current_thread),
    closing_does_not_remove_the_database (current_thread);

    in modules: beside_sqlx_test
}

const MOMENT: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(10);

/// The message of `assert_held` for a name here; `None` when it is held.
fn complaint(name: &str) -> Option<String> {
    let panic = catch_unwind(AssertUnwindSafe(|| assert_held(name))).err()?;
    Some(panic.downcast_ref::<String>().expect("a message").clone())
}

/// The file of the database of these locks.
fn file(locks: &TestLocks) -> PathBuf {
    locks.pool().connect_options().get_filename().to_path_buf()
}

fn folder(file: &Path) -> PathBuf {
    file.parent().expect("a folder").to_path_buf()
}

async fn each_test_has_a_database_of_its_own() {
    let (one, other) = (testing::locks().await.unwrap(), testing::locks().await.unwrap());
    one.check().await.unwrap();
    let _lease = one.insert_lock("a").try_acquire().await.unwrap().expect("is free");
    let _elsewhere = other.insert_lock("a").try_acquire().await.unwrap().expect("is another one");
    assert!(one.insert_lock("a").try_acquire().await.unwrap().is_none());

    sqlx::query("CREATE TABLE mine (id INTEGER)").execute(one.pool()).await.unwrap();
    let found = sqlx::query("SELECT id FROM mine").fetch_all(other.pool()).await;
    assert!(found.unwrap_err().to_string().contains("no such table"));
}

/// A lease and its release use connections of the session. Row locks and the business use those of
/// the pool.
async fn the_database_is_the_same_for_all_connections() {
    let locks = testing::locks().await.unwrap();
    sqlx::raw_sql("CREATE TABLE stock (left_over INTEGER); INSERT INTO stock VALUES (40)")
        .execute(locks.pool())
        .await
        .unwrap();
    let mut buyers = tokio::task::JoinSet::new();
    for number in 0..40 {
        let (locks, pool): (Locks<Sqlite>, _) = (locks.clone(), locks.pool().clone());
        buyers.spawn(async move {
            if number % 2 == 0 {
                locks.insert_lock("stock").run(async |_lease| take_one(&pool).await).await
            } else {
                // Another kind of lock on the same data. The writes of each are one transaction,
                // and SQLite has one writer.
                let mut guard = locks.row_lock("stock:row").acquire().await?;
                sqlx::query("UPDATE stock SET left_over = left_over - 1").execute(&mut *guard).await.unwrap();
                guard.commit().await
            }
        });
    }
    while let Some(bought) = buyers.join_next().await {
        bought.unwrap().unwrap();
    }
    let left: i64 = sqlx::query_scalar("SELECT left_over FROM stock").fetch_one(locks.pool()).await.unwrap();
    assert_eq!(left, 0);
}

async fn take_one(pool: &SqlitePool) -> Result<(), Error> {
    sqlx::query("UPDATE stock SET left_over = left_over - 1").execute(pool).await.unwrap();
    Ok(())
}

/// Also those beside a long transaction. With a database in memory they would wait for its end, or
/// fail.
async fn readers_do_not_wait_for_a_transaction() {
    let locks = testing::locks().await.unwrap();
    sqlx::query("CREATE TABLE stock (left_over INTEGER)").execute(locks.pool()).await.unwrap();
    let mut guard = locks.row_lock("stock").acquire().await.unwrap();
    sqlx::query("INSERT INTO stock VALUES (1)").execute(&mut *guard).await.unwrap();
    let count = sqlx::query_scalar("SELECT count(*) FROM stock").fetch_one(locks.pool());
    let count: i64 = tokio::time::timeout(MOMENT, count).await.expect("does not wait").unwrap();
    assert_eq!(count, 0);
    assert!(locks.info("stock").await.is_ok());
    guard.commit().await.unwrap();
}

async fn a_test_that_waits_for_itself_ends() {
    let locks = testing::locks().await.unwrap();
    let _lease = locks.insert_lock("a").acquire().await.unwrap();
    let waited =
        tokio::time::timeout(PATIENCE, locks.insert_lock("a").acquire()).await.expect("ends in time");
    assert!(matches!(waited, Err(Error::Timeout { .. })));
}

async fn the_database_goes_with_the_last_handle() {
    let locks = testing::locks().await.unwrap();
    let (file, clone) = (file(&locks), locks.clone());
    let lease = clone.insert_lock("a").acquire().await.unwrap();
    assert!(file.exists());
    drop((locks, clone));
    // A lease is released through its `Locks`.
    assert!(file.exists());
    lease.release().await.unwrap();
    assert!(!folder(&file).exists());
}

/// The connections are still being closed then, by threads of their own.
fn nothing_is_left_behind_by_a_runtime_that_ends() {
    for _ in 0..20 {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let file = runtime.block_on(async {
            let locks = testing::locks().await.unwrap();
            let lease = locks.insert_lock("a").acquire().await.unwrap();
            let pool = locks.pool().clone();
            tokio::spawn(async move {
                let _lease = lease;
                let _transaction = pool.begin_with("BEGIN IMMEDIATE").await;
                std::future::pending::<()>().await;
            });
            tokio::task::yield_now().await;
            file(&locks)
        });
        drop(runtime);
        assert!(!folder(&file).exists(), "{} is still there", file.display());
    }
}

#[distributed_lock("outer:{id}")]
async fn outer(id: i64) -> Result<(), Error> {
    assert_held(format!("outer:{id}"));
    assert_eq!(
        complaint("inner:1").as_deref(),
        Some("lock `inner:1` is not held here: this code runs under `outer:1` (an insert lock)")
    );
    inner(id).await?;
    assert!(complaint("inner:1").is_some());
    Ok(())
}

#[distributed_lock("inner:{id}", mode = row)]
async fn inner(id: i64) -> Result<(), Error> {
    assert_held(format!("inner:{id}"));
    deeper(id).await;
    assert_eq!(
        complaint("outer").as_deref(),
        Some(
            "lock `outer` is not held here: this code runs under `inner:1` (a row lock), `outer:1` (an insert lock)"
        )
    );
    Ok(())
}

async fn deeper(id: i64) {
    tokio::task::yield_now().await;
    assert_held(format!("outer:{id}"));
}

#[distributed_lock("again:{depth_of_all}")]
async fn again(depth_of_all: i64, depth: i64) -> Result<(), Error> {
    assert_held(format!("again:{depth_of_all}"));
    if depth > 1 {
        return again(depth_of_all, depth - 1).await;
    }
    assert!(complaint("other").expect("is not held").ends_with("under `again:3` (an insert lock)"));
    Ok(())
}

async fn bodies_are_under_their_locks() {
    let locks = testing::locks().await.unwrap();
    assert_eq!(
        complaint("outer:1").as_deref(),
        Some("lock `outer:1` is not held here: this code runs under no lock")
    );
    locks.scope(outer(1)).await.unwrap();
    locks.scope(again(3, 3)).await.unwrap();
    let run = locks.insert_lock("run").run(async |_lease| {
        assert_held("run");
        Ok::<_, Error>(())
    });
    run.await.unwrap();
    assert!(complaint("run").is_some());
}

#[distributed_lock("tx:{id}", mode = row, tx = tx)]
async fn in_transaction(tx: &mut Transaction<'_, Sqlite>, id: i64) -> Result<i64, Error> {
    assert_held(format!("tx:{id}"));
    if id > 1 {
        Box::pin(in_transaction(tx, id - 1)).await?;
        assert!(complaint("tx:1").is_some());
    } else {
        assert_eq!(
            complaint("tx:3").as_deref(),
            Some(
                "lock `tx:3` is not held here: this code runs under `tx:1` (a row lock in the caller's transaction), `tx:2` (a row lock in the caller's transaction)"
            )
        );
    }
    Ok(id)
}

async fn bodies_in_a_transaction_are_under_their_locks() {
    let locks = testing::locks().await.unwrap();
    let mut transaction = locks.pool().begin().await.unwrap();
    assert_eq!(locks.scope(in_transaction(&mut transaction, 2)).await.unwrap(), 2);
    transaction.commit().await.unwrap();
}

async fn tasks_are_not_under_the_locks_of_their_parents() {
    let locks = testing::locks().await.unwrap();
    let run = locks.insert_lock("a").run(async |_lease| {
        assert!(tokio::spawn(async { complaint("a") }).await.unwrap().is_some());
        let owner = ReentryContext::current().expect("is inside");
        assert!(tokio::spawn(owner.scope(async { complaint("a") })).await.unwrap().is_none());
        Ok::<_, Error>(owner)
    });
    let owner = run.await.unwrap();
    let complaint = owner.scope(async { complaint("a") }).await.expect("is not held any more");
    assert_eq!(
        complaint,
        "lock `a` is not held here: this code runs under no lock; it was inside of it, but that hold was lost or has ended"
    );
}

async fn a_lost_lock_is_not_held() {
    let locks = testing::locks().await.unwrap();
    let (complaints, seen) = tokio::sync::oneshot::channel();
    let other = locks.clone();
    let lost = locks.insert_lock("a").run(async |lease| {
        // The body of `run` is dropped when the lease is lost, unless it is not polled in between.
        assert_held("a");
        let closing = tokio::spawn(async move { other.close().await });
        while lease.is_held() {
            std::thread::sleep(Duration::from_millis(1));
            tokio::task::yield_now().await;
        }
        let _ = complaints.send(complaint("a"));
        let _ = closing.await;
        Ok::<_, Error>(())
    });
    assert!(matches!(lost.await, Err(Error::Lost { .. })));
    if let Ok(complaint) = seen.await {
        assert!(complaint.expect("is not held").contains("was lost or has ended"));
    }
}

/// Locks held by guards in this test, and not in another one.
async fn open_guards_are_held() {
    let locks = testing::locks().await.unwrap();
    let lease = locks.insert_lock("lease").acquire().await.unwrap();
    deeper_by_hand("lease").await;
    let again = lease.reenter().unwrap();
    drop(lease);
    deeper_by_hand("lease").await;
    again.release().await.unwrap();
    assert!(complaint("lease").is_some());

    let lease = locks.insert_lock("lease").try_acquire().await.unwrap().expect("is free");
    let guarded = lease.begin().await.unwrap();
    drop(lease);
    // The lease is released only when the transaction has ended.
    deeper_by_hand("lease").await;
    guarded.commit().await.unwrap();
    assert!(complaint("lease").is_some());

    let leases = locks.insert_locks(["one", "two"]).acquire().await.unwrap();
    deeper_by_hand("one").await;
    deeper_by_hand("two").await;
    assert!(
        complaint("three").unwrap().ends_with(
            "under no lock; the test has guards of `one` (an insert lock), `two` (an insert lock)"
        )
    );
    leases.release().await.unwrap();
    assert!(complaint("one").unwrap().ends_with("under no lock"));

    for commits in [true, false] {
        let guard = locks.row_lock("row").acquire().await.unwrap();
        deeper_by_hand("row").await;
        // A guard can be moved to another task, so it counts in all of them.
        tokio::spawn(deeper_by_hand("row")).await.unwrap();
        if commits {
            guard.commit().await.unwrap()
        } else {
            drop(guard)
        }
        assert!(complaint("row").is_some());
    }
    let guard = locks.row_lock("row").wait(PATIENCE).acquire().await.unwrap();
    std::thread::spawn(|| assert!(complaint("row").is_some())).join().expect("another test does not see it");
    guard.rollback().await.unwrap();
}

async fn deeper_by_hand(name: &'static str) {
    tokio::task::yield_now().await;
    assert_held(name);
}

async fn a_lost_guard_is_not_held() {
    let locks = testing::locks().await.unwrap();
    let lease = locks.insert_lock("a").acquire().await.unwrap();
    assert_held("a");
    locks.close().await;
    assert!(complaint("a").is_some());
    drop(lease);
}

/// lock-db is not told when the caller's transaction ends, so it asks the database.
async fn locks_in_open_transactions_are_held() {
    let locks = testing::locks().await.unwrap();
    for commits in [true, false] {
        let mut transaction = locks.pool().begin().await.unwrap();
        locks.row_lock("row").acquire_in(&mut transaction).await.unwrap();
        locks.insert_lock("insert").acquire_in(&mut transaction).await.unwrap();
        locks.row_locks(["one", "two"]).acquire_in(&mut transaction).await.unwrap();
        for name in ["row", "insert", "one", "two"] {
            deeper_by_hand(name).await;
        }
        assert!(complaint("three").is_some());
        if commits {
            transaction.commit().await.unwrap()
        } else {
            transaction.rollback().await.unwrap()
        }
        for name in ["row", "insert", "one", "two"] {
            // If the database does not answer in time, the lock counts as held.
            lock_tests::eventually(PATIENCE, async || complaint(name).is_some()).await;
        }
    }
}

async fn assert_held_by_tells_two_locks_apart() {
    let (ours, theirs) = (testing::locks().await.unwrap(), testing::locks().await.unwrap());
    let lease = theirs.insert_lock("a").acquire().await.unwrap();
    assert_held("a");
    assert_held_by(&theirs.clone(), "a");
    let panic = catch_unwind(AssertUnwindSafe(|| assert_held_by(&ours, "a"))).unwrap_err();
    let message = panic.downcast_ref::<String>().expect("a message");
    assert!(message.ends_with("the test has guards of `a` (an insert lock of another `Locks`)"), "{message}");
    theirs.scope(deeper_by_hand("a")).await;
    assert!(ours.scope(async { complaint("a") }).await.is_some());
    lease.release().await.unwrap();

    let run = ours.insert_lock("run").run(async |_lease| {
        assert_held_by(&ours, "run");
        Ok::<_, Error>(catch_unwind(AssertUnwindSafe(|| assert_held_by(&theirs, "run"))).is_err())
    });
    assert!(run.await.unwrap());
}

/// Also with a paused clock in the test.
async fn a_paused_clock_does_not_matter() {
    let locks = testing::locks().await.unwrap();
    let lease = locks.insert_lock("a").acquire().await.unwrap();
    lease.begin().await.unwrap().commit().await.unwrap();
    lease.release().await.unwrap();
    locks.row_lock("b").acquire().await.unwrap().commit().await.unwrap();
    locks.scope(outer(1)).await.unwrap();
}

mod beside_sqlx_test {
    use lock_tests::{TestDatabase, eventually};
    use sqlx::Connection;

    use super::*;

    lock_tests::cases! {
        on every database:
        the_database_of_a_closed_pool_can_be_dropped,
        the_database_of_an_unclosed_pool_can_be_dropped,
    }

    /// `#[sqlx::test]` closes its pool after the test, and drops the database, whatever else the
    /// test has left behind.
    async fn the_database_of_a_closed_pool_can_be_dropped<T: TestDatabase>(database: &T) {
        let pool = database.pool(5).await;
        let locks = testing::locks_on(pool.clone()).await.unwrap();
        let begun = std::time::Instant::now();
        let held = locks.insert_lock("a").acquire().await.unwrap();
        assert!(locks.insert_lock("a").acquire().await.is_err());
        assert!(begun.elapsed() < PATIENCE, "tests are not patient");
        held.begin().await.unwrap().commit().await.unwrap();
        locks.row_lock("b").acquire().await.unwrap().commit().await.unwrap();
        let left = (locks.clone(), held);
        pool.close().await;
        eventually(PATIENCE, async || database.activity().await.connections == 0).await;
        assert!(!left.1.is_held());
        assert!(matches!(left.0.insert_lock("a").acquire().await, Err(Error::Closed)));
        let other = Locks::new(database.pool(1).await);
        let free = other.insert_lock("a").try_acquire().await.unwrap();
        assert!(free.is_some(), "what was held is released");
    }

    /// The pool is not kept open.
    async fn the_database_of_an_unclosed_pool_can_be_dropped<T: TestDatabase>(database: &T) {
        let pool = database.pool(2).await;
        let locks = testing::locks_on(&pool).await.unwrap();
        locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
        drop(locks);
        let mut connection = pool.acquire().await.unwrap();
        connection.ping().await.unwrap();
        drop((connection, pool));
        eventually(PATIENCE, async || database.activity().await.connections == 0).await;
    }
}

#[distributed_lock("explicit", locks = locks)]
async fn explicit(locks: &Locks<Sqlite>) -> Result<Option<String>, Error> {
    Ok(complaint("explicit"))
}

#[distributed_lock("ambient:{id}", ttl = "30s", wait = "5s")]
async fn ambient(id: &str) -> Result<Option<String>, Error> {
    Ok(complaint(&format!("ambient:{id}")))
}

#[distributed_lock("row", mode = row, wait = wait)]
async fn row(wait: Duration) -> Result<(), Error> {
    Ok(())
}

async fn without_locks_nothing_is_locked() {
    let locks = testing::locks().await.unwrap();
    let lease = locks.insert_lock("explicit").acquire().await.unwrap();
    let complaint = without_locks(explicit(&locks)).await.unwrap().expect("is not held");
    let taken_inside = async {
        let _lease = locks.insert_lock("inside").acquire().await.unwrap();
        deeper_by_hand("inside").await;
    };
    without_locks(taken_inside).await;
    assert!(complaint.contains("switched off here by `without_locks`"), "{complaint}");
    lease.release().await.unwrap();
    assert_eq!(explicit(&locks).await.unwrap(), None);

    // Nothing is installed here either.
    assert!(without_locks(ambient("a")).await.unwrap().is_some());
    without_locks(row(MOMENT)).await.unwrap();
    let mut transaction = locks.pool().begin().await.unwrap();
    without_locks(in_transaction_unlocked(&mut transaction)).await.unwrap();
    transaction.rollback().await.unwrap();
    assert!(locks.info("unlocked").await.unwrap().is_none());
}

#[distributed_lock("unlocked", mode = row, tx = tx)]
async fn in_transaction_unlocked(tx: &mut Transaction<'_, Sqlite>) -> Result<(), Error> {
    assert!(complaint("unlocked").is_some());
    Ok(())
}

async fn the_switch_ends_with_its_scope() {
    let refused = |answer| matches!(answer, Err(Error::NotInstalled { .. }));
    without_locks(async {
        let spawned = tokio::spawn(ambient("spawned")).await.unwrap();
        assert!(refused(spawned), "tasks take their locks");
        ambient("inside").await.unwrap();
    })
    .await;
    assert!(refused(ambient("after").await));
    // What counts is where the future is polled.
    let mut made_inside = None;
    without_locks(async { made_inside = Some(Box::pin(ambient("made inside"))) }).await;
    assert!(refused(made_inside.expect("is made").await));

    let locks = testing::locks().await.unwrap();
    let run = without_locks(locks.insert_lock("run").run(async |_lease| Ok::<_, Error>(complaint("run"))));
    assert_eq!(run.await.unwrap(), None, "`run` takes its lock as ever");
}

async fn without_locks_bad_input_is_refused_all_the_same() {
    let too_long = "x".repeat(300);
    assert!(matches!(without_locks(ambient(&too_long)).await, Err(Error::InvalidName { .. })));
    assert!(matches!(without_locks(row(Duration::MAX)).await, Err(Error::InvalidOption { .. })));
}

#[distributed_lock("bound", lease = lease)]
async fn binds_its_lease() -> Result<i64, Error> {
    Ok(lease.fencing_token())
}

#[distributed_lock("bound", mode = row, lease = guard, locks = locks)]
async fn binds_its_guard(locks: &Locks<Sqlite>) -> Result<i64, Error> {
    Ok(i64::try_from(guard.name().len()).unwrap_or_default())
}

#[distributed_lock("skipped", skip, reentrant = false, at_least = "1h")]
async fn may_be_skipped() -> Result<Option<i64>, Error> {
    Ok(Some(1))
}

async fn without_locks_there_is_no_lease() {
    let locks = testing::locks().await.unwrap();
    for refused in [without_locks(binds_its_lease()).await, without_locks(binds_its_guard(&locks)).await] {
        let error = refused.unwrap_err();
        assert!(matches!(error, Error::InvalidOption { option: "lease", .. }), "{error:?}");
    }
    assert!(locks.scope(binds_its_lease()).await.unwrap() > 0);
    let twice = async || (may_be_skipped().await.unwrap(), may_be_skipped().await.unwrap());
    assert_eq!(without_locks(twice()).await, (Some(1), Some(1)));
    assert_eq!(locks.scope(twice()).await, (Some(1), None));
}

async fn every_function_without_its_lock_is_in_the_log() {
    let log = Log::default();
    let _listening = tracing::subscriber::set_default(log.clone());
    without_locks(async {
        ambient("a").await.unwrap();
        ambient("b").await.unwrap();
        row(MOMENT).await.unwrap();
    })
    .await;
    let line = line!() - 1;
    let warnings = log.warnings();
    assert_eq!(warnings.len(), 4, "{warnings:?}");
    assert!(
        warnings[0].contains("testing/main.rs:") && warnings[0].contains("WITHOUT"),
        "{warnings:?} near {line}"
    );
    for (warning, lock) in warnings[1..].iter().zip(["ambient:a", "ambient:b", "row"]) {
        assert!(warning.contains(&format!("lock={lock} ")) && warning.contains("WITHOUT"), "{warning}");
    }
}

/// The warnings of this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Log {
    fn warnings(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::WARN
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let _ = write!(self.0, "{field}={value:?} ");
    }
}

async fn closing_does_not_remove_the_database() {
    let locks = testing::locks().await.unwrap();
    let file = file(&locks);
    locks.close().await;
    assert!(file.exists());
    assert!(matches!(locks.insert_lock("a").acquire().await, Err(Error::Closed)));
    drop(locks);
    assert!(!folder(&file).exists());
}

fn main() -> std::process::ExitCode {
    lock_tests::run([cases()], [])
}
