//! Another session has the whole table locked, as backups do, or DDL stands before it. A lock that nobody holds is not called
//! held, what is refused says why, and a release is carried out as soon as the table can be written.

use std::time::Duration;

use lock_db::{Error, LockDatabase, Locks, distributed_lock};
use lock_tests::{Backend, TestDatabase, TestServer, connection, eventually};
use sqlx::Connection;
use tokio::task::JoinHandle;
use tokio::time::timeout;

lock_tests::cases! {
    on every server:
    free_locks_in_a_locked_table_are_not_reported_as_held,
    transactions_beside_a_locked_table_stay_usable,
    releases_in_a_locked_table_are_carried_out_afterwards,
    requests_in_a_locked_table_are_granted_afterwards,
}

const SHORT: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_mins(5);
const PATIENCE: Duration = Duration::from_mins(1);

/// Keeps everybody from writing to the table.
struct Locked<DB: Backend> {
    session: DB::Connection,
    unlock: &'static str,
    /// What stands before the table, if that is DDL.
    ddl: Option<JoinHandle<sqlx::Result<u64>>>,
}

const DDL: &str = "DDL that waits";

fn ways<T: TestDatabase>() -> [&'static str; 3] {
    match T::NAME {
        "postgres" => [
            "BEGIN; LOCK TABLE distributed_lock IN SHARE MODE",
            "BEGIN; LOCK TABLE distributed_lock IN ACCESS EXCLUSIVE MODE",
            DDL,
        ],
        // As `FLUSH TABLES WITH READ LOCK` does, but for one table.
        _ => ["FLUSH TABLES distributed_lock WITH READ LOCK", "LOCK TABLES distributed_lock WRITE", DDL],
    }
}

impl<DB: Backend> Locked<DB> {
    async fn new<T: TestServer<Database = DB>>(database: &T, way: &'static str) -> Self {
        let mut session = connection::<DB>(database.url()).await;
        if way != DDL {
            DB::run(&mut session, way).await.unwrap();
            let unlock = if T::NAME == "postgres" { "ROLLBACK" } else { "UNLOCK TABLES" };
            return Self { session, unlock, ddl: None };
        }
        // A long report, for example.
        DB::run(&mut session, "BEGIN; SELECT COUNT(*) FROM distributed_lock").await.unwrap();
        let mut admin = connection::<DB>(database.url()).await;
        let ddl = tokio::spawn(async move {
            let add = "ALTER TABLE distributed_lock ADD COLUMN extra INTEGER NOT NULL DEFAULT 0";
            DB::run(&mut admin, add).await
        });
        eventually(PATIENCE, async || database.activity().await.waiting > 0).await;
        Self { session, unlock: "ROLLBACK", ddl: Some(ddl) }
    }

    async fn unlock(mut self) {
        DB::run(&mut self.session, self.unlock).await.unwrap();
        if let Some(ddl) = self.ddl {
            timeout(PATIENCE, ddl).await.expect("nothing is in its way any more").unwrap().unwrap();
            DB::run(&mut self.session, "ALTER TABLE distributed_lock DROP COLUMN extra").await.unwrap();
        }
        self.session.close().await.unwrap();
    }
}

#[distributed_lock("job", skip, locks = locks)]
async fn job<DB: LockDatabase>(locks: &Locks<DB>) -> Result<Option<()>, Error> {
    Ok(Some(()))
}

/// Locks with rows that were used before, as a process has them that runs for long.
async fn locks_in_use<T: TestServer>(database: &T) -> Locks<T::Database> {
    let locks = database.locks().await;
    for name in ["free", "free in time", "job", "several 1", "several 2", "in a transaction"] {
        locks.insert_lock(name).acquire().await.unwrap().release().await.unwrap();
    }
    for name in ["row", "row in time", "row in a transaction"] {
        locks.row_lock(name).acquire().await.unwrap().commit().await.unwrap();
    }
    locks
}

fn says_why<A>(what: &str, answer: Result<A, Error>) {
    let error = answer.err().unwrap_or_else(|| panic!("{what}: granted, or called held"));
    assert!(
        matches!(error, Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. }),
        "{what}: {error:?}"
    );
    assert!(error.is_retryable(), "{what}: {error:?}");
}

async fn free_locks_in_a_locked_table_are_not_reported_as_held<T: TestServer>(database: &T) {
    for way in ways::<T>() {
        let locks = locks_in_use(database).await;
        let locked = Locked::new(database, way).await;
        let leases = async {
            tokio::join!(
                locks.insert_lock("free").try_acquire(),
                locks.insert_lock("free in time").wait(SHORT).acquire(),
                locks.insert_locks(["several 1", "several 2"]).wait(SHORT).acquire(),
                job(&locks),
                locks.insert_lock("new").try_acquire(),
            )
        };
        let rows = async {
            tokio::join!(
                locks.row_lock("row").try_acquire(),
                locks.row_lock("row in time").wait(SHORT).acquire(),
                locks.row_lock("new row").wait(SHORT).acquire(),
            )
        };
        let ((tried, waited, several, skipped, new), (row_tried, row, new_row)) = tokio::join!(leases, rows);
        says_why(&format!("{way}: try"), tried);
        says_why(&format!("{way}: acquire"), waited);
        says_why(&format!("{way}: several"), several);
        says_why(&format!("{way}: skip"), skipped);
        says_why(&format!("{way}: new name"), new);
        says_why(&format!("{way}: try of a row lock"), row_tried);
        says_why(&format!("{way}: row lock"), row);
        says_why(&format!("{way}: new row lock"), new_row);
        locked.unlock().await;
        locks.insert_lock("free").wait(LONG).acquire().await.unwrap().release().await.unwrap();
        locks.row_lock("row").wait(LONG).acquire().await.unwrap().commit().await.unwrap();
        locks.close().await;
    }
}

async fn transactions_beside_a_locked_table_stay_usable<T: TestServer>(database: &T) {
    database.run("CREATE TABLE business (n INTEGER)").await;
    for way in ways::<T>() {
        let locks = locks_in_use(database).await;
        let pool = database.pool(4).await;
        let locked = Locked::new(database, way).await;
        let ask = async |number: i32| {
            let mut transaction = pool.begin().await.unwrap();
            let transaction_ref = &mut *transaction;
            let refused = match number {
                0 => locks.row_lock("row").try_acquire_in(transaction_ref).await.map(drop),
                1 => locks.row_lock("row").wait(SHORT).acquire_in(transaction_ref).await.map(drop),
                2 => locks.insert_lock("free").try_acquire_in(transaction_ref).await.map(drop),
                _ => locks.insert_lock("free").wait(SHORT).acquire_in(transaction_ref).await.map(drop),
            };
            says_why(&format!("{way}: {number}"), refused);
            let write = T::Database::run(&mut transaction, "INSERT INTO business VALUES (1)").await;
            write.unwrap_or_else(|error| panic!("{way}: {number}: {error}"));
            transaction.commit().await.unwrap();
        };
        let before = database.number("SELECT COUNT(*) FROM business").await;
        tokio::join!(ask(0), ask(1), ask(2), ask(3));
        assert_eq!(database.number("SELECT COUNT(*) FROM business").await, before + 4);
        locked.unlock().await;
        locks.close().await;
    }
}

async fn releases_in_a_locked_table_are_carried_out_afterwards<T: TestServer>(database: &T) {
    for way in ways::<T>() {
        let locks = locks_in_use(database).await;
        let other = Locks::new(database.pool(2).await);
        let lease = locks.insert_lock("free").ttl(LONG).acquire().await.unwrap();
        let several = locks.insert_locks(["several 1", "several 2"]).ttl(LONG).acquire().await.unwrap();
        let locked = Locked::new(database, way).await;
        let before = usize::from(locked.ddl.is_some());
        let releasing = tokio::spawn(async move { (lease.release().await, several.release().await) });
        eventually(PATIENCE, async || database.activity().await.waiting > before).await;
        locked.unlock().await;
        let (one, all) = timeout(PATIENCE, releasing).await.expect("it can be released").unwrap();
        one.unwrap_or_else(|error| panic!("{way}: {error:?}"));
        all.unwrap_or_else(|error| panic!("{way}: {error:?}"));
        // Long before their TTL.
        for name in ["free", "several 1", "several 2"] {
            let granted = timeout(PATIENCE, other.insert_lock(name).wait(LONG).acquire()).await;
            granted.expect("it was released").unwrap().release().await.unwrap();
        }
        locks.close().await;
        other.close().await;
    }
}

async fn requests_in_a_locked_table_are_granted_afterwards<T: TestServer>(database: &T) {
    for way in ways::<T>() {
        let locks = locks_in_use(database).await;
        let pool = database.pool(4).await;
        let locked = Locked::new(database, way).await;
        let before = usize::from(locked.ddl.is_some());
        let asking = tokio::spawn({
            let (locks, pool) = (locks.clone(), pool.clone());
            async move {
                let row_in_transaction = async {
                    let mut transaction = pool.begin().await.unwrap();
                    locks.row_lock("row in a transaction").wait(LONG).acquire_in(&mut transaction).await?;
                    transaction.commit().await.unwrap();
                    Ok(())
                };
                let lease_in_transaction = async {
                    let mut transaction = pool.begin().await.unwrap();
                    locks.insert_lock("in a transaction").wait(LONG).acquire_in(&mut transaction).await?;
                    transaction.commit().await.unwrap();
                    Ok(())
                };
                let lease = async { locks.insert_lock("free").wait(LONG).acquire().await?.release().await };
                let row = async { locks.row_lock("row").wait(LONG).acquire().await?.commit().await };
                tokio::try_join!(row_in_transaction, lease_in_transaction, lease, row)
            }
        });
        eventually(PATIENCE, async || database.activity().await.waiting > before).await;
        locked.unlock().await;
        let granted = timeout(PATIENCE, asking).await.expect("nothing is in the way").unwrap();
        granted.unwrap_or_else(|error| panic!("{way}: {error:?}"));
        locks.close().await;
    }
}
