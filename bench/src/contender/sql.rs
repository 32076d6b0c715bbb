//! Locks in plain SQL, as services write them by hand.

use std::time::Duration;

use sqlx::{Connection, Pool};
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

struct Naive<DB: Database> {
    pool: Pool<DB>,
    name: String,
}

impl<DB: Database> Caller for Naive<DB> {
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
    let caller = |(number, name): (usize, &String)| -> Box<dyn Caller> {
        let (pool, name) = (pool.clone(), name.clone());
        if job.contender == Contender::Naive {
            return Box::new(Naive { pool, name });
        }
        let owner = format!("{}/{number}", std::process::id());
        Box::new(Poll { pool, name, owner, has_row: false })
    };
    let callers = job.names.iter().enumerate().map(caller).collect();
    Ok(CallerGroup { callers, end: Box::pin(async move { pool.close().await }) })
}
