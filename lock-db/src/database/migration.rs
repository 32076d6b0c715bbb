//! Applies the migrations that a database lacks.

use std::future::Future;

use super::driver;

/// The steps that differ. The value has the connection, and keeps other processes from migrating
/// the same schema.
pub(super) trait Migration: Send {
    /// Version and SQL of all migrations, in their order.
    const ALL: &'static [(i64, &'static str)];

    fn has_table(&mut self, table: &str) -> impl Future<Output = driver::Result<bool>> + Send;

    /// Creates the ledger of the applied migrations, [`LEDGER`].
    fn create_ledger(&mut self) -> impl Future<Output = driver::Result<()>> + Send;

    /// The versions in the ledger.
    fn applied(&mut self) -> impl Future<Output = driver::Result<Vec<i64>>> + Send;

    fn apply(&mut self, sql: &'static str) -> impl Future<Output = driver::Result<()>> + Send;

    /// Adds a version to the ledger, unless it is there.
    fn note_applied(&mut self, version: i64) -> impl Future<Output = driver::Result<()>> + Send;
}

pub(super) const LEDGER: &str = "_lock_db_migrations";

/// If everything is applied this only reads, so a role without the privilege to create anything may
/// call it.
pub(super) async fn apply_missing<M: Migration>(migration: &mut M) -> driver::Result<()> {
    let applied = if migration.has_table(LEDGER).await? {
        migration.applied().await?
    } else {
        migration.create_ledger().await?;
        Vec::new()
    };
    // The table may have been dropped without the ledger.
    let is_gone = !migration.has_table("distributed_lock").await?;
    for &(version, sql) in M::ALL {
        if is_gone || !applied.contains(&version) {
            migration.apply(sql).await?;
            migration.note_applied(version).await?;
        }
    }
    Ok(())
}

/// The newest applied migration, if it is not one of `known`.
pub(super) fn if_newer(newest: Option<i64>, known: &[(i64, &str)]) -> Option<i64> {
    newest.filter(|newest| known.iter().all(|(version, _)| version < newest))
}
