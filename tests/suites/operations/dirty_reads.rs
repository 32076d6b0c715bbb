//! On MySQL and MariaDB the session looks for missing rows with a dirty read. `SET TRANSACTION ISOLATION
//! LEVEL` is for the next statement that succeeds, so a dirty read that fails must not leave it behind.

use std::time::Duration;

use lock_db::Locks;
use lock_tests::{Backend, TestServer, eventually};
use sqlx::MySql;

lock_tests::cases! {
    on mariadb: nothing_else_is_read_dirty;
    on mysql: nothing_else_is_read_dirty;
}

const PATIENCE: Duration = Duration::from_mins(1);
/// As long as a private connection waits for a table.
const WAIT: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy)]
enum Request {
    Lease,
    Leases,
    RowLock,
    RowLocks,
}

/// New names, whose rows are looked for.
async fn request(locks: &Locks<MySql>, request: Request) -> Result<(), lock_db::Error> {
    let names = ["new 1", "new 2"];
    match request {
        Request::Lease => locks.insert_lock(names[0]).wait(WAIT).acquire().await.map(drop),
        Request::Leases => locks.insert_locks(names).wait(WAIT).acquire().await.map(drop),
        Request::RowLock => locks.row_lock(names[0]).wait(WAIT).acquire().await.map(drop),
        Request::RowLocks => locks.row_locks(names).wait(WAIT).acquire().await.map(drop),
    }
}

/// A locked table makes the dirty read fail. The row that is read next has a change that is never
/// committed.
async fn nothing_else_is_read_dirty<T: TestServer<Database = MySql>>(database: &T) {
    let owner = database.locks().await;
    owner.insert_lock("seen").acquire().await.unwrap().release().await.unwrap();
    let (mut table, mut writer) = (database.connection().await, database.connection().await);
    for how in [Request::RowLock, Request::RowLocks, Request::Leases, Request::Lease] {
        let locks = Locks::new(database.pool(2).await);
        locks.insert_lock("seen").acquire().await.unwrap().release().await.unwrap();
        MySql::run(&mut table, "LOCK TABLES distributed_lock WRITE").await.unwrap();
        let (refused, ()) = tokio::join!(request(&locks, how), async {
            // The dirty read waits for the table.
            eventually(PATIENCE, async || database.activity().await.waiting > 0).await;
        });
        MySql::run(&mut table, "UNLOCK TABLES").await.unwrap();
        assert!(refused.is_err(), "{how:?}: the table was locked for longer");
        MySql::run(&mut writer, "START TRANSACTION").await.unwrap();
        let change = "UPDATE distributed_lock SET owner = 'uncommitted' WHERE lock_name = 'seen'";
        MySql::run(&mut writer, change).await.unwrap();
        let seen = locks.info("seen").await.unwrap().unwrap();
        MySql::run(&mut writer, "ROLLBACK").await.unwrap();
        assert_eq!(seen.owner, locks.owner(), "{how:?}");
        locks.close().await;
    }
}
