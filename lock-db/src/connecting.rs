//! Waiting for a connection of a pool, and why there is none.

use std::time::Duration;

use sqlx::{ConnectOptions, Connection, Pool};
use tokio::select;

use crate::clock::sleep;
use crate::database::LockDatabase;

/// How long a pool may take before it is looked for what keeps it.
pub(crate) const PATIENCE: Duration = Duration::from_millis(100);

/// Waits for a connection that a private pool makes. A pool tries again and again when a server can't be reached, and tells of nothing
/// but the time in the end; so when it takes long, its server is asked why.
pub(crate) async fn telling_why<DB: LockDatabase, T>(
    pool: &Pool<DB>,
    waiting: impl Future<Output = sqlx::Result<T>>,
) -> sqlx::Result<T> {
    let refused = async {
        sleep(PATIENCE).await;
        refusal(pool).await
    };
    select! {
        biased;
        connected = waiting => connected,
        error = refused => Err(error),
    }
}

/// Resolves when a connection that is made beside the pool is refused.
pub(crate) async fn refusal<DB: LockDatabase>(pool: &Pool<DB>) -> sqlx::Error {
    match pool.connect_options().connect().await {
        Err(error) => return error,
        // A hook of the pool, then, or the server was only slow.
        Ok(connection) => drop(connection.close().await),
    }
    std::future::pending().await
}

/// Whether the pool can make no more connections, and has none to spare. Those that it is making count as lent.
pub(crate) fn is_lent_out<DB: LockDatabase>(pool: &Pool<DB>) -> bool {
    pool.num_idle() == 0 && pool.size() >= pool.options().get_max_connections()
}
