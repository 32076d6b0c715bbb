//! Calls inside of one holder that run side by side.

use super::*;

lock_tests::cases! {
    on every database:
    joined_siblings_take_turns,
    joined_siblings_take_turns_on_one_thread (current_thread),
    buffered_siblings_take_turns,
    a_loop_over_a_buffer_enters_too,
    siblings_of_many_holders_exclude_each_other,
    a_sibling_that_is_dropped_leaves_nothing_behind,
    a_holder_that_is_dropped_leaves_nothing_behind,
    a_wait_for_a_sibling_ends,
}

async fn joined_siblings_take_turns<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let room = Room::default();
    locks
        .insert_lock("a")
        .run(async |lease| {
            tokio::try_join!(visit(&locks, &room), visit(&locks, &room), visit(&locks, &room))?;
            let (first, second, third) = tokio::try_join!(
                nested(&locks, PATIENCE),
                annotated(&locks, PATIENCE),
                recursive(&locks, 2)
            )?;
            assert_eq!((first.2, second.2, third.2), (2, 3, 4), "siblings don't count for each other");
            assert!([first.0, second.0, third.0].iter().all(|token| *token == lease.fencing_token()));
            assert!(other.insert_lock("a").try_acquire().await?.is_none());
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert_eq!(room.visits(), 3);
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
}

async fn joined_siblings_take_turns_on_one_thread<T: TestDatabase>(database: &T) {
    joined_siblings_take_turns(database).await;
}

async fn buffered_siblings_take_turns<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let room = Room::default();
    locks
        .insert_lock("a")
        .run(async |_| {
            let visits: Vec<_> =
                stream::iter(0..50).map(|_| visit(&locks, &room)).buffer_unordered(5).collect().await;
            visits.into_iter().collect::<Result<Vec<()>, Error>>()
        })
        .await
        .unwrap();
    assert_eq!(room.visits(), 50);
}

/// The stream is not polled while the loop runs its body.
async fn a_loop_over_a_buffer_enters_too<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    let room = Room::default();
    locks
        .insert_lock("a")
        .run(async |_| {
            let mut visits = pin!(stream::iter(0..20).map(|_| visit(&locks, &room)).buffer_unordered(5));
            while let Some(visited) = visits.next().await {
                visited?;
                visit(&locks, &room).await?;
            }
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert_eq!(room.visits(), 40);
}

async fn siblings_of_many_holders_exclude_each_other<T: TestDatabase>(database: &T) {
    let all = [database.locks().await, other(database).await];
    let room = Room::default();
    let mut holders = JoinSet::new();
    for holder in 0..8 {
        let (locks, room) = (all[holder % 2].clone(), room.clone());
        holders.spawn(async move {
            locks
                .insert_lock("a")
                .wait(PATIENCE)
                .run(async |_| {
                    tokio::try_join!(visit(&locks, &room), visit(&locks, &room), async {
                        let below = locks
                            .insert_lock("a")
                            .wait(PATIENCE)
                            .run(async |_| tokio::try_join!(visit(&locks, &room), visit(&locks, &room)));
                        below.await
                    })
                })
                .await
                .unwrap();
        });
    }
    while let Some(holder) = holders.join_next().await {
        holder.unwrap();
    }
    assert_eq!(room.visits(), 8 * 4);
}

async fn a_sibling_that_is_dropped_leaves_nothing_behind<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let room = Room::default();
    locks
        .insert_lock("a")
        .run(async |lease| {
            let endless = async || {
                locks
                    .insert_lock("a")
                    .wait(PATIENCE)
                    .run(async |_| {
                        std::future::pending::<()>().await;
                        Ok::<_, Error>(())
                    })
                    .await
            };
            for _ in 0..10 {
                // One inside and one in the queue, both dropped.
                select! {
                    biased;
                    _ = endless() => panic!("it never ends"),
                    _ = endless() => panic!("it never ends"),
                    () = yield_now() => {}
                }
                assert_eq!(lease.hold_count(), 1);
                visit(&locks, &room).await?;
            }
            assert_eq!(nested(&locks, Duration::ZERO).await?.2, 2);
            assert!(other.insert_lock("a").try_acquire().await?.is_none());
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
    assert!(other.insert_lock("a").try_acquire().await.unwrap().is_some());
}

async fn a_holder_that_is_dropped_leaves_nothing_behind<T: TestDatabase>(database: &T) {
    let (locks, other) = (database.locks().await, other(database).await);
    let (entered, has_entered) = oneshot::channel();
    let holder = locks.insert_lock("a").run(async |_| {
        let inside = locks.insert_lock("a").run(async |_| {
            entered.send(()).unwrap();
            std::future::pending::<()>().await;
            Ok::<_, Error>(())
        });
        tokio::try_join!(inside, annotated(&locks, PATIENCE), annotated(&locks, PATIENCE))
    });
    select! {
        _ = holder => panic!("it never ends"),
        entered = has_entered => entered.unwrap(),
    }
    becomes_free(&other, "a").await;
}

async fn a_wait_for_a_sibling_ends<T: TestDatabase>(database: &T) {
    let locks = database.locks().await;
    locks
        .insert_lock("a")
        .run(async |_| {
            let endless = locks.insert_lock("a").run(async |_| {
                std::future::pending::<()>().await;
                Ok::<_, Error>(())
            });
            let waiting = async {
                for wait in [VAIN, Duration::ZERO] {
                    for attempt in [nested(&locks, wait).await, annotated(&locks, wait).await] {
                        let error = attempt.unwrap_err();
                        let Error::Timeout { waiting_for: WaitingFor::Sibling, waited, .. } = error else {
                            panic!("{error:?}");
                        };
                        assert!(waited >= wait);
                        assert!(error.is_retryable());
                    }
                }
            };
            let started = Instant::now();
            select! {
                biased;
                _ = endless => panic!("it never ends"),
                () = waiting => {}
            }
            assert!(started.elapsed() >= 2 * VAIN);
            Ok::<_, Error>(())
        })
        .await
        .unwrap();
}
