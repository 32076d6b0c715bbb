//! Row locks that are entered again.

use super::*;

lock_tests::cases! {
    on every database:
    row_locks_are_entered_again,
    siblings_in_a_row_lock_take_turns,
    a_holder_of_a_row_lock_waits_for_the_calls_inside,
    row_locks_of_the_callers_transaction_have_no_scopes,
    the_other_kind_of_lock_is_refused_inside_too;

    without a database:
    an_owner_crosses_threads,
}

#[distributed_lock("row", mode = row, locks = locks)]
pub(super) async fn in_row<DB: LockDatabase, R>(
    locks: &Locks<DB>,
    work: impl AsyncFnOnce() -> Result<R, Error>,
) -> Result<R, Error> {
    work().await
}

#[distributed_lock("row", mode = row, locks = locks, wait = "60s")]
pub(super) async fn visit_row<DB: LockDatabase>(locks: &Locks<DB>, room: &Room) -> Result<(), Error> {
    room.visit().await;
    Ok(())
}

#[distributed_lock("row", mode = row, locks = locks)]
async fn recursive_row<DB: LockDatabase>(locks: &Locks<DB>, depth: usize) -> Result<usize, Error> {
    match depth {
        1 => Ok(1),
        _ => Ok(1 + Box::pin(recursive_row(locks, depth - 1)).await?),
    }
}

async fn row_is_free<T: TestDatabase>(locks: &Locks<T::Database>) -> bool {
    !is_taken::<T, _>(locks.row_lock("row").try_acquire().await)
}

/// With a pool of one connection: entering again needs none.
async fn row_locks_are_entered_again<T: TestDatabase>(database: &T) {
    let other = database.locks().await;
    let locks = Locks::new(database.pool(1).await);
    assert_eq!(recursive_row(&locks, 20).await.unwrap(), 20);
    in_row(&locks, async || {
        assert_eq!(recursive_row(&locks, 3).await?, 3);
        assert!(!row_is_free::<T>(&other).await);
        Ok(())
    })
    .await
    .unwrap();
    assert!(row_is_free::<T>(&other).await);
}

async fn siblings_in_a_row_lock_take_turns<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let room = Room::default();
    in_row(&locks, async || {
        tokio::try_join!(visit_row(&locks, &room), visit_row(&locks, &room), visit_row(&locks, &room))?;
        let visits: Vec<_> =
            stream::iter(0..20).map(|_| visit_row(&locks, &room)).buffer_unordered(5).collect().await;
        visits.into_iter().collect::<Result<Vec<()>, Error>>()?;
        visit_row(&locks, &room).await
    })
    .await
    .unwrap();
    assert_eq!(room.visits(), 24);
    assert!(row_is_free::<T>(&other).await);
    // A call that is dropped lets the next one in, but its part of the work is missing.
    let dropped = in_row(&locks, async || {
        let endless = in_row(&locks, async || {
            std::future::pending::<()>().await;
            Ok(())
        });
        select! {
            biased;
            _ = endless => panic!("it never ends"),
            () = yield_now() => {}
        }
        let visited = visit_row(&locks, &room).await;
        assert!(matches!(visited, Err(Error::RolledBack { .. })), "{visited:?}");
        Ok(())
    });
    let dropped = dropped.await;
    assert!(matches!(dropped, Err(Error::RolledBack { .. })), "{dropped:?}");
    assert_eq!(room.visits(), 25);
    assert!(row_is_free::<T>(&other).await);
}

/// How the transaction ends: see `macro_forms::outcomes`.
async fn a_holder_of_a_row_lock_waits_for_the_calls_inside<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let (entered, has_entered) = oneshot::channel();
    let (finish, finished) = oneshot::channel::<()>();
    let (body_ends, body_has_ended) = oneshot::channel();
    let mut holder = pin!(in_row(&locks, async || {
        let owner = ReentryContext::current().unwrap();
        let carried = locks.clone();
        let straggler = tokio::spawn(owner.scope(async move {
            in_row(&carried, async || {
                entered.send(()).unwrap();
                finished.await.unwrap();
                recursive_row(&carried, 2).await
            })
            .await
        }));
        has_entered.await.unwrap();
        body_ends.send(()).unwrap();
        Ok((owner, straggler))
    }));
    select! {
        biased;
        _ = &mut holder => panic!("a call inside is still under way"),
        ended = body_has_ended => ended.unwrap(),
    }
    assert!(!row_is_free::<T>(&other).await, "a call inside holds the lock by itself");
    finish.send(()).unwrap();
    let (owner, straggler) = holder.await.unwrap();
    assert!(row_is_free::<T>(&other).await);
    assert_eq!(straggler.await.unwrap().unwrap(), 2);
    let error = owner.scope(recursive_row(&locks, 1)).await.unwrap_err();
    assert!(matches!(error, Error::Reentry { .. }), "{error:?}");
}

#[distributed_lock("row", mode = row, tx = tx, locks = locks, wait = "200ms")]
async fn in_transaction<DB: LockDatabase>(
    locks: &Locks<DB>,
    tx: &mut sqlx::Transaction<'_, DB>,
    depth: usize,
) -> Result<usize, Error> {
    match depth {
        1 => Ok(1),
        _ => Ok(1 + Box::pin(in_transaction(locks, tx, depth - 1)).await?),
    }
}

async fn row_locks_of_the_callers_transaction_have_no_scopes<T: TestDatabase>(database: &T) {
    let (locks, pool) = (database.locks().await, database.pool(2).await);
    let mut tx = pool.begin().await.unwrap();
    // The database itself is re-entrant.
    assert_eq!(in_transaction(&locks, &mut tx, 5).await.unwrap(), 5);
    assert!(!row_is_free::<T>(&locks).await);
    // A scope of another lock does not interfere.
    let inside = locks.insert_lock("a").run(async |_| in_transaction(&locks, &mut tx, 2).await);
    if T::NAME == "sqlite" {
        // The transaction has the only write lock, so nothing else can be taken.
        drop(inside);
    } else {
        assert_eq!(inside.await.unwrap(), 2);
    }
    tx.commit().await.unwrap();
    assert!(row_is_free::<T>(&locks).await);
    // Another transaction is another holder. This is also true for a caller that holds the row in a
    // transaction of its own.
    in_row(&locks, async || {
        let mut tx = pool.begin().await.unwrap();
        let error = in_transaction(&locks, &mut tx, 1).await.unwrap_err();
        assert!(matches!(error, Error::Timeout { waiting_for: WaitingFor::Lock, .. }), "{error:?}");
        Ok(())
    })
    .await
    .unwrap();
}

#[distributed_lock("a", mode = row, locks = locks)]
async fn as_row<DB: LockDatabase>(locks: &Locks<DB>) -> Result<(), Error> {
    let _ = locks;
    Ok(())
}

async fn the_other_kind_of_lock_is_refused_inside_too<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    locks
        .insert_lock("a")
        .run(async |_| {
            let error = as_row(&locks).await.unwrap_err();
            assert!(matches!(error, Error::WrongKind { .. }), "{error:?}");
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
}

// ----------------------------------------------------------------------------------- what compiles

fn an_owner_crosses_threads() {
    fn crosses<T: Clone + std::fmt::Debug + Send + Sync + 'static>() {}
    crosses::<ReentryContext>();
}

/// Never called: the test is that it compiles.
#[allow(dead_code)]
fn futures_are_send(locks: &Locks<Postgres>, owner: &ReentryContext, room: &Room) {
    fn is_send<T: Send>(_: T) {}
    fn is_static<T: Send + 'static>(_: T) {}
    is_send(owner.scope(visit(locks, room)));
    is_static(owner.scope(async {}));
    is_send(recursive(locks, 1));
    is_send(recursive_row(locks, 1));
    is_send(nested(locks, VAIN));
}

/// Not all connections can be shared between threads; the futures of the holders are `Send`
/// nevertheless.
#[allow(dead_code)]
fn futures_are_send_on_sqlite(locks: &Locks<Sqlite>, room: &Room) {
    fn is_send<T: Send>(_: T) {}
    is_send(visit_row(locks, room));
    is_send(recursive_row(locks, 1));
}
