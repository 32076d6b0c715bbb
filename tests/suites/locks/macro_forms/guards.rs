//! The guard in the body, and where transactions lie: always inside of the lock.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures_util::FutureExt;
use lock_db::{
    AmbientLease, Error, GuardedTransaction, Lease, LockDatabase, Locks, NoReentry, RowGuard,
    distributed_lock,
};
use lock_tests::{Backend, TestDatabase};
use sqlx::{Postgres, Sqlite};

lock_tests::cases! {
    on every database:
    the_lease_in_the_body,
    the_lease_of_the_installed_locks,
    the_lock_is_released_after_the_commit,
    a_transaction_that_is_left_open_keeps_the_lock,
    the_transaction_of_a_row_lock,
    an_error_rolls_the_transaction_back,
    a_panic_rolls_back_and_frees_the_lock,
    a_dropped_call_rolls_back_and_frees_the_lock,
    one_body_at_a_time_works_with_the_transaction,
    a_guard_is_passed_to_a_function,
    guards_that_a_function_takes_over,
}

async fn with_account<T: TestDatabase>(database: &T) -> Locks<T::Database> {
    database.run("CREATE TABLE account (balance BIGINT NOT NULL)").await;
    database.locks().await
}

async fn balances<T: TestDatabase>(database: &T) -> i64 {
    database.number("SELECT COUNT(*) FROM account").await
}

async fn deposit<DB: Backend>(connection: &mut DB::Connection) {
    DB::run(connection, "INSERT INTO account (balance) VALUES (1)").await.unwrap();
}

async fn is_free<DB: LockDatabase>(locks: &Locks<DB>, name: &str) -> bool {
    locks.info(name).await.unwrap().unwrap().held_until.is_none()
}

#[distributed_lock("token:{depth}", locks = locks, lease = lease)]
async fn tokens<DB: LockDatabase>(locks: &Locks<DB>, depth: usize) -> Result<(i64, usize), Error> {
    let lease: &Lease<DB> = lease;
    assert_eq!(lease.name(), format!("token:{depth}"));
    assert!(lease.is_held());
    if depth == 1 && lease.hold_count() == 1 {
        return tokens(locks, depth).await;
    }
    Ok((lease.fencing_token(), lease.hold_count()))
}

async fn the_lease_in_the_body<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let (first, count) = tokens(&locks, 0).await.unwrap();
    assert_eq!(count, 1);
    let (second, _) = tokens(&locks, 0).await.unwrap();
    assert!(second > first);
    // A nested call has a handle of the same lease.
    assert_eq!(tokens(&locks, 1).await.unwrap().1, 2);
    assert!(is_free(&locks, "token:1").await);
}

#[distributed_lock("ambient", lease = lease)]
async fn ambient<DB: Backend>() -> Result<i64, Error> {
    let lease: &AmbientLease = lease;
    assert!(lease.is_held() && lease.hold_count() == 1 && lease.secret_key().len() == 32);
    assert_eq!(lease.of::<DB>()?.secret_key(), lease.secret_key());
    assert!(format!("{lease:?}").contains("ambient"));
    let mut transaction: GuardedTransaction<DB> = lease.begin().await?;
    deposit::<DB>(&mut transaction).await;
    transaction.commit().await?;
    Ok(lease.fencing_token())
}

#[distributed_lock("ambient", lease = lease)]
async fn of_which_database() -> Result<(), Error> {
    lease.begin::<Postgres>().await?.rollback().await?;
    lease.begin::<Sqlite>().await?.rollback().await
}

async fn the_lease_of_the_installed_locks<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    assert!(locks.scope(ambient::<T::Database>()).await.unwrap() > 0);
    assert_eq!(balances(database).await, 1);

    let error = locks.scope(of_which_database()).await.unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, Error::NotInstalled { .. }), "{message}");
    assert!(
        message.contains("the ambient `Locks` is of") && message.contains("`locks.install()`"),
        "{message}"
    );
}

#[distributed_lock("guarded", locks = locks, lease = lease)]
async fn guarded<DB: Backend>(locks: &Locks<DB>, commits: bool) -> Result<(), Error> {
    let mut transaction = lease.begin().await?;
    deposit::<DB>(&mut transaction).await;
    if !commits {
        return Ok(());
    }
    transaction.commit().await?;
    // Committed, and nobody else has the lock yet.
    assert!(!is_free(locks, "guarded").await);
    Ok(())
}

#[distributed_lock("guarded", locks = locks, lease = lease)]
async fn released_by_the_commit<DB: Backend>(locks: &Locks<DB>) -> Result<(), Error> {
    let mut transaction = lease.begin().await?;
    deposit::<DB>(&mut transaction).await;
    lease.release_in(&mut transaction).await?;
    transaction.commit().await?;
    assert!(is_free(locks, "guarded").await);
    Ok(())
}

async fn the_lock_is_released_after_the_commit<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    guarded(&locks, true).await.unwrap();
    assert!(is_free(&locks, "guarded").await);
    assert_eq!(balances(database).await, 1);
    // What the body does not commit is rolled back, not left to somebody who has no lock.
    guarded(&locks, false).await.unwrap();
    assert_eq!(balances(database).await, 1);
    released_by_the_commit(&locks).await.unwrap();
    assert_eq!(balances(database).await, 2);
}

/// The wrong order, as far as it can be written at all: the transaction outlives the function.
#[distributed_lock("open", locks = locks, lease = lease)]
async fn left_open<DB: Backend>(locks: &Locks<DB>) -> Result<GuardedTransaction<DB>, Error> {
    let mut transaction = lease.begin().await?;
    deposit::<DB>(&mut transaction).await;
    Ok(transaction)
}

async fn a_transaction_that_is_left_open_keeps_the_lock<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let transaction = left_open(&locks).await.unwrap();
    assert!(locks.insert_lock("open").try_acquire().await.unwrap().is_none());
    transaction.commit().await.unwrap();
    assert_eq!(balances(database).await, 1);
    let lease = locks.insert_lock("open").acquire().await.unwrap();
    lease.release().await.unwrap();
}

#[distributed_lock("account", mode = row, locks = locks, lease = guard)]
async fn in_row<DB: Backend>(locks: &Locks<DB>, fails: bool) -> Result<&str, Box<dyn std::error::Error>> {
    assert_eq!(guard.name(), "account");
    deposit::<DB>(guard).await;
    if fails {
        return Err("on purpose".into());
    }
    let guard: &mut RowGuard<DB> = guard;
    deposit::<DB>(guard).await;
    Ok("done")
}

async fn the_transaction_of_a_row_lock<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    assert_eq!(in_row(&locks, false).await.unwrap(), "done");
    assert_eq!(balances(database).await, 2);
    locks.row_lock("account").try_acquire().await.unwrap().unwrap().rollback().await.unwrap();
}

async fn an_error_rolls_the_transaction_back<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    assert_eq!(in_row(&locks, true).await.unwrap_err().to_string(), "on purpose");
    assert_eq!(balances(database).await, 0);
    locks.row_lock("account").try_acquire().await.unwrap().unwrap().rollback().await.unwrap();
}

#[distributed_lock("account", mode = row, locks = locks, lease = guard)]
async fn stops_midway<DB: Backend>(locks: &Locks<DB>, panics: bool) -> Result<(), Error> {
    deposit::<DB>(guard).await;
    assert!(!panics, "on purpose");
    std::future::pending().await
}

async fn a_panic_rolls_back_and_frees_the_lock<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let caught = AssertUnwindSafe(stops_midway(&locks, true)).catch_unwind().await;
    assert!(caught.is_err());
    locks.row_lock("account").acquire().await.unwrap().rollback().await.unwrap();
    assert_eq!(balances(database).await, 0);
}

async fn a_dropped_call_rolls_back_and_frees_the_lock<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let cut = tokio::time::timeout(Duration::from_millis(100), stops_midway(&locks, false)).await;
    assert!(cut.is_err());
    locks.row_lock("account").acquire().await.unwrap().rollback().await.unwrap();
    assert_eq!(balances(database).await, 0);
}

/// Enters the row lock around it, without a need for the connection.
#[distributed_lock("account", mode = row, locks = locks)]
async fn only_inside<DB: Backend>(locks: &Locks<DB>) -> Result<u8, Error> {
    Ok(1)
}

#[distributed_lock("account", mode = row, locks = locks, lease = guard)]
async fn innermost<DB: Backend>(locks: &Locks<DB>) -> Result<(), Error> {
    deposit::<DB>(guard).await;
    Ok(())
}

#[distributed_lock("account", mode = row, locks = locks, lease = guard)]
async fn with_calls<DB: Backend>(locks: &Locks<DB>) -> Result<(), Error> {
    assert_eq!(only_inside(locks).await?, 1);
    let refused = innermost(locks).await.unwrap_err();
    assert!(matches!(&refused, Error::Reentry { reason: NoReentry::GuardInUse, .. }), "{refused:?}");
    deposit::<DB>(guard).await;
    Ok(())
}

#[distributed_lock("account", mode = row, locks = locks)]
async fn around<DB: Backend>(locks: &Locks<DB>) -> Result<(), Error> {
    innermost(locks).await?;
    // It has given the transaction back: the next one gets it, and so does the end of this function.
    innermost(locks).await
}

async fn one_body_at_a_time_works_with_the_transaction<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    with_calls(&locks).await.unwrap();
    assert_eq!(balances(database).await, 1);
    around(&locks).await.unwrap();
    assert_eq!(balances(database).await, 3);
}

/// As the message of `NoReentry::GuardInUse` advises.
#[distributed_lock("account", mode = row, tx = guard, locks = locks)]
async fn on_guard<DB: Backend>(locks: &Locks<DB>, guard: &mut RowGuard<DB>) -> Result<(), Error> {
    deposit::<DB>(guard).await;
    Ok(())
}

/// Whatever database it is.
#[distributed_lock("account", mode = row, tx = connection, locks = locks)]
async fn on_any<DB: Backend>(locks: &Locks<DB>, connection: &mut DB::Connection) -> Result<(), Error> {
    deposit::<DB>(connection).await;
    Ok(())
}

/// Whatever connection it is.
#[distributed_lock("other", mode = row, tx = connection, locks = locks, skip)]
async fn on_connection<C>(locks: &Locks<C::Database>, connection: &mut C) -> Result<(), Error>
where
    C: sqlx::Connection,
    C::Database: LockDatabase<Connection = C>,
{
    assert!(connection.is_in_transaction());
    Ok(())
}

#[distributed_lock("other", mode = row, tx = transaction, locks = locks)]
async fn on_guarded<DB: Backend>(
    locks: &Locks<DB>,
    transaction: &mut GuardedTransaction<DB>,
) -> Result<(), Error> {
    deposit::<DB>(transaction).await;
    Ok(())
}

#[distributed_lock("other", mode = row, tx = transaction, locks = locks)]
async fn on_transaction<DB: Backend>(
    locks: &Locks<DB>,
    transaction: &mut sqlx::Transaction<'_, DB>,
) -> Result<(), Error> {
    deposit::<DB>(transaction).await;
    Ok(())
}

#[distributed_lock("account", mode = row, lease = guard, locks = locks)]
async fn hands_on<DB: Backend>(locks: &Locks<DB>, fails: bool) -> Result<(), Error> {
    on_guard(locks, guard).await?;
    on_any(locks, guard).await?;
    on_connection(locks, &mut **guard).await?;
    if fails { Err(Error::Closed) } else { Ok(()) }
}

async fn a_guard_is_passed_to_a_function<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let failed = hands_on(&locks, true).await;
    assert!(matches!(failed, Err(Error::Closed)), "{failed:?}");
    assert_eq!(balances(database).await, 0);
    hands_on(&locks, false).await.unwrap();
    assert_eq!(balances(database).await, 2);
    locks.row_lock("account").try_acquire().await.unwrap().unwrap().rollback().await.unwrap();
}

#[distributed_lock("account", mode = row, tx = guard, locks = locks)]
async fn takes_over<DB: Backend>(locks: &Locks<DB>, mut guard: RowGuard<DB>) -> Result<(), Error> {
    deposit::<DB>(&mut guard).await;
    guard.commit().await
}

#[distributed_lock("other", mode = row, tx = transaction, locks = locks)]
async fn takes_over_guarded<DB: Backend>(
    locks: &Locks<DB>,
    mut transaction: GuardedTransaction<DB>,
) -> Result<(), Error> {
    deposit::<DB>(&mut transaction).await;
    transaction.commit().await
}

async fn guards_that_a_function_takes_over<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let guard = locks.row_lock("account").acquire().await.unwrap();
    takes_over(&locks, guard).await.unwrap();
    assert_eq!(balances(database).await, 1);
    locks.row_lock("account").try_acquire().await.unwrap().unwrap().rollback().await.unwrap();

    let lease = locks.insert_lock("lease").acquire().await.unwrap();
    let mut transaction = lease.begin().await.unwrap();
    on_guarded(&locks, &mut transaction).await.unwrap();
    takes_over_guarded(&locks, transaction).await.unwrap();
    assert_eq!(balances(database).await, 3);
    lease.release().await.unwrap();

    let mut transaction = database.pool(2).await.begin().await.unwrap();
    on_transaction(&locks, &mut transaction).await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(balances(database).await, 4);
}
