//! Removing rows that were not used for long.

use std::future::Future;

use super::Result;
use crate::database::{PruneScope, Server, TablePart};

/// Removing rows that were not used for long.
pub trait PruneDriver: sqlx::Database + Sized {
    /// How many rows one statement removes at most. They stay locked until it ends.
    const REMOVED_AT_ONCE: usize = 1000;

    /// Reads the rows that follow the id `after`, in the order of the ids, a thousand at most.
    /// Locks nothing.
    fn read_part(
        connection: &mut Self::Connection,
        server: &Server,
        scope: &PruneScope,
        after: i64,
    ) -> impl Future<Output = Result<TablePart>> + Send;

    /// Deletes those of these rows that are still unused. Skips rows that another transaction has
    /// locked, and locks no others than it deletes. Returns how many it has deleted.
    fn remove_rows(
        connection: &mut Self::Connection,
        server: &Server,
        scope: &PruneScope,
        ids: &[i64],
    ) -> impl Future<Output = Result<u64>> + Send;

    /// What the account lacks in order to delete rows, and the statement that grants it. `None`:
    /// nothing.
    fn lacks_right_to_delete(
        _connection: &mut Self::Connection,
        _server: &Server,
    ) -> impl Future<Output = Result<Option<String>>> + Send {
        async { Ok(None) }
    }
}
