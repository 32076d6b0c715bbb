//! Waiting for a connection of a pool, and why there is none.

use std::time::Duration;

use sqlx::{ConnectOptions, Connection, Pool};

use crate::database::LockDatabase;

/// How long a pool may take before it is looked for what keeps it.
pub(crate) const PATIENCE: Duration = Duration::from_millis(100);

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
