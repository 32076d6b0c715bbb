//! SQLite 3.42 and later, in a file that several processes of one host may open.
//!
//! The whole database has one writer at a time, so there are no row locks: `lock_row` takes the
//! write lock.

#[macro_use]
mod queue;

mod check;
mod errors;
#[macro_use]
mod lease;
mod migrate;
mod operate;
mod prune;
mod schema;
mod snapshots;
mod transaction;

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::convert::Infallible;
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{Pool, Sqlite};

use super::driver::{
    LeaseDriver, OperateDriver, PruneDriver, QueueDriver, RowLockDriver, SchemaDriver, SessionDriver,
    TransactionDriver, WakeUpDriver,
};
use super::{
    BatchOutcome, Claim, Fault, Found, Grant, Guarded, LeaseKey, LeaseStatus, ListPage, LockRow,
    OldSnapshots, PRIVATE_STATEMENTS, Probe, PruneScope, QueueChange, QueueEntry, ReleaseClaim, Released,
    Renewal, Renewed, RowAttempt, RowClaim, Server, TablePart,
};
use crate::database::StepError;
use crate::database::driver;
use crate::name::Name;
use crate::secret::Secret;
use crate::{Error, Finding, Kind, RowHolder};

impl SchemaDriver for Sqlite {
    const FOLDER: &'static str = "sqlite";

    fn check_options(options: &SqliteConnectOptions, schema: Option<&str>) -> Result<(), Error> {
        schema::check_options(options, schema)
    }

    fn database_name(options: &SqliteConnectOptions) -> String {
        options.get_filename().to_string_lossy().into_owned()
    }

    async fn find_table(connection: &mut SqliteConnection, _schema: Option<&str>) -> driver::Result<Found> {
        schema::find(connection).await
    }

    async fn migrate(connection: &mut SqliteConnection, _schema: Option<&str>) -> driver::Result<()> {
        migrate::migrate(connection).await
    }

    async fn check(connection: &mut SqliteConnection, server: &Server) -> driver::Result<Vec<Finding>> {
        check::check(connection, server).await
    }

    async fn old_snapshots(
        connection: &mut SqliteConnection,
        server: &Server,
    ) -> driver::Result<OldSnapshots> {
        snapshots::old(connection, server).await
    }

    fn code(error: &sqlx::Error) -> Option<Cow<'_, str>> {
        errors::code(error)
    }

    fn classify(error: &sqlx::Error) -> Fault {
        errors::classify(error)
    }
}

impl SessionDriver for Sqlite {
    const IS_REMOTE: bool = false;

    const BEGIN_SHORT: &'static str = "BEGIN IMMEDIATE";

    fn private_options(options: &SqliteConnectOptions) -> SqliteConnectOptions {
        options.clone().statement_cache_capacity(PRIVATE_STATEMENTS)
    }

    async fn prepare(connection: &mut SqliteConnection, _session: i64) -> driver::Result<()> {
        sqlx::raw_sql(schema::PREPARE).execute(connection).await?;
        Ok(())
    }
}

impl WakeUpDriver for Sqlite {
    type Listening = Infallible;

    async fn connect_listening(_pool: &Pool<Sqlite>) -> driver::Result<Infallible> {
        Err(StepError::disconnected("this database has no notifications"))
    }

    async fn listen(listening: &mut Infallible, _listener: u32) -> driver::Result<bool> {
        match *listening {}
    }

    async fn listening_connection(listening: &mut Infallible) -> driver::Result<&mut SqliteConnection> {
        match *listening {}
    }

    async fn notified(listening: &mut Infallible) -> driver::Result<i64> {
        match *listening {}
    }
}

impl LeaseDriver for Sqlite {
    async fn read(
        connection: &mut SqliteConnection,
        server: &Server,
        name: &str,
    ) -> driver::Result<Option<LockRow>> {
        lease::read(connection, server, name).await
    }

    async fn create(
        connection: &mut SqliteConnection,
        server: &Server,
        name: &str,
        kind: Kind,
    ) -> driver::Result<bool> {
        lease::create(connection, server, name, kind).await
    }

    async fn acquire(
        connection: &mut SqliteConnection,
        server: &Server,
        claim: &Claim,
    ) -> driver::Result<Option<Grant>> {
        lease::acquire(connection, server, claim).await
    }

    async fn read_all(
        connection: &mut SqliteConnection,
        server: &Server,
        names: &[Name],
    ) -> driver::Result<Vec<Option<LockRow>>> {
        lease::read_all(connection, server, names).await
    }

    async fn create_all(
        connection: &mut SqliteConnection,
        server: &Server,
        names: &[Name],
        kind: Kind,
    ) -> driver::Result<bool> {
        lease::create_all(connection, server, names, kind).await
    }

    async fn acquire_all(
        connection: &mut SqliteConnection,
        server: &Server,
        claims: &[Claim],
    ) -> driver::Result<Vec<Option<Grant>>> {
        lease::acquire_all(connection, server, claims).await
    }

    /// Returns all names, for the same reason as `probe`.
    async fn unlocked(
        _connection: &mut SqliteConnection,
        _server: &Server,
        names: &[Name],
    ) -> driver::Result<HashSet<String>> {
        Ok(names.iter().map(|name| (**name).to_owned()).collect())
    }

    async fn give_notice(
        connection: &mut SqliteConnection,
        server: &Server,
        names: &[Name],
    ) -> driver::Result<Vec<bool>> {
        lease::give_notice(connection, server, names).await
    }

    async fn settle(
        connection: &mut SqliteConnection,
        server: &Server,
        names: &[Name],
    ) -> driver::Result<()> {
        lease::settle(connection, server, names).await
    }

    /// Always free, because there are no row locks. A write lock covers the whole database, and
    /// every write reports it.
    async fn probe(
        _connection: &mut SqliteConnection,
        _server: &Server,
        _name: &str,
    ) -> driver::Result<Probe> {
        Ok(Probe::Free)
    }

    async fn renew(
        connection: &mut SqliteConnection,
        server: &Server,
        leases: &[Renewal],
    ) -> driver::Result<Renewed> {
        lease::renew(connection, server, leases).await
    }

    async fn release(
        connection: &mut SqliteConnection,
        server: &Server,
        lease: &ReleaseClaim,
    ) -> driver::Result<Released> {
        lease::release(connection, server, lease).await.map(Released::from)
    }

    async fn release_later(
        connection: &mut SqliteConnection,
        server: &Server,
        name: &str,
        secret: &Secret,
        at_least: Duration,
    ) -> driver::Result<LeaseStatus> {
        lease::release_later(connection, server, name, secret, at_least).await
    }

    async fn batch(
        connection: &mut SqliteConnection,
        server: &Server,
        releases: &[ReleaseClaim],
        claims: &[Claim],
        _is_deferred: bool,
    ) -> driver::Result<BatchOutcome> {
        lease::batch(connection, server, releases, claims).await
    }
}

impl QueueDriver for Sqlite {
    async fn enqueue(
        connection: &mut SqliteConnection,
        server: &Server,
        names: &[Name],
        entry: &QueueEntry,
    ) -> driver::Result<Vec<bool>> {
        queue::enqueue(connection, server, names, entry).await
    }

    async fn set_waiters(
        connection: &mut SqliteConnection,
        server: &Server,
        changes: &[QueueChange],
    ) -> driver::Result<Vec<bool>> {
        queue::set_waiters(connection, server, changes).await
    }

    async fn next_in_line(
        connection: &mut SqliteConnection,
        server: &Server,
        ids: &[i64],
        secret: &Secret,
    ) -> driver::Result<Vec<i64>> {
        queue::next_in_line(connection, server, ids, secret).await
    }

    async fn dequeue(
        connection: &mut SqliteConnection,
        server: &Server,
        names: &[Name],
        secret: &Secret,
    ) -> driver::Result<()> {
        queue::dequeue(connection, server, names, secret).await
    }
}

impl PruneDriver for Sqlite {
    const REMOVED_AT_ONCE: usize = 200;

    async fn read_part(
        connection: &mut SqliteConnection,
        server: &Server,
        scope: &PruneScope,
        after: i64,
    ) -> driver::Result<TablePart> {
        prune::read_part(connection, server, scope, after).await
    }

    async fn remove_rows(
        connection: &mut SqliteConnection,
        server: &Server,
        scope: &PruneScope,
        ids: &[i64],
    ) -> driver::Result<u64> {
        prune::remove(connection, server, scope, ids).await
    }
}

impl OperateDriver for Sqlite {
    async fn end_of_part(
        connection: &mut SqliteConnection,
        server: &Server,
        page: &ListPage,
    ) -> driver::Result<Option<String>> {
        operate::end_of_part(connection, server, page).await
    }

    async fn list(
        connection: &mut SqliteConnection,
        server: &Server,
        page: &ListPage,
    ) -> driver::Result<Vec<(String, LockRow)>> {
        operate::list(connection, server, page).await
    }

    async fn row_holders(
        _connection: &mut SqliteConnection,
        _server: &Server,
        ids: &[i64],
    ) -> driver::Result<HashMap<i64, RowHolder>> {
        Ok(operate::row_holders(ids))
    }

    async fn force_release(
        connection: &mut SqliteConnection,
        server: &Server,
        name: &str,
        row: &LockRow,
    ) -> driver::Result<bool> {
        operate::force_release(connection, server, name, row).await
    }

    async fn describe(connection: &mut SqliteConnection, _server: &Server) -> driver::Result<String> {
        operate::describe(connection).await
    }

    async fn time(connection: &mut SqliteConnection) -> driver::Result<i64> {
        operate::time(connection).await
    }
}

impl RowLockDriver for Sqlite {
    const ROW_IS_MADE_IN_TRANSACTION: bool = true;

    const SETTLES_IN_TRANSACTION: bool = true;

    async fn is_here(connection: &mut SqliteConnection, server: &Server) -> driver::Result<bool> {
        transaction::is_here(connection, server).await
    }

    async fn lock_row(
        connection: &mut SqliteConnection,
        server: &Server,
        claim: &RowClaim,
        slice: Duration,
    ) -> driver::Result<RowAttempt> {
        transaction::lock_row(connection, server, claim, slice).await
    }
}

impl TransactionDriver for Sqlite {
    /// Some errors end a transaction by themselves, and the savepoint with it.
    const BEGIN_MARKED: &'static str = "BEGIN; SAVEPOINT lock_db_guard";

    /// Takes the write lock with the first statement, so that a takeover waits and the snapshot
    /// can't be too old.
    const BEGIN_GUARDED: &'static str = "BEGIN IMMEDIATE; SAVEPOINT lock_db_guard";

    async fn commit_locked(
        connection: &mut SqliteConnection,
        server: &Server,
        name: &str,
        fencing_token: i64,
    ) -> driver::Result<Guarded> {
        transaction::commit_locked(connection, server, name, fencing_token).await
    }

    async fn commit_guarded(
        connection: &mut SqliteConnection,
        lease: &LeaseKey,
        release: bool,
    ) -> driver::Result<Guarded> {
        transaction::commit_guarded(connection, lease, release).await
    }

    async fn guard(
        connection: &mut SqliteConnection,
        lease: &LeaseKey,
        release: bool,
    ) -> driver::Result<Guarded> {
        transaction::guard(connection, lease, release).await
    }

    async fn doom(connection: &mut SqliteConnection) {
        transaction::doom(connection).await;
    }

    async fn reopen(connection: &mut SqliteConnection) {
        transaction::reopen(connection).await;
    }
}
