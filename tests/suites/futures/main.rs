//! Values that users put into `tokio::spawn` and into `static`s.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::time::Duration;

use lock_db::{
    Error, HeldInTransaction, InsertLock, Lease, LockDatabase, LockInfo, Locks, LocksBuilder, RowGuard,
    RowLock, distributed_lock,
};
use sqlx::{MySql, Postgres, Sqlite};

lock_tests::cases! {
    without a database:
    types_are_send_and_sync,
    run_can_be_spawned (current_thread),
    nested_calls_need_little_stack,
    futures_of_annotated_functions_are_small,
    a_guard_that_is_dropped_at_once_is_warned_of (current_thread),
}

fn is_send<T: Send>(_: T) {}
fn crosses<T: Send + Sync + 'static>() {}

fn types_are_send_and_sync() {
    fn of<DB: LockDatabase>() {
        crosses::<Locks<DB>>();
        crosses::<LocksBuilder<DB>>();
        crosses::<InsertLock<DB>>();
        crosses::<RowLock<DB>>();
        crosses::<Lease<DB>>();
    }
    fn clones<T: Clone>() {}
    clones::<Locks<Postgres>>();
    clones::<LocksBuilder<Postgres>>();
    clones::<InsertLock<Postgres>>();
    clones::<RowLock<Postgres>>();
    of::<Postgres>();
    of::<MySql>();
    of::<Sqlite>();
    crosses::<RowGuard<Postgres>>();
    crosses::<RowGuard<MySql>>();
    crosses::<HeldInTransaction>();
    crosses::<LockInfo>();
    crosses::<Error>();
    // Like sqlx's own transaction on SQLite.
    fn moves<T: Send + 'static>() {}
    moves::<RowGuard<Sqlite>>();
}

/// Never called: the test is that it compiles.
#[allow(dead_code)]
fn futures_are_send<DB: LockDatabase>(
    locks: &Locks<DB>,
    lease: Lease<DB>,
    guard: RowGuard<DB>,
    transaction: &mut DB::Connection,
) {
    is_send(locks.migrate());
    is_send(locks.check());
    is_send(locks.close());
    is_send(locks.info("a"));
    is_send(locks.list("*").into_future());
    is_send(locks.force_release("a", 1));
    is_send(lease.wanted());
    is_send(locks.insert_lock("a").acquire());
    is_send(locks.insert_lock("a").try_acquire());
    is_send(locks.row_lock("a").acquire());
    is_send(locks.row_lock("a").try_acquire());
    is_send(locks.row_lock("a").acquire_in(transaction));
    is_send(locks.row_lock("a").try_acquire_in(transaction));
    is_send(lease.lost());
    is_send(lease.release());
    is_send(guard.commit());
    is_send(locks.scope(async {}));
}

/// Closures that borrow from outside and from the lease, spawned.
async fn run_can_be_spawned() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}?mode=rwc", folder.path().join("test.db").display());
    let locks = Locks::new(sqlx::SqlitePool::connect(&url).await.unwrap());
    locks.migrate().await.unwrap();
    let task = tokio::spawn(async move {
        let word = String::from("borrowed");
        let word = &word;
        locks
            .insert_lock("a")
            .ttl(Duration::from_secs(5))
            .run(async |lease| {
                tokio::task::yield_now().await;
                Ok::<_, Error>(format!("{} {word}", lease.name()))
            })
            .await
    });
    assert_eq!(task.await.unwrap().unwrap(), "a borrowed");
}

/// A database for one test, and what keeps it.
async fn own_locks() -> (Locks<Sqlite>, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}?mode=rwc", folder.path().join("test.db").display());
    let locks = Locks::new(sqlx::SqlitePool::connect(&url).await.unwrap());
    locks.migrate().await.unwrap();
    (locks, folder)
}

// ----------------------------------------------------- what annotated functions cost their callers

/// An address in the stack frame of a function that was called here.
#[inline(never)]
fn place_on_stack() -> usize {
    let here = 0_u8;
    std::hint::black_box(std::ptr::from_ref(&here)).addr()
}

const DEPTH: u32 = 200;

/// How far the stack has grown from the outermost body to this one.
type Stack = Result<usize, Error>;

#[distributed_lock("deep")]
async fn deep(left: u32, outermost: usize) -> Stack {
    let here = place_on_stack();
    let outermost = if outermost == 0 { here } else { outermost };
    if left == 0 {
        return Ok(outermost.abs_diff(here));
    }
    deep(left - 1, outermost).await
}

#[distributed_lock("deep:lease", lease = lease)]
async fn deep_with_lease(left: u32, outermost: usize) -> Stack {
    assert!(lease.is_held());
    let here = place_on_stack();
    let outermost = if outermost == 0 { here } else { outermost };
    if left == 0 {
        return Ok(outermost.abs_diff(here));
    }
    deep_with_lease(left - 1, outermost).await
}

#[distributed_lock("deep:row", mode = row)]
async fn deep_row(left: u32, outermost: usize) -> Stack {
    let here = place_on_stack();
    let outermost = if outermost == 0 { here } else { outermost };
    if left == 0 {
        return Ok(outermost.abs_diff(here));
    }
    deep_row(left - 1, outermost).await
}

/// The thread of a test has 2 MiB, and so has a worker of tokio. The main thread of Windows has 1
/// MiB. Recursion over a tree, or layers of services that each take their lock, must fit into that,
/// also without optimization.
fn nested_calls_need_little_stack() {
    let most = if cfg!(debug_assertions) { 4096 } else { 2048 };
    let on_thread = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (locks, _folder) = own_locks().await;
            let calls =
                async { (deep(DEPTH, 0).await, deep_with_lease(DEPTH, 0).await, deep_row(DEPTH, 0).await) };
            let (insert, lease, row) = locks.scope(calls).await;
            for (form, stack) in [("insert", insert), ("lease", lease), ("row", row)] {
                let a_level = stack.unwrap() / DEPTH as usize;
                assert!(a_level <= most, "{form}: {a_level} bytes of stack a level, {most} at most");
            }
            locks.close().await;
        });
    };
    // Room to report a failure instead of an overflow.
    std::thread::Builder::new().stack_size(64 << 20).spawn(on_thread).unwrap().join().unwrap();
}

#[distributed_lock("one", lease = one)]
#[distributed_lock("two", skip)]
async fn two_locks(sizes: [u64; 64]) -> Result<(), Error> {
    tokio::task::yield_now().await;
    assert_eq!((one.hold_count(), sizes.len()), (1, 64));
    Ok(())
}

/// A future is copied into the one that awaits it, and so on outwards. So that of an annotated
/// function has room for its arguments and its output, and little else. Its body and its lock are
/// boxed.
fn futures_of_annotated_functions_are_small() {
    let output = size_of::<Result<usize, Error>>();
    let size = size_of_val(&deep(1, 0));
    assert!(size <= output + 128, "{size} bytes, {output} of them what it returns");
    let size = size_of_val(&deep_with_lease(1, 0));
    assert!(size <= output + 128, "{size} bytes, {output} of them what it returns");
    let size = size_of_val(&deep_row(1, 0));
    assert!(size <= output + 128, "{size} bytes, {output} of them what it returns");
    let arguments = size_of::<[u64; 64]>();
    let size = size_of_val(&two_locks([0; 64]));
    assert!(size <= 2 * arguments + output + 128, "{size} bytes, {arguments} of them the arguments");
}

// ----------------------------------------------------------------------------- `let _ = acquire()`

/// Counts the warnings of one thread.
#[derive(Clone, Default)]
struct Told(std::sync::Arc<std::sync::Mutex<Vec<String>>>);

impl tracing::field::Visit for Told {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        self.0.lock().unwrap().push(format!("{field}={value:?}"));
    }
}

impl tracing::Subscriber for Told {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        *metadata.level() <= tracing::Level::INFO
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, event: &tracing::Event<'_>) {
        event.record(&mut self.clone());
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

impl Told {
    fn of_dropped_guards(&self) -> usize {
        self.0.lock().unwrap().iter().filter(|text| text.contains("`let _lease = …`")).count()
    }

    fn name(&self, lock: &str) -> bool {
        self.0.lock().unwrap().contains(&format!("lock={lock}"))
    }
}

/// The compiler does not warn by default: see `tests/ui/underscores.rs`.
async fn a_guard_that_is_dropped_at_once_is_warned_of() {
    let (locks, _folder) = own_locks().await;
    let told = Told::default();
    let _subscribed = tracing::subscriber::set_default(told.clone());

    // Guards that are used, released, or lent to a body.
    for _ in 0..20 {
        locks.insert_lock("used").acquire().await.unwrap().release().await.unwrap();
        let lease = locks.insert_lock("used").acquire().await.unwrap();
        assert!(lease.is_held());
        let _ = lease.reenter().unwrap();
        drop(lease);
        let mut guard = locks.row_lock("used:row").acquire().await.unwrap();
        sqlx::query("SELECT 1").execute(&mut *guard).await.unwrap();
        drop(guard);
        locks.row_lock("used:row").acquire().await.unwrap().commit().await.unwrap();
        locks.insert_lock("used").run(async |_| Ok::<_, Error>(())).await.unwrap();
        locks
            .scope(async { (deep(0, 0).await, deep_with_lease(0, 0).await, deep_row(0, 0).await) })
            .await
            .0
            .unwrap();
    }
    assert_eq!(told.of_dropped_guards(), 0, "{:?}", told.0);

    // Each may be missed when this thread is interrupted at that moment.
    for name in ["lease", "tried", "several", "row"] {
        for _ in 0..1000 {
            match name {
                "lease" => {
                    let _ = locks.insert_lock(name).acquire().await.unwrap();
                }
                "tried" => {
                    let _ = locks.insert_lock(name).try_acquire().await.unwrap();
                }
                "several" => {
                    let _ = locks.insert_locks([name, "the other one"]).acquire().await.unwrap();
                }
                _ => {
                    let _ = locks.row_lock(name).acquire().await.unwrap();
                }
            }
            if told.name(name) || !cfg!(debug_assertions) {
                break;
            }
            // Free again; otherwise a try gets nothing.
            if name == "tried" {
                locks.insert_lock(name).acquire().await.unwrap().release().await.unwrap();
            }
        }
        assert_eq!(told.name(name), cfg!(debug_assertions), "{name}: {:?}", told.0);
    }
    locks.close().await;
}

fn main() -> std::process::ExitCode {
    lock_tests::run([cases()], [])
}
