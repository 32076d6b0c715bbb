//! Tasks and futures inside and outside of a holder, and owners that are carried to them.

use super::*;

lock_tests::cases! {
    on every database:
    a_spawned_task_contends,
    a_future_made_inside_and_awaited_outside_contends,
    an_owner_that_is_carried_enters,
    an_owner_does_not_outlive_the_lease,
    an_owner_lives_as_long_as_the_lease,
    a_call_that_outlives_the_holder_keeps_the_lock,
    a_lock_that_is_lost_is_not_entered,
    a_lock_that_a_transaction_has_released_is_not_entered,
    guarded_transactions_of_inner_calls_are_of_the_same_lease,
}

async fn a_spawned_task_contends<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let (token, spawned) = locks
        .insert_lock("a")
        .run(async |lease| {
            let contender = locks.clone();
            let contending = tokio::spawn(async move {
                assert!(ReentryContext::current().is_none());
                nested(&contender, VAIN).await
            });
            let error = contending.await.unwrap().unwrap_err();
            assert!(matches!(error, Error::Timeout { waiting_for: WaitingFor::Lock, .. }), "{error:?}");
            let waiter = locks.clone();
            let waiting = tokio::spawn(async move { nested(&waiter, PATIENCE).await });
            Ok::<_, Error>((lease.fencing_token(), waiting))
        })
        .await
        .unwrap();
    let (later, _, count) = spawned.await.unwrap().unwrap();
    assert!(later > token);
    assert_eq!(count, 1);
}

async fn a_future_made_inside_and_awaited_outside_contends<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let made = locks
        .insert_lock("a")
        .run(async |lease| Ok::<_, Error>((lease.fencing_token(), annotated(&locks, PATIENCE))));
    let (token, late) = made.await.unwrap();
    let (later, _, count) = late.await.unwrap();
    assert!(later > token);
    assert_eq!(count, 2);
}

async fn an_owner_that_is_carried_enters<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let room = Room::default();
    locks
        .insert_lock("a")
        .run(async |lease| {
            let owner = ReentryContext::current().unwrap();
            let mut carried = JoinSet::new();
            for _ in 0..8 {
                let (locks, room) = (locks.clone(), room.clone());
                carried.spawn(owner.scope(async move {
                    visit(&locks, &room).await?;
                    annotated(&locks, PATIENCE).await
                }));
            }
            visit(&locks, &room).await?;
            while let Some(entered) = carried.join_next().await {
                assert_eq!(entered.unwrap()?, (seen(lease).0, seen(lease).1, 3));
            }
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert_eq!(room.visits(), 9);
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
}

async fn an_owner_does_not_outlive_the_lease<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let owner = locks
        .insert_lock("a")
        .run(async |_| Ok::<_, Error>(ReentryContext::current().unwrap()))
        .await
        .unwrap();
    // A reentry context holds nothing.
    let held = other.insert_lock("a").try_acquire().await.unwrap().expect("it is free");
    let carried = locks.clone();
    let task = tokio::spawn(
        owner.scope(async move { [nested(&carried, PATIENCE).await, annotated(&carried, PATIENCE).await] }),
    );
    for entered in task.await.unwrap() {
        let error = entered.unwrap_err();
        assert!(matches!(error, Error::Reentry { .. }), "{error:?}");
        assert_eq!(error.name(), Some("a"));
    }
    held.release().await.unwrap();
    // It does not come back with a new holder either.
    locks
        .insert_lock("a")
        .run(async |lease| {
            let carried = locks.clone();
            let task = tokio::spawn(owner.scope(async move { nested(&carried, PATIENCE).await }));
            assert!(matches!(task.await.unwrap(), Err(Error::Reentry { .. })));
            assert_eq!(lease.hold_count(), 1);
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
}

async fn an_owner_lives_as_long_as_the_lease<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let kept = locks
        .insert_lock("a")
        .run(async |lease| Ok::<_, Error>((ReentryContext::current().unwrap(), lease.reenter()?)));
    let (owner, lease) = kept.await.unwrap();
    assert!(lease.is_held());
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_none());
    assert_eq!(owner.scope(nested(&locks, PATIENCE)).await.unwrap(), (seen(&lease).0, seen(&lease).1, 2));
    lease.release().await.unwrap();
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
    assert!(matches!(owner.scope(nested(&locks, PATIENCE)).await, Err(Error::Reentry { .. })));
}

async fn a_call_that_outlives_the_holder_keeps_the_lock<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let (entered, has_entered) = oneshot::channel();
    let (finish, finished) = oneshot::channel::<()>();
    let holder = locks.insert_lock("a").ttl(Duration::from_secs(2)).run(async |_| {
        let carried = locks.clone();
        let straggler = tokio::spawn(ReentryContext::current().unwrap().scope(async move {
            let inside = carried.insert_lock("a").run(async |lease| {
                entered.send(()).unwrap();
                finished.await.unwrap();
                assert!(lease.is_held());
                // Deeper nesting still works.
                nested(&carried, Duration::ZERO).await
            });
            inside.await
        }));
        has_entered.await.unwrap();
        Ok::<_, Error>(straggler)
    });
    let straggler = holder.await.unwrap();
    // For longer than its TTL: it is renewed, too.
    let error = other.insert_lock("a").wait(Duration::from_secs(3)).acquire().await.unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    finish.send(()).unwrap();
    assert_eq!(straggler.await.unwrap().unwrap().2, 2);
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
}

const TAKE_OVER: &str =
    "UPDATE distributed_lock SET secret_key = 'somebody else', fencing_token = fencing_token + 1
    WHERE lock_name = 'a'";

async fn a_lock_that_is_lost_is_not_entered<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let (go_on, gone_on) = oneshot::channel::<()>();
    let mut carried = None;
    let ran = locks
        .insert_lock("a")
        .ttl(Duration::from_secs(3))
        .run(async |lease| {
            let task_locks = locks.clone();
            carried = Some(tokio::spawn(ReentryContext::current().unwrap().scope(async move {
                gone_on.await.unwrap();
                nested(&task_locks, PATIENCE).await
            })));
            assert_eq!(database.run(TAKE_OVER).await, 1);
            lease.lost().await;
            for entered in [nested(&locks, PATIENCE).await, annotated(&locks, PATIENCE).await] {
                let error = entered.unwrap_err();
                assert!(matches!(error, Error::Lost { reason: Loss::TakenOver, .. }), "{error:?}");
            }
            Ok::<_, Error>(())
        })
        .await;
    assert!(matches!(ran, Err(Error::Lost { .. })), "{ran:?}");
    go_on.send(()).unwrap();
    let error = carried.unwrap().await.unwrap().unwrap_err();
    assert!(matches!(error, Error::Lost { reason: Loss::TakenOver, .. }), "{error:?}");
}

async fn a_lock_that_a_transaction_has_released_is_not_entered<T: TestDatabase>(database: &T) {
    let (locks, pool) = (database.locks().await, database.pool(2).await);
    locks
        .insert_lock("a")
        .run(async |lease| {
            let mut transaction = pool.begin().await.unwrap();
            lease.release_in(&mut transaction).await?;
            assert!(matches!(nested(&locks, PATIENCE).await, Err(Error::Lost { .. })), "nobody knows yet");
            transaction.commit().await.unwrap();
            assert!(matches!(nested(&locks, PATIENCE).await, Err(Error::Lost { .. })));
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert_eq!(nested(&locks, PATIENCE).await.unwrap().2, 1);
}

async fn guarded_transactions_of_inner_calls_are_of_the_same_lease<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let mut open = None;
    locks
        .insert_lock("a")
        .run(async |lease| {
            let inner = locks.insert_lock("a").run(async |inner| inner.begin().await);
            open = Some(inner.await?);
            assert_eq!(lease.hold_count(), 1, "a transaction is no handle");
            assert_eq!(nested(&locks, PATIENCE).await?.2, 2);
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert!(other.insert_lock("a").try_acquire().await.is_ok_and(|lease| lease.is_none()));
    open.unwrap().commit().await.unwrap();
    becomes_free(&other, "a").await;
}
