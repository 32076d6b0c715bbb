//! Arguments in a name: shown inside the text.

use lock_db::{Error, distributed_lock};

struct Order;

#[distributed_lock("order:{ordr_id}")]
async fn misspelled(order_id: i64) -> Result<i64, Error> {
    Ok(order_id)
}

#[distributed_lock("order:{order}")]
async fn not_shown(order: Order) -> Result<Order, Error> {
    Ok(order)
}

fn main() {}
