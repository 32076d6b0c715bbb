//! Mistakes with the guard that the body works with.

use lock_db::{Error, Locks, distributed_lock};
use sqlx::Sqlite;

#[distributed_lock("a", mode = row, lease = guard, locks = locks)]
async fn kept_for_later(locks: &Locks<Sqlite>) -> Result<lock_db::RowGuard<Sqlite>, Error> {
    Ok(*guard)
}

#[distributed_lock("a", lease = lease)]
async fn of_no_known_database() -> Result<(), Error> {
    lease.begin().await?.commit().await
}

#[distributed_lock("a", lease = lease, locks = locks)]
async fn kept(locks: &Locks<Sqlite>) -> Result<&lock_db::Lease<Sqlite>, Error> {
    Ok(lease)
}

#[distributed_lock("a", mode = row, tx = tx, lease = lease, ttl = "3s")]
async fn excluded(tx: &mut sqlx::SqliteConnection) -> Result<(), Error> {
    let _ = tx;
    Ok(())
}

fn main() {}
