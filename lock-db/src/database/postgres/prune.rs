//! Removes rows that were not used for long.
//!
//! The walk through the table reads each part by the primary key, without locks. No index has the
//! times, because an update of an indexed column would not be a HOT update.

use sqlx::Row;
use sqlx::postgres::PgConnection;

use crate::database::driver;
use crate::database::row::table_part;
use crate::database::{PruneScope, Server, TablePart, can_not_prune};
use crate::options::micros;

/// Whether a row may be removed. `$1` is how long it was not used, in microseconds, and `$2` the
/// prefix of the names.
macro_rules! is_unused {
    () => {
        "lock_kind IN ('insert', 'row')
        AND GREATEST(create_time, acquire_time, expire_time) < clock_timestamp() - $1::bigint * interval '1 microsecond'
        AND fencing_token < (extract(epoch FROM clock_timestamp()) * 1000000)::bigint - $1
        AND starts_with(lock_name, $2)"
    };
}

const READ_PART: &str = concat!(
    "
SELECT id, ",
    is_unused!(),
    ", CASE WHEN waiters <> '' THEN lock_name::text END, waiters::text,
    (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
FROM {table} WHERE id > $3 ORDER BY id LIMIT 1000"
);

/// Does not wait for the disk: a row that a crash brings back is removed again later, and what is
/// committed on top of the removal follows it in the log.
///
/// FOR UPDATE conflicts with every other use of the row, also with the guard of an open
/// transaction. By `ctid`, so that a row that was used since the statement's snapshot is not found.
const REMOVE: &str = concat!(
    "
WITH unsynced AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
DELETE FROM {table} AS lease USING unsynced
WHERE lease.ctid = ANY (ARRAY(
    SELECT ctid FROM {table} WHERE id = ANY ((SELECT $3::bigint[])::bigint[]) AND waiters = '' AND ",
    is_unused!(),
    "
    FOR UPDATE SKIP LOCKED))"
);

const MAY_DELETE: &str = "
SELECT has_table_privilege(class.oid, 'DELETE'), quote_ident(current_user::text)
FROM pg_class AS class WHERE class.oid = to_regclass($1)";

pub(super) async fn read_part(
    connection: &mut PgConnection,
    server: &Server,
    scope: &PruneScope,
    after: i64,
) -> driver::Result<TablePart> {
    let query = sqlx::query(server.table.sql(READ_PART)).bind(micros(scope.older_than)).bind(&*scope.prefix);
    table_part(&query.bind(after).fetch_all(connection).await?)
}

pub(super) async fn remove(
    connection: &mut PgConnection,
    server: &Server,
    scope: &PruneScope,
    ids: &[i64],
) -> driver::Result<u64> {
    let query = sqlx::query(server.table.sql(REMOVE)).bind(micros(scope.older_than)).bind(&*scope.prefix);
    Ok(query.bind(ids).execute(connection).await?.rows_affected())
}

pub(super) async fn lacks_right(
    connection: &mut PgConnection,
    server: &Server,
) -> driver::Result<Option<String>> {
    let table = server.table.name();
    let row = sqlx::query(MAY_DELETE).bind(table).fetch_one(connection).await?;
    let (may_delete, role): (bool, String) = (row.try_get(0)?, row.try_get(1)?);
    let lacks = format!("the role {role} lacks the right DELETE on {table}");
    Ok((!may_delete).then(|| can_not_prune(&lacks, &format!("GRANT DELETE ON {table} TO {role}"))))
}
