//! Locks that an open transaction holds.

use std::future::Future;
use std::time::Duration;

use super::Result;
use crate::database::{LockRow, RowAttempt, RowClaim, Server};

/// Locks that an open transaction holds.
pub trait RowLockDriver: sqlx::Database + Sized {
    /// Whether the server looks for a deadlock only after a transaction has waited for a second or
    /// more.
    const SEARCHES_LATE: bool = false;

    /// Whether `lock_row` creates a missing row itself, in the caller's transaction. On InnoDB it
    /// must not: other transactions would wait for that row with locks that end in deadlocks.
    const ROW_IS_MADE_IN_TRANSACTION: bool;

    /// Whether a transaction that has locked a row sees everything that is committed and keeps all
    /// other transactions from committing. Such a transaction need not have a free row settled
    /// first, and once it has written, no other connection could settle the row.
    const SETTLES_IN_TRANSACTION: bool = false;

    /// Whether a transaction waits for a lease on a private connection before it touches the
    /// lease's row. False if each statement of the transaction sees what others have committed.
    /// Nothing that this sends fixes the transaction's snapshot.
    fn waits_outside(_transaction: &mut Self::Connection) -> impl Future<Output = Result<bool>> + Send {
        async { Ok(true) }
    }

    /// Whether the connection leads to the database that has this table, as far as that can be
    /// determined.
    fn is_here(
        _connection: &mut Self::Connection,
        _server: &Server,
    ) -> impl Future<Output = Result<bool>> + Send {
        async { Ok(true) }
    }

    /// Whether the transaction has used the table, and so keeps it from being altered. While an
    /// `ALTER` waits for this transaction, private connections can't reach the table, so the
    /// transaction must not wait for them. Always false on databases without such a conflict.
    fn has_used_table(_connection: &mut Self::Connection) -> impl Future<Output = Result<bool>> + Send {
        async { Ok(false) }
    }

    /// Finds the row of a name as such a transaction sees it. Used where a private connection
    /// otherwise has to read the row before `lock_row`.
    fn find_row(
        _connection: &mut Self::Connection,
        _server: &Server,
        _name: &str,
    ) -> impl Future<Output = Result<Option<LockRow>>> + Send {
        async { Ok(None) }
    }

    /// Locks and writes the row of a free lock in the connection's open transaction. Waits at most
    /// `slice`; zero means no wait. After `Stale`, a deadlock or a serialization failure the
    /// transaction can only be rolled back, whatever its owner sends. After every other result
    /// except a broken connection it is as usable as before.
    fn lock_row(
        connection: &mut Self::Connection,
        server: &Server,
        claim: &RowClaim,
        slice: Duration,
    ) -> impl Future<Output = Result<RowAttempt>> + Send;

    /// Whether the transaction already held the lock that it has just taken. `before` is the secret
    /// that was in the row. `None`: unknown; if the lock was not its own, other connections can see
    /// that secret.
    fn was_its_own(
        _connection: &mut Self::Connection,
        _before: &str,
    ) -> impl Future<Output = Result<Option<bool>>> + Send {
        async { Ok(None) }
    }
}
