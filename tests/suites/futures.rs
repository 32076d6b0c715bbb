//! What users put into `tokio::spawn` and into `static`s.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::time::Duration;

use lock_db::{
    Error, HeldInTransaction, InsertLock, Lease, LockDatabase, LockInfo, Locks, LocksBuilder, RowGuard,
    RowLock,
};
use sqlx::{MySql, Postgres, Sqlite};

fn is_send<T: Send>(_: T) {}
fn crosses<T: Send + Sync + 'static>() {}

#[test]
fn types_cross_threads() {
    fn of<DB: LockDatabase>() {
        crosses::<Locks<DB>>();
        crosses::<LocksBuilder<DB>>();
        crosses::<InsertLock<DB>>();
        crosses::<RowLock<DB>>();
        crosses::<Lease<DB>>();
    }
    fn clones<T: Clone>() {}
    clones::<Locks<Postgres>>();
    clones::<LocksBuilder<Postgres>>();
    clones::<InsertLock<Postgres>>();
    clones::<RowLock<Postgres>>();
    of::<Postgres>();
    of::<MySql>();
    of::<Sqlite>();
    crosses::<RowGuard<Postgres>>();
    crosses::<RowGuard<MySql>>();
    crosses::<HeldInTransaction>();
    crosses::<LockInfo>();
    crosses::<Error>();
    // As sqlx's own transaction on SQLite.
    fn moves<T: Send + 'static>() {}
    moves::<RowGuard<Sqlite>>();
}

/// Never called: that it compiles is the test.
#[allow(dead_code)]
fn futures_are_send<DB: LockDatabase>(
    locks: &Locks<DB>,
    lease: Lease<DB>,
    guard: RowGuard<DB>,
    transaction: &mut DB::Connection,
) {
    is_send(locks.migrate());
    is_send(locks.check());
    is_send(locks.close());
    is_send(locks.info("a"));
    is_send(locks.insert_lock("a").acquire());
    is_send(locks.insert_lock("a").try_acquire());
    is_send(locks.row_lock("a").acquire());
    is_send(locks.row_lock("a").try_acquire());
    is_send(locks.row_lock("a").acquire_in(transaction));
    is_send(locks.row_lock("a").try_acquire_in(transaction));
    is_send(lease.lost());
    is_send(lease.release());
    is_send(guard.commit());
    is_send(locks.scope(async {}));
}

/// Closures that borrow from outside and from the lease, spawned.
#[tokio::test]
async fn run_can_be_spawned() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}?mode=rwc", folder.path().join("test.db").display());
    let locks = Locks::new(sqlx::SqlitePool::connect(&url).await.unwrap());
    locks.migrate().await.unwrap();
    let task = tokio::spawn(async move {
        let word = String::from("borrowed");
        let word = &word;
        locks
            .insert_lock("a")
            .ttl(Duration::from_secs(5))
            .run(async |lease| {
                tokio::task::yield_now().await;
                Ok::<_, Error>(format!("{} {word}", lease.name()))
            })
            .await
    });
    assert_eq!(task.await.unwrap().unwrap(), "a borrowed");
}
