//! lock-db as a service uses it: one `Locks` and one pool with sqlx's defaults per process.

use std::time::Duration;

use anyhow::Context;
use lock_db::{Lease, LockDatabase, Locks, RowGuard};

use super::{Boxed, Caller, CallerGroup, Contender, Job};
use crate::database::{self, Database};

const WAIT: Duration = Duration::from_mins(5);

struct InsertLock<DB: LockDatabase> {
    locks: Locks<DB>,
    name: String,
    lease: Option<Lease<DB>>,
}

impl<DB: Database> Caller for InsertLock<DB> {
    fn set_name(&mut self, name: &str) {
        name.clone_into(&mut self.name);
    }

    fn acquire(&mut self) -> Boxed<'_, anyhow::Result<Option<i64>>> {
        Box::pin(async {
            let lease = self.locks.insert_lock(&self.name).wait(WAIT).acquire().await?;
            let token = lease.fencing_token();
            self.lease = Some(lease);
            Ok(Some(token))
        })
    }

    fn release(&mut self) -> Boxed<'_, anyhow::Result<()>> {
        Box::pin(async { Ok(self.lease.take().context("not held")?.release().await?) })
    }
}

struct RowLock<DB: LockDatabase> {
    locks: Locks<DB>,
    name: String,
    guard: Option<RowGuard<DB>>,
}

impl<DB: Database> Caller for RowLock<DB> {
    fn set_name(&mut self, name: &str) {
        name.clone_into(&mut self.name);
    }

    fn acquire(&mut self) -> Boxed<'_, anyhow::Result<Option<i64>>> {
        Box::pin(async {
            self.guard = Some(self.locks.row_lock(&self.name).wait(WAIT).acquire().await?);
            Ok(None)
        })
    }

    fn release(&mut self) -> Boxed<'_, anyhow::Result<()>> {
        // A service commits what it wrote under the lock.
        Box::pin(async { Ok(self.guard.take().context("not held")?.commit().await?) })
    }
}

pub(super) async fn connect<DB: Database>(job: &Job) -> anyhow::Result<CallerGroup> {
    let pool = database::pool::<DB>(&job.url, job.connections).await?;
    let locks = Locks::new(pool.clone());
    locks.check().await?;
    let caller = |name: &String| -> Box<dyn Caller> {
        let (locks, name) = (locks.clone(), name.clone());
        if job.contender == Contender::InsertLock {
            Box::new(InsertLock { locks, name, lease: None })
        } else {
            Box::new(RowLock { locks, name, guard: None })
        }
    };
    let callers = job.names.iter().map(caller).collect();
    let end = Box::pin(async move {
        locks.close().await;
        pool.close().await;
    });
    Ok(CallerGroup { callers, end })
}
