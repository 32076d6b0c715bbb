//! Return types that can't say that the body did not run: told at the type, in one message for each thing that it can't say.

use lock_db::{Error, distributed_lock};

struct ShopError;

#[distributed_lock("a", skip)]
async fn a_number() -> Result<u64, Error> {
    Ok(1)
}

#[distributed_lock("a", skip)]
async fn yes_or_no() -> Result<bool, Error> {
    Ok(true)
}

#[distributed_lock("a", skip)]
async fn no_result() -> Option<u64> {
    Some(1)
}

#[distributed_lock("a", skip)]
async fn no_conversion() -> Result<Option<u64>, ShopError> {
    Ok(Some(1))
}

fn main() {}
