//! Locks and guards in transactions on connections of the application.

use std::time::Duration;

use sha2::Digest;
use sqlx::mysql::{MySqlConnection, MySqlRow};
use sqlx::{AssertSqlSafe, MySql, Row};

use super::errors::{
    LOCK_WAIT_TIMEOUT, NO_SUCH_SAVEPOINT, OUT_OF_RANGE, ROW_IS_LOCKED, TOOK_TOO_LONG, number,
};
use super::{is_temporary, lease, literal};
use crate::Kind;
use crate::database::{
    Cluster, Fault, Guarded, LeaseKey, LockDatabase, LockRow, RowAttempt, RowClaim, Server,
};
use crate::secret::Secret;

const UNMARK: &str = "
SET SESSION TRANSACTION READ WRITE; SET SESSION autocommit = COALESCE(@lock_db_autocommit, 1), @lock_db_released = NULL";

const IS_MARKED: &str = "RELEASE SAVEPOINT lock_db_guard";

/// Fails unless a transaction is open: a deadlock ends one, and its handle does not know. By itself a savepoint lasts no
/// longer than its own statement.
const IN_TRANSACTION: &str = "SAVEPOINT lock_db_here; RELEASE SAVEPOINT lock_db_here";

/// After a deadlock the transaction is gone but the caller's handle still looks open: what it sends next would commit
/// statement by statement. In a read-only transaction it fails instead, until the handle is rolled back.
const DOOM: &str = "ROLLBACK; START TRANSACTION READ ONLY";

/// Stands in a transaction that has worked with the table.
const USED: &str = "lock_db_used";

/// With the fencing token of a lease that the transaction has released.
const RELEASED: &str = "lock_db_released_";

/// In a transaction of ours, which begins without this.
const RELEASED_IN_MARKED: &str = "OR @lock_db_released <=> fencing_token";

/// What the server draws for a lock: statements in the application's connection go as text, which logs show, and so do not tell it.
const DRAWN: &str = "@lock_db_drawn";

/// Digests of the secrets of the locks that transactions on this connection have taken last, one behind the other.
const TAKEN: &str = "@lock_db_taken";
const MOST_TAKEN: usize = 64 * 32;

/// How long a table may take that is locked by nobody, on a busy machine.
const QUICK: Duration = Duration::from_secs(1);

/// What a try may take that waits for nobody.
const LONGEST_TRY: Duration = Duration::from_secs(1);

pub(super) async fn lock_row(
    connection: &mut MySqlConnection,
    server: &Server,
    claim: &RowClaim,
    slice: Duration,
) -> sqlx::Result<RowAttempt> {
    let attempt = match lock_and_write(connection, server, claim, slice).await {
        Err(error) if is_locked(connection, server, &error).await? => Ok(RowAttempt::Busy),
        attempt => attempt,
    };
    let fault = attempt.as_ref().err().map(MySql::classify);
    if matches!(fault, Some(Fault::Deadlock | Fault::Serialization | Fault::TransactionEnded))
        || matches!(attempt, Ok(RowAttempt::Stale | RowAttempt::Leased { .. } | RowAttempt::Unsettled { .. }))
    {
        MySql::doom(connection).await;
    }
    attempt
}

/// Whether an error says that another transaction has the row. What keeps everybody from the whole table (a lock for a backup, an
/// ALTER) answers the same. So the table is asked for once more: for a row that there is not.
async fn is_locked(
    connection: &mut MySqlConnection,
    server: &Server,
    error: &sqlx::Error,
) -> sqlx::Result<bool> {
    match number(error) {
        Some(ROW_IS_LOCKED) => return Ok(true),
        Some(LOCK_WAIT_TIMEOUT) => {}
        Some(number) if TOOK_TOO_LONG.contains(&number) => {}
        _ => return Ok(false),
    }
    let sql = format!("{} id FROM {} WHERE id = -1 FOR UPDATE", select_within(QUICK), server.table.name());
    match sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await {
        Ok(_) => Ok(true),
        Err(error) if MySql::classify(&error) == Fault::Busy => Ok(false),
        Err(error) => Err(error),
    }
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
    let is_ours = is_ours(lease, RELEASED_IN_MARKED);
    let (id, table) = (lease.row.id, lease.server.table.name());
    // An error is what keeps the server from reading on: a number that is too large, whatever the SQL mode. And MySQL can't name a
    // temporary table twice in a statement; MariaDB can, and takes this for a comment.
    let guard = match write(lease, release, RELEASED_IN_MARKED) {
        Some(write) => format!("{write}; SELECT EXP(1000 * (ROW_COUNT() <> 1));"),
        None => format!(
            "{} EXP(1000 * (COUNT(*) <> 1)) FROM {table} WHERE {is_ours}
            /*!80000 AND EXISTS (SELECT 1 FROM {table} AS again WHERE again.id = {id}) */ LOCK IN SHARE MODE;",
            select_within(MySql::GUARD_LIMIT),
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

/// A lease that this very transaction has released guards it all the same.
pub(super) async fn guard(
    connection: &mut MySqlConnection,
    lease: &LeaseKey,
    release: bool,
) -> sqlx::Result<Guarded> {
    match guard_held(connection, lease, release).await? {
        Guarded::NotOurs => guard_released(connection, lease).await,
        guarded => Ok(guarded),
    }
}

/// In one message, whatever it takes.
async fn guard_held(
    connection: &mut MySqlConnection,
    lease: &LeaseKey,
    release: bool,
) -> sqlx::Result<Guarded> {
    // First, as the row is seen that this writes itself. A snapshot is fixed by it, but no older than what follows.
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
    if let Some(write) = write(lease, release, "") {
        let mut released = String::new();
        if release {
            let token = lease.fencing_token;
            released = format!(
                "; SET @lock_db_released = {token}{}",
                note(&lease.server, &format!("{RELEASED}{token}"))
            );
        }
        let sql = format!("{IN_TRANSACTION}; {sees_grant}; {write}; SELECT ROW_COUNT(){released}{used}");
        return guarded(&sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await?);
    }
    let sql = format!(
        "{IN_TRANSACTION}; {sees_grant}; {} COUNT(*) FROM {} WHERE {} LOCK IN SHARE MODE{used}",
        select_within(MySql::GUARD_LIMIT),
        lease.server.table.name(),
        is_ours(lease, "")
    );
    guarded(&sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await?)
}

/// Whether this transaction has released it, by a savepoint that ends with the transaction.
async fn guard_released(connection: &mut MySqlConnection, lease: &LeaseKey) -> sqlx::Result<Guarded> {
    // Nothing tells there that lasts as long as the transaction and no longer: see `note`.
    if lease.server.cluster == Cluster::MultiPrimary {
        return Ok(Guarded::NotOurs);
    }
    let savepoint = format!("SAVEPOINT {RELEASED}{}", lease.fencing_token);
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
        Err(error) => Err(error),
    }
}

/// By what the plain read found, which comes first, and the locking one or the write, which counts last.
fn guarded(rows: &[MySqlRow]) -> sqlx::Result<Guarded> {
    let [shown, rows @ ..] = rows else { return Ok(Guarded::NotOurs) };
    if is_temporary(shown) {
        return Ok(Guarded::Elsewhere);
    }
    let (Some(first), Some(last)) = (rows.first(), rows.last()) else { return Ok(Guarded::NotOurs) };
    let is_ours = last.try_get::<i64, _>(0)? > 0;
    // Without a row there is only the count.
    let sees_grant = rows.len() > 1 && first.try_get(0)?;
    Ok(match (is_ours, sees_grant) {
        (false, _) => Guarded::NotOurs,
        (true, false) => Guarded::Stale,
        (true, true) => Guarded::Ours,
    })
}

pub(super) async fn sees_grant(connection: &mut MySqlConnection, lease: &LeaseKey) -> sqlx::Result<bool> {
    if lease.server.cluster == Cluster::SinglePrimary {
        return Ok(true);
    }
    let (id, fencing_token, table) = (lease.row.id, lease.fencing_token, lease.server.table.name());
    let sql = format!("SELECT 1 FROM {table} WHERE id = {id} AND fencing_token >= {fencing_token}");
    Ok(fetch_optional(connection, sql).await?.is_some())
}

/// The variable outlives the transaction, so it only tells when the answer is no.
pub(super) async fn may_be_its_own(connection: &mut MySqlConnection, secret: &str) -> sqlx::Result<bool> {
    let digest = digest(secret);
    let sql = format!("SELECT COALESCE(INSTR({TAKEN}, '{}'), 0) > 0", digest.get(..32).unwrap_or(&digest));
    let found = fetch_optional(connection, sql).await?;
    found.map_or(Ok(false), |row| row.try_get(0))
}

pub(super) async fn doom(connection: &mut MySqlConnection) {
    let _doomed = sqlx::raw_sql(DOOM).execute(connection).await;
}

/// The guard that has to be a write: to release, and where a lock reaches no further than its own node.
fn write(lease: &LeaseKey, release: bool, or_released: &str) -> Option<String> {
    let set = match (release, lease.server.cluster) {
        (true, _) => "expire_time = '1970-01-01 00:00:00', ttl_micros = 0, guard_count = guard_count + 1",
        (false, Cluster::MultiPrimary) => "guard_count = guard_count + 1",
        (false, Cluster::SinglePrimary) => return None,
    };
    // MySQL limits SELECTs only, so it is one of them that waits for the row.
    Some(format!(
        "{} id FROM {table} WHERE id = {} FOR UPDATE; UPDATE {table} SET {set} WHERE {}",
        select_within(MySql::GUARD_LIMIT),
        lease.row.id,
        is_ours(lease, or_released),
        table = lease.server.table.name(),
    ))
}

/// Check, commit and unmark in one message, of which the server reads nothing after an error.
async fn commit_marked(connection: &mut MySqlConnection, guard: String) -> sqlx::Result<Guarded> {
    let sql = format!("{IS_MARKED}; {guard} COMMIT AND NO CHAIN NO RELEASE; {UNMARK}");
    match sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await {
        Ok(_) => Ok(Guarded::Committed { call: None }),
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
    server: &Server,
    claim: &RowClaim,
    slice: Duration,
) -> sqlx::Result<RowAttempt> {
    // By the primary key: locked by its name, a row of MariaDB takes the gap before it along, and nobody could make the
    // row of a name that sorts there until the transaction ends. Not with SKIP LOCKED, which leaves a lock on the gap
    // behind the row that it skipped.
    // No plain SELECT before the row is locked: in REPEATABLE READ it would fix the transaction's snapshot too early.
    let (id, table) = (claim.row.id, server.table.name());
    let (limit, no_wait) = if slice.is_zero() { (LONGEST_TRY, "NOWAIT") } else { (slice, "") };
    let sql = format!(
        "{IN_TRANSACTION}; {}; {} lock_name, lock_kind, secret_key, fencing_token,
            TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', expire_time), ttl_micros,
            TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)),
            TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', create_time)
        FROM {table} WHERE id = {id} FOR UPDATE {no_wait}",
        show(server),
        select_within(limit)
    );
    let mut rows = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut *connection).await?.into_iter();
    let Some(shown) = rows.next() else { return Ok(RowAttempt::Missing) };
    if is_temporary(&shown) {
        return Ok(RowAttempt::ForeignTransaction);
    }
    let Some(row) = rows.next() else { return Ok(RowAttempt::Missing) };
    if row.try_get::<&[u8], _>(0)? != claim.row.name.as_bytes() {
        return Ok(RowAttempt::Missing);
    }
    // A database of the same name on another server.
    if row.try_get::<i64, _>(7)? != claim.created {
        return Ok(RowAttempt::ForeignTransaction);
    }
    if Kind::parse(row.try_get(1)?) != claim.kind {
        return Ok(RowAttempt::WrongKind);
    }
    let (last, before): (i64, String) = (row.try_get(3)?, row.try_get(2)?);
    let (expires, ttl, now): (i64, i64, i64) = (row.try_get(4)?, row.try_get(5)?, row.try_get(6)?);
    if expires > now {
        return Ok(RowAttempt::Leased { usable: false });
    }
    if expires != 0 || ttl != 0 {
        return Ok(RowAttempt::Unsettled { usable: false });
    }

    // The locking read sees the newest row, the plain one the transaction's snapshot. A holder that has not given the lock up there
    // may have committed since, also one that is gone by now and wrote nothing more. By the name: a row that was cleaned away and made
    // anew is another one.
    let name = literal(&claim.row.name);
    let sql = format!(
        "SELECT id, fencing_token, secret_key, expire_time = '1970-01-01 00:00:00' AND ttl_micros = 0
        FROM {table} WHERE lock_name = {name}"
    );
    let is_current = match fetch_optional(connection, sql).await? {
        Some(seen) => {
            seen.try_get::<i64, _>(0)? == id
                && seen.try_get::<i64, _>(1)? == last
                && seen.try_get::<&str, _>(2)? == before
                && seen.try_get::<bool, _>(3)?
        }
        // A row that nobody has held yet may be newer than the snapshot.
        None => last == 0,
    };
    if !is_current {
        return Ok(RowAttempt::Stale);
    }

    let (fencing_token, seed) = (last.saturating_add(1).max(now), literal(claim.secret.as_str()));
    let (secret, digest) = (format!("CONVERT({DRAWN} USING ascii)"), format!("LEFT(SHA2({DRAWN}, 256), 32)"));
    let sql = format!(
        "SET {DRAWN} = LEFT(SHA2(CONCAT({seed}, UUID(), RAND()), 256), 32);
        UPDATE {table}
        SET fencing_token = {fencing_token}, secret_key = {secret},
            owner = CONVERT({} USING utf8mb4), acquire_time = UTC_TIMESTAMP(6)
        WHERE id = {id} AND lock_name = {name};
        SET {TAKEN} = IF({TAKEN} IS NULL, {digest}, RIGHT(CONCAT({TAKEN}, {digest}), {MOST_TAKEN}));
        SELECT fencing_token = {fencing_token} AND secret_key = {secret}, secret_key
        FROM {table} WHERE id = {id}{}",
        literal(&claim.owner),
        note(server, USED),
    );
    let written = fetch_optional(connection, sql).await?;
    let is_written = written.as_ref().map_or(Ok(false), |row| row.try_get(0))?;
    let Some(written) = written.filter(|_| is_written) else {
        // A trigger may have its own idea of the row. On a cluster the write of another node may have ended the transaction.
        return Ok(match server.cluster {
            Cluster::SinglePrimary => RowAttempt::Unwritten,
            Cluster::MultiPrimary => RowAttempt::Stale,
        });
    };
    let secret = Some(Secret::drawn_by_server(written.try_get(1)?));
    Ok(RowAttempt::Locked { fencing_token, before, secret })
}

/// By the savepoint that `lock_row` and `guard` leave: the transaction keeps the table from being altered since then.
pub(super) async fn has_used_table(connection: &mut MySqlConnection) -> sqlx::Result<bool> {
    let sql = format!("RELEASE SAVEPOINT {USED}; SAVEPOINT {USED}");
    match sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await {
        Ok(_) => Ok(true),
        Err(error) if number(&error) == Some(NO_SUCH_SAVEPOINT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// By a plain read, in a transaction that has a snapshot already.
pub(super) async fn find_row(
    connection: &mut MySqlConnection,
    server: &Server,
    name: &str,
) -> sqlx::Result<Option<LockRow>> {
    let (table, name) = (server.table.name(), literal(name));
    let look = format!("{} {} FROM {table} WHERE lock_name = {name}", select_within(QUICK), lease::COLUMNS);
    fetch_optional(connection, look).await?.as_ref().map(lease::lock_row).transpose()
}

/// The beginning of a SELECT that the server ends when it takes longer. Each server reads its own form of the limit and takes
/// the other's for a comment.
fn select_within(limit: Duration) -> String {
    // Zero would mean no limit at all.
    let limit = limit.as_millis().max(1);
    format!(
        "/*M! SET STATEMENT max_statement_time = {}.{:03}, innodb_lock_wait_timeout = 60 FOR */
        SELECT /*+ MAX_EXECUTION_TIME({limit}) */",
        limit / 1000,
        limit % 1000
    )
}

/// Behind other statements: a savepoint that tells something as long as the transaction lasts. Not on a cluster: there the write of another
/// node ends the transaction at any moment, and a savepoint that comes next would swallow the error that says so.
fn note(server: &Server, name: &str) -> String {
    match server.cluster {
        Cluster::SinglePrimary => format!("; SAVEPOINT {name}"),
        Cluster::MultiPrimary => String::new(),
    }
}

/// Before other statements in the caller's session: a temporary table hides the one that is meant, also by its full name.
fn show(server: &Server) -> String {
    format!("SHOW CREATE TABLE {}", server.table.name())
}

/// The one row, read to the end of the answer: what is left over of it would meet the next statement.
async fn fetch_optional(connection: &mut MySqlConnection, sql: String) -> sqlx::Result<Option<MySqlRow>> {
    Ok(sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await?.pop())
}

fn digest(secret: &str) -> String {
    let digest = sha2::Sha256::digest(secret);
    digest.iter().fold(String::new(), |digits, byte| format!("{digits}{byte:02x}"))
}

/// A statement in the application's connection goes as text, which its log shows when it takes long; so it tells a digest of
/// the secret only.
///
/// A released lease guards nothing, except in the transaction that releases it: `or_released` tells which that is.
fn is_ours(lease: &LeaseKey, or_released: &str) -> String {
    let digits = digest(lease.secret.as_str());
    format!(
        "id = {} AND lock_name = {} AND fencing_token = {token} AND SHA2(secret_key, 256) = '{digits}'
        AND (expire_time > '1970-01-01 00:00:00' {or_released})",
        lease.row.id,
        literal(&lease.row.name),
        token = lease.fencing_token,
    )
}
