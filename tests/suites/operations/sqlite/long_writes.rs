//! Transactions that keep the write lock for longer than the TTL of a lease. Nobody can take the lease meanwhile, so it is
//! not lost: neither by its own guarded transaction nor by what others write.

use std::time::{Duration, Instant};

use lock_db::{Error, Lease, Locks};
use lock_tests::{SqliteFile, TestDatabase, eventually, migrated};
use sqlx::sqlite::SqliteJournalMode;
use sqlx::{Sqlite, SqlitePool};
use tokio::time::timeout;

use super::journals::{BOTH, PATIENCE, pool, write};

lock_tests::cases! {
    on sqlite:
    a_lease_outlives_its_own_guarded_transaction,
    a_lease_outlives_its_own_guarded_transaction_while_another_process_waits,
    work_in_a_guarded_transaction_is_not_dropped,
    a_lease_outlives_a_row_lock_of_its_own_process,
    a_lease_outlives_the_writes_of_others,
    a_lease_outlives_the_writes_of_others_while_another_process_waits,
    a_lease_ends_when_the_writes_of_others_prevent_reads,
    a_lease_taken_during_a_long_write_is_lost,
}

const TTL: Duration = Duration::from_secs(1);
/// How long the writes last.
const LONG: Duration = Duration::from_secs(3);

/// While something is written, the lease is held all the time.
async fn is_held_for_long(what: &str, lease: &Lease<Sqlite>) {
    let end = Instant::now() + LONG;
    while Instant::now() < end {
        assert!(lease.is_held(), "{what}: lost {:?} before the end of the write", end - Instant::now());
        // How the time passes is not what is tested.
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The lease is renewed again, and at last given up to who waits.
async fn goes_on(database: &SqliteFile, lease: Lease<Sqlite>, waiter: Option<Waiter>) {
    let expires = "SELECT expire_time FROM distributed_lock WHERE lock_name = 'lease'";
    let before = database.text(expires).await;
    eventually(PATIENCE, async || database.text(expires).await != before).await;
    assert!(lease.is_held());
    lease.begin().await.unwrap().commit().await.unwrap();
    let token = lease.fencing_token();
    assert!(waiter.as_ref().is_none_or(|waiter| !waiter.is_finished()), "two holders");
    lease.release().await.unwrap();
    if let Some(waiter) = waiter {
        let next = timeout(PATIENCE, waiter).await.unwrap().unwrap().unwrap();
        assert!(next.fencing_token() > token);
        next.release().await.unwrap();
    }
}

type Waiter = tokio::task::JoinHandle<Result<Lease<Sqlite>, Error>>;

/// Another process that wants the lease, and has begun to wait.
async fn waiter(database: &SqliteFile, pool: &SqlitePool) -> Waiter {
    let other = Locks::new(pool.clone());
    let waiter = tokio::spawn(async move {
        other.insert_lock("lease").ttl(TTL).wait(Duration::from_mins(5)).acquire().await
    });
    eventually(PATIENCE, async || {
        database.number("SELECT COUNT(*) FROM distributed_lock WHERE waiters <> ''").await == 1
    })
    .await;
    waiter
}

async fn begin(
    database: &SqliteFile,
    journal: SqliteJournalMode,
) -> (SqlitePool, Locks<Sqlite>, Lease<Sqlite>) {
    let pool = pool(database, journal).await;
    let locks = migrated(Locks::new(pool.clone())).await;
    let lease = locks.insert_lock("lease").ttl(TTL).wait(PATIENCE).acquire().await.unwrap();
    (pool, locks, lease)
}

async fn a_lease_outlives_its_own_guarded_transaction(database: &SqliteFile) {
    for journal in BOTH {
        let (_pool, locks, lease) = begin(database, journal).await;
        let mut transaction = lease.begin().await.unwrap();
        write(&mut transaction).await;
        is_held_for_long(&format!("{journal:?}"), &lease).await;
        transaction.commit().await.unwrap();
        goes_on(database, lease, None).await;
        locks.close().await;
    }
    assert_eq!(database.number("SELECT COUNT(*) FROM business").await, 2);
}

async fn a_lease_outlives_its_own_guarded_transaction_while_another_process_waits(database: &SqliteFile) {
    for journal in BOTH {
        let (pool, locks, lease) = begin(database, journal).await;
        let waiter = waiter(database, &pool).await;
        let mut transaction = lease.begin().await.unwrap();
        write(&mut transaction).await;
        is_held_for_long(&format!("{journal:?}"), &lease).await;
        transaction.commit().await.unwrap();
        goes_on(database, lease, Some(waiter)).await;
        locks.close().await;
    }
    assert_eq!(database.number("SELECT COUNT(*) FROM business").await, 2);
}

async fn work_in_a_guarded_transaction_is_not_dropped(database: &SqliteFile) {
    let pool = pool(database, SqliteJournalMode::Wal).await;
    let locks = migrated(Locks::new(pool.clone())).await;
    let ran = locks.insert_lock("lease").ttl(TTL).run(async |lease| {
        let mut transaction = lease.begin().await?;
        write(&mut transaction).await;
        is_held_for_long("run", lease).await;
        transaction.commit().await
    });
    ran.await.unwrap();
    assert_eq!(database.number("SELECT COUNT(*) FROM business").await, 1);
}

async fn a_lease_outlives_a_row_lock_of_its_own_process(database: &SqliteFile) {
    let (pool, locks, lease) = begin(database, SqliteJournalMode::Wal).await;
    let waiter = waiter(database, &pool).await;
    let mut guard = locks.row_lock("row").acquire().await.unwrap();
    write(&mut guard).await;
    is_held_for_long("row lock", &lease).await;
    guard.commit().await.unwrap();
    goes_on(database, lease, Some(waiter)).await;
}

async fn a_lease_outlives_the_writes_of_others(database: &SqliteFile) {
    for journal in BOTH {
        let (pool, locks, lease) = begin(database, journal).await;
        let mut writer = pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
        write(&mut writer).await;
        is_held_for_long(&format!("{journal:?}"), &lease).await;
        writer.commit().await.unwrap();
        goes_on(database, lease, None).await;
        locks.close().await;
    }
}

async fn a_lease_outlives_the_writes_of_others_while_another_process_waits(database: &SqliteFile) {
    for journal in BOTH {
        let (pool, locks, lease) = begin(database, journal).await;
        let waiter = waiter(database, &pool).await;
        let mut writer = pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
        write(&mut writer).await;
        is_held_for_long(&format!("{journal:?}"), &lease).await;
        writer.commit().await.unwrap();
        goes_on(database, lease, Some(waiter)).await;
        locks.close().await;
    }
}

/// With a rollback journal such a writer keeps the holder from seeing that nobody has given notice. So the lease is over for its holder, in
/// time, and then for everybody.
async fn a_lease_ends_when_the_writes_of_others_prevent_reads(database: &SqliteFile) {
    let (pool, locks, lease) = begin(database, SqliteJournalMode::Delete).await;
    let waiter = waiter(database, &pool).await;
    let mut writer = pool.begin_with("BEGIN EXCLUSIVE").await.unwrap();
    write(&mut writer).await;
    timeout(PATIENCE, lease.lost()).await.unwrap();
    assert!(!waiter.is_finished());
    writer.commit().await.unwrap();
    let next = timeout(PATIENCE, waiter).await.unwrap().unwrap().unwrap();
    assert!(next.fencing_token() > lease.fencing_token());
    next.release().await.unwrap();
    locks.close().await;
}

/// Held is what the row says. When it says something else after a long write, the lease is over.
async fn a_lease_taken_during_a_long_write_is_lost(database: &SqliteFile) {
    let (pool, _locks, lease) = begin(database, SqliteJournalMode::Wal).await;
    let mut writer = pool.begin_with("BEGIN IMMEDIATE").await.unwrap();
    sqlx::raw_sql("UPDATE distributed_lock SET secret_key = 'another', fencing_token = fencing_token + 1")
        .execute(&mut *writer)
        .await
        .unwrap();
    writer.commit().await.unwrap();
    timeout(PATIENCE, lease.lost()).await.expect("the lease was taken");
    assert!(!lease.is_held());
}
