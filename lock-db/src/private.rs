//! What the code that `#[distributed_lock]` writes calls. Not part of the public interface: it changes together with
//! the macro, which is released in the same version.

#[path = "private/ask.rs"]
mod ask;
#[path = "private/held.rs"]
mod held;
#[path = "private/name.rs"]
mod name;
#[path = "private/output.rs"]
mod output;

use std::sync::Arc;

use sqlx::Transaction;
use sqlx::pool::PoolConnection;

pub use self::ask::{Ask, Asked, Policy, Skips, Waits, ask};
pub(crate) use self::held::LeaseHandle;
pub use self::held::{HeldIn, HeldLease, HeldRow, HeldRowGuard};
pub use self::name::{NamesLock, name};
pub use self::output::{LockedOutput, SkippableOutput};
use crate::ambient::{self, AmbientLease, AnyLocks};
use crate::database::LockDatabase;
use crate::{Error, Lease, Locks};

/// Where an annotated function finds its locks when it names none: in its task, else in its process.
#[derive(Clone)]
pub struct Source(Option<Arc<dyn AnyLocks>>);

impl Source {
    fn locks(&self, name: &str) -> Result<&dyn AnyLocks, Error> {
        self.0.as_deref().ok_or_else(|| ambient::not_installed(name, "no `Locks` is installed".into()))
    }
}

/// The `Locks` of the task, else of the process. That there is none is said when it is used.
#[must_use]
pub fn ambient() -> Source {
    Source(ambient::current())
}

/// A `Locks` that was named: `locks = …`.
#[must_use]
pub fn explicit<DB: LockDatabase>(locks: &Locks<DB>) -> Locks<DB> {
    locks.clone()
}

/// What `locks = …` and its absence have in common.
pub trait TakesLocks {
    /// What the body sees of an insert lock.
    type Lease;

    fn lease(&self, asked: Asked<'_>) -> impl Future<Output = Result<HeldLease<Self::Lease>, Error>> + Send;

    fn row(&self, asked: Asked<'_>) -> impl Future<Output = Result<HeldRow, Error>> + Send;
}

impl TakesLocks for Source {
    type Lease = AmbientLease;

    async fn lease(&self, asked: Asked<'_>) -> Result<HeldLease<AmbientLease>, Error> {
        let (lease, inside) = self.locks(asked.name)?.any_lease(asked).await?;
        Ok(HeldLease { taken: Some((lease, inside)) })
    }

    async fn row(&self, asked: Asked<'_>) -> Result<HeldRow, Error> {
        let call = self.locks(asked.name)?.any_row(asked).await?;
        Ok(HeldRow { taken: Some(call) })
    }
}

impl<DB: LockDatabase> TakesLocks for Locks<DB> {
    type Lease = Lease<DB>;

    // Boxed, as the other one is: the future is part of the annotated function's own.
    async fn lease(&self, asked: Asked<'_>) -> Result<HeldLease<Lease<DB>>, Error> {
        let (lease, inside) = Box::pin(self.annotated_lease(asked)).await?;
        Ok(HeldLease { taken: Some((lease, inside)) })
    }

    async fn row(&self, asked: Asked<'_>) -> Result<HeldRow, Error> {
        let call = self.any_row(asked).await?;
        Ok(HeldRow { taken: Some(call) })
    }
}

/// Takes an insert lock, or enters it again.
pub async fn insert<S: TakesLocks, P: Policy>(
    source: S,
    ask: Ask<'_, P>,
) -> Result<P::Taken<HeldLease<S::Lease>>, Error> {
    #[cfg(feature = "testing")]
    if ask.asked.is_switched_off()? {
        return ask.settle(Ok(HeldLease { taken: None }));
    }
    ask.settle(source.lease(ask.asked).await)
}

/// Takes a row lock in a transaction of its own, or enters it again.
pub async fn row<P: Policy>(source: impl TakesLocks, ask: Ask<'_, P>) -> Result<P::Taken<HeldRow>, Error> {
    #[cfg(feature = "testing")]
    if ask.asked.is_switched_off()? {
        return ask.settle(Ok(HeldRow { taken: None }));
    }
    ask.settle(source.row(ask.asked).await)
}

/// Takes a row lock as [`row`], and hands its guard to the body.
pub async fn row_guard<DB: LockDatabase, P: Policy>(
    locks: Locks<DB>,
    ask: Ask<'_, P>,
) -> Result<P::Taken<HeldRowGuard<DB>>, Error> {
    #[cfg(feature = "testing")]
    ask.asked.is_switched_off()?;
    let held = locks.row(ask.asked).await.and_then(|held| HeldRowGuard::bind(held, ask.asked.name));
    ask.settle(held)
}

/// Takes a row lock in the caller's transaction. Within one transaction the database itself is re-entrant, so frames have no
/// part in it.
pub async fn row_in<T: InTransaction, P: Policy>(
    source: impl SourceFor<T::Database>,
    ask: Ask<'_, P>,
    transaction: &mut T,
) -> Result<P::Taken<HeldIn>, Error> {
    #[cfg(feature = "testing")]
    if ask.asked.is_switched_off()? {
        return ask.settle(Ok(HeldIn { held: None }));
    }
    let Asked { name, .. } = ask.asked;
    let locks = source.find(name)?;
    let lock = locks.row_lock(name);
    let connection = transaction.connection();
    let held = match ask.asked.patience(locks.default_wait())? {
        // A caller that waits gets it or an error.
        Some(wait) => lock.take_in(connection, Some(wait)).await.and_then(|held| held.ok_or(Error::Closed)),
        None => lock
            .take_in(connection, None)
            .await
            .and_then(|held| held.ok_or_else(|| ask.asked.taken_elsewhere())),
    };
    ask.settle(held.map(|held| HeldIn { held: Some(held) }))
}

/// Locks of the database that a transaction is in.
pub trait SourceFor<DB: LockDatabase> {
    fn find(&self, name: &str) -> Result<Locks<DB>, Error>;
}

impl<DB: LockDatabase> SourceFor<DB> for Locks<DB> {
    fn find(&self, _name: &str) -> Result<Locks<DB>, Error> {
        Ok(self.clone())
    }
}

impl<DB: LockDatabase> SourceFor<DB> for Source {
    fn find(&self, name: &str) -> Result<Locks<DB>, Error> {
        let locks = self.locks(name)?;
        locks.as_any().downcast_ref::<Locks<DB>>().cloned().ok_or_else(|| {
            let (installed, wanted) = (locks.database(), DB::NAME);
            let reason = format!("the transaction is of {wanted}, the ambient `Locks` of {installed}");
            ambient::not_installed(name, reason)
        })
    }
}

/// What `tx = …` may be.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no transaction that a row lock can be taken in",
    label = "expected a `sqlx::Transaction` or a connection of PostgreSQL, MySQL or SQLite",
    note = "the cargo feature of the database has to be on in lock-db, too: `postgres`, `mysql` or `sqlite`"
)]
pub trait InTransaction {
    type Database: LockDatabase;

    fn connection(&mut self) -> &mut <Self::Database as sqlx::Database>::Connection;
}

impl<DB: LockDatabase> InTransaction for Transaction<'_, DB> {
    type Database = DB;

    fn connection(&mut self) -> &mut DB::Connection {
        self
    }
}

impl<DB: LockDatabase> InTransaction for PoolConnection<DB> {
    type Database = DB;

    fn connection(&mut self) -> &mut DB::Connection {
        self
    }
}

macro_rules! connections {
    ($($feature:literal $database:ty, $connection:ty;)*) => {$(
        #[cfg(feature = $feature)]
        impl InTransaction for $connection {
            type Database = $database;

            fn connection(&mut self) -> &mut Self {
                self
            }
        }
    )*};
}

connections! {
    "postgres" sqlx::Postgres, sqlx::PgConnection;
    "mysql" sqlx::MySql, sqlx::MySqlConnection;
    "sqlite" sqlx::Sqlite, sqlx::SqliteConnection;
}
