//! Who holds a row lock, as far as the server tells.

use chrono::{DateTime, Utc};

/// Who holds a row lock. The table can't show it: what the holder has written becomes visible with its
/// commit. Where the server shows which transaction has a row locked, it is looked up there.
///
/// - PostgreSQL shows it to every role. Address and times of other roles' sessions are shown to
///   members of `pg_read_all_stats`.
/// - MySQL shows it to accounts with the privileges PROCESS, and SELECT on
///   `performance_schema.data_locks` and `performance_schema.threads`.
/// - MariaDB shows it to accounts with the privilege PROCESS, and only while another transaction waits
///   for the row.
/// - Both refresh what they show only when it was not read for a tenth of a second.
/// - SQLite shows nothing. Its one writer is the holder of every row lock.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize), serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum RowHolder {
    /// No transaction had the row locked.
    Unlocked,
    /// This session of the server.
    Session(DatabaseSession),
    /// The server does not tell. In words for people: why, and which right is missing.
    Unknown(String),
}

/// A session of the database server, which has a row locked.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct DatabaseSession {
    /// The process id of the backend on PostgreSQL, the connection id on MySQL and MariaDB. It is what
    /// `pg_terminate_backend` and `KILL` take.
    pub id: i64,
    /// The role or account.
    pub user: String,
    /// The address of the client, if the server shows it.
    pub host: Option<String>,
    /// `application_name`, on PostgreSQL.
    pub application_name: Option<String>,
    /// When its transaction began, by the database's clock, if the server shows it.
    pub since: Option<DateTime<Utc>>,
}
