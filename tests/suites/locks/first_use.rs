//! The first uses of a name by several callers at once. Creating its row must not stop the session,
//! which handles all locks of a process.

use std::sync::Arc;
use std::time::{Duration, Instant};

use lock_db::Error;
use lock_tests::{Backend, TestServer, eventually};
use sqlx::Connection;
use tokio::task::JoinSet;

/// A statement on a private connection is given up after five seconds, and InnoDB gives up a locked
/// row after one.
const STANDSTILL: Duration = Duration::from_millis(3500);
const PATIENCE: Duration = Duration::from_mins(1);

lock_tests::cases! {
    on every server:
    an_uncommitted_row_delays_no_other_name,
    two_new_names_in_one_transaction_get_their_locks,
}

/// Another transaction creates the row, and makes no progress.
async fn an_uncommitted_row_delays_no_other_name<T: TestServer>(database: &T) {
    let (locks, pool) = (database.locks().await, database.pool(2).await);
    let mut maker = pool.begin().await.unwrap();
    let sql = "INSERT INTO distributed_lock (lock_name, lock_kind) VALUES ('new', 'row')";
    <T::Database as Backend>::run(&mut maker, sql).await.unwrap();

    let waiting = tokio::spawn(locks.row_lock("new").acquire());
    eventually(PATIENCE, async || database.activity().await.waiting > 0).await;
    let started = Instant::now();
    locks.insert_lock("other").acquire().await.unwrap().release().await.unwrap();
    assert!(started.elapsed() < STANDSTILL, "the session stood still for {:?}", started.elapsed());
    maker.commit().await.unwrap();
    waiting.await.unwrap().unwrap().rollback().await.unwrap();
}

/// A holder of the first lock needs the session for the second one, while others create the row of
/// the first one.
async fn two_new_names_in_one_transaction_get_their_locks<T: TestServer>(database: &T) {
    let (locks, pool) = (database.locks().await, Arc::new(database.pool(20).await));
    let started = Instant::now();
    let mut clicks = JoinSet::new();
    for click in 0..200 {
        let (locks, pool) = (locks.clone(), Arc::clone(&pool));
        clicks.spawn(async move {
            let mut connection = pool.acquire().await.unwrap();
            if T::NAME != "postgres" {
                // As PostgreSQL begins them: after a wait for the second lock, the snapshot is new.
                let sql = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED";
                <T::Database as Backend>::run(&mut connection, sql).await.unwrap();
            }
            loop {
                let mut tx = connection.begin().await.unwrap();
                let user = locks.row_lock(format!("user:{}", click / 5)).acquire_in(&mut tx).await;
                let stock = match user {
                    Ok(_) => locks.row_lock("stock").acquire_in(&mut tx).await,
                    refused => refused,
                };
                match stock {
                    Ok(_) => return tx.commit().await.unwrap(),
                    // The row was being created.
                    Err(Error::Serialization { .. }) => tx.rollback().await.unwrap(),
                    Err(error) => panic!("{error}"),
                }
            }
        });
    }
    while let Some(click) = clicks.join_next().await {
        click.unwrap();
    }
    assert!(started.elapsed() < STANDSTILL, "it took {:?}", started.elapsed());
}
