//! The session of a private connection: how it is identified, and how another connection ends it.
//!
//! A client that gives up a connection closes its socket, which the session notices only at its
//! next read or write. A session that waits for a lock, for a replica (`rpl_semi_sync_…`), for disk
//! space, or for a network that is gone remains, and may execute its last statement much later.

use sqlx::Row;
use sqlx::mysql::MySqlConnection;

use super::errors::{NO_SUCH_SESSION, number};
use crate::database::Fault;
use crate::database::driver;

/// Marks the session by a user lock, which ends with the session. So the number never identifies
/// another session, as the id of a connection could after a restart of the server.
const MARK: &str = "SELECT GET_LOCK(?, 0)";

const FIND: &str = "SELECT CAST(IS_USED_LOCK(?) AS SIGNED)";

/// Lists the sessions of the own account without any privilege, and without a temporary table,
/// because the disk may be full.
const SESSIONS: &str = "SHOW PROCESSLIST";

/// KILL takes no parameters on MySQL.
const REMEMBER: &str = "SELECT ? INTO @lock_db_session";
/// Needs no privilege: both sessions have the same account.
const END: &str = "KILL CONNECTION IS_USED_LOCK(@lock_db_session)";

/// Where the server refuses user locks, as some clusters do, the session has no number.
pub(super) async fn mark(connection: &mut MySqlConnection, session: i64) -> driver::Result<()> {
    match sqlx::query(MARK).bind(name(session)).execute(connection).await {
        Err(error) if Fault::of_sqlx(&error) == Some(Fault::Disconnected) => Err(error.into()),
        _ => Ok(()),
    }
}

/// `false` where the server refuses user locks, because nothing is known of the session.
pub(super) async fn is_idle(
    connection: &mut MySqlConnection,
    session: i64,
    own: i64,
) -> driver::Result<bool> {
    let known: Option<i64> = sqlx::query_scalar(FIND).bind(name(own)).fetch_one(&mut *connection).await?;
    let id: Option<i64> = sqlx::query_scalar(FIND).bind(name(session)).fetch_one(&mut *connection).await?;
    let Some(id) = id else { return Ok(known.is_some()) };
    for row in sqlx::raw_sql(SESSIONS).fetch_all(&mut *connection).await? {
        if row.try_get_unchecked::<i64, _>("Id")? == id {
            return Ok(row.try_get_unchecked::<&str, _>("Command")? == "Sleep");
        }
    }
    Ok(true)
}

/// `true`: it has ended.
pub(super) async fn end(connection: &mut MySqlConnection, session: i64) -> driver::Result<bool> {
    let id: Option<i64> = sqlx::query_scalar(FIND).bind(name(session)).fetch_one(&mut *connection).await?;
    let Some(id) = id else { return Ok(true) };
    for row in sqlx::raw_sql(SESSIONS).fetch_all(&mut *connection).await? {
        let is_it = row.try_get_unchecked::<i64, _>("Id")? == id;
        let state: Option<String> = row.try_get_unchecked("State")?;
        if is_it && !may_be_ended(row.try_get_unchecked("Command")?, &state.unwrap_or_default()) {
            return Ok(false);
        }
    }
    sqlx::query(REMEMBER).bind(name(session)).execute(&mut *connection).await?;
    match sqlx::raw_sql(END).execute(connection).await {
        // It has ended in the meantime.
        Err(error) if number(&error) == Some(NO_SUCH_SESSION) => Ok(true),
        asked => Ok(asked.map(|_| false)?),
    }
}

/// Whether a session may be killed: one that waits for its client, for a lock or for a replica. Not
/// one that waits for disk space during a commit. By default MySQL shuts the server down when the
/// binary log can't be written, and a KILL turns that wait into such an error (measured on 9.7).
/// Other sessions end by themselves.
fn may_be_ended(command: &str, state: &str) -> bool {
    command == "Sleep"
        || state == "User lock"
        || (state.starts_with("Waiting for") && (state.contains("lock") || state.contains("semi-sync")))
}

fn name(session: i64) -> String {
    format!("lock_db_session:{session:016x}")
}

#[cfg(test)]
mod tests {
    use super::may_be_ended;

    #[test]
    fn no_commit_is_ended_that_waits_for_the_disk() {
        for state in
            ["Waiting for table metadata lock", "Waiting for semi-sync ACK from replica", "User lock"]
        {
            assert!(may_be_ended("Execute", state), "{state}");
        }
        assert!(may_be_ended("Sleep", ""));
        for state in
            ["waiting for handler commit", "Waiting for disk space", "Waiting for someone to free space", ""]
        {
            assert!(!may_be_ended("Query", state), "{state}");
        }
    }
}
