//! What operators ask: lists of locks, who holds them, and the end of a lease by force.

use std::collections::HashMap;

use sqlx::Row;
use sqlx::postgres::PgConnection;

use crate::database::driver;
use crate::database::lock_row::{FORCED, timestamp};
use crate::database::row::named_rows;
use crate::database::{ListPage, LockRow, Server};
use crate::{DatabaseSession, RowHolder};

/// Whether the transaction has not ended that has locked or written a row, or its savepoint. Its number
/// is completed with the upper half that belongs to it. What began after the last one that has ended is
/// open. (The number of a lock that several transactions share is of another kind, and can't be told
/// apart. Row locks make none.)
macro_rules! is_open {
    ($number:literal) => {
        concat!(
            "(",
            $number,
            " <> '0'::xid AND (
        SELECT CASE WHEN whole < newest THEN COALESCE(txid_status(whole), '') = 'in progress' ELSE true END
        FROM (SELECT newest, CASE WHEN whole - newest > 2147483648 THEN whole - 4294967296 ELSE whole END AS whole
            FROM (SELECT newest, (newest >> 32 << 32) + ",
            $number,
            "::text::bigint AS whole
                FROM (SELECT txid_snapshot_xmax(txid_current_snapshot()) AS newest) AS snapshot) AS half) AS numbers))"
        )
    };
}

/// Names are compared byte by byte, whatever the collation of the column.
macro_rules! in_part {
    ($and_below:literal) => {
        concat!("lock_name >= $1 COLLATE \"C\" AND lock_name > $2 COLLATE \"C\"", $and_below)
    };
}

macro_rules! end_of_part {
    ($and_below:literal) => {
        concat!(
            "
SELECT lock_name::text FROM {table} WHERE ",
            in_part!($and_below),
            "
ORDER BY lock_name COLLATE \"C\" OFFSET 4999 LIMIT 1"
        )
    };
}
const END_OF_PART: &str = end_of_part!("");
const END_OF_PART_BELOW: &str = end_of_part!(" AND lock_name < $3 COLLATE \"C\"");

macro_rules! list {
    ($and_below:literal) => {
        concat!(
            "SELECT ",
            columns!(),
            ", lock_name::text
FROM {table} AS lease
WHERE ",
            in_part!($and_below),
            " AND lock_name LIKE $3 ESCAPE '!'
    AND (NOT $4 OR CASE WHEN lock_kind = 'row' THEN ",
            is_open!("lease.xmax"),
            "
        ELSE expire_time > clock_timestamp() END)
ORDER BY lock_name COLLATE \"C\" LIMIT $5"
        )
    };
}
const LIST: &str = list!("");
const LIST_BELOW: &str = list!(" AND lock_name < $6 COLLATE \"C\"");
const LIST_TO: &str = list!(" AND lock_name <= $6 COLLATE \"C\"");

/// A row that is locked or written by a transaction which has not ended shows the number of that
/// transaction, or of its savepoint. The server shows whose transaction a number is, to every role, but
/// not whose savepoint. That is one of those which write in the table and began before. It is looked
/// whether the transaction is open before and after that.
///
/// A prepared transaction has no session. What a session of another role does is hidden from ordinary
/// roles, but not who it is.
const ROW_HOLDERS: &str = concat!(
    "
WITH locked AS MATERIALIZED (
    SELECT lease.id, lease.xmax AS number FROM {table} AS lease
    WHERE lease.id = ANY ($1) AND ",
    is_open!("lease.xmax"),
    "),
writers AS MATERIALIZED (
    SELECT open.pid, open.transactionid AS number FROM pg_locks AS open
    WHERE open.locktype = 'transactionid' AND open.granted AND open.mode = 'ExclusiveLock'
        AND (open.pid IS NULL OR open.pid IN (
            SELECT used.pid FROM pg_locks AS used
            WHERE used.locktype = 'relation' AND used.granted AND used.relation = to_regclass($2)
                AND used.database = (SELECT oid FROM pg_database WHERE datname = current_database())))),
candidates AS MATERIALIZED (
    SELECT locked.id, locked.number, writers.pid
    FROM locked
    LEFT JOIN writers ON writers.number = locked.number
        OR (age(writers.number) > age(locked.number)
            AND NOT EXISTS (SELECT 1 FROM writers AS itself WHERE itself.number = locked.number)))
SELECT candidates.id, candidates.pid::bigint, session.usename::text,
    COALESCE(host(session.client_addr), session.client_hostname), session.application_name,
    (extract(epoch FROM session.xact_start) * 1000000)::bigint
FROM candidates
LEFT JOIN pg_stat_activity AS session ON session.pid = candidates.pid
WHERE ",
    is_open!("candidates.number"),
    "
ORDER BY candidates.id, candidates.pid"
);

/// FOR UPDATE does not get a row that the guard of an open transaction has locked. Then no transaction
/// of the lease can commit any more, and the row is settled.
const FORCE_RELEASE: &str = concat!(
    "
UPDATE {table} AS lease
SET expire_time = '1970-01-01 00:00:00+00', ttl_micros = 0, secret_key = $3, fencing_token = lease.fencing_token + 1
WHERE lease.ctid = (
    SELECT ctid FROM {table} WHERE ctid = ",
    newest!("$1"),
    " AND lock_name = $1 AND fencing_token = $2 AND lock_kind = 'insert' AND expire_time > '1970-01-01 00:00:00+00'
    FOR UPDATE SKIP LOCKED)"
);

const VERSION: &str = "SELECT split_part(current_setting('server_version'), ' ', 1)";

const TIME: &str = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint";

/// The text above all names, unless the server's encoding may not have it.
fn above(server: &Server, page: &ListPage) -> Option<String> {
    page.bounds().1.filter(|above| above.is_ascii() || !server.is_ascii_only)
}

pub(super) async fn end_of_part(
    connection: &mut PgConnection,
    server: &Server,
    page: &ListPage,
) -> driver::Result<Option<String>> {
    let above = above(server, page);
    let statement = if above.is_some() { END_OF_PART_BELOW } else { END_OF_PART };
    let mut query = sqlx::query_scalar(server.table.sql(statement)).bind(page.bounds().0).bind(&page.after);
    if above.is_some() {
        query = query.bind(above);
    }
    Ok(query.fetch_optional(connection).await?)
}

pub(super) async fn list(
    connection: &mut PgConnection,
    server: &Server,
    page: &ListPage,
) -> driver::Result<Vec<(String, LockRow)>> {
    let above = above(server, page);
    let (statement, to) = match (&page.end, above) {
        (Some(end), _) => (LIST_TO, Some(end.clone())),
        (None, Some(above)) => (LIST_BELOW, Some(above)),
        (None, None) => (LIST, None),
    };
    let query = sqlx::query(server.table.sql(statement)).bind(page.bounds().0).bind(&page.after);
    let mut query = query.bind(page.like()).bind(page.held_only).bind(page.limit);
    if to.is_some() {
        query = query.bind(to);
    }
    let rows = query.fetch_all(connection).await?;
    named_rows(&rows)
}

pub(super) async fn row_holders(
    connection: &mut PgConnection,
    server: &Server,
    ids: &[i64],
) -> driver::Result<HashMap<i64, RowHolder>> {
    let query = sqlx::query(server.table.sql(ROW_HOLDERS)).bind(ids).bind(server.table.name());
    let rows = match query.fetch_all(connection).await {
        Ok(rows) => rows,
        // An operator may have taken the right to read one of the views.
        Err(sqlx::Error::Database(error)) => {
            let unknown = |id: &i64| (*id, RowHolder::Unknown(error.message().to_owned()));
            return Ok(ids.iter().map(unknown).collect());
        }
        Err(error) => return Err(error.into()),
    };
    let mut found: HashMap<i64, Vec<Option<DatabaseSession>>> = HashMap::new();
    for row in rows {
        let session = match row.try_get::<Option<i64>, _>(1)? {
            None => None,
            Some(id) => Some(DatabaseSession {
                id,
                user: row.try_get::<Option<String>, _>(2)?.unwrap_or_default(),
                host: row.try_get(3)?,
                application_name: row.try_get::<Option<String>, _>(4)?.filter(|name| !name.is_empty()),
                since: row.try_get::<Option<i64>, _>(5)?.map(timestamp),
            }),
        };
        found.entry(row.try_get(0)?).or_default().push(session);
    }
    Ok(found.into_iter().map(|(id, sessions)| (id, holder(sessions))).collect())
}

fn holder(mut sessions: Vec<Option<DatabaseSession>>) -> RowHolder {
    if sessions.len() == 1 {
        return match sessions.pop().flatten() {
            Some(session) => RowHolder::Session(session),
            None => RowHolder::Unknown(
                "a transaction has it locked that has no session: see `pg_prepared_xacts`".to_owned(),
            ),
        };
    }
    let sessions: Vec<String> = sessions.into_iter().flatten().map(|one| one.id.to_string()).collect();
    RowHolder::Unknown(format!(
        "one of the sessions {} has it locked, in a savepoint, and the server does not tell which",
        sessions.join(", ")
    ))
}

pub(super) async fn force_release(
    connection: &mut PgConnection,
    server: &Server,
    name: &str,
    row: &LockRow,
) -> driver::Result<bool> {
    let query = sqlx::query(server.table.sql(FORCE_RELEASE)).bind(name).bind(row.fencing_token).bind(FORCED);
    Ok(query.execute(connection).await?.rows_affected() > 0)
}

pub(super) async fn describe(connection: &mut PgConnection) -> driver::Result<String> {
    let version: String = sqlx::query_scalar(VERSION).fetch_one(connection).await?;
    Ok(format!("PostgreSQL {version}"))
}

pub(super) async fn time(connection: &mut PgConnection) -> driver::Result<i64> {
    Ok(sqlx::query_scalar(TIME).fetch_one(connection).await?)
}
