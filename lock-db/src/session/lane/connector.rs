//! How private connections are made: with the options that the application's pool has now, on a thread beside the session's.
//!
//! The pool's `after_connect` hook is the application's code. It may panic, block its thread, or never return; there it costs one
//! attempt and nothing else.

use std::any::Any;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use sqlx::pool::PoolOptions;
use sqlx::{ConnectOptions, Connection, Pool};
use tokio::runtime::Handle;
use tokio::select;
use tokio::sync::oneshot;
use tokio::task::{JoinError, spawn_blocking};

use super::server::Way;
use crate::connecting::telling_why;
use crate::database::{Location, LockDatabase};
use crate::error::{Failure, HookFailure};

/// How long a pool tries for one connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How many attempts may be under way, among them those that were given up while a hook blocks their thread.
const MOST: usize = 2;

/// Makes the connections of one lane, one at a time.
pub(super) struct Connector<DB: LockDatabase> {
    application: Pool<DB>,
    location: Arc<Location>,
    /// Where the first one led. A `Locks` has one table.
    database: String,
    under_way: Vec<(Weak<()>, Instant)>,
}

impl<DB: LockDatabase> Connector<DB> {
    pub(super) fn new(application: Pool<DB>, location: &Arc<Location>) -> Self {
        let database = DB::database_name(&application.connect_options());
        let location = Arc::clone(location);
        Self { application, location, database, under_way: Vec::new() }
    }

    /// How old a connection becomes.
    pub(super) fn lifetime(&self) -> Option<Duration> {
        self.application.options().get_max_lifetime()
    }

    /// May be dropped at any time: then nothing comes of it, and a connection that is made too late is closed.
    pub(super) async fn make(&mut self, listening: bool) -> Result<Way<DB>, Failure> {
        self.under_way.retain(|(attempt, _)| attempt.strong_count() > 0);
        if let Some((_, begun)) = self.under_way.first()
            && self.under_way.len() >= MOST
        {
            return Err(Failure::hook::<DB>(HookFailure::Waits(begun.elapsed())));
        }
        let options = self.application.connect_options();
        self.check(&options)?;
        // One of its own for each connection: none is ever returned to it. Secrets belong in no log.
        let pool = hooks(&self.application)
            .connect_lazy_with(DB::private_options(&options).disable_statement_logging());
        let attempt = Arc::new(());
        self.under_way.push((Arc::downgrade(&attempt), Instant::now()));
        let (wanted, unwanted) = oneshot::channel::<()>();
        let (runtime, own) = (Handle::current(), pool.clone());
        let making = spawn_blocking(move || {
            let way = runtime.block_on(async {
                select! {
                    biased;
                    _ = unwanted => Err(sqlx::Error::PoolTimedOut),
                    way = open(&own, listening) => way,
                }
            });
            drop(attempt);
            way
        });
        let made = async { Ok(making.await) };
        let made = telling_why(&pool, made).await.map_err(Failure::new::<DB>)?;
        drop(wanted);
        match made {
            // The server is there, or that would have been told: so it is the hook that lets none through.
            Ok(Err(sqlx::Error::PoolTimedOut)) => Err(Failure::hook::<DB>(HookFailure::Waits(CONNECT_LIMIT))),
            Ok(way) => way.map_err(Failure::new::<DB>),
            Err(ended) => Err(Failure::hook::<DB>(HookFailure::Panicked(message(ended)))),
        }
    }

    fn check(&self, options: &<DB::Connection as Connection>::Options) -> Result<(), Failure> {
        let refused = |reason: String| Failure::new::<DB>(sqlx::Error::Configuration(reason.into()));
        let database = DB::database_name(options);
        if database != self.database {
            return Err(refused(format!(
                "the pool's options lead to the database `{database}` now, and this `Locks` has its table in `{}`: make a new \
                 `Locks` for the other database",
                self.database
            )));
        }
        DB::check_options(options, self.location.schema().as_deref())
            .map_err(|error| refused(error.to_string()))
    }
}

fn hooks<DB: LockDatabase>(application: &Pool<DB>) -> PoolOptions<DB> {
    application
        .options()
        .clone()
        .max_connections(1)
        .min_connections(0)
        .acquire_timeout(CONNECT_LIMIT)
        .acquire_slow_threshold(Duration::MAX)
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        // Not for what leaves the pool for good.
        .after_release(|_, _| Box::pin(async { Ok(false) }))
}

async fn open<DB: LockDatabase>(pool: &Pool<DB>, listening: bool) -> sqlx::Result<Way<DB>> {
    Ok(if listening {
        Way::Listening(DB::connect_listening(pool).await?)
    } else {
        Way::Plain(pool.acquire().await?.detach())
    })
}

/// What a panic said.
fn message(ended: JoinError) -> String {
    let Ok(panic) = ended.try_into_panic() else { return "its thread has ended".into() };
    let panic: &(dyn Any + Send) = &*panic;
    let text = panic.downcast_ref::<&str>().copied().map(str::to_owned);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "not by a text".into())
}
