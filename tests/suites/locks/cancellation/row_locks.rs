//! Row locks, in transactions of their own and of the caller.

use super::*;

lock_tests::cases! {
    on every server:
    dropped_acquires_on_new_connections,
    dropped_acquires_of_row_locks,
    dropped_ends_of_row_locks,
    dropped_row_locks_in_the_callers_transaction,
    dropped_vain_waits_in_the_callers_transaction,
    dropped_successful_waits_in_the_callers_transaction,
    a_dropped_waiter_leaves_the_server_within_its_slice,
}

/// From the first packet on: connecting and preparing are parts of an operation, too.
async fn dropped_acquires_on_new_connections<T: TestServer>(database: &T) {
    let near = Scene::new(database).await.near;
    let every_fourth = async |first: usize| {
        for moment in moments().skip(first).step_by(4) {
            let scene = Scene::beside(database, &near);
            let name = format!("lease {first}");
            let lease = scene.drop_after(moment, scene.locks.insert_lock(&name).ttl(TTL).acquire()).await;
            let mut has_ended = lease.is_some();
            drop(lease.map(Result::unwrap));
            scene.lease_is_free(&name).await;
            scene.finish().await;
            scene.lease_is_free(&name).await;

            let scene = Scene::beside(database, &near);
            let name = format!("row {first}");
            let guard = scene.drop_after(moment, scene.locks.row_lock(&name).acquire()).await;
            has_ended &= guard.is_some();
            drop(guard.map(Result::unwrap));
            scene.row_is_free(&name).await;
            scene.pool_is_whole().await;
            scene.finish().await;
            scene.row_is_free(&name).await;
            if has_ended {
                break;
            }
        }
    };
    tokio::join!(every_fourth(0), every_fourth(1), every_fourth(2), every_fourth(3));
    Scene::beside(database, &near).nothing_goes_on().await;
}

async fn dropped_acquires_of_row_locks<T: TestServer>(database: &T) {
    let near = Scene::new(database).await.near;
    let acquiring = async |found: Lock, is_try: bool| {
        let scene = Scene::beside(database, &near);
        scene.connect().await;
        for moment in moments() {
            let name = format!("{found:?} {is_try} {moment}");
            let held = match found {
                Lock::New => None,
                Lock::Free => {
                    scene.row_is_free(&name).await;
                    None
                }
                Lock::Held => Some(near.row_lock(&name).acquire().await.unwrap()),
            };
            // To the end of the wait.
            let lock = || scene.locks.row_lock(&name).wait(12 * DELAY);
            let taken = if is_try {
                scene.drop_after(moment, lock().try_acquire()).await
            } else {
                scene.drop_after(moment, async { lock().acquire().await.map(Some) }).await
            };
            let has_ended = taken.is_some();
            match taken.transpose() {
                Ok(taken) => {
                    assert_eq!(taken.is_some_and(|guard| guard.is_none()), has_ended && held.is_some())
                }
                Err(error) => assert!(matches!(error, Error::Timeout { .. }), "{error:?}"),
            }
            if let Some(held) = held {
                held.rollback().await.unwrap();
            }
            scene.row_is_free(&name).await;
            scene.drop_unread(2, lock().acquire()).await;
            scene.row_is_free(&name).await;
            scene.pool_is_whole().await;
            if has_ended {
                break;
            }
        }
        scene
    };
    let scenes = tokio::join!(
        acquiring(Lock::New, false),
        acquiring(Lock::New, true),
        acquiring(Lock::Free, false),
        acquiring(Lock::Free, true),
        acquiring(Lock::Held, false),
        acquiring(Lock::Held, true),
    );
    scenes.0.nothing_goes_on().await;
}

async fn dropped_ends_of_row_locks<T: TestServer>(database: &T) {
    let scene = Scene::new(database).await;
    for moment in moments() {
        let (kept, undone) = (new_mark(), new_mark());
        let mut guard = scene.locks.row_lock("a").acquire().await.unwrap();
        scene.write(&mut guard, &kept).await.unwrap();
        let committed = scene.drop_after(moment, guard.commit()).await;
        scene.row_is_free("a").await;
        assert_eq!(scene.seen(&kept).await, 1, "the commit goes on");

        let mut guard = scene.locks.row_lock("a").acquire().await.unwrap();
        scene.write(&mut guard, &undone).await.unwrap();
        let rolled_back = scene.drop_after(moment, guard.rollback()).await;
        scene.row_is_free("a").await;
        assert_eq!(scene.seen(&undone).await, 0);

        scene.pool_is_whole().await;
        scene.nothing_goes_on().await;
        if let (Some(committed), Some(rolled_back)) = (committed, rolled_back) {
            committed.unwrap();
            rolled_back.unwrap();
            break;
        }
    }
}

/// What the caller does with its transaction after it has dropped the future.
#[derive(Debug, Clone, Copy)]
enum Ending {
    RollBack,
    WriteAndRollBack,
    WriteAndCommit,
    Drop,
}

/// Runs a case with each ending, all at the same time, each in a scene of its own.
async fn with_each_ending<T: TestServer>(database: &T, case: impl AsyncFn(&Scene<'_, T>, Ending)) {
    let near = Scene::new(database).await.near;
    let with = async |ending| {
        let scene = Scene::beside(database, &near);
        scene.connect().await;
        case(&scene, ending).await;
        scene
    };
    let scenes = tokio::join!(
        with(Ending::RollBack),
        with(Ending::WriteAndRollBack),
        with(Ending::WriteAndCommit),
        with(Ending::Drop)
    );
    scenes.0.nothing_goes_on().await;
}

impl<T: TestServer> Scene<'_, T> {
    /// Writes in a transaction, takes a lock in it, drops that future at some moment, and ends the
    /// transaction. What the transaction wrote must be kept completely or not at all. Returns
    /// whether there was nothing left to drop.
    async fn drop_in_transaction<R>(
        &self,
        moment: usize,
        ending: Ending,
        lock: impl AsyncFnOnce(&mut Connection<T>) -> R,
    ) -> bool {
        let case = format!("dropped after {moment} messages, then {ending:?}");
        let (before, after) = (new_mark(), new_mark());
        let mut transaction = self.pool.begin().await.unwrap();
        self.write(&mut transaction, &before).await.unwrap();
        let has_ended = self.drop_after(moment, lock(&mut transaction)).await.is_some();

        match ending {
            Ending::RollBack => self.roll_back(transaction).await,
            Ending::WriteAndRollBack => {
                // The dropped future may have doomed the transaction, which then refuses this.
                let _ = timeout(SOON, self.write(&mut transaction, &after)).await.expect(&case);
                self.roll_back(transaction).await;
            }
            Ending::WriteAndCommit => {
                let written = timeout(SOON, self.write(&mut transaction, &after)).await.expect(&case);
                let committed = timeout(SOON, transaction.commit()).await.expect(&case);
                let seen = (self.seen(&before).await, self.seen(&after).await);
                let is_as_told = match (&written, &committed) {
                    (Ok(_), Ok(())) => seen == (1, 1),
                    (Err(_), Ok(())) => seen.1 == 0,
                    (_, Err(_)) => seen == (0, 0),
                };
                assert!(is_as_told, "{case}: kept {seen:?}; write {written:?}; commit {committed:?}");
            }
            Ending::Drop => drop(transaction),
        }
        self.pool_is_whole().await;
        if !matches!(ending, Ending::WriteAndCommit) {
            assert_eq!((self.seen(&before).await, self.seen(&after).await), (0, 0), "{case}");
        }
        has_ended
    }

    /// On MySQL and MariaDB the dropped statement may end with an error, which sqlx gives to the
    /// next statement. Then the transaction is rolled back when it is dropped.
    async fn roll_back(&self, transaction: Transaction<'_, T::Database>) {
        let rolled_back = timeout(SOON, transaction.rollback()).await.expect("the connection answers");
        if T::NAME == "postgres" {
            rolled_back.unwrap();
        }
    }
}

async fn dropped_row_locks_in_the_callers_transaction<T: TestServer>(database: &T) {
    with_each_ending(database, async |scene, ending| {
        // Its row has to be created.
        for moment in moments() {
            let name = format!("{ending:?} {moment}");
            let lock = async |tx: &mut _| scene.locks.row_lock(&name).acquire_in(tx).await.unwrap();
            let has_ended = scene.drop_in_transaction(moment, ending, lock).await;
            scene.row_is_free(&name).await;
            if has_ended {
                break;
            }
        }
        // Its row is known.
        let name = format!("{ending:?} 0");
        for moment in moments() {
            let lock = async |tx: &mut _| scene.locks.row_lock(&name).acquire_in(tx).await.unwrap();
            let has_ended = scene.drop_in_transaction(moment, ending, lock).await;
            scene.row_is_free(&name).await;
            let lock = async |tx: &mut _| scene.locks.row_lock(&name).try_acquire_in(tx).await.unwrap();
            scene.drop_in_transaction(moment, ending, lock).await;
            scene.row_is_free(&name).await;
            if has_ended {
                break;
            }
        }
    })
    .await;
}

async fn dropped_vain_waits_in_the_callers_transaction<T: TestServer>(database: &T) {
    with_each_ending(database, async |scene, ending| {
        let name = format!("{ending:?}");
        let held = scene.near.row_lock(&name).acquire().await.unwrap();
        for moment in moments() {
            let lock = scene.locks.row_lock(&name).wait(16 * DELAY);
            let waiting = async |tx: &mut _| {
                let waited = lock.acquire_in(tx).await;
                assert!(matches!(waited, Err(Error::Timeout { .. })), "{waited:?}");
            };
            if scene.drop_in_transaction(moment, ending, waiting).await {
                break;
            }
        }
        held.rollback().await.unwrap();
        scene.row_is_free(&name).await;
    })
    .await;
}

async fn dropped_successful_waits_in_the_callers_transaction<T: TestServer>(database: &T) {
    with_each_ending(database, async |scene, ending| {
        let name = format!("{ending:?}");
        for moment in moments() {
            let held = scene.near.row_lock(&name).acquire().await.unwrap();
            let (alive, mut gone) = oneshot::channel::<()>();
            let waiting = async |tx: &mut _| {
                let _alive = alive;
                scene.locks.row_lock(&name).acquire_in(tx).await.unwrap()
            };
            // The holder ends when the request waits, or has been dropped before that.
            let ending_of_holder = async {
                while gone.try_recv() == Err(TryRecvError::Empty)
                    && scene.database.activity().await.waiting == 0
                {
                    sleep(Duration::from_millis(1)).await;
                }
                held.rollback().await.unwrap();
            };
            let (has_ended, ()) =
                tokio::join!(scene.drop_in_transaction(moment, ending, waiting), ending_of_holder);
            scene.row_is_free(&name).await;
            if has_ended {
                break;
            }
        }
    })
    .await;
}

async fn a_dropped_waiter_leaves_the_server_within_its_slice<T: TestServer>(database: &T) {
    let scene = Scene::new(database).await;
    let held = scene.near.row_lock("a").acquire().await.unwrap();
    let mut transaction = scene.pool.begin().await.unwrap();
    let wait = Duration::from_mins(1);
    {
        let mut waiting = pin!(scene.locks.row_lock("a").wait(wait).acquire());
        let mut waiting_in = pin!(scene.locks.row_lock("a").wait(wait).acquire_in(&mut transaction));
        tokio::select! {
            taken = &mut waiting => panic!("it is held: {taken:?}"),
            taken = &mut waiting_in => panic!("it is held: {taken:?}"),
            () = eventually(SOON, async || database.activity().await.waiting == 2) => {}
        }
    }
    scene.roll_back(transaction).await;
    eventually(SOON, async || {
        let activity = database.activity().await;
        (activity.transactions, activity.waiting) == (1, 0)
    })
    .await;
    scene.pool_is_whole().await;
    held.rollback().await.unwrap();
    scene.row_is_free("a").await;
}
