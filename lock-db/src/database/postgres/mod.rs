//! PostgreSQL 12 and later.
//!
//! No statement on a private connection waits for a locked row: what another transaction has locked is skipped and asked for
//! again later. So a batch can't be held up by one row, two batches can't deadlock, and nothing has to be SET, which
//! a pooler in transaction mode would hand on to other clients.

/// Where the version of a name's row lies that the statement's snapshot sees.
///
/// An old snapshot, of any transaction in the database, keeps all versions of a hot row, and the index an entry for each page
/// of them, in the order of the pages. Versions go to ever later pages, so the present one is met first from behind; `=` would begin with
/// the oldest and read them all (`ORDER BY` is ignored behind it). Found this way it is also locked and written by its `ctid`: by
/// another index all would be read again.
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

mod check;
mod errors;
mod lease;
mod listener;
mod migrate;
mod schema;
mod sequence;
mod session;
mod several;
mod snapshots;
mod together;
mod transaction;

use std::collections::HashSet;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgConnection, PgListener};
use sqlx::{ConnectOptions, Pool, Postgres};

use super::{
    Call, Claim, Exchanged, Fault, Found, Grant, Guarded, LeaseKey, LockDatabase, LockRow, OldSnapshots,
    PRIVATE_STATEMENTS, Place, Probe, Released, Renewal, Renewed, Return, RowAttempt, RowClaim, Server,
    Standing,
};
use crate::Kind;
use crate::name::Name;
use crate::secret::Secret;

impl LockDatabase for Postgres {
    const FOLDER: &'static str = "postgres";
    const SEARCHES_LATE: bool = true;
    /// After an error the server itself refuses all but a rollback. The mark tells a transaction that its owner's own COMMIT or
    /// ROLLBACK has ended: it goes with the transaction.
    const BEGIN_MARKED: &'static str = "BEGIN; SET LOCAL lock_db.mark = '1'";
    const BEGIN_WITH_ROW: &'static str = transaction::BEGIN_AND_LIMIT;
    const COMMITS_WITH_CHECK: bool = true;
    const BEGIN_SHORT: &'static str = "BEGIN; SET LOCAL idle_in_transaction_session_timeout = 5000";
    const ROW_IS_MADE_IN_TRANSACTION: bool = true;

    fn private_options(options: &PgConnectOptions) -> PgConnectOptions {
        options.clone().statement_cache_capacity(PRIVATE_STATEMENTS)
    }

    fn database_name(options: &PgConnectOptions) -> String {
        options.get_database().unwrap_or_else(|| options.get_username()).to_owned()
    }

    fn keeps_statements(options: &PgConnectOptions) -> bool {
        let url = options.to_url_lossy();
        !url.query_pairs().any(|(option, value)| option == "statement-cache-capacity" && value == "0")
    }

    async fn prepare(connection: &mut PgConnection, session: i64) -> sqlx::Result<()> {
        schema::prepare(connection, session).await
    }

    async fn is_idle(connection: &mut PgConnection, session: i64, own: i64) -> sqlx::Result<bool> {
        session::is_idle(connection, session, own).await
    }

    async fn end_session(connection: &mut PgConnection, session: i64) -> sqlx::Result<bool> {
        session::end(connection, session).await
    }

    async fn find_table(connection: &mut PgConnection, schema: Option<&str>) -> sqlx::Result<Found> {
        schema::find(connection, schema).await
    }

    async fn find_only_table(
        connection: &mut PgConnection,
        pool: &Pool<Postgres>,
        schema: Option<&str>,
    ) -> sqlx::Result<Option<Server>> {
        let options = pool.connect_options();
        let database = options.get_database().unwrap_or(options.get_username());
        schema::find_only(connection, database, schema).await
    }

    type Listening = PgListener;

    const CALLS: bool = true;

    async fn connect_listening(pool: &Pool<Postgres>) -> sqlx::Result<PgListener> {
        listener::connect(pool).await
    }

    async fn listen(listening: &mut PgListener, listener: u32) -> sqlx::Result<bool> {
        listener::listen(listening, listener).await
    }

    async fn listening_connection(listening: &mut PgListener) -> sqlx::Result<&mut PgConnection> {
        listener::connection(listening).await
    }

    async fn called(listening: &mut PgListener) -> sqlx::Result<i64> {
        listener::called(listening).await
    }

    async fn call(connection: &mut PgConnection, calls: &[Call]) -> sqlx::Result<()> {
        listener::call(connection, calls).await
    }

    async fn migrate(connection: &mut PgConnection, schema: Option<&str>) -> sqlx::Result<()> {
        migrate::migrate(connection, schema).await
    }

    async fn check(connection: &mut PgConnection, server: &Server) -> sqlx::Result<Vec<String>> {
        check::check(connection, server).await
    }

    fn lacks_right(error: &sqlx::Error) -> bool {
        errors::code(error) == Some(errors::INSUFFICIENT_PRIVILEGE)
    }

    async fn old_snapshots(connection: &mut PgConnection, server: &Server) -> sqlx::Result<OldSnapshots> {
        snapshots::old(connection, server).await
    }

    async fn look(
        connection: &mut PgConnection,
        server: &Server,
        name: &str,
    ) -> sqlx::Result<Option<LockRow>> {
        lease::look(connection, server, name).await
    }

    async fn create(
        connection: &mut PgConnection,
        server: &Server,
        name: &str,
        kind: Kind,
    ) -> sqlx::Result<bool> {
        lease::create(connection, server, name, kind).await
    }

    async fn acquire(
        connection: &mut PgConnection,
        server: &Server,
        claim: &Claim,
    ) -> sqlx::Result<Option<Grant>> {
        lease::acquire(connection, server, claim).await
    }

    async fn look_all(
        connection: &mut PgConnection,
        server: &Server,
        names: &[Name],
    ) -> sqlx::Result<Vec<Option<LockRow>>> {
        several::look(connection, server, names).await
    }

    async fn create_all(
        connection: &mut PgConnection,
        server: &Server,
        names: &[Name],
        kind: Kind,
    ) -> sqlx::Result<bool> {
        several::create(connection, server, names, kind).await
    }

    async fn acquire_all(
        connection: &mut PgConnection,
        server: &Server,
        claims: &[Claim],
    ) -> sqlx::Result<Vec<Option<Grant>>> {
        several::acquire(connection, server, claims).await
    }

    async fn unlocked(
        connection: &mut PgConnection,
        server: &Server,
        names: &[Name],
    ) -> sqlx::Result<HashSet<String>> {
        several::unlocked(connection, server, names).await
    }

    async fn give_notice(
        connection: &mut PgConnection,
        server: &Server,
        names: &[Name],
    ) -> sqlx::Result<u64> {
        lease::give_notice(connection, server, &several::texts(names)).await
    }

    async fn settle(connection: &mut PgConnection, server: &Server, name: &str) -> sqlx::Result<bool> {
        lease::settle(connection, server, name).await
    }

    async fn mark(connection: &mut PgConnection, lease: &LeaseKey) -> sqlx::Result<bool> {
        lease::mark(connection, lease).await
    }

    async fn probe(connection: &mut PgConnection, server: &Server, name: &str) -> sqlx::Result<Probe> {
        lease::probe(connection, server, name).await
    }

    async fn renew(
        connection: &mut PgConnection,
        server: &Server,
        leases: &[Renewal],
    ) -> sqlx::Result<Renewed> {
        together::renew(connection, server, leases).await
    }

    async fn release(
        connection: &mut PgConnection,
        server: &Server,
        lease: &Return,
    ) -> sqlx::Result<Released> {
        lease::release(connection, server, lease).await
    }

    async fn release_later(
        connection: &mut PgConnection,
        server: &Server,
        name: &str,
        secret: &Secret,
        at_least: Duration,
    ) -> sqlx::Result<Standing> {
        lease::release_later(connection, server, name, secret, at_least).await
    }

    async fn exchange(
        connection: &mut PgConnection,
        server: &Server,
        returns: &[Return],
        claims: &[Claim],
    ) -> sqlx::Result<Exchanged> {
        together::exchange(connection, server, returns, claims).await
    }

    async fn stand(
        connection: &mut PgConnection,
        server: &Server,
        name: &str,
        place: &Place,
    ) -> sqlx::Result<bool> {
        lease::stand(connection, server, name, place).await
    }

    async fn set_waiters(
        connection: &mut PgConnection,
        server: &Server,
        name: &str,
        before: &str,
        after: &str,
    ) -> sqlx::Result<bool> {
        lease::set_waiters(connection, server, name, before, after).await
    }

    async fn remove_waiter(
        connection: &mut PgConnection,
        server: &Server,
        name: &str,
        secret: &Secret,
    ) -> sqlx::Result<()> {
        lease::remove_waiter(connection, server, name, secret).await
    }

    async fn waits_outside(transaction: &mut PgConnection) -> sqlx::Result<bool> {
        transaction::has_snapshot(transaction).await
    }

    async fn has_used_table(connection: &mut PgConnection) -> sqlx::Result<bool> {
        transaction::has_used_table(connection).await
    }

    async fn lock_row(
        connection: &mut PgConnection,
        server: &Server,
        claim: &RowClaim,
        slice: Duration,
    ) -> sqlx::Result<RowAttempt> {
        transaction::lock_row(connection, server, claim, slice).await
    }

    async fn is_here(connection: &mut PgConnection, server: &Server) -> sqlx::Result<bool> {
        transaction::is_here(connection, server).await
    }

    async fn was_its_own(connection: &mut PgConnection, before: &str) -> sqlx::Result<Option<bool>> {
        transaction::was_its_own(connection, before).await.map(Some)
    }

    async fn commit_locked(
        connection: &mut PgConnection,
        _server: &Server,
        _name: &str,
        _fencing_token: i64,
    ) -> sqlx::Result<Guarded> {
        transaction::commit_locked(connection).await
    }

    async fn commit_guarded(
        connection: &mut PgConnection,
        lease: &LeaseKey,
        release: bool,
    ) -> sqlx::Result<Guarded> {
        transaction::commit_guarded(connection, lease, release).await
    }

    async fn guard(connection: &mut PgConnection, lease: &LeaseKey, release: bool) -> sqlx::Result<Guarded> {
        transaction::guard(connection, lease, release).await
    }

    async fn doom(connection: &mut PgConnection) {
        transaction::doom(connection).await;
    }

    fn classify(error: &sqlx::Error) -> Fault {
        errors::classify(error)
    }
}
