//! MySQL 8.0 and later, MariaDB 10.6 and later, both on InnoDB.
//!
//! On private connections every statement that may wait for a row is bound by `innodb_lock_wait_timeout`, and for a
//! table by `lock_wait_timeout`, both set once a connection.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::time::Duration;

use sha2::Digest;
use sqlx::mysql::{MySqlConnection, MySqlDatabaseError, MySqlQueryResult, MySqlRow};
use sqlx::{AssertSqlSafe, MySql, Row};

use super::{
    Claim, Cluster, Exchanged, Fault, Grant, Guarded, LeaseKey, LockDatabase, LockRow, Renewal, Return,
    RowAttempt, RowClaim, Standing, as_json, hexadecimal, in_order,
};
use crate::limits::micros;
use crate::secret::Secret;
use crate::{Kind, schema};

/// One second is the least that MySQL knows. The rest are settings of the server that would change what statements do: a
/// COMMIT that begins a new transaction, and an UPDATE that is refused because its key is in a joined table.
const PREPARE: &str = "
SET SESSION innodb_lock_wait_timeout = 1, SESSION lock_wait_timeout = 2, SESSION autocommit = 1,
    SESSION completion_type = 0, SESSION sql_safe_updates = 0";

const AFTER_SHORT: &str = "SET SESSION wait_timeout = DEFAULT";

const CLUSTER_SETTINGS: &str = "
SHOW GLOBAL VARIABLES WHERE Variable_name IN (
    'wsrep_on', 'group_replication_group_name', 'group_replication_single_primary_mode',
    'innodb_rollback_on_timeout')";

const LOOK: &str = "
SELECT id, lock_kind, secret_key, owner, fencing_token,
       TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', create_time),
       TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', acquire_time),
       TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', expire_time),
       TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), expire_time)
FROM distributed_lock WHERE lock_name = ?";

/// Not INSERT IGNORE, which also ignores a name that was cut, nor ON DUPLICATE KEY UPDATE, whose count of rows can't
/// tell the two cases apart on a connection of sqlx.
const CREATE: &str = "INSERT INTO distributed_lock (lock_name, lock_kind) VALUES (?, ?)";

/// What was there before is read in the inner SELECT: in an UPDATE of a join the order of assignments is not defined. The
/// new number is never below the clock's microseconds, so that neither a row that was cleaned away nor a failover that lost the
/// last grants brings a number back.
///
/// A row that somebody has locked is passed over, so that nobody else's turn on this connection waits for it. In a
/// transaction that would leave a lock on the gap behind it; by itself it does not.
const ACQUIRE: &str = "
UPDATE (
    SELECT id, fencing_token AS last_token, acquire_time AS last_time, secret_key = ? AS is_again
    FROM distributed_lock FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND lock_kind = 'insert' AND (expire_time <= UTC_TIMESTAMP(6) OR secret_key = ?)
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN distributed_lock AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.fencing_token = IF(unlocked.is_again, unlocked.last_token, GREATEST(
        unlocked.last_token + 1, TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)))),
    lease.acquire_time = IF(unlocked.is_again, unlocked.last_time, UTC_TIMESTAMP(6)),
    lease.secret_key = ?,
    lease.owner = ?,
    lease.expire_time = TIMESTAMPADD(MICROSECOND, ?, UTC_TIMESTAMP(6))";

const GRANTED: &str = "SELECT fencing_token, id FROM distributed_lock WHERE lock_name = ? AND secret_key = ?";

/// One statement, after which the server needs nothing more of us: a client that is stopped or cut off in the middle of a
/// transaction would keep the rows locked. Rows that somebody has locked are passed over, so one of them can't hold up
/// the rest, and never does it find a lease that was released (1970) or move a deadline backwards.
///
/// LIMIT makes the server materialize the inner SELECT, with its locks; `STRAIGHT_JOIN` and `FORCE INDEX` keep it from reading,
/// and so locking, other rows of a small table. MySQL wants to be told that JSON is not to be locked; MariaDB knows no
/// `OF`, and reads it as a comment.
const RENEW: &str = "
UPDATE (
    SELECT lease.id, asked.ttl
    FROM JSON_TABLE(?, '$[*]' COLUMNS (
            id BIGINT PATH '$[0]', secret_key VARCHAR(32) PATH '$[1]', ttl BIGINT PATH '$[2]')) AS asked
    STRAIGHT_JOIN distributed_lock AS lease FORCE INDEX (PRIMARY) ON lease.id = asked.id
    WHERE lease.secret_key = asked.secret_key AND lease.expire_time > '1970-01-01 00:00:00'
    LIMIT 1000000
    FOR UPDATE /*!80000 OF lease */ SKIP LOCKED) AS unlocked
STRAIGHT_JOIN distributed_lock AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.expire_time = GREATEST(
    lease.expire_time, TIMESTAMPADD(MICROSECOND, unlocked.ttl, UTC_TIMESTAMP(6)))";

/// Which leases are ours, and whether they were renewed a moment ago: later than what the holder will rely on.
const STILL_OURS: &str = "
SELECT lease.secret_key,
    TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), lease.expire_time) >= asked.ttl DIV 12 * 11
FROM JSON_TABLE(?, '$[*]' COLUMNS (
        id BIGINT PATH '$[0]', secret_key VARCHAR(32) PATH '$[1]', ttl BIGINT PATH '$[2]')) AS asked
STRAIGHT_JOIN distributed_lock AS lease FORCE INDEX (PRIMARY) ON lease.id = asked.id
WHERE lease.secret_key = asked.secret_key AND lease.expire_time > '1970-01-01 00:00:00'";

const RELEASE: &str = "
UPDATE (
    SELECT id FROM distributed_lock FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND secret_key = ?
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN distributed_lock AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.expire_time = '1970-01-01 00:00:00'";

const RELEASE_LATER: &str = "
UPDATE (
    SELECT id, secret_key AS last_secret, TIMESTAMPADD(MICROSECOND, ?, acquire_time) AS moment
    FROM distributed_lock FORCE INDEX (distributed_lock_name)
    WHERE lock_name = ? AND secret_key = ?
    LIMIT 1
    FOR UPDATE SKIP LOCKED) AS unlocked
STRAIGHT_JOIN distributed_lock AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.expire_time = IF(unlocked.moment > UTC_TIMESTAMP(6), unlocked.moment, '1970-01-01 00:00:00'),
    lease.secret_key = IF(unlocked.moment > UTC_TIMESTAMP(6), '', unlocked.last_secret)";

const IS_OURS: &str = "SELECT 1 FROM distributed_lock WHERE lock_name = ? AND secret_key = ?";

/// `RELEASE` (those without a `ttl`) and `ACQUIRE` for many at once, in one commit.
const EXCHANGE: &str = "
UPDATE (
    SELECT lease.id, lease.fencing_token AS last_token, lease.acquire_time AS last_time, lease.owner AS last_owner,
        lease.secret_key = asked.secret_key AS is_again, asked.secret_key, asked.ttl
    FROM JSON_TABLE(@lock_db_asked, '$[*]' COLUMNS (
            lock_name VARCHAR(510) PATH '$[0]', secret_key VARCHAR(32) PATH '$[1]', ttl BIGINT PATH '$[2]')) AS asked
    STRAIGHT_JOIN distributed_lock AS lease FORCE INDEX (distributed_lock_name)
        ON lease.lock_name = UNHEX(asked.lock_name)
    WHERE lease.lock_kind = 'insert'
        AND (lease.secret_key = asked.secret_key OR (asked.ttl > 0 AND lease.expire_time <= UTC_TIMESTAMP(6)))
    LIMIT 1000000
    FOR UPDATE /*!80000 OF lease */ SKIP LOCKED) AS unlocked
STRAIGHT_JOIN distributed_lock AS lease FORCE INDEX (PRIMARY) ON lease.id = unlocked.id
SET lease.fencing_token = IF(unlocked.is_again, unlocked.last_token, GREATEST(
        unlocked.last_token + 1, TIMESTAMPDIFF(MICROSECOND, '1970-01-01 00:00:00', UTC_TIMESTAMP(6)))),
    lease.acquire_time = IF(unlocked.is_again, unlocked.last_time, UTC_TIMESTAMP(6)),
    lease.secret_key = unlocked.secret_key,
    lease.owner = IF(unlocked.ttl > 0, @lock_db_owner, unlocked.last_owner),
    lease.expire_time = IF(
        unlocked.ttl > 0, TIMESTAMPADD(MICROSECOND, unlocked.ttl, UTC_TIMESTAMP(6)), '1970-01-01 00:00:00')";

/// Which of them are ours, and whether what was asked for has been done: given back, or taken so lately that more is left
/// than the holder will rely on.
const EXCHANGED: &str = "
SELECT lease.secret_key, lease.fencing_token, lease.id,
    IF(asked.ttl > 0,
        TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), lease.expire_time) >= asked.ttl DIV 12 * 11,
        lease.expire_time = '1970-01-01 00:00:00')
FROM JSON_TABLE(@lock_db_asked, '$[*]' COLUMNS (
        lock_name VARCHAR(510) PATH '$[0]', secret_key VARCHAR(32) PATH '$[1]', ttl BIGINT PATH '$[2]')) AS asked
STRAIGHT_JOIN distributed_lock AS lease FORCE INDEX (distributed_lock_name)
    ON lease.lock_name = UNHEX(asked.lock_name)
WHERE lease.secret_key = asked.secret_key";

const CHECK_COLUMNS: &str = "
SELECT id, lock_name, lock_kind, secret_key, fencing_token, owner, create_time, acquire_time, expire_time,
       guard_count
FROM distributed_lock LIMIT 0";
const CHECK_ENGINE: &str = "
SELECT 1 FROM information_schema.tables
WHERE table_schema = DATABASE() AND table_name = 'distributed_lock' AND engine <> 'InnoDB'";

/// A positive wait, and the answer looked at: MariaDB answers NULL to the negative one that sqlx's migrator sends, and
/// then no lock is held. The name counts on the whole server, so it tells the database.
const LOCK_MIGRATIONS: &str = "SELECT COALESCE(GET_LOCK(CONCAT('lock_db:', SHA2(DATABASE(), 224)), 60), 0)";
const UNLOCK_MIGRATIONS: &str = "DO RELEASE_LOCK(CONCAT('lock_db:', SHA2(DATABASE(), 224)))";
const CREATE_LEDGER: &str = "
CREATE TABLE IF NOT EXISTS _lock_db_migrations (
    version BIGINT NOT NULL PRIMARY KEY,
    applied_at DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6))
) ENGINE = InnoDB";
const APPLIED: &str = "SELECT version FROM _lock_db_migrations";
const NOTE_APPLIED: &str = "INSERT INTO _lock_db_migrations (version) VALUES (?)";
const MIGRATIONS: [(i64, &str); 1] = [(1, schema::MYSQL)];

const UNMARK: &str = "
SET SESSION TRANSACTION READ WRITE; SET SESSION autocommit = COALESCE(@lock_db_autocommit, 1)";
const IS_MARKED: &str = "RELEASE SAVEPOINT lock_db_guard";

/// Fails unless a transaction is open: a deadlock ends one, and its handle does not know. By itself a savepoint lasts no
/// longer than its own statement.
const IN_TRANSACTION: &str = "SAVEPOINT lock_db_here; RELEASE SAVEPOINT lock_db_here";

/// After a deadlock the transaction is gone but the caller's handle still looks open: what it sends next would commit
/// statement by statement. In a read-only transaction it fails instead, until the handle is rolled back.
const DOOM: &str = "ROLLBACK; START TRANSACTION READ ONLY";

impl LockDatabase for MySql {
    const FOLDER: &'static str = "mysql";
    /// The settings are for what is sent after this transaction has ended without its owner's knowledge, by a deadlock say.
    /// It would commit by itself; so it is refused, except what comes right after a deadlock (measured on MariaDB 10.11
    /// and MySQL 9.7), and that belongs to a transaction which nobody commits. The savepoint is gone as well then.
    const BEGIN_MARKED: &'static str = "
        START TRANSACTION; SET @lock_db_autocommit = @@SESSION.autocommit; SET SESSION autocommit = 0;
        SET SESSION TRANSACTION READ ONLY; SAVEPOINT lock_db_guard";
    const COMMITS_WITH_CHECK: bool = true;
    const BEGIN_SHORT: &'static str = "SET SESSION wait_timeout = 10; START TRANSACTION";
    const ROW_IS_MADE_IN_TRANSACTION: bool = false;

    async fn prepare(connection: &mut MySqlConnection) -> sqlx::Result<Cluster> {
        sqlx::raw_sql(PREPARE).execute(&mut *connection).await?;
        let mut settings = std::collections::HashMap::new();
        for row in sqlx::raw_sql(CLUSTER_SETTINGS).fetch_all(connection).await? {
            settings.insert(row.try_get::<String, _>(0)?, row.try_get::<String, _>(1)?);
        }
        let setting = |name: &str| settings.get(name).map_or("", String::as_str);
        if setting("innodb_rollback_on_timeout") == "ON" {
            // A caller's transaction would be rolled back by a lock that was not free, and go on as if it were open.
            return Err(sqlx::Error::Configuration(
                "lock-db needs innodb_rollback_on_timeout = OFF, which is the default".into(),
            ));
        }
        Ok(cluster(setting))
    }

    async fn after_short(connection: &mut MySqlConnection) -> sqlx::Result<()> {
        sqlx::raw_sql(AFTER_SHORT).execute(connection).await.map(drop)
    }

    async fn migrate(connection: &mut MySqlConnection) -> sqlx::Result<()> {
        let locked: i64 = sqlx::query_scalar(LOCK_MIGRATIONS).fetch_one(&mut *connection).await?;
        if locked != 1 {
            return Err(sqlx::Error::Protocol("another process has been migrating for a minute".into()));
        }
        sqlx::raw_sql(CREATE_LEDGER).execute(&mut *connection).await?;
        let applied: Vec<i64> = sqlx::query_scalar(APPLIED).fetch_all(&mut *connection).await?;
        for (version, sql) in MIGRATIONS {
            if !applied.contains(&version) {
                sqlx::raw_sql(sql).execute(&mut *connection).await?;
                let noted = sqlx::query(NOTE_APPLIED).bind(version).execute(&mut *connection).await;
                // The lock above is of one node: on another somebody may have noted it at the same time.
                if let Err(error) = noted
                    && !matches!(number(&error), Some(DUPLICATE_KEY | DEADLOCK))
                {
                    return Err(error);
                }
            }
        }
        sqlx::raw_sql(UNLOCK_MIGRATIONS).execute(connection).await.map(drop)
    }

    async fn check_schema(connection: &mut MySqlConnection) -> sqlx::Result<Option<&'static str>> {
        sqlx::query(CHECK_COLUMNS).execute(&mut *connection).await?;
        let other_engine = sqlx::query(CHECK_ENGINE).fetch_optional(connection).await?;
        Ok(other_engine.map(|_| "its storage engine is not InnoDB, the one with row locks"))
    }

    async fn look(connection: &mut MySqlConnection, name: &str) -> sqlx::Result<Option<LockRow>> {
        let row = sqlx::query(LOOK).bind(name.as_bytes()).fetch_optional(connection).await?;
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
            })
        })
        .transpose()
    }

    /// Looks first: a transaction may have locked the row already that somebody else of this process has just made, and the
    /// lane must not wait for that.
    async fn create(connection: &mut MySqlConnection, name: &str, kind: Kind) -> sqlx::Result<()> {
        if Self::look(connection, name).await?.is_some() {
            return Ok(());
        }
        match sqlx::query(CREATE).bind(name.as_bytes()).bind(kind.as_str()).execute(connection).await {
            Err(error) if number(&error) != Some(DUPLICATE_KEY) => Err(error),
            _ => Ok(()),
        }
    }

    async fn acquire(connection: &mut MySqlConnection, claim: &Claim) -> sqlx::Result<Option<Grant>> {
        let secret = claim.secret.as_str();
        let name = claim.name.as_bytes();
        let acquired = sqlx::query(ACQUIRE)
            .bind(secret)
            .bind(name)
            .bind(secret)
            .bind(secret)
            .bind(&*claim.owner)
            .bind(micros(claim.ttl))
            .execute(&mut *connection)
            .await?;
        if acquired.rows_affected() == 0 {
            return Ok(None);
        }
        let row = sqlx::query(GRANTED).bind(name).bind(secret).fetch_optional(connection).await?;
        row.map(|row| Ok(Grant { fencing_token: row.try_get(0)?, id: row.try_get(1)? })).transpose()
    }

    async fn renew(connection: &mut MySqlConnection, leases: &[Renewal]) -> sqlx::Result<Vec<Standing>> {
        let json = as_json(leases);
        let renewed = sqlx::query(RENEW).bind(&json).execute(&mut *connection).await?;
        if usize::try_from(renewed.rows_affected()) == Ok(leases.len()) {
            return Ok(vec![Standing::Ours; leases.len()]);
        }
        let mut found = Vec::with_capacity(leases.len());
        for row in sqlx::query(STILL_OURS).bind(&json).fetch_all(connection).await? {
            // One that was asked for alone was not renewed, or it would have been counted.
            let is_fresh = leases.len() > 1 && row.try_get(1)?;
            found.push((row.try_get(0)?, if is_fresh { Standing::StillOurs } else { Standing::Busy }));
        }
        Ok(in_order(leases, found))
    }

    async fn release(
        connection: &mut MySqlConnection,
        name: &str,
        secret: &Secret,
    ) -> sqlx::Result<Standing> {
        let query = sqlx::query(RELEASE).bind(name.as_bytes()).bind(secret.as_str());
        let released = query.execute(&mut *connection).await;
        released_or_not(connection, name, secret, released).await
    }

    async fn release_later(
        connection: &mut MySqlConnection,
        name: &str,
        secret: &Secret,
        at_least: Duration,
    ) -> sqlx::Result<Standing> {
        let query = sqlx::query(RELEASE_LATER).bind(micros(at_least)).bind(name.as_bytes());
        let released = query.bind(secret.as_str()).execute(&mut *connection).await;
        released_or_not(connection, name, secret, released).await
    }

    async fn exchange(
        connection: &mut MySqlConnection,
        returns: &[Return],
        claims: &[Claim],
    ) -> sqlx::Result<Exchanged> {
        let asked = exchange_as_json(returns, claims);
        let owner = literal(claims.first().map_or("", |claim| &claim.owner));
        // As text, so that both go in one message. Nothing in them needs to be escaped.
        let sql = format!(
            "SET @lock_db_asked = '{asked}', @lock_db_owner = CONVERT({owner} USING utf8mb4); {EXCHANGE}; {EXCHANGED}"
        );
        let rows = match sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(connection).await {
            Err(error) if matches!(Self::classify(&error), Fault::Busy | Fault::Deadlock) => {
                return Ok(Exchanged::nothing(returns, claims));
            }
            rows => rows?,
        };
        let mut found = HashMap::with_capacity(rows.len());
        for row in &rows {
            let grant = Grant { fencing_token: row.try_get(1)?, id: row.try_get(2)? };
            found.insert(row.try_get::<String, _>(0)?, (grant, row.try_get::<bool, _>(3)?));
        }
        let standing = |one: &Return| match found.get(one.secret.as_str()) {
            Some((_, true)) => Standing::Ours,
            Some((_, false)) => Standing::Busy,
            None => Standing::NotOurs,
        };
        let grant =
            |claim: &Claim| found.get(claim.secret.as_str()).and_then(|(grant, done)| done.then_some(*grant));
        Ok(Exchanged {
            returns: returns.iter().map(standing).collect(),
            grants: claims.iter().map(grant).collect(),
        })
    }

    async fn lock_row(
        connection: &mut MySqlConnection,
        claim: &RowClaim,
        slice: Duration,
    ) -> sqlx::Result<RowAttempt> {
        let attempt = lock_and_write(connection, claim, slice).await;
        let fault = attempt.as_ref().err().map(Self::classify);
        if fault == Some(Fault::Busy) {
            return Ok(RowAttempt::Busy);
        }
        if matches!(fault, Some(Fault::Deadlock | Fault::Serialization | Fault::TransactionEnded))
            || matches!(attempt, Ok(RowAttempt::Stale | RowAttempt::Leased))
        {
            Self::doom(connection).await;
        }
        attempt
    }

    /// The row stays locked as long as the transaction lasts, and the savepoint tells that it does.
    async fn commit_locked(
        connection: &mut MySqlConnection,
        _name: &str,
        _fencing_token: i64,
    ) -> sqlx::Result<Guarded> {
        commit_marked(connection, String::new()).await
    }

    async fn commit_guarded(
        connection: &mut MySqlConnection,
        lease: &LeaseKey,
        release: bool,
    ) -> sqlx::Result<Guarded> {
        let (id, is_ours) = (lease.row.id, is_ours(&lease.secret));
        // An error is what keeps the server from reading on: a number that is too large, whatever the SQL mode.
        let guard = match write(lease, release) {
            Some(write) => format!("{write}; SELECT EXP(1000 * (ROW_COUNT() <> 1));"),
            None => format!(
                "{} EXP(1000 * (COUNT(*) <> 1)) FROM distributed_lock
                WHERE id = {id} AND {is_ours} LOCK IN SHARE MODE;",
                select_within(Self::GUARD_LIMIT)
            ),
        };
        commit_marked(connection, guard).await
    }

    async fn unmark(connection: &mut MySqlConnection) -> sqlx::Result<()> {
        // Back to autocommit would commit what is open.
        let sql = format!("ROLLBACK AND NO CHAIN NO RELEASE; {UNMARK}");
        match sqlx::raw_sql(AssertSqlSafe(sql.clone())).execute(&mut *connection).await {
            // That was the answer to a statement whose caller has gone: sqlx hands it to whatever comes next.
            Err(sqlx::Error::Database(_)) => {
                sqlx::raw_sql(AssertSqlSafe(sql)).execute(connection).await.map(drop)
            }
            unmarked => unmarked.map(drop),
        }
    }

    /// In one message, whatever it takes.
    async fn guard(
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
            "{IN_TRANSACTION}; {} secret_key FROM distributed_lock WHERE id = {} LOCK IN SHARE MODE",
            select_within(Self::GUARD_LIMIT),
            lease.row.id
        );
        let row = fetch_optional(connection, sql).await?;
        let owner = row.map(|row| row.try_get::<String, _>(0)).transpose()?;
        Ok(Guarded::when(owner.as_deref() == Some(lease.secret.as_str())))
    }

    async fn sees_grant(
        connection: &mut MySqlConnection,
        lease: &LeaseKey,
        fencing_token: i64,
    ) -> sqlx::Result<bool> {
        if lease.cluster == Cluster::SinglePrimary {
            return Ok(true);
        }
        let id = lease.row.id;
        let sql =
            format!("SELECT 1 FROM distributed_lock WHERE id = {id} AND fencing_token >= {fencing_token}");
        Ok(fetch_optional(connection, sql).await?.is_some())
    }

    async fn doom(connection: &mut MySqlConnection) {
        let _doomed = sqlx::raw_sql(DOOM).execute(connection).await;
    }

    fn classify(error: &sqlx::Error) -> Fault {
        if crate::error::is_connection_failure(error) {
            return Fault::Disconnected;
        }
        match number(error) {
            // lock wait timeout, NOWAIT, the two forms of "execution time exceeded", interrupted
            Some(1205 | 3572 | 1969 | 3024 | 1317) => Fault::Busy,
            // deadlock, which is also what certification answers, and the two other forms of that in group replication
            Some(DEADLOCK | 3101) => Fault::Deadlock,
            Some(COMMIT_FAILED) if says(error, "149") => Fault::Deadlock,
            // MariaDB: record has changed since last read
            Some(1020) => Fault::Serialization,
            Some(1146) => Fault::TableMissing,
            // a column, an index
            Some(1054 | 1176) => Fault::TableDiffers,
            // There is no such savepoint: none of what was set in this message, because no transaction is open.
            Some(NO_SUCH_SAVEPOINT) => Fault::TransactionEnded,
            // too many connections, shutdown, killed, idle for too long, node not ready; and read-only in two forms: a
            // server that is no primary any more, where a new connection may find the one that is. And a node of Galera
            // that was cut off from the others during a commit, which they may have carried out.
            Some(1040 | 1053 | 1927 | 4031 | 1047 | 1290 | 1836 | COMMIT_FAILED) => Fault::Disconnected,
            _ => Fault::Other,
        }
    }
}

async fn released_or_not(
    connection: &mut MySqlConnection,
    name: &str,
    secret: &Secret,
    released: sqlx::Result<MySqlQueryResult>,
) -> sqlx::Result<Standing> {
    match released {
        Ok(released) if released.rows_affected() > 0 => return Ok(Standing::Ours),
        Err(error) if !matches!(MySql::classify(&error), Fault::Busy | Fault::Deadlock) => return Err(error),
        _ => {}
    }
    let ours =
        sqlx::query(IS_OURS).bind(name.as_bytes()).bind(secret.as_str()).fetch_optional(connection).await?;
    Ok(if ours.is_some() { Standing::Busy } else { Standing::NotOurs })
}

/// What a try may take that waits for nobody.
const LONGEST_TRY: Duration = Duration::from_secs(2);

const DUPLICATE_KEY: u16 = 1062;
const DEADLOCK: u16 = 1213;
const COMMIT_FAILED: u16 = 1180;
const NO_SUCH_SAVEPOINT: u16 = 1305;
const OUT_OF_RANGE: u16 = 1690;

/// `[["6e616d65", "secret", 30000000], …]`, with a `ttl` of zero for what is given back.
fn exchange_as_json(returns: &[Return], claims: &[Claim]) -> String {
    let returns = returns.iter().map(|one| (&one.name, &one.secret, 0));
    let claims = claims.iter().map(|claim| (&claim.name, &claim.secret, micros(claim.ttl)));
    let mut json = String::from("[");
    for (position, (name, secret, ttl)) in returns.chain(claims).enumerate() {
        let comma = if position > 0 { "," } else { "" };
        let _infallible = write!(json, "{comma}[\"{}\",\"{}\",{ttl}]", hexadecimal(name), secret.as_str());
    }
    json.push(']');
    json
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
        is_ours(&lease.secret),
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

/// By the settings of the server: MariaDB and MySQL each know only their own.
fn cluster<'a>(setting: impl Fn(&str) -> &'a str) -> Cluster {
    let is_galera = setting("wsrep_on") == "ON";
    let is_group = !setting("group_replication_group_name").is_empty();
    if is_galera || (is_group && setting("group_replication_single_primary_mode") == "OFF") {
        Cluster::MultiPrimary
    } else {
        Cluster::SinglePrimary
    }
}

/// The SQLSTATE is HY000 for most of them, so the number decides.
fn number(error: &sqlx::Error) -> Option<u16> {
    let error = error.as_database_error()?.try_downcast_ref::<MySqlDatabaseError>()?;
    Some(error.number())
}

fn says(error: &sqlx::Error, text: &str) -> bool {
    error.as_database_error().is_some_and(|error| error.message().contains(text))
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
fn is_ours(secret: &Secret) -> String {
    let digest = sha2::Sha256::digest(secret.as_str());
    let digits = digest.iter().fold(String::new(), |digits, byte| format!("{digits}{byte:02x}"));
    format!("SHA2(secret_key, 256) = '{digits}'")
}

/// A text as a literal of hexadecimal digits, which is a binary string to the server.
fn literal(text: &str) -> String {
    format!("x'{}'", hexadecimal(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multi_primary_servers_are_told_by_their_settings() {
        let of = |settings: &[(&str, &'static str)]| {
            let settings: std::collections::HashMap<_, _> = settings.iter().copied().collect();
            cluster(|setting| settings.get(setting).copied().unwrap_or_default())
        };
        assert_eq!(of(&[]), Cluster::SinglePrimary);
        assert_eq!(of(&[("wsrep_on", "OFF")]), Cluster::SinglePrimary);
        assert_eq!(of(&[("wsrep_on", "ON")]), Cluster::MultiPrimary);
        let group = ("group_replication_group_name", "aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa");
        let mode = |mode| ("group_replication_single_primary_mode", mode);
        assert_eq!(of(&[group, mode("ON")]), Cluster::SinglePrimary);
        assert_eq!(of(&[group, mode("OFF")]), Cluster::MultiPrimary);
        assert_eq!(of(&[("group_replication_group_name", ""), mode("OFF")]), Cluster::SinglePrimary);
    }
}
