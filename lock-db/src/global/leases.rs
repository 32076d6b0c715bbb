//! Several leases of a database that is known only at run time.

use super::AnyLease;
use crate::database::LockDatabase;
use crate::dropped_at_once::Watched;
use crate::lease::{begin_under, handles};
use crate::session::LeaseHandle;
use crate::{Error, GuardedTransaction, Leases, Loss};

/// Several insert locks that were taken together, from
/// [`AnyInsertLocks`](crate::AnyInsertLocks), as [`Leases`]. Each is an [`AnyLease`] of its own.
/// Dropping this releases all of them.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let of_test = lock_db::testing::locks().await?;
/// # let locks = lock_db::AnyLocks::from((*of_test).clone());
/// let leases = locks.insert_locks(["b", "a"]).acquire().await?;
/// let names: Vec<_> = leases.iter().map(|lease| lease.name()).collect();
/// assert_eq!(names, ["a", "b"]);
/// leases.release().await?;
/// # Ok(())
/// # }
/// ```
#[must_use = "bind them to a name (`let _leases = …`); `let _ = …` releases them at once"]
#[clippy::has_significant_drop]
#[derive(Debug)]
pub struct AnyLeases {
    leases: Watched<Vec<AnyLease>>,
}

impl AnyLeases {
    /// The leases, in the byte order of their names.
    pub fn iter(&self) -> std::slice::Iter<'_, AnyLease> {
        self.leases.iter()
    }

    /// The lease of a name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&AnyLease> {
        self.leases.iter().find(|lease| lease.name() == name)
    }

    /// Whether all of them are held.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.leases.iter().all(AnyLease::is_held)
    }

    /// Resolves when one of them is lost.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time: a loss is final.
    pub async fn lost(&self) {
        handles::lost(self.handles()).await;
    }

    /// How a lease was lost: the first in the order of the names that is lost. `None` while all are
    /// held.
    #[must_use]
    pub fn loss(&self) -> Option<Loss> {
        self.leases.iter().find_map(AnyLease::loss)
    }

    /// Runs `work` under all of the leases. When one of them is lost first, `work` is dropped at
    /// its next `.await`.
    ///
    /// # Errors
    ///
    /// [`Error::Lost`] when a lease is lost before `work` has ended, or was lost while `work`
    /// blocked its thread.
    ///
    /// # Cancel safety
    ///
    /// `work` is dropped with the future. The leases are not released by that.
    pub async fn run_until_lost<F: Future>(&self, work: F) -> Result<F::Output, Error> {
        handles::run_until_lost(|| self.handles(), work).await
    }

    /// Begins a transaction that commits only while all of these leases are held, as
    /// [`Leases::begin`].
    ///
    /// # Errors
    ///
    /// As [`Leases::begin`]. [`Error::NotInstalled`] when the leases are of another database.
    ///
    /// # Cancel safety
    ///
    /// The future may be dropped at any time. A transaction that was begun in the meantime is
    /// rolled back.
    pub async fn begin<DB: LockDatabase>(&self) -> Result<GuardedTransaction<DB>, Error> {
        let leases = self.leases.iter().map(AnyLease::of::<DB>);
        begin_under(&leases.collect::<Result<Vec<_>, Error>>()?).await
    }

    /// Checks, in a transaction of the caller, that all of the leases are held, and keeps other
    /// requests from taking the locks until the transaction ends. As [`Leases::verify_in`]. `DB` is
    /// the database of the transaction.
    ///
    /// # Errors
    ///
    /// As [`Leases::verify_in`]. [`Error::NotInstalled`] when the leases are of another database.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, roll the transaction back: it is unknown whether the leases were
    /// held.
    pub async fn verify_in<DB: LockDatabase>(&self, transaction: &mut DB::Connection) -> Result<(), Error> {
        for lease in self.leases.iter() {
            lease.verify_in::<DB>(transaction).await?;
        }
        Ok(())
    }

    /// Releases all of the locks together with the commit of the caller's transaction, as
    /// [`Leases::release_in`]. `DB` is the database of the transaction.
    ///
    /// # Errors
    ///
    /// As [`Leases::release_in`]. [`Error::NotInstalled`] when the leases are of another database.
    ///
    /// # Cancel safety
    ///
    /// When the future is dropped, roll the transaction back.
    pub async fn release_in<DB: LockDatabase>(&self, transaction: &mut DB::Connection) -> Result<(), Error> {
        for lease in self.leases.iter() {
            lease.release_in::<DB>(transaction).await?;
        }
        Ok(())
    }

    /// Releases all of the locks, and waits until the database has confirmed it, as
    /// [`Leases::release`].
    ///
    /// # Errors
    ///
    /// As [`Leases::release`].
    ///
    /// # Cancel safety
    ///
    /// The releases continue when the future is dropped. Only their result is lost.
    pub async fn release(self) -> Result<(), Error> {
        handles::release(self.leases.into_inner().into_iter().map(AnyLease::into_handle)).await
    }

    fn handles(&self) -> impl Iterator<Item = &LeaseHandle> {
        self.leases.iter().map(AnyLease::handle)
    }
}

impl<DB: LockDatabase> From<Leases<DB>> for AnyLeases {
    fn from(leases: Leases<DB>) -> Self {
        let leases: Vec<_> = leases.into_iter().map(AnyLease::from).collect();
        Self { leases: Watched::new(leases, |leases| leases.first().map_or("", AnyLease::name).into()) }
    }
}

/// Turns this into its leases. Each is released when it is dropped.
impl IntoIterator for AnyLeases {
    type Item = AnyLease;
    type IntoIter = std::vec::IntoIter<AnyLease>;

    fn into_iter(self) -> Self::IntoIter {
        self.leases.into_inner().into_iter()
    }
}

impl<'a> IntoIterator for &'a AnyLeases {
    type Item = &'a AnyLease;
    type IntoIter = std::slice::Iter<'a, AnyLease>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}
