//! The baton of a row: a user lock of the server.
//!
//! The name counts on the whole server, so it tells the database.

use sqlx::mysql::MySqlConnection;

use super::schema::digest;
use crate::database::Server;

/// MySQL knows whole seconds only.
const TAKE: &str = "SELECT COALESCE(GET_LOCK(?, 1), 0)";

const GIVE: &str = "DO RELEASE_LOCK(?)";

pub(super) async fn take(connection: &mut MySqlConnection, server: &Server, row: i64) -> sqlx::Result<bool> {
    let taken: i64 = sqlx::query_scalar(TAKE).bind(name(server, row)).fetch_one(connection).await?;
    Ok(taken == 1)
}

pub(super) async fn give(connection: &mut MySqlConnection, server: &Server, row: i64) -> sqlx::Result<()> {
    sqlx::query(GIVE).bind(name(server, row)).execute(connection).await.map(drop)
}

fn name(server: &Server, row: i64) -> String {
    format!("lock_db:{:.32}:{row}", digest(&server.table.schema))
}
