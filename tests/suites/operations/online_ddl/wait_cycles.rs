//! A transaction has a lock, and DDL waits for its end. What it asks for meanwhile must not wait for that DDL.

use std::time::Duration;

use lock_db::{Error, Locks};
use lock_tests::{Backend, PostgresServer, TestDatabase, TestServer, connection, eventually};
use tokio::time::timeout;

lock_tests::cases! {
    on every server:
    another_lock_of_the_transaction_does_not_wait_for_the_ddl,
    the_same_lock_again_does_not_wait_for_the_ddl,
    guards_and_releases_do_not_wait_for_the_ddl,
    the_end_of_the_transaction_does_not_wait_for_the_ddl;

    in modules: concurrent_indexes
}

pub const WAIT: Duration = Duration::from_mins(5);
/// Far shorter than the wait.
pub const LIMIT: Duration = Duration::from_secs(30);

/// What the transaction asks for while the DDL waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    NewRowLock,
    KnownRowLock,
    NewInsertLock,
    KnownInsertLock,
    SameRowLock,
    SameInsertLock,
    Verify,
    Release,
    Nothing,
}

async fn another_lock_of_the_transaction_does_not_wait_for_the_ddl<T: TestServer>(database: &T) {
    let steps = [Step::NewRowLock, Step::KnownRowLock, Step::NewInsertLock, Step::KnownInsertLock];
    for step in steps {
        alter_while(database, step).await;
    }
}

async fn the_same_lock_again_does_not_wait_for_the_ddl<T: TestServer>(database: &T) {
    for step in [Step::SameRowLock, Step::SameInsertLock] {
        alter_while(database, step).await;
    }
}

async fn guards_and_releases_do_not_wait_for_the_ddl<T: TestServer>(database: &T) {
    for step in [Step::Verify, Step::Release] {
        alter_while(database, step).await;
    }
}

async fn the_end_of_the_transaction_does_not_wait_for_the_ddl<T: TestServer>(database: &T) {
    alter_while(database, Step::Nothing).await;
}

async fn alter_while<T: TestServer>(database: &T, step: Step) {
    alter_while_asking(database, step).await;
}

/// Answers whether it was refused.
pub async fn alter_while_asking<T: TestServer>(database: &T, step: Step) -> bool {
    let pool = database.pool(4).await;
    let locks = lock_tests::migrated(Locks::new(pool.clone())).await;
    let lease = locks.insert_lock("lease").ttl(Duration::from_mins(5)).acquire().await.unwrap();
    locks.row_lock("known row").acquire().await.unwrap().commit().await.unwrap();
    locks.insert_lock("known lease").acquire().await.unwrap().release().await.unwrap();

    let mut transaction = pool.begin().await.unwrap();
    locks.row_lock("first row").acquire_in(&mut transaction).await.unwrap();
    locks.insert_lock("first lease").acquire_in(&mut transaction).await.unwrap();
    let mut admin = connection::<T::Database>(database.url()).await;
    let ddl = tokio::spawn(async move {
        let add = "ALTER TABLE distributed_lock ADD COLUMN extra INTEGER NOT NULL DEFAULT 0";
        T::Database::run(&mut admin, add).await
    });
    eventually(LIMIT, async || database.activity().await.waiting > 0).await;

    let asked = timeout(LIMIT, async {
        let transaction = &mut *transaction;
        match step {
            Step::NewRowLock => locks.row_lock("new row").wait(WAIT).acquire_in(transaction).await.map(drop),
            Step::KnownRowLock => {
                locks.row_lock("known row").wait(WAIT).acquire_in(transaction).await.map(drop)
            }
            Step::NewInsertLock => {
                locks.insert_lock("new lease").wait(WAIT).acquire_in(transaction).await.map(drop)
            }
            Step::KnownInsertLock => {
                locks.insert_lock("known lease").wait(WAIT).acquire_in(transaction).await.map(drop)
            }
            Step::SameRowLock => {
                locks.row_lock("first row").wait(WAIT).acquire_in(transaction).await.map(drop)
            }
            Step::SameInsertLock => {
                locks.insert_lock("first lease").wait(WAIT).acquire_in(transaction).await.map(drop)
            }
            Step::Verify => lease.verify_in(transaction).await,
            Step::Release => lease.release_in(transaction).await,
            Step::Nothing => Ok(()),
        }
    });
    let asked = asked.await.unwrap_or_else(|_| panic!("{step:?}: it waits for what waits for it"));
    let is_refused = asked.is_err();
    match asked {
        Ok(()) => transaction.commit().await.unwrap(),
        Err(error) => {
            // Nobody has the lock. The DDL is in the way, which passes.
            assert!(
                !matches!(error, Error::Timeout { .. }),
                "{step:?}: a free lock is called held: {error:?}"
            );
            assert!(error.is_retryable(), "{step:?}: {error:?}");
            transaction.rollback().await.unwrap();
        }
    }
    timeout(LIMIT, ddl).await.unwrap_or_else(|_| panic!("{step:?}: the DDL stands")).unwrap().unwrap();
    database.run("ALTER TABLE distributed_lock DROP COLUMN extra").await;

    // Everything works as before.
    if step == Step::Release && !is_refused {
        timeout(LIMIT, lease.lost()).await.expect("it was released");
    } else {
        eventually(LIMIT, async || lease.is_held()).await;
        lease.release().await.unwrap();
    }
    let other = Locks::new(database.pool(4).await);
    for locks in [&locks, &other] {
        for name in ["lease", "first lease", "known lease", "new lease"] {
            locks.insert_lock(name).wait(WAIT).acquire().await.unwrap().release().await.unwrap();
        }
        for name in ["first row", "known row", "new row"] {
            locks.row_lock(name).wait(WAIT).acquire().await.unwrap().commit().await.unwrap();
        }
    }
    locks.close().await;
    other.close().await;
    drop(pool);
    is_refused
}

/// `CREATE INDEX CONCURRENTLY` waits for all transactions that may have looked at any table before it.
pub mod concurrent_indexes {
    use super::*;

    lock_tests::cases! {
        on postgres:
        an_index_created_concurrently_under_a_lease,
    }

    async fn an_index_created_concurrently_under_a_lease(database: &PostgresServer) {
        let locks = database.locks().await;
        let lease = locks.insert_lock("deploy").acquire().await.unwrap();
        let other = Locks::new(database.pool(2).await);
        let waiter =
            tokio::spawn(
                async move { other.insert_lock("deploy").wait(WAIT).acquire().await?.release().await },
            );
        eventually(LIMIT, async || {
            database.number("SELECT COUNT(*) FROM distributed_lock WHERE waiters <> ''").await == 1
        })
        .await;
        make_index(database).await;
        lease.release().await.unwrap();
        waiter.await.unwrap().unwrap();
    }

    pub async fn make_index(database: &PostgresServer) {
        database.run("CREATE TABLE business (id BIGINT)").await;
        let mut admin = database.connection().await;
        let made = sqlx::raw_sql("CREATE INDEX CONCURRENTLY ids ON business (id)").execute(&mut admin);
        let made = timeout(LIMIT, made).await;
        made.unwrap_or_else(|_| panic!("not made within {LIMIT:?}")).unwrap();
    }
}
