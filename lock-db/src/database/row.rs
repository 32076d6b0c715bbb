//! Decodes a row of the table, the same on every database.

use sqlx::{ColumnIndex, Database, Decode, Row, Type};

use super::{ExpiredQueue, LockRow, TablePart, WaitQueue, driver};
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
        previous_token: row.try_get(11)?,
    })
}

/// How many columns [`lock_row`] decodes: the index of the next one.
pub(super) const COLUMNS: usize = 12;

/// Decodes rows that are followed by their names.
#[cfg(any(feature = "postgres", feature = "_sqlite"))]
pub(super) fn named_rows<R: Row>(rows: &[R]) -> driver::Result<Vec<(String, LockRow)>>
where
    usize: ColumnIndex<R>,
    for<'r> i64: Decode<'r, R::Database> + Type<R::Database>,
    for<'r> &'r str: Decode<'r, R::Database> + Type<R::Database>,
    for<'r> String: Decode<'r, R::Database> + Type<R::Database>,
    R::Database: Database<Row = R>,
{
    rows.iter().map(|row| Ok((row.try_get(COLUMNS)?, lock_row(row)?))).collect()
}

/// Decodes what each database's `READ_PART` selects: the id, whether the row may be removed, its
/// name and queue, and the time.
pub(super) fn table_part<R: Row>(rows: &[R]) -> driver::Result<TablePart>
where
    usize: ColumnIndex<R>,
    for<'r> i64: Decode<'r, R::Database> + Type<R::Database>,
    for<'r> bool: Decode<'r, R::Database> + Type<R::Database>,
    for<'r> String: Decode<'r, R::Database> + Type<R::Database>,
    R::Database: Database<Row = R>,
{
    let mut part = TablePart::default();
    for row in rows {
        let id: i64 = row.try_get(0)?;
        part.last = part.last.max(Some(id));
        if !row.try_get::<bool, _>(1)? {
            continue;
        }
        let (name, waiters): (Option<String>, String) = (row.try_get(2)?, row.try_get(3)?);
        if waiters.is_empty() {
            part.unused.push(id);
        } else if WaitQueue::parse(&waiters, row.try_get(4)?).is_empty()
            && let Some(name) = name
        {
            part.queues.push(ExpiredQueue { id, name, waiters });
        }
    }
    Ok(part)
}
