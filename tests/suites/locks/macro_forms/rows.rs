//! Row locks: in a transaction of their own, and in one of the caller.

use lock_db::{Locks, distributed_lock};
use lock_tests::{SqliteFile, TestDatabase, is_taken};
use sqlx::{Connection, Sqlite, SqliteConnection, Transaction};

use super::Answer;
use super::methods::{Dynamic, Shop};

lock_tests::cases! {
    without a database:
    row_locks (current_thread),
}

pub(crate) async fn is_row_locked(locks: &Locks<Sqlite>, name: &str) -> bool {
    is_taken::<SqliteFile, _>(locks.row_lock(name).try_acquire().await)
}

pub(crate) async fn insert(connection: &mut SqliteConnection, number: i64) {
    let insert = sqlx::query("INSERT INTO number (number) VALUES (?)").bind(number);
    insert.execute(connection).await.expect("inserts");
}

#[distributed_lock("row:{name}", mode = row)]
async fn row(locks: &Locks<Sqlite>, name: &str) -> Answer<bool> {
    let _ = name;
    Ok(is_row_locked(locks, "row:a").await)
}

#[distributed_lock("row:{number}", mode = row, tx = tx, wait = "5s")]
async fn row_in_transaction(tx: &mut Transaction<'_, Sqlite>, number: i64) -> Answer {
    insert(tx, number).await;
    Ok(number)
}

#[distributed_lock("row:owned", mode = row, tx = tx)]
async fn row_in_owned_transaction(mut tx: Transaction<'static, Sqlite>) -> Answer<()> {
    insert(&mut tx, 2).await;
    tx.commit().await.expect("commits");
    Ok(())
}

#[distributed_lock("row:connection", mode = row, tx = connection)]
async fn row_on_connection(connection: &mut SqliteConnection) -> Answer<&mut SqliteConnection> {
    insert(connection, 3).await;
    Ok(connection)
}

struct Work {
    locks: Locks<Sqlite>,
    transaction: Transaction<'static, Sqlite>,
}

impl Work {
    #[distributed_lock("row:field", mode = row, tx = self.transaction, locks = self.locks)]
    async fn row_in_field(&mut self) -> Answer<()> {
        insert(&mut self.transaction, 4).await;
        Ok(())
    }
}

async fn row_locks() {
    let database = SqliteFile::create().await;
    database.run("CREATE TABLE number (number BIGINT NOT NULL)").await;
    let (pool, locks) = (database.pool(4).await, database.locks().await);
    let case = async move {
        assert!(row(&locks, "a").await?);
        assert!(!is_row_locked(&locks, "row:a").await);

        let mut transaction = pool.begin().await.expect("begins");
        assert_eq!(row_in_transaction(&mut transaction, 1).await?, 1);
        transaction.commit().await.expect("commits");

        row_in_owned_transaction(pool.begin().await.expect("begins")).await?;

        let mut connection = pool.acquire().await.expect("connects");
        let mut transaction = connection.begin().await.expect("begins");
        insert(row_on_connection(&mut transaction).await?, 3).await;
        transaction.rollback().await.expect("rolls back");
        drop(connection);

        let transaction = pool.begin().await.expect("begins");
        let mut work = Work { locks: locks.clone(), transaction };
        work.row_in_field().await?;
        work.transaction.commit().await.expect("commits");

        let shop = Shop { locks, city: "Ulm".into(), sold: 1 };
        shop.in_transaction(pool.begin().await.expect("begins")).await
    };
    let locks = database.locks().await;
    tokio::spawn(locks.scope(case)).await.expect("no panic").expect("succeeds");
    assert_eq!(database.number("SELECT sum(number) FROM number").await, 1 + 2 + 4 + 5);
}
