//! Databases that can't keep locks.

use lock_db::Locks;

struct Oracle;

fn of_another_database(_locks: &Locks<Oracle>) {}

fn of_any_database_of_sqlx<DB: sqlx::Database>(pool: sqlx::Pool<DB>) {
    let _locks = Locks::new(pool);
}

fn main() {}
