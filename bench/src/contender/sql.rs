//! Locks in plain SQL, as services write them by hand.

use std::time::Duration;

use anyhow::Context;
use sqlx::{Connection, Pool, Transaction};
use tokio::time::sleep;

use super::{Boxed, Caller, CallerGroup, Contender, Job};
use crate::database::{self, Database};

/// The pause between two attempts to insert the row.
const SHORT_PAUSE: Duration = Duration::from_millis(10);
/// The pause between two attempts to acquire the row, as in `JdbcLockRegistry` of Spring
/// Integration. `ShedLock` does not wait.
const LONG_PAUSE: Duration = Duration::from_millis(100);

struct Floor<DB: Database> {
    connection: DB::Connection,
    row: i64,
}

impl<DB: Database> Caller for Floor<DB> {
    fn set_name(&mut self, _name: &str) {}

    fn acquire(&mut self) -> Boxed<'_, anyhow::Result<Option<i64>>> {
        Box::pin(async {
            DB::touch(&mut self.connection, self.row).await?;
            Ok(None)
        })
    }

    fn release(&mut self) -> Boxed<'_, anyhow::Result<()>> {
        Box::pin(async { Ok(DB::touch(&mut self.connection, self.row).await?) })
    }
}

struct ForUpdate<DB: Database> {
    pool: Pool<DB>,
    row: i64,
    transaction: Option<Transaction<'static, DB>>,
}

impl<DB: Database> Caller for ForUpdate<DB> {
    fn set_name(&mut self, _name: &str) {}

    fn acquire(&mut self) -> Boxed<'_, anyhow::Result<Option<i64>>> {
        Box::pin(async {
            let mut transaction = self.pool.begin().await?;
            DB::select_for_update(&mut transaction, self.row).await?;
            self.transaction = Some(transaction);
            Ok(None)
        })
    }

    fn release(&mut self) -> Boxed<'_, anyhow::Result<()>> {
        Box::pin(async { Ok(self.transaction.take().context("not held")?.commit().await?) })
    }
}

struct Naive<DB: Database> {
    pool: Pool<DB>,
    name: String,
}

impl<DB: Database> Caller for Naive<DB> {
    fn set_name(&mut self, name: &str) {
        name.clone_into(&mut self.name);
    }

    fn acquire(&mut self) -> Boxed<'_, anyhow::Result<Option<i64>>> {
        Box::pin(async {
            loop {
                let mut connection = self.pool.acquire().await?;
                if DB::insert(&mut connection, &self.name).await? {
                    return Ok(None);
                }
                drop(connection);
                sleep(SHORT_PAUSE).await;
            }
        })
    }

    fn release(&mut self) -> Boxed<'_, anyhow::Result<()>> {
        Box::pin(async {
            let mut connection = self.pool.acquire().await?;
            anyhow::ensure!(DB::delete(&mut connection, &self.name).await?, "the row does not exist");
            Ok(())
        })
    }
}

struct Poll<DB: Database> {
    pool: Pool<DB>,
    name: String,
    owner: String,
    /// Whether the row has been created. `ShedLock` also remembers this.
    has_row: bool,
}

impl<DB: Database> Caller for Poll<DB> {
    fn set_name(&mut self, name: &str) {
        name.clone_into(&mut self.name);
        self.has_row = false;
    }

    fn acquire(&mut self) -> Boxed<'_, anyhow::Result<Option<i64>>> {
        Box::pin(async {
            loop {
                let mut connection = self.pool.acquire().await?;
                if !self.has_row {
                    DB::create_row(&mut connection, &self.name).await?;
                    self.has_row = true;
                }
                if DB::acquire_row(&mut connection, &self.owner, &self.name).await? {
                    return Ok(None);
                }
                drop(connection);
                sleep(LONG_PAUSE).await;
            }
        })
    }

    fn release(&mut self) -> Boxed<'_, anyhow::Result<()>> {
        Box::pin(async {
            let mut connection = self.pool.acquire().await?;
            let was_held = DB::release_row(&mut connection, &self.owner, &self.name).await?;
            anyhow::ensure!(was_held, "the lock had another owner");
            Ok(())
        })
    }
}

pub(super) async fn connect<DB: Database>(job: &Job) -> anyhow::Result<CallerGroup> {
    if job.contender == Contender::Floor {
        let options = DB::options(&job.url)?;
        let mut callers: Vec<Box<dyn Caller>> = Vec::new();
        for row in (1..).take(job.names.len()) {
            let connection = DB::Connection::connect_with(&options).await?;
            callers.push(Box::new(Floor::<DB> { connection, row }));
        }
        return Ok(CallerGroup { callers, end: Box::pin(async {}) });
    }
    let pool = database::pool::<DB>(&job.url, job.connections).await?;
    let caller = |(number, name): (i64, &String)| -> Box<dyn Caller> {
        let (pool, name) = (pool.clone(), name.clone());
        match job.contender {
            Contender::ForUpdate => return Box::new(ForUpdate { pool, row: number, transaction: None }),
            Contender::Naive => return Box::new(Naive { pool, name }),
            _ => {}
        }
        let owner = format!("{}/{number}", std::process::id());
        Box::new(Poll { pool, name, owner, has_row: false })
    };
    let callers = (1..).zip(&job.names).map(caller).collect();
    Ok(CallerGroup { callers, end: Box::pin(async move { pool.close().await }) })
}
