//! Notifications: LISTEN on a private connection, which also runs other statements, and NOTIFY.
//!
//! Notifications only shorten pauses: if none arrives, nothing is lost.

use sqlx::postgres::{PgConnection, PgListener};
use sqlx::{Acquire, Pool, Postgres};

use crate::database::Notification;
use crate::database::StepError;
use crate::database::driver;

/// Runs separately, after the release, so that no obstacle of NOTIFY can delay or undo the release.
/// Such an obstacle is a full queue, or the lock that all notifying transactions of the server
/// share. This statement does not wait for the disk, because it would hold that lock meanwhile, and
/// waits only briefly for the lock.
const CALL: &str = "
SELECT set_config('synchronous_commit', 'off', true), set_config('lock_timeout', '200ms', true),
    (SELECT count(pg_notify('lock_db_' || listener, id::text))
        FROM unnest((SELECT $1::text[]), (SELECT $2::bigint[])) AS notified (listener, id))";

/// A prepared statement sees itself under the name that sqlx gave it, unless a pooler that shares
/// its connections among clients has renamed it. An unnamed statement is not listed; then the
/// answer is unknown and counts as false.
const IS_DIRECT: &str = "
SELECT COALESCE(bool_or(name LIKE 'sqlx\\_s\\_%'), false) FROM pg_prepared_statements
WHERE statement LIKE '%lock\\_db probe%' /* lock_db probe */";

/// The channel of a session.
fn channel(listener: u32) -> String {
    format!("lock_db_{listener:08x}")
}

/// Takes the only connection of `pool` for listening. On drop it returns to the pool, which may
/// take as long as it takes to notice a dead network.
pub(super) async fn connect(pool: &Pool<Postgres>) -> driver::Result<PgListener> {
    let mut listening = PgListener::connect_with(pool).await?;
    listening.ignore_pool_close_event(true);
    listening.eager_reconnect(false);
    Ok(listening)
}

/// Subscribes to the notifications for this listener. Does not subscribe through a pooler that may
/// give the connection to another client for its next transaction. That client would receive our
/// notifications, and most clients fail then.
pub(super) async fn listen(listening: &mut PgListener, listener: u32) -> driver::Result<bool> {
    let is_direct = is_direct(connection(listening).await?).await?;
    if is_direct {
        listening.listen(&channel(listener)).await?;
    }
    Ok(is_direct)
}

/// Whether the connection leads to a session of its own, as far as that can be determined.
async fn is_direct(connection: &mut PgConnection) -> driver::Result<bool> {
    Ok(sqlx::query_scalar(IS_DIRECT).fetch_one(connection).await?)
}

pub(super) async fn notify(
    connection: &mut PgConnection,
    notifications: &[Notification],
) -> driver::Result<()> {
    let listeners: Vec<String> = notifications.iter().map(|one| format!("{:08x}", one.listener)).collect();
    let ids: Vec<i64> = notifications.iter().map(|one| one.id).collect();
    sqlx::query(CALL).bind(listeners).bind(ids).execute(connection).await?;
    Ok(())
}

pub(super) async fn connection(listening: &mut PgListener) -> driver::Result<&mut PgConnection> {
    Ok(listening.acquire().await?)
}

/// Waits for a notification and returns the id of the row that is free. Cancel safe, like
/// `PgListener::try_recv`.
pub(super) async fn notified(listening: &mut PgListener) -> driver::Result<i64> {
    loop {
        let Some(notification) = listening.try_recv().await? else {
            return Err(StepError::disconnected("the connection for notifications broke"));
        };
        if let Ok(id) = notification.payload().parse() {
            return Ok(id);
        }
    }
}
