//! Notifications: LISTEN on a private connection, on which other statements run as well, and NOTIFY.
//!
//! Where a notification never comes, nothing is lost: it only shortens pauses.

use sqlx::postgres::{PgConnection, PgListener};
use sqlx::{Acquire, Pool, Postgres};

use crate::database::Call;

/// By itself and after the release, so that nothing that NOTIFY meets can hold up or undo the release: a full queue, or the lock that
/// all notifying transactions of the server share. It waits for neither the disk, which it would do with that lock in its
/// hand, nor long for the lock.
const CALL: &str = "
SELECT set_config('synchronous_commit', 'off', true), set_config('lock_timeout', '200ms', true),
    (SELECT count(pg_notify('lock_db_' || listener, id::text))
        FROM unnest((SELECT $1::text[]), (SELECT $2::bigint[])) AS called (listener, id))";

/// A prepared statement sees itself under the name that sqlx gave it, unless a pooler that shares its connections among clients
/// gave it another one. A statement without a name is not listed: then nothing is known.
const IS_DIRECT: &str = "
SELECT COALESCE(bool_or(name LIKE 'sqlx\\_s\\_%'), false) FROM pg_prepared_statements
WHERE statement LIKE '%lock\\_db probe%' /* lock_db probe */";

/// The channel of a session.
fn channel(listener: u32) -> String {
    format!("lock_db_{listener:08x}")
}

/// A connection that can listen, the only one of `pool`. Dropped, it goes back into it, which may take as long as a dead network takes
/// to be noticed.
pub(super) async fn connect(pool: &Pool<Postgres>) -> sqlx::Result<PgListener> {
    let mut listening = PgListener::connect_with(pool).await?;
    listening.ignore_pool_close_event(true);
    listening.eager_reconnect(false);
    Ok(listening)
}

/// Hears what is sent to this listener from now on. Not through a pooler that may give the connection to another client for its next
/// transaction: that one would be sent our notifications, and most clients fail then.
pub(super) async fn listen(listening: &mut PgListener, listener: u32) -> sqlx::Result<bool> {
    let is_direct = is_direct(connection(listening).await?).await?;
    if is_direct {
        listening.listen(&channel(listener)).await?;
    }
    Ok(is_direct)
}

/// Whether the connection leads to a session of its own, as far as that can be told.
async fn is_direct(connection: &mut PgConnection) -> sqlx::Result<bool> {
    sqlx::query_scalar(IS_DIRECT).fetch_one(connection).await
}

pub(super) async fn call(connection: &mut PgConnection, calls: &[Call]) -> sqlx::Result<()> {
    let listeners: Vec<String> = calls.iter().map(|call| format!("{:08x}", call.listener)).collect();
    let ids: Vec<i64> = calls.iter().map(|call| call.id).collect();
    sqlx::query(CALL).bind(listeners).bind(ids).execute(connection).await.map(drop)
}

pub(super) async fn connection(listening: &mut PgListener) -> sqlx::Result<&mut PgConnection> {
    listening.acquire().await
}

/// Waits for a call, and answers the id of the row that is free. Cancel safe, as `PgListener::try_recv` is.
pub(super) async fn called(listening: &mut PgListener) -> sqlx::Result<i64> {
    loop {
        let Some(notification) = listening.try_recv().await? else {
            return Err(sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into()));
        };
        if let Ok(id) = notification.payload().parse() {
            return Ok(id);
        }
    }
}
