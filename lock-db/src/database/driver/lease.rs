//! Leases: the rows of the table, and the statements that take, renew and release them.

use std::collections::HashSet;
use std::future::Future;
use std::time::Duration;

use super::Result;
use crate::Kind;
use crate::database::{
    BatchOutcome, Claim, Grant, LeaseKey, LeaseStatus, LockRow, Probe, ReleaseClaim, Released, Renewal,
    Renewed, Server,
};
use crate::name::Name;
use crate::secret::Secret;

/// Leases: the rows of the table, and the statements that take, renew and release them.
pub trait LeaseDriver: sqlx::Database + Sized {
    /// Reads the row without locking anything.
    fn read(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
    ) -> impl Future<Output = Result<Option<LockRow>>> + Send;

    /// Creates the row of a name, free. An existing row is not changed. `false`: an open
    /// transaction has created the row, and so holds the lock.
    fn create(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
        kind: Kind,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// Takes the lease if it is free, or if this claim already holds it. A fair claim takes a free
    /// lease only if no other process is first in the queue. An entry of this claim at the head of
    /// the queue is removed. `None`: the lease is not free, or there is no row.
    fn acquire(
        connection: &mut Self::Connection,
        server: &Server,
        claim: &Claim,
    ) -> impl Future<Output = Result<Option<Grant>>> + Send;

    /// [`read`](Self::read) for several names, in one statement. Returns one result per name, in
    /// order.
    fn read_all(
        connection: &mut Self::Connection,
        server: &Server,
        names: &[Name],
    ) -> impl Future<Output = Result<Vec<Option<LockRow>>>> + Send;

    /// [`create`](Self::create) for several names, which are sorted: all or none. `false`: an open
    /// transaction has created one of the rows.
    fn create_all(
        connection: &mut Self::Connection,
        server: &Server,
        names: &[Name],
        kind: Kind,
    ) -> impl Future<Output = Result<bool>> + Send;

    /// Reads the rows of several names, which are sorted, and creates those that are missing, free.
    /// Returns one result per name, in order. `None`: an open transaction has created the row.
    fn ensure_all(
        connection: &mut Self::Connection,
        server: &Server,
        names: &[Name],
        kind: Kind,
    ) -> impl Future<Output = Result<Vec<Option<LockRow>>>> + Send {
        async move {
            let rows = Self::read_all(connection, server, names).await?;
            let is_missing = |(_, row): &(&Name, &Option<LockRow>)| row.is_none();
            let missing: Vec<Name> =
                names.iter().zip(&rows).filter(is_missing).map(|(name, _)| name.clone()).collect();
            if missing.is_empty() {
                return Ok(rows);
            }
            Self::create_all(connection, server, &missing, kind).await?;
            Self::read_all(connection, server, names).await
        }
    }

    /// Takes several leases, none of which has a queue entry, if all of them can be
    /// [acquired](Self::acquire). Returns one result per claim, in order. Writes nothing if one of
    /// them is not free. Uses as few messages as the server allows.
    ///
    /// A row that a trigger keeps from being written is missing in the result, although the other
    /// leases were taken.
    fn acquire_all(
        connection: &mut Self::Connection,
        server: &Server,
        claims: &[Claim],
    ) -> impl Future<Output = Result<Vec<Option<Grant>>>> + Send;

    /// Gives notice to the holders of leases that have expired or nearly so: they will be taken
    /// over. See [`LockRow::notice_is_due`]. A deadline too far ahead, because the clock was set
    /// back, becomes one TTL from now instead. Each name occurs once. Returns one result per name,
    /// in order. `false`: no notice was due, or another transaction has locked the row.
    fn give_notice(
        connection: &mut Self::Connection,
        server: &Server,
        names: &[Name],
    ) -> impl Future<Output = Result<Vec<bool>>> + Send;

    /// Makes those rows [settled](LockRow::is_settled) that are free, unless another transaction
    /// has them locked, such as a guarded transaction of the last holder.
    fn settle(
        connection: &mut Self::Connection,
        server: &Server,
        names: &[Name],
    ) -> impl Future<Output = Result<()>> + Send;

    /// Records in the row that this process handed the lease directly to another of its holders:
    /// see [`LeaseKey::mark`]. Transactions with an older snapshot don't see the record. `false`:
    /// the lease is not ours, or another transaction has the row locked. Does nothing on databases
    /// where a transaction with an old snapshot can't write.
    fn mark(
        _connection: &mut Self::Connection,
        _lease: &LeaseKey,
    ) -> impl Future<Output = Result<bool>> + Send {
        async { Ok(true) }
    }

    /// Tests whether another transaction has the row of a name locked, by trying to lock it without
    /// waiting.
    fn probe(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
    ) -> impl Future<Output = Result<Probe>> + Send;

    /// Returns those names whose rows could be locked without waiting. This is a first check;
    /// [`probe`](Self::probe) gives the exact answer for one name.
    fn unlocked(
        connection: &mut Self::Connection,
        server: &Server,
        names: &[Name],
    ) -> impl Future<Output = Result<HashSet<String>>> + Send;

    /// Extends the deadlines of these leases, in one statement. Returns one result per lease, in
    /// order. Also returns when the leases that were not renewed were read, if that was later than
    /// the start of this call.
    fn renew(
        connection: &mut Self::Connection,
        server: &Server,
        leases: &[Renewal],
    ) -> impl Future<Output = Result<Renewed>> + Send;

    /// Frees the lease if it is still ours. `LeaseStatus::Ours` means that it was ours and is free
    /// now.
    fn release(
        connection: &mut Self::Connection,
        server: &Server,
        lease: &ReleaseClaim,
    ) -> impl Future<Output = Result<Released>> + Send;

    /// Gives the lease up, but keeps the lock from all others until `at_least` has passed since the
    /// grant. The row has no owner's secret from then on, so a renewal that is still in flight does
    /// not match it.
    fn release_later(
        connection: &mut Self::Connection,
        server: &Server,
        name: &str,
        secret: &Secret,
        at_least: Duration,
    ) -> impl Future<Output = Result<LeaseStatus>> + Send;

    /// Whether a grant can be committed without waiting for the disk, and made durable by
    /// [`flush`](Self::flush).
    const FLUSHES: bool = false;

    /// Performs the releases and claims of several callers in as few messages as the database
    /// allows, with the same results as separate calls. No name occurs twice. With `is_deferred`,
    /// which needs [`FLUSHES`](Self::FLUSHES), the grants may be lost if the server crashes before
    /// the next [`flush`](Self::flush).
    fn batch(
        connection: &mut Self::Connection,
        server: &Server,
        releases: &[ReleaseClaim],
        claims: &[Claim],
        is_deferred: bool,
    ) -> impl Future<Output = Result<BatchOutcome>> + Send;

    /// Makes everything durable that was committed on this server before, as durable as the
    /// server makes a commit. Returns a number of the session, as
    /// [`has_session`](crate::database::SessionDriver::has_session) does.
    fn flush(_connection: &mut Self::Connection) -> impl Future<Output = Result<i64>> + Send {
        async { Ok(0) }
    }
}
