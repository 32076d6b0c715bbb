//! LISTEN on a private connection, on which other statements run as well.
//!
//! Where a notification never comes (behind a pooler in transaction mode, say), nothing is lost: it only shortens pauses.

use sqlx::postgres::{PgConnection, PgListener};
use sqlx::{Acquire, Pool, Postgres};

/// The channel of a session. `RELEASE` and its like make the same name out of what stands in the queue.
fn channel(listener: u32) -> String {
    format!("lock_db_{listener:08x}")
}

/// A new connection, made like those of `pool`, that can listen.
pub(super) async fn connect(pool: &Pool<Postgres>) -> sqlx::Result<PgListener> {
    // A pool of its own: dropped, the connection goes back into it, which may take as long as a dead network takes to be
    // noticed.
    let options = (*pool.connect_options()).clone();
    let own = pool.options().clone().max_connections(1).connect_lazy_with(options);
    let mut listening = PgListener::connect_with(&own).await?;
    listening.ignore_pool_close_event(true);
    listening.eager_reconnect(false);
    Ok(listening)
}

/// Hears what is sent to this listener from now on.
pub(super) async fn listen(listening: &mut PgListener, listener: u32) -> sqlx::Result<()> {
    listening.listen(&channel(listener)).await
}

pub(super) async fn connection(listening: &mut PgListener) -> sqlx::Result<&mut PgConnection> {
    listening.acquire().await
}

/// Waits for a call, and answers the id of the row that is free. Cancel safe, as `PgListener::try_recv` is.
pub(super) async fn called(listening: &mut PgListener) -> sqlx::Result<i64> {
    loop {
        let Some(notification) = listening.try_recv().await? else {
            return Err(sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into()));
        };
        if let Ok(id) = notification.payload().parse() {
            return Ok(id);
        }
    }
}
