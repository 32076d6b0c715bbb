//! How a waiter learns that a lock is free: by a notification, or by a user lock of the server.

use std::future::Future;

use super::Result;
use crate::database::{Notification, Server};

/// How a waiter learns that a lock is free: by a notification, or by a user lock of the server.
pub trait WakeUpDriver: sqlx::Database + Sized {
    /// A private connection on which the server delivers notifications.
    type Listening: Send;

    /// Whether this database has notifications.
    const NOTIFIES: bool = false;

    /// Whether the server has user locks, on databases without notifications. The holder of a row's
    /// lock normally holds the row's user lock too, and the next waiter waits on the server for
    /// that.
    const USER_LOCKS: bool = false;

    /// Waits for the user lock of a row, for one second at most. Waiters get it in the order of
    /// their arrival.
    fn take_user_lock(
        _connection: &mut Self::Connection,
        _server: &Server,
        _row: i64,
    ) -> impl Future<Output = Result<bool>> + Send {
        async { Ok(false) }
    }

    /// Releases the user lock, which the next waiter then gets.
    fn release_user_lock(
        _connection: &mut Self::Connection,
        _server: &Server,
        _row: i64,
    ) -> impl Future<Output = Result<()>> + Send {
        async { Ok(()) }
    }

    /// Opens a connection for notifications, with the options of the pool.
    fn connect_listening(pool: &sqlx::Pool<Self>) -> impl Future<Output = Result<Self::Listening>> + Send;

    /// Subscribes to the notifications for this listener. `false`: a pooler shares the connection,
    /// and other clients would receive the notifications.
    fn listen(listening: &mut Self::Listening, listener: u32) -> impl Future<Output = Result<bool>> + Send;

    /// The same connection, for other statements.
    fn listening_connection(
        listening: &mut Self::Listening,
    ) -> impl Future<Output = Result<&mut Self::Connection>> + Send;

    /// Waits for a notification and returns the id of the row whose lock is free. Cancel safe.
    fn notified(listening: &mut Self::Listening) -> impl Future<Output = Result<i64>> + Send;

    /// Notifies processes that wait for rows which are free now. This runs separately, after the
    /// statement that freed the rows. It only shortens a waiter's pause; nothing else depends on
    /// it.
    fn notify(
        _connection: &mut Self::Connection,
        _calls: &[Notification],
    ) -> impl Future<Output = Result<()>> + Send {
        async { Ok(()) }
    }
}
