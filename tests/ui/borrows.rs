//! What the borrow checker has to say.

use lock_db::{Error, distributed_lock};
use sqlx::{Sqlite, Transaction};

#[distributed_lock("a", mode = row, tx = tx)]
async fn not_mutable(tx: Transaction<'static, Sqlite>) -> Result<(), Error> {
    drop(tx);
    Ok(())
}

#[distributed_lock("a")]
async fn too_short(text: &str) -> Result<&'static str, Error> {
    Ok(text)
}

fn main() {}
