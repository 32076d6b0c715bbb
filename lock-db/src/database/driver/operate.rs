//! What operators ask: lists of locks, who holds them, and the end of a lease by force.

use std::collections::HashMap;
use std::future::Future;

use super::Result;
use crate::RowHolder;
use crate::database::{ListPage, LockRow, Server};

/// What operators ask. Everything but [`force_release`](Self::force_release) locks nothing.
pub trait OperateDriver: sqlx::Database + Sized {
    /// Returns the name at which a part of the table ends that is not too large to be read at once. The
    /// part begins where the names of the page do. `None`: all that is left is one part.
    fn end_of_part(
        connection: &mut Self::Connection,
        server: &Server,
        page: &ListPage,
    ) -> impl Future<Output = Result<Option<String>>> + Send;

    /// Returns rows with their whole names, in the order of the bytes of the names. Reads no further than
    /// the end of the page.
    fn list(
        connection: &mut Self::Connection,
        server: &Server,
        page: &ListPage,
    ) -> impl Future<Output = Result<Vec<(String, LockRow)>>> + Send;

    /// Returns who has these rows of row locks locked, by their ids. Ids that are missing in the
    /// result are not locked.
    fn row_holders(
        connection: &mut Self::Connection,
        server: &Server,
        ids: &[i64],
    ) -> impl Future<Output = Result<HashMap<i64, RowHolder>>> + Send;

    /// Frees the lease of a row as if its holder had released it, if its grant is still this one. The
    /// fencing token of the row grows by one, which tells the holder what has happened. `false`: the
    /// row has changed since it was read, or another transaction has it locked.
    fn force_release(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
        row: &LockRow,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// The name and version of the server, and its cluster.
    fn describe(
        connection: &mut Self::Connection,
        server: &Server,
    ) -> impl Future<Output = Result<String>> + Send;

    /// The time of the server, in microseconds since 1970.
    fn time(connection: &mut Self::Connection) -> impl Future<Output = Result<i64>> + Send;
}
