//! The table is altered while many transactions wait for one lock. The DDL takes milliseconds by itself, and has to wait for
//! those transactions only that hold the lock, or are about to.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lock_db::{Error, Locks};
use lock_tests::{Backend, TestServer, connection, eventually};
use sqlx::Pool;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

lock_tests::cases! {
    on every server:
    row_locks_in_transactions,
    several_row_locks_in_transactions,
    insert_locks_in_transactions,
    new_names_in_transactions,
    row_locks_with_their_own_transactions,
    leases,
}

const TASKS: usize = 6;
/// What each of them does under the lock.
const WORK: Duration = Duration::from_millis(20);
/// How long a lock is waited for: longer than anything here takes.
const WAIT: Duration = Duration::from_mins(2);
/// Far longer than the DDL takes beside plain row locks, which is a tenth of a second, and far shorter than the wait.
const DDL_LIMIT: Duration = Duration::from_secs(15);
const PATIENCE: Duration = Duration::from_mins(1);

/// How a task works under the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    RowLockIn,
    SeveralRowLocksIn,
    InsertLockIn,
    NewRowLockIn,
    RowGuard,
    Lease,
}

async fn row_locks_in_transactions<T: TestServer>(database: &T) {
    alter_beside(database, Way::RowLockIn).await;
}

async fn several_row_locks_in_transactions<T: TestServer>(database: &T) {
    alter_beside(database, Way::SeveralRowLocksIn).await;
}

async fn insert_locks_in_transactions<T: TestServer>(database: &T) {
    alter_beside(database, Way::InsertLockIn).await;
}

async fn new_names_in_transactions<T: TestServer>(database: &T) {
    alter_beside(database, Way::NewRowLockIn).await;
}

async fn row_locks_with_their_own_transactions<T: TestServer>(database: &T) {
    alter_beside(database, Way::RowGuard).await;
}

async fn leases<T: TestServer>(database: &T) {
    alter_beside(database, Way::Lease).await;
}

struct Crowd {
    stop: AtomicBool,
    done: AtomicUsize,
    errors: Mutex<Vec<String>>,
}

async fn alter_beside<T: TestServer>(database: &T, way: Way) {
    let pool = database.pool(12).await;
    let locks = lock_tests::migrated(Locks::new(pool.clone())).await;
    let lease = locks.insert_lock("beside").ttl(Duration::from_secs(10)).acquire().await.unwrap();
    let crowd = Arc::new(Crowd {
        stop: AtomicBool::new(false),
        done: AtomicUsize::new(0),
        errors: Mutex::new(Vec::new()),
    });
    let mut tasks = JoinSet::new();
    for task in 0..TASKS {
        let (locks, pool, crowd) = (locks.clone(), pool.clone(), Arc::clone(&crowd));
        tasks.spawn(async move {
            let mut round = 0;
            while !crowd.stop.load(Ordering::SeqCst) {
                round += 1;
                match work(&locks, &pool, way, &format!("new {task} {round}")).await {
                    Ok(()) => drop(crowd.done.fetch_add(1, Ordering::SeqCst)),
                    // The whole transaction is run again.
                    Err(Error::Serialization { .. } | Error::Deadlock { .. }) => {}
                    Err(error) => crowd.errors.lock().unwrap().push(format!("{error:?}")),
                }
            }
        });
    }

    let mut admin = connection::<T::Database>(database.url()).await;
    let more_is_done = async || {
        let before = crowd.done.load(Ordering::SeqCst);
        eventually(PATIENCE, async || crowd.done.load(Ordering::SeqCst) > before + 2 * TASKS).await;
    };
    for ddl in statements::<T>() {
        more_is_done().await;
        let altered = timeout(DDL_LIMIT, T::Database::run(&mut admin, ddl)).await;
        assert!(altered.is_ok(), "{way:?}: not within {DDL_LIMIT:?}: {ddl}");
        altered.unwrap().unwrap();
    }
    more_is_done().await;
    crowd.stop.store(true, Ordering::SeqCst);
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    let errors = std::mem::take(&mut *crowd.errors.lock().unwrap());
    assert!(errors.is_empty(), "{way:?}: {errors:#?}");
    assert!(lease.is_held(), "{way:?}: the lease beside them was lost");
    lease.begin().await.unwrap().commit().await.unwrap();
    lease.release().await.unwrap();
}

fn statements<T: TestServer>() -> &'static [&'static str] {
    match T::NAME {
        "postgres" => &[
            "ALTER TABLE distributed_lock ADD COLUMN extra INTEGER NOT NULL DEFAULT 0",
            "BEGIN; LOCK TABLE distributed_lock IN ACCESS EXCLUSIVE MODE; COMMIT",
            "CREATE INDEX extra ON distributed_lock (owner)",
            "ALTER TABLE distributed_lock DROP COLUMN extra",
        ],
        _ => &[
            "ALTER TABLE distributed_lock ADD COLUMN extra INTEGER NOT NULL DEFAULT 0",
            "ALTER TABLE distributed_lock COMMENT = 'x'",
            "CREATE INDEX extra ON distributed_lock (owner)",
            "ALTER TABLE distributed_lock DROP COLUMN extra",
        ],
    }
}

async fn work<DB: Backend>(
    locks: &Locks<DB>,
    pool: &Pool<DB>,
    way: Way,
    new_name: &str,
) -> Result<(), Error> {
    match way {
        Way::Lease => {
            let lease = locks.insert_lock("lease").wait(WAIT).acquire().await?;
            sleep(WORK).await;
            return lease.release().await;
        }
        Way::RowGuard => {
            let guard = locks.row_lock("row").wait(WAIT).acquire().await?;
            sleep(WORK).await;
            return guard.commit().await;
        }
        _ => {}
    }
    let mut transaction = pool.begin().await.unwrap();
    let taken = match way {
        Way::SeveralRowLocksIn => {
            locks.row_locks(["row", "another row"]).wait(WAIT).acquire_in(&mut transaction).await.map(drop)
        }
        Way::InsertLockIn => {
            locks.insert_lock("lease").wait(WAIT).acquire_in(&mut transaction).await.map(drop)
        }
        // A hot one, and one that nobody has used before.
        Way::NewRowLockIn => {
            locks.row_locks(["row", new_name]).wait(WAIT).acquire_in(&mut transaction).await.map(drop)
        }
        _ => locks.row_lock("row").wait(WAIT).acquire_in(&mut transaction).await.map(drop),
    };
    if taken.is_ok() {
        sleep(WORK).await;
        transaction.commit().await.unwrap();
    } else {
        transaction.rollback().await.unwrap();
    }
    taken
}
