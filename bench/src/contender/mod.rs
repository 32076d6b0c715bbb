//! The contenders: the ways to lock that are compared.

mod etcd;
mod lock_db;
mod redis;
mod session_locks;
mod sql;
mod zookeeper;

use std::pin::Pin;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sqlx::{MySql, Postgres, Sqlite};

/// A database or service that stores locks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum System {
    Postgres,
    /// Also MariaDB.
    MySql,
    Sqlite,
    Redis,
    ZooKeeper,
    Etcd,
}

impl System {
    /// Whether it is a database that lock-db supports.
    pub(crate) fn is_database(self) -> bool {
        matches!(self, Self::Postgres | Self::MySql | Self::Sqlite)
    }
}

/// A way to lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Contender {
    InsertLock,
    RowLock,
    /// No lock: two committed updates of one row, on a connection that the caller keeps.
    Floor,
    /// `SELECT … FOR UPDATE` of a row that exists, in a transaction of its own.
    ForUpdate,
    /// A row that is inserted and deleted, through a pool with sqlx's defaults.
    Naive,
    /// A row with an expiry, polled every 100 ms.
    Poll,
    AdvisoryLock,
    GetLock,
    Rslock,
    /// `SET NX PX` and `INCR` in one script.
    Token,
    /// ZooKeeper's lock recipe.
    Recipe,
    /// etcd's `Lock` and `Unlock`.
    LockApi,
}

impl Contender {
    pub(crate) fn of(system: System) -> &'static [Self] {
        use Contender::{
            AdvisoryLock, Floor, ForUpdate, GetLock, InsertLock, LockApi, Naive, Poll, Recipe, RowLock,
            Rslock, Token,
        };
        match system {
            System::Postgres => &[InsertLock, RowLock, Floor, ForUpdate, Naive, Poll, AdvisoryLock],
            System::MySql => &[InsertLock, RowLock, Floor, ForUpdate, Naive, Poll, GetLock],
            // It has no `FOR UPDATE`.
            System::Sqlite => &[InsertLock, RowLock, Floor, Naive, Poll],
            System::Redis => &[Rslock, Token],
            System::ZooKeeper => &[Recipe],
            System::Etcd => &[LockApi],
        }
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::InsertLock => "lock-db insert lock",
            Self::RowLock => "lock-db row lock",
            Self::Floor => "floor: two committed updates",
            Self::ForUpdate => "SELECT FOR UPDATE, row exists",
            Self::Naive => "INSERT/DELETE, default pool",
            Self::Poll => "100 ms poll (ShedLock style)",
            Self::AdvisoryLock => "pg_advisory_lock",
            Self::GetLock => "GET_LOCK",
            Self::Rslock => "rslock",
            Self::Token => "SET NX PX + INCR",
            Self::Recipe => "lock recipe",
            Self::LockApi => "lock API",
        }
    }

    /// Whether it writes anything that the server has on disk before it answers.
    pub(crate) fn writes(self, system: System) -> bool {
        match self {
            Self::AdvisoryLock | Self::GetLock => false,
            // PostgreSQL writes the lock into the row.
            Self::ForUpdate => system == System::Postgres,
            _ => true,
        }
    }

    /// Whether it is a lock. The floor is not.
    pub(crate) fn is_a_lock(self) -> bool {
        self != Self::Floor
    }

    pub(crate) fn is_lock_db(self) -> bool {
        matches!(self, Self::InsertLock | Self::RowLock)
    }

    /// How long callers may continue after the end of the measurement. Requests that wait on the
    /// server must not be dropped: the server would keep them in its queue. With many dropped
    /// requests etcd may never grant a lock again (etcd-io/etcd#13336). Other callers are dropped
    /// immediately.
    pub(crate) fn finish_limit(self) -> Duration {
        match self {
            Self::AdvisoryLock | Self::GetLock => Duration::from_secs(5),
            Self::LockApi => Duration::from_mins(1),
            _ => Duration::ZERO,
        }
    }
}

/// A boxed future, which makes [`Caller`] usable as a trait object.
pub(crate) type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A caller that acquires and releases a lock.
pub(crate) trait Caller: Send {
    /// Uses this name from the next acquisition on. The lock must not be held. A caller whose row
    /// exists before the measurement keeps its row.
    fn set_name(&mut self, name: &str);

    /// Waits for the lock. Returns the fencing token, if the contender has one.
    fn acquire(&mut self) -> Boxed<'_, anyhow::Result<Option<i64>>>;

    /// Releases the lock, and waits until it is released.
    fn release(&mut self) -> Boxed<'_, anyhow::Result<()>>;
}

/// The callers of one process, and the end of what they share.
pub(crate) struct CallerGroup {
    pub(crate) callers: Vec<Box<dyn Caller>>,
    /// Closes pools and sessions. To be awaited after all callers are dropped.
    pub(crate) end: Boxed<'static, ()>,
}

/// The workload of one process.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) system: System,
    pub(crate) contender: Contender,
    pub(crate) url: String,
    /// The lock name of each caller. With `new_names` the prefix of its names.
    pub(crate) names: Vec<String>,
    /// Whether each acquisition has a new name.
    pub(crate) new_names: bool,
    /// The maximum size of the pool.
    pub(crate) connections: u32,
    /// The number of this process in the scenario.
    pub(crate) process: u32,
    /// How long a holder keeps the lock.
    pub(crate) hold: Duration,
}

/// Connects to the system and creates the callers.
pub(crate) async fn connect(job: &Job) -> anyhow::Result<CallerGroup> {
    match job.contender {
        Contender::AdvisoryLock => session_locks::connect::<Postgres>(job).await,
        Contender::GetLock => session_locks::connect::<MySql>(job).await,
        Contender::Rslock | Contender::Token => redis::connect(job).await,
        Contender::Recipe => zookeeper::connect(job).await,
        Contender::LockApi => etcd::connect(job).await,
        Contender::InsertLock | Contender::RowLock => match job.system {
            System::Postgres => lock_db::connect::<Postgres>(job).await,
            System::MySql => lock_db::connect::<MySql>(job).await,
            System::Sqlite => lock_db::connect::<Sqlite>(job).await,
            other => anyhow::bail!("lock-db does not lock in {other:?}"),
        },
        Contender::Floor | Contender::ForUpdate | Contender::Naive | Contender::Poll => match job.system {
            System::Postgres => sql::connect::<Postgres>(job).await,
            System::MySql => sql::connect::<MySql>(job).await,
            System::Sqlite => sql::connect::<Sqlite>(job).await,
            other => anyhow::bail!("there is no SQL in {other:?}"),
        },
    }
}
