//! What waits for a transaction that has a lock, while that asks for another lock or holds it for longer.

use std::time::Instant;

use lock_db::Locks;
use lock_tests::{Backend, PostgresServer, TestDatabase, TestServer, connection, eventually};

use super::wait_cycles::concurrent_indexes::make_index;
use super::wait_cycles::{LIMIT, Step, WAIT, alter_while_asking};

lock_tests::cases! {
    on postgres:
    an_index_made_concurrently_under_a_row_lock;

    on mariadb:
    a_transaction_gets_another_lock_while_ddl_waits_for_it,
    a_try_of_a_new_row_lock_ends_soon;

    on mysql:
    a_transaction_gets_another_lock_while_ddl_waits_for_it,
    a_try_of_a_new_row_lock_ends_soon,
}

/// A private connection stands behind the DDL, which waits for the transaction. A row that is there, the transaction finds by itself; for
/// one that has to be made it is refused, so that its rollback lets the DDL through.
async fn a_transaction_gets_another_lock_while_ddl_waits_for_it<T: TestServer>(database: &T) {
    let mut refused = Vec::new();
    for step in [Step::NewRowLock, Step::KnownRowLock, Step::NewInsertLock, Step::KnownInsertLock] {
        if alter_while_asking(database, step).await {
            refused.push(step);
        }
    }
    let has_no_row = |step: &Step| matches!(step, Step::NewRowLock | Step::NewInsertLock);
    assert!(refused.iter().all(has_no_row), "refused although nobody has them: {refused:?}");
}

async fn a_try_of_a_new_row_lock_ends_soon<T: TestServer>(database: &T) {
    let locks = database.locks().await;
    locks.row_lock("used").acquire().await.unwrap().commit().await.unwrap();
    let mut backup = connection::<T::Database>(database.url()).await;
    T::Database::run(&mut backup, "FLUSH TABLES distributed_lock WITH READ LOCK").await.unwrap();
    let started = Instant::now();
    assert!(locks.row_lock("new").try_acquire().await.is_err());
    let took = started.elapsed();
    T::Database::run(&mut backup, "UNLOCK TABLES").await.unwrap();
    assert!(took < std::time::Duration::from_secs(6), "{took:?}");
}

async fn an_index_made_concurrently_under_a_row_lock(database: &PostgresServer) {
    let locks = database.locks().await;
    let guard = locks.row_lock("deploy").acquire().await.unwrap();
    let other = Locks::new(database.pool(2).await);
    let waiter =
        tokio::spawn(async move { other.row_lock("deploy").wait(WAIT).acquire().await?.commit().await });
    eventually(LIMIT, async || database.activity().await.waiting > 0).await;
    make_index(database).await;
    guard.commit().await.unwrap();
    waiter.await.unwrap().unwrap();
}
