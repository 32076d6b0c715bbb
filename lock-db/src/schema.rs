//! The SQL that creates `distributed_lock`, for applications with a migration tool of their own.
//!
//! [`Locks::migrate`](crate::Locks::migrate) applies the same SQL. The files are in the folder
//! `migrations` of this crate. It is safe to apply them twice, or by hand first and by `migrate`
//! later.
//!
//! sqlx keeps one ledger for each database, `_sqlx_migrations`, and fails when the ledger lists a
//! migration that is missing from the folder. To use these files beside other sqlx migrations, copy
//! them into that folder, or keep two ledgers: see `docs/operating.md`.

/// The schema for PostgreSQL.
pub const POSTGRES: &str = include_str!("../migrations/postgres/20260101000000_distributed_lock.sql");

/// The schema for MySQL and MariaDB.
pub const MYSQL: &str = include_str!("../migrations/mysql/20260101000000_distributed_lock.sql");

/// The schema for SQLite.
pub const SQLITE: &str = include_str!("../migrations/sqlite/20260101000000_distributed_lock.sql");
