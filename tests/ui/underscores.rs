//! `let _ = …` of a guard gives the lock back at once. The compiler says so with this lint, which is off unless a crate
//! switches it on.

#![deny(let_underscore_drop)]

use lock_db::{Error, Locks};
use sqlx::Sqlite;

async fn nothing_is_locked(locks: &Locks<Sqlite>) -> Result<(), Error> {
    let _ = locks.insert_lock("a").acquire().await?;
    let _ = locks.insert_lock("a").try_acquire().await?;
    let _ = locks.insert_locks(["a", "b"]).acquire().await?;
    let _ = locks.row_lock("b").acquire().await?;
    Ok(())
}

/// With what is on by default.
#[deny(unused_must_use)]
async fn nor_here(locks: &Locks<Sqlite>) -> Result<(), Error> {
    locks.insert_lock("a").acquire().await?;
    locks.insert_locks(["a", "b"]).acquire().await?;
    locks.row_lock("b").acquire().await?;
    let lease = locks.insert_lock("a").acquire().await?;
    lease.begin().await?;
    Ok(())
}

fn main() {}
