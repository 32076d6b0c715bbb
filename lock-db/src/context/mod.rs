//! State that the requests and guards of one `Locks` share. It is a layer below both, so that
//! neither depends on the other.

mod hold_counts;
mod row_ids;
mod row_waiters;

use std::sync::Arc;

use sqlx::Pool;

pub(crate) use self::hold_counts::{Counted, HoldCounts};
pub(crate) use self::row_ids::{RowId, RowIds};
pub(crate) use self::row_waiters::RowWaiters;
use crate::Error;
use crate::database::{Location, LockDatabase, PruneScope};
use crate::name::{self, Name};
use crate::options::{Settings, check_prune_after};
use crate::reentrancy::{Instance, ReentryKey};
use crate::session::{self, HoldWatch, Pruning, Session};

/// The state of one `Locks` and its clones.
pub(crate) struct Context<DB: LockDatabase> {
    pool: Pool<DB>,
    session: Session,
    location: Arc<Location>,
    owner: Arc<str>,
    settings: Settings,
    row_ids: RowIds,
    hold_counts: Arc<HoldCounts>,
    row_waiters: RowWaiters,
    instance: Instance,
    /// Kept as long as this context lives.
    #[cfg(feature = "testing")]
    _kept: Option<Kept>,
}

#[cfg(feature = "testing")]
pub(crate) type Kept = Arc<dyn std::any::Any + Send + Sync>;

impl<DB: LockDatabase> std::fmt::Debug for Context<DB> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Context")
            .field("database", &DB::NAME)
            .field("owner", &self.owner)
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}

impl<DB: LockDatabase> Context<DB> {
    /// Private connections are made like those of the pool `private`.
    pub(crate) fn new(
        pool: Pool<DB>,
        private: Pool<DB>,
        settings: Settings,
        #[cfg(feature = "testing")] kept: Option<Kept>,
    ) -> Arc<Self> {
        let keeps_statements = DB::keeps_statements(&pool.connect_options());
        let location = Arc::new(Location::new(settings.schema.clone(), keeps_statements));
        let owner = owner(&settings.label);
        let row_waiters = RowWaiters::new(pool.options().get_max_connections());
        let watched =
            HoldWatch { warn_after: settings.warn_after, row_locks: Arc::clone(&row_waiters.queue) };
        let session = Session::new(
            private,
            Arc::clone(&location),
            settings.hand_off,
            Arc::clone(&owner),
            watched,
            pruning(&settings),
        );
        Arc::new(Self {
            pool,
            session,
            location,
            owner,
            settings,
            row_ids: RowIds::default(),
            hold_counts: Arc::default(),
            row_waiters,
            instance: Instance::new(),
            #[cfg(feature = "testing")]
            _kept: kept,
        })
    }

    pub(crate) fn pool(&self) -> &Pool<DB> {
        &self.pool
    }

    pub(crate) fn session(&self) -> &Session {
        &self.session
    }

    pub(crate) fn location(&self) -> &Location {
        &self.location
    }

    /// Host, process id and label, as other processes see them.
    pub(crate) fn owner(&self) -> &Arc<str> {
        &self.owner
    }

    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(crate) fn row_ids(&self) -> &RowIds {
        &self.row_ids
    }

    pub(crate) fn hold_counts(&self) -> &Arc<HoldCounts> {
        &self.hold_counts
    }

    pub(crate) fn row_waiters(&self) -> &RowWaiters {
        &self.row_waiters
    }

    #[cfg(feature = "testing")]
    pub(crate) fn instance(&self) -> Instance {
        self.instance
    }

    /// Checks a name, and adds the prefix as in the table.
    pub(crate) fn checked_name(&self, name: &str) -> Result<Name, Error> {
        name::check(&self.settings.name_prefix, name)
    }

    /// The key by which nested calls on the same `Locks` find each other.
    pub(crate) fn reentry_key(&self, name: &str) -> Result<ReentryKey, Error> {
        Ok(ReentryKey { locks: self.instance, name: self.checked_name(name)? })
    }
}

/// What the session prunes by itself. Invalid settings are refused elsewhere.
fn pruning(settings: &Settings) -> Option<Pruning> {
    check_prune_after(settings.prune_after).ok()?;
    let lease = name::check(&settings.name_prefix, session::BY_ITSELF).ok()?;
    let (prefix, older_than) = (settings.name_prefix.as_str().into(), settings.prune_after?);
    Some(Pruning { lease, scope: PruneScope { prefix, older_than } })
}

/// Host, process id and label, within the 255 characters of the column.
fn owner(label: &str) -> Arc<str> {
    const LONGEST: usize = 255;
    let host = hostname::get().unwrap_or_default();
    let mut owner = format!("{}/{}", host.to_string_lossy(), std::process::id());
    if !label.is_empty() {
        owner.push('/');
        owner.push_str(label);
    }
    // PostgreSQL can't store NUL.
    owner.chars().filter(|character| *character != '\0').take(LONGEST).collect::<String>().into()
}

#[cfg(test)]
mod tests {
    use super::owner;

    #[test]
    fn an_owner_fits_its_column() {
        assert!(owner("billing").ends_with(&format!("/{}/billing", std::process::id())));
        assert_eq!(owner(&"ü".repeat(300)).chars().count(), 255);
        assert!(!owner("a\0b").contains('\0'));
    }
}
