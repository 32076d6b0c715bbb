//! What happens to a lock that was taken, verified or released inside a savepoint when the
//! savepoint is rolled back. The database decides that, so this suite records what each of them
//! does. `docs/guarantees.md` describes it for users.

use std::time::Duration;

use lock_db::{Error, Kind, Lease, LockDatabase, Locks, Loss, RowGuard};
use lock_tests::{Backend, TestDatabase, TestServer, eventually, is_taken};
use sqlx::{Connection, Transaction};

lock_tests::cases! {
    on every database:
    a_lock_taken_before_a_savepoint_outlives_its_rollback,
    a_lock_taken_inside_a_savepoint_stays_when_it_is_released,
    a_row_lock_taken_inside_a_savepoint,
    an_insert_lock_taken_inside_a_savepoint,
    a_lock_taken_again_inside_a_savepoint,
    the_first_row_lock_of_a_name_taken_inside_a_savepoint,
    a_lease_verified_inside_a_savepoint,
    a_verification_that_was_rolled_back_guards_nothing,
    a_loss_found_inside_a_savepoint,
    a_lease_released_inside_a_savepoint,
    a_guarded_transaction_with_savepoints;

    on every server:
    a_guarded_transaction_with_savepoints_is_refused_after_a_takeover,
    a_deadlock_inside_a_savepoint,
}

const PATIENCE: Duration = Duration::from_secs(20);
/// So far away that the watchdog does nothing.
const LONG: Duration = Duration::from_mins(10);

/// Whether the row stays locked when the savepoint in which it was locked is rolled back.
///
/// PostgreSQL frees what a savepoint locked. InnoDB frees nothing before the end of the
/// transaction. But its transaction begins with the first statement on one of its tables: if that
/// was inside the savepoint, the rollback ends it. SQLite has one lock for the whole file, which
/// belongs to the whole transaction.
fn stays_locked<T: TestDatabase>(used_before: bool) -> bool {
    match T::NAME {
        "postgres" => false,
        "mariadb" | "mysql" => used_before,
        "sqlite" => true,
        other => panic!("not measured: {other}"),
    }
}

/// A transaction in which the database was already used, or not yet.
async fn begin<T: TestDatabase>(
    pool: &sqlx::Pool<T::Database>,
    used_before: bool,
) -> Transaction<'static, T::Database> {
    let mut transaction = pool.begin().await.unwrap();
    if used_before {
        T::Database::find_number(&mut transaction, "SELECT n FROM counter").await.unwrap();
    }
    transaction
}

async fn counter<T: TestDatabase>(database: &T) {
    database.run("CREATE TABLE counter (id BIGINT PRIMARY KEY, n BIGINT)").await;
    database.run("INSERT INTO counter VALUES (1, 0)").await;
}

async fn increment<DB: Backend>(connection: &mut DB::Connection) {
    DB::run(connection, "UPDATE counter SET n = n + 1").await.unwrap();
}

async fn count<T: TestDatabase>(database: &T) -> i64 {
    database.number("SELECT n FROM counter").await
}

async fn fencing_token<T: TestDatabase>(database: &T) -> i64 {
    database.number("SELECT fencing_token FROM distributed_lock WHERE lock_name = 'a'").await
}

async fn lease<T: TestDatabase>(locks: &Locks<T::Database>) -> Lease<T::Database> {
    locks.insert_lock("a").ttl(LONG).wait(PATIENCE).acquire().await.unwrap()
}

/// A lease that any process may take over.
async fn overdue_lease<T: TestDatabase>(database: &T, locks: &Locks<T::Database>) -> Lease<T::Database> {
    let lease = lease::<T>(locks).await;
    let past = "UPDATE distributed_lock SET expire_time = '2001-01-01 00:00:00' WHERE lock_name = 'a'";
    assert_eq!(database.run(past).await, 1);
    lease
}

async fn a_lock_taken_before_a_savepoint_outlives_its_rollback<T: TestDatabase>(database: &T) {
    counter(database).await;
    let (locks, other, pool) = (database.locks().await, database.locks().await, database.pool(1).await);
    let lease = overdue_lease(database, &locks).await;

    let mut transaction = pool.begin().await.unwrap();
    locks.row_lock("row").acquire_in(&mut transaction).await.unwrap();
    lease.verify_in(&mut transaction).await.unwrap();
    let mut savepoint = transaction.begin().await.unwrap();
    increment::<T::Database>(&mut savepoint).await;
    savepoint.rollback().await.unwrap();
    assert!(is_taken::<T, _>(other.row_lock("row").try_acquire().await));
    assert!(try_insert(&other).await.is_none());
    transaction.commit().await.unwrap();
    other.row_lock("row").acquire().await.unwrap().rollback().await.unwrap();
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
    assert_eq!(count(database).await, 0);
}

async fn a_lock_taken_inside_a_savepoint_stays_when_it_is_released<T: TestDatabase>(database: &T) {
    counter(database).await;
    let (locks, other, pool) = (database.locks().await, database.locks().await, database.pool(1).await);
    for used_before in [false, true] {
        let lease = overdue_lease(database, &locks).await;
        let mut transaction = begin::<T>(&pool, used_before).await;
        let mut savepoint = transaction.begin().await.unwrap();
        locks.row_lock("row").acquire_in(&mut savepoint).await.unwrap();
        lease.verify_in(&mut savepoint).await.unwrap();
        savepoint.commit().await.unwrap();
        assert!(is_taken::<T, _>(other.row_lock("row").try_acquire().await));
        assert!(try_insert(&other).await.is_none());

        let mut savepoint = transaction.begin().await.unwrap();
        lease.release_in(&mut savepoint).await.unwrap();
        savepoint.commit().await.unwrap();
        transaction.commit().await.unwrap();
        other.row_lock("row").acquire().await.unwrap().rollback().await.unwrap();
        other.insert_lock("a").try_acquire().await.unwrap().expect("it is free").release().await.unwrap();
    }
}

async fn a_row_lock_taken_inside_a_savepoint<T: TestDatabase>(database: &T) {
    a_lock_taken_inside(database, Kind::Row).await;
}

async fn an_insert_lock_taken_inside_a_savepoint<T: TestDatabase>(database: &T) {
    a_lock_taken_inside(database, Kind::Insert).await;
}

async fn a_lock_taken_inside<T: TestDatabase>(database: &T, kind: Kind) {
    counter(database).await;
    let (locks, other, pool) = (database.locks().await, database.locks().await, database.pool(1).await);
    try_take(&other, kind).await.expect("it is free").give_back().await;
    for used_before in [false, true] {
        let mut transaction = begin::<T>(&pool, used_before).await;
        let mut savepoint = transaction.begin().await.unwrap();
        assert_eq!(try_take_in(&locks, kind, &mut savepoint).await, Some(1));
        assert!(try_take(&other, kind).await.is_none());
        savepoint.rollback().await.unwrap();

        let taken = try_take(&other, kind).await;
        assert_eq!(taken.is_none(), stays_locked::<T>(used_before), "used before: {used_before}");
        let again = try_take_in(&locks, kind, &mut transaction).await;
        assert_eq!(again.is_some(), taken.is_none(), "it has one holder");
        if let Some(taken) = taken {
            taken.give_back().await;
            assert_eq!(try_take_in(&locks, kind, &mut transaction).await, Some(1));
        }
        assert!(try_take(&other, kind).await.is_none());
        transaction.commit().await.unwrap();
        try_take(&other, kind).await.expect("it is free").give_back().await;

        // The number that the savepoint wrote is undone with it, no matter who has the row then.
        let before = fencing_token(database).await;
        let mut transaction = begin::<T>(&pool, used_before).await;
        let mut savepoint = transaction.begin().await.unwrap();
        assert_eq!(try_take_in(&locks, kind, &mut savepoint).await, Some(1));
        savepoint.rollback().await.unwrap();
        transaction.commit().await.unwrap();
        assert_eq!(fencing_token(database).await, before);
        try_take(&other, kind).await.expect("it is free").give_back().await;
    }
}

/// A lock that another holder has taken, of either kind.
enum Taken<DB: LockDatabase> {
    Row(RowGuard<DB>),
    Insert(Lease<DB>),
}

impl<DB: LockDatabase> Taken<DB> {
    async fn give_back(self) {
        match self {
            Self::Row(guard) => guard.rollback().await.unwrap(),
            Self::Insert(lease) => lease.release().await.unwrap(),
        }
    }
}

async fn try_take<DB: LockDatabase>(locks: &Locks<DB>, kind: Kind) -> Option<Taken<DB>> {
    if kind == Kind::Row {
        match locks.row_lock("a").try_acquire().await {
            Err(error) if DB::NAME == "SQLite" => {
                assert!(error.is_retryable(), "{error:?}");
                None
            }
            tried => tried.unwrap().map(Taken::Row),
        }
    } else {
        try_insert(locks).await.map(Taken::Insert)
    }
}

/// On SQLite the write lock is that of the file, so any writer may be in the way.
async fn try_insert<DB: LockDatabase>(locks: &Locks<DB>) -> Option<Lease<DB>> {
    match locks.insert_lock("a").try_acquire().await {
        Err(error) if DB::NAME == "SQLite" => {
            assert!(error.is_retryable(), "{error:?}");
            None
        }
        tried => tried.unwrap(),
    }
}

/// Returns how often the transaction has it.
async fn try_take_in<DB: LockDatabase>(
    locks: &Locks<DB>,
    kind: Kind,
    transaction: &mut DB::Connection,
) -> Option<usize> {
    let held = if kind == Kind::Row {
        locks.row_lock("a").try_acquire_in(transaction).await.unwrap()
    } else {
        locks.insert_lock("a").try_acquire_in(transaction).await.unwrap()
    };
    held.map(|held| held.hold_count())
}

/// A lock taken before the savepoint, and again inside of it.
async fn a_lock_taken_again_inside_a_savepoint<T: TestDatabase>(database: &T) {
    let (locks, other, pool) = (database.locks().await, database.locks().await, database.pool(1).await);
    for kind in [Kind::Row, Kind::Insert] {
        database.run("DELETE FROM distributed_lock").await;
        let mut transaction = pool.begin().await.unwrap();
        assert_eq!(try_take_in(&locks, kind, &mut transaction).await, Some(1));
        let mut savepoint = transaction.begin().await.unwrap();
        assert_eq!(try_take_in(&locks, kind, &mut savepoint).await, Some(2));
        savepoint.rollback().await.unwrap();
        assert!(try_take(&other, kind).await.is_none());
        assert_eq!(try_take_in(&locks, kind, &mut transaction).await, Some(2));
        transaction.commit().await.unwrap();
        try_take(&other, kind).await.expect("it is free").give_back().await;
    }
}

/// The row of a new name is created outside of the transaction on InnoDB, and inside of it
/// elsewhere.
async fn the_first_row_lock_of_a_name_taken_inside_a_savepoint<T: TestDatabase>(database: &T) {
    counter(database).await;
    let (locks, other, pool) = (database.locks().await, database.locks().await, database.pool(1).await);
    let mut transaction = pool.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    let mut savepoint = transaction.begin().await.unwrap();
    locks.row_lock("a").acquire_in(&mut savepoint).await.unwrap();
    savepoint.rollback().await.unwrap();
    transaction.commit().await.unwrap();
    let rows = database.number("SELECT COUNT(*) FROM distributed_lock WHERE lock_name = 'a'").await;
    assert_eq!(rows, i64::from(!matches!(T::NAME, "postgres" | "sqlite")));
    other.row_lock("a").acquire().await.unwrap().commit().await.unwrap();
    locks.row_lock("a").acquire().await.unwrap().commit().await.unwrap();
    assert_eq!(count(database).await, 1);
}

async fn a_lease_verified_inside_a_savepoint<T: TestDatabase>(database: &T) {
    counter(database).await;
    let (locks, other, pool) = (database.locks().await, database.locks().await, database.pool(1).await);
    for used_before in [false, true] {
        let lease = overdue_lease(database, &locks).await;
        let mut transaction = begin::<T>(&pool, used_before).await;
        let mut savepoint = transaction.begin().await.unwrap();
        lease.verify_in(&mut savepoint).await.unwrap();
        savepoint.rollback().await.unwrap();

        let taken = try_insert(&other).await;
        assert_eq!(taken.is_none(), stays_locked::<T>(used_before), "used before: {used_before}");
        let again = lease.verify_in(&mut transaction).await;
        if let Some(taken) = taken {
            assert!(matches!(again, Err(Error::Lost { reason: Loss::TakenOver, .. })), "{again:?}");
            let _the_database_may_refuse = transaction.rollback().await;
            taken.release().await.unwrap();
        } else {
            again.unwrap();
            transaction.commit().await.unwrap();
            lease.release().await.unwrap();
        }
    }
}

/// An incorrect use: the check belongs at the end of the transaction, outside of all savepoints.
async fn a_verification_that_was_rolled_back_guards_nothing<T: TestDatabase>(database: &T) {
    counter(database).await;
    let (locks, other, pool) = (database.locks().await, database.locks().await, database.pool(1).await);
    let lease = overdue_lease(database, &locks).await;
    let mut transaction = pool.begin().await.unwrap();
    let mut savepoint = transaction.begin().await.unwrap();
    lease.verify_in(&mut savepoint).await.unwrap();
    savepoint.rollback().await.unwrap();
    let taken = try_insert(&other).await;
    assert_eq!(taken.is_some(), !stays_locked::<T>(false));
    increment::<T::Database>(&mut transaction).await;
    transaction.commit().await.unwrap();
    assert_eq!(count(database).await, 1, "after a takeover, except on SQLite");
}

/// `Lost` concerns the whole transaction. A caller that only rolls the savepoint back is refused,
/// except on PostgreSQL: elsewhere the transaction was ended with it, and later statements can't be
/// committed.
async fn a_loss_found_inside_a_savepoint<T: TestDatabase>(database: &T) {
    counter(database).await;
    let (locks, other, pool) = (database.locks().await, database.locks().await, database.pool(1).await);
    let lease = overdue_lease(database, &locks).await;
    let taken = other.insert_lock("a").try_acquire().await.unwrap().expect("it is overdue");
    let mut transaction = pool.begin().await.unwrap();
    increment::<T::Database>(&mut transaction).await;
    let mut savepoint = transaction.begin().await.unwrap();
    let error = lease.verify_in(&mut savepoint).await.unwrap_err();
    assert!(matches!(error, Error::Lost { reason: Loss::TakenOver, .. }), "{error:?}");
    let rolled_back = savepoint.rollback().await;
    let (stops, on_innodb) = (T::NAME != "postgres", matches!(T::NAME, "mariadb" | "mysql"));
    assert_eq!(rolled_back.is_err(), on_innodb, "{rolled_back:?}");
    let written = T::Database::run(&mut transaction, "UPDATE counter SET n = n + 10").await;
    assert_eq!(written.is_err(), on_innodb, "{written:?}");
    let committed = transaction.commit().await;
    assert_eq!(committed.is_err(), T::NAME == "sqlite", "{committed:?}");
    assert_eq!(count(database).await, if stops { 0 } else { 11 });
    taken.release().await.unwrap();

    // The connection is usable again.
    increment::<T::Database>(&mut pool.acquire().await.unwrap()).await;
}

async fn a_lease_released_inside_a_savepoint<T: TestDatabase>(database: &T) {
    counter(database).await;
    let (locks, other, pool) = (database.locks().await, database.locks().await, database.pool(1).await);
    for used_before in [false, true] {
        let lease = lease::<T>(&locks).await;
        let mut transaction = begin::<T>(&pool, used_before).await;
        let mut savepoint = transaction.begin().await.unwrap();
        lease.release_in(&mut savepoint).await.unwrap();
        assert!(!lease.is_held());
        savepoint.rollback().await.unwrap();
        assert!(try_insert(&other).await.is_none());
        if stays_locked::<T>(used_before) {
            assert!(!lease.is_held(), "the watchdog can't look before the transaction has ended");
        } else {
            eventually(PATIENCE, async || lease.is_held()).await;
        }
        increment::<T::Database>(&mut transaction).await;
        transaction.commit().await.unwrap();

        // The lease continues, as if it had not been released.
        eventually(PATIENCE, async || lease.is_held()).await;
        assert!(try_insert(&other).await.is_none());
        let mut transaction = lease.begin().await.unwrap();
        increment::<T::Database>(&mut transaction).await;
        lease.commit_and_release(transaction).await.unwrap();
        other.insert_lock("a").try_acquire().await.unwrap().expect("it is free").release().await.unwrap();
    }
    assert_eq!(count(database).await, 4);
}

async fn a_guarded_transaction_with_savepoints<T: TestDatabase>(database: &T) {
    counter(database).await;
    let locks = database.locks().await;
    let mut expected = 0;
    for used_before in [false, true] {
        let lease = overdue_lease(database, &locks).await;
        let mut transaction = lease.begin().await.unwrap();
        if used_before {
            increment::<T::Database>(&mut transaction).await;
            expected += 1;
        }
        let mut savepoint = transaction.begin().await.unwrap();
        increment::<T::Database>(&mut savepoint).await;
        savepoint.rollback().await.unwrap();
        // An error that a savepoint catches does no harm.
        let mut savepoint = transaction.begin().await.unwrap();
        T::Database::run(&mut savepoint, "INSERT INTO counter VALUES (1, 0)").await.unwrap_err();
        savepoint.rollback().await.unwrap();
        let mut savepoint = transaction.begin().await.unwrap();
        lease.verify_in(&mut savepoint).await.unwrap();
        savepoint.rollback().await.unwrap();
        let mut savepoint = transaction.begin().await.unwrap();
        increment::<T::Database>(&mut savepoint).await;
        savepoint.commit().await.unwrap();
        expected += 1;
        transaction.commit().await.unwrap();
        assert_eq!(count(database).await, expected);
        lease.release().await.unwrap();
    }
}

async fn a_guarded_transaction_with_savepoints_is_refused_after_a_takeover<T: TestServer>(database: &T) {
    counter(database).await;
    let (locks, other) = (database.locks().await, database.locks().await);
    for used_before in [false, true] {
        let lease = overdue_lease(database, &locks).await;
        let mut transaction = lease.begin().await.unwrap();
        if used_before {
            increment::<T::Database>(&mut transaction).await;
        }
        let mut savepoint = transaction.begin().await.unwrap();
        increment::<T::Database>(&mut savepoint).await;
        savepoint.rollback().await.unwrap();
        let taken = other.insert_lock("a").try_acquire().await.unwrap().expect("it is overdue");
        let mut savepoint = transaction.begin().await.unwrap();
        increment::<T::Database>(&mut savepoint).await;
        savepoint.commit().await.unwrap();
        let error = transaction.commit().await.unwrap_err();
        assert!(matches!(error, Error::Lost { reason: Loss::TakenOver, .. }), "{error:?}");
        assert_eq!(count(database).await, 0);
        taken.release().await.unwrap();
    }
}

/// On PostgreSQL the rollback of the savepoint recovers the victim. InnoDB has ended the whole
/// transaction, and refuses what it sends then.
async fn a_deadlock_inside_a_savepoint<T: TestServer>(database: &T) {
    counter(database).await;
    database.run("INSERT INTO counter VALUES (2, 0)").await;
    let (locks, pool) = (database.locks().await, database.pool(2).await);
    let (mut first, mut second) = (pool.begin().await.unwrap(), pool.begin().await.unwrap());
    for (transaction, row, name) in [(&mut first, 1, "a"), (&mut second, 2, "b")] {
        let write = format!("UPDATE counter SET n = 1 WHERE id = {row}");
        T::Database::run(transaction, &write).await.unwrap();
        locks.row_lock(name).acquire_in(transaction).await.unwrap();
    }
    let recovers = T::NAME == "postgres";
    let victims = tokio::join!(
        take_in_savepoint(&locks, first, 1, "b", recovers),
        take_in_savepoint(&locks, second, 2, "a", recovers),
    );
    assert_ne!(victims.0, victims.1, "one is the victim");
    let kept = database.number("SELECT SUM(n) FROM counter").await;
    assert_eq!(kept, if recovers { 2 } else { 1 });
    // The connections are usable again.
    for _ in 0..4 {
        let mut transaction = pool.begin().await.unwrap();
        increment::<T::Database>(&mut transaction).await;
        transaction.commit().await.unwrap();
    }
    assert_eq!(database.number("SELECT SUM(n) FROM counter").await, kept + 8);
}

/// Takes a lock inside a savepoint, and commits what was done before, as far as that is possible.
/// Returns whether this was the victim of a deadlock.
async fn take_in_savepoint<DB: Backend>(
    locks: &Locks<DB>,
    mut transaction: Transaction<'static, DB>,
    row: i64,
    name: &str,
    recovers: bool,
) -> bool {
    let mut savepoint = transaction.begin().await.unwrap();
    let taken = locks.row_lock(name).wait(PATIENCE).acquire_in(&mut savepoint).await;
    let Err(error) = taken else {
        savepoint.commit().await.unwrap();
        transaction.commit().await.unwrap();
        return false;
    };
    assert!(matches!(error, Error::Deadlock { .. }), "{error:?}");
    let rolled_back = savepoint.rollback().await;
    assert_eq!(rolled_back.is_ok(), recovers, "{rolled_back:?}");
    let write = format!("UPDATE counter SET n = n WHERE id = {row}");
    let written = DB::run(&mut transaction, &write).await;
    assert_eq!(written.is_ok(), recovers, "{written:?}");
    transaction.commit().await.unwrap();
    true
}
