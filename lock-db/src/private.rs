//! What the code that `#[distributed_lock]` writes calls. Not part of the public interface: it changes together with
//! the macro, which is released in the same version.

use std::sync::Arc;
use std::time::Duration;

use sqlx::Transaction;
use sqlx::pool::PoolConnection;

use crate::ambient::{self, AnyLocks, OwnTransaction};
use crate::database::LockDatabase;
use crate::in_transaction::HeldInTransaction;
use crate::insert::{Hold, release_quietly};
use crate::reentry::Entered;
use crate::{Error, Locks};

/// Where an annotated function finds its locks: those that it names, or the ambient ones.
#[derive(Clone)]
pub struct Source(Option<Arc<dyn AnyLocks>>);

impl Source {
    fn locks(&self, name: &str) -> Result<&dyn AnyLocks, Error> {
        self.0.as_deref().ok_or_else(|| not_installed(name, "no `Locks` is installed".into()))
    }
}

fn not_installed(name: &str, reason: String) -> Error {
    Error::NotInstalled { name: name.to_owned(), reason }
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
pub trait IntoSource {
    fn into_source(self) -> Source;
}

impl IntoSource for Source {
    fn into_source(self) -> Source {
        self
    }
}

impl<DB: LockDatabase> IntoSource for Locks<DB> {
    fn into_source(self) -> Source {
        Source(Some(Arc::new(self)))
    }
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
            not_installed(name, format!("the transaction is of {wanted}, the ambient `Locks` of {installed}"))
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

/// A lock that an annotated function holds by itself.
pub struct HeldLock(Held);

enum Held {
    Lease(Entered<Hold>),
    Row(Entered<OwnTransaction>),
    /// Inside of `testing::without_locks`.
    #[cfg(feature = "testing")]
    SwitchedOff,
}

/// Takes an insert lock, or enters it again. `None`: the default of the `Locks`.
pub async fn insert(
    source: impl IntoSource,
    name: &str,
    ttl: Option<Duration>,
    wait: Option<Duration>,
) -> Result<HeldLock, Error> {
    #[cfg(feature = "testing")]
    if crate::testing::runs_without_lock(name, ttl, wait)? {
        return Ok(HeldLock(Held::SwitchedOff));
    }
    let source = source.into_source();
    Ok(HeldLock(Held::Lease(source.locks(name)?.lease(name, ttl, wait).await?)))
}

/// Takes a row lock in a transaction of its own, or enters it again.
pub async fn row(source: impl IntoSource, name: &str, wait: Option<Duration>) -> Result<HeldLock, Error> {
    #[cfg(feature = "testing")]
    if crate::testing::runs_without_lock(name, None, wait)? {
        return Ok(HeldLock(Held::SwitchedOff));
    }
    let source = source.into_source();
    Ok(HeldLock(Held::Row(source.locks(name)?.row(name, wait).await?)))
}

/// Takes a row lock in the caller's transaction. Within one transaction the database itself is re-entrant, so frames have no
/// part in it. `None`: inside of `testing::without_locks`.
pub async fn row_in<T: InTransaction>(
    source: impl SourceFor<T::Database>,
    name: &str,
    wait: Option<Duration>,
    transaction: &mut T,
) -> Result<Option<HeldInTransaction>, Error> {
    #[cfg(feature = "testing")]
    if crate::testing::runs_without_lock(name, None, wait)? {
        return Ok(None);
    }
    let locks = source.find(name)?;
    let wait = wait.unwrap_or(locks.default_wait());
    locks.row_lock(name).wait(wait).acquire_in(transaction.connection()).await.map(Some)
}

/// Runs the body of an annotated function whose lock is in the caller's transaction: there is nothing to end.
pub async fn run_in<F: Future>(held: Option<HeldInTransaction>, body: F) -> F::Output {
    #[cfg(feature = "testing")]
    let body = crate::testing::inside_of(held.as_ref(), body);
    let output = body.await;
    drop(held);
    output
}

/// Runs the body of an annotated function under its lock, and ends the lock.
///
/// When a lease is lost first, the body is dropped where it stands. A row lock that turns out to be gone after the body
/// is told as an error, too: nobody can say since when.
pub async fn hold<F>(held: HeldLock, body: F) -> F::Output
where
    F: Future,
    F::Output: LockedOutput,
{
    // `inside` comes first in the patterns, so that it is dropped last.
    match held.0 {
        Held::Lease(Entered { inside, held }) => match inside.scope(held.run_until_lost(body)).await {
            Ok(output) => {
                release_quietly(held.give_up().await);
                output
            }
            Err(lost) => F::Output::refused(lost),
        },
        Held::Row(Entered { inside, held }) => {
            let output = inside.scope(body).await;
            match held.give_up().await {
                Ok(()) => output,
                Err(error) => F::Output::refused(error),
            }
        }
        #[cfg(feature = "testing")]
        Held::SwitchedOff => body.await,
    }
}

/// The return type of an annotated function: it must be able to say that there was no lock.
#[diagnostic::on_unimplemented(
    message = "a locked function must return `Result<_, E>` where `E: From<lock_db::Error>`",
    label = "taking the lock can fail, and `{Self}` has nowhere to put that error",
    note = "write `Result<_, lock_db::Error>`, or implement `From<lock_db::Error>` for your error type"
)]
pub trait LockedOutput {
    fn refused(error: Error) -> Self;
}

#[diagnostic::do_not_recommend]
impl<T, E: From<Error>> LockedOutput for Result<T, E> {
    fn refused(error: Error) -> Self {
        Err(error.into())
    }
}

/// Names the return type once, so that a wrong one is reported once, there.
pub const fn assert_locked_output<T: LockedOutput>() {}
