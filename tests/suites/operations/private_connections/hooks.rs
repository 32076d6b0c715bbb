//! The pool's `after_connect` hook is run for private connections, too: whatever it does costs one attempt to connect.

use std::future::pending;
use std::sync::mpsc;
use std::sync::{Arc, Mutex};

use super::*;

lock_tests::cases! {
    on every server:
    a_hook_that_panics_once_costs_nothing,
    a_hook_that_fails_once_costs_nothing,
    a_hook_that_panics_is_named,
    a_hook_that_fails_is_named,
    a_hook_that_hangs_is_named,
    a_hook_that_blocks_is_named,
    a_hook_that_blocks_forever_keeps_few_threads,
    a_hook_may_block_in_place,
    a_hook_may_take_long,
    a_hook_that_blocks_does_not_keep_a_session_from_ending,
    a_lease_outlives_a_hook_that_panics_at_each_renewal,
}

/// What the hook does with its next connections.
#[derive(Clone, Default)]
enum Act {
    #[default]
    Nothing,
    Panic,
    Fail,
    Hang,
    /// Until the other end is gone.
    Block(Arc<Mutex<mpsc::Receiver<()>>>),
    BlockInPlace,
    Sleep(Duration),
}

#[derive(Clone, Default)]
struct Hook {
    /// Each is done once; the last one for ever.
    acts: Arc<Mutex<Vec<Act>>>,
    calls: Arc<Mutex<u32>>,
}

impl Hook {
    fn does(&self, acts: impl IntoIterator<Item = Act>) {
        *self.acts.lock().unwrap() = acts.into_iter().collect();
    }

    fn calls(&self) -> u32 {
        *self.calls.lock().unwrap()
    }

    fn next(&self) -> Act {
        *self.calls.lock().unwrap() += 1;
        let mut acts = self.acts.lock().unwrap();
        if acts.len() > 1 { acts.remove(0) } else { acts.first().cloned().unwrap_or_default() }
    }

    async fn run(&self) -> sqlx::Result<()> {
        match self.next() {
            Act::Nothing => {}
            Act::Panic => panic!("the hook's own words"),
            Act::Fail => return Err(sqlx::Error::RowNotFound),
            Act::Hang => pending().await,
            Act::Block(until) => drop(until.lock().unwrap().recv()),
            Act::BlockInPlace => tokio::task::block_in_place(|| ()),
            Act::Sleep(time) => sleep(time).await,
        }
        Ok(())
    }
}

fn blocks() -> (mpsc::Sender<()>, Act) {
    let (ends, until) = mpsc::channel();
    (ends, Act::Block(Arc::new(Mutex::new(until))))
}

async fn hooked<T: TestServer>(database: &T) -> (Locks<T::Database>, Hook) {
    drop(database.locks().await);
    let hook = Hook::default();
    let runs = hook.clone();
    let options = PoolOptions::new().max_connections(2).after_connect(move |_, _| {
        let hook = runs.clone();
        Box::pin(async move { hook.run().await })
    });
    let locks = Locks::new(options.connect_lazy(database.url()).unwrap());
    (locks, hook)
}

async fn once<T: TestServer>(database: &T, act: Act) {
    const TTL: Duration = Duration::from_secs(3);
    let (locks, hook) = hooked(database).await;
    let lease = locks.insert_lock("held").ttl(TTL).acquire().await.unwrap();
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    hook.does([act, Act::Nothing]);
    database.end_connections().await;
    locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    sleep(TTL * 3 / 2).await;
    assert!(lease.is_held());
    lease.release().await.unwrap();
    assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_some());
}

async fn a_hook_that_panics_once_costs_nothing<T: TestServer>(database: &T) {
    once(database, Act::Panic).await;
}

async fn a_hook_that_fails_once_costs_nothing<T: TestServer>(database: &T) {
    once(database, Act::Fail).await;
}

/// At once, to whoever waits, and again the next time; until the hook does well.
async fn named<T: TestServer>(database: &T, act: Act, words: &str) {
    const WAIT: Duration = Duration::from_mins(1);
    let (locks, hook) = hooked(database).await;
    hook.does([act]);
    let soon = async |call: &mut (dyn Future<Output = String> + Unpin)| {
        let error = timeout(PATIENCE, call).await.expect("it is told at once");
        assert!(error.contains(words), "{error}");
    };
    for _ in 0..2 {
        let acquire = async { locks.insert_lock("a").wait(WAIT).acquire().await.unwrap_err().to_string() };
        soon(&mut Box::pin(acquire)).await;
        let try_acquire = async { locks.insert_lock("a").try_acquire().await.unwrap_err().to_string() };
        soon(&mut Box::pin(try_acquire)).await;
        soon(&mut Box::pin(async { locks.info("a").await.unwrap_err().to_string() })).await;
        soon(&mut Box::pin(async { locks.check().await.unwrap_err().to_string() })).await;
        soon(&mut Box::pin(async { locks.migrate().await.unwrap_err().to_string() })).await;
    }
    let error = locks.info("a").await.unwrap_err();
    assert!(
        matches!(error, Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. })
            && error.is_retryable(),
        "{error:?}"
    );
    // Few attempts, whatever the wait; sqlx itself tries again after an error, for five seconds.
    let most = if words.contains("panicked") { 3 * 11 } else { 3 * 11 * 20 };
    assert!(hook.calls() <= most, "{} calls", hook.calls());
    hook.does([Act::Nothing]);
    assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_some());
}

async fn a_hook_that_panics_is_named<T: TestServer>(database: &T) {
    named(database, Act::Panic, "the pool's 'after_connect' hook panicked: the hook's own words").await;
}

async fn a_hook_that_fails_is_named<T: TestServer>(database: &T) {
    named(database, Act::Fail, "has returned errors").await;
}

/// One that does not come back can be told from a silent server after a second, and the wait is over then.
async fn named_when_the_wait_is_over<T: TestServer>(locks: &Locks<T::Database>) {
    let words = "the pool's 'after_connect' hook has not returned for";
    let started = Instant::now();
    let error = locks.insert_lock("a").wait(Duration::from_secs(1)).acquire().await.unwrap_err();
    assert!(started.elapsed() < SILENCE, "{:?}", started.elapsed());
    assert!(error.to_string().contains(words), "{error}");
    let error = timeout(PATIENCE, locks.info("a")).await.unwrap().unwrap_err();
    assert!(error.to_string().contains(words), "{error}");
    let error = timeout(PATIENCE, locks.migrate()).await.unwrap().unwrap_err();
    assert!(error.to_string().contains(words), "{error}");
}

async fn a_hook_that_hangs_is_named<T: TestServer>(database: &T) {
    let (locks, hook) = hooked(database).await;
    hook.does([Act::Hang]);
    named_when_the_wait_is_over::<T>(&locks).await;
    hook.does([Act::Nothing]);
    assert!(locks.insert_lock("a").wait(PATIENCE).acquire().await.is_ok());
}

async fn a_hook_that_blocks_is_named<T: TestServer>(database: &T) {
    let (locks, hook) = hooked(database).await;
    let (ends, act) = blocks();
    hook.does([act]);
    named_when_the_wait_is_over::<T>(&locks).await;
    hook.does([Act::Nothing]);
    drop(ends);
    assert!(locks.insert_lock("a").wait(PATIENCE).acquire().await.is_ok());
}

/// One that blocks once and for ever is left behind, and the next attempt goes on.
async fn a_hook_that_blocks_forever_keeps_few_threads<T: TestServer>(database: &T) {
    let (locks, hook) = hooked(database).await;
    let (ends, act) = blocks();
    hook.does([act, Act::Nothing]);
    assert!(locks.insert_lock("a").wait(Duration::from_millis(1)).acquire().await.is_err());
    locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    // Each further time.
    let (others_end, act) = blocks();
    hook.does([act]);
    database.end_connections().await;
    let before = hook.calls();
    let error = locks.insert_lock("a").wait(4 * SILENCE).acquire().await.unwrap_err();
    assert!(error.to_string().contains("has not returned for"), "{error}");
    assert!(hook.calls() - before <= 2, "{} more calls", hook.calls() - before);
    let open = database.activity().await.connections;
    assert!(open <= 6, "{open} connections");
    hook.does([Act::Nothing]);
    drop((ends, others_end));
    locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    eventually(PATIENCE, async || database.activity().await.connections <= 2).await;
}

async fn a_hook_may_block_in_place<T: TestServer>(database: &T) {
    let (locks, hook) = hooked(database).await;
    hook.does([Act::BlockInPlace]);
    locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
}

async fn a_hook_may_take_long<T: TestServer>(database: &T) {
    let (locks, hook) = hooked(database).await;
    hook.does([Act::Sleep(Duration::from_secs(3))]);
    locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
}

async fn a_hook_that_blocks_does_not_keep_a_session_from_ending<T: TestServer>(database: &T) {
    let (locks, hook) = hooked(database).await;
    let lease = locks.insert_lock("a").ttl(LONG_TTL).acquire().await.unwrap();
    let (ends, act) = blocks();
    hook.does([act]);
    timeout(PATIENCE, locks.close()).await.unwrap();
    drop(lease);
    drop(ends);
}

/// The connection for renewals can't be made; the other one can.
async fn a_lease_outlives_a_hook_that_panics_at_each_renewal<T: TestServer>(database: &T) {
    const TTL: Duration = Duration::from_secs(3);
    let (locks, hook) = hooked(database).await;
    hook.does([Act::Nothing, Act::Panic]);
    let lease = locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
    sleep(2 * TTL).await;
    assert!(lease.is_held());
    assert!(hook.calls() > 1);
    lease.release().await.unwrap();
}
