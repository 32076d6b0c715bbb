//! The write-ahead log and the rollback journal: transactions that read beside those that write.

use std::time::Duration;

use lock_db::{Error, Locks};
use lock_tests::{SqliteFile, TestDatabase, eventually, migrated};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions};
use sqlx::{Connection, Executor, SqlitePool, SqliteTransaction};
use tokio::time::timeout;

lock_tests::cases! {
    on sqlite:
    check_recommends_the_write_ahead_log,
    a_reader_delays_a_lock_only_while_it_reads,
    a_transaction_that_reads_lets_the_holder_commit,
    a_commit_that_a_reader_prevents_is_retryable,
    a_write_since_the_first_read_is_reported_immediately,
    a_write_since_the_first_read_is_reported_by_guards,
    waiting_after_a_read_does_not_spin,
}

pub const PATIENCE: Duration = Duration::from_secs(20);
/// Nobody waits for so long.
const LONG: Duration = Duration::from_mins(10);
pub const BOTH: [SqliteJournalMode; 2] = [SqliteJournalMode::Delete, SqliteJournalMode::Wal];

/// The application's pool, with the journal as it sets it, and a table of its own.
pub async fn pool(database: &SqliteFile, journal: SqliteJournalMode) -> SqlitePool {
    let options: SqliteConnectOptions = database.url().parse().unwrap();
    let options = options.journal_mode(journal).busy_timeout(PATIENCE);
    let pool = SqlitePoolOptions::new().max_connections(4).connect_with(options).await.unwrap();
    pool.execute("CREATE TABLE IF NOT EXISTS business (n)").await.unwrap();
    pool
}

async fn read(transaction: &mut SqliteTransaction<'_>) {
    sqlx::query("SELECT COUNT(*) FROM business").fetch_one(&mut **transaction).await.unwrap();
}

pub async fn write(transaction: &mut sqlx::SqliteConnection) {
    transaction.execute("INSERT INTO business VALUES (1)").await.unwrap();
}

async fn check_recommends_the_write_ahead_log(database: &SqliteFile) {
    use SqliteJournalMode::{Delete, Memory, Persist, Truncate, Wal};
    for journal in [Delete, Truncate, Persist, Memory, Wal] {
        let locks = migrated(Locks::new(pool(database, journal).await)).await;
        let report = locks.check().await.unwrap();
        let recommends = report.warnings().iter().any(|warning| warning.contains("WAL"));
        assert_eq!(recommends, !matches!(journal, Wal), "{journal:?}: {report:?}");
        locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
        locks.close().await;
    }
}

async fn a_reader_delays_a_lock_only_while_it_reads(database: &SqliteFile) {
    for journal in BOTH {
        let pool = pool(database, journal).await;
        let (locks, other) = (migrated(Locks::new(pool.clone())).await, Locks::new(pool.clone()));
        let held = locks.insert_lock("held").acquire().await.unwrap();
        let mut reader = pool.begin().await.unwrap();
        read(&mut reader).await;
        // Seen to be held, whatever the reader does.
        assert!(other.insert_lock("held").try_acquire().await.unwrap().is_none());
        // With a rollback journal nobody can commit beside a reader. That is no holder.
        match other.insert_lock("free").try_acquire().await {
            Ok(lease) => lease.expect("nobody holds it").release().await.unwrap(),
            Err(error) => {
                assert!(matches!(journal, SqliteJournalMode::Delete), "{error:?}");
                assert!(
                    matches!(
                        error,
                        Error::Database { .. } | Error::Unreachable { .. } | Error::Refused { .. }
                    ) && error.is_retryable(),
                    "{error:?}"
                );
            }
        }
        let waiter = tokio::spawn({
            let other = other.clone();
            async move { other.insert_lock("later").wait(LONG).acquire().await }
        });
        let releaser = tokio::spawn(held.release());
        read(&mut reader).await;
        reader.commit().await.unwrap();
        timeout(PATIENCE, waiter).await.unwrap().unwrap().unwrap().release().await.unwrap();
        timeout(PATIENCE, releaser).await.unwrap().unwrap().unwrap();
        locks.close().await;
        other.close().await;
    }
}

/// It asks for the lock while another transaction holds it. With a rollback journal the two would wait for each other: the
/// holder's commit for the reader's end.
async fn a_transaction_that_reads_lets_the_holder_commit(database: &SqliteFile) {
    for journal in BOTH {
        let pool = pool(database, journal).await;
        let locks = migrated(Locks::new(pool.clone())).await;
        let before = database.number("SELECT COUNT(*) FROM business").await;
        let mut reader = pool.begin().await.unwrap();
        read(&mut reader).await;
        let mut guard = Locks::new(pool.clone()).row_lock("a").acquire().await.unwrap();
        write(&mut guard).await;
        let waiter = tokio::spawn({
            let locks = locks.clone();
            async move {
                let refused = locks.row_lock("a").wait(LONG).acquire_in(&mut reader).await;
                // As the documentation asks.
                reader.rollback().await.unwrap();
                refused
            }
        });
        timeout(PATIENCE, guard.commit()).await.unwrap().unwrap();
        let refused = timeout(PATIENCE, waiter).await.unwrap().unwrap();
        assert!(matches!(refused, Err(Error::Serialization { .. })), "{journal:?}: {refused:?}");
        assert_eq!(database.number("SELECT COUNT(*) FROM business").await, before + 1);
        // Run again from its beginning, it gets the lock.
        let mut again = pool.begin().await.unwrap();
        locks.row_lock("a").wait(PATIENCE).acquire_in(&mut again).await.unwrap();
        again.commit().await.unwrap();
        locks.close().await;
    }
}

/// With a rollback journal, a COMMIT can't write beside a reader. Nothing is stored then.
async fn a_commit_that_a_reader_prevents_is_retryable(database: &SqliteFile) {
    let options: SqliteConnectOptions = database.url().parse().unwrap();
    let options = options.journal_mode(SqliteJournalMode::Delete).busy_timeout(Duration::from_millis(50));
    let pool = SqlitePoolOptions::new().max_connections(4).connect_with(options).await.unwrap();
    pool.execute("CREATE TABLE business (n)").await.unwrap();
    let locks = migrated(Locks::new(pool.clone())).await;
    let lease = locks.insert_lock("lease").ttl(LONG).acquire().await.unwrap();
    for is_row_lock in [false, true] {
        let mut reader = pool.acquire().await.unwrap();
        let commit = async |beside_reader: &mut Option<SqliteTransaction<'_>>| {
            if is_row_lock {
                let mut guard = locks.row_lock("row").wait(PATIENCE).acquire().await?;
                write(&mut guard).await;
                if let Some(reader) = beside_reader {
                    read(reader).await;
                }
                guard.commit().await
            } else {
                let mut transaction = lease.begin().await?;
                write(&mut transaction).await;
                if let Some(reader) = beside_reader {
                    read(reader).await;
                }
                transaction.commit().await
            }
        };
        let before = database.number("SELECT COUNT(*) FROM business").await;
        let mut reading = Some(reader.begin().await.unwrap());
        let error = commit(&mut reading).await.unwrap_err();
        assert!(matches!(error, Error::Timeout { .. }) && error.is_retryable(), "{error:?}");
        reading.unwrap().rollback().await.unwrap();
        assert_eq!(database.number("SELECT COUNT(*) FROM business").await, before);
        commit(&mut None).await.unwrap();
        assert_eq!(database.number("SELECT COUNT(*) FROM business").await, before + 1);
    }
    lease.release().await.unwrap();
}

/// A rollback journal lets nobody commit beside a reader, so this is of the write-ahead log.
async fn a_write_since_the_first_read_is_reported_immediately(database: &SqliteFile) {
    let pool = pool(database, SqliteJournalMode::Wal).await;
    let locks = migrated(Locks::new(pool.clone())).await;
    for way in 0..5 {
        let mut transaction = pool.begin().await.unwrap();
        read(&mut transaction).await;
        write(&mut pool.acquire().await.unwrap()).await;
        let transaction_ref = &mut *transaction;
        let refused = timeout(PATIENCE, async {
            match way {
                0 => locks.row_lock("row").wait(LONG).acquire_in(transaction_ref).await.map(drop),
                1 => locks.row_lock("row").try_acquire_in(transaction_ref).await.map(drop),
                2 => locks.insert_lock("lease").wait(LONG).acquire_in(transaction_ref).await.map(drop),
                3 => locks.insert_lock("lease").try_acquire_in(transaction_ref).await.map(drop),
                _ => locks.row_locks(["1", "2"]).wait(LONG).acquire_in(transaction_ref).await.map(drop),
            }
        });
        let refused = refused.await.expect("it waits for what never comes");
        assert!(matches!(refused, Err(Error::Serialization { .. })), "{way}: {refused:?}");
        // It can't write any more; but a control of the same age, without locks, could not either.
        assert!(transaction.execute("INSERT INTO business VALUES (2)").await.is_err());
        transaction.rollback().await.unwrap();
    }
    assert_eq!(database.number("SELECT COUNT(*) FROM business WHERE n = 2").await, 0);
}

async fn a_write_since_the_first_read_is_reported_by_guards(database: &SqliteFile) {
    let pool = pool(database, SqliteJournalMode::Wal).await;
    let locks = migrated(Locks::new(pool.clone())).await;
    let lease = locks.insert_lock("lease").acquire().await.unwrap();
    for releases in [false, true] {
        let mut transaction = pool.begin().await.unwrap();
        read(&mut transaction).await;
        write(&mut pool.acquire().await.unwrap()).await;
        let refused = timeout(PATIENCE, async {
            match releases {
                false => lease.verify_in(&mut transaction).await,
                true => lease.release_in(&mut transaction).await,
            }
        });
        let refused = refused.await.expect("it waits for what never comes");
        assert!(matches!(refused, Err(Error::Serialization { .. })), "{releases}: {refused:?}");
        transaction.rollback().await.unwrap();
        // The lease goes on.
        eventually(PATIENCE, async || lease.is_held()).await;
    }
    lease.begin().await.unwrap().commit().await.unwrap();
    lease.release().await.unwrap();
}

async fn waiting_after_a_read_does_not_spin(database: &SqliteFile) {
    super::statements::count_statements(database).await;
}
