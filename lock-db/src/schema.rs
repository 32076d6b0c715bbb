//! The SQL that creates `distributed_lock`, for people who have a migration tool of their own.
//!
//! It is what [`Locks::migrate`](crate::Locks::migrate) applies, and what stands in the folder `migrations` of this
//! crate, where sqlx-cli can be pointed at it. Applying it twice, or by hand first and by `migrate` later, is harmless.

/// For PostgreSQL.
pub const POSTGRES: &str = include_str!("../migrations/postgres/0001_distributed_lock.sql");

/// For MySQL and MariaDB.
pub const MYSQL: &str = include_str!("../migrations/mysql/0001_distributed_lock.sql");

/// For SQLite.
pub const SQLITE: &str = include_str!("../migrations/sqlite/0001_distributed_lock.sql");
