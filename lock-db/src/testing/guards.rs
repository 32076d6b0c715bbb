//! Which guards a test has open, so that `assert_held` sees what no body of a function or of `run` shows.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, mpsc};
use std::time::Duration;

use tokio::runtime::{Handle, Id};
use tokio::sync::watch;

use super::is_switched_off;
use crate::database::LockDatabase;
use crate::error::Loss;
use crate::insert::Hold;
use crate::name::Name;
use crate::reentry::{Held, Instance};
use crate::runtime::Runtime;
use crate::{HeldInTransaction, Kind, Locks};

/// Locks in transactions end without a word to us, so this is bounded.
const MOST: usize = 10_000;
/// How long the database may take to say whether a transaction still has its lock. What takes longer is taken for held.
const ASK_LIMIT: Duration = Duration::from_millis(250);

static GUARDS: Mutex<Vec<Guard>> = Mutex::new(Vec::new());

/// An open guard.
#[derive(Clone)]
pub(super) struct Guard {
    pub(super) locks: Instance,
    pub(super) name: Name,
    pub(super) kind: Kind,
    /// Every test has a runtime of its own.
    runtime: Option<Id>,
    /// Taken where annotated functions run without their locks.
    is_inside_of_switch: bool,
    open: Open,
}

#[derive(Clone)]
enum Open {
    /// With where a loss is told. The lease itself is only looked at: a handle more would be counted.
    Lease(Weak<Hold>, Option<watch::Receiver<Option<Loss>>>),
    Row(Weak<()>),
    /// Of the caller, who does not tell when it ends. The function asks the database; `None` when the `Locks` is gone.
    Transaction(Arc<dyn Fn() -> Option<bool> + Send + Sync>),
}

impl Guard {
    /// Whether the guard is there and its lock is not lost. A lock in a transaction is there until somebody asks.
    fn is_open(&self) -> bool {
        match &self.open {
            Open::Lease(hold, loss) => {
                hold.strong_count() > 0 && loss.as_ref().is_none_or(|loss| loss.borrow().is_none())
            }
            Open::Row(guard) => guard.strong_count() > 0,
            Open::Transaction(_) => true,
        }
    }

    pub(super) fn is_held(&self) -> bool {
        match &self.open {
            Open::Transaction(ask) => ask().unwrap_or(false),
            _ => self.is_open(),
        }
    }

    pub(super) fn is_in_transaction(&self) -> bool {
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

fn guards() -> MutexGuard<'static, Vec<Guard>> {
    GUARDS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn current_runtime() -> Option<Id> {
    Handle::try_current().ok().map(|runtime| runtime.id())
}

/// Those of the test that the calling code belongs to. Inside of `without_locks`, where a lock is missing on purpose, only what was
/// taken in there.
pub(super) fn of_this_test() -> Vec<Guard> {
    let runtime = current_runtime();
    let is_inside_of_switch = is_switched_off();
    let counts = |guard: &&Guard| {
        guard.runtime == runtime && guard.is_open() && (guard.is_inside_of_switch || !is_inside_of_switch)
    };
    guards().iter().filter(counts).cloned().collect()
}

/// What a test has taken by hand.
impl<DB: LockDatabase> Locks<DB> {
    pub(crate) fn lease_is_open(&self, hold: &Arc<Hold>) {
        self.note(hold.name(), Kind::Insert, Open::Lease(Arc::downgrade(hold), hold.loss()));
    }

    /// The guard keeps the answer.
    pub(crate) fn row_is_open(&self, name: &Name) -> Arc<()> {
        let guard = Arc::new(());
        self.note(name, Kind::Row, Open::Row(Arc::downgrade(&guard)));
        guard
    }

    pub(crate) fn are_in_transaction<'a>(
        &self,
        kind: Kind,
        taken: impl IntoIterator<Item = &'a HeldInTransaction>,
    ) {
        for held in taken {
            let (locks, name) = (self.downgrade(), held.name().to_owned());
            let ask = move || Some(is_taken(&locks.upgrade()?, &name, kind));
            self.note(held.name_in_table(), kind, Open::Transaction(Arc::new(ask)));
        }
    }

    fn note(&self, name: &Name, kind: Kind, open: Open) {
        let (name, runtime) = (name.clone(), current_runtime());
        let is_inside_of_switch = is_switched_off();
        Guard { locks: self.instance(), name, kind, runtime, is_inside_of_switch, open }.note();
    }
}

/// Whether a transaction has the lock, by the database's word, on a thread that does not wait for the caller's.
fn is_taken<DB: LockDatabase>(locks: &Locks<DB>, name: &str, kind: Kind) -> bool {
    let Some(runtime) = Runtime::own() else { return true };
    let (answer, answered) = mpsc::channel();
    let (locks, name) = (locks.clone(), name.to_owned());
    let asking = runtime.spawn(async move {
        let is_free = match kind {
            Kind::Row => match locks.row_lock(&name).try_acquire().await {
                Ok(Some(guard)) => guard.rollback().await.is_ok(),
                _ => false,
            },
            Kind::Insert => match locks.insert_lock(&name).try_acquire().await {
                Ok(Some(lease)) => lease.release().await.is_ok(),
                _ => false,
            },
        };
        let _gone = answer.send(!is_free);
    });
    let is_taken = answered.recv_timeout(ASK_LIMIT).unwrap_or(true);
    asking.abort();
    is_taken
}
