//! Waiting for a connection of a pool, and why there is none.

use std::time::Duration;

use sqlx::{ConnectOptions, Connection, Pool};
use tokio::select;
use tokio::time::sleep;

use crate::database::LockDatabase;

/// How long a pool may take before it is looked for what keeps it.
const PATIENCE: Duration = Duration::from_millis(100);

/// Waits for a connection that a pool makes. A pool tries again and again when a server can't be reached, and tells of nothing but the
/// time in the end; so when it takes long, a connection is tried beside it, whose error tells why.
pub(crate) async fn telling_why<DB: LockDatabase, T>(
    pool: &Pool<DB>,
    waiting: impl Future<Output = sqlx::Result<T>>,
) -> sqlx::Result<T> {
    let refused = async {
        loop {
            sleep(PATIENCE).await;
            if pool.size() > 0 && pool.num_idle() == 0 && pool.size() >= pool.options().get_max_connections()
            {
                // All are lent out: there is nothing wrong with the server.
                continue;
            }
            match pool.connect_options().connect().await {
                Err(error) => return error,
                // A hook of the pool, then, or the server was only slow.
                Ok(connection) => drop(connection.close().await),
            }
            std::future::pending::<()>().await;
        }
    };
    select! {
        biased;
        connected = waiting => connected,
        error = refused => Err(error),
    }
}
