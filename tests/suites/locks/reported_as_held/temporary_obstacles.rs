//! What passes by itself is waited out, and can be asked for again if the wait ends first.

use std::time::Duration;

use lock_db::{Error, Kind, Locks};
use lock_tests::{Backend, Direction, TestServer, connection, eventually};
use sqlx::pool::PoolOptions;
use sqlx::{Connection, Pool};
use tokio::time::sleep;

use super::accounts::with_account;
use super::not_held::{Stall, Stalling};
use super::requests::{Request, Requests, Way, assert_none};

lock_tests::cases! {
    on every server:
    too_many_connections_are_waited_out,
    too_many_connections_are_waited_out_for_row_locks,
    statement_timeouts_are_waited_out,
    statement_timeouts_are_waited_out_for_row_locks,
    cancelled_statements_are_repeated,
    a_server_that_does_not_wait_is_asked_with_pauses,
}

const PATIENCE: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_mins(10);
const SHORT_WAITS: [Duration; 2] = [Duration::ZERO, Duration::from_millis(50)];
const RIGHTS: [&str; 4] = ["SELECT", "INSERT", "UPDATE", "DELETE"];

fn outside_of_transactions(waits: &[Duration]) -> Vec<Request> {
    Request::all(waits).into_iter().filter(|request| !request.way.is_in_transaction()).collect()
}

/// Of this kind alone, because the two kinds of lock wait in different places.
fn of_kind(kind: Kind, waits: &[Duration]) -> Vec<Request> {
    outside_of_transactions(waits).into_iter().filter(|request| request.way.kind() == kind).collect()
}

fn with_a_wait(requests: Vec<Request>) -> Vec<Request> {
    requests.into_iter().filter(|request| request.wait.is_some()).collect()
}

fn pool_of<DB: Backend>(url: &str) -> Pool<DB> {
    PoolOptions::new().max_connections(30).acquire_timeout(PATIENCE).connect_lazy(url).unwrap()
}

fn pool_with<DB: Backend>(url: &str, sql: &'static str) -> Pool<DB> {
    PoolOptions::new()
        .max_connections(30)
        .acquire_timeout(PATIENCE)
        .after_connect(move |connection, _| Box::pin(async move { DB::run(connection, sql).await.map(drop) }))
        .connect_lazy(url)
        .unwrap()
}

async fn too_many_connections<T: TestServer>(database: &T, kind: Kind) {
    const MOST: usize = 8;
    drop(database.locks().await);
    let limit = if T::NAME == "postgres" { "CONNECTION LIMIT 8" } else { "WITH MAX_USER_CONNECTIONS 8" };
    with_account(database, limit, &RIGHTS, async |account| {
        let mut others = Vec::new();
        for _ in 0..MOST {
            others.push(connection::<T::Database>(&account.url(database.url())).await);
        }
        let proxy = database.proxy();
        let pool = pool_of::<T::Database>(&account.url(&database.url_by(proxy.address())));
        let locks = Locks::new(pool.clone());
        let requests = of_kind(kind, &SHORT_WAITS);
        let asking = Requests::prepare(&locks, &pool, &requests, |request| format!("{request:?}")).await;
        let mut wrong = asking.ask().await.not_unknown("short wait");

        let requests = with_a_wait(of_kind(kind, &[PATIENCE]));
        let asking = Requests::prepare(&locks, &pool, &requests, |request| format!("{request:?}")).await;
        let before = proxy.opened();
        let asked = tokio::spawn(asking.ask());
        eventually(PATIENCE, async || proxy.opened() > before + 20 || asked.is_finished()).await;
        for other in others {
            other.close().await.unwrap();
        }
        wrong.extend(asked.await.unwrap().not_taken("long wait"));
        locks.close().await;
        pool.close().await;
        assert_none(&wrong);
    })
    .await;
}

/// Of an account, as administrators set it; of a session on MySQL, which knows no other.
async fn short_statements<T: TestServer>(database: &T, kind: Kind) {
    let near = database.locks().await;
    let limit = if T::NAME == "mariadb" { "WITH MAX_STATEMENT_TIME 0.3" } else { "" };
    with_account(database, limit, &RIGHTS, async |account| {
        if T::NAME == "postgres" {
            database.run(&format!("ALTER ROLE {} SET statement_timeout = '300ms'", account.name)).await;
        }
        let setting = if T::NAME == "mysql" { "SET SESSION max_execution_time = 300" } else { "SELECT 1" };
        let pool = pool_with::<T::Database>(&account.url(database.url()), setting);
        let locks = Locks::new(pool.clone());
        let released = locks.insert_lock("released").ttl(LONG).acquire().await.unwrap();
        let dropped = locks.insert_lock("dropped").ttl(LONG).acquire().await.unwrap();
        let (short, long) = (of_kind(kind, &SHORT_WAITS), with_a_wait(of_kind(kind, &[PATIENCE])));
        let name = |request| format!("{request:?}");
        let short = Requests::prepare(&locks, &pool, &short, name).await;
        let long = Requests::prepare(&locks, &pool, &long, name).await;

        let stalling = Stalling::begin(database, Stall::Everything).await;
        drop(dropped);
        let releasing = tokio::spawn(released.release());
        let asked = tokio::spawn(long.ask());
        let mut wrong = short.ask().await.not_unknown("short wait");
        // For several times as long as a statement may take.
        sleep(Duration::from_millis(1500)).await;
        stalling.end().await;
        wrong.extend(asked.await.unwrap().not_taken("long wait"));
        assert_none(&wrong);
        // On a busy machine all this takes longer than a release waits for its answer. It goes on all the same.
        let released = releasing.await.unwrap();
        assert!(
            matches!(
                released,
                Ok(()) | Err(Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. })
            ),
            "{released:?}"
        );
        for name in ["released", "dropped"] {
            near.insert_lock(name).wait(PATIENCE).acquire().await.expect(name).release().await.unwrap();
        }
        locks.close().await;
        pool.close().await;
    })
    .await;
}

async fn too_many_connections_are_waited_out<T: TestServer>(database: &T) {
    too_many_connections(database, Kind::Insert).await;
}

async fn too_many_connections_are_waited_out_for_row_locks<T: TestServer>(database: &T) {
    too_many_connections(database, Kind::Row).await;
}

async fn statement_timeouts_are_waited_out<T: TestServer>(database: &T) {
    short_statements(database, Kind::Insert).await;
}

async fn statement_timeouts_are_waited_out_for_row_locks<T: TestServer>(database: &T) {
    short_statements(database, Kind::Row).await;
}

/// As an administrator does who sees statements that wait.
async fn cancelled_statements_are_repeated<T: TestServer>(database: &T) {
    let pool = database.pool(30).await;
    let locks = lock_tests::migrated(Locks::new(pool.clone())).await;
    let requests = with_a_wait(outside_of_transactions(&[PATIENCE]));
    let asking = Requests::prepare(&locks, &pool, &requests, |request| format!("{request:?}")).await;
    let stalling = Stalling::begin(database, Stall::Everything).await;
    let asked = tokio::spawn(asking.ask());
    let mut administrator = database.connection().await;
    for _ in 0..3 {
        let mut cancelled = 0;
        eventually(PATIENCE, async || {
            cancelled += cancel_all_that_wait::<T>(&mut administrator).await;
            cancelled > 0
        })
        .await;
    }
    assert!(!asked.is_finished());
    stalling.end().await;
    assert_none(&asked.await.unwrap().not_taken("cancelled"));
}

async fn cancel_all_that_wait<T: TestServer>(
    administrator: &mut <T::Database as sqlx::Database>::Connection,
) -> usize {
    if T::NAME == "postgres" {
        let sql = "SELECT pg_cancel_backend(pid)::INT::BIGINT FROM pg_stat_activity
            WHERE datname = current_database() AND wait_event_type = 'Lock'";
        return T::Database::numbers(administrator, sql).await.unwrap().len();
    }
    let sql =
        "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND state LIKE 'Waiting for %'";
    let waiting = T::Database::numbers(administrator, sql).await.unwrap();
    for id in &waiting {
        // It may have stopped waiting.
        drop(T::Database::run(administrator, &format!("KILL QUERY {id}")).await);
    }
    waiting.len()
}

/// `innodb_lock_wait_timeout = 0` is known to MariaDB.
async fn a_server_that_does_not_wait_is_asked_with_pauses<T: TestServer>(database: &T) {
    const WAIT: Duration = Duration::from_millis(700);
    /// What a request sends in this time when it pauses; without pauses there are thousands.
    const FEW: usize = 150;
    let near = database.locks().await;
    let setting = match T::NAME {
        "postgres" => "SET lock_timeout = '1ms'",
        "mariadb" => "SET SESSION innodb_lock_wait_timeout = 0, SESSION lock_wait_timeout = 0",
        _ => "SET SESSION innodb_lock_wait_timeout = 1, SESSION lock_wait_timeout = 1",
    };
    let holders = database.pool(2).await;
    let mut transaction = holders.begin().await.unwrap();
    near.insert_lock("lease").acquire_in(&mut transaction).await.unwrap();
    let held = near.row_lock("row").acquire().await.unwrap();
    let proxy = database.proxy();
    let pool = pool_with::<T::Database>(&database.url_by(proxy.address()), setting);
    let locks = Locks::new(pool.clone());
    let mut wrong = Vec::new();
    for way in [Way::Lease, Way::LeaseIn, Way::Row, Way::RowIn] {
        let request = Request { way, wait: Some(WAIT) };
        let name = if way.kind() == Kind::Row { "row" } else { "lease" };
        let asking = Requests::prepare(&locks, &pool, &[request], |_| name.to_owned()).await;
        let before = proxy.reads(Direction::ToServer);
        wrong.extend(asking.ask().await.not_held("a short limit", |_| None));
        let sent = proxy.reads(Direction::ToServer) - before;
        if sent > FEW {
            wrong.push(format!("{way:?}: {sent} messages in {WAIT:?}"));
        }
    }
    transaction.rollback().await.unwrap();
    held.rollback().await.unwrap();
    assert_none(&wrong);
}
