//! Transactions that are committed only while a lock is held.

use std::future::Future;
use std::time::Duration;

use super::Result;
use crate::database::{Guarded, LeaseKey, Server};

/// Transactions that are committed only while a lock is held.
pub trait TransactionDriver: sqlx::Database + Sized {
    /// The statement that begins a marked transaction. The mark ends with the transaction, so the
    /// `commit_…` methods can tell whether it is still open. If the transaction ends without its
    /// owner's knowledge, later statements are refused or rolled back, as far as the database
    /// supports it.
    const BEGIN_MARKED: &'static str;

    /// Begins a marked transaction that a lease guards.
    const BEGIN_GUARDED: &'static str = Self::BEGIN_MARKED;

    /// Begins a marked transaction that locks a row first.
    const BEGIN_WITH_ROW: &'static str = Self::BEGIN_MARKED;

    /// Whether the `commit_…` methods commit themselves. If they do and their answer is lost, the
    /// outcome is unknown.
    const COMMITS_WITH_CHECK: bool = false;

    /// Makes sure that a transaction is open, so that the rollback of a handle whose own
    /// transaction has ended succeeds.
    fn reopen(_connection: &mut Self::Connection) -> impl Future<Output = ()> + Send {
        async {}
    }

    /// How long a guard waits for a row that another transaction has locked.
    const GUARD_LIMIT: Duration = Duration::from_secs(5);

    /// Checks, last before the COMMIT of a marked transaction, that it is still the transaction in
    /// which `lock_row` returned this token.
    fn commit_locked(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
        fencing_token: i64,
    ) -> impl Future<Output = Result<Guarded>> + Send;

    /// Does what `guard` does, last before the COMMIT of a marked transaction.
    fn commit_guarded(
        connection: &mut Self::Connection,
        lease: &LeaseKey,
        release: bool,
    ) -> impl Future<Output = Result<Guarded>> + Send;

    /// Undoes what the mark did to the connection, before a marked transaction is rolled back. A
    /// statement whose caller was dropped may still be running.
    fn unmark(_connection: &mut Self::Connection) -> impl Future<Output = Result<()>> + Send {
        async { Ok(()) }
    }

    /// Checks in a caller's transaction whether the lease is ours. If it is, holds off every
    /// takeover until the transaction ends. With `release` the lease becomes free with the commit.
    fn guard(
        connection: &mut Self::Connection,
        lease: &LeaseKey,
        release: bool,
    ) -> impl Future<Output = Result<Guarded>> + Send;

    /// [`guard`](Self::guard) without a release, in a marked transaction.
    fn guard_in_marked(
        connection: &mut Self::Connection,
        lease: &LeaseKey,
    ) -> impl Future<Output = Result<Guarded>> + Send {
        Self::guard(connection, lease, false)
    }

    /// Whether a transaction that has just begun sees the grant of this lease, and so everything
    /// that was committed before the grant. It does not on a node that lags behind the node that
    /// granted the lease.
    fn sees_grant(
        _connection: &mut Self::Connection,
        _lease: &LeaseKey,
    ) -> impl Future<Output = Result<bool>> + Send {
        async { Ok(true) }
    }

    /// Makes sure that the transaction can only be rolled back, as far as the database supports it.
    fn doom(connection: &mut Self::Connection) -> impl Future<Output = ()> + Send;
}
