//! The sequence of the column `id`, which can be behind the rows: logical replication does not copy
//! it, nor does a restore of the rows alone. New names can't be locked until it has counted past
//! the rows.

use sqlx::AssertSqlSafe;
use sqlx::postgres::PgConnection;

use super::errors::code;
use crate::database::Server;
use crate::database::driver;
use crate::database::{Fault, StepError};

/// Of an id: an existing name causes no error, because the statements check for names.
pub(super) const DUPLICATE_KEY: &str = "23505";

/// Quoted as in SQL. No row: the column has no sequence of its own.
const FIND: &str = "
SELECT found.name, has_sequence_privilege(found.name, 'SELECT'), has_sequence_privilege(found.name, 'UPDATE')
FROM (SELECT pg_get_serial_sequence($1, 'id') AS name) AS found WHERE found.name IS NOT NULL";

/// The next number at the earliest, the largest number in use, and whether the next number is in
/// use.
const COMPARE: &str = "
SELECT next, (SELECT max(id) FROM {table}), EXISTS (SELECT 1 FROM {table} WHERE id = next)
FROM (
    SELECT last_value + CASE WHEN is_called THEN (SELECT seqincrement FROM pg_sequence WHERE seqrelid = '{literal}'::regclass) ELSE 0 END
        AS next
    FROM {sequence}) AS counted";

/// Only moves the sequence forward. While it is behind, concurrent inserts run into duplicate keys.
/// Migrations run one at a time.
const MEND: &str = "
SELECT setval('{literal}'::regclass, newest) FROM (SELECT max(id) AS newest FROM {table}) AS rows, {sequence}
WHERE newest > last_value OR (newest = last_value AND NOT is_called)";

pub(super) enum Behind {
    No,
    /// A later new name will get a number that is in use.
    Later,
    /// The next new name can't be locked.
    Now,
}

/// Replaces the placeholders in one pass, because a schema may be called `{table}`.
fn on(sql: &str, sequence: &str, table: &str) -> AssertSqlSafe<String> {
    let literal = sequence.replace('\'', "''");
    let mut filled = String::with_capacity(sql.len() + 4 * sequence.len());
    for part in sql.split('{') {
        let (name, rest) = part.split_once('}').unwrap_or(("", part));
        filled.push_str(match name {
            "sequence" => sequence,
            "literal" => &literal,
            "table" => table,
            _ => "",
        });
        filled.push_str(rest);
    }
    AssertSqlSafe(filled)
}

/// Compares as far as this role has the privileges.
pub(super) async fn is_behind(connection: &mut PgConnection, server: &Server) -> driver::Result<Behind> {
    let table = server.table.name();
    let found: Option<(String, bool, bool)> =
        sqlx::query_as(FIND).bind(table).fetch_optional(&mut *connection).await?;
    let Some((sequence, true, _)) = found else { return Ok(Behind::No) };
    let (next, newest, is_taken): (i64, Option<i64>, bool) =
        sqlx::query_as(on(COMPARE, &sequence, table)).fetch_one(connection).await?;
    Ok(match newest {
        _ if is_taken => Behind::Now,
        Some(newest) if next <= newest => Behind::Later,
        _ => Behind::No,
    })
}

/// Repairs the sequence in a migration, if the role has the privileges.
pub(super) async fn mend(transaction: &mut PgConnection) -> driver::Result<()> {
    const TABLE: &str = "distributed_lock";
    let writes = "SELECT current_setting('transaction_read_only') = 'off'";
    if !sqlx::query_scalar::<_, bool>(writes).fetch_one(&mut *transaction).await? {
        return Ok(());
    }
    let found: Option<(String, bool, bool)> =
        sqlx::query_as(FIND).bind(TABLE).fetch_optional(&mut *transaction).await?;
    if let Some((sequence, true, true)) = found {
        let mended: Option<i64> =
            sqlx::query_scalar(on(MEND, &sequence, TABLE)).fetch_optional(transaction).await?;
        if let Some(newest) = mended {
            tracing::warn!(
                newest,
                "the sequence of `distributed_lock` was behind the rows and was moved forward"
            );
        }
    }
    Ok(())
}

/// The statement that repairs it.
pub(super) fn remedy(server: &Server) -> String {
    let table = server.table.name();
    format!(
        "SELECT setval(pg_get_serial_sequence('{}', 'id'), (SELECT max(id) FROM {table}))",
        table.replace('\'', "''")
    )
}

/// Explains the error of an INSERT, if the sequence caused it.
pub(super) fn explained(server: &Server, error: StepError) -> StepError {
    let error = match error {
        StepError::Sqlx(error) if code(&error) == Some(DUPLICATE_KEY) => error,
        error => return error,
    };
    let text = format!(
        "duplicate key: the sequence of the column `id` is behind the rows, as after a switch to a logical replica; mend it by \
         `locks.migrate()` as the owner of the table, or by `{}`",
        remedy(server)
    );
    StepError::Explained(Fault::Refused, text, error)
}
