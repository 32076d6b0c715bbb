//! Migrations, `close`, and guards that are dropped before it or outlive their runtime.

use super::*;

lock_tests::cases! {
    on every server:
    dropped_migrations,
    dropped_closes,
    close_waits_for_dropped_guards,
    guards_outlive_their_runtime,
}

async fn dropped_migrations<T: TestServer>(database: &T) {
    let scene = Scene::new(database).await;
    scene.connect().await;
    for moment in moments() {
        database.run("DROP TABLE distributed_lock").await;
        database.run("DROP TABLE _lock_db_migrations").await;
        let migrated = scene.drop_after(moment, scene.locks.migrate()).await;
        // The migration continues without the future, and leaves nothing locked that the next one
        // would wait for.
        eventually(SOON, async || scene.near.check().await.is_ok()).await;
        timeout(SOON, scene.near.migrate()).await.expect("nothing is locked").unwrap();
        scene.nothing_goes_on().await;
        if let Some(migrated) = migrated {
            migrated.unwrap();
            break;
        }
    }
}

async fn dropped_closes<T: TestServer>(database: &T) {
    let near = Scene::new(database).await.near;
    for moment in moments() {
        let scene = Scene::beside(database, &near);
        let leases = [
            scene.locks.insert_lock("a").ttl(TTL).acquire().await.unwrap(),
            scene.locks.insert_lock("b").ttl(TTL).acquire().await.unwrap(),
        ];
        let closed = scene.drop_after(moment, scene.locks.close()).await;
        if closed.is_some() {
            assert!(near.insert_lock("a").try_acquire().await.unwrap().is_some(), "closed, so it is free");
            assert!(near.insert_lock("b").try_acquire().await.unwrap().is_some(), "closed, so it is free");
        }
        scene.lease_is_free("a").await;
        scene.lease_is_free("b").await;
        // The connections of the session end, too. The application's own connections were never
        // opened.
        eventually(SOON, async || scene.proxy.open() == 0).await;
        for lease in leases {
            lease.lost().await;
        }
        if closed.is_some() {
            break;
        }
    }
}

/// A service drops what it holds, closes its `Locks` and ends its process. After that there would
/// be no process left to release anything.
async fn close_waits_for_dropped_guards<T: TestServer>(database: &T) {
    let near = Scene::new(database).await.near;
    for moment in 0..8 {
        let scene = Scene::beside(database, &near);
        let lease = scene.locks.insert_lock("a").ttl(TTL).acquire().await.unwrap();
        scene.set_delay(DELAY);
        let last = scene.messages() + moment.min(2);
        drop(lease);
        scene.carried(last).await;
        scene.locks.close().await;
        let taken = near.insert_lock("a").try_acquire().await.unwrap();
        taken.expect("close came back before the release").release().await.unwrap();

        let scene = Scene::beside(database, &near);
        scene.locks.check().await.unwrap();
        let acquired = scene.drop_after(moment, scene.locks.insert_lock("a").ttl(TTL).acquire()).await;
        drop(acquired.map(Result::unwrap));
        scene.set_delay(DELAY);
        scene.locks.close().await;
        let taken = near.insert_lock("a").try_acquire().await.unwrap();
        taken.expect("close came back before the acquire was undone").release().await.unwrap();
    }
}

/// Takes a lease and a row lock in a runtime that is gone when they are returned.
fn guards_of_a_dead_runtime<T: TestServer>(
    url: String,
) -> (Lease<T::Database>, RowGuard<T::Database>, Locks<T::Database>) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let guards = runtime.block_on(async {
        let locks = Locks::new(lock_tests::pool(&url, POOL).await);
        let lease = locks.insert_lock("lease").ttl(TTL).acquire().await.unwrap();
        (lease, locks.row_lock("row").acquire().await.unwrap(), locks)
    });
    runtime.shutdown_timeout(SOON);
    guards
}

async fn guards_outlive_their_runtime<T: TestServer>(database: &T) {
    let scene = Scene::new(database).await;
    // Dropped outside of any runtime, while their own is alive.
    let lease = scene.locks.insert_lock("lease").ttl(TTL).acquire().await.unwrap();
    let guard = scene.locks.row_lock("row").acquire().await.unwrap();
    std::thread::spawn(move || drop((guard, lease))).join().expect("dropping a guard panics nowhere");
    scene.lease_is_free("lease").await;
    scene.row_is_free("row").await;
    scene.pool_is_whole().await;

    // Dropped outside of any runtime, when their own is gone.
    let url = database.url().to_owned();
    let dropped = std::thread::spawn(move || drop(guards_of_a_dead_runtime::<T>(url)));
    tokio::task::spawn_blocking(|| dropped.join()).await.unwrap().expect("dropping a guard panics nowhere");
    scene.lease_is_free("lease").await;
    scene.row_is_free("row").await;

    // Ended in another runtime. A lease works there. A connection of the application is unusable
    // without its runtime: a quick answer may still arrive, and otherwise it is unknown whether the
    // commit was carried out.
    let url = database.url().to_owned();
    let handed_out = std::thread::spawn(move || guards_of_a_dead_runtime::<T>(url));
    let (lease, guard, locks) =
        tokio::task::spawn_blocking(|| handed_out.join()).await.unwrap().expect("no panic");
    assert!(lease.is_held());
    lease.release().await.unwrap();
    match guard.commit().await {
        Ok(()) => {}
        Err(error @ Error::CommitUnknown { .. }) => {
            assert!(error.to_string().contains("the runtime that made the connection has ended"), "{error}");
            assert!(!error.is_retryable());
        }
        Err(error) => panic!("{error:?}"),
    }
    scene.lease_is_free("lease").await;
    scene.row_is_free("row").await;
    locks.insert_lock("lease").acquire().await.unwrap().release().await.unwrap();
    scene.nothing_goes_on().await;
}
