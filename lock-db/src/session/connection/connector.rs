//! Makes private connections, with the options that the application's pool has at that time, on a
//! thread beside the session's.
//!
//! The pool's `after_connect` hook is the application's code. It may panic, block its thread, or
//! never return. On this thread it only costs one attempt.

use std::any::Any;
use std::cell::Cell;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use sqlx::pool::PoolOptions;
use sqlx::{ConnectOptions, Connection, Pool};
use tokio::runtime::Handle;
use tokio::select;
use tokio::sync::oneshot;
use tokio::task::{JoinError, spawn_blocking};
use tokio::time::sleep;

use super::life::Link;
use crate::connecting::PATIENCE;
use crate::database::{Failure, HookFailure, StepError};
use crate::database::{Location, LockDatabase};

/// How long a pool tries to make one connection.
pub(super) const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How many attempts may be in progress, including those that were given up while a hook blocks
/// their thread.
const MOST: usize = 2;

/// Since when a connection has been pending that the server has probably accepted, so that it waits
/// for a hook.
pub(super) type WaitsForHook = Rc<Cell<Option<Instant>>>;

/// Makes the connections of one connection worker, one at a time.
pub(super) struct Connector<DB: LockDatabase> {
    application: Pool<DB>,
    location: Arc<Location>,
    /// The database that the first connection led to. A `Locks` has one table.
    database: String,
    under_way: Vec<(Weak<()>, Instant)>,
    /// How long the last connection took to make.
    took: Duration,
    waits_for_hook: WaitsForHook,
}

impl<DB: LockDatabase> Connector<DB> {
    pub(super) fn new(
        application: Pool<DB>,
        location: &Arc<Location>,
        waits_for_hook: &WaitsForHook,
    ) -> Self {
        let database = DB::database_name(&application.connect_options());
        let location = Arc::clone(location);
        Self {
            application,
            location,
            database,
            under_way: Vec::new(),
            took: Duration::ZERO,
            waits_for_hook: Rc::clone(waits_for_hook),
        }
    }

    pub(super) fn waits_for_hook(&self) -> &WaitsForHook {
        &self.waits_for_hook
    }

    pub(super) fn idle_timeout(&self) -> Option<Duration> {
        self.application.options().get_idle_timeout()
    }

    /// The maximum age of a connection.
    pub(super) fn lifetime(&self) -> Option<Duration> {
        self.application.options().get_max_lifetime()
    }

    /// May be dropped at any time. A connection that is made too late is closed.
    pub(super) async fn make(&mut self, listening: bool) -> Result<Link<DB>, Failure> {
        self.under_way.retain(|(attempt, _)| attempt.strong_count() > 0);
        if let Some((_, begun)) = self.under_way.first()
            && self.under_way.len() >= MOST
        {
            return Err(Failure::hook::<DB>(&HookFailure::Waits(begun.elapsed())));
        }
        let options = self.application.connect_options();
        self.check(&options)?;
        let options = DB::private_options(&options).disable_statement_logging();
        // Each connection has its own pool, which it never returns to. Statements are not logged,
        // because secrets must not appear in a log.
        let pool = hooks(&self.application).connect_lazy_with(options.clone());
        let (attempt, begun) = (Arc::new(()), Instant::now());
        self.under_way.push((Arc::downgrade(&attempt), begun));
        let (wanted, unwanted) = oneshot::channel::<()>();
        let runtime = Handle::current();
        let making = spawn_blocking(move || {
            let link = runtime.block_on(async {
                select! {
                    biased;
                    _ = unwanted => Err(sqlx::Error::PoolTimedOut.into()),
                    link = open(&pool, listening) => link,
                }
            });
            drop(attempt);
            link
        });
        self.waits_for_hook.set(None);
        let patience = PATIENCE.max(2 * self.took);
        let made = select! {
            biased;
            made = making => made,
            refused = beside::<DB>(&options, &self.waits_for_hook, begun, patience) => Ok(Err(refused)),
        };
        drop(wanted);
        let waits_for_hook = self.waits_for_hook.take().is_some();
        match made {
            Ok(Err(StepError::Sqlx(sqlx::Error::PoolTimedOut))) if waits_for_hook => {
                Err(Failure::hook::<DB>(&HookFailure::Waits(begun.elapsed())))
            }
            Ok(Ok(link)) => {
                self.took = begun.elapsed();
                Ok(link)
            }
            Ok(Err(refused)) => Err(Failure::new::<DB>(refused)),
            Err(ended) => Err(Failure::hook::<DB>(&HookFailure::Panicked(message(ended)))),
        }
    }

    fn check(&self, options: &<DB::Connection as Connection>::Options) -> Result<(), Failure> {
        let refused = |reason: String| Failure::new::<DB>(StepError::refused(reason));
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
        // Connections leave the pool for good, so nothing is returned to it.
        .after_release(|_, _| Box::pin(async { Ok(false) }))
}

/// Connects to the server beside a connection that takes long. Resolves if the server refuses. If
/// the server accepts, the first connection is waiting for a hook.
async fn beside<DB: LockDatabase>(
    options: &<DB::Connection as Connection>::Options,
    waits_for_hook: &WaitsForHook,
    begun: Instant,
    patience: Duration,
) -> StepError {
    sleep(patience).await;
    match options.connect().await {
        Err(refused) => return refused.into(),
        Ok(connection) => drop(connection.close().await),
    }
    waits_for_hook.set(Some(begun));
    std::future::pending().await
}

async fn open<DB: LockDatabase>(pool: &Pool<DB>, listening: bool) -> Result<Link<DB>, StepError> {
    Ok(if listening {
        Link::Listening(DB::connect_listening(pool).await?)
    } else {
        Link::Plain(pool.acquire().await?.detach())
    })
}

/// The failure when there is no answer after `waited`.
pub(super) fn no_answer<DB: LockDatabase>(waits_for_hook: &WaitsForHook, waited: Duration) -> Failure {
    waits_for_hook.get().map_or_else(
        || Failure::no_answer::<DB>(waited),
        |since| Failure::hook::<DB>(&HookFailure::Waits(since.elapsed())),
    )
}

/// The message of a panic.
fn message(ended: JoinError) -> String {
    let Ok(panic) = ended.try_into_panic() else { return "its thread has ended".into() };
    let panic: &(dyn Any + Send) = &*panic;
    let text = panic.downcast_ref::<&str>().copied().map(str::to_owned);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "not by a text".into())
}
