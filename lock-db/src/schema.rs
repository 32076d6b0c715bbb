//! The SQL that creates `distributed_lock`, for people who have a migration tool of their own.
//!
//! It is what [`Locks::migrate`](crate::Locks::migrate) applies, and what stands in the folder `migrations` of this
//! crate. Applying it twice, or by hand first and by `migrate` later, is harmless.
//!
//! sqlx keeps one ledger a database, `_sqlx_migrations`, and refuses to go on when it has applied what a folder does not have. So beside
//! migrations of your own copy the file into your folder, or keep two ledgers: see the README.

/// For PostgreSQL.
pub const POSTGRES: &str = include_str!("../migrations/postgres/20260101000000_distributed_lock.sql");

/// For MySQL and MariaDB.
pub const MYSQL: &str = include_str!("../migrations/mysql/20260101000000_distributed_lock.sql");

/// For SQLite.
pub const SQLITE: &str = include_str!("../migrations/sqlite/20260101000000_distributed_lock.sql");
