//! The server is killed while many callers take leases at once. A grant that was answered is never
//! forgotten, although grants are committed before they are on disk (PostgreSQL).

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lock_db::{LockDatabase, Locks};
use lock_tests::{
    Backend, OwnServer, PostgresKind, Random, Server, ServerKind, TestDatabase, eventually, seed,
};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

const CALLERS: usize = 32;
const KILLS: usize = 5;
const PATIENCE: Duration = Duration::from_mins(2);

/// The last token of each name that was answered.
type Answered = Arc<Mutex<HashMap<String, i64>>>;

pub(crate) fn on_own_server<K: ServerKind>() {
    OwnServer::need(K::NAME);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let kills = async {
        // Otherwise the server writes the log by itself in time for nearly everything.
        let options = if K::NAME == PostgresKind::NAME { "-c wal_writer_delay=10s" } else { "" };
        let mut server = OwnServer::with_options(K::NAME, options).await;
        server.is_back::<K::Database>().await;
        let database = Server::<K>::create_at(server.url()).await;
        drop(database.locks().await);
        let mut random = Random(seed());
        for kill in 0..KILLS {
            killed_once(&database, &mut server, kill, &mut random).await;
        }
    };
    runtime.block_on(async { timeout(PATIENCE, kills).await.expect("ends in time") });
}

async fn killed_once<K: ServerKind>(
    database: &Server<K>,
    server: &mut OwnServer,
    kill: usize,
    random: &mut Random,
) {
    let answered = Answered::default();
    let locks = Locks::new(database.pool(2).await);
    let mut callers = JoinSet::new();
    for caller in 0..CALLERS {
        callers.spawn(take(locks.clone(), format!("{kill} {caller}"), Arc::clone(&answered)));
    }
    if K::NAME == PostgresKind::NAME {
        // Or the kill would show nothing.
        let flushes =
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%pg_logical_emit_message%lock_db%'
            AND pid <> pg_backend_pid()";
        eventually(PATIENCE, async || database.number(flushes).await > 0).await;
    }
    eventually(PATIENCE, async || answered.lock().unwrap().len() > CALLERS * 4).await;
    // At any moment of the work that goes on.
    sleep(Duration::from_micros(random.next() % 50_000)).await;
    server.kill();
    let answered = answered.lock().unwrap().clone();
    callers.shutdown().await;
    drop(locks);

    server.start();
    server.is_back::<K::Database>().await;
    database.reconnect().await;
    for (name, token) in answered {
        let sql = format!("SELECT fencing_token FROM distributed_lock WHERE lock_name = '{name}'");
        let found = database.find_number(&sql).await;
        assert!(found >= Some(token), "`{name}` was granted with {token}, and the server has {found:?}");
    }
}

/// Takes new names and known ones in turn, until an error. Every second lease is kept.
async fn take<DB: LockDatabase + Backend>(locks: Locks<DB>, prefix: String, answered: Answered) {
    let mut kept = Vec::new();
    for number in 0.. {
        for name in [format!("{prefix} {number}"), prefix.clone()] {
            let Ok(lease) = locks.insert_lock(&name).try_acquire().await else { return };
            let Some(lease) = lease else { continue };
            answered.lock().unwrap().insert(name, lease.fencing_token());
            if number % 2 == 0 && lease.name() != prefix {
                kept.push(lease);
            } else if lease.release().await.is_err() {
                return;
            }
        }
    }
}
