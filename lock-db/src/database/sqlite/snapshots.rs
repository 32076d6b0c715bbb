//! Finds a reader that keeps the WAL from starting over.

use sqlx::Row;
use sqlx::sqlite::SqliteConnection;

use crate::database::driver;
use crate::database::{OldSnapshots, Server};

const FILE: &str = "SELECT file FROM pragma_database_list WHERE name = 'main'";

/// Copies what no reader needs any more, without waiting for readers. Returns how many pages are in
/// the WAL, and how many of them could be copied.
const CHECKPOINT: &str = "PRAGMA main.wal_checkpoint(PASSIVE)";

/// Four times the size at which SQLite checkpoints by itself.
const LARGE: u64 = 16 << 20;

pub(super) async fn old(connection: &mut SqliteConnection, _server: &Server) -> driver::Result<OldSnapshots> {
    let file: String = sqlx::query_scalar(FILE).fetch_one(&mut *connection).await?;
    let size = std::fs::metadata(format!("{file}-wal")).map_or(0, |wal| wal.len());
    if size < LARGE {
        return Ok(OldSnapshots::default());
    }
    let row = sqlx::raw_sql(CHECKPOINT).fetch_one(connection).await?;
    let (pages, copied): (i64, i64) = (row.try_get(1)?, row.try_get(2)?);
    if copied >= pages {
        return Ok(OldSnapshots::default());
    }
    let found = format!(
        "the WAL of this database has {} MB, because a transaction that reads stays open and keeps {} of its {pages} pages from being \
         copied, so it grows with each lock until that ends. SQLite does not tell whose it is: read for transactions and \
         unfinished queries in the processes that have `{}-wal` open",
        size >> 20,
        pages - copied,
        file.escape_debug()
    );
    Ok(OldSnapshots { found: Some(found), unseen: None })
}
