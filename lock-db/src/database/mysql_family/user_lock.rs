//! The user lock of a row.
//!
//! Names of user locks are valid on the whole server, so the name contains a digest of the
//! database's name.

use sqlx::mysql::MySqlConnection;

use super::schema::digest;
use crate::database::Server;
use crate::database::driver;

/// MySQL supports only whole seconds.
const ACQUIRE: &str = "SELECT COALESCE(GET_LOCK(?, 1), 0)";

const RELEASE: &str = "DO RELEASE_LOCK(?)";

pub(super) async fn acquire(
    connection: &mut MySqlConnection,
    server: &Server,
    row: i64,
) -> driver::Result<bool> {
    let taken: i64 = sqlx::query_scalar(ACQUIRE).bind(name(server, row)).fetch_one(connection).await?;
    Ok(taken == 1)
}

pub(super) async fn release(
    connection: &mut MySqlConnection,
    server: &Server,
    row: i64,
) -> driver::Result<()> {
    sqlx::query(RELEASE).bind(name(server, row)).execute(connection).await?;
    Ok(())
}

fn name(server: &Server, row: i64) -> String {
    format!("lock_db:{:.32}:{row}", digest(&server.table.schema))
}
