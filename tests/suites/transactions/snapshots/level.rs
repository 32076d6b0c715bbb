//! Isolation levels, and transactions that begin at one of them.

use std::fmt;

use lock_tests::{Backend, TestDatabase};
use sqlx::{AssertSqlSafe, Pool, Transaction};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    ReadUncommitted,
    ReadCommitted,
    RepeatableRead,
    Serializable,
    /// The only one of SQLite (in WAL mode): one snapshot, and no write on top of an old one.
    Sqlite,
}

impl Level {
    /// All levels of a database.
    pub fn all<T: TestDatabase>() -> &'static [Self] {
        match T::NAME {
            "postgres" => &[Self::ReadCommitted, Self::RepeatableRead, Self::Serializable],
            "sqlite" => &[Self::Sqlite],
            _ => &[Self::ReadUncommitted, Self::ReadCommitted, Self::RepeatableRead, Self::Serializable],
        }
    }

    /// Whether each statement sees what is committed when it begins.
    pub fn has_a_snapshot_for_each_statement(self) -> bool {
        matches!(self, Self::ReadUncommitted | Self::ReadCommitted)
    }

    /// Whether every read locks what it reads, so that what was read stays as it was read.
    pub fn locks_what_it_reads<T: TestDatabase>(self) -> bool {
        self == Self::Serializable && T::NAME != "postgres"
    }
}

impl fmt::Display for Level {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::ReadUncommitted => "READ UNCOMMITTED",
            Self::ReadCommitted => "READ COMMITTED",
            Self::RepeatableRead => "REPEATABLE READ",
            Self::Serializable => "SERIALIZABLE",
            Self::Sqlite => "SQLITE",
        })
    }
}

/// Begins a transaction. It has no snapshot before its first statement.
pub async fn begin<DB: Backend>(pool: &Pool<DB>, level: Level) -> sqlx::Result<Transaction<'static, DB>> {
    match DB::NAME {
        "PostgreSQL" => pool.begin_with(AssertSqlSafe(format!("BEGIN ISOLATION LEVEL {level}"))).await,
        "SQLite" => pool.begin().await,
        _ => {
            let begin = format!("SET TRANSACTION ISOLATION LEVEL {level}; START TRANSACTION");
            pool.begin_with(AssertSqlSafe(begin)).await
        }
    }
}

/// The level of the transactions that others begin on this connection.
pub async fn set_level_of_session<DB: Backend>(
    connection: &mut DB::Connection,
    level: Level,
) -> sqlx::Result<()> {
    let scope = match DB::NAME {
        "PostgreSQL" => "CHARACTERISTICS AS TRANSACTION",
        "SQLite" => return Ok(()),
        _ => "TRANSACTION",
    };
    DB::run(connection, &format!("SET SESSION {scope} ISOLATION LEVEL {level}")).await.map(drop)
}

/// In the usual journal mode of SQLite a transaction that has read something keeps all others from committing.
pub async fn let_writers_commit_beside_readers<T: TestDatabase>(database: &T) {
    if T::NAME == "sqlite" {
        database.run("PRAGMA journal_mode = WAL").await;
    }
}
