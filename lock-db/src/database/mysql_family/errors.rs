//! What the errors of the servers mean. They are identified by number, because most of them have
//! the SQLSTATE HY000: <https://dev.mysql.com/doc/mysql-errors/en/server-error-reference.html>,
//! <https://mariadb.com/kb/en/mariadb-error-code-reference/>.

use sqlx::mysql::MySqlDatabaseError;

use crate::database::Fault;

pub(in crate::database) const DUPLICATE_KEY: u16 = 1062;

/// A wait for a row ended, by `innodb_lock_wait_timeout` or MariaDB's NOWAIT, or a wait for a
/// table, by `lock_wait_timeout`.
pub(in crate::database) const LOCK_WAIT_TIMEOUT: u16 = 1205;

/// MySQL's NOWAIT, only for a row.
pub(in crate::database) const ROW_IS_LOCKED: u16 = 3572;

/// `max_statement_time` of MariaDB, `MAX_EXECUTION_TIME` of MySQL.
pub(in crate::database) const TOOK_TOO_LONG: [u16; 2] = [1969, 3024];

pub(in crate::database) const DEADLOCK: u16 = 1213;

/// Returned by KILL.
pub(in crate::database) const NO_SUCH_SESSION: u16 = 1094;

pub(in crate::database) const COMMIT_FAILED: u16 = 1180;

/// `EXECUTE` of a statement that was not prepared on this connection.
pub(in crate::database) const UNKNOWN_STATEMENT: u16 = 1243;

pub(in crate::database) const NO_SUCH_SAVEPOINT: u16 = 1305;

/// A number that does not fit into its column, on MariaDB. For an id, the ids are used up.
pub(in crate::database) const TOO_LARGE: u16 = 167;

/// The server is `read_only`, as a demoted primary is.
pub(in crate::database) const READ_ONLY: u16 = 1290;

pub(in crate::database) const OUT_OF_RANGE: u16 = 1690;

/// The account lacks a privilege.
pub(in crate::database) const ACCESS_DENIED: u16 = 1227;

/// The number of an error of sqlx, or of the one behind a [`StepError`](crate::database::StepError).
pub(in crate::database) fn number<'e>(error: impl Into<Option<&'e sqlx::Error>>) -> Option<u16> {
    let error = error.into()?.as_database_error()?.try_downcast_ref::<MySqlDatabaseError>()?;
    Some(error.number())
}

pub(in crate::database) fn says<'e>(error: impl Into<Option<&'e sqlx::Error>>, text: &str) -> bool {
    let error = error.into().and_then(sqlx::Error::as_database_error);
    error.is_some_and(|error| error.message().contains(text))
}

/// A CHECK was violated: MariaDB, MySQL.
const CHECK_VIOLATED: [u16; 2] = [4025, 3819];

pub(in crate::database) fn meaning(error: &sqlx::Error) -> Option<&'static str> {
    match number(error)? {
        READ_ONLY => Some("the server is read-only, as one is that is no longer the primary"),
        number if CHECK_VIOLATED.contains(&number) => Some(
            "a CHECK constraint of `distributed_lock` refuses what lock-db writes: drop it; on MariaDB, the one that a dump \
             of MySQL brings along",
        ),
        _ => None,
    }
}

pub(in crate::database) fn classify(error: &sqlx::Error) -> Fault {
    // No statement of lock-db causes it.
    if matches!(error, sqlx::Error::BeginFailed) {
        return Fault::Other;
    }
    if let Some(fault) = Fault::of_sqlx(error) {
        return fault;
    }
    match number(error) {
        Some(LOCK_WAIT_TIMEOUT | ROW_IS_LOCKED) => Fault::Busy,
        Some(number) if TOOK_TOO_LONG.contains(&number) => Fault::Busy,
        // deadlock, which certification also reports, and its two other forms in group replication
        Some(DEADLOCK | 3101) => Fault::Deadlock,
        Some(COMMIT_FAILED) if says(error, "149") => Fault::Deadlock,
        // MariaDB: record has changed since last read; the table was altered since the snapshot
        Some(1020 | 1412) => Fault::Serialization,
        Some(number) if CHECK_VIOLATED.contains(&number) => Fault::TableUnusable,
        Some(1146) => Fault::TableMissing,
        // a column, an index
        Some(1054 | 1176) => Fault::TableDiffers,
        // No such savepoint. The same message has set the savepoint, but no transaction is open.
        Some(NO_SUCH_SAVEPOINT) => Fault::TransactionEnded,
        // Cannot convert string, incorrect string value
        Some(3988 | 1366) => Fault::Unstorable,
        // access denied for the user or to the database, no such database, host not allowed,
        // account locked (MySQL, MariaDB), password expired (three forms), authentication plugin;
        // no privilege for the table, a column, what a statement does, or a routine; permanently
        // read-only: the session's transactions, by `transaction_read_only`; the server, by
        // `innodb_read_only` or `innodb_force_recovery` (two forms).
        Some(
            1045 | 1044 | 1049 | 1130 | 3118 | 4151 | 1820 | 1862 | 3878 | 1251 | 1524 | 1142 | 1143 | 1227
            | 1370 | 1792 | 1836 | 1036,
        ) => Fault::Refused,
        // too many connections: of the server, of the account (two forms); offline mode; shutdown;
        // killed; idle for too long; node not ready; `read_only`: the server is no longer the
        // primary, and a new connection may lead to the current one. Also a Galera node that was
        // cut off from the others during a commit, which they may have carried out.
        Some(1040 | 1203 | 1226 | 3032 | 1053 | 1927 | 4031 | 1047 | READ_ONLY | COMMIT_FAILED) => {
            Fault::Disconnected
        }
        // A prepared statement is gone or has to be prepared again.
        Some(UNKNOWN_STATEMENT | 1615) => Fault::Disconnected,
        // interrupted; out of prepared statements, memory, threads; disk full, table full
        Some(1317 | 1461 | 1037 | 1038 | 1041 | 1135 | 1021 | 1114) => Fault::Passing,
        _ => Fault::Other,
    }
}
