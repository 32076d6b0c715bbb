//! Session locks of the server: `pg_advisory_lock` and `GET_LOCK`. Each holder and each waiter uses
//! a connection of a pool. The pool does not test its connections before use, which favours these
//! contenders.

use anyhow::Context;
use sqlx::pool::PoolConnection;
use sqlx::{MySql, Pool, Postgres};

use super::{Boxed, Caller, CallerGroup, Job};
use crate::database::{self, Database};

pub(super) trait SessionLocks: Database {
    fn lock(connection: &mut Self::Connection, name: &str)
    -> impl Future<Output = anyhow::Result<()>> + Send;

    fn unlock(
        connection: &mut Self::Connection,
        name: &str,
    ) -> impl Future<Output = anyhow::Result<()>> + Send;
}

impl SessionLocks for Postgres {
    async fn lock(connection: &mut Self::Connection, name: &str) -> anyhow::Result<()> {
        const LOCK: &str = "SELECT pg_advisory_lock(hashtextextended($1, 0))";
        sqlx::query(LOCK).bind(name).execute(connection).await?;
        Ok(())
    }

    async fn unlock(connection: &mut Self::Connection, name: &str) -> anyhow::Result<()> {
        const UNLOCK: &str = "SELECT pg_advisory_unlock(hashtextextended($1, 0))";
        let was_held: bool = sqlx::query_scalar(UNLOCK).bind(name).fetch_one(connection).await?;
        anyhow::ensure!(was_held, "the lock had another owner");
        Ok(())
    }
}

impl SessionLocks for MySql {
    async fn lock(connection: &mut Self::Connection, name: &str) -> anyhow::Result<()> {
        let locked: Option<i64> =
            sqlx::query_scalar("SELECT GET_LOCK(?, 300)").bind(name).fetch_one(connection).await?;
        anyhow::ensure!(locked == Some(1), "the server answered {locked:?}");
        Ok(())
    }

    async fn unlock(connection: &mut Self::Connection, name: &str) -> anyhow::Result<()> {
        let unlocked: Option<i64> =
            sqlx::query_scalar("SELECT RELEASE_LOCK(?)").bind(name).fetch_one(connection).await?;
        anyhow::ensure!(unlocked == Some(1), "the lock had another owner");
        Ok(())
    }
}

struct SessionLock<DB: Database> {
    pool: Pool<DB>,
    name: String,
    connection: Option<PoolConnection<DB>>,
}

impl<DB: SessionLocks> Caller for SessionLock<DB> {
    fn set_name(&mut self, name: &str) {
        name.clone_into(&mut self.name);
    }

    fn acquire(&mut self) -> Boxed<'_, anyhow::Result<Option<i64>>> {
        Box::pin(async {
            let mut connection = self.pool.acquire().await?;
            DB::lock(&mut connection, &self.name).await?;
            self.connection = Some(connection);
            Ok(None)
        })
    }

    fn release(&mut self) -> Boxed<'_, anyhow::Result<()>> {
        Box::pin(async {
            let mut connection = self.connection.take().context("not held")?;
            DB::unlock(&mut connection, &self.name).await
        })
    }
}

pub(super) async fn connect<DB: SessionLocks>(job: &Job) -> anyhow::Result<CallerGroup> {
    let pool = database::pool_options::<DB>(job.connections)
        .test_before_acquire(false)
        .connect_with(DB::options(&job.url)?)
        .await?;
    let caller = |name: &String| -> Box<dyn Caller> {
        Box::new(SessionLock { pool: pool.clone(), name: name.clone(), connection: None })
    };
    let callers = job.names.iter().map(caller).collect();
    Ok(CallerGroup { callers, end: Box::pin(async move { pool.close().await }) })
}
