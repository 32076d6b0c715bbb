//! Row locks and guards in transactions on connections of the application.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use sqlx::sqlite::{SqliteConnection, SqliteRow};
use sqlx::{AssertSqlSafe, Row, Sqlite};

use super::lease::clock_micros;
use crate::Kind;
use crate::database::driver;
use crate::database::{Fault, Guarded, LeaseKey, RowAttempt, RowClaim, Server};

/// The longest single wait for the write lock. SQLite's own wait sleeps for longer and longer, and
/// is not fair.
const LONGEST_SLICE: Duration = Duration::from_millis(50);
/// A shorter wait does not show whether SQLite waited at all.
const SHORTEST_SLICE: Duration = Duration::from_millis(4);

/// A write, which takes the write lock. In a transaction without the write lock, a plain read would
/// hold off no takeover. Whether the lease was released does not matter here: a transaction with an
/// older snapshot than this write can't take the lock.
const GUARD: &str = "
UPDATE {table} SET owner = owner
WHERE lock_name = ?1 AND secret_key = ?2 AND fencing_token = ?3";

const GUARD_AND_RELEASE: &str = "
UPDATE {table} SET expire_time = '1970-01-01 00:00:00.000000', ttl_micros = 0
WHERE lock_name = ?1 AND secret_key = ?2 AND fencing_token = ?3";

/// Ends the transaction, so that its reads keep no other transaction from committing, and begins
/// one that can't be committed. It contains a row that refers to a missing row, which SQLite checks
/// at the COMMIT. The rollback removes everything.
const DOOM: &str = "
BEGIN;
CREATE TEMP TABLE lock_db_roll_this_transaction_back (
    id INTEGER PRIMARY KEY,
    other INTEGER REFERENCES lock_db_roll_this_transaction_back (id) DEFERRABLE INITIALLY DEFERRED);
INSERT INTO temp.lock_db_roll_this_transaction_back VALUES (1, 2)";

const IS_MARKED: &str = "RELEASE SAVEPOINT lock_db_guard";

/// The first statement is a write in every case, because only a write takes the write lock.
const MAKE_ROW: &str = "
INSERT INTO {table} (lock_name, lock_kind) VALUES (?1, ?2)
ON CONFLICT (lock_name) DO UPDATE SET owner = owner
RETURNING lock_kind, secret_key, expire_time > strftime('%Y-%m-%d %H:%M:%f000', 'now'),
    expire_time <= '1970-01-01 00:00:00.000000' OR ttl_micros <= 0";

const WRITE_ROW: &str = "
UPDATE {table}
SET fencing_token = max(fencing_token + 1, ?4), secret_key = ?2, owner = ?3,
    acquire_time = strftime('%Y-%m-%d %H:%M:%f000', 'now'),
    expire_time = '1970-01-01 00:00:00.000000', ttl_micros = 0
WHERE lock_name = ?1
RETURNING fencing_token";

/// If the same transaction takes the lock again, the token is larger.
const STILL_LOCKED: &str = "SELECT 1 FROM {table} WHERE lock_name = ?1 AND fencing_token >= ?2";

/// The statement form of the pragma. The table form would begin to read the database, and fix the
/// transaction's snapshot.
const FILES: &str = "PRAGMA database_list";

pub(super) async fn lock_row(
    connection: &mut SqliteConnection,
    server: &Server,
    claim: &RowClaim,
    slice: Duration,
) -> driver::Result<RowAttempt> {
    refuse_autocommit(connection).await?;
    if !claim.is_own && !is_here(connection, server).await? {
        return Ok(RowAttempt::ForeignTransaction);
    }
    let slice = slice.min(LONGEST_SLICE);
    let limited = LimitedWait::set(connection, slice).await?;
    let started = Instant::now();
    let attempt = lock_and_write(&mut *limited.connection, server, claim).await;
    let waited = started.elapsed();
    limited.restore().await?;
    match attempt {
        // SQLite does not wait in a transaction that has read something. Such a transaction works
        // on an older state of the database, and without a WAL it would keep the writer from
        // committing.
        Err(error) if error.fault::<Sqlite>() == Fault::Busy => {
            let did_not_wait = slice >= SHORTEST_SLICE && waited < slice / 2;
            // Whether the writer is the lock's holder is unknown.
            if did_not_wait { Ok(RowAttempt::Stale) } else { Err(error) }
        }
        attempt => attempt,
    }
}

pub(super) async fn is_here(connection: &mut SqliteConnection, server: &Server) -> driver::Result<bool> {
    let files = sqlx::query(FILES).fetch_all(connection).await?;
    let is_here = |file: &SqliteRow| {
        Ok(file.try_get::<&str, _>(1)? == "main" && file.try_get::<&str, _>(2)? == server.table.identity)
    };
    Ok(files.iter().map(is_here).collect::<driver::Result<Vec<_>>>()?.contains(&true))
}

async fn lock_and_write(
    connection: &mut SqliteConnection,
    server: &Server,
    claim: &RowClaim,
) -> driver::Result<RowAttempt> {
    let name = &*claim.row.name;
    let query = sqlx::query(server.table.sql(MAKE_ROW)).bind(name).bind(claim.kind.as_str());
    let Some(row) = query.fetch_optional(&mut *connection).await? else { return Ok(RowAttempt::Unwritten) };
    if Kind::parse(row.try_get(0)?) != claim.kind {
        return Ok(RowAttempt::WrongKind);
    }
    if row.try_get(2)? {
        return Ok(RowAttempt::Leased { usable: false });
    }
    if !row.try_get::<bool, _>(3)? {
        return Ok(RowAttempt::Unsettled { usable: false });
    }
    let written = sqlx::query_scalar(server.table.sql(WRITE_ROW))
        .bind(name)
        .bind(claim.secret.as_str())
        .bind(&*claim.owner)
        .bind(clock_micros())
        .fetch_optional(connection)
        .await?;
    let Some(fencing_token) = written else { return Ok(RowAttempt::Unwritten) };
    Ok(RowAttempt::Locked { fencing_token, before: row.try_get(1)?, secret: None })
}

pub(super) async fn commit_locked(
    connection: &mut SqliteConnection,
    server: &Server,
    name: &str,
    fencing_token: i64,
) -> driver::Result<Guarded> {
    if !is_marked(connection).await? {
        return Ok(Guarded::Ended);
    }
    let query = sqlx::query(server.table.sql(STILL_LOCKED)).bind(name).bind(fencing_token);
    Ok(Guarded::when(query.fetch_optional(connection).await?.is_some()))
}

pub(super) async fn commit_guarded(
    connection: &mut SqliteConnection,
    lease: &LeaseKey,
    release: bool,
) -> driver::Result<Guarded> {
    if !is_marked(connection).await? {
        return Ok(Guarded::Ended);
    }
    ask(connection, lease, release).await
}

pub(super) async fn guard(
    connection: &mut SqliteConnection,
    lease: &LeaseKey,
    release: bool,
) -> driver::Result<Guarded> {
    refuse_autocommit(connection).await?;
    ask(connection, lease, release).await
}

async fn ask(connection: &mut SqliteConnection, lease: &LeaseKey, release: bool) -> driver::Result<Guarded> {
    let query = sqlx::query(lease.server.table.sql(if release { GUARD_AND_RELEASE } else { GUARD }));
    let query = query.bind(&*lease.row.name).bind(lease.secret.as_str()).bind(lease.fencing_token);
    Ok(Guarded::when(query.execute(connection).await?.rows_affected() > 0))
}

/// A ROLLBACK without a transaction is an error on SQLite. After that error, sqlx considers the
/// connection to be in a transaction permanently.
pub(super) async fn reopen(connection: &mut SqliteConnection) {
    let _open_anyway = sqlx::raw_sql("BEGIN").execute(connection).await;
}

/// Only if foreign keys are enforced, which is sqlx's default. Otherwise the new transaction could
/// commit later writes, which only the old snapshot has prevented.
pub(super) async fn doom(connection: &mut SqliteConnection) {
    let enforced = sqlx::query_scalar("PRAGMA foreign_keys").fetch_one(&mut *connection).await;
    if matches!(enforced, Ok(true)) {
        // Savepoints of nested sqlx handles, which end them one by one.
        let mut savepoints = String::new();
        for number in 1.. {
            let savepoint = format!("SAVEPOINT _sqlx_savepoint_{number}");
            let found = sqlx::raw_sql(AssertSqlSafe(format!("ROLLBACK TO {savepoint}")));
            if found.execute(&mut *connection).await.is_err() {
                break;
            }
            savepoints = format!("{savepoints}; {savepoint}");
        }
        // Fails if the transaction has already ended.
        let _ended = sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await;
        let doom = format!("{DOOM}{savepoints}");
        let _doomed = sqlx::raw_sql(AssertSqlSafe(doom)).execute(connection).await;
    }
}

/// `false`: the marked transaction has ended. Removes the mark.
async fn is_marked(connection: &mut SqliteConnection) -> driver::Result<bool> {
    match sqlx::raw_sql(IS_MARKED).execute(connection).await {
        Err(sqlx::Error::Database(error)) if error.message().starts_with("no such savepoint") => Ok(false),
        answer => Ok(answer.map(|_| true)?),
    }
}

/// Some errors (a full disk, `ON CONFLICT ROLLBACK`) end a transaction without the knowledge of its
/// handle. If BEGIN succeeds, no transaction was open, and the new one gives the handle something
/// to roll back.
async fn refuse_autocommit(connection: &mut SqliteConnection) -> driver::Result<()> {
    match sqlx::raw_sql("BEGIN").execute(connection).await {
        Err(sqlx::Error::Database(error)) if error.message().contains("within a transaction") => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_) => Err(sqlx::Error::BeginFailed.into()),
    }
}

/// The application's connection with another busy timeout, which is restored afterwards in every
/// case.
struct LimitedWait<'a> {
    connection: &'a mut SqliteConnection,
    /// The timeout to restore; `None` once it was restored.
    restore: Option<i64>,
}

impl<'a> LimitedWait<'a> {
    async fn set(connection: &'a mut SqliteConnection, wait: Duration) -> driver::Result<Self> {
        let before: i64 = sqlx::query_scalar("PRAGMA busy_timeout").fetch_one(&mut *connection).await?;
        let mut limited = Self { connection, restore: Some(before) };
        let wait = i64::try_from(wait.as_millis()).unwrap_or(0);
        if wait == before {
            limited.restore = None;
        } else {
            sqlx::raw_sql(busy_timeout(wait)).execute(&mut *limited.connection).await?;
        }
        Ok(limited)
    }

    async fn restore(mut self) -> driver::Result<()> {
        if let Some(before) = self.restore {
            sqlx::raw_sql(busy_timeout(before)).execute(&mut *self.connection).await?;
            self.restore = None;
        }
        Ok(())
    }
}

/// Restores the timeout if the waiting future is dropped midway. The first poll hands the statement
/// to the connection's own thread. The thread executes it after its current statement, whether the
/// result is read or not.
impl Drop for LimitedWait<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.restore.take() {
            let restoring = pin!(sqlx::raw_sql(busy_timeout(before)).execute(&mut *self.connection));
            let _queued = restoring.poll(&mut Context::from_waker(Waker::noop()));
        }
    }
}

/// A pragma takes no parameters.
pub(super) fn busy_timeout(milliseconds: i64) -> AssertSqlSafe<String> {
    AssertSqlSafe(format!("PRAGMA busy_timeout = {milliseconds}"))
}
