//! The table: where it is, how it is made, whether it can keep locks; and what errors mean.

use std::borrow::Cow;
use std::future::Future;

use super::Result;
use crate::Finding;
use crate::database::{Fault, Found, OldSnapshots, Server};

/// The table: where it is, how it is made, whether it can keep locks; and what errors mean.
pub trait SchemaDriver: sqlx::Database + Sized {
    /// Directory of the migrations.
    const FOLDER: &'static str;

    /// Whether connections with these options can use a common database at all, and this schema in
    /// it.
    fn check_options(
        _options: &<Self::Connection as sqlx::Connection>::Options,
        _schema: Option<&str>,
    ) -> Result<(), crate::Error> {
        Ok(())
    }

    /// The database that these options lead to, whatever the host.
    fn database_name(options: &<Self::Connection as sqlx::Connection>::Options) -> String;

    /// Finds the table and the kind of its server. The table is looked up in this schema, or in the
    /// connection's default location if there is none.
    fn find_table(
        connection: &mut Self::Connection,
        schema: Option<&str>,
    ) -> impl Future<Output = Result<Found>> + Send;

    /// Finds the table on a connection of the application, if a private connection with the pool's
    /// options could find no other one. `None`: that can't be determined.
    fn find_only_table(
        _connection: &mut Self::Connection,
        _pool: &sqlx::Pool<Self>,
        _schema: Option<&str>,
    ) -> impl Future<Output = Result<Option<Server>>> + Send {
        async { Ok(None) }
    }

    /// Applies the missing migrations, one process at a time, in this schema or where the
    /// connection creates tables by default. Leaves no lock behind except on the connection itself,
    /// which the caller closes on failure.
    fn migrate(
        connection: &mut Self::Connection,
        schema: Option<&str>,
    ) -> impl Future<Output = Result<()>> + Send;

    /// Does what locks do to the table, without effect, so that a missing privilege shows. Returns
    /// warnings about what works but could be better.
    fn check(
        connection: &mut Self::Connection,
        server: &Server,
    ) -> impl Future<Output = Result<Vec<Finding>>> + Send;

    /// Whether this error says that a privilege is missing without naming it. `check` names it.
    #[must_use]
    fn lacks_right(_error: &sqlx::Error) -> bool {
        false
    }

    /// Describes which snapshots, transactions or readers keep so many old row versions that
    /// contended locks get slow, and what this account can't see of them. Uses only the server's
    /// statistics.
    fn old_snapshots(
        connection: &mut Self::Connection,
        server: &Server,
    ) -> impl Future<Output = Result<OldSnapshots>> + Send;

    /// Classifies an error of this database.
    fn classify(error: &sqlx::Error) -> Fault;

    /// What this error says about the server or the table, where its fault alone would not tell.
    fn meaning(_error: &sqlx::Error) -> Option<&'static str> {
        None
    }

    /// The code by which the server's documentation lists this error.
    fn code(error: &sqlx::Error) -> Option<Cow<'_, str>>;
}
