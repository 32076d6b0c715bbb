//! Databases that can't keep locks.

use lock_db::Locks;

struct Oracle;

fn of_another_database(_locks: &Locks<Oracle>) {}

fn of_any_database_of_sqlx<DB: sqlx::Database>(_locks: &Locks<DB>) {}

fn main() {}
