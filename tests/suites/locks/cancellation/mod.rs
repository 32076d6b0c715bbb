//! Futures that are dropped at any moment, over a slow network, leak nothing: no lock, no open
//! transaction, no waiter, no slot of the application's pool. All leases here last for minutes. So
//! a lock that is soon free again was released and did not expire.

mod leases;
mod row_locks;
mod shutdown;

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::Duration;

use lock_db::{Error, Lease, Locks, RowGuard};
use lock_tests::{Backend, Direction, Proxy, TestServer, eventually};
use sqlx::pool::PoolOptions;
use sqlx::{Pool, Transaction};
use tokio::sync::oneshot;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::time::{sleep, timeout};

lock_tests::cases! {
    in modules: leases, row_locks, shutdown
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

/// The state of a lock when it is requested.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lock {
    /// Not even its row exists.
    New,
    Free,
    Held,
}
