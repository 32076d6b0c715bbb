//! PostgreSQL 12 and later.
//!
//! No statement on a private connection waits for a locked row: rows that another transaction has
//! locked are skipped and requested again later. So one row can't hold up a batch, two batches
//! can't deadlock, and behind a pooler nothing has to be SET, which a pooler in transaction mode
//! would pass on to other clients.

/// Finds the row version of a name that the statement's snapshot sees, as a `ctid`.
///
/// An old snapshot, of any transaction in the database, keeps all versions of a hot row. The index
/// then has an entry for each page that holds versions, in the order of the pages. New versions go
/// to later pages, so a backward scan meets the current version first. `=` would begin with the
/// oldest version and read them all (`ORDER BY` is ignored after `=`). A row found this way is also
/// locked and written by its `ctid`: another index would read all versions again.
macro_rules! newest {
    ($name:literal) => {
        concat!(
            "(SELECT ctid FROM {table} WHERE lock_name >= ",
            $name,
            " AND lock_name <= ",
            $name,
            " ORDER BY lock_name DESC LIMIT 1)"
        )
    };
}

/// How the rows of the names are found. `from_behind` uses `newest!`. `plainly` joins by name,
/// which takes two thirds of the time for one row, but many times as long for a hot row while an
/// old snapshot keeps its versions.
macro_rules! the_row {
    (from_behind) => {
        concat!(
            "CROSS JOIN LATERAL ",
            newest!("asked.lock_name COLLATE \"C\""),
            " AS newest JOIN {table} AS lease ON lease.ctid = newest.ctid"
        )
    };
    (plainly) => {
        "JOIN {table} AS lease ON lease.lock_name = asked.lock_name COLLATE \"C\""
    };
}

#[macro_use]
mod queue;

mod batch;
mod check;
mod errors;
#[macro_use]
mod lease;
mod listener;
mod migrate;
mod operate;
mod prune;
mod row_lock;
mod schema;
mod sequence;
mod session;
mod several;
mod snapshots;
mod transaction;

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgListener};
use sqlx::{ConnectOptions, Pool, Postgres};

use super::driver::{
    LeaseDriver, OperateDriver, PruneDriver, QueueDriver, RowLockDriver, SchemaDriver, SessionDriver,
    TransactionDriver, WakeUpDriver,
};
use super::{
    BatchOutcome, Claim, Fault, Found, Grant, Guarded, LeaseKey, LeaseStatus, ListPage, LockRow,
    Notification, OldSnapshots, PRIVATE_STATEMENTS, Probe, PruneScope, QueueChange, QueueEntry, ReleaseClaim,
    Released, Renewal, Renewed, RowAttempt, RowClaim, Server, TablePart,
};
use crate::database::driver;
use crate::name::Name;
use crate::secret::Secret;
use crate::{Finding, Kind, RowHolder};

/// With at least this many names, the rows are found `plainly`. With fewer names, the cost of one
/// hot row would be noticeable.
const MANY: usize = 16;

/// Whether a statement with this many names finds their rows `plainly`.
fn is_plain(server: &Server, names: usize) -> bool {
    names >= MANY && !server.table.has_old_versions()
}

impl SchemaDriver for Postgres {
    const FOLDER: &'static str = "postgres";

    fn database_name(options: &PgConnectOptions) -> String {
        options.get_database().unwrap_or_else(|| options.get_username()).to_owned()
    }

    async fn find_table(connection: &mut PgConnection, schema: Option<&str>) -> driver::Result<Found> {
        schema::find(connection, schema).await
    }

    async fn find_only_table(
        connection: &mut PgConnection,
        pool: &Pool<Postgres>,
        schema: Option<&str>,
    ) -> driver::Result<Option<Server>> {
        let options = pool.connect_options();
        let database = options.get_database().unwrap_or(options.get_username());
        schema::find_only(connection, database, schema).await
    }

    async fn migrate(connection: &mut PgConnection, schema: Option<&str>) -> driver::Result<()> {
        migrate::migrate(connection, schema).await
    }

    async fn check(connection: &mut PgConnection, server: &Server) -> driver::Result<Vec<Finding>> {
        check::check(connection, server).await
    }

    fn lacks_right(error: &sqlx::Error) -> bool {
        errors::code(error) == Some(errors::INSUFFICIENT_PRIVILEGE)
    }

    async fn old_snapshots(connection: &mut PgConnection, server: &Server) -> driver::Result<OldSnapshots> {
        snapshots::old(connection, server).await
    }

    fn meaning(error: &sqlx::Error) -> Option<&'static str> {
        errors::meaning(error)
    }

    fn code(error: &sqlx::Error) -> Option<Cow<'_, str>> {
        errors::code(error).map(Cow::Borrowed)
    }

    fn classify(error: &sqlx::Error) -> Fault {
        errors::classify(error)
    }
}

impl SessionDriver for Postgres {
    const BEGIN_SHORT: &'static str = "BEGIN; SET LOCAL idle_in_transaction_session_timeout = 5000";

    fn private_options(options: &PgConnectOptions) -> PgConnectOptions {
        options.clone().statement_cache_capacity(PRIVATE_STATEMENTS)
    }

    fn keeps_statements(options: &PgConnectOptions) -> bool {
        let url = options.to_url_lossy();
        !url.query_pairs().any(|(option, value)| option == "statement-cache-capacity" && value == "0")
    }

    async fn prepare(connection: &mut PgConnection, session: i64) -> driver::Result<()> {
        schema::prepare(connection, session).await
    }

    async fn is_idle(connection: &mut PgConnection, session: i64, own: i64) -> driver::Result<bool> {
        session::is_idle(connection, session, own).await
    }

    async fn end_session(connection: &mut PgConnection, session: i64) -> driver::Result<bool> {
        session::end(connection, session).await
    }

    async fn has_session(connection: &mut PgConnection, session: i64) -> driver::Result<Option<i64>> {
        session::has(connection, session).await
    }
}

impl WakeUpDriver for Postgres {
    type Listening = PgListener;

    const NOTIFIES: bool = true;

    async fn connect_listening(pool: &Pool<Postgres>) -> driver::Result<PgListener> {
        listener::connect(pool).await
    }

    async fn listen(listening: &mut PgListener, listener: u32) -> driver::Result<bool> {
        listener::listen(listening, listener).await
    }

    async fn listening_connection(listening: &mut PgListener) -> driver::Result<&mut PgConnection> {
        listener::connection(listening).await
    }

    async fn notified(listening: &mut PgListener) -> driver::Result<i64> {
        listener::notified(listening).await
    }

    async fn notify(connection: &mut PgConnection, notifications: &[Notification]) -> driver::Result<()> {
        listener::notify(connection, notifications).await
    }
}

impl LeaseDriver for Postgres {
    const FLUSHES: bool = true;

    async fn read(
        connection: &mut PgConnection,
        server: &Server,
        name: &str,
    ) -> driver::Result<Option<LockRow>> {
        lease::read(connection, server, name).await
    }

    async fn create(
        connection: &mut PgConnection,
        server: &Server,
        name: &str,
        kind: Kind,
    ) -> driver::Result<bool> {
        lease::create(connection, server, name, kind).await
    }

    async fn acquire(
        connection: &mut PgConnection,
        server: &Server,
        claim: &Claim,
    ) -> driver::Result<Option<Grant>> {
        lease::acquire(connection, server, claim).await
    }

    async fn read_all(
        connection: &mut PgConnection,
        server: &Server,
        names: &[Name],
    ) -> driver::Result<Vec<Option<LockRow>>> {
        several::read(connection, server, names).await
    }

    async fn create_all(
        connection: &mut PgConnection,
        server: &Server,
        names: &[Name],
        kind: Kind,
    ) -> driver::Result<bool> {
        several::create(connection, server, names, kind).await
    }

    async fn acquire_all(
        connection: &mut PgConnection,
        server: &Server,
        claims: &[Claim],
    ) -> driver::Result<Vec<Option<Grant>>> {
        several::acquire(connection, server, claims).await
    }

    async fn unlocked(
        connection: &mut PgConnection,
        server: &Server,
        names: &[Name],
    ) -> driver::Result<HashSet<String>> {
        several::unlocked(connection, server, names).await
    }

    async fn give_notice(
        connection: &mut PgConnection,
        server: &Server,
        names: &[Name],
    ) -> driver::Result<Vec<bool>> {
        lease::give_notice(connection, server, names).await
    }

    async fn settle(connection: &mut PgConnection, server: &Server, names: &[Name]) -> driver::Result<()> {
        lease::settle(connection, server, names).await
    }

    async fn mark(connection: &mut PgConnection, lease: &LeaseKey) -> driver::Result<bool> {
        lease::mark(connection, lease).await
    }

    async fn probe(connection: &mut PgConnection, server: &Server, name: &str) -> driver::Result<Probe> {
        lease::probe(connection, server, name).await
    }

    async fn renew(
        connection: &mut PgConnection,
        server: &Server,
        leases: &[Renewal],
    ) -> driver::Result<Renewed> {
        batch::renew(connection, server, leases).await
    }

    async fn release(
        connection: &mut PgConnection,
        server: &Server,
        lease: &ReleaseClaim,
    ) -> driver::Result<Released> {
        lease::release(connection, server, lease).await
    }

    async fn release_later(
        connection: &mut PgConnection,
        server: &Server,
        name: &str,
        secret: &Secret,
        at_least: Duration,
    ) -> driver::Result<LeaseStatus> {
        lease::release_later(connection, server, name, secret, at_least).await
    }

    async fn batch(
        connection: &mut PgConnection,
        server: &Server,
        releases: &[ReleaseClaim],
        claims: &[Claim],
        is_deferred: bool,
    ) -> driver::Result<BatchOutcome> {
        batch::batch(connection, server, releases, claims, is_deferred).await
    }

    async fn flush(connection: &mut PgConnection) -> driver::Result<i64> {
        session::flush(connection).await
    }
}

impl QueueDriver for Postgres {
    async fn enqueue(
        connection: &mut PgConnection,
        server: &Server,
        names: &[Name],
        entry: &QueueEntry,
    ) -> driver::Result<Vec<bool>> {
        queue::enqueue(connection, server, names, entry).await
    }

    async fn set_waiters(
        connection: &mut PgConnection,
        server: &Server,
        changes: &[QueueChange],
    ) -> driver::Result<Vec<bool>> {
        queue::set_waiters(connection, server, changes).await
    }

    async fn next_in_line(
        connection: &mut PgConnection,
        server: &Server,
        ids: &[i64],
        secret: &Secret,
    ) -> driver::Result<Vec<i64>> {
        queue::next_in_line(connection, server, ids, secret).await
    }

    async fn dequeue(
        connection: &mut PgConnection,
        server: &Server,
        names: &[Name],
        secret: &Secret,
    ) -> driver::Result<()> {
        queue::dequeue(connection, server, names, secret).await
    }
}

impl PruneDriver for Postgres {
    async fn read_part(
        connection: &mut PgConnection,
        server: &Server,
        scope: &PruneScope,
        after: i64,
    ) -> driver::Result<TablePart> {
        prune::read_part(connection, server, scope, after).await
    }

    async fn remove_rows(
        connection: &mut PgConnection,
        server: &Server,
        scope: &PruneScope,
        ids: &[i64],
    ) -> driver::Result<u64> {
        prune::remove(connection, server, scope, ids).await
    }

    async fn lacks_right_to_delete(
        connection: &mut PgConnection,
        server: &Server,
    ) -> driver::Result<Option<String>> {
        prune::lacks_right(connection, server).await
    }
}

impl OperateDriver for Postgres {
    async fn end_of_part(
        connection: &mut PgConnection,
        server: &Server,
        page: &ListPage,
    ) -> driver::Result<Option<String>> {
        operate::end_of_part(connection, server, page).await
    }

    async fn list(
        connection: &mut PgConnection,
        server: &Server,
        page: &ListPage,
    ) -> driver::Result<Vec<(String, LockRow)>> {
        operate::list(connection, server, page).await
    }

    async fn row_holders(
        connection: &mut PgConnection,
        server: &Server,
        ids: &[i64],
    ) -> driver::Result<HashMap<i64, RowHolder>> {
        operate::row_holders(connection, server, ids).await
    }

    async fn force_release(
        connection: &mut PgConnection,
        server: &Server,
        name: &str,
        row: &LockRow,
    ) -> driver::Result<bool> {
        operate::force_release(connection, server, name, row).await
    }

    async fn describe(connection: &mut PgConnection, _server: &Server) -> driver::Result<String> {
        operate::describe(connection).await
    }

    async fn time(connection: &mut PgConnection) -> driver::Result<i64> {
        operate::time(connection).await
    }
}

impl RowLockDriver for Postgres {
    const SEARCHES_LATE: bool = true;

    const ROW_IS_MADE_IN_TRANSACTION: bool = true;

    async fn waits_outside(transaction: &mut PgConnection) -> driver::Result<bool> {
        row_lock::has_snapshot(transaction).await
    }

    async fn has_used_table(connection: &mut PgConnection) -> driver::Result<bool> {
        row_lock::has_used_table(connection).await
    }

    async fn lock_row(
        connection: &mut PgConnection,
        server: &Server,
        claim: &RowClaim,
        slice: Duration,
    ) -> driver::Result<RowAttempt> {
        row_lock::lock_row(connection, server, claim, slice).await
    }

    async fn is_here(connection: &mut PgConnection, server: &Server) -> driver::Result<bool> {
        row_lock::is_here(connection, server).await
    }

    async fn was_its_own(connection: &mut PgConnection, before: &str) -> driver::Result<Option<bool>> {
        row_lock::was_its_own(connection, before).await.map(Some)
    }
}

impl TransactionDriver for Postgres {
    /// After an error the server itself refuses everything but a rollback. The mark shows whether
    /// the owner's own COMMIT or ROLLBACK has ended the transaction: it ends with the transaction.
    const BEGIN_MARKED: &'static str = "BEGIN; SET LOCAL lock_db.mark = '1'";

    const BEGIN_WITH_ROW: &'static str = row_lock::BEGIN_AND_LIMIT;

    const COMMITS_WITH_CHECK: bool = true;

    async fn commit_locked(
        connection: &mut PgConnection,
        _server: &Server,
        _name: &str,
        _fencing_token: i64,
    ) -> driver::Result<Guarded> {
        transaction::commit_locked(connection).await
    }

    async fn commit_guarded(
        connection: &mut PgConnection,
        lease: &LeaseKey,
        release: bool,
    ) -> driver::Result<Guarded> {
        transaction::commit_guarded(connection, lease, release).await
    }

    async fn guard(
        connection: &mut PgConnection,
        lease: &LeaseKey,
        release: bool,
    ) -> driver::Result<Guarded> {
        transaction::guard(connection, lease, release).await
    }

    async fn doom(connection: &mut PgConnection) {
        transaction::doom(connection).await;
    }
}
