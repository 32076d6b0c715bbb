//! SQLite 3.42 and later, in a file that several processes of one host may open.
//!
//! There is one writer at a time in the whole database, so there are no row locks: `lock_row` takes the write lock.

use std::convert::Infallible;
use std::future::Future;
use std::pin::pin;
use std::task::{Context, Waker};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqliteQueryResult};
use sqlx::{AssertSqlSafe, Connection, Pool, Row, Sqlite};

use super::{
    Claim, Exchanged, Fault, Grant, Guarded, LeaseKey, LockDatabase, LockRow, Place, Renewal, Return,
    RowAttempt, RowClaim, Server, Standing, as_json, in_order,
};
use crate::limits::micros;
use crate::secret::Secret;
use crate::{Error, Kind, schema};

/// How long a private connection waits for another writer before it answers "busy".
const PREPARE: &str = "PRAGMA busy_timeout = 100";

/// The longest wait for the write lock at once: SQLite's own wait sleeps longer and longer, and is not fair.
const LONGEST_SLICE: Duration = Duration::from_millis(50);

const LOOK: &str = "
SELECT id, lock_kind, secret_key, owner, fencing_token,
       CAST(unixepoch(create_time, 'subsec') * 1000000 AS INTEGER),
       CAST(unixepoch(acquire_time, 'subsec') * 1000000 AS INTEGER),
       CAST(unixepoch(expire_time, 'subsec') * 1000000 AS INTEGER),
       CAST((unixepoch(expire_time, 'subsec') - unixepoch('now', 'subsec')) * 1000000 AS INTEGER), waiters
FROM distributed_lock WHERE lock_name = ?1";

const CREATE: &str = "
INSERT INTO distributed_lock (lock_name, lock_kind) VALUES (?1, ?2)
ON CONFLICT (lock_name) DO NOTHING";

/// The new number is never below the clock's microseconds, so that a row that was cleaned away does not bring a number
/// back. They are bound (`?5`): the clock of an embedded database is ours, and its own functions cut it to milliseconds.
const ACQUIRE: &str = "
UPDATE distributed_lock
SET fencing_token = CASE WHEN secret_key = ?2 THEN fencing_token ELSE max(fencing_token + 1, ?5) END,
    previous_token = CASE WHEN secret_key = ?2 THEN previous_token ELSE fencing_token END,
    acquire_time = CASE WHEN secret_key = ?2 THEN acquire_time
        ELSE strftime('%Y-%m-%d %H:%M:%f000', 'now') END,
    expire_time = strftime('%Y-%m-%d %H:%M:%f000', 'now', ?4),
    secret_key = ?2,
    owner = ?3,
    waiters = CASE WHEN substr(waiters, 1, 32) = ?6 THEN substr(waiters, 57) ELSE waiters END
WHERE lock_name = ?1 AND lock_kind = 'insert'
  AND (secret_key = ?2 OR (expire_time <= strftime('%Y-%m-%d %H:%M:%f000', 'now')
      AND (waiters = '' OR ?6 IS NULL OR substr(waiters, 1, 32) = ?6)))
RETURNING lock_name, secret_key, fencing_token, id, waiters <> '', fencing_token - previous_token";

/// Never brings a released lease back (1970), and never moves a deadline backwards when the clock was set back.
const RENEW: &str = "
UPDATE distributed_lock
SET expire_time = max(expire_time, strftime('%Y-%m-%d %H:%M:%f000', 'now',
        printf('+%d.%03d seconds', asked.ttl / 1000000, asked.ttl / 1000 % 1000)))
FROM (
    SELECT value ->> 0 AS id, value ->> 1 AS secret, value ->> 2 AS ttl, value ->> 3 AS token FROM json_each(?1)) AS asked
WHERE distributed_lock.id = asked.id AND secret_key = asked.secret AND fencing_token = asked.token
  AND expire_time > '1970-01-01 00:00:00.000000'
RETURNING secret_key";

const RELEASE: &str = "
UPDATE distributed_lock
SET expire_time = '1970-01-01 00:00:00.000000',
    waiters = CASE WHEN ?3 <> '' AND waiters <> '' AND length(waiters) < 3584 AND instr(waiters, ?3) = 0
        THEN waiters || ?3 || printf('%016d', ?5 + 2000000) || ?4 ELSE waiters END
WHERE lock_name = ?1 AND secret_key = ?2";

const RELEASE_LATER: &str = "
UPDATE distributed_lock
SET expire_time = CASE WHEN until.passed THEN '1970-01-01 00:00:00.000000' ELSE until.moment END,
    secret_key = CASE WHEN until.passed THEN secret_key ELSE '' END
FROM (
    SELECT id, moment, moment <= strftime('%Y-%m-%d %H:%M:%f000', 'now') AS passed
    FROM (
        SELECT id, strftime('%Y-%m-%d %H:%M:%f000', acquire_time, ?3) AS moment
        FROM distributed_lock WHERE lock_name = ?1 AND secret_key = ?2)) AS until
WHERE distributed_lock.id = until.id";

const STAND: &str = "
UPDATE distributed_lock SET waiters = waiters || ?2 || printf('%016d', ?4 + 2000000) || ?3
WHERE lock_name = ?1 AND lock_kind = 'insert' AND length(waiters) < 3584 AND instr(waiters, ?2) = 0";

/// Only on top of what was read before.
const SET_WAITERS: &str = "
UPDATE distributed_lock SET waiters = ?3 WHERE lock_name = ?1 AND lock_kind = 'insert' AND waiters = ?2";

const REMOVE_WAITER: &str = "
UPDATE distributed_lock
SET waiters = substr(waiters, 1, instr(waiters, ?2) - 1) || substr(waiters, instr(waiters, ?2) + 56)
WHERE lock_name = ?1 AND instr(waiters, ?2) > 0";

/// A write, for the write lock: in a transaction that has none yet, a plain read would hold off nobody.
const GUARD: &str = "
UPDATE distributed_lock SET owner = owner WHERE lock_name = ?1 AND secret_key = ?2 AND fencing_token = ?3";

const GUARD_AND_RELEASE: &str = "
UPDATE distributed_lock SET expire_time = '1970-01-01 00:00:00.000000'
WHERE lock_name = ?1 AND secret_key = ?2 AND fencing_token = ?3";

const IS_MARKED: &str = "RELEASE SAVEPOINT lock_db_guard";

/// The first statement is a write, whatever it finds: a write is what takes the write lock.
const MAKE_ROW: &str = "
INSERT INTO distributed_lock (lock_name, lock_kind) VALUES (?1, ?2)
ON CONFLICT (lock_name) DO UPDATE SET owner = owner
RETURNING lock_kind, secret_key, expire_time > strftime('%Y-%m-%d %H:%M:%f000', 'now')";

const WRITE_ROW: &str = "
UPDATE distributed_lock
SET fencing_token = max(fencing_token + 1, ?4), secret_key = ?2, owner = ?3,
    acquire_time = strftime('%Y-%m-%d %H:%M:%f000', 'now')
WHERE lock_name = ?1
RETURNING fencing_token";

/// Taken again in the same transaction, the lock has a larger number.
const STILL_LOCKED: &str = "SELECT 1 FROM distributed_lock WHERE lock_name = ?1 AND fencing_token >= ?2";

const CHECK_SCHEMA: &str = "
SELECT id, lock_name, lock_kind, secret_key, fencing_token, owner, create_time, acquire_time, expire_time, waiters,
       previous_token
FROM distributed_lock LIMIT 0";

const WAIT_FOR_OTHER_MIGRATIONS: &str = "PRAGMA busy_timeout = 60000";
const LOCK_MIGRATIONS: &str = "BEGIN IMMEDIATE";
const CREATE_LEDGER: &str = "
CREATE TABLE IF NOT EXISTS _lock_db_migrations (
    version INTEGER PRIMARY KEY,
    applied_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%d %H:%M:%f000', 'now')))";
const APPLIED: &str = "SELECT version FROM _lock_db_migrations";
const NOTE_APPLIED: &str = "INSERT INTO _lock_db_migrations (version) VALUES (?1)";
const MIGRATIONS: [(i64, &str); 1] = [(1, schema::SQLITE)];

impl LockDatabase for Sqlite {
    const FOLDER: &'static str = "sqlite";
    const BEGIN_SHORT: &'static str = "BEGIN IMMEDIATE";
    const ROW_IS_MADE_IN_TRANSACTION: bool = true;
    /// Some errors end a transaction by themselves; the savepoint is gone then.
    const BEGIN_MARKED: &'static str = "BEGIN; SAVEPOINT lock_db_guard";
    /// With the write lock from the first statement on, a takeover waits, and the snapshot can't be too old.
    const BEGIN_GUARDED: &'static str = "BEGIN IMMEDIATE; SAVEPOINT lock_db_guard";

    fn check_options(options: &SqliteConnectOptions) -> Result<(), Error> {
        let file = options.get_filename();
        if file.as_os_str().is_empty() || file.as_os_str() == ":memory:" {
            return Err(Error::InvalidOption {
                option: "pool",
                value: "a SQLite database in memory that each connection has to itself".into(),
                reason: "locks need a database that all connections share: a file (for tests, `lock_db::testing::locks()` makes one)",
            });
        }
        Ok(())
    }

    async fn prepare(connection: &mut SqliteConnection) -> sqlx::Result<Server> {
        sqlx::raw_sql(PREPARE).execute(connection).await?;
        Ok(Server::default())
    }

    type Listening = Infallible;

    async fn connect_listening(_pool: &Pool<Sqlite>) -> sqlx::Result<Infallible> {
        Err(sqlx::Error::Protocol("this database calls nobody".into()))
    }

    async fn listen(listening: &mut Infallible, _listener: u32) -> sqlx::Result<()> {
        match *listening {}
    }

    async fn listening_connection(listening: &mut Infallible) -> sqlx::Result<&mut SqliteConnection> {
        match *listening {}
    }

    async fn called(listening: &mut Infallible) -> sqlx::Result<i64> {
        match *listening {}
    }

    async fn migrate(connection: &mut SqliteConnection) -> sqlx::Result<()> {
        sqlx::raw_sql(WAIT_FOR_OTHER_MIGRATIONS).execute(&mut *connection).await?;
        let mut transaction = connection.begin_with(LOCK_MIGRATIONS).await?;
        sqlx::query(CREATE_LEDGER).execute(&mut *transaction).await?;
        let applied: Vec<i64> = sqlx::query_scalar(APPLIED).fetch_all(&mut *transaction).await?;
        for (version, sql) in MIGRATIONS {
            if !applied.contains(&version) {
                sqlx::raw_sql(sql).execute(&mut *transaction).await?;
                sqlx::query(NOTE_APPLIED).bind(version).execute(&mut *transaction).await?;
            }
        }
        transaction.commit().await?;
        sqlx::raw_sql(PREPARE).execute(connection).await.map(drop)
    }

    async fn check_schema(connection: &mut SqliteConnection) -> sqlx::Result<Option<&'static str>> {
        sqlx::query(CHECK_SCHEMA).execute(connection).await?;
        Ok(None)
    }

    async fn look(connection: &mut SqliteConnection, name: &str) -> sqlx::Result<Option<LockRow>> {
        let row = sqlx::query(LOOK).bind(name).fetch_optional(connection).await?;
        row.map(|row| {
            Ok(LockRow {
                id: row.try_get(0)?,
                kind: Kind::parse(row.try_get(1)?),
                secret_key: row.try_get(2)?,
                owner: row.try_get(3)?,
                fencing_token: row.try_get(4)?,
                created: row.try_get(5)?,
                acquired: row.try_get(6)?,
                expires: row.try_get(7)?,
                remaining: row.try_get(8)?,
                waiters: row.try_get(9)?,
            })
        })
        .transpose()
    }

    async fn create(connection: &mut SqliteConnection, name: &str, kind: Kind) -> sqlx::Result<()> {
        sqlx::query(CREATE).bind(name).bind(kind.as_str()).execute(connection).await.map(drop)
    }

    async fn acquire(
        connection: &mut SqliteConnection,
        _server: Server,
        claim: &Claim,
    ) -> sqlx::Result<Option<Grant>> {
        let ttl = later_by(claim.ttl);
        // All rows, though there is one at most: sqlx 0.9 resets a statement of which it wants only the first, and drops the
        // error of the commit that happens then.
        let rows = sqlx::query(ACQUIRE)
            .bind(&*claim.name)
            .bind(claim.secret.as_str())
            .bind(&*claim.owner)
            .bind(ttl)
            .bind(clock_micros())
            .bind(claim.place.as_ref().map(Secret::as_str))
            .fetch_all(connection)
            .await?;
        let Some(row) = rows.first() else { return Ok(None) };
        if row.try_get::<&str, _>(0)? != &*claim.name || row.try_get::<&str, _>(1)? != claim.secret.as_str() {
            return Err(sqlx::Error::Protocol(
                "the database answered with the row of another statement".into(),
            ));
        }
        let (fencing_token, id) = (row.try_get(2)?, row.try_get(3)?);
        Ok(Some(Grant { id, fencing_token, others_wait: row.try_get(4)?, numbers: row.try_get(5)? }))
    }

    async fn renew(connection: &mut SqliteConnection, leases: &[Renewal]) -> sqlx::Result<Vec<Standing>> {
        let renewed: Vec<String> =
            sqlx::query_scalar(RENEW).bind(as_json(leases)).fetch_all(connection).await?;
        Ok(in_order(leases, renewed.into_iter().map(|secret| (secret, Standing::Ours))))
    }

    async fn release(
        connection: &mut SqliteConnection,
        _server: Server,
        lease: &Return,
    ) -> sqlx::Result<Standing> {
        let Return { name, secret, place } = lease;
        let (place, listener) = Place::parts(place.as_ref());
        let query = sqlx::query(RELEASE).bind(&**name).bind(secret.as_str()).bind(place).bind(listener);
        released_or_not(query.bind(clock_micros()).execute(connection).await)
    }

    async fn release_later(
        connection: &mut SqliteConnection,
        name: &str,
        secret: &Secret,
        at_least: Duration,
    ) -> sqlx::Result<Standing> {
        let query = sqlx::query(RELEASE_LATER).bind(name).bind(secret.as_str()).bind(later_by(at_least));
        released_or_not(query.execute(connection).await)
    }

    /// In one transaction: it is the commit that takes the time.
    async fn exchange(
        connection: &mut SqliteConnection,
        server: Server,
        returns: &[Return],
        claims: &[Claim],
    ) -> sqlx::Result<Exchanged> {
        let mut transaction = match connection.begin_with(Self::BEGIN_SHORT).await {
            Err(error) if Self::classify(&error) == Fault::Busy => {
                return Ok(Exchanged::nothing(returns, claims));
            }
            begun => begun?,
        };
        let mut exchanged = Exchanged { returns: Vec::new(), grants: Vec::new() };
        for one in returns {
            exchanged.returns.push(Self::release(&mut transaction, server, one).await?);
        }
        for claim in claims {
            exchanged.grants.push(Self::acquire(&mut transaction, server, claim).await?);
        }
        transaction.commit().await?;
        Ok(exchanged)
    }

    async fn stand(connection: &mut SqliteConnection, name: &str, place: &Place) -> sqlx::Result<bool> {
        let (secret, listener) = Place::parts(Some(place));
        let query = sqlx::query(STAND).bind(name).bind(secret).bind(listener).bind(clock_micros());
        Ok(query.execute(connection).await?.rows_affected() > 0)
    }

    async fn set_waiters(
        connection: &mut SqliteConnection,
        name: &str,
        before: &str,
        after: &str,
    ) -> sqlx::Result<bool> {
        let query = sqlx::query(SET_WAITERS).bind(name).bind(before).bind(after);
        Ok(query.execute(connection).await?.rows_affected() > 0)
    }

    async fn remove_waiter(
        connection: &mut SqliteConnection,
        name: &str,
        secret: &Secret,
    ) -> sqlx::Result<()> {
        sqlx::query(REMOVE_WAITER).bind(name).bind(secret.as_str()).execute(connection).await.map(drop)
    }

    async fn lock_row(
        connection: &mut SqliteConnection,
        claim: &RowClaim,
        slice: Duration,
    ) -> sqlx::Result<RowAttempt> {
        refuse_autocommit(connection).await?;
        let limited = LimitedWait::set(connection, slice.min(LONGEST_SLICE)).await?;
        let attempt = lock_and_write(&mut *limited.connection, claim).await;
        limited.restore().await?;
        match attempt {
            Err(error) if Self::classify(&error) == Fault::Busy => Ok(RowAttempt::Busy),
            attempt => attempt,
        }
    }

    async fn commit_locked(
        connection: &mut SqliteConnection,
        name: &str,
        fencing_token: i64,
    ) -> sqlx::Result<Guarded> {
        if !is_marked(connection).await? {
            return Ok(Guarded::Ended);
        }
        let row = sqlx::query(STILL_LOCKED).bind(name).bind(fencing_token).fetch_optional(connection).await?;
        Ok(Guarded::when(row.is_some()))
    }

    async fn commit_guarded(
        connection: &mut SqliteConnection,
        lease: &LeaseKey,
        release: bool,
    ) -> sqlx::Result<Guarded> {
        if !is_marked(connection).await? {
            return Ok(Guarded::Ended);
        }
        guard(connection, lease, release).await
    }

    async fn guard(
        connection: &mut SqliteConnection,
        lease: &LeaseKey,
        release: bool,
    ) -> sqlx::Result<Guarded> {
        refuse_autocommit(connection).await?;
        guard(connection, lease, release).await
    }

    /// SQLite has no way to refuse a commit beforehand.
    async fn doom(_connection: &mut SqliteConnection) {}

    /// A ROLLBACK without a transaction is an error here, after which sqlx takes the connection for one that is still in
    /// a transaction, for ever.
    async fn reopen(connection: &mut SqliteConnection) {
        let _open_anyway = sqlx::raw_sql("BEGIN").execute(connection).await;
    }

    fn classify(error: &sqlx::Error) -> Fault {
        if crate::error::is_connection_failure(error) {
            return Fault::Disconnected;
        }
        if matches!(error, sqlx::Error::BeginFailed) {
            return Fault::TransactionEnded;
        }
        let Some(error) = error.as_database_error() else {
            return Fault::Other;
        };
        match error.code().as_deref() {
            // SQLITE_BUSY_SNAPSHOT: another writer committed after this transaction's first read
            Some("517") => Fault::Serialization,
            // SQLITE_BUSY with _RECOVERY and _TIMEOUT, SQLITE_LOCKED with _SHAREDCACHE
            Some("5" | "261" | "773" | "6" | "262") => Fault::Busy,
            // A plain SQLITE_ERROR: only the text tells.
            _ if error.message().starts_with("no such table: distributed_lock") => Fault::TableMissing,
            _ if error.message().starts_with("no such column")
                || error.message().contains("has no column named") =>
            {
                Fault::TableDiffers
            }
            _ => Fault::Other,
        }
    }
}

/// As a modifier of SQLite's functions of time.
fn later_by(duration: Duration) -> String {
    format!("+{}.{:03} seconds", duration.as_secs(), duration.subsec_millis())
}

fn released_or_not(released: sqlx::Result<SqliteQueryResult>) -> sqlx::Result<Standing> {
    match released {
        Ok(released) if released.rows_affected() > 0 => Ok(Standing::Ours),
        Ok(_) => Ok(Standing::NotOurs),
        Err(error) if Sqlite::classify(&error) == Fault::Busy => Ok(Standing::Busy),
        Err(error) => Err(error),
    }
}

/// `false`: the marked transaction has ended. Its mark is gone after this.
async fn is_marked(connection: &mut SqliteConnection) -> sqlx::Result<bool> {
    match sqlx::raw_sql(IS_MARKED).execute(connection).await {
        Err(sqlx::Error::Database(error)) if error.message().starts_with("no such savepoint") => Ok(false),
        answer => answer.map(|_| true),
    }
}

async fn guard(connection: &mut SqliteConnection, lease: &LeaseKey, release: bool) -> sqlx::Result<Guarded> {
    let sql = if release { GUARD_AND_RELEASE } else { GUARD };
    let query = sqlx::query(sql).bind(&*lease.row.name).bind(lease.secret.as_str());
    let query = query.bind(lease.fencing_token);
    Ok(Guarded::when(query.execute(connection).await?.rows_affected() > 0))
}

/// Some errors (a full disk, `ON CONFLICT ROLLBACK`) end a transaction behind the back of its handle. A BEGIN that succeeds
/// finds that out, and gives the handle something to roll back.
async fn refuse_autocommit(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    match sqlx::raw_sql("BEGIN").execute(connection).await {
        Err(sqlx::Error::Database(error)) if error.message().contains("within a transaction") => Ok(()),
        Err(error) => Err(error),
        Ok(_) => Err(sqlx::Error::BeginFailed),
    }
}

async fn lock_and_write(connection: &mut SqliteConnection, claim: &RowClaim) -> sqlx::Result<RowAttempt> {
    let name = &*claim.row.name;
    let row = sqlx::query(MAKE_ROW).bind(name).bind(claim.kind.as_str()).fetch_one(&mut *connection).await?;
    if Kind::parse(row.try_get(0)?) != claim.kind {
        return Ok(RowAttempt::WrongKind);
    }
    if row.try_get(2)? {
        return Ok(RowAttempt::Leased);
    }
    let fencing_token = sqlx::query_scalar(WRITE_ROW)
        .bind(name)
        .bind(claim.secret.as_str())
        .bind(&*claim.owner)
        .bind(clock_micros())
        .fetch_one(connection)
        .await?;
    Ok(RowAttempt::Locked { fencing_token, before: row.try_get(1)? })
}

fn clock_micros() -> i64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    micros(since_1970)
}

/// The application's connection with another busy timeout, which is put back afterwards, whatever happens.
struct LimitedWait<'a> {
    connection: &'a mut SqliteConnection,
    /// What to put back; `None` once it was.
    restore: Option<i64>,
}

impl<'a> LimitedWait<'a> {
    async fn set(connection: &'a mut SqliteConnection, wait: Duration) -> sqlx::Result<Self> {
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

    async fn restore(mut self) -> sqlx::Result<()> {
        if let Some(before) = self.restore {
            sqlx::raw_sql(busy_timeout(before)).execute(&mut *self.connection).await?;
            self.restore = None;
        }
        Ok(())
    }
}

/// When the future that waits is dropped midway. The first poll hands the statement to the connection's own thread,
/// which carries it out after what it is doing now, whether anybody looks at the answer or not.
impl Drop for LimitedWait<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.restore.take() {
            let restoring = pin!(sqlx::raw_sql(busy_timeout(before)).execute(&mut *self.connection));
            let _queued = restoring.poll(&mut Context::from_waker(Waker::noop()));
        }
    }
}

/// A pragma takes no parameters.
fn busy_timeout(milliseconds: i64) -> AssertSqlSafe<String> {
    AssertSqlSafe(format!("PRAGMA busy_timeout = {milliseconds}"))
}
