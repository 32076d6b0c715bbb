//! Private connections: how they are set up, and how an earlier session of them is ended.

use std::future::Future;

use super::Result;

/// Private connections: how they are set up, and how an earlier session of them is ended.
pub trait SessionDriver: sqlx::Database + Sized {
    /// Whether a network can drop a connection silently.
    const IS_REMOTE: bool = true;

    /// Derives the options of a private connection from those of the application's pool. A private
    /// connection always caches prepared statements.
    fn private_options(
        options: &<Self::Connection as sqlx::Connection>::Options,
    ) -> <Self::Connection as sqlx::Connection>::Options;

    /// Whether a connection with these options caches prepared statements. If not, sqlx leaves
    /// every named statement open on the server.
    #[must_use]
    fn keeps_statements(_options: &<Self::Connection as sqlx::Connection>::Options) -> bool {
        true
    }

    /// Sets up a private connection once, before its first use, and gives its session a number by
    /// which [`end_session`](Self::end_session) finds it. Behind a pooler that shares its sessions
    /// among clients, the session gets no number.
    fn prepare(connection: &mut Self::Connection, session: i64) -> impl Future<Output = Result<()>> + Send;

    /// Ends the session with this number, whatever it is doing. `true`: no session has that number
    /// (any more).
    fn end_session(
        _connection: &mut Self::Connection,
        _session: i64,
    ) -> impl Future<Output = Result<bool>> + Send {
        async { Ok(true) }
    }

    /// Whether the session with this number is known to be idle or gone. `own` is the number of the
    /// session that asks.
    fn is_idle(
        _connection: &mut Self::Connection,
        _session: i64,
        _own: i64,
    ) -> impl Future<Output = Result<bool>> + Send {
        async { Ok(false) }
    }

    /// Whether the server of this connection has the session with this number. It has then been
    /// there without interruption. Returns a number by which the server knows this connection's own
    /// session.
    fn has_session(
        _connection: &mut Self::Connection,
        _session: i64,
    ) -> impl Future<Output = Result<Option<i64>>> + Send {
        async { Ok(None) }
    }

    /// The statement that begins a transaction on a private connection. The server ends such a
    /// transaction soon if it hears nothing more from this process.
    const BEGIN_SHORT: &'static str;
}
