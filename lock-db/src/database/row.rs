//! Decodes a row of the table, the same on every database.

use sqlx::{ColumnIndex, Database, Decode, Row, Type};

use super::{LockRow, driver};
use crate::Kind;

/// Decodes the columns that each database's `columns!` selects, in their order. What follows them
/// is up to the caller.
pub(super) fn lock_row<'r, R: Row>(row: &'r R) -> driver::Result<LockRow>
where
    usize: ColumnIndex<R>,
    i64: Decode<'r, R::Database> + Type<R::Database>,
    &'r str: Decode<'r, R::Database> + Type<R::Database>,
    R::Database: Database<Row = R>,
{
    let text = |column: usize| row.try_get::<&str, _>(column).map(str::to_owned);
    Ok(LockRow {
        id: row.try_get(0)?,
        kind: Kind::parse(row.try_get(1)?),
        secret_key: text(2)?,
        owner: text(3)?,
        fencing_token: row.try_get(4)?,
        created: row.try_get(5)?,
        acquired: row.try_get(6)?,
        expires: row.try_get(7)?,
        remaining: row.try_get(8)?,
        ttl: row.try_get(9)?,
        waiters: text(10)?,
    })
}

/// How many columns [`lock_row`] decodes: the index of the next one.
pub(super) const COLUMNS: usize = 11;
