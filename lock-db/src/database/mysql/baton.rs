//! The baton of a row: a user lock of the server.
//!
//! The name counts on the whole server, so it tells the database.

use sqlx::mysql::MySqlConnection;

/// MySQL knows whole seconds only.
const TAKE: &str =
    "SELECT COALESCE(GET_LOCK(CONCAT('lock_db:', LEFT(SHA2(DATABASE(), 224), 32), ':', ?), 1), 0)";

const GIVE: &str = "DO RELEASE_LOCK(CONCAT('lock_db:', LEFT(SHA2(DATABASE(), 224), 32), ':', ?))";

pub(super) async fn take(connection: &mut MySqlConnection, row: i64) -> sqlx::Result<bool> {
    let taken: i64 = sqlx::query_scalar(TAKE).bind(row).fetch_one(connection).await?;
    Ok(taken == 1)
}

pub(super) async fn give(connection: &mut MySqlConnection, row: i64) -> sqlx::Result<()> {
    sqlx::query(GIVE).bind(row).execute(connection).await.map(drop)
}
