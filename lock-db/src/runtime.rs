//! The runtime on which lock-db begins and ends its own transactions.
//!
//! A socket belongs to the runtime on which it was connected, and fails when that runtime has
//! ended. So does a task that was to commit or roll back. A pool that is shared by several
//! runtimes, such as those of tests, passes such sockets from one to the other. Also, tokio's clock
//! may be paused in a test, and then the pool's own time limit expires at once. So if the caller's
//! runtime may end before the process does, a runtime that never ends is used.

use std::io;
use std::sync::OnceLock;

use tokio::runtime::{Builder, Handle, RuntimeFlavor};
use tokio::task::JoinHandle;
use tracing::instrument::WithSubscriber;

use crate::Error;
use crate::error::Action;
use crate::name::Name;

const THREADS: usize = 2;

/// Where lock-db's own tasks run.
#[derive(Debug, Clone)]
pub(crate) struct Runtime {
    handle: Handle,
    is_own: bool,
}

impl Runtime {
    /// The runtime for the transactions of this caller.
    pub(crate) fn current() -> Result<Self, Error> {
        let handle = Handle::try_current().map_err(|_| Error::InvalidOption {
            option: "runtime",
            value: "none".into(),
            reason: "transactions are begun inside a tokio runtime, like everything of sqlx",
        })?;
        let own = if may_end(&handle) { Self::own() } else { None };
        Ok(own.unwrap_or(Self { handle, is_own: false }))
    }

    /// The runtime that never ends. `None`: its threads could not be started.
    pub(crate) fn own() -> Option<Self> {
        static OWN: OnceLock<Option<tokio::runtime::Runtime>> = OnceLock::new();
        let runtime =
            OWN.get_or_init(|| start().inspect_err(|error| tracing::warn!(%error, "no thread")).ok());
        runtime.as_ref().map(|runtime| Self { handle: runtime.handle().clone(), is_own: true })
    }

    #[cfg(test)]
    pub(crate) fn of(handle: Handle) -> Self {
        Self { handle, is_own: false }
    }

    pub(crate) fn spawn<F>(&self, task: F) -> JoinHandle<F::Output>
    where
        F: Future<Output: Send> + Send + 'static,
    {
        if self.is_own {
            // Tests capture what is logged on their own threads.
            return self.handle.spawn(task.with_current_subscriber());
        }
        self.handle.spawn(task)
    }

    /// For drops outside of any runtime.
    pub(crate) fn enter(&self) -> tokio::runtime::EnterGuard<'_> {
        self.handle.enter()
    }
}

/// Tests are debug builds, and their runtimes end with them. A single-threaded runtime ends with
/// the work that it was made for. A multi-threaded runtime in an optimised build belongs to the
/// program.
fn may_end(runtime: &Handle) -> bool {
    cfg!(debug_assertions) || runtime.runtime_flavor() == RuntimeFlavor::CurrentThread
}

/// It has several threads, because the pool's hooks run on it. A hook may block its thread, or use
/// `block_in_place`.
fn start() -> io::Result<tokio::runtime::Runtime> {
    Builder::new_multi_thread().worker_threads(THREADS).thread_name("lock-db io").enable_all().build()
}

const TASK_ENDED: &str =
    "its task was ended, by the end of its tokio runtime or by a panic in a hook of the pool";

/// The error for a task that ended with its runtime, or had not begun before that. Nothing of its
/// work is kept.
pub(crate) fn ended(action: Action, name: &Name) -> Error {
    Error::other(action, Some(name.given()), true, TASK_ENDED)
}
