//! All ways to get a lock on a table, and what must come of them.

use std::time::Duration;

use lock_db::{Error, Lease, Leases, LockDatabase, Locks, RowGuard, distributed_lock};
use lock_tests::{Backend, TestDatabase};
use sqlx::Pool;

/// Longer than it takes to be refused, and shorter than a wait that is waited out.
const WAIT: Duration = Duration::from_secs(3);

/// What came of one way to get a free lock: whether it was granted.
#[derive(Debug)]
pub struct Answer {
    pub way: &'static str,
    pub granted: Result<bool, Error>,
    /// Whether the transaction that asked for it works on.
    is_usable: bool,
}

impl Answer {
    pub fn new(way: &'static str, granted: Result<bool, Error>) -> Self {
        Self { way, granted, is_usable: true }
    }
}

pub type Answers = Vec<Answer>;

#[distributed_lock("new: skipped", skip, locks = locks)]
async fn job<DB: LockDatabase>(locks: &Locks<DB>) -> Result<Option<()>, Error> {
    Ok(Some(()))
}

/// Asks for locks that nobody has. "used" has a row, if there can be rows.
pub async fn ask<DB: Backend>(locks: &Locks<DB>, pool: &Pool<DB>) -> Answers {
    let mut answers: Answers = Vec::new();
    for name in ["used", "new"] {
        let lease = locks.insert_lock(name).try_acquire().await;
        answers.push(Answer::new("try of a lease", release(lease).await));
        let lease = locks.insert_lock(format!("{name}: waits")).wait(WAIT).acquire().await;
        answers.push(Answer::new("lease", release(lease.map(Some)).await));
    }
    let leases = locks.insert_locks(["new: 1", "new: 2"]).wait(WAIT).acquire().await;
    answers.push(Answer::new("several leases", release_all(leases.map(Some)).await));
    let leases = locks.insert_locks(["new: 3", "new: 4"]).try_acquire().await;
    answers.push(Answer::new("try of several leases", release_all(leases).await));
    answers.push(Answer::new("annotated function", job(locks).await.map(|run| run.is_some())));
    for name in ["used row", "new row"] {
        let guard = locks.row_lock(name).try_acquire().await;
        answers.push(Answer::new("try of a row lock", end(guard).await));
        let guard = locks.row_lock(format!("{name}: waits")).wait(WAIT).acquire().await;
        answers.push(Answer::new("row lock", end(guard.map(Some)).await));
    }
    for way in IN_TRANSACTIONS {
        let mut transaction = pool.begin().await.unwrap();
        let granted = ask_in(locks, way, &mut transaction).await;
        let is_usable = DB::find_number(&mut transaction, "SELECT 1").await.is_ok();
        transaction.rollback().await.unwrap();
        answers.push(Answer { way, granted, is_usable });
    }
    answers
}

const IN_TRANSACTIONS: [&str; 6] = [
    "lease in a transaction",
    "try of a lease in a transaction",
    "several leases in a transaction",
    "row lock in a transaction",
    "try of a row lock in a transaction",
    "several row locks in a transaction",
];

async fn ask_in<DB: Backend>(
    locks: &Locks<DB>,
    way: &str,
    transaction: &mut DB::Connection,
) -> Result<bool, Error> {
    let names = [format!("{way}: 1"), format!("{way}: 2")];
    let [name, _] = &names;
    match (way.starts_with("try"), way.starts_with("several"), way.contains("row lock")) {
        (true, _, false) => {
            locks.insert_lock(name).try_acquire_in(transaction).await.map(|held| held.is_some())
        }
        (true, _, true) => locks.row_lock(name).try_acquire_in(transaction).await.map(|held| held.is_some()),
        (_, true, false) => locks.insert_locks(&names).wait(WAIT).acquire_in(transaction).await.map(|_| true),
        (_, true, true) => locks.row_locks(&names).wait(WAIT).acquire_in(transaction).await.map(|_| true),
        (_, _, false) => locks.insert_lock(name).wait(WAIT).acquire_in(transaction).await.map(|_| true),
        (_, _, true) => locks.row_lock(name).wait(WAIT).acquire_in(transaction).await.map(|_| true),
    }
}

async fn release<DB: LockDatabase>(lease: Result<Option<Lease<DB>>, Error>) -> Result<bool, Error> {
    match lease? {
        Some(lease) => lease.release().await.map(|()| true),
        None => Ok(false),
    }
}

async fn release_all<DB: LockDatabase>(leases: Result<Option<Leases<DB>>, Error>) -> Result<bool, Error> {
    match leases? {
        Some(leases) => leases.release().await.map(|()| true),
        None => Ok(false),
    }
}

async fn end<DB: LockDatabase>(guard: Result<Option<RowGuard<DB>>, Error>) -> Result<bool, Error> {
    match guard? {
        Some(guard) => guard.rollback().await.map(|()| true),
        None => Ok(false),
    }
}

/// Nobody holds anything, so nothing is held: neither `None` nor a wait that ends in vain.
pub fn nothing_is_called_held(what: &str, answers: &Answers) {
    for Answer { way, granted: answer, .. } in answers {
        assert!(
            !matches!(answer, Ok(false) | Err(Error::Timeout { .. })),
            "{what}: {way}: a free lock is called held: {answer:?}"
        );
    }
}

pub fn all_are_granted(what: &str, answers: &Answers) {
    for Answer { way, granted: answer, .. } in answers {
        assert!(matches!(answer, Ok(true)), "{what}: {way}: {answer:?}");
    }
}

/// Nothing is granted, but refused in this way, which does not pass.
pub fn all_are_refused(what: &str, answers: &Answers, is_right: impl Fn(&Error) -> bool) {
    nothing_is_called_held(what, answers);
    for Answer { way, granted: answer, is_usable } in answers {
        assert!(is_usable, "{what}: {way}: the transaction is not usable after {answer:?}");
        let Err(error) = answer else { panic!("{what}: {way}: {answer:?}") };
        assert!(is_right(error), "{what}: {way}: {error:?}");
        assert!(!error.is_retryable(), "{what}: {way}: {error:?}");
    }
}

/// Locks of a process that has used the table before, and rows.
pub async fn locks_in_use<T: TestDatabase>(database: &T) -> Locks<T::Database> {
    let locks = database.locks().await;
    locks.insert_lock("used").acquire().await.unwrap().release().await.unwrap();
    locks.row_lock("used row").acquire().await.unwrap().commit().await.unwrap();
    locks
}

/// Changes the table. From then on it is refused, and its name and what is wrong with it are told. A process that has used it
/// before calls nothing held.
pub async fn is_unsupported<T: TestDatabase>(database: &T, what: &str, change: &str, says: &str) {
    let used = locks_in_use(database).await;
    database.run(change).await;
    let pool = database.pool(4).await;
    let locks = Locks::new(pool.clone());
    is_refused_as_unsupported(what, &locks, &pool, says).await;
    nothing_is_called_held(what, &ask(&used, &pool).await);
    used.close().await;
    locks.close().await;
}

pub async fn is_refused_as_unsupported<DB: Backend>(
    what: &str,
    locks: &Locks<DB>,
    pool: &Pool<DB>,
    says: &str,
) {
    let is_right = |error: &Error| {
        let Error::UnsupportedTable { reason, .. } = error else { return false };
        reason.contains("distributed_lock`") && reason.contains(says)
    };
    let checked = locks.check().await;
    assert!(checked.as_ref().is_err_and(is_right), "{what}: {checked:?}");
    all_are_refused(what, &ask(locks, pool).await, is_right);
}
