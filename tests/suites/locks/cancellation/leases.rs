//! Requests for leases, and guarded transactions.

use super::*;

lock_tests::cases! {
    on every server:
    dropped_acquires_of_leases,
    dropped_waits_for_leases,
    dropped_releases_of_leases,
    dropped_runs_under_leases,
    dropped_begins_of_guarded_transactions,
    dropped_ends_of_guarded_transactions,
    dropped_statements_in_guarded_transactions,
}

async fn dropped_acquires_of_leases<T: TestServer>(database: &T) {
    let near = Scene::new(database).await.near;
    let acquiring = async |found: Lock, is_try: bool| {
        let scene = Scene::beside(database, &near);
        scene.connect().await;
        for moment in moments() {
            let name = format!("{found:?} {is_try} {moment}");
            if found == Lock::Free {
                scene.lease_is_free(&name).await;
            }
            let lock = || scene.locks.insert_lock(&name).ttl(TTL).wait(SOON);
            let taken = if is_try {
                scene.drop_after(moment, lock().try_acquire()).await.map(|taken| taken.unwrap().unwrap())
            } else {
                scene.drop_after(moment, lock().acquire()).await.map(Result::unwrap)
            };
            let has_ended = taken.is_some();
            drop(taken);
            scene.lease_is_free(&name).await;
            // The local permit is free again, too.
            lock().acquire().await.unwrap().release().await.unwrap();
            scene.drop_unread(2, lock().acquire()).await;
            scene.lease_is_free(&name).await;
            if has_ended {
                break;
            }
        }
        scene.pool_is_whole().await;
        scene
    };
    let scenes = tokio::join!(
        acquiring(Lock::New, false),
        acquiring(Lock::New, true),
        acquiring(Lock::Free, false),
        acquiring(Lock::Free, true),
    );
    scenes.0.nothing_goes_on().await;
}

async fn dropped_waits_for_leases<T: TestServer>(database: &T) {
    let scene = Scene::new(database).await;
    scene.locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    for moment in 0..8 {
        let acquiring = || scene.locks.insert_lock("a").ttl(TTL).wait(SOON).acquire();
        // Behind another request of the same process, which waits without messages, and behind
        // another process.
        for holder in [&scene.locks, &scene.near] {
            let held = holder.insert_lock("a").ttl(TTL).acquire().await.unwrap();
            let waiting = async { timeout(8 * DELAY, acquiring()).await.is_err() };
            assert_ne!(scene.drop_after(moment, waiting).await, Some(false), "it was held");
            held.release().await.unwrap();
            scene.lease_is_free("a").await;
        }
        // And when the holder releases it at the same time.
        let held = scene.near.insert_lock("a").ttl(TTL).acquire().await.unwrap();
        let (waited, released) = tokio::join!(scene.drop_after(moment + 2, acquiring()), held.release());
        released.unwrap();
        drop(waited.map(Result::unwrap));
        scene.lease_is_free("a").await;
    }
    scene.nothing_goes_on().await;
}

async fn dropped_releases_of_leases<T: TestServer>(database: &T) {
    let scene = Scene::new(database).await;
    for moment in moments() {
        let lease = scene.locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
        let released = scene.drop_after(moment, lease.release()).await;
        scene.lease_is_free("a").await;
        if let Some(released) = released {
            released.unwrap();
            break;
        }
    }
    scene.nothing_goes_on().await;
}

async fn dropped_runs_under_leases<T: TestServer>(database: &T) {
    let scene = Scene::new(database).await;
    scene.locks.insert_lock("a").acquire().await.unwrap().release().await.unwrap();
    scene.connect().await;
    for moment in moments() {
        let running = scene.locks.insert_lock("a").ttl(TTL).run(async |lease| {
            assert!(lease.is_held());
            let mut connection = scene.pool.acquire().await.unwrap();
            scene.write(&mut connection, &new_mark()).await.unwrap();
            Ok::<_, Error>(())
        });
        let ran = scene.drop_after(moment, running).await;
        scene.lease_is_free("a").await;
        scene.pool_is_whole().await;
        if let Some(ran) = ran {
            ran.unwrap();
            break;
        }
    }
    scene.nothing_goes_on().await;
}

// ---------------------------------------------------------------------------- guarded transactions

async fn dropped_begins_of_guarded_transactions<T: TestServer>(database: &T) {
    let scene = Scene::new(database).await;
    scene.connect().await;
    for moment in moments() {
        let lease = scene.locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
        let begun = scene.drop_after(moment, lease.begin()).await;
        let has_ended = begun.is_some();
        drop(begun.map(Result::unwrap));
        scene.pool_is_whole().await;
        // The transaction that the caller never got does not hold the lease.
        lease.release().await.unwrap();
        scene.lease_is_free("a").await;
        if has_ended {
            break;
        }
    }
    scene.nothing_goes_on().await;
}

async fn dropped_ends_of_guarded_transactions<T: TestServer>(database: &T) {
    let near = Scene::new(database).await.near;
    let ending = async |name: &str| {
        let scene = Scene::beside(database, &near);
        scene.connect().await;
        for moment in moments() {
            let mark = new_mark();
            let lease = scene.locks.insert_lock(name).ttl(TTL).acquire().await.unwrap();
            let mut transaction = lease.begin().await.unwrap();
            scene.write(&mut transaction, &mark).await.unwrap();
            let ended = match name {
                "commit" => scene.drop_after(moment, transaction.commit()).await,
                "roll back" => scene.drop_after(moment, transaction.rollback()).await,
                _ => {
                    let ended = scene.drop_after(moment, lease.commit_and_release(transaction)).await;
                    scene.lease_is_free(name).await;
                    scene.pool_is_whole().await;
                    assert_eq!(scene.seen(&mark).await, 1, "the commit goes on");
                    if ended.map(Result::unwrap).is_some() {
                        break;
                    }
                    continue;
                }
            };
            scene.pool_is_whole().await;
            assert_eq!(
                scene.seen(&mark).await,
                i64::from(name == "commit"),
                "{name} after {moment} messages"
            );
            lease.release().await.unwrap();
            scene.lease_is_free(name).await;
            if ended.map(Result::unwrap).is_some() {
                break;
            }
        }
        scene
    };
    let scenes = tokio::join!(ending("commit"), ending("roll back"), ending("commit and release"));
    scenes.0.nothing_goes_on().await;
}

/// A statement of the caller that fails on the server after it was dropped. The next statement gets
/// its error.
async fn dropped_statements_in_guarded_transactions<T: TestServer>(database: &T) {
    let near = Scene::new(database).await.near;
    let ending = async |name: &str| {
        let scene = Scene::beside(database, &near);
        scene.connect().await;
        let twice = new_mark();
        scene.write(&mut *scene.pool.acquire().await.unwrap(), &twice).await.unwrap();
        for moment in 0..4 {
            let mark = new_mark();
            let lease = scene.locks.insert_lock(name).ttl(TTL).acquire().await.unwrap();
            let mut transaction = lease.begin().await.unwrap();
            scene.write(&mut transaction, &mark).await.unwrap();
            if let Some(written) = scene.drop_after(moment, scene.write(&mut transaction, &twice)).await {
                written.expect_err("it is there already");
            }
            let mut is_kept = false;
            match name {
                "commit" => is_kept = transaction.commit().await.is_ok(),
                "roll back" => drop(transaction.rollback().await),
                _ => drop(transaction),
            }
            scene.pool_is_whole().await;
            assert_eq!(scene.seen(&mark).await, i64::from(is_kept), "{name} after {moment} messages");
            lease.release().await.unwrap();
            scene.lease_is_free(name).await;
        }
        scene
    };
    let scenes = tokio::join!(ending("commit"), ending("roll back"), ending("drop"));
    scenes.0.nothing_goes_on().await;
}
