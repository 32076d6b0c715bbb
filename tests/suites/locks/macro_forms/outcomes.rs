//! Annotated functions that share the transaction of a row lock: how the transaction ends, and what
//! each function returns.

use std::panic::AssertUnwindSafe;
use std::pin::{Pin, pin};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::poll_immediate;
use lock_db::{Error, LockDatabase, Locks, Loss, NoReentry, ReentryContext, WaitingFor, distributed_lock};
use lock_tests::{Backend, TestDatabase, TestServer};
use sqlx::Transaction;
use tokio::sync::oneshot;
use tokio::task::{JoinError, JoinHandle};
use tokio::{join, select};

lock_tests::cases! {
    on every database:
    both_succeed,
    a_call_inside_fails_late (current_thread),
    a_call_inside_panics_late,
    a_call_inside_is_dropped_late,
    an_error_before_a_late_success,
    an_error_before_a_late_error,
    a_panic_before_a_late_success,
    a_dropped_call_before_a_late_success,
    a_call_that_is_dropped_while_it_waits (current_thread),
    an_error_inside_is_swallowed,
    a_panic_inside_is_caught,
    a_panic_of_a_task_inside_is_ignored,
    a_call_inside_is_cut_short,
    an_error_inside_is_passed_on,
    a_call_inside_after_another_has_failed,
    a_late_call_works_with_the_transaction,
    a_late_call_has_calls_inside,
    refused_calls_do_not_count,
    a_call_that_is_returned_unfinished,
    a_call_that_is_returned_and_continues_elsewhere,
    a_call_beside_the_holder_in_one_task,
    every_form_shares_the_transaction,
    the_transaction_of_the_caller_is_not_concerned;

    on every server:
    a_failed_commit_is_reported_to_both,
    a_guard_that_the_body_has_exchanged,
}

/// What an application calls its errors.
#[derive(Debug)]
enum Failed {
    OnPurpose,
    Lock(Error),
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self::Lock(error)
    }
}

type Outcome = Result<&'static str, Failed>;

/// How a body ends.
#[derive(Debug, Clone, Copy)]
enum End {
    Well,
    WithError,
    WithPanic,
    Never,
}

impl End {
    async fn reached(self, value: &'static str) -> Outcome {
        match self {
            Self::Well => Ok(value),
            Self::WithError => Err(Failed::OnPurpose),
            Self::WithPanic => panic!("on purpose"),
            Self::Never => std::future::pending().await,
        }
    }
}

#[track_caller]
fn is_rolled_back<R: std::fmt::Debug>(outcome: &Result<R, Failed>) {
    assert!(
        matches!(outcome, Err(Failed::Lock(Error::RolledBack { name, .. })) if name == "account"),
        "{outcome:?}"
    );
}

#[track_caller]
fn failed_on_purpose<R: std::fmt::Debug>(outcome: &Result<R, Failed>) {
    assert!(matches!(outcome, Err(Failed::OnPurpose)), "{outcome:?}");
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

/// Takes the lock, which waits for a rollback in the background, and counts.
async fn settled<T: TestDatabase>(database: &T, locks: &Locks<T::Database>) -> i64 {
    locks.row_lock("account").acquire().await.unwrap().rollback().await.unwrap();
    balances(database).await
}

/// Writes, and then does some work.
#[distributed_lock("account", mode = row, locks = locks, lease = guard)]
async fn pay<DB: Backend>(locks: &Locks<DB>, end: End, work: impl AsyncFnOnce()) -> Outcome {
    deposit::<DB>(guard).await;
    work().await;
    end.reached("paid").await
}

/// Only does some work.
#[distributed_lock("account", mode = row, locks = locks)]
async fn around<DB: LockDatabase, R>(
    locks: &Locks<DB>,
    work: impl AsyncFnOnce() -> Result<R, Failed>,
) -> Result<R, Failed> {
    work().await
}

#[distributed_lock("account", mode = row, locks = locks, wait = "60s")]
async fn audit<DB: LockDatabase>(locks: &Locks<DB>, end: End) -> Outcome {
    end.reached("audited").await
}

#[distributed_lock("account", mode = row, locks = locks, lease = guard)]
async fn book<DB: Backend>(locks: &Locks<DB>, end: End) -> Outcome {
    deposit::<DB>(guard).await;
    end.reached("booked").await
}

/// Ends when and how the channel says.
#[distributed_lock("account", mode = row, locks = locks)]
async fn audit_slowly<DB: LockDatabase>(
    locks: &Locks<DB>,
    entered: oneshot::Sender<()>,
    end: oneshot::Receiver<End>,
) -> Outcome {
    entered.send(()).unwrap();
    end.await.unwrap().reached("audited").await
}

/// A call in a task of its own, with the owner of the code that starts it. `start` returns when its
/// body runs.
struct Late {
    task: JoinHandle<Outcome>,
    end: oneshot::Sender<End>,
}

impl Late {
    async fn start<DB: LockDatabase>(locks: &Locks<DB>) -> Self {
        let ((enter, entered), (end, ended)) = (oneshot::channel(), oneshot::channel());
        let locks = locks.clone();
        let call = async move { audit_slowly(&locks, enter, ended).await };
        let task = tokio::spawn(ReentryContext::current().unwrap().scope(call));
        entered.await.unwrap();
        Self { task, end }
    }

    async fn end(self, end: End) -> Result<Outcome, JoinError> {
        self.end.send(end).unwrap();
        self.task.await
    }
}

/// Polls a future once.
async fn is_pending(future: Pin<&mut impl Future>) -> bool {
    poll_immediate(future).await.is_none()
}

/// Polls a holder until its body has ended and the holder waits. The body sends to `body_ends` as
/// its last action; the code behind the body runs in the same poll.
async fn body_of<R: std::fmt::Debug, S>(
    mut holder: Pin<&mut impl Future<Output = R>>,
    body_ends: oneshot::Receiver<S>,
) -> S {
    let said = select! {
        biased;
        ended = holder.as_mut() => panic!("a call inside is still under way: {ended:?}"),
        said = body_ends => said.unwrap(),
    };
    assert!(is_pending(holder).await, "a call inside is still under way");
    said
}

async fn is_free<DB: LockDatabase>(locks: &Locks<DB>) -> bool {
    locks.row_lock("account").try_acquire().await.unwrap().is_some()
}

/// Runs `pay` with a call inside that ends later than its body. Returns both results, and the
/// number of rows.
async fn pay_with_late_call<T: TestDatabase>(
    database: &T,
    end: End,
    inside: End,
) -> (Outcome, Result<Outcome, JoinError>, i64) {
    let locks = with_account(database).await;
    let (started, is_started) = oneshot::channel();
    let mut paying = pin!(pay(&locks, end, async || drop(started.send(Late::start(&locks).await))));
    let late = body_of(paying.as_mut(), is_started).await;
    assert!(!is_free(&locks).await, "a call inside holds the lock by itself");
    let (paid, audited) = join!(paying, late.end(inside));
    // At once: the results say what has happened, not what will happen.
    let in_table = balances(database).await;
    assert!(is_free(&locks).await);
    (paid, audited, in_table)
}

async fn both_succeed<T: TestDatabase>(database: &T) {
    let (paid, audited, in_table) = pay_with_late_call(database, End::Well, End::Well).await;
    assert_eq!((paid.unwrap(), audited.unwrap().unwrap(), in_table), ("paid", "audited", 1));
}

async fn a_call_inside_fails_late<T: TestDatabase>(database: &T) {
    let (paid, audited, in_table) = pay_with_late_call(database, End::Well, End::WithError).await;
    is_rolled_back(&paid);
    failed_on_purpose(&audited.unwrap());
    assert_eq!(in_table, 0);

    let Err(Failed::Lock(error)) = paid else { unreachable!() };
    assert_eq!((error.name(), error.is_retryable()), (Some("account"), false));
    let message = error.to_string();
    assert!(message.contains("lock `account` was rolled back"), "{message}");
}

async fn a_call_inside_panics_late<T: TestDatabase>(database: &T) {
    let (paid, audited, in_table) = pay_with_late_call(database, End::Well, End::WithPanic).await;
    is_rolled_back(&paid);
    assert!(audited.unwrap_err().is_panic());
    assert_eq!(in_table, 0);
}

async fn a_call_inside_is_dropped_late<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let (started, is_started) = oneshot::channel();
    let mut paying = pin!(pay(&locks, End::Well, async || drop(started.send(Late::start(&locks).await))));
    let late = body_of(paying.as_mut(), is_started).await;
    late.task.abort();
    is_rolled_back(&paying.await);
    assert_eq!(balances(database).await, 0);
    assert!(is_free(&locks).await);
}

async fn an_error_before_a_late_success<T: TestDatabase>(database: &T) {
    let (paid, audited, in_table) = pay_with_late_call(database, End::WithError, End::Well).await;
    failed_on_purpose(&paid);
    is_rolled_back(&audited.unwrap());
    assert_eq!(in_table, 0);
}

async fn an_error_before_a_late_error<T: TestDatabase>(database: &T) {
    let (paid, audited, in_table) = pay_with_late_call(database, End::WithError, End::WithError).await;
    failed_on_purpose(&paid);
    failed_on_purpose(&audited.unwrap());
    assert_eq!(in_table, 0);
}

async fn a_panic_before_a_late_success<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let (started, is_started) = oneshot::channel();
    let paying = pay(&locks, End::WithPanic, async || drop(started.send(Late::start(&locks).await)));
    assert!(AssertUnwindSafe(paying).catch_unwind().await.is_err());
    assert!(!is_free(&locks).await, "a call inside holds the lock by itself");
    is_rolled_back(&is_started.await.unwrap().end(End::Well).await.unwrap());
    assert_eq!(balances(database).await, 0);
    assert!(is_free(&locks).await);
}

async fn a_dropped_call_before_a_late_success<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let (started, is_started) = oneshot::channel();
    let late = select! {
        paid = pay(&locks, End::Never, async || drop(started.send(Late::start(&locks).await))) => panic!("{paid:?}"),
        late = is_started => late.unwrap(),
    };
    assert!(!is_free(&locks).await, "a call inside holds the lock by itself");
    is_rolled_back(&late.end(End::Well).await.unwrap());
    assert_eq!(balances(database).await, 0);
    assert!(is_free(&locks).await);
}

async fn a_call_that_is_dropped_while_it_waits<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let (started, is_started) = oneshot::channel();
    let late = {
        let mut paying = pin!(pay(&locks, End::Well, async || drop(started.send(Late::start(&locks).await))));
        body_of(paying.as_mut(), is_started).await
    };
    is_rolled_back(&late.end(End::Well).await.unwrap());
    assert_eq!(balances(database).await, 0);
    assert!(is_free(&locks).await);
}

async fn an_error_inside_is_swallowed<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let outcome = around(&locks, async || {
        failed_on_purpose(&book(&locks, End::WithError).await);
        Ok("went on")
    });
    is_rolled_back(&outcome.await);
    assert_eq!(balances(database).await, 0);
    // The next transaction is not concerned.
    assert_eq!(book(&locks, End::Well).await.unwrap(), "booked");
    assert_eq!(balances(database).await, 1);
}

async fn a_panic_inside_is_caught<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let outcome = around(&locks, async || {
        assert!(AssertUnwindSafe(book(&locks, End::WithPanic)).catch_unwind().await.is_err());
        Ok("went on")
    });
    is_rolled_back(&outcome.await);
    assert_eq!(balances(database).await, 0);
}

async fn a_panic_of_a_task_inside_is_ignored<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let paid = pay(&locks, End::Well, async || {
        let panicked = Late::start(&locks).await.end(End::WithPanic).await;
        assert!(panicked.unwrap_err().is_panic());
    });
    is_rolled_back(&paid.await);
    assert_eq!(balances(database).await, 0);
}

async fn a_call_inside_is_cut_short<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let outcome = around(&locks, async || {
        let cut = tokio::time::timeout(Duration::from_millis(50), book(&locks, End::Never)).await;
        assert!(cut.is_err());
        Ok("went on")
    });
    is_rolled_back(&outcome.await);
    let paid = pay(&locks, End::Well, async || {
        select! {
            biased;
            outcome = audit(&locks, End::Never) => panic!("{outcome:?}"),
            () = async {} => {}
        }
    });
    is_rolled_back(&paid.await);
    assert_eq!(balances(database).await, 0);
}

async fn an_error_inside_is_passed_on<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let outcome = around(&locks, async || {
        book(&locks, End::Well).await?;
        around(&locks, async || audit(&locks, End::WithError).await).await
    });
    failed_on_purpose(&outcome.await);
    assert_eq!(balances(database).await, 0);
    let outcome = around(&locks, async || {
        book(&locks, End::Well).await?;
        around(&locks, async || audit(&locks, End::Well).await).await
    });
    assert_eq!(outcome.await.unwrap(), "audited");
    assert_eq!(balances(database).await, 1);
}

/// Its body runs, because the lock is held. Its `Ok` is refused, because the transaction can't be
/// committed any more.
async fn a_call_inside_after_another_has_failed<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let outcome = around(&locks, async || {
        failed_on_purpose(&audit(&locks, End::WithError).await);
        failed_on_purpose(&audit(&locks, End::WithError).await);
        is_rolled_back(&book(&locks, End::Well).await);
        Ok("went on")
    });
    is_rolled_back(&outcome.await);
    assert_eq!(balances(database).await, 0);
}

#[distributed_lock("account", mode = row, locks = locks, lease = guard)]
async fn book_slowly<DB: Backend>(
    locks: Locks<DB>,
    entered: oneshot::Sender<()>,
    go_on: oneshot::Receiver<()>,
) -> Outcome {
    deposit::<DB>(guard).await;
    entered.send(()).unwrap();
    go_on.await.unwrap();
    deposit::<DB>(guard).await;
    Ok("booked")
}

async fn a_late_call_works_with_the_transaction<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let ((started, is_started), (go_on, gone_on)) = (oneshot::channel(), oneshot::channel());
    let mut outcome = pin!(around(&locks, async || {
        let (enter, entered) = oneshot::channel();
        let booking = book_slowly(locks.clone(), enter, gone_on);
        let booking = tokio::spawn(ReentryContext::current().unwrap().scope(booking));
        entered.await.unwrap();
        started.send(booking).unwrap();
        Ok(())
    }));
    let booking = body_of(outcome.as_mut(), is_started).await;
    go_on.send(()).unwrap();
    let (outcome, booked) = join!(outcome, booking);
    assert_eq!(((), "booked"), (outcome.unwrap(), booked.unwrap().unwrap()));
    assert_eq!(balances(database).await, 2);
}

async fn a_late_call_has_calls_inside<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    for (end, booked) in [(End::Well, 2), (End::WithError, 0)] {
        database.run("DELETE FROM account").await;
        let ((started, is_started), (go_on, gone_on)) = (oneshot::channel(), oneshot::channel::<()>());
        let mut paying = pin!(pay(&locks, End::Well, async || {
            let ((enter, entered), locks) = (oneshot::channel(), locks.clone());
            let late = async move {
                let outcome = around(&locks, async || {
                    enter.send(()).unwrap();
                    gone_on.await.unwrap();
                    // The body of `pay` has given the guard back.
                    let _swallowed = book(&locks, end).await;
                    Ok("late")
                });
                outcome.await
            };
            let late = tokio::spawn(ReentryContext::current().unwrap().scope(late));
            entered.await.unwrap();
            started.send(late).unwrap();
        }));
        let late = body_of(paying.as_mut(), is_started).await;
        go_on.send(()).unwrap();
        let (paid, late) = join!(paying, late);
        let late = late.unwrap();
        if matches!(end, End::Well) {
            assert_eq!((paid.unwrap(), late.unwrap()), ("paid", "late"));
        } else {
            is_rolled_back(&paid);
            is_rolled_back(&late);
        }
        assert_eq!(balances(database).await, booked);
    }
}

#[distributed_lock("account", mode = row, locks = locks, wait = "0s")]
async fn audit_at_once<DB: LockDatabase>(locks: &Locks<DB>) -> Outcome {
    Ok("audited")
}

/// Their bodies have not run.
async fn refused_calls_do_not_count<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let paid = pay(&locks, End::Well, async || {
        let refused = book(&locks, End::Well).await;
        assert!(
            matches!(&refused, Err(Failed::Lock(Error::Reentry { reason: NoReentry::GuardInUse, .. }))),
            "{refused:?}"
        );
        let late = Late::start(&locks).await;
        let refused = audit_at_once(&locks).await;
        assert!(
            matches!(&refused, Err(Failed::Lock(Error::Timeout { waiting_for: WaitingFor::Sibling, .. }))),
            "{refused:?}"
        );
        let mut waits = Box::pin(audit(&locks, End::Well));
        assert!(is_pending(waits.as_mut()).await);
        drop(waits);
        assert_eq!(late.end(End::Well).await.unwrap().unwrap(), "audited");
    });
    assert_eq!(paid.await.unwrap(), "paid");
    assert_eq!(balances(database).await, 1);
}

/// It may be polled only after the holder has returned, so the holder does not wait for it.
async fn a_call_that_is_returned_unfinished<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    // Made outside, so that it is still there when the holder has returned.
    let ((enter, entered), (end, ended)) = (oneshot::channel(), oneshot::channel());
    let mut audit = pin!(audit_slowly(&locks, enter, ended));
    let paid = pay(&locks, End::Well, async || {
        assert!(is_pending(audit.as_mut()).await);
        entered.await.unwrap();
    });
    is_rolled_back(&paid.await);
    assert!(!is_free(&locks).await, "the call inside holds the lock by itself");
    end.send(End::Well).unwrap();
    is_rolled_back(&audit.await);
    assert_eq!(balances(database).await, 0);
    assert!(is_free(&locks).await);

    // Part of what the body returns.
    let ((enter, _entered), (_end, ended)) = (oneshot::channel(), oneshot::channel());
    let outcome = around(&locks, async || {
        let mut audit = Box::pin(audit_slowly(&locks, enter, ended));
        assert!(is_pending(audit.as_mut()).await);
        Ok(audit)
    });
    is_rolled_back(&outcome.await.map(drop));
    assert_eq!(settled(database, &locks).await, 0);
}

async fn a_call_that_is_returned_and_continues_elsewhere<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let ((enter, _entered), (end, ended)) = (oneshot::channel(), oneshot::channel());
    let (started, is_started) = oneshot::channel();
    let mut paying = pin!(pay(&locks, End::Well, async || {
        let locks = locks.clone();
        let mut call = Box::pin(async move { audit_slowly(&locks, enter, ended).await });
        assert!(is_pending(call.as_mut()).await);
        let (poll, polled) = oneshot::channel();
        let task = tokio::spawn(async move {
            assert!(is_pending(call.as_mut()).await);
            poll.send(()).unwrap();
            call.await
        });
        polled.await.unwrap();
        started.send(task).unwrap();
    }));
    let task = body_of(paying.as_mut(), is_started).await;
    end.send(End::Well).unwrap();
    let (paid, audited) = join!(paying, task);
    assert_eq!((paid.unwrap(), audited.unwrap().unwrap()), ("paid", "audited"));
    assert_eq!(balances(database).await, 1);
}

/// It is not part of the body, so the holder can wait for it.
async fn a_call_beside_the_holder_in_one_task<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let ((give, given), (enter, entered)) = (oneshot::channel(), oneshot::channel());
    let ((end, ended), (body_ends, body_has_ended)) = (oneshot::channel(), oneshot::channel());
    let paying = pay(&locks, End::Well, async || {
        give.send(ReentryContext::current().unwrap()).unwrap();
        entered.await.unwrap();
        body_ends.send(()).unwrap();
    });
    let beside = async {
        let owner: ReentryContext = given.await.unwrap();
        owner.scope(audit_slowly(&locks, enter, ended)).await
    };
    let ends = async {
        body_has_ended.await.unwrap();
        end.send(End::Well).unwrap();
    };
    let (paid, audited, ()) = join!(paying, beside, ends);
    assert_eq!((paid.unwrap(), audited.unwrap()), ("paid", "audited"));
    assert_eq!(balances(database).await, 1);
}

#[distributed_lock("account", mode = row)]
async fn of_the_ambient_locks(work: impl AsyncFnOnce() -> Outcome) -> Outcome {
    work().await
}

#[distributed_lock("account", mode = row, skip)]
async fn maybe(work: impl AsyncFnOnce() -> Outcome) -> Result<Option<&'static str>, Failed> {
    work().await.map(Some)
}

async fn every_form_shares_the_transaction<T: TestDatabase>(database: &T) {
    let locks = with_account(database).await;
    let fails = async || {
        let _swallowed = of_the_ambient_locks(async || book(&locks, End::WithError).await).await;
        Ok("went on")
    };
    is_rolled_back(&locks.scope(of_the_ambient_locks(async || fails().await)).await);
    is_rolled_back(&locks.scope(maybe(async || fails().await)).await);
    is_rolled_back(&locks.scope(around(&locks, async || fails().await)).await);
    let skipped = around(&locks, async || {
        let skipped = maybe(async || {
            // The inner one is skipped, which is no failure.
            assert_eq!(maybe_beside(&locks).await?, None);
            Ok("done")
        });
        assert_eq!(skipped.await?, Some("done"));
        book(&locks, End::Well).await
    });
    assert_eq!(locks.scope(skipped).await.unwrap(), "booked");
    assert_eq!(balances(database).await, 1);
}

/// `maybe` beside another call inside.
async fn maybe_beside<DB: LockDatabase>(locks: &Locks<DB>) -> Result<Option<&'static str>, Failed> {
    let late = Late::start(locks).await;
    let skipped = maybe(async || panic!("must not run beside another one")).await?;
    assert_eq!(late.end(End::Well).await.unwrap()?, "audited");
    Ok(skipped)
}

#[distributed_lock("account", mode = row, tx = tx, locks = locks)]
async fn in_transaction<DB: Backend>(locks: &Locks<DB>, tx: &mut Transaction<'_, DB>, end: End) -> Outcome {
    deposit::<DB>(tx).await;
    end.reached("deposited").await
}

async fn the_transaction_of_the_caller_is_not_concerned<T: TestDatabase>(database: &T) {
    let (locks, pool) = (with_account(database).await, database.pool(1).await);
    let mut tx = pool.begin().await.unwrap();
    failed_on_purpose(&in_transaction(&locks, &mut tx, End::WithError).await);
    assert_eq!(in_transaction(&locks, &mut tx, End::Well).await.unwrap(), "deposited");
    tx.commit().await.unwrap();
    assert_eq!(balances(database).await, 2);
}

async fn a_failed_commit_is_reported_to_both<T: TestServer>(database: &T) {
    let locks = with_account(database).await;
    let (started, is_started) = oneshot::channel();
    let mut paying = pin!(pay(&locks, End::Well, async || drop(started.send(Late::start(&locks).await))));
    let late = body_of(paying.as_mut(), is_started).await;
    database.end_connections().await;
    let (paid, audited) = join!(paying, late.end(End::Well));
    // Where the commit is sent together with the check, it is unknown whether it was carried out.
    let told = |outcome: &Outcome| {
        matches!(
            outcome,
            Err(Failed::Lock(
                Error::Lost { reason: Loss::TransactionEnded, .. } | Error::CommitUnknown { .. }
            ))
        )
    };
    let audited = audited.unwrap();
    assert!(told(&paid) && told(&audited), "{paid:?}, {audited:?}");
    assert_eq!(settled(database, &locks).await, 0);
}

#[distributed_lock("account", mode = row, locks = locks, lease = guard)]
async fn exchanges<DB: Backend>(locks: &Locks<DB>) -> Outcome {
    let mut other = locks.row_lock("other").acquire().await?;
    deposit::<DB>(&mut other).await;
    std::mem::replace(guard, other).commit().await?;
    Ok("exchanged")
}

/// How its transaction ended is not known, and the transaction of the other guard is rolled back.
async fn a_guard_that_the_body_has_exchanged<T: TestServer>(database: &T) {
    let locks = with_account(database).await;
    let outcome = exchanges(&locks).await;
    assert!(
        matches!(&outcome, Err(Failed::Lock(Error::Lost { reason: Loss::TransactionEnded, .. }))),
        "{outcome:?}"
    );
    locks.row_lock("other").acquire().await.unwrap().rollback().await.unwrap();
    assert_eq!(balances(database).await, 0);
}
