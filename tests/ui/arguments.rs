//! The macro's own messages, each at the word that is wrong. The functions are there all the same: nothing is said about
//! their callers.

#![allow(unused)]

use lock_db::{Error, distributed_lock};

#[distributed_lock("a", tll = "3s")]
async fn option() -> Result<(), Error> {
    Ok(())
}

#[distributed_lock("a", ttl = 30)]
async fn unit() -> Result<(), Error> {
    Ok(())
}

#[distributed_lock("a", tx = tx)]
async fn mode(tx: &mut sqlx::SqliteConnection) -> Result<(), Error> {
    Ok(())
}

#[distributed_lock]
async fn name() -> Result<(), Error> {
    Ok(())
}

#[distributed_lock("a")]
fn synchronous() -> Result<(), Error> {
    Ok(())
}

#[distributed_lock("a")]
async fn returns_nothing() {}

#[distributed_lock("a")]
struct Item {
    field: u8,
}

trait Method {
    #[distributed_lock("a")]
    async fn method(&self) -> Result<(), Error>;
}

async fn calls(tx: &mut sqlx::SqliteConnection, method: impl Method) -> Result<u8, Error> {
    option().await?;
    unit().await?;
    mode(tx).await?;
    name().await?;
    synchronous()?;
    returns_nothing().await;
    method.method().await?;
    Ok(Item { field: 1 }.field)
}

#[distributed_lock("a", lockAtMostFor = "10m")]
async fn as_elsewhere() -> Result<(), Error> {
    Ok(())
}

#[distributed_lock("a", wait = "-1s")]
async fn negative() -> Result<(), Error> {
    Ok(())
}

#[distributed_lock("a", at_least = "10m", at_most = "5m")]
async fn contradiction() -> Result<(), Error> {
    Ok(())
}

fn main() {}
