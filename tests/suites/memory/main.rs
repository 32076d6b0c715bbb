//! A process that works with locks for long keeps no more memory than after a short while.
//!
//! The allocator counts what is allocated and not freed. The cases run one after the other, since
//! they share it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::alloc::System;
use std::time::Duration;

use lock_db::{Error, Locks};
use lock_tests::{TestDatabase, eventually};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio::time::timeout;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

lock_tests::cases! {
    on every database:
    memory_does_not_grow,
}

static ALONE: Mutex<()> = Mutex::const_new(());

const PATIENCE: Duration = Duration::from_secs(60);
const LONG: Duration = Duration::from_mins(10);
/// What is kept permanently is allocated at some time: statements, buffers, known rows. A leak
/// occurs in each stage.
const STAGES: u32 = 8;
const ROUNDS: u32 = 100;
/// Ten bytes for each round of more than ten operations.
const TOLERANCE: usize = 1024;
/// For what is freed in the background. If this is too short, another stage is needed.
const A_MOMENT: Duration = Duration::from_secs(2);

fn in_use() -> usize {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated.saturating_sub(stats.bytes_deallocated)
}

/// Each way to acquire and release a lock, some of them with contention.
async fn round<T: TestDatabase>(locks: &Locks<T::Database>, others: &Locks<T::Database>, number: u32) {
    let fresh = format!("fresh {number}");
    locks.insert_lock(&fresh).acquire().await.unwrap().release().await.unwrap();
    drop(locks.insert_lock("a").acquire().await.unwrap());
    let held = others.insert_lock("a").wait(PATIENCE).acquire().await.unwrap();
    assert!(locks.insert_lock("a").try_acquire().await.unwrap().is_none());
    // They are in the queue of the process, and one entry for all of them is in that of the row,
    // until they are not waited for any more.
    let mut waiting = JoinSet::new();
    for _ in 0..3 {
        waiting.spawn(locks.insert_lock("a").wait(PATIENCE).acquire());
    }
    let given_up = locks.insert_lock("a").wait(Duration::from_millis(1)).acquire().await;
    assert!(matches!(given_up, Err(Error::Timeout { .. })));
    let leaves = tokio::spawn(locks.insert_lock("a").wait(PATIENCE).acquire());
    leaves.abort();
    let transaction = held.begin().await.unwrap();
    held.commit_and_release(transaction).await.unwrap();
    // Handed on directly.
    while let Some(taken) = waiting.join_next().await {
        taken.unwrap().unwrap().release().await.unwrap();
    }
    locks.insert_locks(["b", "c"]).acquire().await.unwrap().release().await.unwrap();
    locks.row_lock("row").acquire().await.unwrap().commit().await.unwrap();
    let run = locks.insert_lock("d").run(async |lease| lease.begin().await?.commit().await);
    run.await.unwrap();
}

async fn memory_does_not_grow<T: TestDatabase>(database: &T) {
    let _alone = ALONE.lock().await;
    let (locks, others) = (database.locks().await, database.locks().await);
    let mut growth = Vec::new();
    for stage in 0..STAGES {
        let before = in_use();
        for number in 0..ROUNDS {
            round::<T>(&locks, &others, stage * ROUNDS + number).await;
        }
        let enough = || in_use() <= before + TOLERANCE;
        if timeout(A_MOMENT, eventually(LONG, async || enough())).await.is_ok() {
            return;
        }
        growth.push(in_use().saturating_sub(before));
    }
    panic!("{ROUNDS} rounds at a time, and these bytes more each time: {growth:?}");
}

fn main() -> std::process::ExitCode {
    lock_tests::run([cases()], [])
}
