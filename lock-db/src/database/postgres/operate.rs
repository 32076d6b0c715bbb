//! What operators ask: lists of locks, who holds them, and the end of a lease by force.

use std::collections::HashMap;

use sqlx::Row;
use sqlx::postgres::PgConnection;

use crate::database::driver;
use crate::database::lock_row::{FORCED, timestamp};
use crate::database::row::{self, lock_row};
use crate::database::{ListPage, LockRow, Server};
use crate::{DatabaseSession, RowHolder};

/// Whether the transaction has not ended that has locked or written a row, or its savepoint. Its number
/// is completed with the upper half that belongs to it.
macro_rules! is_open {
    ($number:literal) => {
        concat!(
            "(",
            $number,
            " <> '0'::xid AND txid_status((
        SELECT CASE WHEN whole - newest > 2147483648 THEN whole - 4294967296 ELSE whole END
        FROM (SELECT newest, (newest >> 32 << 32) + ",
            $number,
            "::text::bigint AS whole
            FROM (SELECT txid_snapshot_xmax(txid_current_snapshot()) AS newest) AS snapshot) AS numbers)) = 'in progress')"
        )
    };
}

const LIST: &str = concat!(
    "SELECT ",
    columns!(),
    ", lock_name::text
FROM {table} AS lease
WHERE lock_name >= $1 AND lock_name <= $2 AND lock_name > $3 AND lock_name LIKE $4 ESCAPE '!'
    AND (NOT $5 OR CASE WHEN lock_kind = 'row' THEN ",
    is_open!("lease.xmax"),
    "
        ELSE expire_time > clock_timestamp() END)
ORDER BY lock_name LIMIT $6"
);

/// A row that is locked or written by a transaction which has not ended shows the number of that
/// transaction, or of its savepoint. The server shows whose transaction a number is, to every role, but
/// not whose savepoint. That is one of those which write in the table and began before.
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
    WHERE open.locktype = 'transactionid' AND open.granted AND open.mode = 'ExclusiveLock' AND (open.pid IS NULL OR open.pid IN (
        SELECT used.pid FROM pg_locks AS used
        WHERE used.locktype = 'relation' AND used.granted AND used.relation = to_regclass($2)
            AND used.database = (SELECT oid FROM pg_database WHERE datname = current_database()))))
SELECT locked.id, writers.pid::bigint, session.usename::text,
    COALESCE(host(session.client_addr), session.client_hostname), session.application_name,
    (extract(epoch FROM session.xact_start) * 1000000)::bigint, writers.number = locked.number
FROM locked
LEFT JOIN writers ON writers.number = locked.number
    OR (age(writers.number) > age(locked.number)
        AND NOT EXISTS (SELECT 1 FROM writers AS itself WHERE itself.number = locked.number))
LEFT JOIN pg_stat_activity AS session ON session.pid = writers.pid
ORDER BY locked.id, writers.pid"
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

pub(super) async fn list(
    connection: &mut PgConnection,
    server: &Server,
    page: &ListPage,
) -> driver::Result<Vec<(String, LockRow)>> {
    let (from, to) = page.bounds();
    let query = sqlx::query(server.table.sql(LIST)).bind(from).bind(to).bind(&page.after).bind(page.like());
    let rows = query.bind(page.held_only).bind(page.limit).fetch_all(connection).await?;
    rows.iter().map(|row| Ok((row.try_get(row::COLUMNS)?, lock_row(row)?))).collect()
}

pub(super) async fn row_holders(
    connection: &mut PgConnection,
    server: &Server,
    ids: &[i64],
) -> driver::Result<HashMap<i64, RowHolder>> {
    let query = sqlx::query(server.table.sql(ROW_HOLDERS)).bind(ids).bind(server.table.name());
    let mut found: HashMap<i64, Vec<Option<DatabaseSession>>> = HashMap::new();
    for row in query.fetch_all(connection).await? {
        let session = row.try_get::<Option<i64>, _>(1)?.map(|id| {
            Ok::<_, sqlx::Error>(DatabaseSession {
                id,
                user: row.try_get::<Option<String>, _>(2)?.unwrap_or_default(),
                host: row.try_get(3)?,
                application_name: row.try_get::<Option<String>, _>(4)?.filter(|name| !name.is_empty()),
                since: row.try_get::<Option<i64>, _>(5)?.map(timestamp),
            })
        });
        found.entry(row.try_get(0)?).or_default().push(session.transpose()?);
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
