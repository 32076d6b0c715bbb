//! PostgreSQL 12 and later.
//!
//! No statement on a private connection waits for a locked row: what somebody has locked is skipped and asked for
//! again later. So a batch can't be held up by one row, two batches can't deadlock, and nothing has to be SET, which
//! a pooler in transaction mode would hand on to other clients.

mod lease;
mod listener;
mod together;
mod transaction;

use std::time::Duration;

use sqlx::postgres::{PgConnection, PgDatabaseError, PgListener, PgSeverity};
use sqlx::{Connection, Pool, Postgres};

use super::{
    Claim, Exchanged, Fault, Grant, Guarded, LeaseKey, LockDatabase, LockRow, Place, Renewal, Return,
    RowAttempt, RowClaim, Server, Standing,
};
use crate::secret::Secret;
use crate::{Kind, schema};

const CHECK_SCHEMA: &str = "
SELECT id, lock_name, lock_kind, secret_key, fencing_token, owner, create_time, acquire_time, expire_time, waiters,
       previous_token
FROM distributed_lock LIMIT 0";

/// Held to the end of the migrating transaction. The number is `lock-db` in ASCII.
const LOCK_MIGRATIONS: &str = "SELECT pg_advisory_xact_lock(30521770275333218)";
/// Whatever the default of the database: what others have applied while this one waited has to be seen.
const BEGIN_MIGRATION: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";
const LIMIT_MIGRATION_WAIT: &str = "SET LOCAL lock_timeout = '60s'";
const CREATE_LEDGER: &str = "
CREATE TABLE IF NOT EXISTS _lock_db_migrations (
    version BIGINT PRIMARY KEY,
    applied_at TIMESTAMPTZ NOT NULL DEFAULT clock_timestamp())";
const APPLIED: &str = "SELECT version FROM _lock_db_migrations";
const NOTE_APPLIED: &str = "INSERT INTO _lock_db_migrations (version) VALUES ($1)";
const MIGRATIONS: [(i64, &str); 1] = [(1, schema::POSTGRES)];

impl LockDatabase for Postgres {
    const FOLDER: &'static str = "postgres";
    /// Nothing more to do: after an error the server itself refuses all but a rollback.
    const BEGIN_MARKED: &'static str = "BEGIN";
    const BEGIN_SHORT: &'static str = "BEGIN; SET LOCAL idle_in_transaction_session_timeout = 5000";
    const ROW_IS_MADE_IN_TRANSACTION: bool = false;

    async fn prepare(_connection: &mut PgConnection) -> sqlx::Result<Server> {
        Ok(Server::default())
    }

    type Listening = PgListener;

    const CALLS: bool = true;

    async fn connect_listening(pool: &Pool<Postgres>) -> sqlx::Result<PgListener> {
        listener::connect(pool).await
    }

    async fn listen(listening: &mut PgListener, listener: u32) -> sqlx::Result<()> {
        listener::listen(listening, listener).await
    }

    async fn listening_connection(listening: &mut PgListener) -> sqlx::Result<&mut PgConnection> {
        listener::connection(listening).await
    }

    async fn called(listening: &mut PgListener) -> sqlx::Result<i64> {
        listener::called(listening).await
    }

    async fn migrate(connection: &mut PgConnection) -> sqlx::Result<()> {
        let mut transaction = connection.begin_with(BEGIN_MIGRATION).await?;
        sqlx::query(LIMIT_MIGRATION_WAIT).execute(&mut *transaction).await?;
        sqlx::query(LOCK_MIGRATIONS).execute(&mut *transaction).await?;
        sqlx::query(CREATE_LEDGER).execute(&mut *transaction).await?;
        let applied: Vec<i64> = sqlx::query_scalar(APPLIED).fetch_all(&mut *transaction).await?;
        for (version, sql) in MIGRATIONS {
            if !applied.contains(&version) {
                sqlx::raw_sql(sql).execute(&mut *transaction).await?;
                sqlx::query(NOTE_APPLIED).bind(version).execute(&mut *transaction).await?;
            }
        }
        transaction.commit().await
    }

    async fn check_schema(connection: &mut PgConnection) -> sqlx::Result<Option<&'static str>> {
        sqlx::query(CHECK_SCHEMA).execute(connection).await?;
        Ok(None)
    }

    async fn look(connection: &mut PgConnection, name: &str) -> sqlx::Result<Option<LockRow>> {
        lease::look(connection, name).await
    }

    async fn create(connection: &mut PgConnection, name: &str, kind: Kind) -> sqlx::Result<()> {
        lease::create(connection, name, kind).await
    }

    async fn acquire(
        connection: &mut PgConnection,
        _server: Server,
        claim: &Claim,
    ) -> sqlx::Result<Option<Grant>> {
        lease::acquire(connection, claim).await
    }

    async fn renew(connection: &mut PgConnection, leases: &[Renewal]) -> sqlx::Result<Vec<Standing>> {
        together::renew(connection, leases).await
    }

    async fn release(
        connection: &mut PgConnection,
        _server: Server,
        lease: &Return,
    ) -> sqlx::Result<Standing> {
        lease::release(connection, lease).await
    }

    async fn release_later(
        connection: &mut PgConnection,
        name: &str,
        secret: &Secret,
        at_least: Duration,
    ) -> sqlx::Result<Standing> {
        lease::release_later(connection, name, secret, at_least).await
    }

    async fn exchange(
        connection: &mut PgConnection,
        _server: Server,
        returns: &[Return],
        claims: &[Claim],
    ) -> sqlx::Result<Exchanged> {
        together::exchange(connection, returns, claims).await
    }

    async fn stand(connection: &mut PgConnection, name: &str, place: &Place) -> sqlx::Result<bool> {
        lease::stand(connection, name, place).await
    }

    async fn set_waiters(
        connection: &mut PgConnection,
        name: &str,
        before: &str,
        after: &str,
    ) -> sqlx::Result<bool> {
        lease::set_waiters(connection, name, before, after).await
    }

    async fn remove_waiter(connection: &mut PgConnection, name: &str, secret: &Secret) -> sqlx::Result<()> {
        lease::remove_waiter(connection, name, secret).await
    }

    async fn lock_row(
        connection: &mut PgConnection,
        claim: &RowClaim,
        slice: Duration,
    ) -> sqlx::Result<RowAttempt> {
        transaction::lock_row(connection, claim, slice).await
    }

    async fn commit_locked(
        connection: &mut PgConnection,
        name: &str,
        fencing_token: i64,
    ) -> sqlx::Result<Guarded> {
        transaction::commit_locked(connection, name, fencing_token).await
    }

    async fn commit_guarded(
        connection: &mut PgConnection,
        lease: &LeaseKey,
        release: bool,
    ) -> sqlx::Result<Guarded> {
        transaction::guard(connection, lease, release).await
    }

    async fn guard(connection: &mut PgConnection, lease: &LeaseKey, release: bool) -> sqlx::Result<Guarded> {
        transaction::guard(connection, lease, release).await
    }

    async fn doom(connection: &mut PgConnection) {
        transaction::doom(connection).await;
    }

    fn classify(error: &sqlx::Error) -> Fault {
        if crate::error::is_connection_failure(error) {
            return Fault::Disconnected;
        }
        let Some(error) =
            error.as_database_error().and_then(|error| error.try_downcast_ref::<PgDatabaseError>())
        else {
            return Fault::Other;
        };
        match error.code() {
            // lock_not_available: NOWAIT or lock_timeout
            "55P03" => Fault::Busy,
            // in_failed_sql_transaction, no_active_sql_transaction
            "25P02" | "25P01" => Fault::TransactionEnded,
            "40P01" => Fault::Deadlock,
            "40001" => Fault::Serialization,
            "42P01" => Fault::TableMissing,
            "42703" => Fault::TableDiffers,
            // read_only_sql_transaction: the server is no primary any more; a new connection may find the one that is.
            "25006" => Fault::Disconnected,
            code if code.starts_with("08") => Fault::Disconnected,
            // Whatever the code, the server has closed the connection: shutdown, idle for too long, too many of them.
            _ if matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic) => Fault::Disconnected,
            _ => Fault::Other,
        }
    }
}
