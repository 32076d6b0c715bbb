//! PostgreSQL notifies the next process. A notification only shortens a sleep. If it fails or
//! waits, the release or commit before it is still done, without delay, and the next process finds
//! the free lock by itself.
//!
//! Each database has its own entry for the function `pg_notify`, so a test can replace it.

use std::time::Duration;

use lock_db::{Error, Lease, Locks};
use lock_tests::{Backend, PostgresServer, TestDatabase, eventually, queue_of};
use sqlx::{PgPool, Postgres};
use tokio::task::JoinHandle;
use tokio::time::timeout;

lock_tests::cases! {
    on postgres:
    a_failing_notification_does_not_fail_the_release,
    a_blocked_notification_does_not_delay_the_release,
    a_missing_privilege_to_notify_does_not_fail_the_release,
    many_releases_beside_blocked_notifications,
}

/// Within this time the next process finds by itself that the lock is free.
const PATIENCE: Duration = Duration::from_secs(30);
/// Far less than a notification waits, and more than a busy machine takes.
const SOON: Duration = Duration::from_secs(10);
const LONG: Duration = Duration::from_mins(10);

const FAILS: &str = "RAISE EXCEPTION 'too many notifications in the NOTIFY queue' USING ERRCODE = '54000'";
/// As a notification waits for another transaction that notifies and waits for its disk or a
/// standby: all notifications of a server share a lock.
const WAITS: &str = "PERFORM pg_advisory_xact_lock(4711)";

async fn replace_notify(database: &PostgresServer, body: &str) {
    let sql = format!(
        "ALTER FUNCTION pg_catalog.pg_notify(text, text) RENAME TO pg_notify_before;
        CREATE FUNCTION pg_catalog.pg_notify(text, text) RETURNS void LANGUAGE plpgsql AS
        $$ BEGIN PERFORM nextval('notified'); {body}; END $$"
    );
    database.run("CREATE SEQUENCE notified").await;
    database.run(&sql).await;
}

/// How often it was called.
async fn notified(database: &PostgresServer) -> i64 {
    database.number("SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM notified").await
}

/// How a lock becomes free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Release,
    Drop,
    CommitAndRelease,
    ReleaseIn,
    CommitThenRelease,
    AtLeast,
    Several,
    Close,
}

const ENDS: [End; 8] = [
    End::Release,
    End::Drop,
    End::CommitAndRelease,
    End::ReleaseIn,
    End::CommitThenRelease,
    End::AtLeast,
    End::Several,
    End::Close,
];

impl End {
    /// How many rows of work it commits.
    fn work(self) -> i64 {
        i64::from(matches!(self, Self::CommitAndRelease | Self::ReleaseIn | Self::CommitThenRelease))
    }
}

async fn write(connection: &mut sqlx::PgConnection) {
    Postgres::run(connection, "INSERT INTO work VALUES (1)").await.unwrap();
}

/// A holder of the lock, and how it releases it.
async fn hold_and_end(
    locks: &Locks<Postgres>,
    pool: &PgPool,
    name: &str,
    end: End,
    waits: impl AsyncFnOnce() -> Waiting,
) -> (Result<(), Error>, Waiting) {
    if end == End::Several {
        let leases = locks.insert_locks([name, "another"]).ttl(LONG).acquire().await.unwrap();
        let waiting = waits().await;
        return (in_time(end, leases.release()).await, waiting);
    }
    let at_least = if end == End::AtLeast { Duration::from_millis(200) } else { Duration::ZERO };
    let lease = locks.insert_lock(name).ttl(LONG).at_least(at_least).acquire().await.unwrap();
    let waiting = waits().await;
    let ending = async {
        match end {
            End::Release | End::AtLeast | End::Several => lease.release().await,
            End::Drop => {
                drop(lease);
                Ok(())
            }
            End::CommitAndRelease => {
                let mut transaction = lease.begin().await?;
                write(&mut transaction).await;
                lease.commit_and_release(transaction).await
            }
            End::ReleaseIn => {
                let mut transaction = pool.begin().await.unwrap();
                write(&mut transaction).await;
                lease.release_in(&mut transaction).await?;
                transaction.commit().await.expect("the caller's own COMMIT");
                Ok(())
            }
            End::CommitThenRelease => {
                let mut transaction = lease.begin().await?;
                write(&mut transaction).await;
                transaction.commit().await?;
                lease.release().await
            }
            End::Close => {
                locks.close().await;
                drop(lease);
                Ok(())
            }
        }
    };
    (in_time(end, ending).await, waiting)
}

async fn in_time<V>(end: End, ending: impl Future<Output = V>) -> V {
    timeout(SOON, ending).await.unwrap_or_else(|_| panic!("{end:?} was held up"))
}

type Waiting = JoinHandle<Result<Lease<Postgres>, Error>>;

/// Waits in another process, and is in the queue.
async fn wait_for(database: &PostgresServer, other: &Locks<Postgres>, name: &str) -> Waiting {
    let waiting = tokio::spawn(other.insert_lock(name).ttl(LONG).wait(PATIENCE).acquire());
    // With its channel.
    eventually(PATIENCE, async || {
        queue_of(database, name).await.first().is_some_and(|first| first.listener > 0)
    })
    .await;
    waiting
}

async fn each_end(database: &PostgresServer, locks: impl AsyncFn() -> (Locks<Postgres>, PgPool)) {
    let (other, _) = locks().await;
    for end in ENDS {
        // A process of its own, so that a request that hangs does not block the next.
        let (holder, pool) = locks().await;
        let before = database.number("SELECT COUNT(*) FROM work").await;
        let name = format!("{end:?}");
        let waits = async || wait_for(database, &other, &name).await;
        let (ended, waiting) = hold_and_end(&holder, &pool, &name, end, waits).await;
        ended.unwrap_or_else(|error| panic!("{end:?}: {error}"));
        let work = database.number("SELECT COUNT(*) FROM work").await - before;
        assert_eq!(work, end.work(), "{end:?}");
        let next = waiting.await.unwrap().unwrap_or_else(|error| panic!("{end:?}: {error}"));
        in_time(end, next.release()).await.unwrap();
        if end != End::Close {
            // And the process continues to work.
            let again = in_time(end, holder.insert_lock("again").wait(SOON).acquire()).await;
            in_time(end, again.unwrap().release()).await.unwrap();
        }
    }
}

async fn with_notify(database: &PostgresServer, body: &str) {
    database.run("CREATE TABLE work (n INT)").await;
    drop(database.locks().await);
    replace_notify(database, body).await;
    let locks = async || {
        let pool = database.pool(3).await;
        (Locks::new(pool.clone()), pool)
    };
    each_end(database, locks).await;
    let calls = notified(database).await;
    let ends = i64::try_from(ENDS.len()).unwrap();
    assert!(calls >= ends / 2, "of {ends} releases only {calls} have notified anybody");
}

async fn a_failing_notification_does_not_fail_the_release(database: &PostgresServer) {
    with_notify(database, FAILS).await;
}

async fn a_blocked_notification_does_not_delay_the_release(database: &PostgresServer) {
    database.run("SELECT pg_advisory_lock(4711)").await;
    with_notify(database, WAITS).await;
}

/// Revoked from all.
async fn a_missing_privilege_to_notify_does_not_fail_the_release(database: &PostgresServer) {
    database.run("CREATE TABLE work (n INT)").await;
    drop(database.locks().await);
    let role = database.text("SELECT current_database()").await.replace("lock_db_test", "role");
    let make = format!(
        "REVOKE EXECUTE ON FUNCTION pg_notify(text, text) FROM PUBLIC; CREATE ROLE {role};
        GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}"
    );
    database.run(&make).await;
    let become_it = format!("SET ROLE {role}");
    let locks = async || {
        let become_it = become_it.clone();
        let options =
            sqlx::pool::PoolOptions::new().max_connections(3).after_connect(move |connection, _| {
                let become_it = become_it.clone();
                Box::pin(async move { Postgres::run(connection, &become_it).await.map(drop) })
            });
        let pool = options.connect(database.url()).await.unwrap();
        let mut connection = pool.acquire().await.unwrap();
        Postgres::run(&mut connection, "SELECT pg_notify('a', 'b')")
            .await
            .expect_err("it has no right to it");
        drop(connection);
        (Locks::new(pool.clone()), pool)
    };
    let tried =
        futures_util::FutureExt::catch_unwind(std::panic::AssertUnwindSafe(each_end(database, locks)));
    let tried = tried.await;
    database.run(&format!("DROP OWNED BY {role}; DROP ROLE {role}")).await;
    if let Err(panic) = tried {
        std::panic::resume_unwind(panic);
    }
}

/// The releases of one process, which continues with everything else in the meantime.
async fn many_releases_beside_blocked_notifications(database: &PostgresServer) {
    const NAMES: usize = 20;
    const TTL: Duration = Duration::from_secs(3);
    let (locks, other) = (database.locks().await, database.locks().await);
    database.run("SELECT pg_advisory_lock(4711)").await;
    replace_notify(database, WAITS).await;
    let renewed = locks.insert_lock("renewed").ttl(TTL).acquire().await.unwrap();
    let mut waiting = Vec::new();
    for number in 0..NAMES {
        let name = number.to_string();
        let held = locks.insert_lock(&name).ttl(LONG).acquire().await.unwrap();
        let next = wait_for(database, &other, &name).await;
        timeout(SOON, held.release()).await.expect("a release was held up").unwrap();
        waiting.push(next);
    }
    for next in waiting {
        timeout(SOON, next.await.unwrap().unwrap().release()).await.expect("it was held up").unwrap();
    }
    assert!(notified(database).await > 0);
    assert!(renewed.is_held());
    timeout(SOON, renewed.release()).await.expect("it was held up").unwrap();
}
