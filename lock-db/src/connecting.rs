//! Finds out why a pool has no connection.

use std::time::Duration;

use sqlx::{ConnectOptions, Connection, Pool};

use crate::database::LockDatabase;

/// How long a pool may take before the reason is looked for.
pub(crate) const PATIENCE: Duration = Duration::from_millis(100);

/// Opens a connection beside the pool. Resolves if it is refused.
pub(crate) async fn refusal<DB: LockDatabase>(pool: &Pool<DB>) -> sqlx::Error {
    match pool.connect_options().connect().await {
        Err(error) => return error,
        // The pool waits for one of its hooks, or the server was only slow.
        Ok(connection) => drop(connection.close().await),
    }
    std::future::pending().await
}

/// Whether the pool has reached its maximum size and no connection is idle. Connections that are
/// being made count as in use.
pub(crate) fn is_lent_out<DB: LockDatabase>(pool: &Pool<DB>) -> bool {
    pool.num_idle() == 0 && pool.size() >= pool.options().get_max_connections()
}
