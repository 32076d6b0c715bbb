//! MySQL 8.0 and later, MariaDB 10.6 and later, both on InnoDB: what they share. Statements that
//! differ are in `mysql` and `mariadb`.
//!
//! On private connections, `innodb_lock_wait_timeout` bounds every statement that may wait for a
//! row, and `lock_wait_timeout` every statement that may wait for a table. Both are set once per
//! connection.

/// Calls the function of this name in the module of the server's dialect. sqlx has one driver for
/// both servers, so the dialect is chosen here, and only here.
macro_rules! in_dialect {
    ($server:expr, $function:ident($($argument:expr),*)) => {
        if $server.is_mariadb {
            crate::database::mariadb::$function($($argument),*).await
        } else {
            crate::database::mysql::$function($($argument),*).await
        }
    };
}

#[macro_use]
pub(super) mod queue;

pub(super) mod batch;
mod check;
pub(super) mod errors;
#[macro_use]
pub(super) mod lease;
mod migrate;
mod operate;
mod prune;
mod row_lock;
mod schema;
mod session;
mod several;
mod snapshots;
pub(super) mod transaction;
mod user_lock;

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::time::Duration;

use sqlx::mysql::{MySqlConnectOptions, MySqlConnection, MySqlRow};
use sqlx::{MySql, Pool, Row};

use super::driver::{
    LeaseDriver, OperateDriver, PruneDriver, QueueDriver, RowLockDriver, SchemaDriver, SessionDriver,
    TransactionDriver, WakeUpDriver,
};
use super::{
    BatchOutcome, Claim, Fault, Found, Grant, Guarded, LeaseKey, LeaseStatus, ListPage, LockRow,
    OldSnapshots, PRIVATE_STATEMENTS, Probe, PruneScope, QueueChange, QueueEntry, ReleaseClaim, Released,
    Renewal, Renewed, RowAttempt, RowClaim, Server, TablePart, hexadecimal, names_as_json,
};
use crate::database::StepError;
use crate::database::driver;
use crate::name::Name;
use crate::secret::Secret;
use crate::{Finding, Kind, RowHolder};

impl SchemaDriver for MySql {
    const FOLDER: &'static str = "mysql";

    fn database_name(options: &MySqlConnectOptions) -> String {
        options.get_database().unwrap_or_default().to_owned()
    }

    async fn find_table(connection: &mut MySqlConnection, schema: Option<&str>) -> driver::Result<Found> {
        schema::find(connection, schema).await
    }

    async fn migrate(connection: &mut MySqlConnection, schema: Option<&str>) -> driver::Result<()> {
        migrate::migrate(connection, schema).await
    }

    async fn check(connection: &mut MySqlConnection, server: &Server) -> driver::Result<Vec<Finding>> {
        check::check(connection, server).await
    }

    async fn old_snapshots(
        connection: &mut MySqlConnection,
        server: &Server,
    ) -> driver::Result<OldSnapshots> {
        snapshots::old(connection, server).await
    }

    /// The server reports missing privileges one at a time, and names another one for locking a
    /// row.
    fn lacks_right(error: &sqlx::Error) -> bool {
        check::is_denied(error)
    }

    fn meaning(error: &sqlx::Error) -> Option<&'static str> {
        errors::meaning(error)
    }

    fn code(error: &sqlx::Error) -> Option<Cow<'_, str>> {
        errors::number(error).map(|number| number.to_string().into())
    }

    fn classify(error: &sqlx::Error) -> Fault {
        errors::classify(error)
    }
}

impl SessionDriver for MySql {
    const BEGIN_SHORT: &'static str = "SET SESSION wait_timeout = 10; START TRANSACTION";

    fn private_options(options: &MySqlConnectOptions) -> MySqlConnectOptions {
        options.clone().statement_cache_capacity(PRIVATE_STATEMENTS)
    }

    async fn prepare(connection: &mut MySqlConnection, session: i64) -> driver::Result<()> {
        schema::prepare(connection).await?;
        session::mark(connection, session).await
    }

    async fn is_idle(connection: &mut MySqlConnection, session: i64, own: i64) -> driver::Result<bool> {
        session::is_idle(connection, session, own).await
    }

    async fn end_session(connection: &mut MySqlConnection, session: i64) -> driver::Result<bool> {
        session::end(connection, session).await
    }
}

impl WakeUpDriver for MySql {
    type Listening = Infallible;

    async fn connect_listening(_pool: &Pool<MySql>) -> driver::Result<Infallible> {
        Err(StepError::disconnected("this database has no notifications"))
    }

    async fn listen(listening: &mut Infallible, _listener: u32) -> driver::Result<bool> {
        match *listening {}
    }

    async fn listening_connection(listening: &mut Infallible) -> driver::Result<&mut MySqlConnection> {
        match *listening {}
    }

    async fn notified(listening: &mut Infallible) -> driver::Result<i64> {
        match *listening {}
    }

    const USER_LOCKS: bool = true;

    async fn take_user_lock(
        connection: &mut MySqlConnection,
        server: &Server,
        row: i64,
    ) -> driver::Result<bool> {
        user_lock::acquire(connection, server, row).await
    }

    async fn release_user_lock(
        connection: &mut MySqlConnection,
        server: &Server,
        row: i64,
    ) -> driver::Result<()> {
        user_lock::release(connection, server, row).await
    }
}

impl LeaseDriver for MySql {
    async fn read(
        connection: &mut MySqlConnection,
        server: &Server,
        name: &str,
    ) -> driver::Result<Option<LockRow>> {
        lease::read(connection, server, name).await
    }

    async fn create(
        connection: &mut MySqlConnection,
        server: &Server,
        name: &str,
        kind: Kind,
    ) -> driver::Result<bool> {
        lease::create(connection, server, name, kind).await
    }

    async fn acquire(
        connection: &mut MySqlConnection,
        server: &Server,
        claim: &Claim,
    ) -> driver::Result<Option<Grant>> {
        batch::acquire(connection, server, claim).await
    }

    async fn read_all(
        connection: &mut MySqlConnection,
        server: &Server,
        names: &[Name],
    ) -> driver::Result<Vec<Option<LockRow>>> {
        several::read(connection, server, names).await
    }

    async fn create_all(
        connection: &mut MySqlConnection,
        server: &Server,
        names: &[Name],
        kind: Kind,
    ) -> driver::Result<bool> {
        several::create(connection, server, names, kind).await
    }

    async fn ensure_all(
        connection: &mut MySqlConnection,
        server: &Server,
        names: &[Name],
        kind: Kind,
    ) -> driver::Result<Vec<Option<LockRow>>> {
        several::ensure(connection, server, names, kind).await
    }

    async fn acquire_all(
        connection: &mut MySqlConnection,
        server: &Server,
        claims: &[Claim],
    ) -> driver::Result<Vec<Option<Grant>>> {
        several::acquire(connection, server, claims).await
    }

    async fn unlocked(
        connection: &mut MySqlConnection,
        server: &Server,
        names: &[Name],
    ) -> driver::Result<HashSet<String>> {
        several::unlocked(connection, server, names).await
    }

    async fn give_notice(
        connection: &mut MySqlConnection,
        server: &Server,
        names: &[Name],
    ) -> driver::Result<Vec<bool>> {
        let mut given = Vec::with_capacity(names.len());
        for part in parts(names, server, several::in_json) {
            given.extend(in_dialect!(server, give_notice(connection, server, part))?);
        }
        Ok(given)
    }

    async fn settle(connection: &mut MySqlConnection, server: &Server, names: &[Name]) -> driver::Result<()> {
        for part in parts(names, server, several::in_json) {
            in_dialect!(server, settle(connection, server, &names_as_json(part)))?;
        }
        Ok(())
    }

    async fn mark(connection: &mut MySqlConnection, lease: &LeaseKey) -> driver::Result<bool> {
        lease::mark(connection, lease).await
    }

    async fn probe(connection: &mut MySqlConnection, server: &Server, name: &str) -> driver::Result<Probe> {
        lease::probe(connection, server, name).await
    }

    async fn renew(
        connection: &mut MySqlConnection,
        server: &Server,
        leases: &[Renewal],
    ) -> driver::Result<Renewed> {
        batch::renew(connection, server, leases).await
    }

    async fn release(
        connection: &mut MySqlConnection,
        server: &Server,
        lease: &ReleaseClaim,
    ) -> driver::Result<Released> {
        lease::release(connection, server, lease).await.map(Released::from)
    }

    async fn release_later(
        connection: &mut MySqlConnection,
        server: &Server,
        name: &str,
        secret: &Secret,
        at_least: Duration,
    ) -> driver::Result<LeaseStatus> {
        lease::release_later(connection, server, name, secret, at_least).await
    }

    async fn batch(
        connection: &mut MySqlConnection,
        server: &Server,
        releases: &[ReleaseClaim],
        claims: &[Claim],
        _is_deferred: bool,
    ) -> driver::Result<BatchOutcome> {
        batch::batch(connection, server, releases, claims).await
    }
}

impl QueueDriver for MySql {
    async fn enqueue(
        connection: &mut MySqlConnection,
        server: &Server,
        names: &[Name],
        entry: &QueueEntry,
    ) -> driver::Result<Vec<bool>> {
        queue::enqueue(connection, server, names, entry).await
    }

    async fn set_waiters(
        connection: &mut MySqlConnection,
        server: &Server,
        changes: &[QueueChange],
    ) -> driver::Result<Vec<bool>> {
        queue::set_waiters(connection, server, changes).await
    }

    async fn next_in_line(
        connection: &mut MySqlConnection,
        server: &Server,
        ids: &[i64],
        secret: &Secret,
    ) -> driver::Result<Vec<i64>> {
        queue::next_in_line(connection, server, ids, secret).await
    }

    async fn dequeue(
        connection: &mut MySqlConnection,
        server: &Server,
        names: &[Name],
        secret: &Secret,
    ) -> driver::Result<()> {
        queue::dequeue(connection, server, names, secret).await
    }
}

impl PruneDriver for MySql {
    async fn read_part(
        connection: &mut MySqlConnection,
        server: &Server,
        scope: &PruneScope,
        after: i64,
    ) -> driver::Result<TablePart> {
        prune::read_part(connection, server, scope, after).await
    }

    async fn remove_rows(
        connection: &mut MySqlConnection,
        server: &Server,
        scope: &PruneScope,
        ids: &[i64],
    ) -> driver::Result<u64> {
        prune::remove(connection, server, scope, ids).await
    }

    async fn lacks_right_to_delete(
        connection: &mut MySqlConnection,
        server: &Server,
    ) -> driver::Result<Option<String>> {
        prune::lacks_right(connection, server).await
    }
}

impl OperateDriver for MySql {
    async fn end_of_part(
        connection: &mut MySqlConnection,
        server: &Server,
        page: &ListPage,
    ) -> driver::Result<Option<String>> {
        operate::end_of_part(connection, server, page).await
    }

    async fn list(
        connection: &mut MySqlConnection,
        server: &Server,
        page: &ListPage,
    ) -> driver::Result<Vec<(String, LockRow)>> {
        operate::list(connection, server, page).await
    }

    async fn row_holders(
        connection: &mut MySqlConnection,
        server: &Server,
        ids: &[i64],
    ) -> driver::Result<HashMap<i64, RowHolder>> {
        operate::row_holders(connection, server, ids).await
    }

    async fn force_release(
        connection: &mut MySqlConnection,
        server: &Server,
        name: &str,
        row: &LockRow,
    ) -> driver::Result<bool> {
        operate::force_release(connection, server, name, row).await
    }

    async fn describe(connection: &mut MySqlConnection, server: &Server) -> driver::Result<String> {
        operate::describe(connection, server).await
    }

    async fn time(connection: &mut MySqlConnection) -> driver::Result<i64> {
        operate::time(connection).await
    }
}

impl RowLockDriver for MySql {
    const ROW_IS_MADE_IN_TRANSACTION: bool = false;

    async fn has_used_table(connection: &mut MySqlConnection) -> driver::Result<bool> {
        row_lock::has_used_table(connection).await
    }

    async fn find_row(
        connection: &mut MySqlConnection,
        server: &Server,
        name: &str,
    ) -> driver::Result<Option<LockRow>> {
        row_lock::find_row(connection, server, name).await
    }

    async fn lock_row(
        connection: &mut MySqlConnection,
        server: &Server,
        claim: &RowClaim,
        slice: Duration,
    ) -> driver::Result<RowAttempt> {
        let owner = server.storable(&claim.owner);
        if *owner == *claim.owner {
            return row_lock::lock_row(connection, server, claim, slice).await;
        }
        let claim = RowClaim { owner: owner.into(), ..claim.clone() };
        row_lock::lock_row(connection, server, &claim, slice).await
    }

    async fn was_its_own(connection: &mut MySqlConnection, before: &str) -> driver::Result<Option<bool>> {
        let may_be = row_lock::may_be_its_own(connection, before).await?;
        Ok(if may_be { None } else { Some(false) })
    }
}

impl TransactionDriver for MySql {
    /// The session settings are for statements that are sent after this transaction has ended
    /// without its owner's knowledge, for example by a deadlock. Such statements would commit by
    /// themselves. With these settings the server refuses them, except a statement sent immediately
    /// after a deadlock (measured on MariaDB 10.11 and MySQL 9.7). That statement belongs to a
    /// transaction that is never committed. The savepoint is gone then, too.
    const BEGIN_MARKED: &'static str = "
        START TRANSACTION; SET @lock_db_autocommit = @@SESSION.autocommit, @lock_db_released = NULL; SET SESSION autocommit = 0;
        SET SESSION TRANSACTION READ ONLY; SAVEPOINT lock_db_guard";
    const COMMITS_WITH_CHECK: bool = true;

    async fn commit_locked(
        connection: &mut MySqlConnection,
        server: &Server,
        _name: &str,
        _fencing_token: i64,
    ) -> driver::Result<Guarded> {
        transaction::commit_locked(connection, server).await
    }

    async fn commit_guarded(
        connection: &mut MySqlConnection,
        lease: &LeaseKey,
        release: bool,
    ) -> driver::Result<Guarded> {
        transaction::commit_guarded(connection, lease, release).await
    }

    async fn unmark(connection: &mut MySqlConnection) -> driver::Result<()> {
        transaction::unmark(connection).await
    }

    async fn guard(
        connection: &mut MySqlConnection,
        lease: &LeaseKey,
        release: bool,
    ) -> driver::Result<Guarded> {
        transaction::guard(connection, lease, release).await
    }

    async fn guard_in_marked(connection: &mut MySqlConnection, lease: &LeaseKey) -> driver::Result<Guarded> {
        transaction::guard_in_marked(connection, lease).await
    }

    async fn sees_grant(connection: &mut MySqlConnection, lease: &LeaseKey) -> driver::Result<bool> {
        transaction::sees_grant(connection, lease).await
    }

    async fn doom(connection: &mut MySqlConnection) {
        transaction::doom(connection).await;
    }
}

/// Splits items into parts that fit into one message each. The parts are sent one after the other.
fn parts<'a, T>(items: &'a [T], server: &Server, bytes: impl Fn(&T) -> usize) -> Vec<&'a [T]> {
    let (mut parts, mut rest) = (Vec::with_capacity(1), items);
    while !rest.is_empty() {
        let mut sum = 0_usize;
        let fits = rest.iter().take_while(|item| {
            sum = sum.saturating_add(bytes(item));
            sum <= server.longest_message
        });
        // A part has at least one item. If it is too long, the server says so.
        let (part, others) = rest.split_at(fits.count().max(1));
        parts.push(part);
        rest = others;
    }
    parts
}

/// Whether the result of `SHOW CREATE TABLE` describes a temporary table.
fn is_temporary(shown: &MySqlRow) -> bool {
    shown.try_get::<&str, _>(1).is_ok_and(|statement| statement.starts_with("CREATE TEMPORARY"))
}

/// Encodes text as a literal of hexadecimal digits, which is a binary string to the server.
pub(super) fn literal(text: &str) -> String {
    format!("x'{}'", hexadecimal(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_as_long_as_the_server_takes_them() {
        let server = |longest_message| Server { longest_message, ..Server::for_tests() };
        let parts = |items: &[usize], longest| {
            let lengths = super::parts(items, &server(longest), |item| *item);
            lengths.iter().map(|part| part.len()).collect::<Vec<_>>()
        };
        assert_eq!(parts(&[], 10), [0; 0]);
        assert_eq!(parts(&[5, 5, 5], usize::MAX), [3]);
        assert_eq!(parts(&[5, 5, 5], 10), [2, 1]);
        assert_eq!(parts(&[50, 5, 5], 10), [1, 2]);
    }
}
