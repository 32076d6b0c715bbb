//! A server that is reachable and does not answer: its table is locked, its standby is gone, its
//! processes are stopped, or the network carries nothing one way. What a process then gives up, the
//! server gives up as well, and nothing is granted late.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use lock_db::{Error, Lease, Locks};
use lock_tests::{
    Backend, Direction, MariaDbKind, MySqlKind, OwnServer, PostgresKind, Server, ServerKind, TestDatabase,
    TestServer, eventually, migrated,
};
use sqlx::Pool;
use sqlx::pool::PoolOptions;
use tokio::runtime::Builder;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

lock_tests::cases! {
    on every server:
    while_the_table_is_locked,
    while_answers_are_lost,
    while_requests_are_delayed,
    a_late_request_grants_nothing,
    a_late_renewal_revives_no_lost_lease;

    without a database:
    while_the_server_is_stopped_on_postgres,
    while_the_server_is_stopped_on_mariadb,
    while_the_server_is_stopped_on_mysql,
    while_the_standby_is_gone_on_postgres,
    while_the_replica_is_gone_on_mariadb,
    while_the_replica_is_gone_on_mysql,
}

/// For what must happen, however slow the machine is.
const PATIENCE: Duration = Duration::from_mins(1);
/// More than twice as long as an answer is waited for.
const STALL: Duration = Duration::from_secs(11);
/// How late an event with a bound may be.
const MARGIN: Duration = Duration::from_millis(1500);
/// How soon after a stall everything works again. A connection that was begun in the stall may be
/// waited for as long as that.
const SOON: Duration = Duration::from_secs(8);
/// Of leases that have no holder after the stall, and of those whose holder lives.
const LONG_TTL: Duration = Duration::from_mins(10);
const KEPT_TTL: Duration = Duration::from_mins(1);
/// Of a lease that is lost in the stall, and must not be renewed after its end.
const LOST_TTL: Duration = Duration::from_secs(10);

/// The connections of the pool, and those of the `Locks` itself.
const POOL: u32 = 2;
const OWN: usize = 2;
/// While one replaces another, or is asked why there is none.
const FOR_A_MOMENT: usize = 2 * OWN;

/// A service that takes and releases locks all the time, in all ways.
struct Service<DB: Backend> {
    locks: Locks<DB>,
    ends: Arc<AtomicBool>,
    work: JoinSet<()>,
}

impl<DB: Backend> Service<DB> {
    async fn start(url: &str) -> Self {
        let options = PoolOptions::new().max_connections(POOL).acquire_timeout(Duration::from_secs(2));
        let pool: Pool<DB> = options.connect_lazy(url).unwrap();
        let locks = migrated(Locks::new(pool.clone())).await;
        let ends = Arc::new(AtomicBool::new(false));
        let mut work = JoinSet::new();
        for number in 0..3 {
            work.spawn(take_leases(locks.clone(), format!("lease {number}"), Arc::clone(&ends)));
            work.spawn(take_rows(locks.clone(), pool.clone(), format!("row {number}"), Arc::clone(&ends)));
        }
        Self { locks, ends, work }
    }

    async fn lease(&self, name: &str, ttl: Duration) -> Lease<DB> {
        self.locks.insert_lock(name).ttl(ttl).wait(PATIENCE).acquire().await.unwrap()
    }
}

/// Errors don't matter here, but a failed request must leave nothing behind.
async fn take_leases<DB: Backend>(locks: Locks<DB>, name: String, ends: Arc<AtomicBool>) {
    while !ends.load(Ordering::SeqCst) {
        drop(locks.insert_lock(&name).ttl(LONG_TTL).wait(Duration::from_secs(1)).acquire().await);
        sleep(Duration::from_millis(10)).await;
    }
}

async fn take_rows<DB: Backend>(locks: Locks<DB>, pool: Pool<DB>, name: String, ends: Arc<AtomicBool>) {
    while !ends.load(Ordering::SeqCst) {
        if let Ok(row) = locks.row_lock(&name).wait(Duration::from_secs(1)).acquire().await {
            drop(row.commit().await);
        }
        if let Ok(mut transaction) = pool.begin().await {
            drop(locks.row_lock(&name).wait(Duration::from_secs(1)).acquire_in(&mut transaction).await);
        }
        sleep(Duration::from_millis(10)).await;
    }
}

/// A working service, which reaches its database by `url`, goes through a stall.
async fn goes_through<T: TestServer>(
    database: &T,
    url: &str,
    can_be_asked: bool,
    begin: impl AsyncFnOnce(),
    end: impl AsyncFnOnce(),
) {
    let pool = database.pool(1).await;
    let near = migrated(Locks::new(pool)).await;
    let before = database.activity().await.connections;
    let mut service = Service::<T::Database>::start(url).await;
    let kept = service.lease("kept", KEPT_TTL).await;
    let lost = service.lease("lost", LOST_TTL).await;
    let (released, dropped) =
        (service.lease("released", LONG_TTL).await, service.lease("dropped", LONG_TTL).await);

    begin().await;
    let started = Instant::now();
    drop(dropped);
    let releasing = tokio::spawn(async move {
        let released = timeout(Duration::from_secs(5) + MARGIN, released.release()).await;
        released.expect("a release is answered in time")
    });
    let lost = tokio::spawn(async move {
        lost.lost().await;
        drop(lost);
    });
    let most = POOL as usize + OWN + FOR_A_MOMENT;
    while started.elapsed() < STALL {
        if can_be_asked {
            let sessions = database.activity().await.connections.saturating_sub(before);
            assert!(sessions <= most, "{sessions} sessions after {:?}", started.elapsed());
        }
        sleep(Duration::from_millis(100)).await;
    }
    // The error is that of the database, or there is none: where a release waits for nothing, it
    // may be in time.
    let answer = releasing.await.unwrap();
    assert!(
        matches!(
            answer,
            Ok(()) | Err(Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. })
        ),
        "{answer:?}"
    );
    lost.await.unwrap();
    service.ends.store(true, Ordering::SeqCst);
    end().await;

    for name in ["released", "dropped", "lost", "lease 0", "lease 1", "lease 2"] {
        let taken = near.insert_lock(name).wait(SOON).acquire().await;
        drop(taken.unwrap_or_else(|error| panic!("nobody has it: {error}")));
    }
    for name in ["row 0", "row 1", "row 2"] {
        let taken = near.row_lock(name).wait(SOON).acquire().await;
        drop(taken.unwrap_or_else(|error| panic!("nobody has it: {error}")));
    }
    assert!(kept.is_held(), "a lease with a long TTL is lost");
    assert!(near.insert_lock("kept").try_acquire().await.unwrap().is_none());
    let all_end = timeout(PATIENCE, async { while service.work.join_next().await.is_some() {} }).await;
    assert!(all_end.is_ok(), "a lock is waited for without an end");
    // The `Locks` of `near` has two of its own as well.
    let allowed = before + 2 * OWN + POOL as usize;
    eventually(PATIENCE, async || database.activity().await.connections <= allowed).await;
    kept.release().await.unwrap();
}

async fn while_the_table_is_locked<T: TestServer>(database: &T) {
    let (lock, unlock) = match T::NAME {
        "postgres" => ("BEGIN; LOCK TABLE distributed_lock IN ACCESS EXCLUSIVE MODE", "COMMIT"),
        _ => ("LOCK TABLES distributed_lock WRITE", "UNLOCK TABLES"),
    };
    let other = Mutex::new(database.connection().await);
    let run = async |sql: &str| {
        T::Database::run(&mut *other.lock().await, sql).await.unwrap();
    };
    goes_through(database, database.url(), true, async || run(lock).await, async || run(unlock).await).await;
}

/// The server receives everything, including that a connection was given up.
async fn while_answers_are_lost<T: TestServer>(database: &T) {
    silent(database, Direction::ToClient).await;
}

/// Messages arrive when the network is back, on connections that were given up long ago.
async fn while_requests_are_delayed<T: TestServer>(database: &T) {
    silent(database, Direction::ToServer).await;
}

async fn silent<T: TestServer>(database: &T, direction: Direction) {
    let proxy = database.proxy();
    let url = database.url_by(proxy.address());
    goes_through(database, &url, true, async || proxy.pause(direction), async || proxy.resume(direction))
        .await;
}

/// A service behind a router that forgets connections.
async fn far<T: TestServer>(url: &str) -> Locks<T::Database> {
    let pool = PoolOptions::new().max_connections(1).acquire_timeout(PATIENCE).connect_lazy(url).unwrap();
    let locks = Locks::new(pool);
    locks.check().await.unwrap();
    locks
}

/// A request for a lease whose caller is gone, on a connection that was given up. It is not carried
/// out when the outage is over.
async fn a_late_request_grants_nothing<T: TestServer>(database: &T) {
    let near = database.locks().await;
    near.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    let proxy = database.proxy();
    let far = far::<T>(&database.url_by(proxy.address())).await;
    far.insert_lock("a").acquire().await.unwrap().release().await.unwrap();

    proxy.strand();
    // If the next connection granted it, the lease is dropped immediately.
    drop(far.insert_lock("a").ttl(LONG_TTL).wait(Duration::from_millis(1)).acquire().await);
    // Another request, on the next connection.
    far.insert_lock("b").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    let allowed = 4;
    eventually(PATIENCE, async || database.activity().await.connections <= allowed).await;
    proxy.rescue();
    near.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    // Time in which the late request could be carried out.
    sleep(Duration::from_millis(300)).await;
    assert!(near.insert_lock("a").try_acquire().await.unwrap().is_some(), "granted late, and left");
}

/// The renewal of a lease that was lost in the meantime.
async fn a_late_renewal_revives_no_lost_lease<T: TestServer>(database: &T) {
    let near = database.locks().await;
    let proxy = database.proxy();
    let far = far::<T>(&database.url_by(proxy.address())).await;
    // Renewed at a third of its TTL, and lost soon after.
    let lease = far.insert_lock("a").ttl(Duration::from_secs(6)).acquire().await.unwrap();
    let reads = proxy.reads(Direction::ToServer);
    eventually(PATIENCE, async || proxy.reads(Direction::ToServer) > reads).await;
    proxy.swallow();
    proxy.strand();
    lease.lost().await;
    proxy.admit();
    drop(lease);
    far.insert_lock("b").wait(PATIENCE).acquire().await.unwrap().release().await.unwrap();
    proxy.rescue();
    near.insert_lock("a").wait(Duration::from_secs(3)).acquire().await.unwrap().release().await.unwrap();
}

// ---------------------------------------------------------------------------- servers of their own

fn on_own_server<K: ServerKind>(options: &'static str, case: impl AsyncFnOnce(&OwnServer, &Server<K>)) {
    OwnServer::need(K::NAME);
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let server = OwnServer::with_options(K::NAME, options).await;
        server.is_back::<K::Database>().await;
        let database = Server::<K>::create_at(server.url()).await;
        let ended = timeout(Duration::from_mins(3), case(&server, &database)).await;
        ended.expect("the case hangs");
    });
    runtime.shutdown_timeout(Duration::from_secs(5));
}

/// SIGSTOP: connections can be opened, because the operating system does that, and nothing answers.
fn processes_that_stand_still<K: ServerKind>()
where
    Server<K>: TestServer<Database = K::Database>,
{
    on_own_server::<K>("", async |server, database| {
        goes_through(database, database.url(), false, async || server.freeze(), async || server.thaw()).await;
    });
}

/// A commit waits for a standby that is gone, and no limit of the client's session ends the wait.
fn a_standby_that_is_gone<K: ServerKind>(options: &'static str, begin: &[&str], end: &[&str])
where
    Server<K>: TestServer<Database = K::Database>,
{
    on_own_server::<K>(options, async |_, database| {
        let all = async |statements: &[&str]| {
            for sql in statements {
                database.run(sql).await;
            }
        };
        goes_through(database, database.url(), true, async || all(begin).await, async || all(end).await)
            .await;
    });
}

fn while_the_server_is_stopped_on_postgres() {
    processes_that_stand_still::<PostgresKind>();
}

fn while_the_server_is_stopped_on_mariadb() {
    processes_that_stand_still::<MariaDbKind>();
}

fn while_the_server_is_stopped_on_mysql() {
    processes_that_stand_still::<MySqlKind>();
}

fn while_the_standby_is_gone_on_postgres() {
    let reload = "SELECT pg_reload_conf()";
    let begin = ["ALTER SYSTEM SET synchronous_standby_names = 'gone'", reload];
    let end = ["ALTER SYSTEM RESET synchronous_standby_names", reload];
    a_standby_that_is_gone::<PostgresKind>("", &begin, &end);
}

fn while_the_replica_is_gone_on_mariadb() {
    let begin = ["SET GLOBAL rpl_semi_sync_master_timeout = 100000000, rpl_semi_sync_master_enabled = ON"];
    let end = ["SET GLOBAL rpl_semi_sync_master_enabled = OFF"];
    a_standby_that_is_gone::<MariaDbKind>("--log-bin=log --server-id=1", &begin, &end);
}

fn while_the_replica_is_gone_on_mysql() {
    let begin =
        ["SET GLOBAL rpl_semi_sync_source_timeout = 100000000, GLOBAL rpl_semi_sync_source_enabled = ON"];
    let end = ["SET GLOBAL rpl_semi_sync_source_enabled = OFF"];
    let options = "--log-bin=log --server-id=1 --plugin-load-add=semisync_source.so";
    a_standby_that_is_gone::<MySqlKind>(options, &begin, &end);
}
