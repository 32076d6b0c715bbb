//! The guards that a test has open, so that `assert_held` also finds locks that are not held by the
//! body of a function or of `run`.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::time::{Duration, Instant};

use tokio::runtime::{Handle, Id};
use tokio::sync::watch;

use super::switch::is_switched_off;
use crate::Kind;
use crate::context::Context;
use crate::database::LockDatabase;
use crate::error::Loss;
use crate::in_transaction::{Attempt, HeldInTransaction};
use crate::name::Name;
use crate::options::Wait;
use crate::reentrancy::{Held, Instance};
use crate::runtime::Runtime;
use crate::session::LeaseHandle;

/// Locks in transactions end without notice, so the list is capped.
const MOST: usize = 10_000;
/// How long the database may take to report whether a transaction still has its lock. Without an
/// answer the lock counts as held.
const ASK_LIMIT: Duration = Duration::from_millis(250);

static GUARDS: Mutex<Vec<OpenGuard>> = Mutex::new(Vec::new());

/// An open guard.
#[derive(Clone)]
pub(crate) struct OpenGuard {
    pub(crate) locks: Instance,
    pub(crate) name: Name,
    pub(crate) kind: Kind,
    /// Every test has its own runtime.
    runtime: Option<Id>,
    /// Whether it was taken inside of `without_locks`.
    is_inside_of_switch: bool,
    open: Open,
}

#[derive(Clone)]
enum Open {
    /// With the channel on which a loss is reported. The lease is referenced weakly: another handle
    /// would be counted.
    Lease(Weak<LeaseHandle>, Option<watch::Receiver<Option<Loss>>>),
    Row(Weak<()>),
    /// In a transaction of the caller, whose end is not reported. The function asks the database;
    /// it returns `None` if the `Locks` is gone.
    Transaction(Arc<dyn Fn() -> Option<bool> + Send + Sync>),
}

impl OpenGuard {
    /// Whether the guard exists and its lock is not lost. A lock in a transaction counts as open
    /// until the database is asked.
    fn is_open(&self) -> bool {
        match &self.open {
            Open::Lease(handle, loss) => {
                handle.strong_count() > 0 && loss.as_ref().is_none_or(|loss| loss.borrow().is_none())
            }
            Open::Row(guard) => guard.strong_count() > 0,
            Open::Transaction(_) => true,
        }
    }

    pub(crate) fn is_held(&self) -> bool {
        match &self.open {
            Open::Transaction(ask) => ask().unwrap_or(false),
            _ => self.is_open(),
        }
    }

    pub(crate) fn is_in_transaction(&self) -> bool {
        matches!(self.open, Open::Transaction(_))
    }

    fn is_same(&self, other: &Self) -> bool {
        self.is_in_transaction()
            && other.is_in_transaction()
            && (self.locks, &self.name, self.kind, self.runtime)
                == (other.locks, &other.name, other.kind, other.runtime)
    }

    fn note(self) {
        let mut guards = guards();
        if guards.len() >= MOST {
            guards.clear();
        }
        guards.retain(|guard| guard.is_open() && !guard.is_same(&self));
        guards.push(self);
    }
}

fn guards() -> MutexGuard<'static, Vec<OpenGuard>> {
    GUARDS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn current_runtime() -> Option<Id> {
    Handle::try_current().ok().map(|runtime| runtime.id())
}

/// Returns the open guards of the test that the calling code belongs to. Inside of `without_locks`,
/// where a lock is missing on purpose, it returns only the guards that were taken there.
pub(crate) fn of_this_test() -> Vec<OpenGuard> {
    let runtime = current_runtime();
    let is_inside_of_switch = is_switched_off();
    let counts = |guard: &&OpenGuard| {
        guard.runtime == runtime && guard.is_open() && (guard.is_inside_of_switch || !is_inside_of_switch)
    };
    guards().iter().filter(counts).cloned().collect()
}

pub(crate) fn note_open_lease<DB: LockDatabase>(context: &Context<DB>, handle: &Arc<LeaseHandle>) {
    note(context, handle.name(), Kind::Insert, Open::Lease(Arc::downgrade(handle), handle.loss()));
}

/// The guard keeps the returned value.
pub(crate) fn note_open_row<DB: LockDatabase>(context: &Context<DB>, name: &Name) -> Arc<()> {
    let guard = Arc::new(());
    note(context, name, Kind::Row, Open::Row(Arc::downgrade(&guard)));
    guard
}

pub(crate) fn note_in_transaction<'a, DB: LockDatabase>(
    context: &Arc<Context<DB>>,
    kind: Kind,
    taken: impl IntoIterator<Item = &'a HeldInTransaction>,
) {
    for held in taken {
        let (weak, name) = (Arc::downgrade(context), held.name_in_table().clone());
        let ask = move || Some(is_taken(weak.upgrade()?, &name, kind));
        note(context, held.name_in_table(), kind, Open::Transaction(Arc::new(ask)));
    }
}

fn note<DB: LockDatabase>(context: &Context<DB>, name: &Name, kind: Kind, open: Open) {
    let (name, runtime) = (name.clone(), current_runtime());
    let is_inside_of_switch = is_switched_off();
    OpenGuard { locks: context.instance(), name, kind, runtime, is_inside_of_switch, open }.note();
}

/// Whether a transaction has the lock. This is found out by a try in another transaction, on a
/// thread that does not wait for the caller's.
fn is_taken<DB: LockDatabase>(context: Arc<Context<DB>>, name: &Name, kind: Kind) -> bool {
    let Some(runtime) = Runtime::own() else { return true };
    let (answer, answered) = mpsc::channel();
    let name = name.clone();
    let asking = runtime.spawn(async move {
        let _gone = answer.send(!is_free(&context, &name, kind).await);
    });
    let is_taken = answered.recv_timeout(ASK_LIMIT).unwrap_or(true);
    asking.abort();
    is_taken
}

async fn is_free<DB: LockDatabase>(context: &Context<DB>, name: &Name, kind: Kind) -> bool {
    let Ok(mut transaction) = context.pool().begin().await else { return false };
    let attempt = Attempt { context, name, kind, wait: Wait::Try, started: Instant::now() };
    let locked = attempt.lock_in(&mut transaction).await;
    transaction.rollback().await.is_ok() && matches!(locked, Ok(Some(_)))
}
