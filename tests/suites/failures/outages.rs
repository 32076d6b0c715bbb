//! A database that is down, connections that die, answers that get lost, and applications that
//! starve or block themselves: what happens to leases and callers, and how long it takes.

use std::time::{Duration, Instant};

use lock_db::{Error, Lease, Locks};
use lock_tests::{Backend, Direction, Proxy, TestDatabase, TestServer, eventually};
use sqlx::pool::PoolOptions;
use sqlx::{Connection, Pool};
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until, timeout};

lock_tests::cases! {
    on every server:
    leases_outlive_connections_that_are_ended,
    a_holder_learns_soon_that_a_failover_lost_its_grant,
    leases_during_an_outage,
    callers_during_an_outage,
    requests_in_a_silent_network_end,
    a_release_of_a_locked_row_ends_and_is_completed_later,
    an_acquire_whose_answer_is_lost_is_granted_once,
    a_release_whose_answer_is_lost_is_done_once,
    a_caller_that_gives_up_before_the_answer_leaves_nothing,
    a_starved_pool_costs_no_lease,
    a_blocked_runtime_costs_no_lease (current_thread),
    a_thousand_leases_are_renewed_by_few_statements,
}

/// For what must happen, however slow the machine is.
const PATIENCE: Duration = Duration::from_secs(20);
/// How late an event with a bound may be.
const MARGIN: Duration = Duration::from_millis(1500);
const LONG_TTL: Duration = Duration::from_mins(10);

/// An application that reaches its database through a proxy.
struct Far<T: TestServer> {
    proxy: Proxy,
    pool: Pool<T::Database>,
    locks: Locks<T::Database>,
}

impl<T: TestServer> Far<T> {
    /// Opens all connections first: how they are opened is not part of the test.
    async fn new(database: &T) -> Self {
        let proxy = database.proxy();
        let pool = PoolOptions::new()
            .max_connections(2)
            .acquire_timeout(PATIENCE)
            // So that the pool does not detect a dead connection.
            .test_before_acquire(false)
            .connect_lazy(&database.url_by(proxy.address()))
            .unwrap();
        let locks = Locks::new(pool.clone());
        locks.check().await.unwrap();
        Self { proxy, pool, locks }
    }

    async fn lease(&self, name: &str, ttl: Duration) -> Lease<T::Database> {
        self.locks.insert_lock(name).ttl(ttl).acquire().await.unwrap()
    }

    /// So that all statements for the name are prepared: the first use of a name has one of its own.
    async fn prepare(&self, name: &str) {
        for _ in 0..2 {
            self.lease(name, LONG_TTL).await.release().await.unwrap();
        }
    }
}

/// The ways in which a database can be away.
#[derive(Debug, Clone, Copy)]
enum Outage {
    /// Connections are reset, and new ones are refused: the server is down.
    Refused,
    /// Connections are reset, and new ones are not answered: the host is down.
    Swallowed,
    /// Nothing that is sent arrives, and new connections are not answered: the network is down.
    Silent,
}

impl Outage {
    fn begin(self, proxy: &Proxy) {
        match self {
            Self::Refused => proxy.refuse(),
            Self::Swallowed => proxy.swallow(),
            Self::Silent => {
                proxy.swallow();
                proxy.pause(Direction::ToServer);
                proxy.pause(Direction::ToClient);
                return;
            }
        }
        proxy.cut();
    }

    fn end(proxy: &Proxy) {
        proxy.admit();
        proxy.resume(Direction::ToServer);
        proxy.resume(Direction::ToClient);
    }
}

/// Runs a scenario with each kind of outage, all at the same time.
async fn in_each_outage(scenario: impl AsyncFn(Outage)) {
    tokio::join!(scenario(Outage::Refused), scenario(Outage::Swallowed), scenario(Outage::Silent));
}

// ------------------------------------------------------------------------------------------ leases

async fn leases_outlive_connections_that_are_ended<T: TestServer>(database: &T) {
    const TTL: Duration = Duration::from_secs(1);
    let locks = database.locks().await;
    let mut leases = Vec::new();
    for name in ["a", "b", "c"] {
        leases.push(locks.insert_lock(name).ttl(TTL).acquire().await.unwrap());
    }
    let end = Instant::now() + 2 * TTL;
    while Instant::now() < end {
        database.end_connections().await;
        sleep(TTL / 4).await;
    }
    let other = Locks::new(database.pool(1).await);
    for lease in leases {
        assert!(lease.is_held(), "{} was lost", lease.name());
        assert!(other.insert_lock(lease.name()).try_acquire().await.unwrap().is_none());
        lease.release().await.unwrap();
    }
}

/// The server behind the connections is replaced by one that does not know the lease. Here the row
/// is set back to its state before the grant.
async fn a_holder_learns_soon_that_a_failover_lost_its_grant<T: TestServer>(database: &T) {
    const TTL: Duration = Duration::from_mins(2);
    drop(database.locks().await);
    let connections = async || database.activity().await.connections;
    eventually(PATIENCE, async || connections().await == 0).await;
    let locks = Locks::new(database.pool(1).await);
    let lease = locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
    let hears = T::NAME == "postgres";
    if hears {
        // The pool's connection and both private ones, long before the first renewal.
        eventually(TTL / 6, async || connections().await == 3).await;
    }
    let forget =
        "UPDATE distributed_lock SET secret_key = '', expire_time = '1970-01-01 00:00:00', ttl_micros = 0";
    database.run(forget).await;
    database.end_connections().await;
    if !hears {
        // The next statement finds it out.
        locks.insert_lock("b").acquire().await.unwrap().release().await.unwrap();
    }
    timeout(TTL / 6, lease.lost()).await.expect("leases are renewed as soon as a connection is lost");
}

async fn leases_during_an_outage<T: TestServer>(database: &T) {
    let near = database.locks().await;
    tokio::join!(
        in_each_outage(async |outage| a_long_outage_ends_a_lease_on_time(database, &near, outage).await),
        in_each_outage(async |outage| a_short_outage_costs_no_lease(database, &near, outage).await),
    );
}

async fn a_long_outage_ends_a_lease_on_time<T: TestServer>(
    database: &T,
    near: &Locks<T::Database>,
    outage: Outage,
) {
    const TTL: Duration = Duration::from_secs(3);
    let far = Far::new(database).await;
    let name = format!("long {outage:?}");
    let lease = far.lease(&name, TTL).await;
    assert!(lease.is_held());
    outage.begin(&far.proxy);
    // Before the database can give the lease to another holder, and so without asking the database.
    timeout(TTL, lease.lost()).await.expect("the lease outlives its TTL");
    assert!(!lease.is_held());
    assert!(lease.reenter().is_err());

    let next = near.insert_lock(&name).ttl(LONG_TTL).wait(TTL + MARGIN).acquire().await.unwrap();
    assert!(next.fencing_token() > lease.fencing_token());
    let released = timeout(Duration::from_secs(5) + MARGIN, lease.release()).await;
    assert!(matches!(released, Ok(Err(Error::Lost { .. }))), "{outage:?}: {released:?}");
    Outage::end(&far.proxy);
    // A message that is still on its way now has no effect.
    let taken = far.locks.insert_lock(&name).wait(Duration::ZERO).acquire().await;
    assert!(
        matches!(
            taken,
            Err(Error::Timeout { .. }
                | Error::Database { .. }
                | Error::Unreachable { .. }
                | Error::Refused { .. })
        ),
        "{outage:?}: {taken:?}"
    );
    next.release().await.unwrap();
}

async fn a_short_outage_costs_no_lease<T: TestServer>(
    database: &T,
    near: &Locks<T::Database>,
    outage: Outage,
) {
    const TTL: Duration = Duration::from_secs(3);
    let far = Far::new(database).await;
    let name = format!("short {outage:?}");
    let lease = far.lease(&name, TTL).await;
    let taken = tokio::time::Instant::now();
    // Around the first renewal.
    sleep_until(taken + TTL / 3 - TTL / 8).await;
    outage.begin(&far.proxy);
    sleep_until(taken + TTL / 3 + TTL / 8).await;
    Outage::end(&far.proxy);
    sleep_until(taken + TTL * 5 / 4).await;
    assert!(lease.is_held(), "{outage:?}");
    assert!(near.insert_lock(&name).try_acquire().await.unwrap().is_none());
    lease.release().await.unwrap();
}

// ----------------------------------------------------------------------------------------- callers

async fn callers_during_an_outage<T: TestServer>(database: &T) {
    let near = database.locks().await;
    tokio::join!(
        in_each_outage(async |outage| an_acquire_gives_up_in_time(database, &near, outage).await),
        in_each_outage(async |outage| an_acquire_waits_for_the_database(database, outage).await),
    );
}

async fn an_acquire_gives_up_in_time<T: TestServer>(database: &T, near: &Locks<T::Database>, outage: Outage) {
    const WAIT: Duration = Duration::from_secs(1);
    const GRACE: Duration = Duration::from_secs(1);
    let far = Far::new(database).await;
    let name = format!("in time {outage:?}");
    outage.begin(&far.proxy);
    let started = Instant::now();
    let acquired = far.locks.insert_lock(&name).ttl(LONG_TTL).wait(WAIT).acquire().await;
    assert!(started.elapsed() < WAIT + GRACE + MARGIN, "{outage:?}: {:?}", started.elapsed());
    assert!(started.elapsed() >= WAIT, "{outage:?}: {:?}", started.elapsed());
    assert!(
        matches!(
            acquired,
            Err(Error::Timeout { .. }
                | Error::Database { .. }
                | Error::Unreachable { .. }
                | Error::Refused { .. })
        ),
        "{acquired:?}"
    );
    assert!(acquired.unwrap_err().is_retryable());
    Outage::end(&far.proxy);
    near.insert_lock(&name).wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
}

async fn an_acquire_waits_for_the_database<T: TestServer>(database: &T, outage: Outage) {
    let far = Far::new(database).await;
    let name = format!("comes back {outage:?}");
    outage.begin(&far.proxy);
    let acquiring = tokio::spawn(far.locks.insert_lock(&name).wait(PATIENCE).acquire());
    sleep(Duration::from_millis(700)).await;
    assert!(!acquiring.is_finished(), "{outage:?}");
    Outage::end(&far.proxy);
    // A connection that was begun in the outage is given up after five seconds.
    let lease = timeout(Duration::from_secs(5) + MARGIN, acquiring).await.expect("it is back").unwrap();
    lease.unwrap().release().await.unwrap();
}

/// Every request to a network that has gone silent ends.
async fn requests_in_a_silent_network_end<T: TestServer>(database: &T) {
    drop(database.locks().await);
    tokio::join!(closing_in_silence(database), releasing_in_silence(database), asking_in_silence(database));
}

async fn closing_in_silence<T: TestServer>(database: &T) {
    let far = Far::new(database).await;
    let leases = [
        far.lease("closing 1", LONG_TTL).await,
        far.lease("closing 2", LONG_TTL).await,
        far.lease("closing 3", LONG_TTL).await,
    ];
    Outage::Silent.begin(&far.proxy);
    timeout(Duration::from_secs(10) + MARGIN, far.locks.close()).await.expect("close returns");
    for lease in leases {
        assert!(!lease.is_held(), "{} is held after close", lease.name());
        timeout(MARGIN, lease.lost()).await.expect("it is told");
    }
}

async fn releasing_in_silence<T: TestServer>(database: &T) {
    let far = Far::new(database).await;
    let mut leases = Vec::new();
    for number in 0..3 {
        leases.push(far.lease(&format!("releasing {number}"), LONG_TTL).await);
    }
    Outage::Silent.begin(&far.proxy);
    let started = Instant::now();
    let mut releasing: JoinSet<_> = leases.into_iter().map(Lease::release).collect();
    while let Some(released) = releasing.join_next().await {
        let released = released.unwrap();
        assert!(
            matches!(
                released,
                Err(Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. })
            ),
            "{released:?}"
        );
        assert!(started.elapsed() < Duration::from_secs(5) + MARGIN, "{:?}", started.elapsed());
    }
}

async fn asking_in_silence<T: TestServer>(database: &T) {
    const WAIT: Duration = Duration::from_secs(1);
    /// For requests without a wait of their own.
    const LIMIT: Duration = Duration::from_secs(5);
    let far = Far::new(database).await;
    far.locks.row_lock("row").acquire().await.unwrap().rollback().await.unwrap();
    let mut transaction = far.pool.begin().await.unwrap();
    let trying = Far::new(database).await;
    trying.locks.row_lock("row").acquire().await.unwrap().rollback().await.unwrap();
    for far in [&far, &trying] {
        Outage::Silent.begin(&far.proxy);
    }
    let started = Instant::now();
    let is_over = |what: &str, limit: Duration| {
        assert!(started.elapsed() < limit + MARGIN, "{what} took {:?}", started.elapsed());
    };
    tokio::join!(
        async {
            let taken = far.locks.row_lock("row").wait(WAIT).acquire().await;
            assert!(
                matches!(
                    taken,
                    Err(Error::Timeout { .. }
                        | Error::Database { .. }
                        | Error::Unreachable { .. }
                        | Error::Refused { .. })
                ),
                "{taken:?}"
            );
            is_over("a row lock", WAIT + Duration::from_secs(2));
        },
        async {
            let taken = far.locks.row_lock("row").wait(WAIT).acquire_in(&mut transaction).await;
            assert!(
                matches!(
                    taken,
                    Err(Error::Timeout { .. }
                        | Error::Database { .. }
                        | Error::Unreachable { .. }
                        | Error::Refused { .. })
                ),
                "{taken:?}"
            );
            is_over("a row lock in a transaction", WAIT + Duration::from_secs(5));
        },
        async {
            // Five seconds for the pool, and five for the server.
            let taken = timeout(4 * LIMIT, trying.locks.row_lock("row").try_acquire()).await;
            assert!(!matches!(taken, Ok(Ok(_))), "{taken:?}");
            is_over("trying a row lock", 2 * LIMIT);
        },
        async {
            let taken = timeout(2 * LIMIT, trying.locks.insert_lock("lease").try_acquire()).await;
            assert!(!matches!(taken, Ok(Ok(_))), "{taken:?}");
            is_over("trying a lease", LIMIT);
        },
        async {
            let found = timeout(2 * LIMIT, far.locks.info("lease")).await;
            assert!(!matches!(found, Ok(Ok(_))), "{found:?}");
            is_over("looking", LIMIT);
        },
    );
}

/// The server answers all the time, but another transaction has locked the row and keeps it.
async fn a_release_of_a_locked_row_ends_and_is_completed_later<T: TestServer>(database: &T) {
    let (locks, other) = (database.locks().await, database.locks().await);
    let lease = locks.insert_lock("a").ttl(LONG_TTL).acquire().await.unwrap();
    let mut connection = database.connection().await;
    let mut transaction = connection.begin().await.unwrap();
    let lock = "SELECT id FROM distributed_lock WHERE lock_name = 'a' FOR UPDATE";
    T::Database::find_number(&mut transaction, lock).await.unwrap();

    let released = timeout(Duration::from_secs(5) + MARGIN, lease.release()).await.expect("it has a bound");
    // Not `Lost`: no other process has it.
    assert!(
        matches!(
            released,
            Err(Error::Timeout { .. }
                | Error::Database { .. }
                | Error::Unreachable { .. }
                | Error::Refused { .. })
        ),
        "{released:?}"
    );
    transaction.rollback().await.unwrap();
    let next = other.insert_lock("a").wait(MARGIN).acquire().await;
    next.expect("it was released as soon as it could be").release().await.unwrap();
}

// ------------------------------------------------------------------------------------ lost answers

async fn token<T: TestDatabase>(database: &T) -> i64 {
    database.number("SELECT fencing_token FROM distributed_lock WHERE lock_name = 'a'").await
}

async fn an_acquire_whose_answer_is_lost_is_granted_once<T: TestServer>(database: &T) {
    let near = database.locks().await;
    let far = Far::new(database).await;
    far.prepare("a").await;
    let before = token(database).await;

    far.proxy.pause(Direction::ToClient);
    let acquiring = tokio::spawn(far.locks.insert_lock("a").ttl(LONG_TTL).wait(PATIENCE).acquire());
    // The server has granted it, but the answer has not arrived.
    eventually(PATIENCE, async || token(database).await > before).await;
    let granted = token(database).await;
    eventually(PATIENCE, async || far.proxy.held(Direction::ToClient) > 0).await;
    far.proxy.cut();
    far.proxy.resume(Direction::ToClient);

    let lease = acquiring.await.unwrap().unwrap();
    assert_eq!(lease.fencing_token(), granted, "the same grant");
    assert_eq!(token(database).await, granted);
    assert!(near.insert_lock("a").try_acquire().await.unwrap().is_none());
    lease.release().await.unwrap();
    assert!(near.insert_lock("a").try_acquire().await.unwrap().is_some());
}

async fn a_release_whose_answer_is_lost_is_done_once<T: TestServer>(database: &T) {
    let near = database.locks().await;
    let far = Far::new(database).await;
    // All statements are prepared.
    far.prepare("a").await;
    let lease = far.lease("a", LONG_TTL).await;
    far.proxy.pause(Direction::ToClient);
    let releasing = tokio::spawn(lease.release());
    // The lease is released. No locked row makes the release ask again. Because the answer is lost
    // it asks again nevertheless, and by then another holder has the lease.
    let free =
        "SELECT COUNT(*) FROM distributed_lock WHERE lock_name = 'a' AND expire_time < '2001-01-01 00:00:00'";
    eventually(PATIENCE, async || database.number(free).await == 1).await;
    let next = near.insert_lock("a").ttl(LONG_TTL).wait(PATIENCE).acquire().await.unwrap();
    far.proxy.cut();
    far.proxy.resume(Direction::ToClient);
    releasing.await.unwrap().expect("it was ours until we released it");
    next.release().await.expect("it touched nobody else");
}

async fn a_caller_that_gives_up_before_the_answer_leaves_nothing<T: TestServer>(database: &T) {
    let near = database.locks().await;
    let far = Far::new(database).await;
    for is_dropped in [true, false] {
        far.prepare("a").await;
        let before = token(database).await;
        far.proxy.pause(Direction::ToClient);
        let lock = far.locks.insert_lock("a").ttl(LONG_TTL).wait(Duration::from_millis(100));
        let acquiring = tokio::spawn(lock.acquire());
        eventually(PATIENCE, async || token(database).await > before).await;
        if is_dropped {
            acquiring.abort();
        } else {
            let acquired = acquiring.await.unwrap();
            assert!(
                matches!(
                    acquired,
                    Err(Error::Timeout { .. }
                        | Error::Database { .. }
                        | Error::Unreachable { .. }
                        | Error::Refused { .. })
                ),
                "{acquired:?}"
            );
        }
        far.proxy.cut();
        far.proxy.resume(Direction::ToClient);
        near.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    }
}

// ------------------------------------------------------------------- applications in their own way

async fn a_starved_pool_costs_no_lease<T: TestServer>(database: &T) {
    const TTL: Duration = Duration::from_secs(1);
    let pool = database.pool(2).await;
    let locks = lock_tests::migrated(Locks::new(pool.clone())).await;
    let other = Locks::new(database.pool(1).await);
    let lease = locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
    let taken = [pool.acquire().await.unwrap(), pool.acquire().await.unwrap()];
    assert!(pool.try_acquire().is_none());

    let error = other.insert_lock("a").wait(2 * TTL).acquire().await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    assert!(lease.is_held());
    lease.release().await.unwrap();
    let next = locks.insert_lock("a").acquire().await.unwrap();
    drop(next);
    other.insert_lock("a").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    drop(taken);
}

/// The application's only thread only sleeps and spins, so none of its futures can be polled.
async fn a_blocked_runtime_costs_no_lease<T: TestServer>(database: &T) {
    const TTL: Duration = Duration::from_secs(2);
    let locks = database.locks().await;
    let other = Locks::new(database.pool(1).await);
    other.check().await.unwrap();
    let held = locks
        .insert_lock("a")
        .ttl(TTL)
        .run(async |lease| {
            std::thread::sleep(2 * TTL);
            let end = Instant::now() + TTL / 4;
            while Instant::now() < end {
                std::hint::spin_loop();
            }
            assert!(other.insert_lock("a").try_acquire().await?.is_none());
            Ok::<_, Error>(lease.is_held())
        })
        .await;
    assert!(held.expect("it was held to the end"));
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
}

async fn a_thousand_leases_are_renewed_by_few_statements<T: TestServer>(database: &T) {
    const LEASES: usize = 1000;
    const TOGETHER: usize = 50;
    const TTL: Duration = Duration::from_secs(6);
    drop(database.locks().await);
    // Their rows exist, as on any but the first day.
    let rows: Vec<String> = (0..LEASES).map(|number| format!("('{number}', 'insert')")).collect();
    database
        .run(&format!("INSERT INTO distributed_lock (lock_name, lock_kind) VALUES {}", rows.join(", ")))
        .await;
    let far = Far::new(database).await;
    let mut acquiring = JoinSet::new();
    for first in (0..LEASES).step_by(TOGETHER) {
        let names = (first..first + TOGETHER).map(|number| number.to_string());
        acquiring.spawn(far.locks.insert_locks(names).ttl(TTL).wait(PATIENCE).acquire());
    }
    let leases: Vec<_> = acquiring.join_all().await.into_iter().map(Result::unwrap).collect();
    let all_taken = tokio::time::Instant::now();

    let before = far.proxy.reads(Direction::ToServer);
    sleep_until(all_taken + TTL / 3).await;
    let sent = far.proxy.reads(Direction::ToServer) - before;
    assert!((1..50).contains(&sent), "{LEASES} leases are renewed with {sent} messages");
    // Until the last one of them has been renewed at least once.
    sleep_until(all_taken + TTL).await;
    let held = leases.iter().flat_map(|leases| leases.iter()).filter(|lease| lease.is_held()).count();
    assert_eq!(held, LEASES);
    assert!(far.proxy.open() <= 2, "{} connections", far.proxy.open());
    far.locks.close().await;
    assert_eq!(
        database.number("SELECT count(*) FROM distributed_lock WHERE expire_time > '1970-01-02'").await,
        0,
        "close has released them"
    );
}
