//! Guards of leases in transactions on connections of the application.

use std::future::poll_fn;
use std::time::Duration;

use sqlx::mysql::{MySqlConnection, MySqlRow};
use sqlx::{AssertSqlSafe, Column, Either, MySql, Row};

use super::errors::{DEADLOCK, NO_SUCH_SAVEPOINT, OUT_OF_RANGE, number};
use super::{is_temporary, literal};
use crate::database::driver;
use crate::database::driver::TransactionDriver;
use crate::database::{Cluster, Guarded, LeaseKey, Server, secret_digest};

const UNMARK: &str = "
SET SESSION TRANSACTION READ WRITE; SET SESSION autocommit = COALESCE(@lock_db_autocommit, 1), @lock_db_released = NULL";

const COMMIT: &str = "COMMIT AND NO CHAIN NO RELEASE";

const IS_MARKED: &str = "RELEASE SAVEPOINT lock_db_guard";

/// Fails unless a transaction is open. A deadlock ends a transaction without the knowledge of its
/// handle. Outside a transaction, a savepoint lasts only as long as its own statement.
pub(super) const IN_TRANSACTION: &str = "SAVEPOINT lock_db_here; RELEASE SAVEPOINT lock_db_here";

/// On a cluster, the write of another node can end the transaction behind any statement. In the
/// middle of a message nothing reports that: the statement was answered, and the next one runs
/// outside. So this comes last. The savepoint ends with its transaction.
pub(in crate::database) const STILL_IN_TRANSACTION: [&str; 2] =
    ["; SAVEPOINT lock_db_still", "; RELEASE SAVEPOINT lock_db_still"];

/// After a deadlock the transaction is gone, but the caller's handle still looks open, and what it
/// sends next would commit statement by statement. In a read-only transaction it fails instead,
/// until the handle is rolled back.
const DOOM: &str = "ROLLBACK; START TRANSACTION READ ONLY";

/// A savepoint in each transaction that has used the table.
pub(super) const USED: &str = "lock_db_used";

/// The name of the savepoint in a transaction that has released this lease.
fn released(lease: &LeaseKey) -> String {
    format!("lock_db_released_{}_{}", lease.row.id, lease.fencing_token)
}

/// Notes a release in the transaction. The variable is for marked transactions, which begin with it
/// unset. In others it is not read, so its length is limited.
fn note_release(lease: &LeaseKey) -> String {
    let (id, token) = (lease.row.id, lease.fencing_token);
    format!(
        "SET @lock_db_released = CONCAT_WS(',', RIGHT(@lock_db_released, 300000), '{id}:{token}'){}",
        note(&lease.server, &released(lease))
    )
}

/// Whether a marked transaction has released this lease.
fn or_released_in_marked(lease: &LeaseKey) -> String {
    format!("OR FIND_IN_SET('{}:{}', @lock_db_released)", lease.row.id, lease.fencing_token)
}

/// The row stays locked as long as the transaction lasts, and the savepoint shows that it does.
pub(super) async fn commit_locked(
    connection: &mut MySqlConnection,
    server: &Server,
) -> driver::Result<Guarded> {
    commit_marked(connection, server.cluster, String::new()).await
}

pub(super) async fn commit_guarded(
    connection: &mut MySqlConnection,
    lease: &LeaseKey,
    release: bool,
) -> driver::Result<Guarded> {
    let or_released = or_released_in_marked(lease);
    let is_ours = is_ours(lease, &or_released);
    let (id, table) = (lease.row.id, lease.server.table.name());
    // Only an error keeps the server from executing the rest. EXP returns a number that is out of
    // range, which is an error in every SQL mode. MySQL can't name a temporary table twice in a
    // statement, so the second name makes the statement fail if the table is temporary. MariaDB
    // could, and reads that part as a comment.
    let guard = match write(lease, release, &or_released) {
        Some(write) => format!("{write}; SELECT EXP(1000 * (ROW_COUNT() <> 1));"),
        None => format!(
            "{} EXP(1000 * (COUNT(*) <> 1)) FROM {table} WHERE {is_ours}
            /*!80000 AND EXISTS (SELECT 1 FROM {table} AS again WHERE again.id = {id}) */ LOCK IN SHARE MODE;",
            select_within(MySql::GUARD_LIMIT),
        ),
    };
    commit_marked(connection, lease.server.cluster, guard).await
}

pub(super) async fn unmark(connection: &mut MySqlConnection) -> driver::Result<()> {
    // Turning autocommit on again would commit an open transaction.
    let sql = format!("ROLLBACK AND NO CHAIN NO RELEASE; {UNMARK}");
    for _ in 0..2 {
        match sqlx::raw_sql(AssertSqlSafe(sql.clone())).execute(&mut *connection).await {
            // This was the result of a statement whose caller was dropped: sqlx gives it to the
            // next call.
            Err(sqlx::Error::Database(_)) => {}
            unmarked => {
                unmarked?;
                return Ok(());
            }
        }
    }
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await?;
    Ok(())
}

/// A lease that this transaction has released still guards it.
pub(super) async fn guard(
    connection: &mut MySqlConnection,
    lease: &LeaseKey,
    release: bool,
) -> driver::Result<Guarded> {
    match guard_unless(connection, lease, release, "").await? {
        Guarded::NotOurs => guard_released(connection, lease).await,
        guarded => Ok(guarded),
    }
}

pub(super) async fn guard_in_marked(
    connection: &mut MySqlConnection,
    lease: &LeaseKey,
) -> driver::Result<Guarded> {
    guard_unless(connection, lease, false, &or_released_in_marked(lease)).await
}

/// Sends one message, and a second one if the lease to release is not ours.
async fn guard_unless(
    connection: &mut MySqlConnection,
    lease: &LeaseKey,
    release: bool,
    or_released: &str,
) -> driver::Result<Guarded> {
    // The plain read comes first, because after the write it would see this transaction's own
    // version. It fixes a snapshot, but the snapshot is no older than what follows.
    let sees_grant = format!(
        "{}; {} fencing_token = {} AND previous_token >= {} FROM {} WHERE id = {}",
        show(&lease.server),
        select_within(MySql::GUARD_LIMIT),
        lease.fencing_token,
        lease.mark,
        lease.server.table.name(),
        lease.row.id
    );
    let used = note(&lease.server, USED);
    let [begin, end] = match lease.server.cluster {
        Cluster::SinglePrimary => [""; 2],
        Cluster::MultiPrimary => STILL_IN_TRANSACTION,
    };
    if let Some(write) = write(lease, release, or_released) {
        // An error ends the message, so that only a release that was carried out is noted.
        let written = if release {
            format!("SELECT CAST(EXP(1000 * (ROW_COUNT() <> 1)) AS SIGNED); {}", note_release(lease))
        } else {
            "SELECT ROW_COUNT()".to_owned()
        };
        let sql = format!("{IN_TRANSACTION}{begin}; {sees_grant}; {write}; {written}{used}{end}");
        return match sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut *connection).await {
            Err(error) if number(&error) == Some(OUT_OF_RANGE) => {
                let shown = fetch_optional(connection, format!("{}{used}", show(&lease.server))).await?;
                let is_elsewhere = shown.as_ref().is_some_and(is_temporary);
                Ok(if is_elsewhere { Guarded::Elsewhere } else { Guarded::NotOurs })
            }
            rows => guarded(&rows?),
        };
    }
    let sql = format!(
        "{IN_TRANSACTION}; {sees_grant}; {} COUNT(*) FROM {} WHERE {} LOCK IN SHARE MODE{used}",
        select_within(MySql::GUARD_LIMIT),
        lease.server.table.name(),
        is_ours(lease, or_released)
    );
    guarded(&sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await?)
}

/// Whether this transaction has released the lease. A savepoint records the release, and ends with
/// the transaction.
async fn guard_released(connection: &mut MySqlConnection, lease: &LeaseKey) -> driver::Result<Guarded> {
    // On a cluster nothing lasts exactly as long as the transaction: see `note`.
    if lease.server.cluster == Cluster::MultiPrimary {
        return Ok(Guarded::NotOurs);
    }
    let savepoint = format!("SAVEPOINT {}", released(lease));
    let sql = format!(
        "RELEASE {savepoint}; {savepoint}; {} COUNT(*) FROM {} WHERE {} LOCK IN SHARE MODE",
        select_within(MySql::GUARD_LIMIT),
        lease.server.table.name(),
        is_ours(lease, "OR TRUE")
    );
    match sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await {
        Ok(rows) => {
            let count = rows.last().map_or(Ok(0), |row| row.try_get::<i64, _>(0))?;
            Ok(if count > 0 { Guarded::Ours } else { Guarded::NotOurs })
        }
        Err(error) if number(&error) == Some(NO_SUCH_SAVEPOINT) => Ok(Guarded::NotOurs),
        Err(error) => Err(error.into()),
    }
}

/// Evaluates the plain read, which comes first, and the count of the locking read or the write,
/// which comes last.
fn guarded(rows: &[MySqlRow]) -> driver::Result<Guarded> {
    let [shown, rows @ ..] = rows else { return Ok(Guarded::NotOurs) };
    if is_temporary(shown) {
        return Ok(Guarded::Elsewhere);
    }
    let (Some(first), Some(last)) = (rows.first(), rows.last()) else { return Ok(Guarded::NotOurs) };
    let is_ours = last.try_get::<i64, _>(0)? > 0;
    // If the plain read finds no row, there is only the count.
    let sees_grant = rows.len() > 1 && first.try_get(0)?;
    Ok(match (is_ours, sees_grant) {
        (false, _) => Guarded::NotOurs,
        (true, false) => Guarded::Stale,
        (true, true) => Guarded::Ours,
    })
}

pub(super) async fn sees_grant(connection: &mut MySqlConnection, lease: &LeaseKey) -> driver::Result<bool> {
    if lease.server.cluster == Cluster::SinglePrimary {
        return Ok(true);
    }
    let (id, fencing_token, table) = (lease.row.id, lease.fencing_token, lease.server.table.name());
    let sql = format!("SELECT 1 FROM {table} WHERE id = {id} AND fencing_token >= {fencing_token}");
    Ok(fetch_optional(connection, sql).await?.is_some())
}

pub(super) async fn doom(connection: &mut MySqlConnection) {
    let _doomed = sqlx::raw_sql(DOOM).execute(connection).await;
}

/// The guard, where it has to be a write: to release, and on a cluster, where a row lock covers
/// only its own node.
fn write(lease: &LeaseKey, release: bool, or_released: &str) -> Option<String> {
    let set = match (release, lease.server.cluster) {
        (true, _) => "expire_time = '1970-01-01 00:00:00', ttl_micros = 0, guard_count = guard_count + 1",
        (false, Cluster::MultiPrimary) => "guard_count = guard_count + 1",
        (false, Cluster::SinglePrimary) => return None,
    };
    // MySQL limits only SELECTs, so a SELECT waits for the row.
    Some(format!(
        "{} id FROM {table} WHERE id = {} FOR UPDATE; UPDATE {table} SET {set} WHERE {}",
        select_within(MySql::GUARD_LIMIT),
        lease.row.id,
        is_ours(lease, or_released),
        table = lease.server.table.name(),
    ))
}

/// Sends check, commit and unmark in one message. The server executes nothing after an error.
///
/// On a cluster the COMMIT has a message of its own. In a message that goes on after the COMMIT,
/// Galera answers the COMMIT with OK, executes the rest, and tells only then that another node has
/// prevailed. In one that begins before it, the COMMIT could be that of an empty transaction: see
/// `STILL_IN_TRANSACTION`.
async fn commit_marked(
    connection: &mut MySqlConnection,
    cluster: Cluster,
    guard: String,
) -> driver::Result<Guarded> {
    let sent = match cluster {
        Cluster::SinglePrimary => {
            commit_and_unmark(connection, &format!("{IS_MARKED}; {guard} {COMMIT}")).await
        }
        Cluster::MultiPrimary => check_and_commit(connection, &guard).await.map(|()| false),
    };
    match sent {
        Ok(is_unmarked) => {
            if !is_unmarked {
                // A connection that is gone needs no unmark.
                let _unmarked = unmark(connection).await;
            }
            Ok(Guarded::Committed { notification: None })
        }
        Err(error) => match number(&error) {
            Some(OUT_OF_RANGE) => Ok(Guarded::NotOurs),
            Some(NO_SUCH_SAVEPOINT) => Ok(Guarded::Ended),
            _ => Err(error),
        },
    }
}

async fn check_and_commit(connection: &mut MySqlConnection, guard: &str) -> driver::Result<()> {
    let [begin, end] = STILL_IN_TRANSACTION;
    let guard = guard.trim_end_matches(';');
    let check = match guard {
        "" => IS_MARKED.to_owned(),
        guard => format!("{IS_MARKED}{begin}; {guard}{end}"),
    };
    sqlx::raw_sql(AssertSqlSafe(check)).execute(&mut *connection).await?;
    sqlx::raw_sql(COMMIT).execute(connection).await?;
    Ok(())
}

/// After the COMMIT, a row shows that it was carried out. What fails later, such as by KILL QUERY,
/// leaves the connection marked, and the result is false.
async fn commit_and_unmark(connection: &mut MySqlConnection, commit: &str) -> driver::Result<bool> {
    let sql = format!("{commit}; SELECT 1 AS lock_db_committed; {UNMARK}");
    let mut results = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_many(connection);
    let mut is_committed = false;
    while let Some(result) = poll_fn(|context| results.as_mut().poll_next(context)).await {
        match result {
            Ok(Either::Right(row)) => {
                is_committed |= row.columns().iter().any(|column| column.name() == "lock_db_committed");
            }
            Ok(Either::Left(_)) => {}
            // No statement behind the COMMIT can deadlock. It is the answer of a cluster that was taken
            // for a single server.
            Err(error) if is_committed && number(&error) != Some(DEADLOCK) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

/// The beginning of a SELECT that the server ends if it takes longer. Each server reads its own
/// form of the limit and takes the other form for a comment.
pub(super) fn select_within(limit: Duration) -> String {
    // Zero would mean no limit.
    let limit = limit.as_millis().max(1);
    format!(
        "/*M! SET STATEMENT max_statement_time = {}.{:03}, innodb_lock_wait_timeout = 60 FOR */
        SELECT /*+ MAX_EXECUTION_TIME({limit}) */",
        limit / 1000,
        limit % 1000
    )
}

/// A savepoint, appended to other statements. It records a fact for as long as the transaction
/// lasts. Not on a cluster: there the write of another node can end the transaction at any moment,
/// and a following savepoint would swallow the error that reports this.
pub(super) fn note(server: &Server, name: &str) -> String {
    match server.cluster {
        Cluster::SinglePrimary => format!("; SAVEPOINT {name}"),
        Cluster::MultiPrimary => String::new(),
    }
}

/// Shows the table, before other statements in the caller's session. A temporary table hides the
/// real one, even under its full name.
pub(super) fn show(server: &Server) -> String {
    format!("SHOW CREATE TABLE {}", server.table.name())
}

/// Returns the only row. Reads the result to its end, because the next statement would receive the
/// rest.
pub(super) async fn fetch_optional(
    connection: &mut MySqlConnection,
    sql: String,
) -> driver::Result<Option<MySqlRow>> {
    Ok(sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await?.pop())
}

/// The condition that the lease is ours. Statements on the application's connection are sent as
/// text, and a log shows slow ones, so this contains only a digest of the secret.
///
/// A released lease guards nothing, except in the transaction that releases it, which `or_released`
/// recognizes.
fn is_ours(lease: &LeaseKey, or_released: &str) -> String {
    let digits = secret_digest(lease.secret.as_str());
    format!(
        "id = {} AND lock_name = {} AND fencing_token = {token} AND SHA2(secret_key, 256) = '{digits}'
        AND (expire_time > '1970-01-01 00:00:00' {or_released})",
        lease.row.id,
        literal(&lease.row.name),
        token = lease.fencing_token,
    )
}
