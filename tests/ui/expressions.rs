//! Expressions of the wrong type.

use lock_db::{Error, distributed_lock};

struct Order;

#[distributed_lock(order)]
async fn name(order: Order) -> Result<Order, Error> {
    Ok(order)
}

#[distributed_lock("a", ttl = order_id * 2)]
async fn duration(order_id: i64) -> Result<i64, Error> {
    Ok(order_id)
}

#[distributed_lock("a", mode = row, tx = order_id)]
async fn transaction(order_id: i64) -> Result<i64, Error> {
    Ok(order_id)
}

struct Shop;

impl Shop {
    #[distributed_lock("a", locks = self.locks)]
    async fn locks(&self) -> Result<(), Error> {
        Ok(())
    }
}

fn main() {}
