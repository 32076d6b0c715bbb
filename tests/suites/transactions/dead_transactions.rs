//! Transactions that the database has ended without the knowledge of their handle.

use std::time::Duration;

use lock_db::{Error, Locks, Loss};
use lock_tests::{Backend, TestDatabase, TestServer, eventually, is_taken};

lock_tests::cases! {
    on every database:
    a_lock_in_a_transaction_that_is_gone_is_refused,
    a_lease_is_not_verified_in_a_transaction_that_is_gone;

    on every server:
    nothing_is_committed_after_a_deadlock,
    a_dropped_statement_leaves_nothing_on_the_connection,
}

const PATIENCE: Duration = Duration::from_secs(20);
const LONG: Duration = Duration::from_mins(10);

async fn counter<T: TestDatabase>(database: &T) {
    database.run("CREATE TABLE counter (id BIGINT PRIMARY KEY, n BIGINT)").await;
    for id in 1..20 {
        database.run(&format!("INSERT INTO counter VALUES ({id}, 0)")).await;
    }
}

/// Does what InnoDB does to the victim of a deadlock, and SQLite when its disk is full. PostgreSQL
/// never does: its transaction stays open, and refuses everything.
async fn end_behind_the_back<T: TestDatabase>(connection: &mut <T::Database as sqlx::Database>::Connection) {
    if T::NAME == "postgres" {
        T::Database::run(connection, "SELECT no_such_column").await.unwrap_err();
    } else {
        T::Database::run(connection, "ROLLBACK").await.unwrap();
    }
}

async fn a_lock_in_a_transaction_that_is_gone_is_refused<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, database.locks().await);
    let pool = database.pool(1).await;
    // Once for a new row, and once for a known one.
    for round in 0..2 {
        let mut gone = pool.begin().await.unwrap();
        end_behind_the_back::<T>(&mut gone).await;
        let taken = locks.row_lock("row").acquire_in(&mut gone).await;
        assert!(matches!(taken, Err(Error::Lost { reason: Loss::TransactionEnded, .. })), "{taken:?}");
        other.row_lock("row").try_acquire().await.unwrap().expect("it is free").rollback().await.unwrap();
        let _connection_is_as_before = gone.rollback().await;

        let mut gone = pool.begin().await.unwrap();
        end_behind_the_back::<T>(&mut gone).await;
        let taken = locks.insert_lock("lease").acquire_in(&mut gone).await;
        assert!(matches!(taken, Err(Error::Lost { reason: Loss::TransactionEnded, .. })), "{taken:?}");
        other.insert_lock("lease").try_acquire().await.unwrap().expect("it is free").release().await.unwrap();
        drop(gone);

        // The pool's only connection is usable again.
        let mut again = pool.begin().await.unwrap();
        locks.row_lock("row").acquire_in(&mut again).await.unwrap();
        locks.insert_lock("lease").acquire_in(&mut again).await.unwrap();
        assert!(is_taken::<T, _>(other.row_lock("row").try_acquire().await), "{round}");
        again.commit().await.unwrap();
    }
}

async fn a_lease_is_not_verified_in_a_transaction_that_is_gone<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let pool = database.pool(1).await;
    let lease = locks.insert_lock("a").ttl(LONG).acquire().await.unwrap();
    for release in [false, true] {
        let mut gone = pool.begin().await.unwrap();
        end_behind_the_back::<T>(&mut gone).await;
        let asked =
            if release { lease.release_in(&mut gone).await } else { lease.verify_in(&mut gone).await };
        assert!(matches!(asked, Err(Error::Lost { reason: Loss::TransactionEnded, .. })), "{asked:?}");
        if T::NAME != "sqlite" {
            let write = "UPDATE distributed_lock SET owner = 'nobody' WHERE lock_name = 'a'";
            T::Database::run(&mut gone, write).await.unwrap_err();
        }
        drop(gone);
    }
    // Neither has affected the lease.
    eventually(PATIENCE, async || lease.is_held()).await;
    lease.release().await.unwrap();
}

/// Makes this transaction the victim of a deadlock: the other one has changed more rows.
async fn lose_a_deadlock<T: TestServer>(
    database: &T,
    victim: &mut <T::Database as sqlx::Database>::Connection,
) {
    let mut winner = database.connection().await;
    T::Database::run(&mut winner, "BEGIN").await.unwrap();
    T::Database::run(&mut winner, "UPDATE counter SET n = n + 1 WHERE id >= 10").await.unwrap();
    // PostgreSQL ends the transaction that notices first.
    if T::NAME == "postgres" {
        T::Database::run(&mut winner, "SET LOCAL deadlock_timeout = '60s'").await.unwrap();
    }
    T::Database::run(victim, "UPDATE counter SET n = n + 1 WHERE id = 1").await.unwrap();
    let waiting = database.activity().await.waiting;
    let winning = tokio::spawn(async move {
        T::Database::run(&mut winner, "UPDATE counter SET n = n + 1 WHERE id = 1").await.unwrap();
        T::Database::run(&mut winner, "ROLLBACK").await.unwrap();
    });
    eventually(PATIENCE, async || database.activity().await.waiting > waiting).await;
    T::Database::run(victim, "UPDATE counter SET n = n + 1 WHERE id = 10").await.unwrap_err();
    winning.await.unwrap();
}

/// As code that ignores the error of one statement and continues with the next.
async fn nothing_is_committed_after_a_deadlock<T: TestServer>(database: &T) {
    const WRITES: usize = 3;
    counter(database).await;
    let pool = database.pool(1).await;
    let locks = lock_tests::migrated(Locks::new(pool.clone())).await;
    let other = Locks::new(database.pool(2).await);
    let lease = locks.insert_lock("lease").ttl(LONG).acquire().await.unwrap();
    for writes in 0..WRITES {
        for end in ["commit", "rollback", "drop"] {
            let mut guarded = lease.begin().await.unwrap();
            lose_a_deadlock(database, &mut guarded).await;
            for _ in 0..writes {
                let _refused = T::Database::run(&mut guarded, "UPDATE counter SET n = 77 WHERE id = 3").await;
            }
            match end {
                "commit" => {
                    let ended = guarded.commit().await;
                    let is_told = matches!(ended, Err(Error::Lost { reason: Loss::TransactionEnded, .. }));
                    assert!(is_told, "{ended:?}");
                }
                "rollback" => guarded.rollback().await.unwrap(),
                _ => drop(guarded),
            }

            let mut held = locks.row_lock("row").acquire().await.unwrap();
            lose_a_deadlock(database, &mut held).await;
            let overtaken = other.row_lock("row").try_acquire().await.unwrap().expect("it is free");
            for _ in 0..writes {
                let _refused = T::Database::run(&mut held, "UPDATE counter SET n = 78 WHERE id = 4").await;
            }
            match end {
                "commit" => {
                    let ended = held.commit().await;
                    let is_told = matches!(ended, Err(Error::Lost { reason: Loss::TransactionEnded, .. }));
                    assert!(is_told, "{ended:?}");
                }
                "rollback" => held.rollback().await.unwrap(),
                _ => drop(held),
            }
            overtaken.commit().await.unwrap();

            // The next statement on the pool's only connection belongs to the application again,
            // and commits by itself.
            let mut connection = pool.acquire().await.unwrap();
            T::Database::run(&mut connection, "UPDATE counter SET n = n + 1 WHERE id = 5").await.unwrap();
            drop(connection);
            assert_eq!(
                database.number("SELECT SUM(n) FROM counter WHERE id <> 5").await,
                0,
                "{writes} {end}"
            );
        }
    }
    let commits = i64::try_from(WRITES * 3).unwrap();
    assert_eq!(database.number("SELECT n FROM counter WHERE id = 5").await, commits);
}

/// The error of a dropped statement appears at the next one that is sent, which may be lock-db's.
async fn a_dropped_statement_leaves_nothing_on_the_connection<T: TestServer>(database: &T) {
    counter(database).await;
    let pool = database.pool(1).await;
    let locks = lock_tests::migrated(Locks::new(pool.clone())).await;
    let lease = locks.insert_lock("lease").ttl(LONG).acquire().await.unwrap();
    let mut in_the_way = database.connection().await;
    T::Database::run(&mut in_the_way, "BEGIN").await.unwrap();
    T::Database::run(&mut in_the_way, "UPDATE counter SET n = n + 1 WHERE id = 1").await.unwrap();
    let short = if T::NAME == "postgres" {
        "SET LOCAL lock_timeout = '1s'"
    } else {
        "SET SESSION innodb_lock_wait_timeout = 1"
    };
    let blocked = "UPDATE counter SET n = n + 1 WHERE id = 1";
    for end in ["commit", "rollback", "drop"] {
        let mut guarded = lease.begin().await.unwrap();
        T::Database::run(&mut guarded, short).await.unwrap();
        drop_while_it_waits(database, T::Database::run(&mut guarded, blocked)).await;
        match end {
            "commit" => drop(guarded.commit().await),
            "rollback" => drop(guarded.rollback().await),
            _ => drop(guarded),
        }
        let mut held = locks.row_lock("row").wait(PATIENCE).acquire().await.unwrap();
        T::Database::run(&mut held, short).await.unwrap();
        drop_while_it_waits(database, T::Database::run(&mut held, blocked)).await;
        match end {
            "commit" => drop(held.commit().await),
            "rollback" => drop(held.rollback().await),
            _ => drop(held),
        }
        let mut connection = pool.acquire().await.unwrap();
        T::Database::run(&mut connection, "UPDATE counter SET n = n + 1 WHERE id = 5").await.unwrap();
    }
    T::Database::run(&mut in_the_way, "ROLLBACK").await.unwrap();
    assert_eq!(database.number("SELECT n FROM counter WHERE id = 5").await, 3);
}

async fn drop_while_it_waits<T: TestServer>(database: &T, statement: impl Future) {
    let waiting = database.activity().await.waiting;
    tokio::select! {
        _ = statement => panic!("it waits for a row that is locked"),
        () = eventually(PATIENCE, async || database.activity().await.waiting > waiting) => {}
    }
}
