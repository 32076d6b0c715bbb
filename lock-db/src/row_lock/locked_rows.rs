//! Locked rows, with the transaction that holds them.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use crate::Error;
use crate::context::{Context, Counted};
use crate::database::{Failure, LockDatabase};
use crate::error::Action;
use crate::keyed_queue::RowPermit;
use crate::managed_tx::{Condition, ManagedTransaction};
use crate::name::Name;
#[cfg(feature = "testing")]
use crate::test_support;

/// The local permits of all names. They are kept until the transaction has ended, so that the next
/// caller of this process comes when the lock is free.
pub(super) type Permits = Arc<Vec<RowPermit>>;

/// What the guards of one row lock and of several have in common. It derefs to the connection.
pub(super) struct LockedRows<DB: LockDatabase> {
    transaction: ManagedTransaction<DB, Permits>,
    condition: Condition,
    names: Vec<Name>,
    counted: Vec<Counted>,
    /// Present while the caller holds the guard, one for each name.
    #[cfg(feature = "testing")]
    shown: Vec<Arc<()>>,
}

impl<DB: LockDatabase> LockedRows<DB> {
    pub(super) fn new(
        transaction: ManagedTransaction<DB, Permits>,
        condition: Condition,
        names: Vec<Name>,
        counted: Vec<Counted>,
    ) -> Self {
        Self {
            transaction,
            condition,
            names,
            counted,
            #[cfg(feature = "testing")]
            shown: Vec::new(),
        }
    }

    /// The guard is about to be returned to the caller, whose test sees the locks from now on.
    #[cfg_attr(not(feature = "testing"), allow(unused_mut, unused_variables))]
    pub(super) fn into_hands_of_caller(mut self, context: &Context<DB>) -> Self {
        #[cfg(feature = "testing")]
        {
            self.shown = self.names.iter().map(|name| test_support::note_open_row(context, name)).collect();
        }
        self
    }

    /// The guard belongs to an annotated function, which shows the held lock itself.
    #[cfg(feature = "testing")]
    pub(super) fn hide(&mut self) {
        self.shown.clear();
    }

    /// The name of the lock, or the first of the names.
    pub(super) fn name(&self) -> &str {
        self.condition.name().shown()
    }

    pub(super) fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.names.iter().map(Name::shown)
    }

    pub(super) fn fencing_token(&self) -> i64 {
        self.condition.fencing_token()
    }

    pub(super) async fn commit(self) -> Result<(), Error> {
        let Self { transaction, condition, counted, .. } = self;
        transaction.commit(condition, |_ended| drop(counted)).await
    }

    pub(super) async fn roll_back(self) -> Result<(), Error> {
        let Self { transaction, condition, counted: _counted, .. } = self;
        transaction
            .roll_back()
            .await
            .map_err(|error| Failure::new::<DB>(error).into_error(Action::RollBack, Some(condition.name())))
    }
}

impl<DB: LockDatabase> Deref for LockedRows<DB> {
    type Target = DB::Connection;

    fn deref(&self) -> &Self::Target {
        &self.transaction
    }
}

impl<DB: LockDatabase> DerefMut for LockedRows<DB> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.transaction
    }
}
