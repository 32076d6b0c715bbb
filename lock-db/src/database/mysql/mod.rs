//! MySQL 8.0 and later, MariaDB 10.6 and later, both on InnoDB.
//!
//! On private connections every statement that may wait for a row is bound by `innodb_lock_wait_timeout`, and for a
//! table by `lock_wait_timeout`, both set once a connection.

mod baton;
mod errors;
mod lease;
mod together;
mod transaction;

use std::convert::Infallible;
use std::time::Duration;

use sqlx::mysql::MySqlConnection;
use sqlx::{MySql, Pool, Row};

use self::errors::{DEADLOCK, DUPLICATE_KEY, number};
use super::{
    Claim, Cluster, Exchanged, Fault, Grant, Guarded, LeaseKey, LockDatabase, LockRow, Place, Renewal,
    Return, RowAttempt, RowClaim, Server, Standing, hexadecimal,
};
use crate::secret::Secret;
use crate::{Kind, schema};

/// One second is the least that MySQL knows. The rest are settings of the server that would change what statements do: a
/// COMMIT that begins a new transaction, and an UPDATE that is refused because its key is in a joined table.
const PREPARE: &str = "
SET SESSION innodb_lock_wait_timeout = 1, SESSION lock_wait_timeout = 2, SESSION autocommit = 1,
    SESSION completion_type = 0, SESSION sql_safe_updates = 0";

/// Where claims are inserts: in REPEATABLE READ those ask for the gap before a row that is locked already, behind all who wait
/// for the row.
const LOCK_NO_GAPS: &str = "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED";

const AFTER_SHORT: &str = "SET SESSION wait_timeout = DEFAULT";

const SERVER_SETTINGS: &str = "
SHOW GLOBAL VARIABLES WHERE Variable_name IN (
    'wsrep_on', 'group_replication_group_name', 'group_replication_single_primary_mode',
    'innodb_rollback_on_timeout', 'version', 'innodb_autoinc_lock_mode', 'log_bin', 'binlog_format')";

const CHECK_COLUMNS: &str = "
SELECT id, lock_name, lock_kind, secret_key, fencing_token, owner, create_time, acquire_time, expire_time, waiters,
       previous_token, guard_count
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

    async fn prepare(connection: &mut MySqlConnection) -> sqlx::Result<Server> {
        sqlx::raw_sql(PREPARE).execute(&mut *connection).await?;
        let mut settings = std::collections::HashMap::new();
        for row in sqlx::raw_sql(SERVER_SETTINGS).fetch_all(&mut *connection).await? {
            settings.insert(row.try_get::<String, _>(0)?, row.try_get::<String, _>(1)?);
        }
        let setting = |name: &str| settings.get(name).map_or("", String::as_str);
        if setting("innodb_rollback_on_timeout") == "ON" {
            // A caller's transaction would be rolled back by a lock that was not free, and go on as if it were open.
            return Err(sqlx::Error::Configuration(
                "lock-db needs innodb_rollback_on_timeout = OFF, which is the default".into(),
            ));
        }
        let server = server(setting);
        if server.answers_writes {
            sqlx::raw_sql(LOCK_NO_GAPS).execute(connection).await?;
        }
        Ok(server)
    }

    async fn after_short(connection: &mut MySqlConnection) -> sqlx::Result<()> {
        sqlx::raw_sql(AFTER_SHORT).execute(connection).await.map(drop)
    }

    type Listening = Infallible;

    async fn connect_listening(_pool: &Pool<MySql>) -> sqlx::Result<Infallible> {
        Err(sqlx::Error::Protocol("this database calls nobody".into()))
    }

    async fn listen(listening: &mut Infallible, _listener: u32) -> sqlx::Result<()> {
        match *listening {}
    }

    async fn listening_connection(listening: &mut Infallible) -> sqlx::Result<&mut MySqlConnection> {
        match *listening {}
    }

    async fn called(listening: &mut Infallible) -> sqlx::Result<i64> {
        match *listening {}
    }

    const BATONS: bool = true;

    async fn take_baton(connection: &mut MySqlConnection, row: i64) -> sqlx::Result<bool> {
        baton::take(connection, row).await
    }

    async fn give_baton(connection: &mut MySqlConnection, row: i64) -> sqlx::Result<()> {
        baton::give(connection, row).await
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
        lease::look(connection, name).await
    }

    async fn create(connection: &mut MySqlConnection, name: &str, kind: Kind) -> sqlx::Result<()> {
        lease::create(connection, name, kind).await
    }

    async fn acquire(
        connection: &mut MySqlConnection,
        server: Server,
        claim: &Claim,
    ) -> sqlx::Result<Option<Grant>> {
        lease::acquire(connection, server, claim).await
    }

    async fn renew(connection: &mut MySqlConnection, leases: &[Renewal]) -> sqlx::Result<Vec<Standing>> {
        together::renew(connection, leases).await
    }

    async fn release(
        connection: &mut MySqlConnection,
        server: Server,
        lease: &Return,
    ) -> sqlx::Result<Standing> {
        lease::release(connection, server, lease).await
    }

    async fn release_later(
        connection: &mut MySqlConnection,
        name: &str,
        secret: &Secret,
        at_least: Duration,
    ) -> sqlx::Result<Standing> {
        lease::release_later(connection, name, secret, at_least).await
    }

    async fn exchange(
        connection: &mut MySqlConnection,
        server: Server,
        returns: &[Return],
        claims: &[Claim],
    ) -> sqlx::Result<Exchanged> {
        together::exchange(connection, server, returns, claims).await
    }

    async fn stand(connection: &mut MySqlConnection, name: &str, place: &Place) -> sqlx::Result<bool> {
        lease::stand(connection, name, place).await
    }

    async fn set_waiters(
        connection: &mut MySqlConnection,
        name: &str,
        before: &str,
        after: &str,
    ) -> sqlx::Result<bool> {
        lease::set_waiters(connection, name, before, after).await
    }

    async fn remove_waiter(
        connection: &mut MySqlConnection,
        name: &str,
        secret: &Secret,
    ) -> sqlx::Result<()> {
        lease::remove_waiter(connection, name, secret).await
    }

    async fn lock_row(
        connection: &mut MySqlConnection,
        claim: &RowClaim,
        slice: Duration,
    ) -> sqlx::Result<RowAttempt> {
        transaction::lock_row(connection, claim, slice).await
    }

    async fn commit_locked(
        connection: &mut MySqlConnection,
        _name: &str,
        _fencing_token: i64,
    ) -> sqlx::Result<Guarded> {
        transaction::commit_locked(connection).await
    }

    async fn commit_guarded(
        connection: &mut MySqlConnection,
        lease: &LeaseKey,
        release: bool,
    ) -> sqlx::Result<Guarded> {
        transaction::commit_guarded(connection, lease, release).await
    }

    async fn unmark(connection: &mut MySqlConnection) -> sqlx::Result<()> {
        transaction::unmark(connection).await
    }

    async fn guard(
        connection: &mut MySqlConnection,
        lease: &LeaseKey,
        release: bool,
    ) -> sqlx::Result<Guarded> {
        transaction::guard(connection, lease, release).await
    }

    async fn sees_grant(connection: &mut MySqlConnection, lease: &LeaseKey) -> sqlx::Result<bool> {
        transaction::sees_grant(connection, lease).await
    }

    async fn doom(connection: &mut MySqlConnection) {
        transaction::doom(connection).await;
    }

    fn classify(error: &sqlx::Error) -> Fault {
        errors::classify(error)
    }
}

/// By the settings of the server: MariaDB and MySQL each know only their own.
fn server<'a>(setting: impl Fn(&str) -> &'a str) -> Server {
    let is_galera = setting("wsrep_on") == "ON";
    let is_group = !setting("group_replication_group_name").is_empty();
    if is_galera || (is_group && setting("group_replication_single_primary_mode") == "OFF") {
        Server { cluster: Cluster::MultiPrimary, answers_writes: false }
    } else {
        // Such an insert locks the counter of the table to the end of its commit, unless that is switched off, although
        // it counts nothing. In memory that is nothing, but with a binary log it takes as long as the disk and the replicas.
        // And a log of statements knows no isolation without gaps.
        let is_quick = setting("innodb_autoinc_lock_mode") == "2" && setting("binlog_format") != "STATEMENT";
        let answers_writes =
            setting("version").contains("MariaDB") && (is_quick || setting("log_bin") == "OFF");
        Server { cluster: Cluster::SinglePrimary, answers_writes }
    }
}

/// A text as a literal of hexadecimal digits, which is a binary string to the server.
fn literal(text: &str) -> String {
    format!("x'{}'", hexadecimal(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_that_answer_writes_quickly_are_told_by_their_settings() {
        let of = |settings: &[(&str, &'static str)]| {
            let settings: std::collections::HashMap<_, _> = settings.iter().copied().collect();
            server(|setting| settings.get(setting).copied().unwrap_or_default()).answers_writes
        };
        let (mariadb, mysql) = (("version", "10.11.6-MariaDB-log"), ("version", "9.7.0"));
        assert!(of(&[mariadb, ("innodb_autoinc_lock_mode", "1"), ("log_bin", "OFF")]));
        assert!(!of(&[mariadb, ("innodb_autoinc_lock_mode", "1"), ("log_bin", "ON")]));
        assert!(of(&[
            mariadb,
            ("innodb_autoinc_lock_mode", "2"),
            ("log_bin", "ON"),
            ("binlog_format", "MIXED")
        ]));
        let statements =
            [mariadb, ("innodb_autoinc_lock_mode", "2"), ("log_bin", "ON"), ("binlog_format", "STATEMENT")];
        assert!(!of(&statements));
        assert!(!of(&[mariadb, ("innodb_autoinc_lock_mode", "2"), ("log_bin", "OFF"), ("wsrep_on", "ON")]));
        assert!(!of(&[mysql, ("innodb_autoinc_lock_mode", "2"), ("log_bin", "OFF")]));
    }

    #[test]
    fn multi_primary_servers_are_told_by_their_settings() {
        let of = |settings: &[(&str, &'static str)]| {
            let settings: std::collections::HashMap<_, _> = settings.iter().copied().collect();
            server(|setting| settings.get(setting).copied().unwrap_or_default()).cluster
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
