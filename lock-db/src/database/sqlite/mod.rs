//! SQLite 3.42 and later, in a file that several processes of one host may open.
//!
//! There is one writer at a time in the whole database, so there are no row locks: `lock_row` takes the write lock.

mod check;
mod errors;
mod lease;
mod migrate;
mod schema;
mod snapshots;
mod transaction;

use std::collections::HashSet;
use std::convert::Infallible;
use std::time::Duration;

use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};
use sqlx::{Pool, Sqlite};

use super::{
    Claim, Exchanged, Fault, Found, Grant, Guarded, LeaseKey, LockDatabase, LockRow, OldSnapshots,
    PRIVATE_STATEMENTS, Place, Probe, Released, Renewal, Renewed, Return, RowAttempt, RowClaim, Server,
    Standing,
};
use crate::name::Name;
use crate::secret::Secret;
use crate::{Error, Kind};

impl LockDatabase for Sqlite {
    const FOLDER: &'static str = "sqlite";
    const IS_REMOTE: bool = false;
    const BEGIN_SHORT: &'static str = "BEGIN IMMEDIATE";
    const ROW_IS_MADE_IN_TRANSACTION: bool = true;
    const SETTLES_IN_TRANSACTION: bool = true;
    /// Some errors end a transaction by themselves; the savepoint is gone then.
    const BEGIN_MARKED: &'static str = "BEGIN; SAVEPOINT lock_db_guard";
    /// With the write lock from the first statement on, a takeover waits, and the snapshot can't be too old.
    const BEGIN_GUARDED: &'static str = "BEGIN IMMEDIATE; SAVEPOINT lock_db_guard";

    fn check_options(options: &SqliteConnectOptions, schema: Option<&str>) -> Result<(), Error> {
        schema::check_options(options, schema)
    }

    fn private_options(options: &SqliteConnectOptions) -> SqliteConnectOptions {
        options.clone().statement_cache_capacity(PRIVATE_STATEMENTS)
    }

    fn database_name(options: &SqliteConnectOptions) -> String {
        options.get_filename().to_string_lossy().into_owned()
    }

    async fn prepare(connection: &mut SqliteConnection, _session: i64) -> sqlx::Result<()> {
        sqlx::raw_sql(schema::PREPARE).execute(connection).await.map(drop)
    }

    async fn find_table(connection: &mut SqliteConnection, _schema: Option<&str>) -> sqlx::Result<Found> {
        schema::find(connection).await
    }

    type Listening = Infallible;

    async fn connect_listening(_pool: &Pool<Sqlite>) -> sqlx::Result<Infallible> {
        Err(sqlx::Error::Protocol("this database calls nobody".into()))
    }

    async fn listen(listening: &mut Infallible, _listener: u32) -> sqlx::Result<bool> {
        match *listening {}
    }

    async fn listening_connection(listening: &mut Infallible) -> sqlx::Result<&mut SqliteConnection> {
        match *listening {}
    }

    async fn called(listening: &mut Infallible) -> sqlx::Result<i64> {
        match *listening {}
    }

    async fn migrate(connection: &mut SqliteConnection, _schema: Option<&str>) -> sqlx::Result<()> {
        migrate::migrate(connection).await
    }

    async fn check(connection: &mut SqliteConnection, server: &Server) -> sqlx::Result<Vec<String>> {
        check::check(connection, server).await
    }

    async fn old_snapshots(connection: &mut SqliteConnection, server: &Server) -> sqlx::Result<OldSnapshots> {
        snapshots::old(connection, server).await
    }

    async fn look(
        connection: &mut SqliteConnection,
        server: &Server,
        name: &str,
    ) -> sqlx::Result<Option<LockRow>> {
        lease::look(connection, server, name).await
    }

    async fn create(
        connection: &mut SqliteConnection,
        server: &Server,
        name: &str,
        kind: Kind,
    ) -> sqlx::Result<bool> {
        lease::create(connection, server, name, kind).await
    }

    async fn acquire(
        connection: &mut SqliteConnection,
        server: &Server,
        claim: &Claim,
    ) -> sqlx::Result<Option<Grant>> {
        lease::acquire(connection, server, claim).await
    }

    async fn look_all(
        connection: &mut SqliteConnection,
        server: &Server,
        names: &[Name],
    ) -> sqlx::Result<Vec<Option<LockRow>>> {
        lease::look_all(connection, server, names).await
    }

    async fn create_all(
        connection: &mut SqliteConnection,
        server: &Server,
        names: &[Name],
        kind: Kind,
    ) -> sqlx::Result<bool> {
        lease::create_all(connection, server, names, kind).await
    }

    async fn acquire_all(
        connection: &mut SqliteConnection,
        server: &Server,
        claims: &[Claim],
    ) -> sqlx::Result<Vec<Option<Grant>>> {
        lease::acquire_all(connection, server, claims).await
    }

    /// As `probe`.
    async fn unlocked(
        _connection: &mut SqliteConnection,
        _server: &Server,
        names: &[Name],
    ) -> sqlx::Result<HashSet<String>> {
        Ok(names.iter().map(|name| (**name).to_owned()).collect())
    }

    async fn give_notice(
        connection: &mut SqliteConnection,
        server: &Server,
        names: &[Name],
    ) -> sqlx::Result<u64> {
        lease::give_notice(connection, server, names).await
    }

    async fn settle(connection: &mut SqliteConnection, server: &Server, name: &str) -> sqlx::Result<bool> {
        lease::settle(connection, server, name).await
    }

    /// What keeps a row from being written keeps the whole database, and is told by every write.
    async fn probe(_connection: &mut SqliteConnection, _server: &Server, _name: &str) -> sqlx::Result<Probe> {
        Ok(Probe::Free)
    }

    async fn renew(
        connection: &mut SqliteConnection,
        server: &Server,
        leases: &[Renewal],
    ) -> sqlx::Result<Renewed> {
        lease::renew(connection, server, leases).await
    }

    async fn release(
        connection: &mut SqliteConnection,
        server: &Server,
        lease: &Return,
    ) -> sqlx::Result<Released> {
        lease::release(connection, server, lease).await.map(Released::from)
    }

    async fn release_later(
        connection: &mut SqliteConnection,
        server: &Server,
        name: &str,
        secret: &Secret,
        at_least: Duration,
    ) -> sqlx::Result<Standing> {
        lease::release_later(connection, server, name, secret, at_least).await
    }

    async fn exchange(
        connection: &mut SqliteConnection,
        server: &Server,
        returns: &[Return],
        claims: &[Claim],
    ) -> sqlx::Result<Exchanged> {
        lease::exchange(connection, server, returns, claims).await
    }

    async fn stand(
        connection: &mut SqliteConnection,
        server: &Server,
        name: &str,
        place: &Place,
    ) -> sqlx::Result<bool> {
        lease::stand(connection, server, name, place).await
    }

    async fn set_waiters(
        connection: &mut SqliteConnection,
        server: &Server,
        name: &str,
        before: &str,
        after: &str,
    ) -> sqlx::Result<bool> {
        lease::set_waiters(connection, server, name, before, after).await
    }

    async fn remove_waiter(
        connection: &mut SqliteConnection,
        server: &Server,
        name: &str,
        secret: &Secret,
    ) -> sqlx::Result<()> {
        lease::remove_waiter(connection, server, name, secret).await
    }

    async fn is_here(connection: &mut SqliteConnection, server: &Server) -> sqlx::Result<bool> {
        transaction::is_here(connection, server).await
    }

    async fn lock_row(
        connection: &mut SqliteConnection,
        server: &Server,
        claim: &RowClaim,
        slice: Duration,
    ) -> sqlx::Result<RowAttempt> {
        transaction::lock_row(connection, server, claim, slice).await
    }

    async fn commit_locked(
        connection: &mut SqliteConnection,
        server: &Server,
        name: &str,
        fencing_token: i64,
    ) -> sqlx::Result<Guarded> {
        transaction::commit_locked(connection, server, name, fencing_token).await
    }

    async fn commit_guarded(
        connection: &mut SqliteConnection,
        lease: &LeaseKey,
        release: bool,
    ) -> sqlx::Result<Guarded> {
        transaction::commit_guarded(connection, lease, release).await
    }

    async fn guard(
        connection: &mut SqliteConnection,
        lease: &LeaseKey,
        release: bool,
    ) -> sqlx::Result<Guarded> {
        transaction::guard(connection, lease, release).await
    }

    async fn doom(connection: &mut SqliteConnection) {
        transaction::doom(connection).await;
    }

    async fn reopen(connection: &mut SqliteConnection) {
        transaction::reopen(connection).await;
    }

    fn classify(error: &sqlx::Error) -> Fault {
        errors::classify(error)
    }
}
