//! Locks and guards in transactions on connections of the application.

use std::time::Duration;

use sha2::Digest;
use sqlx::mysql::{MySqlConnection, MySqlRow};
use sqlx::{AssertSqlSafe, MySql, Row};

use super::errors::{NO_SUCH_SAVEPOINT, OUT_OF_RANGE, number};
use super::literal;
use crate::Kind;
use crate::database::{Cluster, Fault, Guarded, LeaseKey, LockDatabase, RowAttempt, RowClaim};

const UNMARK: &str = "
SET SESSION TRANSACTION READ WRITE; SET SESSION autocommit = COALESCE(@lock_db_autocommit, 1)";

const IS_MARKED: &str = "RELEASE SAVEPOINT lock_db_guard";

/// Fails unless a transaction is open: a deadlock ends one, and its handle does not know. By itself a savepoint lasts no
/// longer than its own statement.
const IN_TRANSACTION: &str = "SAVEPOINT lock_db_here; RELEASE SAVEPOINT lock_db_here";

/// After a deadlock the transaction is gone but the caller's handle still looks open: what it sends next would commit
/// statement by statement. In a read-only transaction it fails instead, until the handle is rolled back.
const DOOM: &str = "ROLLBACK; START TRANSACTION READ ONLY";

/// What a try may take that waits for nobody.
const LONGEST_TRY: Duration = Duration::from_secs(2);

pub(super) async fn lock_row(
    connection: &mut MySqlConnection,
    claim: &RowClaim,
    slice: Duration,
) -> sqlx::Result<RowAttempt> {
    let attempt = lock_and_write(connection, claim, slice).await;
    let fault = attempt.as_ref().err().map(MySql::classify);
    if fault == Some(Fault::Busy) {
        return Ok(RowAttempt::Busy);
    }
    if matches!(fault, Some(Fault::Deadlock | Fault::Serialization | Fault::TransactionEnded))
        || matches!(attempt, Ok(RowAttempt::Stale | RowAttempt::Leased))
    {
        MySql::doom(connection).await;
    }
    attempt
}

/// The row stays locked as long as the transaction lasts, and the savepoint tells that it does.
pub(super) async fn commit_locked(connection: &mut MySqlConnection) -> sqlx::Result<Guarded> {
    commit_marked(connection, String::new()).await
}

pub(super) async fn commit_guarded(
    connection: &mut MySqlConnection,
    lease: &LeaseKey,
    release: bool,
) -> sqlx::Result<Guarded> {
    let (id, is_ours) = (lease.row.id, is_ours(lease));
    // An error is what keeps the server from reading on: a number that is too large, whatever the SQL mode.
    let guard = match write(lease, release) {
        Some(write) => format!("{write}; SELECT EXP(1000 * (ROW_COUNT() <> 1));"),
        None => format!(
            "{} EXP(1000 * (COUNT(*) <> 1)) FROM distributed_lock
            WHERE id = {id} AND {is_ours} LOCK IN SHARE MODE;",
            select_within(MySql::GUARD_LIMIT)
        ),
    };
    commit_marked(connection, guard).await
}

pub(super) async fn unmark(connection: &mut MySqlConnection) -> sqlx::Result<()> {
    // Back to autocommit would commit what is open.
    let sql = format!("ROLLBACK AND NO CHAIN NO RELEASE; {UNMARK}");
    for _ in 0..2 {
        match sqlx::raw_sql(AssertSqlSafe(sql.clone())).execute(&mut *connection).await {
            // That was the answer to a statement whose caller has gone: sqlx hands it to whatever comes next.
            Err(sqlx::Error::Database(_)) => {}
            unmarked => return unmarked.map(drop),
        }
    }
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(drop)
}

/// In one message, whatever it takes.
pub(super) async fn guard(
    connection: &mut MySqlConnection,
    lease: &LeaseKey,
    release: bool,
) -> sqlx::Result<Guarded> {
    if let Some(write) = write(lease, release) {
        let sql = format!("{IN_TRANSACTION}; {write}");
        let written = sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await?;
        return Ok(Guarded::when(written.rows_affected() > 0));
    }
    let sql = format!(
        "{IN_TRANSACTION}; {} secret_key FROM distributed_lock
        WHERE id = {} AND fencing_token = {} LOCK IN SHARE MODE",
        select_within(MySql::GUARD_LIMIT),
        lease.row.id,
        lease.fencing_token
    );
    let row = fetch_optional(connection, sql).await?;
    let owner = row.map(|row| row.try_get::<String, _>(0)).transpose()?;
    Ok(Guarded::when(owner.as_deref() == Some(lease.secret.as_str())))
}

pub(super) async fn sees_grant(connection: &mut MySqlConnection, lease: &LeaseKey) -> sqlx::Result<bool> {
    if lease.cluster == Cluster::SinglePrimary {
        return Ok(true);
    }
    let (id, fencing_token) = (lease.row.id, lease.fencing_token);
    let sql = format!("SELECT 1 FROM distributed_lock WHERE id = {id} AND fencing_token >= {fencing_token}");
    Ok(fetch_optional(connection, sql).await?.is_some())
}

pub(super) async fn doom(connection: &mut MySqlConnection) {
    let _doomed = sqlx::raw_sql(DOOM).execute(connection).await;
}

/// The guard that has to be a write: to release, and where a lock reaches no further than its own node.
fn write(lease: &LeaseKey, release: bool) -> Option<String> {
    let set = match (release, lease.cluster) {
        (true, _) => "expire_time = '1970-01-01 00:00:00', guard_count = guard_count + 1",
        (false, Cluster::MultiPrimary) => "guard_count = guard_count + 1",
        (false, Cluster::SinglePrimary) => return None,
    };
    // MySQL limits SELECTs only, so it is one of them that waits for the row.
    Some(format!(
        "{} id FROM distributed_lock WHERE id = {id} FOR UPDATE;
        UPDATE distributed_lock SET {set} WHERE id = {id} AND {}",
        select_within(MySql::GUARD_LIMIT),
        is_ours(lease),
        id = lease.row.id,
    ))
}

/// Check, commit and unmark in one message, of which the server reads nothing after an error.
async fn commit_marked(connection: &mut MySqlConnection, guard: String) -> sqlx::Result<Guarded> {
    let sql = format!("{IS_MARKED}; {guard} COMMIT AND NO CHAIN NO RELEASE; {UNMARK}");
    match sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await {
        Ok(_) => Ok(Guarded::Committed),
        Err(error) => match number(&error) {
            Some(OUT_OF_RANGE) => Ok(Guarded::NotOurs),
            Some(NO_SUCH_SAVEPOINT) => Ok(Guarded::Ended),
            _ => Err(error),
        },
    }
}

/// Locks the row, makes sure that this transaction can see what its last holder committed, and writes it.
///
/// These statements run in the caller's transaction, on a future that the caller may drop. They go as text, because a
/// statement that is dropped while it is being prepared leaves a connection of sqlx 0.9 unusable; the owner goes as
/// hexadecimal digits, so there is nothing to escape.
async fn lock_and_write(
    connection: &mut MySqlConnection,
    claim: &RowClaim,
    slice: Duration,
) -> sqlx::Result<RowAttempt> {
    // By the primary key: locked by its name, a row of MariaDB takes the gap before it along, and nobody could make the
    // row of a name that sorts there until the transaction ends. Not with SKIP LOCKED, which leaves a lock on the gap
    // behind the row that it skipped.
    // No plain SELECT before the row is locked: in REPEATABLE READ it would fix the transaction's snapshot too early.
    let id = claim.row.id;
    let (limit, no_wait) = if slice.is_zero() { (LONGEST_TRY, "NOWAIT") } else { (slice, "") };
    let sql = format!(
        "{IN_TRANSACTION}; {} lock_name, lock_kind, secret_key, fencing_token,
            expire_time > UTC_TIMESTAMP(6), TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6))
        FROM distributed_lock WHERE id = {id} FOR UPDATE {no_wait}",
        select_within(limit)
    );
    let Some(row) = fetch_optional(connection, sql).await? else { return Ok(RowAttempt::Missing) };
    if row.try_get::<&[u8], _>(0)? != claim.row.name.as_bytes() {
        return Ok(RowAttempt::Missing);
    }
    if Kind::parse(row.try_get(1)?) != claim.kind {
        return Ok(RowAttempt::WrongKind);
    }
    let before: String = row.try_get(2)?;
    let last: i64 = row.try_get(3)?;
    if row.try_get::<bool, _>(4)? {
        return Ok(RowAttempt::Leased);
    }
    let now: i64 = row.try_get(5)?;

    // The locking read sees the newest row, the plain one the transaction's snapshot.
    let sql = format!("SELECT fencing_token FROM distributed_lock WHERE id = {id}");
    let seen: Option<i64> = fetch_optional(connection, sql).await?.map(|row| row.try_get(0)).transpose()?;
    // A row that nobody has held yet may be newer than the snapshot.
    if seen.unwrap_or(0) != last {
        return Ok(RowAttempt::Stale);
    }

    let fencing_token = last.saturating_add(1).max(now);
    let sql = format!(
        "UPDATE distributed_lock
        SET fencing_token = {fencing_token}, secret_key = CONVERT({} USING ascii),
            owner = CONVERT({} USING utf8mb4), acquire_time = UTC_TIMESTAMP(6)
        WHERE id = {id}",
        literal(claim.secret.as_str()),
        literal(&claim.owner)
    );
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await?;
    Ok(RowAttempt::Locked { fencing_token, before })
}

/// The beginning of a SELECT that the server ends when it takes longer. Each server reads its own form of the limit and takes
/// the other's for a comment.
fn select_within(limit: Duration) -> String {
    // Zero would mean no limit at all.
    let limit = limit.as_millis().max(1);
    format!(
        "/*M! SET STATEMENT max_statement_time = {}.{:03} FOR */ SELECT /*+ MAX_EXECUTION_TIME({limit}) */",
        limit / 1000,
        limit % 1000
    )
}

/// The one row, read to the end of the answer: what is left over of it would meet the next statement.
async fn fetch_optional(connection: &mut MySqlConnection, sql: String) -> sqlx::Result<Option<MySqlRow>> {
    Ok(sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await?.pop())
}

/// A statement in the application's connection goes as text, which its log shows when it takes long; so it tells a digest of
/// the secret only.
fn is_ours(lease: &LeaseKey) -> String {
    let digest = sha2::Sha256::digest(lease.secret.as_str());
    let digits = digest.iter().fold(String::new(), |digits, byte| format!("{digits}{byte:02x}"));
    format!("fencing_token = {} AND SHA2(secret_key, 256) = '{digits}'", lease.fencing_token)
}
