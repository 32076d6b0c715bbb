//! Mistakes in a body are where they would be without the attribute.

use lock_db::{Error, distributed_lock};

#[distributed_lock("a")]
async fn no_end(order_id: i64) -> Result<i64, Error> {
    drop(order_id);
}

#[distributed_lock("a")]
async fn wrong_end() -> Result<i64, Error> {
    1
}

#[distributed_lock("a")]
async fn wrong_return(order_id: i64) -> Result<i64, Error> {
    if order_id > 0 {
        return order_id;
    }
    Ok(order_id)
}

#[distributed_lock("a")]
async fn no_conversion(text: &str) -> Result<i64, Error> {
    Ok(text.parse()?)
}

fn main() {}
