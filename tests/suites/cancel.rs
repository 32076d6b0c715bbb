//! Futures that are dropped at any moment, over a slow network, leak nothing: no lock, no open
//! transaction, no waiter, no slot of the application's pool. All leases here last for minutes. So
//! a lock that is soon free again was released and did not expire.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use lock_db::{Error, Lease, Locks, RowGuard};
use lock_tests::{Backend, Direction, Proxy, TestServer, eventually, for_each_server};
use sqlx::pool::PoolOptions;
use sqlx::{Pool, Transaction};
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::time::{sleep, timeout};

for_each_server! {
    acquiring_a_lease,
    waiting_for_a_lease,
    releasing_a_lease,
    running_under_a_lease,
    beginning_a_guarded_transaction,
    ending_a_guarded_transaction,
    a_statement_in_a_guarded_transaction,
    acquiring_on_a_new_connection,
    acquiring_a_row_lock,
    ending_a_row_lock,
    locking_a_row_in_the_callers_transaction,
    waiting_in_vain_in_the_callers_transaction,
    waiting_with_success_in_the_callers_transaction,
    a_dropped_waiter_leaves_the_server_within_its_slice,
    migrating,
    closing,
    closing_waits_for_what_was_dropped_before,
    guards_outlive_their_runtime,
}

/// One way. It makes every moment of an operation long enough to drop the future in it.
const DELAY: Duration = Duration::from_millis(5);
/// How soon everything that was dropped must be free again.
const SOON: Duration = Duration::from_secs(5);
/// No operation here takes this many messages.
const MOST_MOMENTS: usize = 100;
const TTL: Duration = Duration::from_mins(10);
/// The slots of the application's pool.
const POOL: u32 = 2;

type Connection<T> = <<T as lock_tests::TestDatabase>::Database as sqlx::Database>::Connection;

/// An application that is far away from its database, and a `Locks` near the database that sees
/// what the application leaves there.
struct Scene<'a, T: TestServer> {
    database: &'a T,
    near: Locks<T::Database>,
    proxy: Proxy,
    pool: Pool<T::Database>,
    locks: Locks<T::Database>,
}

impl<'a, T: TestServer> Scene<'a, T> {
    async fn new(database: &'a T) -> Self {
        let near = database.locks().await;
        database.run("CREATE TABLE marks (mark VARCHAR(40) PRIMARY KEY)").await;
        Self::beside(database, &near)
    }

    /// Another application, without any connection yet.
    fn beside(database: &'a T, near: &Locks<T::Database>) -> Self {
        let proxy = database.proxy();
        let pool = PoolOptions::new()
            .max_connections(POOL)
            .acquire_timeout(Duration::from_mins(1))
            .connect_lazy(&database.url_by(proxy.address()))
            .unwrap();
        let locks = Locks::new(pool.clone());
        Self { database, near: near.clone(), proxy, pool, locks }
    }

    /// Opens the connections, so that an operation observed afterwards consists of its own messages
    /// only.
    async fn connect(&self) {
        self.locks.check().await.unwrap();
        self.pool_is_whole().await;
    }

    /// How many messages the network has carried, both ways.
    fn messages(&self) -> usize {
        self.proxy.reads(Direction::ToServer) + self.proxy.reads(Direction::ToClient)
    }

    async fn carried(&self, messages: usize) {
        while self.messages() < messages {
            sleep(Duration::from_millis(1)).await;
        }
    }

    fn set_delay(&self, delay: Duration) {
        self.proxy.delay(Direction::ToServer, delay);
        self.proxy.delay(Direction::ToClient, delay);
    }

    /// Polls a future over the slow network, at least once, and drops it when the network has
    /// carried this many messages. `Some`: it has ended before.
    async fn drop_after<F: Future>(&self, messages: usize, future: F) -> Option<F::Output> {
        self.set_delay(DELAY);
        let last = self.messages() + messages;
        let output = {
            let mut future = pin!(future);
            tokio::select! {
                biased;
                output = &mut future => Some(output),
                () = self.carried(last) => None,
            }
        };
        self.set_delay(Duration::ZERO);
        output
    }

    /// Polls a future once and never again. Drops it when this many messages have arrived, so the
    /// answer is there but was not read.
    async fn drop_unread<F: Future>(&self, messages: usize, future: F) {
        let last = self.messages() + messages;
        let mut future = Box::pin(future);
        if poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await.is_ready() {
            return;
        }
        eventually(SOON, async || {
            let held = self.proxy.held(Direction::ToServer) + self.proxy.held(Direction::ToClient);
            self.messages() >= last && held == 0
        })
        .await;
        drop(future);
    }

    /// Waits for everything that is still in progress. The network of a scene ends with it, and a
    /// lock that can't be released then lasts until its TTL is over.
    async fn finish(&self) {
        self.locks.close().await;
        self.pool.close().await;
    }

    async fn lease_is_free(&self, name: &str) {
        let taken = self.near.insert_lock(name).wait(SOON).acquire().await;
        taken.expect("the lease leaked").release().await.unwrap();
    }

    async fn row_is_free(&self, name: &str) {
        let taken = self.near.row_lock(name).wait(SOON).acquire().await;
        taken.expect("the row lock leaked").rollback().await.unwrap();
    }

    /// All slots of the application's pool can be acquired, and no connection in them is inside of
    /// a transaction: other connections see what it writes.
    async fn pool_is_whole(&self) {
        let mut connections = Vec::new();
        for _ in 0..POOL {
            let connection = timeout(SOON, self.pool.acquire()).await.expect("a slot of the pool leaked");
            connections.push(connection.unwrap());
        }
        for connection in &mut connections {
            let mark = new_mark();
            self.write(connection, &mark).await.unwrap();
            assert_eq!(self.seen(&mark).await, 1, "a connection of the pool is inside of a transaction");
        }
    }

    async fn nothing_goes_on(&self) {
        eventually(SOON, async || {
            let activity = self.database.activity().await;
            (activity.transactions, activity.waiting) == (0, 0)
        })
        .await;
    }

    async fn write(&self, connection: &mut Connection<T>, mark: &str) -> sqlx::Result<u64> {
        T::Database::run(connection, &format!("INSERT INTO marks VALUES ('{mark}')")).await
    }

    /// How often other connections see a mark.
    async fn seen(&self, mark: &str) -> i64 {
        self.database.number(&format!("SELECT count(*) FROM marks WHERE mark = '{mark}'")).await
    }
}

/// A text that nothing else has written.
fn new_mark() -> String {
    static LAST: AtomicUsize = AtomicUsize::new(0);
    format!("mark {}", LAST.fetch_add(1, Ordering::Relaxed))
}

/// The moments of an operation, as numbers of messages. The loop ends with the first number that
/// the operation does not reach.
fn moments() -> impl Iterator<Item = usize> {
    (0..MOST_MOMENTS).chain(std::iter::once_with(|| panic!("the operation never ends")))
}

// ------------------------------------------------------------------------------------------ leases

/// The state of a lock when it is requested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lock {
    /// Not even its row exists.
    New,
    Free,
    Held,
}

async fn acquiring_a_lease<T: TestServer>(database: &T) {
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

async fn waiting_for_a_lease<T: TestServer>(database: &T) {
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

async fn releasing_a_lease<T: TestServer>(database: &T) {
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

async fn running_under_a_lease<T: TestServer>(database: &T) {
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

async fn beginning_a_guarded_transaction<T: TestServer>(database: &T) {
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

async fn ending_a_guarded_transaction<T: TestServer>(database: &T) {
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
async fn a_statement_in_a_guarded_transaction<T: TestServer>(database: &T) {
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

// --------------------------------------------------------------------------------------- row locks

/// From the first packet on: connecting and preparing are parts of an operation, too.
async fn acquiring_on_a_new_connection<T: TestServer>(database: &T) {
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

async fn acquiring_a_row_lock<T: TestServer>(database: &T) {
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

async fn ending_a_row_lock<T: TestServer>(database: &T) {
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

async fn locking_a_row_in_the_callers_transaction<T: TestServer>(database: &T) {
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

async fn waiting_in_vain_in_the_callers_transaction<T: TestServer>(database: &T) {
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

async fn waiting_with_success_in_the_callers_transaction<T: TestServer>(database: &T) {
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

// --------------------------------------------------------------------------------------- the whole

async fn migrating<T: TestServer>(database: &T) {
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

async fn closing<T: TestServer>(database: &T) {
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
async fn closing_waits_for_what_was_dropped_before<T: TestServer>(database: &T) {
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
