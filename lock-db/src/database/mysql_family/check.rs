//! Finds problems before the first lock does: missing privileges, rows that can't be created, and
//! settings.

use sqlx::mysql::MySqlConnection;
use sqlx::{Connection, Row};

use super::errors::number;
use super::lease;
use crate::database::StepError;
use crate::database::driver;
use crate::database::{Server, foreign_write, name_for_check};
use crate::{Finding, FindingKind, Kind};

/// What locks do to the table, without a row. Each statement needs privileges of its own.
const USES: [&str; 3] = [
    "SELECT * FROM {table} WHERE FALSE FOR UPDATE",
    "UPDATE {table} SET secret_key = secret_key, fencing_token = fencing_token, previous_token = previous_token, owner = owner,
        acquire_time = acquire_time, expire_time = expire_time, ttl_micros = ttl_micros, waiters = waiters,
        guard_count = guard_count
    WHERE FALSE",
    "INSERT INTO {table} (lock_name, lock_kind) SELECT lock_name, lock_kind FROM {table} WHERE FALSE",
];

/// No privilege for the table, for a column, or for what a statement does.
const DENIED: [u16; 3] = [1142, 1143, 1227];

const LOCK: &str = "SELECT 1 FROM {table} FORCE INDEX (distributed_lock_name) WHERE lock_name = ? FOR UPDATE";
/// Writes another value, so that the row counts however rows are counted.
const WRITE: &str = "UPDATE {table} SET owner = 'lock-db', guard_count = guard_count + 1 WHERE lock_name = ?";

const SETTINGS: &str = "
SHOW GLOBAL VARIABLES WHERE Variable_name IN (
    'read_only', 'innodb_flush_log_at_trx_commit', 'innodb_deadlock_detect', 'wait_timeout',
    'rpl_semi_sync_master_enabled', 'rpl_semi_sync_source_enabled')";

/// The connections of replicas that ask for the binary log.
const REPLICAS: &str =
    "SELECT CAST(COUNT(*) AS SIGNED) FROM information_schema.processlist WHERE command LIKE 'Binlog Dump%'";

/// Below this, the server closes connections that a service uses only now and then.
const SHORT_WAIT_TIMEOUT: u64 = 60;

pub(super) async fn check(connection: &mut MySqlConnection, server: &Server) -> driver::Result<Vec<Finding>> {
    let mut denied: Vec<String> = Vec::new();
    for statement in USES {
        match sqlx::raw_sql(server.table.sql(statement)).execute(&mut *connection).await {
            Err(error) if is_denied(&error) => {
                denied.push(error.to_string());
            }
            used => used.map(drop)?,
        }
    }
    if !denied.is_empty() {
        denied.dedup();
        let message = format!(
            "{}: locks need `GRANT SELECT, INSERT, UPDATE ON {}`",
            denied.join("; "),
            server.table.name()
        );
        return Err(StepError::refused(message));
    }
    try_out(connection, server).await?;
    findings(connection).await
}

pub(super) fn is_denied(error: &sqlx::Error) -> bool {
    number(error).is_some_and(|number| DENIED.contains(&number))
}

/// Creates a row, locks and writes it, and rolls back. Any obstacle to one of these steps shows as
/// an error.
async fn try_out(connection: &mut MySqlConnection, server: &Server) -> driver::Result<()> {
    let name = name_for_check()?;
    let mut transaction = connection.begin_with("START TRANSACTION").await?;
    lease::insert(&mut transaction, server, &name, Kind::Insert).await?;
    let lock = sqlx::query(server.table.sql(LOCK)).bind(name.as_bytes());
    let locked = lock.fetch_optional(&mut *transaction).await?;
    let write = sqlx::query(server.table.sql(WRITE)).bind(name.as_bytes());
    let written = write.execute(&mut *transaction).await?;
    transaction.rollback().await?;
    if locked.is_some() && written.rows_affected() == 1 { Ok(()) } else { Err(foreign_write()) }
}

async fn findings(connection: &mut MySqlConnection) -> driver::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let (mut copies_at_once, mut replicas) = (false, 0);
    for row in sqlx::raw_sql(SETTINGS).fetch_all(&mut *connection).await? {
        let (setting, value): (&str, &str) = (row.try_get(0)?, row.try_get(1)?);
        match (setting, value) {
            ("read_only", "ON" | "NO_LOCK" | "NO_LOCK_NO_ADMIN") => findings.push(Finding::of_setting(
                FindingKind::Replica,
                "read_only",
                format!(
                    "the server is `read_only` ({value}), as a replica is, and this account writes there all the same: locks on \
                     a replica do not exclude users of the primary; take an account without SUPER and READ ONLY ADMIN"
                ),
            )),
            ("innodb_flush_log_at_trx_commit", "0" | "2") => findings.push(Finding::of_setting(
                FindingKind::NotDurable,
                "innodb_flush_log_at_trx_commit",
                format!(
                    "`innodb_flush_log_at_trx_commit` is {value}: a crash of the server's host{} forgets the newest grants, and \
                     then a lock may be granted twice; 1 is safe",
                    if value == "0" { ", or of the server," } else { "" }
                ),
            )),
            ("innodb_deadlock_detect", "OFF") => findings.push(Finding::of_setting(
                FindingKind::DeadlockDetection,
                "innodb_deadlock_detect",
                "`innodb_deadlock_detect` is OFF: transactions that lock several names in different orders wait for each other \
                 until their waits are over",
            )),
            ("wait_timeout", value) if value.parse().is_ok_and(|seconds: u64| seconds < SHORT_WAIT_TIMEOUT) => {
                findings.push(Finding::of_setting(
                    FindingKind::IdleTimeout,
                    "wait_timeout",
                    format!(
                        "`wait_timeout` is {value} s: the server closes the connections of lock-db when nothing is locked for \
                         so long, and the next lock waits for a new one"
                    ),
                ));
            }
            ("rpl_semi_sync_master_enabled" | "rpl_semi_sync_source_enabled", "ON") => copies_at_once = true,
            _ => {}
        }
    }
    // An account without the right to see other sessions sees no replicas.
    if !copies_at_once && let Ok(count) = sqlx::query_scalar(REPLICAS).fetch_one(connection).await {
        replicas = count;
    }
    if replicas > 0 {
        findings.push(Finding::of_setting(
            FindingKind::AsynchronousStandby,
            "rpl_semi_sync_source_enabled",
            format!(
                "{replicas} replicas follow asynchronously, and commits do not wait for them (`rpl_semi_sync_source_enabled`, \
                 `rpl_semi_sync_master_enabled` on MariaDB): a failover forgets the newest grants, and then a lock may be \
                 granted twice"
            ),
        ));
    }
    Ok(findings)
}
