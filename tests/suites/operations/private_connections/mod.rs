//! lock-db's private connections behave like those of the application's pool: with its current
//! options, its hooks and its lifetimes. If a network drops idle connections, that costs a second.

mod hooks;
mod logs;

use std::time::{Duration, Instant};

use lock_db::{Error, Locks};
use lock_tests::{Backend, Direction, PostgresServer, Proxy, TestDatabase, TestServer, eventually};
use sqlx::pool::PoolOptions;
use sqlx::{Connection, Pool};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

lock_tests::cases! {
    on every server:
    a_call_on_a_connection_dropped_while_idle_succeeds,
    many_calls_on_a_connection_dropped_while_idle_succeed,
    renewals_on_connections_dropped_while_idle_succeed,
    a_distant_server_is_not_taken_for_silent,
    connections_use_the_current_options_of_the_pool,
    options_that_lead_to_another_database_are_refused,
    connections_are_replaced_at_the_end_of_their_lifetime,
    a_waiter_is_served_after_the_end_of_a_lifetime,
    idle_connections_are_closed,
    a_closed_pool_costs_nothing,
    statements_are_kept_prepared_whatever_the_pool_does;

    in modules: on_connections_of_the_application, hooks, logs
}

/// For what must happen, however slow the machine is.
const PATIENCE: Duration = Duration::from_secs(30);
const LONG_TTL: Duration = Duration::from_mins(10);
/// The cost of a silent server. A connection that was dropped costs about one second.
const SILENCE: Duration = Duration::from_secs(5);

type Options<T> = <<<T as TestDatabase>::Database as sqlx::Database>::Connection as Connection>::Options;

fn options<T: TestServer>(database: &T, proxy: &Proxy) -> Options<T> {
    options_of::<T>(&database.url_by(proxy.address()))
}

fn options_of<T: TestServer>(url: &str) -> Options<T> {
    let options: Result<Options<T>, sqlx::Error> = url.parse();
    options.unwrap()
}

/// A pool that opens no connections by itself, so that those of lock-db can be counted.
fn pool_by<T: TestServer>(
    database: &T,
    proxy: &Proxy,
    set: impl FnOnce(PoolOptions<T::Database>) -> PoolOptions<T::Database>,
) -> Pool<T::Database> {
    let lazy = PoolOptions::new().max_connections(4).acquire_timeout(PATIENCE);
    set(lazy).connect_lazy_with(options(database, proxy))
}

async fn locks_by<T: TestServer>(database: &T, proxy: &Proxy) -> Locks<T::Database> {
    drop(database.locks().await);
    let locks = Locks::new(pool_by(database, proxy, |options| options));
    locks.check().await.unwrap();
    locks
}

// ----------------------------------------------------------------------------------------- silence

/// A call on a connection that was dropped succeeds on another one.
async fn a_call_on_a_connection_dropped_while_idle_succeeds<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let locks = locks_by(database, &proxy).await;
    proxy.strand();
    let lease = locks.insert_lock("a").ttl(LONG_TTL).try_acquire().await.unwrap().expect("it is free");
    proxy.strand();
    lease.release().await.unwrap();
    proxy.strand();
    // Within the wait, and the second that a silent server gets.
    let lease = locks.insert_lock("a").wait(Duration::from_secs(3)).acquire().await.unwrap();
    proxy.strand();
    assert!(locks.info("a").await.unwrap().is_some());
    lease.release().await.unwrap();
    proxy.strand();
    let several = locks.insert_locks(["a", "b"]).wait(SILENCE).acquire().await.unwrap();
    several.release().await.unwrap();
    proxy.strand();
    locks.check().await.unwrap();
    proxy.strand();
    let migrating = timeout(PATIENCE, locks.migrate());
    migrating.await.expect("it hears of the silence").unwrap();
}

async fn many_calls_on_a_connection_dropped_while_idle_succeed<T: TestServer>(database: &T) {
    const CALLERS: u32 = 10;
    let proxy = database.proxy();
    let locks = locks_by(database, &proxy).await;
    let before = proxy.opened();
    proxy.strand();
    let mut calling = JoinSet::new();
    for number in 0..CALLERS {
        calling.spawn(locks.insert_lock(format!("order:{number}")).wait(Duration::from_secs(4)).acquire());
    }
    for granted in calling.join_all().await {
        granted.unwrap().release().await.unwrap();
    }
    // One for all of them, and one for renewals.
    assert!(proxy.opened() - before <= 2, "{} connections", proxy.opened() - before);
}

async fn renewals_on_connections_dropped_while_idle_succeed<T: TestServer>(database: &T) {
    const TTL: Duration = Duration::from_secs(6);
    let proxy = database.proxy();
    let locks = locks_by(database, &proxy).await;
    let lease = locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
    for _ in 0..4 {
        sleep(TTL / 3).await;
        proxy.strand();
    }
    assert_eq!(lease.loss(), None);
    let others = database.locks().await;
    assert!(others.insert_lock("a").try_acquire().await.unwrap().is_none());
    proxy.strand();
    lease.release().await.unwrap();
}

async fn a_distant_server_is_not_taken_for_silent<T: TestServer>(database: &T) {
    let proxy = database.proxy();
    let locks = locks_by(database, &proxy).await;
    for direction in [Direction::ToServer, Direction::ToClient] {
        proxy.delay(direction, Duration::from_millis(100));
    }
    // A third of the TTL is enough to open a connection.
    let lease = locks.insert_lock("held").ttl(Duration::from_secs(15)).acquire().await.unwrap();
    let each = async || {
        locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
        assert!(locks.info("a").await.unwrap().is_some());
        sleep(Duration::from_secs(3)).await;
    };
    each().await;
    let before = proxy.opened();
    for _ in 0..3 {
        each().await;
    }
    lease.release().await.unwrap();
    // The one for renewals, and a read beside it, because that takes long.
    assert!(proxy.opened() <= before + 2, "{} connections", proxy.opened() - before);
}

// ------------------------------------------------------------------------------ options of the day

/// As after a rotation: options set on the pool apply to its next connection, and to ours.
async fn connections_use_the_current_options_of_the_pool<T: TestServer>(database: &T) {
    const TTL: Duration = Duration::from_secs(6);
    drop(database.locks().await);
    let (before, after) = (database.proxy(), database.proxy());
    let pool = pool_by(database, &before, |options| options);
    let locks = Locks::new(pool.clone());
    let lease = locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
    pool.set_connect_options(options(database, &after));
    before.refuse();
    before.cut();
    locks.insert_lock("b").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    sleep(TTL).await;
    assert!(lease.is_held());
    lease.release().await.unwrap();
    assert!(after.opened() > 0);
}

/// There the table is a different one, with the same lock names of other processes.
async fn options_that_lead_to_another_database_are_refused<T: TestServer>(database: &T) {
    drop(database.locks().await);
    let pool = database.pool(2).await;
    let locks = Locks::new(pool.clone());
    let lease = locks.insert_lock("a").ttl(LONG_TTL).acquire().await.unwrap();
    let name = if T::NAME == "postgres" { "SELECT current_database()" } else { "SELECT DATABASE()" };
    let name = database.text(name).await;
    let other = database.url().replace(&name, if T::NAME == "postgres" { "postgres" } else { "mysql" });
    pool.set_connect_options(options_of::<T>(&other));
    // Existing connections continue to work.
    locks.insert_lock("b").try_acquire().await.unwrap().unwrap().release().await.unwrap();
    database.end_connections().await;
    let error = locks.insert_lock("b").wait(PATIENCE).acquire().await.unwrap_err();
    assert!(error.to_string().contains("make a new `Locks`") && !error.is_retryable(), "{error}");
    pool.set_connect_options(options_of::<T>(database.url()));
    lease.release().await.unwrap();
}

// --------------------------------------------------------------------------------------- lifetimes

async fn connections_are_replaced_at_the_end_of_their_lifetime<T: TestServer>(database: &T) {
    const LIFETIME: Duration = Duration::from_secs(1);
    drop(database.locks().await);
    let proxy = database.proxy();
    let locks = Locks::new(pool_by(database, &proxy, |options| options.max_lifetime(LIFETIME)));
    let lease = locks.insert_lock("held").ttl(Duration::from_secs(3)).acquire().await.unwrap();
    let mut most = 0;
    // With a connection worker that is never idle, and one that is idle most of the time.
    eventually(PATIENCE, async || {
        locks.insert_lock("a").try_acquire().await.unwrap().unwrap().release().await.unwrap();
        most = most.max(proxy.open());
        proxy.opened() >= 10
    })
    .await;
    assert!(lease.is_held());
    assert!(most <= 4, "{most} connections at a time");
    lease.release().await.unwrap();
    eventually(PATIENCE, async || proxy.open() <= 2).await;
}

async fn a_waiter_is_served_after_the_end_of_a_lifetime<T: TestServer>(database: &T) {
    const LIFETIME: Duration = Duration::from_secs(1);
    let others = database.locks().await;
    let proxy = database.proxy();
    let locks = Locks::new(pool_by(database, &proxy, |options| options.max_lifetime(LIFETIME)));
    let held = others.insert_lock("a").ttl(LONG_TTL).acquire().await.unwrap();
    let waiting = tokio::spawn(locks.insert_lock("a").wait(PATIENCE).acquire());
    eventually(PATIENCE, async || proxy.opened() >= 8).await;
    held.release().await.unwrap();
    waiting.await.unwrap().unwrap().release().await.unwrap();
}

async fn idle_connections_are_closed<T: TestServer>(database: &T) {
    drop(database.locks().await);
    let proxy = database.proxy();
    let idle = Duration::from_millis(300);
    let locks = Locks::new(pool_by(database, &proxy, |options| options.idle_timeout(idle)));
    for _ in 0..2 {
        let lease = locks.insert_lock("a").ttl(LONG_TTL).acquire().await.unwrap();
        assert!(proxy.open() > 0);
        eventually(PATIENCE, async || proxy.open() == 0).await;
        lease.release().await.unwrap();
        eventually(PATIENCE, async || proxy.open() == 0).await;
    }
}

async fn a_closed_pool_costs_nothing<T: TestServer>(database: &T) {
    const TTL: Duration = Duration::from_secs(3);
    drop(database.locks().await);
    let pool = database.pool(2).await;
    let locks = Locks::new(pool.clone());
    let lease = locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
    pool.close().await;
    database.end_connections().await;
    sleep(TTL * 3 / 2).await;
    assert!(lease.is_held());
    locks.insert_lock("b").try_acquire().await.unwrap().unwrap().release().await.unwrap();
    timeout(PATIENCE, locks.close()).await.unwrap();
    let others = database.locks().await;
    others.insert_lock("a").try_acquire().await.unwrap().expect("it was released").release().await.unwrap();
}

// -------------------------------------------------------------------------------------- statements

/// With `statement-cache-capacity=0` sqlx prepares each statement anew each time, and on PostgreSQL
/// leaves it on the server.
async fn statements_are_kept_prepared_whatever_the_pool_does<T: TestServer>(database: &T) {
    const PAIRS: usize = 50;
    drop(database.locks().await);
    let messages = async |capacity: &str| {
        let proxy = database.proxy();
        let url = database.url_by(proxy.address());
        let joint = if url.contains('?') { '&' } else { '?' };
        let options = options_of::<T>(&format!("{url}{joint}statement-cache-capacity={capacity}"));
        let locks = Locks::new(PoolOptions::<T::Database>::new().connect_lazy_with(options));
        let pair = async || {
            let lease = locks.insert_lock("a").ttl(LONG_TTL).acquire().await.unwrap();
            lease.release().await.unwrap();
        };
        pair().await;
        let before = proxy.reads(Direction::ToServer);
        for _ in 0..PAIRS {
            pair().await;
        }
        proxy.reads(Direction::ToServer) - before
    };
    let (kept, not_kept) = (messages("100").await, messages("0").await);
    assert!(not_kept < kept + PAIRS / 2, "{not_kept} messages, and {kept} where the pool keeps them");
}

/// Row locks and guarded transactions use the application's connections.
mod on_connections_of_the_application {
    use super::*;

    lock_tests::cases! {
        on postgres:
        statements_are_not_left_where_the_pool_keeps_none,
        statements_are_kept_prepared_where_the_pool_keeps_them,
    }

    /// How many statements are prepared on the connection of the pool after some locks, and after
    /// twice as many.
    async fn prepared(database: &PostgresServer, capacity: &str) -> [i64; 2] {
        drop(database.locks().await);
        let url = format!("{}?{capacity}", database.url());
        let pool = PoolOptions::<sqlx::Postgres>::new().max_connections(1).connect_lazy(&url).unwrap();
        let locks = Locks::new(pool.clone());
        let mut counts = [0; 2];
        for count in &mut counts {
            for _ in 0..5 {
                let mut transaction = pool.begin().await.unwrap();
                locks.row_lock("row").acquire_in(&mut transaction).await.unwrap();
                locks.insert_lock("lease").acquire_in(&mut transaction).await.unwrap();
                transaction.commit().await.unwrap();
                locks.row_lock("own").acquire().await.unwrap().commit().await.unwrap();
                let lease = locks.insert_lock("guarded").acquire().await.unwrap();
                lease.begin().await.unwrap().commit().await.unwrap();
                let mut transaction = pool.begin().await.unwrap();
                lease.verify_in(&mut transaction).await.unwrap();
                transaction.commit().await.unwrap();
                lease.release().await.unwrap();
            }
            let mut connection = pool.acquire().await.unwrap();
            let found =
                sqlx::Postgres::find_number(&mut connection, "SELECT count(*) FROM pg_prepared_statements");
            *count = found.await.unwrap().unwrap();
        }
        counts
    }

    async fn statements_are_not_left_where_the_pool_keeps_none(database: &PostgresServer) {
        let [before, after] = prepared(database, "statement-cache-capacity=0").await;
        assert_eq!(before, after);
    }

    async fn statements_are_kept_prepared_where_the_pool_keeps_them(database: &PostgresServer) {
        let [before, after] = prepared(database, "statement-cache-capacity=100").await;
        assert!(before > 0);
        assert_eq!(before, after);
    }
}
