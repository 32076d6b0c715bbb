//! Row locks in the caller's transaction: `tx = …`.

use std::ops::{Deref, DerefMut};

use super::{CallRequest, Source};
use crate::database::LockDatabase;
use crate::global::{self, BoxFuture};
use crate::in_transaction::HeldInTransaction;
use crate::{Error, Locks};

/// A value that leads to a connection. The compiler takes the first `connection` whose bounds the
/// type meets, starting here and following `Deref`. No trait could express this: a
/// [`sqlx::Transaction`] and the guards are not connections themselves, and a connection may be a
/// parameter (`&mut DB::Connection`) of which only that is known.
pub struct Connection<'a, T: ?Sized>(Guard<'a, T>);
pub struct Guard<'a, T: ?Sized>(Neither<'a, T>);
pub struct Neither<'a, T: ?Sized>(&'a mut T);

#[must_use]
pub fn transaction<T: ?Sized>(transaction: &mut T) -> Connection<'_, T> {
    Connection(Guard(Neither(transaction)))
}

/// A connection of a database that lock-db supports.
impl<C> Connection<'_, C>
where
    C: sqlx::Connection,
    C::Database: LockDatabase<Connection = C>,
{
    pub fn connection(&mut self) -> &mut C {
        self.0.0.0
    }
}

impl<'a, T: ?Sized> Deref for Connection<'a, T> {
    type Target = Guard<'a, T>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<T: ?Sized> DerefMut for Connection<'_, T> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

/// A type that derefs to a connection: a `Transaction`, a `RowGuard`, a `GuardedTransaction`, a
/// connection of a pool, or a `&mut` of a connection.
impl<T> Guard<'_, T>
where
    T: DerefMut + ?Sized,
    T::Target: sqlx::Connection,
    <T::Target as sqlx::Connection>::Database: LockDatabase<Connection = T::Target>,
{
    pub fn connection(&mut self) -> &mut T::Target {
        &mut *self.0.0
    }
}

impl<'a, T: ?Sized> Deref for Guard<'a, T> {
    type Target = Neither<'a, T>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<T: ?Sized> DerefMut for Guard<'_, T> {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

impl<T: ?Sized> Neither<'_, T> {
    /// Never compiles. Its bound gives the error our own message.
    #[allow(clippy::unused_self)]
    pub fn connection(&mut self) -> &mut <T::Database as sqlx::Database>::Connection
    where
        T: IsTransaction,
    {
        unreachable!("nothing implements the trait")
    }
}

/// What `tx = …` may be.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no transaction that a row lock can be taken in",
    label = "expected a `sqlx::Transaction`, a guard of lock-db, or a connection of PostgreSQL, MySQL or SQLite",
    note = "the cargo feature of the database has to be on in lock-db, too: `postgres`, `mysql` or `sqlite`"
)]
pub trait IsTransaction {
    type Database: LockDatabase;
}

/// Takes the row lock in the caller's transaction. Within one transaction the database itself is
/// re-entrant, so scopes are not used. `None`: held elsewhere, and the function is to be skipped.
pub fn row_in<'a, C>(
    source: impl SourceFor<C::Database> + Send + 'a,
    ask: Box<CallRequest>,
    connection: &'a mut C,
) -> BoxFuture<'a, Result<Option<HeldIn>, Error>>
where
    C: sqlx::Connection,
    C::Database: LockDatabase<Connection = C>,
{
    Box::pin(async move {
        #[cfg(feature = "testing")]
        if ask.is_switched_off()? {
            return Ok(Some(HeldIn { held: None }));
        }
        let locks = source.find(&ask.name)?;
        let lock = locks.row_lock(&*ask.name);
        let wait = ask.waits(locks.context().settings())?;
        // A caller that waits gets it or an error.
        let none = || if wait.is_try() { ask.taken_elsewhere() } else { Error::Closed };
        let held = lock.lock_in(connection, wait).await.and_then(|held| held.ok_or_else(none));
        Ok(ask.or_skipped(held)?.map(|held| HeldIn { held: Some(held) }))
    })
}

/// A lock in the caller's transaction. It ends with that transaction.
pub struct HeldIn {
    /// `None` inside of `testing::without_locks`.
    held: Option<HeldInTransaction>,
}

/// Runs the body. The caller ends the transaction, and so the lock.
#[cfg(feature = "testing")]
pub fn run_in<B: Future>(HeldIn { held }: HeldIn, body: B) -> impl Future<Output = B::Output> + Unpin {
    let body = Box::pin(body);
    Box::pin(async move { crate::testing::inside_of(held.as_ref(), body).await })
}

/// Runs the body. The caller ends the transaction, and so the lock.
#[cfg(not(feature = "testing"))]
pub fn run_in<B: Future>(HeldIn { held }: HeldIn, body: B) -> impl Future<Output = B::Output> + Unpin {
    drop(held);
    Box::pin(body)
}

/// The `Locks` for the database of a transaction.
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
            global::not_installed(name, reason)
        })
    }
}
