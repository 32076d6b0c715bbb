//! Guards and transactions that meet another table than that of the locks: on another server, in a database without it, or a temporary one.

use lock_db::{Kind, Locks};
use lock_tests::{AtEnd, Backend, MariaDbServer, MySqlServer, TestDatabase, migrated, pool};

use super::elsewhere::{Ask, BOTH_KINDS, ask_in, is_free};
use super::other_databases::guards_in_a_database_without_the_table_are_refused;

lock_tests::cases! {
    on postgres:
    guards_in_a_database_without_the_table_are_refused;

    on mysql:
    a_transaction_on_another_server_is_refused,
    a_guard_never_reads_a_temporary_table,
}

const SHADOW_ON_MYSQL: &str = "CREATE TEMPORARY TABLE distributed_lock LIKE shape";

/// In a transaction of the lease it can't be seen that the table is another one, but nothing is committed.
async fn a_guard_never_reads_a_temporary_table<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    database.run("CREATE TABLE business (n INTEGER)").await;
    let lease = locks.insert_lock("lease").acquire().await.unwrap();
    // A copy, with the row of the lease as it was.
    let shadow = format!("{SHADOW_ON_MYSQL}; INSERT INTO distributed_lock SELECT * FROM shape");
    database.run("CREATE TABLE shape LIKE distributed_lock").await;
    database.run("INSERT INTO shape SELECT * FROM distributed_lock").await;
    let mut transaction = lease.begin().await.unwrap();
    T::Database::run(&mut transaction, &shadow).await.unwrap();
    T::Database::run(&mut transaction, "INSERT INTO business VALUES (1)").await.unwrap();
    // Somebody else has it now.
    database
        .run("UPDATE distributed_lock SET secret_key = 'another', fencing_token = fencing_token + 1")
        .await;
    let committed = transaction.commit().await;
    assert!(committed.is_err(), "committed under a lease that another has");
    assert_eq!(database.number("SELECT COUNT(*) FROM business").await, 0);
}

/// With a database of the same name, as a copy for tests or another region has it.
async fn a_transaction_on_another_server_is_refused(database: &MySqlServer) {
    let there = MariaDbServer::create().await;
    let name = database.text("SELECT DATABASE()").await;
    let _at_end = AtEnd::<sqlx::MySql>::new(there.url(), [format!("DROP DATABASE {name}")]);
    there.run(&format!("CREATE DATABASE {name}")).await;
    let (base, _) = there.url().rsplit_once('/').unwrap();
    let pool = pool::<sqlx::MySql>(&format!("{base}/{name}"), 2).await;
    migrated(Locks::new(pool.clone())).await.close().await;
    let locks = database.locks().await;
    for kind in BOTH_KINDS {
        let mut transaction = pool.begin().await.unwrap();
        let name = format!("{kind:?}");
        // Its row is made here, and may be there by chance.
        let granted = match ask_in(&locks, kind, &name, Ask::Acquire, &mut transaction).await {
            Err(lock_db::Error::Serialization { .. }) => {
                sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
                    "INSERT INTO distributed_lock (lock_name, lock_kind) VALUES ('{name}', '{}')",
                    if kind == Kind::Row { "row" } else { "insert" },
                )))
                .execute(&pool)
                .await
                .unwrap();
                transaction.rollback().await.unwrap();
                transaction = pool.begin().await.unwrap();
                ask_in(&locks, kind, &name, Ask::Acquire, &mut transaction).await
            }
            granted => granted,
        };
        let is_refused = matches!(granted, Err(lock_db::Error::ForeignTransaction { .. }));
        assert!(is_refused, "{kind:?}: {granted:?}, and free: {}", is_free(&locks, kind, &name).await);
        transaction.rollback().await.unwrap();
    }
}
