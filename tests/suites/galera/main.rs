//! A Galera cluster: what certification does where no row lock reaches the other nodes.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use lock_db::{Error, Lease, Locks, Loss};
use lock_tests::{Backend, GaleraCluster, TestDatabase, eventually};
use sqlx::mysql::MySqlDatabaseError;
use sqlx::{Connection, MySql, MySqlConnection, Pool};
use tokio::join;
use tokio::sync::{Mutex, MutexGuard};
use tokio::task::JoinSet;
use tokio::time::sleep;

lock_tests::cases! {
    on galera:
    either_the_takeover_or_the_commit_fails,
    a_takeover_stops_a_commit_on_a_node_that_it_has_not_reached,
    one_node_gets_the_lease,
    one_node_gets_several_leases,
    guarded_increments_are_kept,
    increments_under_a_row_lock_are_kept,
    increments_in_shared_transactions_are_kept,
    of_two_holders_of_a_row_lock_the_first_commits,
    what_follows_a_conflict_is_not_kept,
    a_transaction_begins_where_the_grant_is_seen,
    a_commit_on_a_node_that_was_cut_off_is_unknown,
    all_nodes_may_migrate_at_once,
}

const PATIENCE: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_mins(10);
const TASKS: usize = 6;

/// One case changes the cluster itself, and the others need it at its normal speed.
async fn alone() -> MutexGuard<'static, ()> {
    static CLUSTER: Mutex<()> = Mutex::const_new(());
    CLUSTER.lock().await
}

struct Node {
    url: String,
    pool: Pool<MySql>,
    locks: Locks<MySql>,
}

impl Node {
    async fn new(url: String) -> Self {
        let pool = lock_tests::pool(&url, 8).await;
        let locks = Locks::new(pool.clone());
        Self { url, pool, locks }
    }

    async fn run(&self, sql: &str) -> u64 {
        MySql::run(&mut self.pool.acquire().await.unwrap(), sql).await.unwrap()
    }

    async fn number(&self, sql: &str) -> i64 {
        MySql::find_number(&mut self.pool.acquire().await.unwrap(), sql).await.unwrap().unwrap()
    }

    /// Waits until this node has everything that was committed before, on any node.
    async fn catch_up(&self) {
        self.run("SET SESSION wsrep_sync_wait = 1; SELECT 1; SET SESSION wsrep_sync_wait = 0").await;
    }

    async fn lease(&self, name: &str) -> Lease<MySql> {
        self.locks.insert_lock(name).ttl(LONG).wait(PATIENCE).acquire().await.unwrap()
    }

    /// Its notice is over as well.
    async fn expire(&self, name: &str) {
        let past = format!(
            "UPDATE distributed_lock SET expire_time = '2001-01-01 00:00:00', ttl_micros = 0 WHERE lock_name = '{name}'"
        );
        assert_eq!(self.run(&past).await, 1);
    }

    /// Every connection of the pool can write, and what it writes is kept.
    async fn assert_pool_is_as_it_was(&self) {
        let mut connections = Vec::new();
        for _ in 0..self.pool.size() {
            connections.push(self.pool.acquire().await.unwrap());
        }
        for connection in &mut connections {
            assert!(!connection.is_in_transaction());
            MySql::run(connection, "INSERT INTO scratch VALUES ()").await.unwrap();
            let autocommit = MySql::find_number(connection, "SELECT @@autocommit").await.unwrap();
            assert_eq!(autocommit, Some(1));
        }
    }
}

/// A `Locks` on each node, with the tables created.
async fn nodes(cluster: &GaleraCluster) -> Vec<Node> {
    for sql in [
        "CREATE TABLE counter (id BIGINT PRIMARY KEY, n BIGINT)",
        "INSERT INTO counter VALUES (1, 0)",
        "CREATE TABLE history (token BIGINT PRIMARY KEY)",
        "CREATE TABLE scratch (id BIGINT AUTO_INCREMENT PRIMARY KEY)",
        // Without a key, and all rows equal: the other nodes take half a second to find the row of
        // each change.
        "CREATE TABLE slow (n BIGINT)",
        "INSERT INTO slow SELECT 1 FROM seq_1_to_2500",
    ] {
        cluster.run(sql).await;
    }
    drop(cluster.locks().await);
    let mut nodes = Vec::new();
    for url in cluster.urls() {
        let node = Node::new(url).await;
        node.catch_up().await;
        nodes.push(node);
    }
    assert!(nodes.len() > 1, "that is no cluster");
    nodes
}

/// Two of the nodes, different ones each time.
fn two(nodes: &[Node], round: usize) -> (&Node, &Node) {
    (&nodes[round % nodes.len()], &nodes[(round + 1) % nodes.len()])
}

/// From now on the other nodes are behind this one.
async fn run_ahead(node: &Node) {
    node.run("UPDATE slow SET n = n + 1").await;
}

fn random_delay() -> Duration {
    Duration::from_micros(RandomState::new().hash_one(0) % 2500)
}

/// Why an attempt failed.
#[derive(Debug)]
enum Failed {
    Lock(Error),
    Sql(sqlx::Error),
    /// Found by the control.
    NotOurs,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Lock(error)
    }
}

impl From<sqlx::Error> for Failed {
    fn from(error: sqlx::Error) -> Self {
        Self::Sql(error)
    }
}

impl Failed {
    fn is_conflict(&self) -> bool {
        match self {
            Self::Lock(Error::Lost { reason, .. }) => {
                matches!(reason, Loss::TakenOver | Loss::TransactionEnded)
            }
            Self::Lock(Error::Deadlock { .. } | Error::Serialization { .. }) | Self::NotOurs => true,
            Self::Lock(_) => false,
            Self::Sql(error) => number(error) == Some(1213),
        }
    }
}

fn number(error: &sqlx::Error) -> Option<u16> {
    Some(error.as_database_error()?.try_downcast_ref::<MySqlDatabaseError>()?.number())
}

/// How a transaction is guarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Commit,
    CommitAndRelease,
    VerifyIn,
    ReleaseIn,
    /// The control: what is enough on a server with one primary.
    ShareLock,
}

const WAYS: [Way; 4] = [Way::Commit, Way::CommitAndRelease, Way::VerifyIn, Way::ReleaseIn];

/// Writes in a guarded transaction, and commits it `when` the time has come.
async fn work(
    node: &Node,
    lease: Lease<MySql>,
    way: Way,
    when: impl Future<Output = ()>,
) -> Result<(), Failed> {
    let write = format!("INSERT INTO history VALUES ({})", lease.fencing_token());
    if matches!(way, Way::Commit | Way::CommitAndRelease) {
        let mut transaction = lease.begin().await?;
        MySql::run(&mut transaction, &write).await?;
        when.await;
        match way {
            Way::Commit => transaction.commit().await?,
            _ => lease.commit_and_release(transaction).await?,
        }
        return Ok(());
    }
    let mut transaction = node.pool.begin().await?;
    MySql::run(&mut transaction, &write).await?;
    when.await;
    match way {
        Way::VerifyIn => lease.verify_in(&mut transaction).await?,
        Way::ReleaseIn => lease.release_in(&mut transaction).await?,
        _ => {
            let sql = format!(
                "SELECT COUNT(*) FROM distributed_lock WHERE secret_key = '{}' LOCK IN SHARE MODE",
                lease.secret_key()
            );
            if MySql::find_number(&mut transaction, &sql).await? == Some(0) {
                return Err(Failed::NotOurs);
            }
        }
    }
    transaction.commit().await?;
    Ok(())
}

async fn either_the_takeover_or_the_commit_fails(cluster: &GaleraCluster) {
    let _alone = alone().await;
    let nodes = nodes(cluster).await;
    let (mut committed, mut refused) = (0, 0);
    for round in 0..240 {
        let (one, other) = two(&nodes, round);
        let way = WAYS[round / nodes.len() % WAYS.len()];
        let name = format!("lock {round}");
        let lease = one.lease(&name).await;
        one.expire(&name).await;
        other.catch_up().await;
        let count = format!("SELECT COUNT(*) FROM history WHERE token = {}", lease.fencing_token());

        let holder = work(one, lease, way, sleep(random_delay()));
        let taker = async {
            sleep(random_delay()).await;
            let taken = other.lease(&name).await;
            let mut transaction = taken.begin().await.unwrap();
            let seen = MySql::find_number(&mut transaction, &count).await.unwrap();
            transaction.commit().await.unwrap();
            taken.release().await.unwrap();
            seen
        };
        let (ended, seen) = join!(holder, taker);
        one.catch_up().await;
        let kept = one.number(&count).await;
        // Everything of the holder comes before everything of the taker.
        assert_eq!(seen, Some(kept), "{way:?}: {ended:?}");
        assert_eq!(kept, i64::from(ended.is_ok()), "{way:?}: {ended:?}");
        match ended {
            Ok(()) => committed += 1,
            Err(failed) => {
                assert!(failed.is_conflict(), "{way:?}: {failed:?}");
                refused += 1;
            }
        }
    }
    assert!(committed > 0 && refused > 0, "no race: {committed} committed, {refused} refused");
    for node in &nodes {
        node.assert_pool_is_as_it_was().await;
    }
}

async fn a_takeover_stops_a_commit_on_a_node_that_it_has_not_reached(cluster: &GaleraCluster) {
    let _alone = alone().await;
    let nodes = nodes(cluster).await;
    let mut share_locks_that_failed_to_guard = 0;
    for (round, way) in WAYS.into_iter().chain([Way::ShareLock; 4]).enumerate() {
        let (one, other) = two(&nodes, round);
        let name = format!("lock {round}");
        let lease = one.lease(&name).await;
        let token = lease.fencing_token();
        one.expire(&name).await;
        other.catch_up().await;
        let mut taken = None;
        let takeover = async {
            run_ahead(other).await;
            taken = Some(other.lease(&name).await);
        };
        let ended = work(one, lease, way, takeover).await;
        one.catch_up().await;
        let kept = one.number(&format!("SELECT COUNT(*) FROM history WHERE token = {token}")).await;
        assert_eq!(kept, i64::from(ended.is_ok()), "{way:?}: {ended:?}");
        match ended {
            Ok(()) if way == Way::ShareLock => share_locks_that_failed_to_guard += 1,
            Ok(()) => panic!("{way:?} committed after the takeover"),
            Err(failed) => assert!(failed.is_conflict(), "{way:?}: {failed:?}"),
        }
        taken.unwrap().release().await.unwrap();
    }
    assert!(share_locks_that_failed_to_guard > 0, "this case shows nothing: the nodes were not behind");
}

async fn one_node_gets_the_lease(cluster: &GaleraCluster) {
    let _alone = alone().await;
    let nodes = nodes(cluster).await;
    for round in 0..30 {
        let name = format!("lock {round}");
        // In half of the rounds there is no row yet.
        if round % 2 == 0 {
            nodes[0].lease(&name).await.release().await.unwrap();
            for node in &nodes {
                node.catch_up().await;
            }
        }
        let mut tries = JoinSet::new();
        for node in &nodes {
            tries.spawn(node.locks.insert_lock(&name).ttl(LONG).try_acquire());
        }
        let tries = tries.join_all().await;
        let leases: Vec<_> = tries.into_iter().filter_map(Result::unwrap).collect();
        assert!(leases.len() <= 1, "{leases:?}");
    }

    let inside = Arc::new(AtomicI64::new(0));
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let locks = Locks::new(nodes[task % nodes.len()].pool.clone());
        let inside = Arc::clone(&inside);
        tasks.spawn(async move {
            for _ in 0..15 {
                let lease = locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap();
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                sleep(Duration::from_millis(1)).await;
                assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
                lease.release().await.unwrap();
            }
        });
    }
    tasks.join_all().await;
}

/// All or none, in one message that the server executes step by step.
async fn one_node_gets_several_leases(cluster: &GaleraCluster) {
    let _alone = alone().await;
    let nodes = nodes(cluster).await;
    let (mut granted, mut refused) = (0, 0);
    for round in 0..60 {
        let names = [format!("a {round}"), format!("b {round}")];
        for name in &names {
            nodes[0].lease(name).await.release().await.unwrap();
        }
        for node in &nodes {
            node.catch_up().await;
        }
        let mut tries = JoinSet::new();
        for node in &nodes {
            let request = node.locks.insert_locks(&names).ttl(LONG);
            tries.spawn(async move {
                sleep(random_delay()).await;
                request.try_acquire().await
            });
        }
        let tries = tries.join_all().await;
        refused += tries.iter().filter(|taken| matches!(taken, Ok(None))).count();
        let taken: Vec<_> = tries.into_iter().filter_map(Result::unwrap).collect();
        assert!(taken.len() <= 1, "{taken:?}");
        for leases in taken {
            granted += 1;
            let mut transaction = leases.begin().await.unwrap();
            MySql::run(&mut transaction, &format!("INSERT INTO history VALUES ({round})")).await.unwrap();
            transaction.commit().await.unwrap();
            leases.release().await.unwrap();
        }
    }
    assert!(granted > 0 && refused > 0, "{granted} granted, {refused} refused");
}

/// Reads and writes in two steps, so that two at the same time lose one of the updates.
async fn increment(connection: &mut MySqlConnection) -> sqlx::Result<()> {
    let n = MySql::find_number(connection, "SELECT n FROM counter").await?.unwrap();
    MySql::run(connection, &format!("UPDATE counter SET n = {n} + 1")).await.map(drop)
}

/// Makes many increments on all nodes, each tried until it is committed, and counts them. Returns
/// how many attempts failed.
async fn increments<F>(
    cluster: &GaleraCluster,
    attempt: impl Fn(Locks<MySql>, Pool<MySql>) -> F + Clone + Send + 'static,
) -> usize
where
    F: Future<Output = Result<(), Failed>> + Send,
{
    const EACH: usize = 12;
    let nodes = nodes(cluster).await;
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (pool, attempt) = (nodes[task % nodes.len()].pool.clone(), attempt.clone());
        let locks = Locks::new(pool.clone());
        tasks.spawn(async move {
            let mut failed = 0;
            for _ in 0..EACH {
                while let Err(error) = attempt(locks.clone(), pool.clone()).await {
                    assert!(error.is_conflict(), "{error:?}");
                    failed += 1;
                }
            }
            failed
        });
    }
    let failed = tasks.join_all().await.into_iter().sum();
    for node in &nodes {
        node.catch_up().await;
        assert_eq!(node.number("SELECT n FROM counter").await, (TASKS * EACH) as i64);
        node.assert_pool_is_as_it_was().await;
    }
    failed
}

async fn guarded_increments_are_kept(cluster: &GaleraCluster) {
    let _alone = alone().await;
    let failed = increments(cluster, async |locks: Locks<MySql>, _| {
        let lease = locks.insert_lock("a").wait(PATIENCE).acquire().await?;
        let mut transaction = lease.begin().await?;
        increment(&mut transaction).await?;
        transaction.commit().await?;
        Ok(lease.release().await?)
    });
    // A holder meets no conflicts.
    assert_eq!(failed.await, 0);
}

async fn increments_under_a_row_lock_are_kept(cluster: &GaleraCluster) {
    let _alone = alone().await;
    increments(cluster, async |locks: Locks<MySql>, _| {
        let mut held = locks.row_lock("a").wait(PATIENCE).acquire().await?;
        increment(&mut held).await?;
        Ok(held.commit().await?)
    })
    .await;
}

async fn increments_in_shared_transactions_are_kept(cluster: &GaleraCluster) {
    let _alone = alone().await;
    increments(cluster, async |locks: Locks<MySql>, pool: Pool<MySql>| {
        let mut transaction = pool.begin().await?;
        if RandomState::new().hash_one(0).is_multiple_of(2) {
            // Both locks, in one order.
            locks.insert_lock("b").wait(PATIENCE).acquire_in(&mut transaction).await?;
        }
        locks.row_lock("c").wait(PATIENCE).acquire_in(&mut transaction).await?;
        increment(&mut transaction).await?;
        Ok(transaction.commit().await?)
    })
    .await;
}

async fn of_two_holders_of_a_row_lock_the_first_commits(cluster: &GaleraCluster) {
    let _alone = alone().await;
    let nodes = nodes(cluster).await;
    let (one, other) = two(&nodes, 0);
    one.locks.row_lock("a").acquire().await.unwrap().rollback().await.unwrap();
    other.catch_up().await;
    let mut first = one.locks.row_lock("a").try_acquire().await.unwrap().expect("nobody has it");
    let mut second = other.locks.row_lock("a").try_acquire().await.unwrap().expect("so it seems there");
    MySql::run(&mut first, "INSERT INTO history VALUES (1)").await.unwrap();
    MySql::run(&mut second, "INSERT INTO history VALUES (2)").await.unwrap();
    first.commit().await.unwrap();
    let failed = Failed::from(second.commit().await.unwrap_err());
    assert!(failed.is_conflict(), "{failed:?}");
    other.catch_up().await;
    assert_eq!(other.number("SELECT SUM(token) FROM history").await, 1);
}

/// Usually a transaction gets a conflict at its next statement, whatever that is. A transaction
/// that ignores it is refused.
async fn what_follows_a_conflict_is_not_kept(cluster: &GaleraCluster) {
    let _alone = alone().await;
    async fn work(transaction: &mut MySqlConnection, one: &Node, other: &Node) {
        increment(transaction).await.unwrap();
        other.run("UPDATE counter SET n = n + 100").await;
        one.catch_up().await;
        let error = MySql::run(transaction, "INSERT INTO history VALUES (1)").await.unwrap_err();
        assert_eq!(number(&error), Some(1213), "{error}");
        for token in [2, 3] {
            let _ = MySql::run(transaction, &format!("INSERT INTO history VALUES ({token})")).await;
        }
    }

    let nodes = nodes(cluster).await;
    for round in 0..nodes.len() {
        let (one, other) = two(&nodes, round);
        let lease = one.lease("insert").await;
        let mut guarded = lease.begin().await.unwrap();
        work(&mut guarded, one, other).await;
        let guarded = guarded.commit().await;
        let mut row = one.locks.row_lock("row").wait(PATIENCE).acquire().await.unwrap();
        work(&mut row, one, other).await;
        for ended in [guarded, row.commit().await] {
            let error = ended.unwrap_err();
            assert!(matches!(error, Error::Lost { reason: Loss::TransactionEnded, .. }), "{error:?}");
        }
        assert_eq!(one.number("SELECT COUNT(*) FROM history").await, 0);
        lease.release().await.unwrap();
        one.assert_pool_is_as_it_was().await;
    }
}

/// Behind a load balancer the transaction may be on another node than the lease, and that node lags
/// behind.
async fn a_transaction_begins_where_the_grant_is_seen(cluster: &GaleraCluster) {
    let _alone = alone().await;
    let nodes = nodes(cluster).await;
    let (one, other) = two(&nodes, 0);
    let pool = lock_tests::pool::<MySql>(&one.url, 4).await;
    let locks = Locks::new(pool.clone());
    // Its private connection stays there.
    locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    pool.set_connect_options(other.url.parse().unwrap());
    while let Some(connection) = pool.try_acquire() {
        connection.close().await.unwrap();
    }
    for n in [1, 3, 5] {
        run_ahead(one).await;
        let lease = one.lease("a").await;
        let mut transaction = lease.begin().await.unwrap();
        increment(&mut transaction).await.unwrap();
        transaction.commit().await.unwrap();
        lease.release().await.unwrap();

        let lease = locks.insert_lock("a").wait(PATIENCE).acquire().await.unwrap();
        let mut transaction = lease.begin().await.unwrap();
        assert_eq!(MySql::find_number(&mut transaction, "SELECT n FROM counter").await.unwrap(), Some(n));
        increment(&mut transaction).await.unwrap();
        transaction.commit().await.unwrap();
        lease.release().await.unwrap();
        one.catch_up().await;
    }
}

async fn a_commit_on_a_node_that_was_cut_off_is_unknown(cluster: &GaleraCluster) {
    let _alone = alone().await;
    let nodes = nodes(cluster).await;
    let cut_off = &nodes[nodes.len() - 1];
    let lease = cut_off.lease("a").await;
    let mut transaction = lease.begin().await.unwrap();
    MySql::run(&mut transaction, "INSERT INTO history VALUES (1)").await.unwrap();
    let mut switch = cut_off.pool.acquire().await.unwrap();
    MySql::run(&mut switch, "SET GLOBAL wsrep_provider_options = 'gmcast.isolate=1'").await.unwrap();
    let ended = transaction.commit().await;
    MySql::run(&mut switch, "SET GLOBAL wsrep_provider_options = 'gmcast.isolate=0'").await.unwrap();
    let is_back = "SELECT variable_value = 'Synced' FROM information_schema.global_status
        WHERE variable_name = 'wsrep_local_state_comment'";
    eventually(PATIENCE, async || matches!(MySql::find_number(&mut switch, is_back).await, Ok(Some(1))))
        .await;

    let error = ended.unwrap_err();
    assert!(matches!(error, Error::CommitUnknown { .. }), "{error:?}");
    assert!(!error.is_retryable(), "{error:?}");
    // The node is usable again.
    cut_off.catch_up().await;
    lease.release().await.unwrap();
    let lease = cut_off.lease("a").await;
    let mut transaction = lease.begin().await.unwrap();
    MySql::run(&mut transaction, "INSERT INTO history VALUES (2)").await.unwrap();
    transaction.commit().await.unwrap();
}

async fn all_nodes_may_migrate_at_once(cluster: &GaleraCluster) {
    let _alone = alone().await;
    for _ in 0..5 {
        let mut migrations = JoinSet::new();
        for url in cluster.urls() {
            migrations.spawn(async move {
                let node = Node::new(url).await;
                node.locks.migrate().await
            });
        }
        for migrated in migrations.join_all().await {
            migrated.unwrap();
        }
        assert_eq!(cluster.number("SELECT COUNT(*) FROM _lock_db_migrations").await, 1);
        cluster.run("DROP TABLE distributed_lock, _lock_db_migrations").await;
    }
}

fn main() -> std::process::ExitCode {
    lock_tests::run([cases()], [])
}
