//! A return type that has no room for the lock's error: one message, at the type.

use lock_db::distributed_lock;

struct ShopError;

#[distributed_lock("a")]
async fn no_result() -> Option<i64> {
    Some(1)
}

#[distributed_lock("a")]
async fn no_conversion(order_id: i64) -> Result<i64, ShopError> {
    if order_id > 0 {
        return Err(ShopError);
    }
    Ok(order_id)
}

#[distributed_lock("a", mode = row, tx = tx)]
async fn in_transaction(tx: &mut sqlx::SqliteConnection) -> u8 {
    let _ = tx;
    1
}

#[distributed_lock("a")]
async fn unnamed() -> Result<impl Send, ShopError> {
    Ok(1)
}

fn main() {}
