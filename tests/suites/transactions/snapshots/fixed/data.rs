//! What the locks protect in the fixed cases: a row of `counter` for each cell.

use lock_tests::{Backend, TestDatabase};

use crate::snapshots::level::let_writers_commit_beside_readers;

pub async fn make_tables<T: TestDatabase>(database: &T) {
    let_writers_commit_beside_readers(database).await;
    database.run("CREATE TABLE counter (id BIGINT PRIMARY KEY, n BIGINT NOT NULL)").await;
    database.run("CREATE TABLE notes (id BIGINT PRIMARY KEY)").await;
    database.run("INSERT INTO notes VALUES (1)").await;
}

pub async fn make_counter<T: TestDatabase>(database: &T, id: i64) {
    database.run(&format!("INSERT INTO counter VALUES ({id}, 0)")).await;
}

/// What is committed.
pub async fn committed<T: TestDatabase>(database: &T, id: i64) -> i64 {
    database.number(&format!("SELECT n FROM counter WHERE id = {id}")).await
}

pub async fn read<DB: Backend>(connection: &mut DB::Connection, id: i64) -> sqlx::Result<i64> {
    let n = DB::find_number(connection, &format!("SELECT n FROM counter WHERE id = {id}")).await?;
    n.ok_or(sqlx::Error::RowNotFound)
}

pub async fn write<DB: Backend>(connection: &mut DB::Connection, id: i64, n: i64) -> sqlx::Result<()> {
    DB::run(connection, &format!("UPDATE counter SET n = {n} WHERE id = {id}")).await.map(drop)
}

/// In one statement, which is right whatever the snapshot.
pub async fn increment<DB: Backend>(connection: &mut DB::Connection, id: i64) -> sqlx::Result<()> {
    DB::run(connection, &format!("UPDATE counter SET n = n + 1 WHERE id = {id}")).await.map(drop)
}

/// Reads something else, which fixes the snapshot but locks no row of `counter`.
pub async fn read_notes<DB: Backend>(connection: &mut DB::Connection) -> sqlx::Result<()> {
    DB::find_number(connection, "SELECT COUNT(*) FROM notes").await.map(drop)
}
