//! A host that vanishes: nothing that it sends arrives any more, and nobody is told.

use std::time::Duration;

use lock_db::{Error, Lease, Locks};
use lock_tests::{
    Backend, Direction, PostgresServer, Proxy, TestDatabase, TestServer, connection, eventually,
};
use sqlx::pool::PoolOptions;
use sqlx::{Connection, Pool, Postgres};

lock_tests::cases! {
    on every server:
    a_holder_that_vanishes_before_its_commit,
    a_holder_that_vanishes_after_its_commit,
    a_holder_that_vanishes_while_others_wait;

    on postgres:
    a_holder_that_vanishes_after_verify_in,
    a_holder_that_vanishes_after_release_in,
    the_idle_timeout_of_a_guarded_transaction_is_reset,
    a_transaction_that_was_idle_for_too_long_is_reported,
}

/// Far less than what the servers take by their own defaults to notice a host that is gone.
const PATIENCE: Duration = Duration::from_secs(20);
const TTL: Duration = Duration::from_millis(1500);

/// A host, behind a proxy.
struct Host<T: TestServer> {
    proxy: Proxy,
    pool: Pool<T::Database>,
    locks: Locks<T::Database>,
}

impl<T: TestServer> Host<T> {
    fn new(database: &T) -> Self {
        let proxy = database.proxy();
        let options = PoolOptions::new().max_connections(3).acquire_timeout(PATIENCE);
        let pool = options.connect_lazy(&database.url_by(proxy.address())).unwrap();
        Self { locks: Locks::new(pool.clone()), proxy, pool }
    }

    async fn lease(&self) -> Lease<T::Database> {
        self.locks.insert_lock("a").ttl(TTL).wait(PATIENCE).acquire().await.unwrap()
    }

    /// Nothing is closed.
    fn vanish(&self) {
        self.proxy.swallow();
        self.proxy.pause(Direction::ToServer);
        self.proxy.pause(Direction::ToClient);
    }
}

async fn write<DB: Backend>(connection: &mut DB::Connection) {
    DB::run(connection, "INSERT INTO work VALUES (1)").await.unwrap();
}

async fn next_one_gets_it<T: TestDatabase>(locks: &Locks<T::Database>, what: &str) {
    let next = locks.insert_lock("a").wait(PATIENCE).acquire().await;
    next.unwrap_or_else(|error| panic!("{what}: {error}")).release().await.unwrap();
}

/// What it has written is not committed, and the lock is free.
async fn a_holder_that_vanishes_before_its_commit<T: TestServer>(database: &T) {
    database.run("CREATE TABLE work (n INT)").await;
    let near = database.locks().await;
    for commits in [false, true] {
        let host = Host::new(database);
        let lease = host.lease().await;
        let mut transaction = lease.begin().await.unwrap();
        write::<T::Database>(&mut transaction).await;
        host.vanish();
        // The answer is that it is gone, or none.
        let _ending = commits.then(|| tokio::spawn(transaction.commit()));
        next_one_gets_it::<T>(&near, &format!("commits: {commits}")).await;
        assert!(!lease.is_held());
        assert_eq!(database.number("SELECT COUNT(*) FROM work").await, 0);
    }
}

/// The server has carried the commit out, and its answer is lost.
async fn a_holder_that_vanishes_after_its_commit<T: TestServer>(database: &T) {
    database.run("CREATE TABLE work (n INT)").await;
    let near = database.locks().await;
    for releases in [false, true] {
        let before = database.number("SELECT COUNT(*) FROM work").await;
        let host = Host::new(database);
        let lease = host.lease().await;
        let mut transaction = lease.begin().await.unwrap();
        write::<T::Database>(&mut transaction).await;
        host.proxy.pause(Direction::ToClient);
        let ending = async move {
            match releases {
                true => lease.commit_and_release(transaction).await,
                false => transaction.commit().await,
            }
        };
        let ending = tokio::spawn(ending);
        eventually(PATIENCE, async || database.number("SELECT COUNT(*) FROM work").await > before).await;
        host.vanish();
        next_one_gets_it::<T>(&near, &format!("releases: {releases}")).await;
        ending.abort();
    }
}

/// The same for those that wait while it vanishes.
async fn a_holder_that_vanishes_while_others_wait<T: TestServer>(database: &T) {
    database.run("CREATE TABLE work (n INT)").await;
    let near = database.locks().await;
    let host = Host::new(database);
    let lease = host.lease().await;
    let waiting = tokio::spawn(near.insert_lock("a").wait(PATIENCE).acquire());
    let mut transaction = lease.begin().await.unwrap();
    write::<T::Database>(&mut transaction).await;
    host.vanish();
    let _ending = tokio::spawn(transaction.commit());
    waiting.await.unwrap().unwrap().release().await.unwrap();
    assert_eq!(database.number("SELECT COUNT(*) FROM work").await, 0);
}

// --------------------------------------------------------------------- PostgreSQL: the caller's transaction

/// The server ends a transaction that stays open after `verify_in` or `release_in`.
async fn in_a_transaction_that_stays_open(database: &PostgresServer, releases: bool) {
    database.run("CREATE TABLE work (n INT)").await;
    let near = database.locks().await;
    let host = Host::new(database);
    let lease = host.lease().await;
    let mut transaction = host.pool.begin().await.unwrap();
    write::<Postgres>(&mut transaction).await;
    match releases {
        true => lease.release_in(&mut transaction).await.unwrap(),
        false => lease.verify_in(&mut transaction).await.unwrap(),
    }
    host.vanish();
    next_one_gets_it::<PostgresServer>(&near, &format!("releases: {releases}")).await;
    assert_eq!(database.number("SELECT COUNT(*) FROM work").await, 0);
}

async fn a_holder_that_vanishes_after_verify_in(database: &PostgresServer) {
    in_a_transaction_that_stays_open(database, false).await;
}

async fn a_holder_that_vanishes_after_release_in(database: &PostgresServer) {
    in_a_transaction_that_stays_open(database, true).await;
}

async fn limit(connection: &mut sqlx::PgConnection) -> i64 {
    let sql = "SELECT setting::BIGINT FROM pg_settings WHERE name = 'idle_in_transaction_session_timeout'";
    Postgres::find_number(connection, sql).await.unwrap().unwrap()
}

/// For that transaction alone, and a shorter one stays.
async fn the_idle_timeout_of_a_guarded_transaction_is_reset(database: &PostgresServer) {
    let locks = database.locks().await;
    let lease = locks.insert_lock("a").ttl(Duration::from_secs(20)).acquire().await.unwrap();
    let mut connection = connection::<Postgres>(database.url()).await;
    for (own, expected) in [("0", 20_000), ("5s", 5000), ("1h", 20_000)] {
        Postgres::run(&mut connection, &format!("SET idle_in_transaction_session_timeout = '{own}'"))
            .await
            .unwrap();
        let before = limit(&mut connection).await;
        for ends in ["commit", "rollback"] {
            let mut transaction = connection.begin().await.unwrap();
            lease.verify_in(&mut transaction).await.unwrap();
            let now = limit(&mut transaction).await;
            assert!((1..=expected).contains(&now), "{now} where {own} was set");
            match ends {
                "commit" => transaction.commit().await.unwrap(),
                _ => transaction.rollback().await.unwrap(),
            }
            assert_eq!(limit(&mut connection).await, before, "after a {ends}");
        }
    }
    lease.release().await.unwrap();
}

/// The holder hears of it at its commit.
async fn a_transaction_that_was_idle_for_too_long_is_reported(database: &PostgresServer) {
    database.run("CREATE TABLE work (n INT)").await;
    let (locks, near, pool) = (database.locks().await, database.locks().await, database.pool(2).await);
    let lease = locks.insert_lock("a").ttl(Duration::from_millis(500)).acquire().await.unwrap();
    let mut transaction = pool.begin().await.unwrap();
    write::<Postgres>(&mut transaction).await;
    lease.verify_in(&mut transaction).await.unwrap();
    let open = async || database.activity().await.transactions;
    eventually(PATIENCE, async || open().await == 0).await;
    assert!(transaction.commit().await.is_err());
    assert_eq!(database.number("SELECT COUNT(*) FROM work").await, 0);
    // The lease goes on: it was the transaction that had to end.
    match lease.release().await {
        Ok(()) | Err(Error::Lost { .. }) => next_one_gets_it::<PostgresServer>(&near, "after it").await,
        Err(error) => panic!("{error}"),
    }
}
